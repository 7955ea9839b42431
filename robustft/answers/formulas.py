r"""Formulas in answers: one spelling each, and the exact value of those that are rational.

"\dfrac{3}{4}", "\frac34" and "0.75" are one formula, and so are "2\sqrt{3}" and "2 \sqrt 3"; these
two are not "3". Nothing is evaluated but fractions, powers and square roots of bounded size, and
nothing is rearranged: "x + 1" is not "1 + x" here. Two formulas that differ are never the same,
two that are the same may be found to differ. What is told apart and what not follows the
`is_equiv` of the MATH data set (Hendrycks et al. 2021, arXiv 2103.03874). A computer algebra
system would see more, but sympy evaluates what it parses and takes seconds for "9^9^9".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

from robustft.answers.numerals import spell, value, whole_number

_LONGEST = 300  # characters; what is longer is text
_DEPTH = 16  # of brackets within brackets
_MOST_DIGITS = 60  # of a number that is converted
_MOST_BITS = 1024  # of a numerator or denominator; an exponent is bounded by it, too

_IGNORED = re.compile(
    r"""\s|~|[$€£¥%]|\\[,;:!\s$%()\[\]]
      |\\(?:(?:left|right|[bB]igg?[lr]?|displaystyle|quad|qquad)(?![A-Za-z])
          |(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*(?=\{))""",
    re.VERBOSE,
)
_TOKEN = re.compile(
    r"""(?P<number>\d+(?:\.\d+)?|\.\d+)|\\(?P<command>[A-Za-z]+)|(?P<braces>\\[{}])
      |(?P<word>[^\W\d_]+)|(?P<raised>⁻?[⁰¹²³⁴-⁹]+)|(?P<power>\*\*)|(?P<other>\S)""",
    re.VERBOSE | re.ASCII,
)
_DEGREES = re.compile(
    r"°|\^\s*\{?\s*\\circ(?![A-Za-z])\s*\}?|\\degree(?![A-Za-z])|\^\{(?:st|nd|rd|th)\}"
)
_TIMES = re.compile(r"(?<=\d)\s[xX]\s(?=\d)")
_SUM = re.compile(r"[-+±=<>≤≥≠,]")
_HELD = re.compile(r"\(([^()]*)\)")
_THOUSANDS = re.compile(r"(?<![\d.])([1-9]\d{0,2})((?:(?:,|\{,\}|\\,|,?\\!)\d{3})+)(?![\d,])")
_SAME = {
    "times": "*", "cdot": "*", "ast": "*", "×": "*", "·": "*", "⋅": "*", "div": "/", "÷": "/",
    "−": "-", "–": "-", "le": "≤", "leq": "≤", "leqslant": "≤", "ge": "≥", "geq": "≥",
    "geqslant": "≥", "ne": "≠", "neq": "≠", "lt": "<", "gt": ">", "pi": "π", "infty": "∞",
    "pm": "±", "cup": "∪", "cap": "∩", "in": "∈", "emptyset": "∅", "varnothing": "∅",
    "sqrt": "√", "frac": "frac", "dfrac": "frac", "tfrac": "frac", "cfrac": "frac",
}  # fmt: skip
_PLAIN = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+")
_RAISED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_CLOSES = {"{": ("}",), "(": (")", "]"), "[": ("]", ")"), "\\{": ("\\}",)}
_NO_UNIT = r"(?:or|and|to|pi|hundred|thousand|(?:m|b|tr)illion|dozen)\b"
_UNIT_WORD = rf"(?!{_NO_UNIT})(?:[A-Za-z]{{2,}}|[mgsLhJNWVKCF])(?:\^\{{?-?\d\}}?|[²³])?\.?"
_UNIT = re.compile(
    rf"""(?:\\[,;:!\s]|\s|~)*(?:\\(?:text(?:bf|it|rm|normal)?|mathrm|mbox)\s*
        \{{(?!\s*{_NO_UNIT})[^{{}}\d]*\}}(?:\^\{{?-?\d\}}?|[²³])?|(?<=[\s~\d]){_UNIT_WORD}
        (?:\s?/\s?{_UNIT_WORD}|\s{_UNIT_WORD})*)\s*\Z""",
    re.VERBOSE,
)
_WRAPPED = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf|mbox)\s*\{([^{}]*)\}\Z")
_MEASURED = re.compile(r"\d|√|π|\\(?:pi|sqrt)")
_SIGNS = re.compile(
    r"(?<![A-Za-z])(?:sqrt|log|ln|sin|cos|tan)\s?[(\d_]|\dpi\b|\\(?:[A-Za-z]|\{)|\d\s*(?:\^|\*\*\s?[\w(\\-])"
    r"|\^\s*[\d({]|[√∛∜∞±∪∩²³⁴-⁹]"
)
_ALGEBRA = re.compile(r"(?:[^\W\d_](?![^\W\d_])|\d|<(?!/)|[-−+*/=>≤≥≠^()\[\],.\s|])+")
_HALF_OPEN = re.compile(r"\s*(?:\[[^\[\](),]+,[^\[\](),]+\)|\([^\[\](),]+,[^\[\](),]+\])\s*")
_VARIABLE = re.compile(r"[=<>≤≥≠^].*[^\W\d_]|[^\W\d_].*[=<>≤≥≠^]|[a-zα-ω]")
_OPERATES = re.compile(r"[+*/=<>≤≥≠]|(?:\A|[\s(=\w)])[-−]\s?\w")


class _Node(NamedTuple):
    """A part of a formula: how it is spelt, what it is worth, and whether it binds tightly."""

    text: str
    worth: Fraction | None = None
    atomic: bool = True
    fraction: bool = False  # "\frac{1}{2}", which after a whole number makes a mixed one


class _Unreadable(ValueError):
    """Not a formula that this module reads: unbalanced, or nested too deeply."""


def is_formula(text: str) -> bool:
    r"""Whether a short answer is to be compared as a formula rather than as words.

    It has LaTeX in it, a power, a root, or is algebra in single letters: "\frac{x}{2}", "10^5",
    "√2", "y = -x". "3:2", "2020-01-02", "F-16" and "C#" are not formulas.
    """
    if len(text) > _LONGEST:
        return False
    if _SIGNS.search(text) or _HALF_OPEN.fullmatch(text):
        return True
    return (
        _ALGEBRA.fullmatch(text) is not None
        and _OPERATES.search(text) is not None
        and _VARIABLE.search(text) is not None
    )


def formula(text: str) -> str:
    r"""One spelling of a formula: its value where that is rational ("\frac{6}{4}" -> "1.5").

    Otherwise its tokens without layout, numbers canonical. Units and the name of what is told
    ("x = 5") are dropped, sets are sorted. What cannot be read stays as it is.
    """
    return _with_unit(text)[0]


def same_formula(a: str, b: str) -> bool:
    r"""Whether two answers are one formula, in one unit where both name one."""
    (first, unit), (second, other) = _with_unit(a), _with_unit(b)
    return first == second and (not unit or not other or unit == other)


def _with_unit(text: str) -> tuple[str, str]:
    text = _DEGREES.sub("", text).strip().strip("$").strip().removesuffix(".").strip()
    text = _TIMES.sub("*", text)
    if wrapped := _WRAPPED.match(text):
        text = wrapped[1].strip()
    if len(text) > _LONGEST:
        return " ".join(text.split()), ""
    unit = _UNIT.search(text)
    if unit is None or _MEASURED.search(text, 0, unit.start()) is None:
        return _spelling(text), ""
    name = re.sub(r"\\[A-Za-z]+|[\\{}\s.]", "", unit[0])
    return _spelling(text[: unit.start()]), name


def _spelling(text: str) -> str:
    if (number := whole_number(text)) and (exact := value(number)) is not None:
        return spell(exact)
    try:
        return _read(text)
    except _Unreadable:
        return " ".join(text.split())


def _read(text: str) -> str:
    if not re.search(r"[(\[]|\\\{", text):  # there commas may part a pair
        text = _THOUSANDS.sub(lambda m: m[1] + "".join(filter(str.isdigit, m[2])), text)
    reader = _Reader(list(_tokens(text)))
    whole = _side(reader.until(()))
    if reader.position < len(reader.tokens):
        raise _Unreadable(text)
    return whole


def _tokens(text: str) -> Iterable[str]:
    position = 0
    while position < len(text):
        if ignored := _IGNORED.match(text, position):
            position = ignored.end()
            continue
        match = _TOKEN.match(text, position)
        if match is None:
            raise _Unreadable(text)
        position = match.end()
        if match["raised"]:
            raised = match["raised"].translate(_RAISED)
            yield from ("^", "{", *("-" * (raised[0] == "-")), raised.lstrip("-"), "}")
        elif match["power"]:
            yield "^"
        elif match["command"]:
            yield _SAME.get(match["command"], f"\\{match['command']}")
        elif match["word"]:
            word = match[0] if len(match[0]) == 1 else match[0].casefold()
            yield _SAME[word] if word in ("sqrt", "pi") else word
        else:
            yield _SAME.get(match[0], match[0])


class _Reader:
    """Tokens, left to right, into nodes."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0
        self._depth = 0

    def _peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def until(self, closers: tuple[str, ...]) -> list[_Node]:
        """The nodes before the next of `closers`, which is left to be read."""
        nodes: list[_Node] = []
        while (token := self._peek()) and token not in closers:
            if token in ("}", ")", "]", "\\}"):
                raise _Unreadable(token)
            if token in "^_":
                self.position += 1
                base = nodes.pop() if nodes else _Node("")
                nodes.append(
                    _power(base, self._exponent())
                    if token == "^"
                    else _Node(f"{base.text}_{_bound(self._one())}")
                )
            else:
                nodes.append(self._one())
        return nodes

    def _one(self) -> _Node:
        """The next node: a token, what brackets hold, or a function with its arguments."""
        token = self._peek()
        self.position += 1
        if not token:
            raise _Unreadable("nothing follows")
        if token in _CLOSES:
            return self._bracket(token)
        if token == "frac":
            over, under = self._argument(), self._argument()
            worth = None
            if over.worth is not None and under.worth:
                worth = over.worth / under.worth
            top = _bound(over) if _SUM.search(over.text) else over.text
            text = f"{top}/{_bound(under)}" if worth is None else spell(worth)
            return _Node(text, worth, worth is not None, fraction=True)
        if token == "√":
            index = ""
            if self._peek() == "[":
                self.position += 1
                index = self._bracket("[").text
            inner = self._one()
            if (held := _HELD.fullmatch(inner.text)) and not _SUM.search(held[1]):
                inner = inner._replace(text=held[1])  # "√(2)" is "√2"
            worth = _root(inner.worth) if not index else None
            return _Node(f"√{index}{_bound(inner)}" if worth is None else spell(worth), worth)
        if _PLAIN.fullmatch(token):
            worth = Fraction(token) if len(token) <= _MOST_DIGITS else None
            return _Node(token if worth is None else spell(worth), worth)
        return _Node(token)

    def _exponent(self) -> _Node:
        """What follows "^": a node, with its sign and with an exponent of its own."""
        if self._peek() == "-":
            self.position += 1
            inner = self._exponent()
            worth = None if inner.worth is None else -inner.worth
            return _Node(f"-{_bound(inner)}" if worth is None else spell(worth), worth)
        node = self._one()
        if self._peek() == "^":
            self.position += 1
            self._deeper()
            node = _power(node, self._exponent())
            self._depth -= 1
        return node

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > _DEPTH:
            raise _Unreadable("nested too deeply")

    def _argument(self) -> _Node:
        r"""The next node, of plain digits the first alone: "\frac34"."""
        token = self._peek()
        if token.isdigit() and len(token) > 1:
            self.tokens[self.position] = token[1:]
            return _Node(token[0], Fraction(int(token[0])))
        return self._one()

    def _bracket(self, opener: str) -> _Node:
        self._deeper()
        nodes = self.until(_CLOSES[opener])
        closer = self._peek()
        if not closer:
            raise _Unreadable(f"{opener} is not closed")
        self.position += 1
        self._depth -= 1
        if opener == "{":
            worth = _worth(nodes)
            atomic = len(nodes) == 1 and nodes[0].atomic
            return _Node(_side(nodes, named=False), worth, atomic or worth is not None)
        parts = [_side(part, named=False) for part in _split(nodes, ",")]
        if opener == "\\{":
            parts.sort()
        worth = _worth(nodes) if (opener, closer) == ("(", ")") else None
        return _Node(f"{opener}{','.join(parts)}{closer}", worth)


def _split(nodes: list[_Node], mark: str) -> list[list[_Node]]:
    parts: list[list[_Node]] = [[]]
    for node in nodes:
        if node.text == mark:
            parts.append([])
        else:
            parts[-1].append(node)
    return parts


def _side(nodes: list[_Node], *, named: bool = True) -> str:
    """What the nodes say: of "x = 5" or "12 + 6 = 18" the right side, of an equation both."""
    sides = _split(nodes, "=")
    if named and len(sides) > 1 and sides[-1]:
        told = [len(side) == 1 and side[0].text.isalpha() for side in sides[:-1]]
        calls = [len(side) == 2 and side[0].text.isalpha() and side[1].text[0] == "("
                 for side in sides[:-1]]  # fmt: skip
        worth = [_worth(side) is not None for side in sides]
        if all(map(any, zip(told, calls, worth, strict=False))):
            sides = sides[-1:]
    return "=".join((", " if named else ",").join(map(_spelt, _split(side, ","))) for side in sides)


def _spelt(nodes: list[_Node]) -> str:
    worth = _worth(nodes)
    if worth is not None:
        return spell(worth)
    text = ""
    for number, node in enumerate(nodes):
        after = nodes[number + 1].text[:1] if number + 1 < len(nodes) else ""
        if node.text == "*" and not (text[-1:].isdigit() and after.isdigit()):
            continue  # "2 * x" is "2x"
        apart = text[-1:].isdigit() and node.text[:1].isdigit()
        if node.text.isalpha() and len(node.text) > 1:  # a word
            text += f" {node.text} "
        else:
            text += f" {node.text}" if apart else node.text
    return " ".join(text.split())


def _worth(nodes: list[_Node]) -> Fraction | None:
    """The value of sums of products; None where a part has none or two stand side by side."""
    total, product, factor = Fraction(0), Fraction(1), ""
    sign = 1
    before: _Node | None = None
    for node in nodes:
        if node.text in ("+", "-") and node.worth is None:
            if factor:
                return None
            if before is not None:
                total, product, sign = total + sign * product, Fraction(1), 1
            sign, before = (-sign if node.text == "-" else sign), None
        elif node.text in ("*", "/") and node.worth is None:
            if before is None or factor:
                return None
            factor = node.text
        elif node.worth is None or abs(_bits(product * node.worth)) > _MOST_BITS:
            return None
        else:
            if before is not None and not factor:
                mixed = node.fraction and before.text.isdigit() and 0 < node.worth < 1
                if mixed:  # 3\frac{1}{2}
                    product += node.worth
                    before = node
                    continue
                if node.text[0] != "(" and before.text[0] != "(":
                    return None
            if factor == "/" and node.worth == 0:
                return None
            product = product / node.worth if factor == "/" else product * node.worth
            before, factor = node, ""
    return None if before is None or factor else total + sign * product


def _bits(number: Fraction) -> int:
    return max(number.numerator.bit_length(), number.denominator.bit_length())


def _power(base: _Node, exponent: _Node) -> _Node:
    inside = f"({base.text})" if base.fraction or not base.atomic else base.text
    text = f"{inside}^{_bound(exponent)}"
    if base.worth is None or exponent.worth is None or exponent.worth.denominator != 1:
        return _Node(text, atomic=False)
    times = exponent.worth.numerator
    if abs(times) * _bits(base.worth) > _MOST_BITS or (times < 0 and base.worth == 0):
        return _Node(text, atomic=False)
    worth = base.worth**times
    return _Node(spell(worth), worth)


def _root(number: Fraction | None) -> Fraction | None:
    """The square root where it is rational."""
    if number is None or number < 0:
        return None
    over, under = math.isqrt(number.numerator), math.isqrt(number.denominator)
    root = Fraction(over, under)
    return root if root * root == number else None


def _bound(node: _Node) -> str:
    return node.text if node.atomic else f"({node.text})"
