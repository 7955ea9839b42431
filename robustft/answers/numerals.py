"""Numbers as people and models write them: found in text, brought to one canonical spelling.

Nothing is evaluated and every pattern is linear in the text. Units are dropped: "$18", "18 dollars"
and "18" are the same number, and so are "50%" and "50" (which are not 0.5): whether the sign is
written depends on the question's wording, which is not known here.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Iterator
from fractions import Fraction

_MAX_DIGITS = 60  # longer digit strings stay text: Python refuses to convert beyond 4,300 digits
_MAX_EXPONENT = 300
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_LETTERS = {"k": 3, "m": 6, "b": 9, "bn": 9}  # of money only: "5k" may be a race, "3M" a company

# A sign counts only where no operand stands before it: "-5", "$-5", "(-5)" but not "10-5". Plain
# spaces between thousands count where there are two, or the line ends: not in "3 100 dollar bills".
# "100 200 300" may be three numbers; "100 000" is one. A comma that cannot part thousands parts
# decimals, but not in "(1,2)"; so does one after dots between thousands. An exponent of a letter
# ("x^2", "m^2") is no number.
_NUMBER = re.compile(
    r"""(?=[-−–+$€£¥.\d\\¼-¾⅐-⅞])(?:  # what a number begins with: to try the rest there alone
    (?:(?<![\w.])(?P<minus>(?<![)\]}])[-−–])?(?P<units>\d{1,9})?)?
    \\[dt]?frac\{(?P<top>-?\d{1,60})\}\{(?P<bottom>\d{1,60})\}
    |(?<![^\W_])(?<![^\W_]_)(?<!\d\.)(?!(?<=\.)\.)(?<![A-Za-z]\^)(?<![A-Za-z]\^\{)(?!0x[0-9a-f])
    (?P<sign>(?<![)\]}])[-−–+](?=[$€£¥.\d¼-¾⅐-⅞]))?
    (?P<currency>[$€£¥])?(?P<inner>[-−](?=[.\d¼-¾⅐-⅞]))?
    (?:(?P<mixed>\d{1,9})[ ](?=\d{1,9}/\d|[¼-¾⅐-⅞]))?
    (?:(?P<comma>(?<![(\[{])(?<![(\[{][-−])
       (?:\d{1,3}(?:\.\d{3}){1,20},\d+|\d{1,3}(?:[ \u00a0\u2009\u202f]\d{3}){1,20},\d+
        |0,\d+|\d+,(?:\d{1,2}|\d{4,}))(?!\d|[,.]\d))
     |(?P<whole>[1-9]\d{0,2}(?:(?:,|\{,\}|\\,|,?\\!|[\u00a0\u2009\u202f])\d{3}){1,20}(?!\d|,\d)
       |\d{1,3}(?:\.\d{3}){2,20}(?![.,]?\d)|\d{1,2}(?:,\d\d){1,20},\d{3}(?!\d|,\d)
       |(?<!\d[ ])(?:[1-9]\d?|[1-9]\d\d(?=(?:[ ]\d{3}){0,20}[ ]000(?!\d)))
        (?:(?:[ ]\d{3}){2,}|[ ]\d{3}(?=(?:\.\d+)?\W{0,4}(?:\n|\Z)))(?![ ]?\d)
       |\d+)?
      (?P<part>\.\d+)?)
    (?P<vulgar>[¼-¾⅐-⅞])?
    (?(comma)|(?(whole)|(?(part)|(?(vulgar)|(?!)))))
    (?:[eE](?P<exponent>[-+−]?\d{1,4})(?!\w)
      |\s?(?:[×·*x]|\\times|\\cdot)\s?10\^\{?(?P<power>[-−]?\d{1,4})\b\}?)?
    (?:\s?/\s?(?P<below>\d{1,60})(?![\d/]|\s?/))?
    (?:\s(?P<scale>thousand|million|billion|trillion)\b)?
    (?(currency)(?:(?P<letter>(?-i:[kKMB]|bn))(?![\w$+*/^=<>]))?)
    (?:\s?%)?)""",
    re.VERBOSE | re.IGNORECASE | re.ASCII,
)


def find_numbers(text: str, start: int = 0, stop: int | None = None) -> Iterator[re.Match[str]]:
    """Every number in `text[start:stop]`, left to right; `canonical` reads a match."""
    return _NUMBER.finditer(text, start, len(text) if stop is None else stop)


def last_number(text: str, start: int, stop: int) -> re.Match[str] | None:
    """The last number of the last line in `text[start:stop]` that has one."""
    while stop > start:
        line = max(text.rfind("\n", start, stop - 1) + 1, start)
        if found := deque(find_numbers(text, line, stop), maxlen=1):
            return found[0]
        stop = line
    return None


def value(match: re.Match[str]) -> Fraction | None:
    """The number's exact value; None where it is too long to convert or divides by zero."""
    if match["top"]:
        bottom = int(match["bottom"])
        if bottom == 0:
            return None
        result = int(match["units"] or 0) + Fraction(int(match["top"]), bottom)
        return -result if match["minus"] else result
    written, _, decimals = (match["comma"] or "").partition(",")
    whole = "".join(filter(str.isdigit, match["whole"] or written))
    part = decimals or (match["part"] or ".")[1:]
    exponent = int((match["exponent"] or match["power"] or "0").replace("−", "-"))
    if len(whole) + len(part) > _MAX_DIGITS or abs(exponent) > _MAX_EXPONENT:
        return None
    result = Fraction(int(whole + part or "0"), 10 ** len(part)) * Fraction(10) ** exponent
    if match["vulgar"]:
        result += Fraction(unicodedata.numeric(match["vulgar"])).limit_denominator(10)
    if match["below"]:
        below = int(match["below"])
        if below == 0:
            return None
        result /= below
    if match["mixed"]:
        result += int(match["mixed"])
    if match["scale"]:
        result *= 10 ** _SCALES[match["scale"].lower()]
    elif match["letter"]:
        result *= 10 ** _LETTERS[match["letter"].lower()]
    return -result if (match["sign"] or match["inner"] or "+") in "-−–" else result


def canonical(match: re.Match[str]) -> str:
    """One spelling per value: "1,234.50" -> "1234.5", "6/4" -> "3/2", "1.5e3" -> "1500"."""
    text = match[0]
    if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS:
        return text.lstrip("0") or "0"  # as most are
    number = value(match)
    return text.strip() if number is None else spell(number)


def spell(number: Fraction) -> str:
    """The shortest exact decimal where there is one, otherwise numerator/denominator."""
    twos = fives = 0
    rest = number.denominator
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{number.numerator}/{number.denominator}"
    places = max(twos, fives)
    digits = str(abs(number.numerator) * 10**places // number.denominator).rjust(places + 1, "0")
    sign = "-" if number < 0 else ""
    return sign + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)


def whole_number(text: str) -> re.Match[str] | None:
    """The match when the whole of `text` is one number (with its currency or percent sign)."""
    text = text.strip().rstrip(".")
    match = _NUMBER.match(text)
    return match if match and match.end() == len(text) else None
