"""What a model's reply says: the answer in it, and where in the reply it stands.

The span of the answer's own characters matters: response entropy (eq. 7) averages over the
answer's tokens, not over template words such as "Answer:". Every pattern is linear in the reply.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from dataclasses import dataclass

from robustft.answers.numerals import canonical, find_numbers


@dataclass(frozen=True, slots=True)
class Parsed:
    """An answer found in a reply; `reply[start:stop]` are the answer's own characters.

    `answer` is the letter of a choice, the canonical spelling of a number, the text otherwise;
    None where the reply gives no answer (empty, a refusal, no letter, two letters).
    """

    answer: str | None
    start: int
    stop: int

    def moved(self, by: int) -> Parsed:
        """The same with its span so many characters further on."""
        if self.answer is None:
            return NOTHING
        return Parsed(self.answer, max(self.start + by, 0), max(self.stop + by, 0))


NOTHING = Parsed(None, 0, 0)
SPAN_WORDS = 6  # a short answer has at most so many
QUOTES = "\"'`“”‘’"
# "answer is", "**Answer:**", `"answer":`, "<answer>", "the correct option is", "\boxed{", "####".
MARKER = re.compile(
    r"""\b(?<!</)(?:answers?|(?:correct|right|best|final|my)\s(?:option|choice|letter))\b
        (?:\sto\s[^.:\n]{1,100}?(?=\sis\b))?
        [ \t*_"'`)\]]{0,8}
        (?:(?:would|should|must)\sbe\b|is\b|are\b|[:=>\n]|\s[-–—]\s)
      |\\boxed\{|\#\#\#\#|\bI\s(?:would\s)?(?:choose|pick|select|go\swith)\b""",
    re.VERBOSE | re.IGNORECASE,
)
SPACED = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")
_REFUSAL = re.compile(
    r"""\W*(?:unfortunately,?\s|sorry,\sbut\s|i\sapologi[sz]e,?\s(?:but\s)?)?
        (?:i['’]?(?:\sa)?m\s(?:very\s|so\s|really\s)?sorry,?\s(?:but\b|i\b)|sorry,?\s(?:but\s)?i\b
        |(?:as|i['’]?(?:\sa)?m)\san\sai\b|as\sa\s(?:large\s)?language\smodel\b
        |i\s(?:do\snot|don['’]t)\sknow\b(?!\sabout\syou\b)|i['’]?(?:\sa)?m\snot\s(?:sure|able\sto)\b
        |i['’]?(?:\sa)?m\sunable\sto\b|i\s(?:have\sto|must)\sdecline\b
        |i\s(?:cannot|can\snot|can['’]t|could\snot|couldn['’]t|won['’]t|will\snot)
         (?:\s*(?:\.|…|$)|\s(?:\w+\s){0,2}?(?:answer|help(?!\sbut)|assist|provide|determine|comply
         |fulfil|fulfill|do|give|create|write|generate|engage|discuss|support|access|complete
         |respond|say|tell|fully)\b
         (?!(?<=say)\senough\b|(?<=do)\swithout\b|(?<=tell)\syou\show\b(?!\s(?:to|many)\b))))""",
    re.VERBOSE | re.IGNORECASE,
)
_TEXT_MARKER = re.compile(
    r"(?:^|\n)[ \t]*+[#*_]*+[ \t]*+(?:the\s)?(?:(?:final|correct)\s)?answer[*_]*"
    r"(?:[ \t]is)?[ \t]*:[*_]*",
    re.IGNORECASE,
)
# What may stand between "the answer is" and a short answer: ":", ":**" from "**The answer is:**".
_LEAD = re.compile(r"(?:\s|[:=]|[*_]+(?=\s)|[-–—→]+(?=\s)|\\(?:text|textbf|mathrm|mathbf)\{)*")
_CLOSERS = {"**": "**", "__": "__", "}$": "{", "}": "{", "</answer>": "<answer>"}
_INITIALS = re.compile(r"\b(?:[^\W\d_]\.){2,}\Z")  # "U.S."
_ASKS = re.compile(r"\?[ \t*_]*$", re.MULTILINE)
_FENCE = re.compile(r"```[\w+-]*[ \t]*\n?(.*?)\n?```\s*\Z", re.DOTALL)
_A_COLON = re.compile(r"(?:^|\n)[ \t]*A:")
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
_SENTENCE_ENDS = re.compile(r"[.!?]\s")


def body_start(reply: str) -> int:
    """Where the reply proper begins: after a thinking block (the end, if it never closes)."""
    closed = reply.rfind("</think>")
    if closed >= 0:
        return closed + len("</think>")
    return len(reply) if reply.lstrip().startswith("<think>") else 0


def same_width(reply: str) -> str:
    """Full-width letters, digits and brackets become ASCII while every character keeps its place.

    Raised digits stay: "10²" is not 102.
    """
    if reply.isascii():
        return reply
    plain = {ch: unicodedata.normalize("NFKC", ch) for ch in set(reply)}
    return "".join(
        ch if len(plain[ch]) != 1 or unicodedata.category(ch) == "No" else plain[ch] for ch in reply
    )


def _numeric(reply: str) -> str:
    """`same_width`, and commas for unbreakable spaces between thousands."""
    return same_width(SPACED.sub(",", reply))


def is_refusal(text: str) -> bool:
    """Whether the text begins with a refusal to answer or an admission of not knowing."""
    return _REFUSAL.match(text) is not None


def parse_number(reply: str, begun: str = "", *, finished: bool = True) -> Parsed:
    r"""The number a reply ends on, spelt canonically ("$1,234.50" -> "1234.5").

    A marked number ("#### 18", "A: 18", "the answer is 18", "\boxed{18}") wins, then one that the
    reply opens with where it continues `begun`, "Answer:"; otherwise the last number of the reply,
    unless that was cut off. Of "9 * 2 = 18" after a marker the right-hand side counts, of "18 = 9 *
    2" the left, and of "18, since x = 3" what was named.
    """
    reply = _numeric(reply)
    marked = parse_final_number(reply)
    if marked.answer is not None or is_refusal(reply):
        return marked
    opening = _opening_number(reply, begun) if begun else NOTHING
    if opening.answer is not None or not finished:
        return opening
    last = next(iter(deque(find_numbers(reply, body_start(reply)), maxlen=1)), None)
    return Parsed(canonical(last), last.start(), last.end()) if last else NOTHING


def _marked(reply: str, start: int) -> list[int]:
    """Where final-answer markers and "A:" end, the last ones first."""
    marks = [match.end() for match in MARKER.finditer(reply, start)]
    marks += [match.end() for match in _A_COLON.finditer(reply, start)]
    return sorted(marks)[-50:][::-1]


def _opening_number(reply: str, begun: str) -> Parsed:
    """The number that stands at the head of a reply, or what the calculation there comes to."""
    first = next(find_numbers(reply), None)
    if first is None or any(map(str.isalpha, reply[: first.start()])) or _LIST.match(reply):
        return NOTHING
    end = reply.find("\n", first.end())
    if "=" in reply[first.end() : end if end >= 0 else len(reply)]:
        return parse_final_number(begun + reply).moved(-len(begun))
    if _CALCULATES.match(reply, first.end()):  # to nothing that is told here
        return NOTHING
    return Parsed(canonical(first), first.start(), first.end())


def parse_final_number(reply: str) -> Parsed:
    """The number right after the last final-answer marker; no answer where there is no marker.

    What the answer is said not to be does not count.
    """
    reply = _numeric(reply)
    for begin in _marked(reply, body_start(reply)):
        while begin < len(reply) and reply[begin].isspace():
            begin += 1
        if reply[begin : begin + 4].lower() == "not ":
            continue
        stop = reply.find("\n", begin)
        stop = min(len(reply) if stop < 0 else stop, begin + 400)
        number = next(find_numbers(reply, begin, stop), None)
        if number is None:
            continue
        number = _result(reply, begin, stop, number)
        return Parsed(canonical(number), number.start(), number.end())
    return NOTHING


def _result(reply: str, begin: int, stop: int, first: re.Match[str]) -> re.Match[str]:
    """What the calculation in `reply[begin:stop]` comes to; its `first` number if there is none."""
    named = not any(map(str.isalnum, reply[begin : first.start()]))
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


def parse_text(reply: str) -> Parsed:
    """Free text without its wrapping: "Answer:", a code fence, bold marks, quotes, white space.

    What stands before "Answer:" goes too, unless it asks for that answer. A refusal or an empty
    reply is no answer.
    """
    start, stop = _trimmed(reply, body_start(reply), len(reply))
    if is_refusal(reply[start : start + 200]):
        return NOTHING
    body = reply[start:stop]  # a copy: ^ is where the text begins, not the white space before it
    markers = [*_TEXT_MARKER.finditer(body)]
    marker = markers[-1] if markers else None
    asks = marker and (len(markers) > 1 or _ASKS.search(body, 0, marker.start()))
    if marker and asks and "final" not in marker[0].lower():
        # A quiz, say: its questions and answers are the text.
        marker = markers[0] if markers[0].start() == 0 else None
    if marker and body[marker.end() :].strip():
        start, stop = _trimmed(reply, start + marker.end(), stop)
        if marker[0].count("**") % 2:
            stop = _unclosed(reply, start, stop)
    elif marker:  # "Answer:", and then the tokens were used up
        start, stop = _trimmed(reply, start, start + marker.start())
    return _unwrapped(reply, start, stop)


def parse_span(reply: str) -> Parsed:
    """A short answer: what follows the last "answer is" on its line, or else the text.

    Of a text in paragraphs that is the first, where it is short: the rest explains it.
    """
    start, end = body_start(reply), len(reply)
    for position in _marked(reply, start):
        lead = _LEAD.match(reply, position)
        begin = lead.end() if lead else position
        fence = reply.find("```", begin + 3) if reply.startswith("```", begin) else -1
        stop = fence + 3 if fence >= 0 else reply.find("\n", begin)
        stop = _unclosed(reply, begin, end if stop < 0 else stop)
        parsed = _unwrapped(reply, begin, stop, sentence=True)
        if parsed.answer is not None:
            return parsed
    parsed = parse_text(reply)
    if parsed.answer is None:
        return NOTHING
    first = short_opening(parsed.answer)
    stop = parsed.start + len(first) if first else parsed.stop
    return _unwrapped(reply, parsed.start, stop, sentence=True)


def short_opening(text: str) -> str:
    """The first paragraph, where it can be a short answer ("Sure!" leads to one), else nothing."""
    first = text.partition("\n\n")[0]
    leads = first.rstrip(" *_").endswith((":", "!"))
    return "" if leads or len(first.split()) > SPAN_WORDS else first


def _unclosed(reply: str, start: int, stop: int) -> int:
    """Where the text ends without what closes marks from before it: "**Answer: Paris**"."""
    text = reply[start:stop]
    for _ in range(8):  # one within another
        whole = text.rstrip(" \t.")
        for closer, opener in _CLOSERS.items():
            count = whole.count(closer)
            open_here = count // 2 * 2 if closer == opener else whole.count(opener)
            if whole.endswith(closer) and count > open_here:
                text = whole.removesuffix(closer)
                break
        else:
            break
    return start + len(text)


def _trimmed(reply: str, start: int, stop: int) -> tuple[int, int]:
    while start < stop and reply[start].isspace():
        start += 1
    while stop > start and reply[stop - 1].isspace():
        stop -= 1
    return start, stop


def _unwrapped(reply: str, start: int, stop: int, *, sentence: bool = False) -> Parsed:
    start, stop = _trimmed(reply, start, stop)
    if reply.startswith("```", start):
        fence = _FENCE.match(reply, start, stop)
        if fence and "```" not in fence[1]:
            start, stop = _trimmed(reply, *fence.span(1))
    pairs = ["**", "__", '"', "“”", "‘’", "'", "`", "*", "$"]
    while True:
        before = (start, stop)
        ends = sentence and stop > start and reply[stop - 1] in ".;," and reply[stop - 2] != "."
        if ends and not _INITIALS.search(reply, max(start, stop - 20), stop):
            stop -= 1
        for pair in pairs:
            opened, closed = (pair[0], pair[1]) if pair in ("“”", "‘’") else (pair, pair)
            inner = (start + len(opened), stop - len(closed))
            if (
                inner[0] <= inner[1]
                and reply.startswith(opened, start)
                and reply.startswith(closed, inner[1])
                and opened not in reply[inner[0] : inner[1]]
            ):
                start, stop = _trimmed(reply, *inner)
        if (start, stop) == before:
            break
    text = reply[start:stop]
    if not text or is_refusal(text[:200]):
        return NOTHING
    return Parsed(text, start, stop)
