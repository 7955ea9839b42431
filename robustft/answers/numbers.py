r"""The number that a reply ends on, or the formula, list, time or date that it is part of.

Of "2\sqrt{3}" the answer is not 3, of "5 or 7" not 7 and of "3:45" not 45: what does not come to
one rational number is read as it stands, and `formulas.formula` spells it. Every pattern is linear
in the reply.
"""

from __future__ import annotations

import re

from robustft.answers.formulas import formula, is_formula
from robustft.answers.numerals import canonical, find_numbers, last_number, whole_number
from robustft.answers.replies import (
    BOXES,
    NOT,
    NOTHING,
    Parsed,
    body_start,
    closing,
    is_refusal,
    marked,
    same_width,
)

_REACH = 200  # characters on either side of a number that what it is part of is looked for in
_LIST = re.compile(r"\s*1[.)]\s.*\n\s*2[.)]\s")
_CALCULATES = re.compile(r"\s*[-−+*/×÷^x]\s*[$€£¥(]?\d")
_EQUALS = re.compile(r"=\s*(?=[-−$€£¥.\d])")
# Between a number that was named as the answer and "=": after a unit of three words at most it is
# told why; a parenthesis is still open; or, where no colon announces work, the sentence is over.
_EXPLAINS = re.compile(
    r"""(?:[ ]?[\w%²³/-]++){0,3}
        (?:[\s*_,;:(–—-]{1,6}(?:because|since|where|given)\b|\s?[,;(–—-]\s?as\b)
        |[^()]*\([^()]*\Z""",
    re.VERBOSE | re.IGNORECASE,
)
_TOLD_LAST = re.compile(  # "the sum of 9 and 9, which is 18"
    r"\b(?:which\s(?:is|gives|equals|makes)|equals|gives|i\.e\.,?)\s"
    r"(?=[-−$€£¥.\d][\d.,]*%?(?:\s\w+)?[\s.*_]*(?:\n|\Z))"
)
_SENTENCE_ENDS = re.compile(r"[.!?]\s")
_PIECE = r"""(?:\d(?:[\d.,:/]*\d)?|[(){}\[\]√∛∜π∞°%²³¹⁰⁴-⁹⁻]|\^\s?(?=[\d{(\\-])[-−]?
    |(?<=\d)_(?=[\d{])
    |[ ]?\\(?:[dtc]?frac|sqrt|pi|infty|circ|overline|left|right)(?![A-Za-z])
    |\\(?:text|mathrm)\{[^{}\n]{0,40}\}|[a-z](?=\^)|(?<=[\d)}])i(?!\w))"""
_OPERATOR = r"""(?:(?<=\d)\*\*(?=\d)
    |[ ]?(?:[-−–+*/×÷·±]|(?<=[ ])x(?=[ ])|\\(?:times|cdot|div|pm)(?![A-Za-z]))[ ]?
     (?=\\?[$€£¥]?[-−]?[.\d(√∛∜\\]))\\?[$€£¥]?[-−]?"""
_RUN = re.compile(rf"(?:±\s?|(?<![\w)\]}}.])[-−–])?{_PIECE}(?:{_OPERATOR}|{_PIECE})*+", re.VERBOSE)
_STRUNG = re.compile(  # times, dates, ranges, lists without spaces: no sum, quotient or number
    r"\d+:\d.*|\d+(?:[-–/]\d+){2,}|\d[\d.]*(?:,\d[\d.]*)+|\d+(?:\.\d+){2,}|\d{3}(?:[ ]\d{3})+",
    re.DOTALL,
)
_RANGE = re.compile(r"(\d+(?:\.\d+)?)\s?[-–]\s?(\d+(?:\.\d+)?)")
_BETWEEN = re.compile(r"(?<=\d)\s?(?:[-–]|\bto\b)\s?(?=\d)")  # "5 to 10", "5–10"
_PLAINLY = re.compile(r"[$€£¥%]|(?<=\d),(?=\d{3}(?!\d))")
_ITEM = r"[$€£¥(]?[-−]?\.?\d(?:[\d.,/]*\d)?\s?%?"
_JOINS = r"(?:[,;&]|\b(?:or|and|to|through|oder|und|bis|ou|et|o|y|或|和)\b)"
_NAMED = r"(?:\$?[a-z]\s?=\s?)?"  # "x = 5 or x = 7"
_UNIT = r"\s?[^\W\d_]{1,12}"
_MEASURE = r"""\s?(?:hours?|h|minutes?|mins?|seconds?|days?|weeks?|months?|years?|feet|foot|ft
    |inch(?:es)?|yards?|miles?|pounds?|lbs?|ounces?|oz|dollars?|cents?|euros?|km|cm|mm|kg|[mg])\b"""
_MEASURED = re.compile(_MEASURE, re.VERBOSE)
_AND_MORE = re.compile(
    rf"""\$?(?:(?:{_UNIT})?\s?{_JOINS}\s{_NAMED}{_ITEM}(?:\s?,?\s{_JOINS}?\s?{_ITEM})*
          |{_MEASURE},?\s(?:and\s)?{_ITEM}{_MEASURE})(?=[^\w=+*/^]{{0,4}}(?:\n|\Z))
        |(?<=\b\d\d\d)(?:[ ]\d{{3}}\b)+""",
    re.VERBOSE,
)
_MORE_BEFORE = re.compile(
    rf"""(?<![\w.])(?:{_ITEM},\s){{0,9}}{_ITEM}\$?
        (?:(?P<measure>{_MEASURE}),?\s(?:and\s)?|\s?(?:[,;]\s)?{_JOINS}\s{_NAMED}[$€£¥]?)\Z
        |(?P<groups>(?<![\w.,])\d{{3}}[ ](?:\d{{3}}[ ])*)\Z""",
    re.VERBOSE,
)
_CHANGED = re.compile(
    r"\b(?:r[aio]s|increas|decreas|gr[eo]w|go|went|f[ae]ll|drop|chang|reduc)\w*\s(?:\w+\s)?from\s\Z",
    re.IGNORECASE,
)
_COMMA_ENDS = re.compile(r"[,;]\s[$€£¥]?\Z")
_DENIED = re.compile(r"\b(?:not|nicht|pas|niet|не)\s[$€£¥]?\Z", re.IGNORECASE)
_MATHS = re.compile(
    rf"[\s*_:]*(?:\$\$?|\\\(|\\\[)\s*([^\n$]+?)\s*(?:\$|\\\)|\\\])(?!\d|,?\s?{_JOINS}\s?(?:\$|\\\())"
)
_NEGATIVE = re.compile(  # "is minus 5" and "negative 5", but not "9 minus 5"
    r"(?=[nm])\b(?:negative|(?:(?<=\bis\s)|(?<![\w)\]}%$]\s))minus)\s(?=[$€£¥]?\d)", re.IGNORECASE
)
_CLAUSE_ENDS = re.compile(r"[.,;](?:\s|\Z)")
_TUPLE = re.compile(r"[(\[][^()\[\]]+,[^()\[\]]+[)\]]")
_PROSE = re.compile(
    r"(?<![\\A-Za-z{])(?!(?:sqrt|pi|log|ln|sin|cos|tan|exp)(?![A-Za-z]))[^\W\d_]{2,}"
)
_WORDS = re.compile(r"\\(?:text(?:bf|it|rm)?|mathrm|mbox)\s*\{[^{}\d]*\}|\\(?:approx|textdollar)|≈")
_SIGNS = re.compile(r"(?:[\s,;:.=~()→$\\]|[-=]>)*")
_CHANGES = re.compile(
    r"(?<![^\W\d_])(?:not?|hundred|thousand|(?:m|b|tr)illion|dozen|half|third|quarter)(?![^\W\d_])",
    re.IGNORECASE,
)
# "9 x 2 = 18" comes to a number; "2x + 1 = 5" and "x=5,y=6" do not.
_COMES_TO = re.compile(
    r"(?:[^A-Za-z\\]|(?<=\d)[xX](?=[\d($])|(?<=\s)[xX](?=\s))+=\s*[-−]?[$€£¥]?\d[\d.,]*%?"
)
_LOW = "one|two|three|four|five|six|seven|eight|nine"
_TEENS = "ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen"
_TENS = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
_WORTH = {word: number for number, word in enumerate(f"zero|{_LOW}|{_TEENS}".split("|"))}
_WORTH |= {word: 10 * number for number, word in enumerate(_TENS.split("|"), 2)}
_WORDED = re.compile(
    rf"""[\s*_:"'(]*+(?P<word>(?P<tens>{_TENS})(?:[-\ ](?P<ones>{_LOW}))?
        |(?P<low>zero|{_LOW}|{_TEENS}))\b
        (?:\s(?!and|half|hundred|thousand|[mb]illion|third|quarter)[^\W\d_]{{1,20}})?  # a unit
        [.!)*_"']*(?:\n|\Z)""",
    re.IGNORECASE | re.VERBOSE,
)


def parse_number(reply: str, begun: str = "", *, finished: bool = True) -> Parsed:
    r"""The number a reply ends on, spelt canonically ("$1,234.50" -> "1234.5").

    A marked number ("#### 18", "A: 18", "the answer is 18", "\boxed{18}") wins, then one that the
    reply opens with where it continues `begun`, "Answer:"; otherwise the last number of the reply,
    unless that was cut off. Of "9 * 2 = 18" after a marker the right-hand side counts, of "18 = 9 *
    2" the left, and of "18, since x = 3" what was named. A formula that comes to a number is that
    number ("10^5"); any other, and several numbers, are read as they stand ("2\sqrt{3}", "5 or 7").
    """
    reply = _plain(reply)
    found = _final_number(reply)
    if found.answer is not None or is_refusal(reply):
        return found
    opening = _opening_number(reply, begun) if begun else NOTHING
    if opening.answer is not None or not finished:
        return opening
    start = body_start(reply)
    whole = reply[start:].strip(" \t\r\n*_").strip("$").strip()
    one = "\n" not in whole and "boxed{" not in whole and not _COMES_TO.fullmatch(whole)
    aside = _aside(reply, start)
    last = last_number(reply, start, aside) or last_number(reply, aside, len(reply))
    bare = last is None and whole_number(whole)  # "_18_"
    if one and (bare or is_formula(whole) or _TUPLE.fullmatch(whole)) and not _PROSE.search(whole):
        begin = reply.index(whole, start)
        return _formula(reply, begin, begin + len(whole))
    if last is None:
        return _worded(reply, [*marked(reply, start), start])
    if _DENIED.search(reply, max(last.start() - 12, 0), last.start()):
        return NOTHING
    return _whole(reply, last, max(reply.rfind("\n", start, last.start()) + 1, start), len(reply))


def _aside(reply: str, start: int) -> int:
    """Where the words in parentheses begin that a reply ends on, "18 (3 days * 6)"; else its end.

    What "=" in them tells counts: "20 - 2 (= 18)".
    """
    stop = len(reply.rstrip(" \t\r\n.*_"))
    begin = reply.rfind("(", start, stop)
    inside = reply[begin + 1 : stop - 1]
    told = begin >= 0 and reply[stop - 1] == ")" and _PROSE.search(inside)
    return begin if told and not set("=\n)") & set(inside) else len(reply)


def parse_final_number(reply: str) -> Parsed:
    r"""The number right after the last final-answer marker; no answer where there is no marker.

    What the answer is said not to be does not count. What does not come to one number is read as
    `parse_number` reads it; of "\boxed{}" that is everything in it.
    """
    return _final_number(_plain(reply))


def _final_number(reply: str) -> Parsed:
    for begin in marked(reply, body_start(reply)):
        boxed = reply.endswith(BOXES, 0, begin)
        while begin < len(reply) and reply[begin].isspace():
            begin += 1
        if NOT.match(reply, begin):
            continue
        stop = reply.find("\n", begin)
        stop = min(len(reply) if stop < 0 else stop, begin + 400)
        if boxed and (end := closing(reply, begin)) is not None and reply[begin:end].strip():
            return _boxed(reply, begin, end)
        maths = None if boxed else _MATHS.match(reply, begin, stop)
        if maths and "boxed" not in maths[1] and is_formula(maths[1]):
            return _formula(reply, *maths.span(1))
        clause = _CLAUSE_ENDS.search(reply, begin, stop)
        end = begin + len(reply[begin : clause.start() if clause else stop].rstrip(" *_$"))
        said = reply[begin:end]
        if (
            "=" not in said
            and "boxed{" not in said
            and is_formula(said)
            and not _PROSE.search(said)
        ):
            return _formula(reply, begin, end)
        number = next(find_numbers(reply, begin, stop), None)
        if number is not None:
            return _whole(reply, _result(reply, begin, stop, number), begin, stop)
    return NOTHING


def _boxed(reply: str, begin: int, stop: int) -> Parsed:
    """What a box holds: a formula, or a number and words that tell what it is."""
    found = _formula(reply, begin, stop)
    text = found.answer or ""
    if whole_number(text) is None and (number := next(find_numbers(text), None)):
        said = text[: number.start()] + text[number.end() :]
        signs = _PROSE.sub("", _WORDS.sub("", said))
        if signs != said and _SIGNS.fullmatch(signs) and not _CHANGES.search(said):
            return _own(number).moved(found.start)
        if _PROSE.search(text) and not is_formula(text):
            told = parse_number(text)
            return told.moved(found.start) if told.answer is not None else found
    return found


def _plain(reply: str) -> str:
    plain = same_width(reply).replace("⁄", "/")
    return _NEGATIVE.sub(lambda match: f"{'-':>{len(match[0])}}", plain)


def spelt(answer: str) -> str:
    """One spelling of what was read as a number: of a formula its own, "3-5" and "3:45" stay."""
    bare = " ".join(answer.split())
    if whole := whole_number(bare):
        return canonical(whole)
    range_ = _BETWEEN.sub("-", bare)
    return _PLAINLY.sub("", range_) if _strung(range_) else formula(answer)


def _strung(text: str) -> bool:
    """Whether digits and signs are a time, a date, a list or a range: not to be calculated."""
    ends = _RANGE.fullmatch(_PLAINLY.sub("", text))
    rises = ends is not None and float(ends[1]) < float(ends[2])
    return rises or _STRUNG.fullmatch(text) is not None


def _own(number: re.Match[str]) -> Parsed:
    return Parsed(canonical(number), number.start(), number.end())


def _formula(reply: str, begin: int, stop: int) -> Parsed:
    """What `reply[begin:stop]`, a formula, comes to, or that formula."""
    while begin < stop and reply[begin].isspace():
        begin += 1
    while stop > begin and reply[stop - 1].isspace():
        stop -= 1
    text = reply[begin:stop]
    whole = None if _strung(text) and whole_number(text) is None else whole_number(formula(text))
    if whole is None:
        return Parsed(text, begin, stop)
    worth = canonical(whole)
    told = [_own(number) for number in find_numbers(reply, begin, stop)]
    return next((one for one in reversed(told) if one.answer == worth), Parsed(worth, begin, stop))


def _whole(reply: str, number: re.Match[str], low: int, high: int) -> Parsed:
    """The number, or what it is part of in `reply[low:high]`."""
    low, high = max(low, number.start() - _REACH), min(high, number.end() + _REACH)
    begin, stop = number.span()
    for run in _RUN.finditer(reply, low, high):
        if run.start() < stop and run.end() > begin:
            begin, stop = _balanced(reply, *run.span(), begin)
            stop = begin + len(reply[begin:stop].rstrip("^_+-*/ "))
            break
    begin, stop = min(begin, number.start()), max(stop, number.end())
    text = reply[begin:stop]
    before = _MORE_BEFORE.search(reply[low:begin])
    if before and not _belongs(before, reply, stop):
        before = None
    more = _AND_MORE.match(reply, stop, high)
    if before or more:
        begin, stop = low + before.start() if before else begin, more.end() if more else stop
        listed = reply[begin:stop].rstrip()
        told = [_own(one) for one in find_numbers(listed)]
        if len({one.answer for one in told}) == 1:  # "18 or 18.0"
            return told[0].moved(begin)
        return Parsed(listed, begin, begin + len(listed))
    if text == number[0]:
        return _own(number)
    bare = text.strip("()[]{}$ ")
    if (only := whole_number(bare)) and canonical(only) == canonical(number):
        return _own(number)
    return Parsed(text, begin, stop) if _strung(bare) else _formula(reply, begin, stop)


def _belongs(before: re.Match[str], reply: str, stop: int) -> bool:
    """Whether a number that ends at `stop` goes on with what is `before` it.

    In "In 2020, 5 were left", "in 7 days 28 eggs", "100 5 dollar bills" and "rose from 5 to 18" it
    does not.
    """
    if before["measure"]:
        return _MEASURED.match(reply, stop) is not None or not reply[stop:].strip(" .")
    if before["groups"]:
        return reply[stop - 4 : stop - 3] == " " and reply[stop - 3 : stop].isdigit()
    if _CHANGED.search(before.string, 0, before.start()):
        return False
    return not (_COMMA_ENDS.search(before[0]) and _PROSE.search(before.string, 0, before.start()))


def _balanced(reply: str, begin: int, stop: int, inside: int) -> tuple[int, int]:
    """The part of `reply[begin:stop]` around `inside` whose brackets open and close in it."""
    opened: list[int] = []
    for place in range(begin, stop):
        if reply[place] in "([{":
            opened.append(place)
        elif reply[place] in ")]}":
            if opened:
                opened.pop()
            elif place > inside:
                stop = place
                break
            else:
                begin = place + 1
    for place in opened:
        if place < inside:
            begin = place + 1
        else:
            stop = place
            break
    return begin, stop


def _opening_number(reply: str, begun: str) -> Parsed:
    """The number that stands at the head of a reply, or what the calculation there comes to."""
    first = next(find_numbers(reply), None)
    if first is None or any(map(str.isalpha, reply[: first.start()])) or _LIST.match(reply):
        return NOTHING
    end = reply.find("\n", first.end())
    end = end if end >= 0 else len(reply)
    if "=" in reply[first.end() : end]:
        return parse_final_number(begun + reply).moved(-len(begun))
    if _CALCULATES.match(reply, first.end()):  # to nothing that is told here
        return NOTHING
    return _whole(reply, first, 0, end)


def _result(reply: str, begin: int, stop: int, first: re.Match[str]) -> re.Match[str]:
    """What the calculation in `reply[begin:stop]` comes to; its `first` number if there is none."""
    named = not any(map(str.isalnum, reply[begin : first.start()]))
    if not named and (told := _TOLD_LAST.search(reply, first.end(), stop)):
        return next(find_numbers(reply, told.end(), stop), first)
    announced = reply[:begin].rstrip(" \t\n*_").endswith(":")
    number = first
    for equals in _EQUALS.finditer(reply, first.end(), stop):
        between = reply[number.end() : equals.start()]
        if named and (
            _EXPLAINS.match(between) or (not announced and _SENTENCE_ENDS.search(between))
        ):
            break
        right = next(find_numbers(reply, equals.end(), stop), None)
        # "20 = 5 * 4" comes to 20, whichever side is told first.
        if right and right.start() == equals.end() and not _CALCULATES.match(reply, right.end()):
            number = right
    return number


def _worded(reply: str, places: list[int]) -> Parsed:
    """A number below a hundred in English words at one of `places`, and nothing else there."""
    for place in places:
        if match := _WORDED.match(reply, place):
            parts = (match["tens"], match["ones"], match["low"])
            number = sum(_WORTH[part.lower()] for part in parts if part)
            return Parsed(str(number), *match.span("word"))
    return NOTHING
