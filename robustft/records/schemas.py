"""Where question, options, answer and context stand in a row, and how a new answer is put back.

Six schemas: choice, qa, alpaca, prompt-completion, messages, sharegpt. Where fields have other
names, these stand behind the schema's: "qa:Prompt,Label". A schema reads the fields it names and no
other, so a column such as `gt`, which holds the truth in some noisy sets, is passed through unseen.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, NamedTuple, Protocol

from robustft.errors import UserError
from robustft.records.formats import BadRowError, dump_json, type_name
from robustft.records.framing import field_names, short
from robustft.records.options import (
    LETTERS,
    json_list,
    lettered,
    read_options,
    with_letter,
    without_letters,
)
from robustft.records.values import field, filled, has_field, like, text
from robustft.terminal import listed, printable

_log = logging.getLogger("robustft")
Context = tuple[tuple[str, str], ...]


class Parsed(NamedTuple):
    """What a schema reads from a row; `options` is None for open questions."""

    question: str
    options: tuple[str, ...] | None
    answer: str
    context: Context


class Schema(Protocol):
    """One way to lay out a training example. `fields` must all be present."""

    @property
    def name(self) -> str:
        """Name for `--schema`."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields every row must have."""

    def parse(self, row: Mapping[str, Any]) -> Parsed:
        """Read a row; raises `BadRowError`."""

    def changes(self, row: Mapping[str, Any], answer: str) -> dict[str, Any]:
        """Return the top-level fields that change when `answer` (letter or text) is put in."""


@dataclass(frozen=True, slots=True)
class OpenSchema:
    """A question and an answer in text; `extra` is joined to the question when it is not empty."""

    name: str
    question: str
    answer: str
    extra: str | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields every row must have."""
        return self.question, self.answer

    def parse(self, row: Mapping[str, Any]) -> Parsed:
        """Read a row; raises `BadRowError`."""
        question = filled(text(field(row, self.question), self.question), "question", self.question)
        given = field(row, self.answer, within=False)
        answer = filled(text(given, self.answer), "answer", self.answer)
        if self.extra is not None and (more := row.get(self.extra)) is not None:
            more = text(more, self.extra)
            question = f"{question}\n\n{more}" if more.strip() else question
        return Parsed(question, None, answer, ())

    def changes(self, row: Mapping[str, Any], answer: str) -> dict[str, Any]:
        """Return the answer field with its new value."""
        return {self.answer: like(row[self.answer], answer)}


_INDEX = re.compile(r"\s*([0-9]{1,3})(\.0+)?\s*")  # "1.0": what pandas makes of 1 beside nulls


def _integer(value: Any) -> int | None:
    """Return an index given as a whole number or as one of at most three digits in text."""
    if isinstance(value, (str, float, Decimal)):
        found = _INDEX.fullmatch(str(value))
        return int(found[1]) if found else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


_CAPITALS = {letter: at for at, letter in enumerate(LETTERS)}
# "b", "B.", "(B)", "B)": one letter and nothing but brackets and stops around it.
_LETTER = re.compile(r"\s*\(?([A-Za-z])[).:]*\s*")


@dataclass(frozen=True, slots=True)
class ChoiceSchema:
    """Multiple choice. Options: what `read_options` reads; None: columns A, B, … that are filled.

    The answer is a letter, an option's label, a 0-based index or an option's text, with or without
    its letter ("B. stone"), and is written back in the form it was found in.
    """

    options: str | None
    answer: str
    question: str = "question"
    name: str = "choice"
    base: int = 0  # the first option's index, where answers are numbers
    digits: bool = False  # whether "1" and 1.0 are indexes, not an option's text; 1 always is

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields every row must have."""
        return (
            self.question,
            *((self.options,) if self.options is not None else LETTERS[:2]),
            self.answer,
        )

    def parse(self, row: Mapping[str, Any]) -> Parsed:
        """Read a row; raises `BadRowError`."""
        question = filled(text(field(row, self.question), self.question), "question", self.question)
        labels, options = self._offered(row)
        position, _ = self._position(field(row, self.answer, within=False), labels, options)
        return Parsed(question, without_letters(options), LETTERS[position], ())

    def changes(self, row: Mapping[str, Any], answer: str) -> dict[str, Any]:
        """Return the answer field, in the form of the given one.

        Where that would be read as another option it is this one's label or letter.
        """
        labels, options = self._offered(row)
        letter = answer.strip().upper()
        if len(letter) != 1 or letter not in LETTERS[: len(options)]:
            raise ValueError(
                f"answer must be a letter A to {LETTERS[len(options) - 1]}, got {answer!r}"
            )
        new = LETTERS.index(letter)
        given = row[self.answer]
        _, form = self._position(given, labels, options)
        value: Any
        if form == "index":
            number = str(new + self.base)
            if isinstance(given, str):
                _, point, zeros = given.strip().partition(".")
                number += point + zeros
            value = type(given)(number)
        elif form == "label":
            value = like(given, labels[new])
        elif form == "text":
            value = options[new]
        elif form == "bare text":
            value = without_letters(options)[new]
        elif form == "lettered text":
            value = with_letter(given, letter, without_letters(options)[new])
        else:
            value = with_letter(given, letter)
        for unmistakable in (*labels[new : new + 1], letter):
            if self._means(value, new, labels, options):
                break
            value = unmistakable
        return {self.answer: value}

    def _means(
        self, value: Any, position: int, labels: tuple[str, ...], options: tuple[str, ...]
    ) -> bool:
        """Whether `value` is read as the option in this place; a text may be another's letter."""
        try:
            return self._position(value, labels, options)[0] == position
        except BadRowError:
            return False

    def called(self, row: Mapping[str, Any]) -> str:
        """`1, 2, 3 are called A, B, C`, where the answers of a row are such; else nothing."""
        labels, options = self._offered(row)
        letters = LETTERS[: len(options)]
        _, form = self._position(row[self.answer], labels, options)
        written = [str(self.changes(row, letter)[self.answer]) for letter in letters]
        if form not in ("label", "index") or written == list(letters):
            return ""
        return f"{listed([short(one, 10) for one in written])} are called {listed(letters)}"

    def tuned(self, rows: Iterable[Mapping[str, Any]], where: str) -> ChoiceSchema:
        """Return this schema with `base` and `digits` as a sample of rows, from `where`, suggests.

        The log says where it is open.
        """
        low = high = digits = total = whole = 0
        for row in rows:
            try:
                labels, options = self._offered(row)
                value = field(row, self.answer, within=False)
                answer = filled(text(value, self.answer), "answer", self.answer).strip()
            except BadRowError:
                continue
            number = _integer(value)
            if answer in labels or (number is not None and str(number) in labels):
                continue
            total += 1
            if number is not None and 0 <= number <= len(options):
                digits += 1
                low += number == 0
                high += number == len(options)
                whole += isinstance(value, int)
        one_based = high > low and 2 * digits > total
        if (whole or 0 < digits == total) and bool(low) == bool(high):
            both, neither = "both 0 and", "neither 0 nor"
            why = f"{both if low else neither} the number of options occur{'' if low else 's'}"
            _log.warning(
                "%s, field %r: answers are read as numbers counted from %d, but %s: write letters "
                "where that is wrong", where, self.answer, one_based, why,
            )  # fmt: skip
        return replace(self, base=int(one_based), digits=0 < digits == total)

    def _offered(self, row: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return (labels, texts) of the options; labels are () when they have none."""
        if self.options is not None:
            return read_options(field(row, self.options), self.options)
        columns = list(LETTERS[:2])
        for letter in LETTERS[2:]:
            if row.get(letter) in (None, ""):
                break
            columns.append(letter)
        return (), tuple(filled(text(field(row, c), c), "option", c) for c in columns)

    def _position(
        self, value: Any, labels: tuple[str, ...], options: tuple[str, ...]
    ) -> tuple[int, str]:
        """Return (0-based position, form).

        The form is "label", "index", "letter", "text", "bare text" (of an option "A. text") or
        "lettered text" ("A. text").
        """
        if not labels and type(value) is str and len(value) == 1 and value in _CAPITALS:
            at = _CAPITALS[value]  # the usual case; what follows says the same of it
            if at < len(options):
                return at, "letter"
        answer = filled(text(value, self.answer), "answer", self.answer).strip()
        if answer in labels:
            return labels.index(answer), "label"
        number = _integer(value)
        if number is not None and str(number) in labels:
            return labels.index(str(number)), "label"
        counted = number is not None and (self.digits or isinstance(value, int))
        if counted and any(label.isdecimal() for label in labels):  # an index would be another one
            expected = f"one of the labels {', '.join(map(short, labels))}"
            raise BadRowError(f"field {self.answer!r}: expected {expected}, found {value}")
        if counted and number is not None:
            if 0 <= number - self.base < len(options):
                return number - self.base, "index"
            expected = f"an index from {self.base} to {len(options) - 1 + self.base}"
            raise BadRowError(f"field {self.answer!r}: expected {expected}, found {value}")
        # Labels that are other letters, or these in another order, call the options otherwise.
        others = any(len(one) == 1 and one.isalpha() for one in labels)
        others = others and tuple(map(str.upper, labels)) != tuple(LETTERS[: len(labels)])
        letter = None if others else _LETTER.fullmatch(answer)
        by_letter = LETTERS.index(letter[1].upper()) if letter else len(options)
        by_text = next((i for i, o in enumerate(options) if answer == o.strip()), len(options))
        # A capital alone is a letter whatever the options say; "a" may be one of the words offered.
        if by_letter < len(options) and (by_text == len(options) or answer.isupper()):
            return by_letter, "letter"
        if by_text < len(options):
            return by_text, "text"
        bare = [option.strip() for option in without_letters(options)]
        if answer in bare:
            return bare.index(answer), "bare text"
        named = None if others else lettered(answer)
        if named and named in zip(LETTERS, bare, strict=False):
            return LETTERS.index(named[0]), "lettered text"
        raise BadRowError(
            f"field {self.answer!r}: expected a letter A to {LETTERS[len(options) - 1]} or the text"
            f" of an option, found {short(answer)!r}"
        )


_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}


def _parts(value: Any) -> bool:
    """Whether a turn's content is a list of texts, as OpenAI's parts are."""
    return isinstance(value, (list, tuple)) and bool(value) and all(
        isinstance(part, Mapping) and part.get("type") == "text"
        and isinstance(part.get("text"), str) for part in value
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChatSchema:
    """A list of turns that ends with the assistant's answer to a user's question.

    A turn's content is a text or a list of parts, all of them texts; a new answer is one part.
    """

    name: str
    turns: str

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields every row must have."""
        return (self.turns,)

    def parse(self, row: Mapping[str, Any]) -> Parsed:
        """Read a row; raises `BadRowError`."""
        turns = [self._turn(turn, n) for n, turn in enumerate(self._turns(row))]
        for role, at in (("assistant", -1), ("user", -2)):
            if len(turns) < -at or turns[at][0] != role:
                found = "nothing" if len(turns) < -at else f"the {turns[at][0]}'s"
                place = "last" if at == -1 else "second last"
                raise BadRowError(
                    f"field {self.turns!r}: expected the {role}'s message in the {place} place,"
                    f" found {found}"
                )
        question = filled(turns[-2][1], "question", self.turns)
        answer = filled(turns[-1][1], "answer", self.turns)
        return Parsed(question, None, answer, tuple(turns[:-2]))

    def changes(self, row: Mapping[str, Any], answer: str) -> dict[str, Any]:
        """Return the turns with the last one's text replaced."""
        turns = self._turns(row)
        name = self._keys(turns[-1])[1]
        given = turns[-1][name]
        last = {**turns[-1], name: [{**given[0], "text": answer}] if _parts(given) else answer}
        value: Any = [*turns[:-1], last]
        return {
            self.turns: dump_json(value).decode() if isinstance(row[self.turns], str) else value
        }

    def _turns(self, row: Mapping[str, Any]) -> Sequence[Any]:
        value = field(row, self.turns, within=False)
        if isinstance(value, str):  # a CSV cell
            value = json_list(value, self.turns)
        if not isinstance(value, (list, tuple)):
            raise BadRowError(f"field {self.turns!r}: expected a list, found {type_name(value)}")
        return value

    def _keys(self, turn: Mapping[str, Any]) -> tuple[str, str]:
        both = (("role", "content"), ("from", "value"))
        first, second = both if kind_of(self.name) == "messages" else both[::-1]
        return second if second[0] in turn and first[0] not in turn else first

    def _turn(self, turn: Any, number: int) -> tuple[str, str]:
        name = f"{self.turns}[{number}]"
        if not isinstance(turn, Mapping):
            raise BadRowError(f"field {name!r}: expected an object, found {type_name(turn)}")
        role_key, text_key = self._keys(turn)
        role = field(turn, role_key)
        if not isinstance(role, str) or role.lower() not in _ROLES:
            raise BadRowError(
                f"field {name!r}: expected the role system, user or assistant, found {role!r:.60}"
            )
        value = field(turn, text_key)
        if _parts(value):
            value = "".join(part["text"] for part in value)
        return _ROLES[role.lower()], text(value, f"{name}.{text_key}")


SCHEMAS: tuple[Schema, ...] = (
    ChoiceSchema("options", "answer"),
    ChoiceSchema("choices", "answer"),
    ChoiceSchema("choices", "answerKey"),
    ChoiceSchema("options", "answerKey"),
    ChoiceSchema("question.choices", "answerKey", question="question.stem"),  # ARC's own files
    ChoiceSchema(None, "answer"),
    ChatSchema("messages", "messages"),
    ChatSchema("sharegpt", "conversations"),
    OpenSchema("alpaca", "instruction", "output", extra="input"),
    OpenSchema("prompt-completion", "prompt", "completion"),
    OpenSchema("qa", "question", "answer"),
)


def kind_of(name: str) -> str:
    """A schema's name without those of fields: one of the six."""
    return name.partition(":")[0]


def _between_commas(listed: str, known: Container[str]) -> list[str]:
    """The fields that are listed; a comma may belong to the name of a known one."""
    parts, fields = listed.split(","), []
    while parts:
        several = (",".join(parts[:count]) for count in range(1, len(parts) + 1))
        found = ((one, name) for one in several for name in (one, one.strip()) if name in known)
        taken, name = next(found, (parts[0], parts[0].strip()))
        fields.append(name)
        parts = parts[taken.count(",") + 1 :]
    return fields


def _with_fields(name: str, found: Iterable[str]) -> Schema:
    """The schema "KIND:FIELD,FIELD"; `found` are the fields of the input.

    choice: question, options, answer, or question and answer beside columns A, B, …; qa and
    prompt-completion: question, answer; alpaca: instruction, input, output, or the first and the
    last of these; messages and sharegpt: the turns. Raises `UserError` where there are too few or
    too many.
    """
    kind, _, listed = name.partition(":")
    fields = _between_commas(listed, set(found))
    name = f"{kind}:{','.join(fields)}"
    expected = {"choice": (2, 3), "alpaca": (2, 3), "messages": (1,), "sharegpt": (1,)}
    numbers = expected.get(kind, (2,))
    if len(fields) not in numbers or not all(fields) or len(set(fields)) < len(fields):
        many = (
            "1 field" if numbers == (1,) else f"{' or '.join(map(str, numbers))} different fields"
        )
        raise UserError(f"schema {kind}: expected {many}, found {listed!r}")
    if kind == "choice":
        options = fields[1] if len(fields) == 3 else None
        return ChoiceSchema(options, fields[-1], question=fields[0], name=name)
    if len(fields) == 1:
        return ChatSchema(name, fields[0])
    return OpenSchema(name, fields[0], fields[-1], extra=fields[1] if len(fields) == 3 else None)


def _fits(schema: Schema, row: Mapping[str, Any]) -> bool:
    """Whether a row has a schema's fields; the answer's, the last one, is not within another."""
    return schema.fields[-1] in row and all(has_field(row, name) for name in schema.fields)


def _in_other_case(names: Sequence[str]) -> str:
    """The schema whose fields these are but for capitals, for `--schema`; "" where none is."""
    known = {name.casefold(): name for name in reversed(names)}
    for schema in SCHEMAS:
        fields = [known.get(name.casefold(), "") for name in schema.fields]
        if isinstance(schema, ChoiceSchema) and schema.options is None:
            fields = [fields[0], fields[-1]] if set(LETTERS[:2]) <= set(names) else [""]
        elif isinstance(schema, OpenSchema) and schema.extra in known:
            fields.insert(1, known[schema.extra])
        if all(fields):
            return f"{schema.name}:{','.join(fields)}"
    return ""


def find_schema(rows: Iterable[Mapping[str, Any]], name: str | None, where: str) -> Schema:
    """Return the schema (of this name, if one is given) whose fields most of `rows` have.

    Raises `UserError` naming the fields found and the schemas known.
    """
    known = ", ".join(dict.fromkeys(schema.name for schema in SCHEMAS))
    kind = None if name is None else kind_of(name)
    candidates = [schema for schema in SCHEMAS if kind in (None, schema.name)]
    if not candidates:
        raise UserError(f"schema: expected one of {known}, found {kind!r}")
    sample = list(rows)
    names = list(dict.fromkeys(key for row in sample for key in row))
    found = printable(field_names(names))
    if name is not None and name != kind:
        candidates = [_with_fields(name, names)]
    votes: Counter[Schema] = Counter()
    for row in sample:
        votes.update(s for s in candidates if _fits(s, row))
    # The most specific schema that not only strays fit: a few rows without options are no quiz
    # turned into plain questions, nor do a few with options make one.
    most = max(votes.values(), default=0)
    best = next(schema for schema in candidates if 2 * votes[schema] >= most)
    if votes[best]:
        if isinstance(best, OpenSchema) and ":" in best.name and best.extra not in (None, *names):
            # Rows may leave it out, so it is no error; misspelt, questions lose what they ask of.
            _log.warning(
                "%s: none of the first records has the field %r of the schema; fields found: %s",
                where, best.extra, found,
            )  # fmt: skip
        return best.tuned(sample, where) if isinstance(best, ChoiceSchema) else best
    if name is not None:
        wanted = " or ".join("+".join(s.fields) for s in candidates)
        raise UserError(f"{where}: schema {name} needs the fields {wanted}; fields found: {found}")
    first = {s.name: s for s in reversed(SCHEMAS)}  # the others of a name have other fields
    wanted = "; ".join(f"{name} ({', '.join(first[name].fields)})" for name in known.split(", "))
    if meant := _in_other_case(names):
        raise UserError(
            f"{where}: fields are told apart by case; found: {found}; add --schema "
            f"{printable(shlex.quote(meant))}"
        )
    raise UserError(
        f"{where}: no known schema has these fields: {found}; say which they are, as in "
        "--schema qa:QUESTION,ANSWER or --schema choice:QUESTION,OPTIONS,ANSWER, or rename them to "
        f"those of one: {wanted}"
    )
