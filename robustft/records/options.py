"""The options of a multiple-choice question, in the forms in which files hold them."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from robustft.records.formats import BadRowError, has_nan, load_json, type_name
from robustft.records.framing import MAX_LINE_BYTES, short
from robustft.records.values import text

LETTERS = string.ascii_uppercase
_LABELS = ("label", "id", "key")  # names under which an option's label stands beside its text
_TEXTS = ("text", "value")
# "A. ", "(b) ", "C: " before a text.
_LETTERED = re.compile(r"\s*\(?([A-Za-z])[).:]+\s+(?=\S)")


def read_options(value: Any, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Labels, () where there are none, and texts of the options in field `name`.

    A list, one in JSON, `{"A": text}` (in Parquet a struct or a map), `[{"label": "A", "text": …}]`
    or the same by columns; a label may also be called `id` or `key`, a text `value`. Raises
    BadRowError.
    """
    if type(value) is list and 2 <= len(value) <= len(LETTERS) and _plain(value):
        return (), tuple(value)  # the usual case; what follows says the same of it
    if isinstance(value, str):
        value = json_list(value, name)
    labels: Sequence[Any] = ()
    if isinstance(value, (list, tuple)) and value and (names := _named(value)):
        labels, value = ([option[key] for option in value] for key in names)
    elif isinstance(value, (list, tuple)) and value and all(map(_pair, value)):
        labels, value = zip(*value, strict=True)
    elif isinstance(value, Mapping):
        found = _named([value])
        value = {label: option for label, option in value.items() if option is not None}
        if found and (
            set(value) <= set(found) or any(isinstance(value.get(k), (list, tuple)) for k in found)
        ):  # by columns, or one option where a list of them belongs
            labels, value = map(value.get, found)
        else:
            labels, value = list(value), list(value.values())
    if not isinstance(value, (list, tuple)) or not isinstance(labels, (list, tuple)):
        wrong = labels if isinstance(value, (list, tuple)) else value
        raise BadRowError(f"field {name!r}: expected a list, found {type_name(wrong)}")
    if not 2 <= len(value) <= len(LETTERS):
        raise BadRowError(
            f"field {name!r}: expected 2 to {len(LETTERS)} options, found {len(value)}"
        )
    if labels and len(labels) != len(value):
        raise BadRowError(f"field {name!r}: {len(value)} options but {len(labels)} labels")
    told = tuple(
        # 1.0 is what pandas makes of a label 1 beside nulls; an answer 1 means it.
        str(int(label)) if isinstance(label, float) and label.is_integer() else text(label, name)
        for label in labels
    )
    if len(set(told)) < len(told):
        raise BadRowError(f"field {name!r}: expected different labels, found {', '.join(told)}")
    return told, tuple(text(option, name) for option in value)


def without_letters(options: tuple[str, ...]) -> tuple[str, ...]:
    """`options` less the letters before them, as in "A. apple", where each has the one it is due.

    As they are where one has not.
    """
    if options[0][:2].strip(" (")[:1] not in ("A", "a"):
        return options  # nearly always
    found = [_LETTERED.match(option) for option in options]
    bare = [
        option[match.end() :]
        for option, match, letter in zip(options, found, LETTERS, strict=False)
        if match and match[1].upper() == letter
    ]
    return tuple(bare) if len(bare) == len(options) else options


def lettered(answer: str) -> tuple[str, str] | None:
    """Letter (a capital) and text of an answer such as "B. stone"; None for any other."""
    match = _LETTERED.match(answer)
    return (match[1].upper(), answer[match.end() :]) if match else None


def with_letter(answer: str, letter: str, text: str = "") -> str:
    """`answer`, such as "(b)" or "B. stone", with another letter (a capital) and its text."""
    at = next(i for i, character in enumerate(answer) if character.isalpha())
    match = _LETTERED.match(answer) if text else None
    rest = answer[at + 1 :] if match is None else answer[at + 1 : match.end()] + text
    return answer[:at] + (letter if answer[at].isupper() else letter.lower()) + rest


def json_list(value: str, name: str) -> Any:
    """Parse JSON in a cell; raises `BadRowError`."""
    try:
        return load_json(value.encode())
    except ValueError:
        hint = " with NaN, which is no JSON" if has_nan(value.encode()) else ""
        if re.match(r"\s*[\[{]\s*'", value):
            hint = ", which is Python's notation: json.dumps writes JSON"
        raise BadRowError(
            f"field {name!r}: expected a JSON list, found {short(value)!r}{hint}"
        ) from None


def _named(options: Iterable[Any]) -> tuple[str, str] | None:
    """The names of label and text in all of these; None where one lacks them or has two."""
    found: set[tuple[str, str]] = set()
    for option in options:
        if not isinstance(option, Mapping):
            return None
        labels, texts = (_present(names, option) for names in (_LABELS, _TEXTS))
        if len(labels) != 1 or len(texts) != 1:
            return None
        found.add((labels[0], texts[0]))
    return found.pop() if len(found) == 1 else None


def _pair(option: Any) -> bool:
    """Whether this is an entry of one of Arrow's maps."""
    return isinstance(option, tuple) and len(option) == 2


def _present(names: tuple[str, ...], option: Mapping[str, Any]) -> list[str]:
    """Those of `names` that an option has.

    Arrow gives every row the keys of all, with null where it has none; a null alone is its own.
    """
    found = [name for name in names if name in option]
    return [name for name in found if option[name] is not None] or found


def _plain(values: Sequence[Any]) -> bool:
    """Whether all of these are texts with which nothing is wrong."""
    try:
        joined = "".join(values)
    except TypeError:
        return False
    return len(joined) <= MAX_LINE_BYTES and "\0" not in joined
