"""Answers: what kind they are, what a reply answers, and whether two answers say the same.

Four kinds. `choice`: a letter, or the option's text. `number`: compared by value. `span`: a few
words, compared as sets of words with numbers and negations guarded, or a formula, compared as one.
`text`: free text, compared by its marked final number or formula where both have one, by token F1
otherwise.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from robustft.answers.choices import parse_choice
from robustft.answers.formulas import is_formula, same_formula
from robustft.answers.numbers import parse_final_number, parse_number, spelt
from robustft.answers.numerals import canonical, find_numbers, whole_number
from robustft.answers.replies import (
    NOTHING,
    SPACED,
    SPAN_WORDS,
    THOUGHT_BEGINS,
    THOUGHT_ENDS,
    Parsed,
    body_start,
    is_refusal,
    parse_span,
    parse_text,
    short_opening,
)

__all__ = [
    "Kind",
    "Parsed",
    "agreement",
    "answer_kind",
    "final_number",
    "is_refusal",
    "matches",
    "normalise",
    "option_names",
    "parse",
    "parse_choice",
    "parse_final_number",
    "parse_number",
    "parse_span",
    "parse_text",
    "token_f1",
]

Kind = Literal["choice", "number", "span", "text"]

_T = TypeVar("_T")

_SHORT = 256  # characters of an answer that is remembered as long as thousands of others

_NO_THOUGHT = re.compile(rf"(?:{THOUGHT_BEGINS.pattern}\s*(?:{THOUGHT_ENDS.pattern})[^\S ]*)+")
_ARTICLES = frozenset(("a", "an", "the"))
_NEGATIONS = frozenset(("no", "not", "non", "never", "none", "neither", "nor", "without", "cannot"))
_NEGATED = re.compile(
    r"(?:ai|are|ca|could|did|do|does|had|has|have|is|must|need|should|was|were|wo|would)nt"
)
_NUMBER = re.compile(r"(?<!\w)(?<!\d\.)-?(?:\d+(?:[.,]\d+)*|\.\d+)(?!\w)")
_DIGIT = re.compile(r"\d")
# Scripts written without spaces split by character.
_UNSPACED = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
_RAISED = re.compile(r"(?<=\d)(?=[²³¹¼-¾⁰-⁹₀-₉⅐-⅞])")  # NFKC would make "1½" 11/2 and "10²" 102
_SHARP = re.compile(r"(?<=[^\W\d_])#(?!\w)")  # "C#" is not "C"
# "A-", a grade or a blood group, is not "A"; a longer word's hyphen may be a broken line's.
_MINUS = re.compile(r"(?<!\w)([^\W\d_]{1,2})[-−–](?=\W*\Z)")
# "U.S." is "us", "don't" is "dont", and a soft hyphen shows nothing; other punctuation separates.
_JOINED = frozenset("'’.\u00ad")


def answer_kind(answer: str, options: Sequence[str] | None = None) -> Kind:
    """How an answer like the given one is to be read and compared.

    Options make it a choice; a bare number ("18", "$1,234.50", "1.234,50", "50%") a number, unless
    leading zeros show an identifier ("007"); up to six words a span; anything else text.
    """
    if options:
        return "choice"
    if number := whole_number(answer):
        digits = number["whole"] or ""
        return "span" if len(digits) > 1 and digits[0] == "0" else "number"
    return "span" if len(answer.split()) <= SPAN_WORDS and "\n" not in answer.strip() else "text"


def parse(
    reply: str,
    *,
    kind: Kind,
    options: Sequence[str] | None = None,
    begun: str = "",
    finished: bool = True,
) -> Parsed:
    """Read the answer in a reply as `kind`; `options` are required for a choice.

    `begun` is what the reply continues ("Answer:"), where it does. Of one that was cut off (not
    `finished`) a text is no answer, nor is a number or span that goes on to its end.

    Raises ValueError when `kind` is unknown or a choice comes without options.
    """
    if empty := _NO_THOUGHT.match(reply):  # a model told not to think: nothing precedes its reply
        rest = reply[empty.end() :]
        found = parse(rest, kind=kind, options=options, begun=begun, finished=finished)
        return found.moved(empty.end())
    if body_start(reply):  # it thinks first, whatever it was begun with
        begun = ""
    # A model without a chat template goes on with questions of its own, and answers these, too. A
    # server that does not continue what was begun may reason first: " 8" goes on, "5 + 3 = 8" not.
    head = short_opening(reply)
    continues = head[:1].isspace() or len(head.split()) == 1
    if begun and continues and f"\n{begun}" in reply[len(head) + 2 :]:
        first = parse(head, kind=kind, options=options, begun=begun)
        if first.answer is not None:
            return first
    if kind == "choice":
        if not options:
            raise ValueError("options must hold at least one text for kind='choice', got none")
        return parse_choice(begun + reply, options).moved(-len(begun))
    if kind == "number":
        found = parse_number(reply, begun, finished=finished)
    elif kind == "span":
        found = parse_span(begun + reply).moved(-len(begun))
    elif kind == "text":
        found = parse_text(reply) if finished else NOTHING
    else:
        raise ValueError(f"kind must be choice, number, span or text, got {kind!r}")
    cut_short = not finished and found.stop >= len(reply.rstrip())
    return NOTHING if cut_short else found


def normalise(text: str, kind: Kind) -> str:
    """One spelling for answers that a reader takes for the same.

    `choice`: the upper-case letter. `number`: the value, units dropped ("1,000" -> "1000",
    "50%" -> "50", "007" -> "7"), of a formula without one its own spelling; text without a number
    is read as a span. `span` and `text`: NFKC, case folded, articles (but a last word) and
    punctuation dropped, one space between words, numbers canonical but leading zeros kept ("007" is
    neither "7" nor "008"). Text of nothing but punctuation stays.
    """
    if kind == "choice":
        return text.strip(" \t\r\n()[]{}.:*_\"'`").upper()
    if kind == "number" and (number := _number_in(text)) is not None:
        return number
    return " ".join(_words(text)) or unicodedata.normalize("NFKC", text).casefold().strip()


def option_names(options: Sequence[str]) -> tuple[str, ...]:
    """Options in one spelling: sets that differ in spelling alone are the same."""
    return tuple(normalise(option, "span") for option in options)


def _nfkc(text: str) -> str:
    if text.isascii() and "-" not in text and "#" not in text:
        return text  # as most texts are, which none of this changes
    text = _MINUS.sub(r"\1♭", text)  # no sign that normalisation takes for punctuation
    text = _SHARP.sub("♯", SPACED.sub(",", _RAISED.sub(" ", text)))
    return unicodedata.normalize("NFKC", text).replace("⁄", "/")


class _Roles(dict[int, str]):
    """What characters become: themselves, "" (join their neighbours) or a space (separate)."""

    def __missing__(self, point: int) -> str:
        ch = chr(point)
        category = unicodedata.category(ch)
        separates = category[0] in "PZC" or category == "Sc"
        role = "" if ch in _JOINED else " " if separates else ch
        return self.setdefault(point, role)


_ROLES = _Roles()


def _remembered(compute: Callable[[str], _T]) -> Callable[[str], _T]:
    """`compute`, that answers compared again soon are not read again; of long ones only a few."""
    short, long = (functools.lru_cache(size)(compute) for size in (4096, 32))
    return lambda text: (short if len(text) <= _SHORT else long)(text)


@_remembered
def _number_in(text: str) -> str | None:
    """The one spelling of the number that a text gives as its answer."""
    answer = parse_number(text).answer
    return None if answer is None else spelt(answer)


@_remembered
def final_number(text: str) -> str | None:
    """The one spelling of the number that a text marks as final; None where it marks none."""
    answer = parse_final_number(text).answer
    return None if answer is None else spelt(answer)


@_remembered
def _words(text: str) -> tuple[str, ...]:
    folded = _nfkc(text).casefold().replace("−", "-").replace("_", " ")
    if not folded.isascii():
        folded = _UNSPACED.sub(r" \1 ", folded)
    pieces: list[str] = []
    end = 0
    for match in _NUMBER.finditer(folded) if _DIGIT.search(folded) else ():
        pieces += [folded[end : match.start()].translate(_ROLES), f" {_plain_number(match[0])} "]
        end = match.end()
    pieces.append(folded[end:].translate(_ROLES))
    words = "".join(pieces).split()
    # The last word is no article: "vitamin A".
    return (*(word for word in words[:-1] if word not in _ARTICLES), *words[-1:])


def _plain_number(text: str) -> str:
    digits = text.lstrip("-")
    if len(digits) > 1 and digits[0] == "0" and digits[1].isdigit():
        return text
    if text.isascii() and text.isdigit():
        return text
    match = next(find_numbers(text), None)
    return canonical(match) if match and match.end() == len(text) else text


def token_f1(a: str, b: str) -> float:
    """Harmonic mean of precision and recall over the multisets of normalised words, in [0, 1].

    Two texts without words are equal only as written.
    """
    first, second = _words(a), _words(b)
    if not first or not second:
        return float(normalise(a, "text") == normalise(b, "text"))
    counts, others = Counter(first), Counter(second)
    common = sum(min(counts[word], others[word]) for word in counts.keys() & others.keys())
    return 2 * common / (len(first) + len(second))


def agreement(
    a: str | None, b: str | None, *, kind: Kind, options: Sequence[str] | None = None
) -> float:
    r"""How far two answers say the same, in [0, 1]; no answer (None) agrees with nothing.

    Choices and numbers: 0 or 1. Spans: 1 when equal after normalisation; token F1 when one holds
    all words of the other and neither their numbers nor their negations differ; 0 otherwise ("New
    York" is not "New Jersey", "May 1998" is not "May 1999", "guilty" is not "not guilty"); where
    one is a formula 1 or 0. Text: 1 or 0 by the final number or formula when both mark one
    ("#### 18", "A: 18", "\boxed{2\sqrt{3}}"); token F1 otherwise.
    """
    if a is None or b is None:
        return 0.0
    if kind == "choice":
        first, second = _letter(a, options), _letter(b, options)
        return float(first is not None and first == second)
    if kind == "number":
        return float(normalise(a, "number") == normalise(b, "number"))
    if kind == "span":
        return _span_agreement(a, b)
    return _text_agreement(a, b)


@functools.lru_cache(maxsize=16)  # a record's answer is asked about several times in a row
def _text_agreement(a: str, b: str) -> float:
    last_a = final_number(a)
    last_b = None if last_a is None else final_number(b)
    if last_a is not None and last_b is not None:
        return float(last_a == last_b)
    return token_f1(a, b)


def _letter(answer: str, options: Sequence[str] | None) -> str | None:
    return parse_choice(answer, options).answer if options else normalise(answer, "choice") or None


def _span_agreement(a: str, b: str) -> float:
    if is_formula(a) or is_formula(b):
        return float(same_formula(a, b))
    if normalise(a, "span") == normalise(b, "span"):
        return 1.0
    first, second = Counter(_words(a)), Counter(_words(b))
    if not first or not second or not (first <= second or second <= first):
        return 0.0
    numbers = [[word for word in _words(text) if _is_number(word)] for text in (a, b)]
    if numbers[0] != numbers[1] or any(map(_negates, first)) != any(map(_negates, second)):
        return 0.0
    return token_f1(a, b)


def _is_number(word: str) -> bool:
    return word.lstrip("-")[:1].isdigit()


def _negates(word: str) -> bool:
    return word in _NEGATIONS or _NEGATED.fullmatch(word) is not None


def matches(
    a: str | None,
    b: str | Sequence[str] | None,
    *,
    kind: Kind,
    options: Sequence[str] | None = None,
    threshold: float = 0.5,
) -> bool:
    """Whether answer `a` says the same as `b`: `agreement(a, b) >= threshold`.

    `b` may be a list of accepted answers; one match suffices. Raises ValueError when `threshold`
    is not in (0, 1].
    """
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    accepted = [b] if b is None or isinstance(b, str) else b
    return any(agreement(a, one, kind=kind, options=options) >= threshold for one in accepted)
