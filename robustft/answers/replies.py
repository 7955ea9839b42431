"""What a model's reply says: the answer in it, and where in the reply it stands.

The span of the answer's own characters matters: response entropy (eq. 7) averages over the
answer's tokens, not over template words such as "Answer:". Every pattern is linear in the reply.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Parsed:
    """An answer found in a reply; `reply[start:stop]` are the answer's own characters.

    `answer` is the letter of a choice, the canonical spelling of a number, the text otherwise (also
    of what stands for a number and is none, "2√3"); None where the reply gives no answer (empty, a
    refusal, no letter, two letters).
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
# "answer is", "**Answer:**", `"answer":`, "<answer>", "the correct option is", "\boxed{", "####",
# and "answer" in other languages that models reply in.
MARKER = re.compile(
    r"""(?=[abcfimrsjođовاउ答正정답回故应應因所我题选選\\\#"'])(?:  # first letters, for speed
      (?<![^\W_])(?<!</)(?<!incorrect[\s_])(?<!wrong[\s_])(?:answers?(?:_choice)?
        |(?:correct|right|best|final|my|selected|chosen)\s(?:option|choice|letter))\b
        (?:(?:\sto\s[^.:\n]{1,100}?|,?\s(?:that|here|(?:in|for)\sthis|I|then|therefore)\b
          [^.:\n\d]{0,60}?)(?=,?\sis\b),?)?
        [ \t*_"'`)\]]{0,8}
        (?:(?:would|should|must|will|has\sto)\sbe\b|is\b|are\b|[:=>\n]|\s[-–—]\s)
      |["'](?:choice|option|label)["']:|\\(?:boxed|fbox)\{|\#\#\#\#
      |\bI(?:\swould|['’]d)?\s(?:choose|pick|select|say)\b
      |\bI(?:\s(?:would|will|must|shall)|['’](?:d|ll))?\sgo\swith\b
      |\b(?:antwort|respuesta|opción|opção|opzione|réponse|resposta|risposta|antwoord|odpowiedź|svar|cevap|jawaban
        |đáp\sán|ответ|відповідь|الإجابة|الجواب|उत्तर)\b
        (?:\s(?:correct[ae]|corretta|correta|exacte|juste|finale?|yang\sbenar|đúng|الصحيحة?)\b)?
        [ \t*_"'`)\]]{0,8}(?:(?:ist|lautet|es|est|é|è|is|to|är|là|adalah|هي|هو)\b|[:=\n]|\s[-–—]\s)
      |उत्तर\s(?=[A-Z]\b)
      |(?:答案|答え|正解|정답|답)\s?(?:应该|應該|应|應)?(?:(?:是|为|為|选|選|は|은)[:：]?|[:：])|回答[:：]
      |(?:故|应|應|因此|所以|[我题]|(?<![^\s，。,:]))(?:选|選)(?:择|擇)?(?![项項]))""",
    re.VERBOSE | re.IGNORECASE,
)
# "Some might think the answer is", "if it were red, the answer would be"
_SUPPOSED = re.compile(
    r"\b(?:might|may|could)\s(?:\w+\s)?(?:think|say|argue|believe|guess|assume|choose|pick)\b[^,;]*\Z"
    r"|\bif\b.*\bwould\sbe\Z",
    re.IGNORECASE,
)
# "I don't think the answer is", "I doubt that the answer is"
_DOUBTED = re.compile(
    r"(?:(?:\bnot|n['’]t)\s(?:\w+\s)?(?:think|believe|say|agree|true|sure|certain|clear)|\bdoubt)\b"
    r"[^,;]*\Z",
    re.IGNORECASE,
)
BOXES = ("boxed{", "fbox{")
NOT = re.compile(r"(?:not|nicht|no|non|niet|не)\s", re.IGNORECASE)
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
_IN_TEXT = re.compile(r"\s*\\(?:text(?:bf|it|rm)?|mathrm|mathbf)\{([^{}]*)\}\s*\Z")
_CLOSERS = {"**": "**", "__": "__", "}$": "{", "}": "{", "</answer>": "<answer>"}
# "Paris, since it is the capital", "Paris, not Rome", "Paris. Rome is": what follows the answer.
# "He left because he was ill" and "Rome, as well as Paris" are answers as a whole.
_REASON = re.compile(
    r"""(?<=[\w)"'”’*])(?:
          ,\s(?:since|because|as(?!\s(?:well|of|in|if|such|long|much|far)\b)|not|rather\sthan)
          |\s\(?because)\s
        |(?<=(?-i:[a-zß-ÿ]){4})(?<!Prof)\.\s(?=(?-i:[A-Z]))""",
    re.VERBOSE | re.IGNORECASE,
)
_WHY = re.compile(r"(?:i|it|he|she|we|they|just|only|part|\w+ly)\b", re.IGNORECASE)
_NOT_BUT = re.compile(
    r"not\s(?!only\b|just\b)[^\n]{1,80}?,?\s(?:but(?:\srather)?|it\sis)\s", re.IGNORECASE
)
_JSON_STRING = re.compile(r'"((?:[^"\\\n]|\\.){1,400})"(?=\s*(?:,\s*"\w{1,40}"\s*:|\}))')
_LEADS_IN = re.compile(r"[^\n]{1,80}[:!][ *_]*\n\s*(?=\S)")  # "Sure!", "Here is the answer:"
_INITIALS = re.compile(r"\b(?:[^\W\d_]\.){2,}\Z")  # "U.S."
_THOUGHT = "think(?:ing)?|thought|reasoning"
THOUGHT_BEGINS = re.compile(rf"\s*(?:<(?:{_THOUGHT})>|\[THINK\])")
THOUGHT_ENDS = re.compile(rf"</(?:{_THOUGHT})>|\[/THINK\]")
_BRACES = re.compile(r"\\.|[{}]")
_BOXED = 400  # characters in a box
SENTENCE = 200  # characters of a sentence, on either side, that are looked at
_ASKS = re.compile(r"\?[ \t*_]*$", re.MULTILINE)
_FENCE = re.compile(r"```[\w+-]*[ \t]*\n?(.*?)\n?```\s*\Z", re.DOTALL)
_A_COLON = re.compile(r"(?:^|\n)[ \t]*A:")


def body_start(reply: str) -> int:
    """Where the reply proper begins: after a thinking block (the end, if it never closes).

    Models write that as `<think>`, `<thinking>`, `<thought>`, `<reasoning>` or `[THINK]`, and may
    leave the opening mark to their prompt.
    """
    open_ = len(reply) if THOUGHT_BEGINS.match(reply) else 0
    return max((closed.end() for closed in THOUGHT_ENDS.finditer(reply)), default=open_)


def same_width(reply: str) -> str:
    """Full-width letters, digits and brackets become ASCII while every character keeps its place.

    Raised digits stay: "10²" is not 102.
    """
    if reply.isascii():
        return reply
    plain = {ch: ch if _raised(ch) else unicodedata.normalize("NFKC", ch) for ch in set(reply)}
    return "".join(ch if len(plain[ch]) != 1 else plain[ch] for ch in reply)


def _raised(ch: str) -> bool:
    return unicodedata.category(ch) == "No" or unicodedata.decomposition(ch).startswith("<su")


def is_refusal(text: str) -> bool:
    """Whether the text begins with a refusal to answer or an admission of not knowing."""
    return _REFUSAL.match(text) is not None


def marked(reply: str, start: int) -> list[int]:
    """Where final-answer markers and "A:" end, in the order of `last_first`."""
    marks = [match.span() for match in MARKER.finditer(reply, start)]
    marks += [match.span() for match in _A_COLON.finditer(reply, start)]
    return [end for _, end in last_first(reply, marks)]


def last_first(reply: str, marks: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The last fifty marks (start, stop) that are not doubted.

    Last ones first, and what is only supposed after them.
    """
    kept = sorted(marks, key=lambda mark: mark[1])[:-51:-1]
    kept = [mark for mark in kept if not _before(reply, mark, _DOUBTED)]
    return sorted(kept, key=lambda mark: _before(reply, mark, _SUPPOSED))


def _before(reply: str, mark: tuple[int, int], what: re.Pattern[str]) -> bool:
    """Whether the sentence of a mark says that up to the mark's end."""
    start, stop = mark
    return what.search(reply, sentence_start(reply, start), stop) is not None


def sentence_start(reply: str, place: int, low: int = 0) -> int:
    """Where the sentence around `place` begins, from `low` on; of a long one its last part."""
    low = max(low, place - SENTENCE)
    return max(low, *(reply.rfind(end, low, place) + 1 for end in ".!?\n"))


def closing(reply: str, begin: int) -> int | None:
    r"""Where the brace is closed that was opened before `begin`; None where it is not (in reach).

    "\{" and "\}" are signs, not braces.
    """
    depth = 1
    for match in _BRACES.finditer(reply, begin, begin + _BOXED):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None


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
    for position in marked(same_width(reply), start):
        if reply.endswith(BOXES, 0, position) and (close := closing(reply, position)):
            text = _IN_TEXT.match(reply, position, close)
            parsed = _unwrapped(reply, *(text.span(1) if text else (position, close)))
            if parsed.answer is not None:
                return parsed
        lead = _LEAD.match(reply, position)
        begin = lead.end() if lead else position
        if string := _JSON_STRING.match(reply, begin):
            return _unwrapped(reply, *string.span(1))
        if denied := _NOT_BUT.match(reply, begin):
            begin = denied.end()
        fence = reply.find("```", begin + 3) if reply.startswith("```", begin) else -1
        stop = fence + 3 if fence >= 0 else reply.find("\n", begin)
        stop = end if stop < 0 else stop
        if fence < 0:
            stop = _before_reason(reply, begin, stop)
        stop = _unclosed(reply, begin, stop)
        parsed = _unwrapped(reply, begin, stop, sentence=True)
        if parsed.answer is not None:
            return parsed
    parsed = parse_text(reply)
    if parsed.answer is None:
        return NOTHING
    leads = _LEADS_IN.match(reply, parsed.start, parsed.stop)
    begin, stop = leads.end() if leads else parsed.start, parsed.stop
    if first := short_opening(reply[begin:stop]):
        stop = begin + len(first)
    short = _before_reason(reply, begin, stop)
    if len(reply[begin:short].split()) <= SPAN_WORDS:
        stop = short
    return _unwrapped(reply, begin, stop, sentence=True)


def _before_reason(reply: str, begin: int, stop: int) -> int:
    """Where an answer ends that is explained on its line; within quotes and brackets nothing is."""
    reason = _REASON.search(reply, begin, stop)
    if reason is None or (reason[0][0].isspace() and _WHY.match(reply, begin)):
        return stop
    answer = reply[begin : reason.start()]
    opened = any(answer.count(mark) % 2 for mark in ('"', "**", "`"))
    opened |= any(answer.count(left) > answer.count(right) for left, right in ("()", "{}", "“”"))
    return stop if opened else reason.start()


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
        ends = sentence and stop > start and reply[stop - 1] in ".;,。" and reply[stop - 2] != "."
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
