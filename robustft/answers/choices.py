"""The option a reply decides for.

A choice is never guessed out of prose: "Based on ..." is not B and "A company said" is not A. Every
pattern is linear in the reply.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from robustft.answers.options import Options, tokens
from robustft.answers.replies import (
    MARKER,
    NOTHING,
    QUOTES,
    SENTENCE,
    Parsed,
    body_start,
    last_first,
    same_width,
    sentence_start,
)

_DECORATION = re.compile(
    r"""(?:[\s*_"'`“”‘’(\[{<$:>]|\\(?:text|mathrm|mathbf|boxed|\()|\#|-\s
        |(?:the\s|my\s)?(?:correct\s)?(?:option|choice|letter)\b
        |(?:la\s|a\s)?(?:opción|opção|opzione|lettre|lettera|letra)\b|la\s(?=[A-Z]\b)
        |вариант\b|选项|選項)*+""",
    re.VERBOSE | re.IGNORECASE,
)
# What may follow a letter without a space in languages written so: "B is it", "option B".
_ENDS = r"(?:です|だ|选项|選項|项|入|입니다|이다|번|因为)"
_NO_WORD = r"(?!\w|['’]\w)"
_LETTER = re.compile(rf"([A-Za-z])(?:(?={_ENDS})|{_NO_WORD})")
_AND_ANOTHER = re.compile(
    rf"""[)\]*_]*\s*(?:[,/&、]|还是|還是|或者?|和|または|か|또는
        |\b(?:and|or|und|oder|y|o|et|ou|e|и|или)\b)\s*(?:option\s)?[(\[*_]*([A-Z]){_NO_WORD}""",
    re.VERBOSE,
)
_OR = re.compile(
    r"[)\]*_\"'`”’]*\s*(?:/|还是|或者?|または|또는|\b(?:or|oder|o|ou|или)\b)\s*", re.IGNORECASE
)
_WRONG = re.compile(  # "Answer: (B) is not it"
    r"""[)\]*_"'`”’]*\s(?:isn['’]t|(?:is|ist|es|est|è|é)\s(?:not|wrong|incorrect\w?|false|nicht|falsch
        |fausse|errat[ao]))\b""",
    re.VERBOSE | re.IGNORECASE,
)
_FOLLOWS = re.compile(rf"[。、]|{_ENDS}")
_HEDGE = re.compile(
    r"(?:(?:most\s)?(?:likely|probably)|clearly|definitely|certainly|indeed|therefore|thus|actually)"
    r"[,:]?\s",
    re.IGNORECASE,
)
_INSTEAD = re.compile(
    r"[)\]*_\"'`”’]*(?:,?\s(?:but(?:\srather)?|rather)|[,;]\sit(?:['’]s|\sis))(?=\s)", re.IGNORECASE
)
_REASON_FOLLOWS = re.compile(
    r"\s+(?:because|since|as|for|due|based|given|with|which|where|according|that|but|rather|instead)\b",
    re.IGNORECASE,
)
_BECAUSE = re.compile(
    r"[*_\"'`”’]*,?\s(?:because|since)\b[^.!?;\n]*?(?=[.!?;\n]|\b(?:but|however|so|thus)\b|\Z)"
)
_NOT = re.compile(r"\bnot\s", re.IGNORECASE)
_NOT_IT = re.compile(r"\b(?:not|rather\sthan|instead\sof)\s\Z", re.IGNORECASE)
_ENDS_CLAUSE = re.compile(r"[*_\"'`”’]*\s*(?:[.,;!?\n]|but\b|\Z)")
_NO_CHOICE = re.compile(
    r"(?:none|neither|unclear|unknown|cannot|can['’]t|impossible|n/a)\b", re.IGNORECASE
)
_SAYS_CORRECT = re.compile(
    r"(?:^|[.!?:;,\n]\s{0,3}|\b(?:[Oo]p(?:tion|ción|ção|zione)|[Cc]hoice|[Aa]nswer|but|so)\s)"
    r"[(\[*_]*([A-Z])[)\]*_]*\s(?:is|would\sbe|es|é|è|est|ist)\s(?:the\s|la\s|a\s)?(?:most\s)?"
    r"(?:correct[ae]?|corretta|right|best|answer|richtig)\b"
)
# What takes back what was said before, and ends a line: "No wait, B", "Wait, no, B", "actually B".
_CORRECTS = re.compile(
    r"""(?:(?:^|[.!?;,:])[ \t]*|\b(?:and|but)[ \t])
        (?:(?:no,?\s)?wait(?:,\s(?:no(?=,)|actually))?|actually)\b[,:]?
        (?:[ ]it(?:['’]s|[ ]is)\b)?""",
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
# What concludes a line: "Therefore B", ", so neutral.", "It must be (C)", "Label: B", "Final: B".
# In "some think it is B" and "the worst option is B" nothing is concluded.
_CONCLUDES = re.compile(
    r"""(?:^|[.!?;,])[ \t]*(?:(?:and|but|so|then|therefore|thus|hence|wait|no|actually|clearly|here
          |probably|i\s(?:think|believe|guess))[,:]?[ ]){0,4}
        (?:it(?:['’]s|\sis|\smust\sbe)|the\s(?:remaining\s)?(?:letter|option|choice)\sis)\b
      |(?:(?:^|[.!?;,:])[ \t]*|\b(?:and|but)[ \t])
         (?:therefore|thus|hence|so|leaving|left\swith)\b[,:]?
      |∴
      |^[ \t*_\#>]*+(?:final|label|selected|response|result|output|prediction|verdict|solution
        |decision|conclusion|ans|correct|category|class|classification|sentiment)[*_ ]{0,4}:""",
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_SUPPOSED = re.compile(r"\b(?:if|unless|whether|suppos\w+|assuming)\b", re.IGNORECASE)
_RETRACTS = re.compile(r"\b(?:wait|actually|hmm+|instead|correction|mistake)\b", re.IGNORECASE)
_CAPITAL = re.compile(r"[\s*_(\[{<$\"'`“‘]*[A-Z][\s*_)\]}>$.!\"'`”’]*")
_EXPLICIT = re.compile(
    r"\(([A-Za-z])\)|\*\*\(?([A-Z])\)?[.:]?\*\*|\b(?:[Oo]ption|[Cc]hoice|[Ll]etter):?\s([A-Z])\b"
)
_NEGATION = re.compile(
    r"""\b(?:not?|never|neither|nor|cannot|wrong|incorrect|false|unlikely|eliminated?|except|doubt)\b
        |n['’]t\b|\brul\w{1,3}\sout\b
        |\b(?:nicht|kein\w{0,2}|falsch|non\s(?:è|é|sono|può)|est\s(?:pas|faux)|niet|incorrect\w
          |fals[ao]|fausse|è\serrat[ao]|sbagliat[ao]|не|неверн\w{1,3}|неправильн\w{1,3})\b|[不错錯誤违違]|아니|아닙|틀""",
    re.VERBOSE | re.IGNORECASE,
)
_DENIED = re.compile(
    r"""(?:[^\S\n]|[*_)\]"'`”’:–—-]){0,8}(?:(?:is|was|are|were|can|could|would|should|does|did|seems)\s?)?
        (?:be\s)?(?:n['’]t|not|cannot|never|wrong|incorrect|false|unlikely)\b
        |[ *_)"']{0,4}(?:(?:ist|es|est|é|è)\s)?(?:nicht|falsch|no\ses|pas|non\s(?:è|é|sono|può)
          |incorrect\w|fals[ao]|fausse|errat[ao]|sbagliat[ao]|не|неверн\w{1,3}|неправильн\w{1,3})\b
        |[ *_)"']{0,4}(?:是?[不错錯]|아니|틀)""",
    re.VERBOSE | re.IGNORECASE,
)
# What follows an option's text that answers; in "Iron, which ..." and "No. 3" it is a subject.
_EXPLAINED = re.compile(
    r"""[*_"'`”’]*(?P<stop>[,.!])[*_"'`”’]*\s+(?!(?:which|who|unlike|like)\b|\d)(?=\w)
        (?P<reason>as|because|since)?\b""",
    re.VERBOSE | re.IGNORECASE,
)
_LINE = re.compile(
    rf"""[\s*_>\#"'`“‘•-]*+(?:A:\s*(?=\W?[A-Za-z]\W*$))?(?P<open>[(\[{{]{{0,2}})(?P<letter>[A-Za-z])
        {_NO_WORD}(?P<close>,?\s(?:because|since)\b|[)\]}}.:*_"'`”’]*|\s[-–—])[ \t]*(?P<rest>.*)""",
    re.VERBOSE,
)
_SUBJECT = re.compile(
    r"(?:is|are|was|were|has|have|can|could|would|does|do|and|or|says|seems)(?:n['’]t)?\b"
    r"|(?:wrong|incorrect|false)\b"
    r"|(?:ist|sind|kann|es|(?:n['’])?est|é|è|no\ses|non\s[èe]|не|неверн\w{1,3}|неправильн\w{1,3}|falsch)\b"
    r"|[是错錯はが은는]|不[是对對正]",
    re.IGNORECASE,
)
_PROSE_STARTS = frozenset(("all", "as", "based", "because", "both", "explanation", "in", "it"))
_PROSE_STARTS |= {"reason", "since", "that", "the", "there", "these", "this"}
_SHORT_PROSE = 40  # words: option text named in a longer reply may be part of the reasoning


def parse_choice(reply: str, options: Sequence[str]) -> Parsed:
    r"""The one option a reply decides for, as a letter; None rather than a guess.

    In order: the last final-answer marker that names an option ("answer is", "Answer:",
    "\boxed{}", "B is correct", "not A but B"); lines that are nothing but a letter, a letter with
    its own text, or an option's text; a letter that opens the reply; an option that concludes a
    line ("so B."); an option's text that opens the reply, and is explained; a single explicit
    letter such as "(B)"; one option's exact text in a short reply. Two different letters at one
    level, or a letter beyond the options, give None. Negated sentences ("not (A)") name nothing.
    """
    text = same_width(reply)
    start = body_start(text)
    choices = Options(options)
    decided = _by_marker(text, start, choices)
    if decided is None:
        decided = _by_line(text, start, choices)
        if decided is None or decided.answer is None:  # options echoed, say, and then "So B."
            decided = _by_conclusion(text, start, choices) or decided
    if decided is None:
        decided = _by_opening(text, start, choices)
    if decided is None:
        decided = _by_mention(text, start, choices)
    return decided or NOTHING


def _found(letter: str, start: int, stop: int, choices: Options) -> Parsed:
    letter = letter.upper()
    return Parsed(letter, start, stop) if ord(letter) - 65 < choices.count else NOTHING


def _by_marker(text: str, start: int, choices: Options) -> Parsed | None:
    marks = [match.span() for match in MARKER.finditer(text, start)]
    marks += [
        match.span()
        for match in _CORRECTS.finditer(text, start)
        if _ends_line(text, match.end(), choices)
    ]
    marks += [(begin, begin) for begin in _contrasts(text, start, choices)]
    certain = {(m.start(), m.start(1)) for m in _SAYS_CORRECT.finditer(text, start)}
    excluded: set[str] = set()
    for mark in last_first(text, [*marks, *certain]):
        position = mark[1]
        if mark in certain:
            parsed: Parsed | None = _found(text[position], position, position + 1, choices)
        else:
            begin = _skip_decoration(text, position)
            if text[begin : begin + 4].lower() == "not ":
                denied = _after_marker(text, begin + 4, choices)
                excluded.add((denied and denied.answer) or "")
                instead = _INSTEAD.match(text, denied.stop) if denied and denied.answer else None
                if instead is None:
                    continue
                parsed = _after_marker(text, instead.end(), choices)
            else:
                parsed = _after_marker(text, position, choices)
                if parsed is None and _NO_CHOICE.match(text, begin):
                    return NOTHING
                if parsed is None and (hedge := _HEDGE.match(text, begin)):
                    parsed = _after_marker(text, hedge.end(), choices)
        if parsed is not None:
            return NOTHING if parsed.answer in excluded else parsed
    return None


def _ends_line(text: str, start: int, choices: Options) -> bool:
    """Whether a capital letter or an option's text stands between `start` and its line's end."""
    end = start + choices.reach
    rest, ended, after = text[start : end + 1].partition("\n")
    if (not ended and end < len(text)) or after[:1].islower():
        return False  # longer than any option, or a sentence goes on
    return _CAPITAL.fullmatch(rest) is not None or choices.exactly(rest) is not None


def _by_conclusion(text: str, start: int, choices: Options) -> Parsed | None:
    """The option that lines conclude with; of two the last only where the first is taken back."""
    concluded: Parsed | None = None
    for match in _CONCLUDES.finditer(text, start):
        if not _ends_line(text, match.end(), choices):
            continue
        sentence = sentence_start(text, match.start(), start)
        named = _after_marker(text, match.end(), choices)
        if not named or not named.answer or _SUPPOSED.search(text, sentence, match.start()):
            continue
        changed = concluded is not None and concluded.answer != named.answer
        if concluded and changed and not _RETRACTS.search(text, concluded.stop, match.end()):
            return NOTHING
        concluded = named
    return concluded


def _contrasts(text: str, start: int, choices: Options) -> Iterator[int]:
    """Where "not A but B" begins."""
    for match in _NOT.finditer(text, start):
        denied = _after_marker(text, match.end(), choices)
        if denied and denied.answer and _INSTEAD.match(text, denied.stop):
            yield match.start()


def _skip_decoration(text: str, position: int) -> int:
    match = _DECORATION.match(text, position)
    return match.end() if match else position


def _after_marker(text: str, position: int, choices: Options) -> Parsed | None:
    """The option named right after a marker; NOTHING when two are, None when none is."""
    begin = _skip_decoration(text, position)
    named = choices.prefix(text, begin)
    letter = _LETTER.match(text, begin)
    if letter is None or not _is_letter(text, begin, position, choices):
        if named and (letter is None or named[2] > letter.end()):
            return Parsed(*named) if named[0] and not _or_another(text, named, choices) else NOTHING
        return None
    another = _AND_ANOTHER.match(text, letter.end())
    if another and another[1] != letter[1].upper() and ord(another[1]) - 65 < choices.count:
        return NOTHING
    if _WRONG.match(text, letter.end()) or _denied(text, letter.end(), choices):
        return NOTHING
    # "Answer: B. positive" where positive is option C says two things.
    line_end = text.find("\n", begin)
    rest = text[letter.end() : line_end if line_end >= 0 else len(text)][: choices.reach]
    stated = choices.exactly(rest)
    if stated and stated != letter[1].upper():
        return NOTHING
    return _found(letter[1], begin, letter.end(), choices)


def _or_another(text: str, named: tuple[str | None, int, int], choices: Options) -> bool:
    """Whether the text of another option is offered with the one named."""
    joined = _OR.match(text, named[2])
    other = choices.prefix(text, joined.end()) if joined else None
    return other is not None and other[0] != named[0]


def _is_letter(text: str, begin: int, position: int, choices: Options) -> bool:
    """Whether the single letter at `begin` is a choice rather than the start of a sentence."""
    after = text[begin + 1 : begin + 2]
    if after in ")].:;,!?*_}<>$\n" + QUOTES:
        return True  # the empty string after the last character counts too
    if not text[begin].isupper():
        return False
    if re.search(r"(?:option|choice|letter)\W*$", text[position:begin], re.IGNORECASE):
        return True
    if _FOLLOWS.match(text, begin + 1):
        return True
    if re.match(r"\s+(?:[-–—(\n]|</|and\b|or\b)|\s*$", text[begin + 1 : begin + 6]):
        return True
    if _REASON_FOLLOWS.match(text, begin + 1):
        return True
    own = choices.prefix(text, begin + 1)
    return own is not None and own[0] == text[begin]


def _by_line(text: str, start: int, choices: Options) -> Parsed | None:
    stated: dict[str, Parsed] = {}
    opening: Parsed | None = None
    first = True
    for match in re.compile(r"[^\n]+").finditer(text, start):
        if match.end() - match.start() > 4 * choices.reach and not first:
            continue  # far longer than any option: prose
        line = _LINE.match(text, match.start(), match.end())
        if line and (line["open"] or line["close"] or not line["rest"]):
            rest = line["rest"].strip(" \t.*_" + QUOTES)
            own = choices.exactly(rest) if rest else line["letter"].upper()
            if own == line["letter"].upper():
                stated[own] = _found(own, *line.span("letter"), choices)
            elif own:
                return NOTHING
            elif _opens_reply(line, rest) and not _denied(text, line.start("rest"), choices):
                named = _found(line["letter"], *line.span("letter"), choices)
                if first:
                    opening = named
                elif opening and named.answer and named.answer != opening.answer:
                    opening = NOTHING  # a line about every option
        elif own := choices.exactly(match[0]):
            whole = choices.prefix(text, _skip_decoration(text, match.start()))
            stated[own] = Parsed(*whole) if whole else Parsed(own, *match.span())
        first = first and not match[0].strip()
    if stated:
        return next(iter(stated.values())) if len(stated) == 1 else NOTHING
    if opening:
        others = {letter for letter, *_ in _mentions(text, start)} - {opening.answer}
        return NOTHING if others else opening
    return None


def _opens_reply(line: re.Match[str], rest: str) -> bool:
    """Whether it is "B) profits rose" or "B. Because ...", not "A. Smith" or "(A) is wrong"."""
    if _SUBJECT.match(rest):
        return False
    if line["open"] or set(line["close"]) & set(")]:*-–—"):
        return True
    word = re.match(r"\w+", rest)
    return word is not None and (word[0].islower() or word[0].lower() in _PROSE_STARTS)


def _denied(text: str, position: int, choices: Options) -> bool:
    """Whether an option's text stands there and is said not to be it: "neutral is not right".

    In "neutral, not positive" another one is.
    """
    own = choices.prefix(text, position)
    denial = _DENIED.match(text, own[2]) if own else None
    return denial is not None and choices.prefix(text, denial.end()) is None


def _by_opening(text: str, start: int, choices: Options) -> Parsed | None:
    """The option whose text opens the reply, which goes on to explain: "No, it is not shown"."""
    named = choices.prefix(text, _skip_decoration(text, start))
    if named is None or not named[0] or not any(map(str.isalpha, text[named[1] : named[2]])):
        return None  # "1." may begin a list
    goes_on = _EXPLAINED.match(text, named[2])
    if goes_on is None or any(letter != named[0] for letter, *_ in _mentions(text, start)):
        return None
    if not goes_on["reason"] and _answers_too(text, goes_on, named[0], choices):
        return None
    return Parsed(*named)


def _answers_too(text: str, opened: re.Match[str], letter: str, choices: Options) -> bool:
    """Whether another option's text begins or ends a clause later ("Yes, in men. In women, no").

    After "Neutral." what is denied does not count, after "Iron, a metal, does not" it does.
    """
    firsts = {key[0] for key in choices.letter}
    for token, begin, _ in tokens(text, opened.end("stop")):
        other = choices.prefix(text, begin) if token in firsts else None
        if other is None or other[0] == letter:
            continue
        begins = text[max(begin - 8, 0) : begin].rstrip(" *_" + QUOTES)[-1:] in tuple(".,;:!?\n")
        ends = text[other[2] : other[2] + 8].lstrip("*_" + QUOTES)[:1] in ("", *".,;:!?\n")
        low = max(begin - SENTENCE, 0)
        near = text[low : other[2] + SENTENCE]
        denied = opened["stop"] != "," and _sentence_denies(near, begin - low, other[2] - low)
        if (begins or ends) and not denied:
            return True
    return False


def _mentions(text: str, start: int) -> Iterator[tuple[str, int, int]]:
    for match in _EXPLICIT.finditer(text, start):
        group = match.lastindex or 1
        yield match[group].upper(), *match.span(group)


def _sentence_denies(text: str, start: int, stop: int) -> bool:
    left = max(text.rfind(mark, 0, start) for mark in ".!?\n")
    right = min((i for mark in ".!?\n" if (i := text.find(mark, stop)) >= 0), default=len(text))
    return _NEGATION.search(text, left + 1, right) is not None


def _by_mention(text: str, start: int, choices: Options) -> Parsed | None:
    first: tuple[str, int, int] | None = None
    for mention in _mentions(text, start):
        if first and mention[0] != first[0]:
            return NOTHING
        first = first or mention
    if first:
        return NOTHING if _sentence_denies(text, *first[1:]) else _found(*first, choices)
    words = []
    for token in tokens(text, start):
        words.append(token)
        if len(words) > _SHORT_PROSE:
            return None
    named: dict[str | None, tuple[str | None, int, int]] = {}
    position = start
    for _, begin, _ in words:
        if begin < position or (hit := choices.prefix(text, begin)) is None:
            continue
        begin, position = hit[1:]
        # "Not positive, but neutral": what is denied names nothing, nor does what a reason tells.
        aside = _DENIED.match(text, position)
        before = _NOT_IT.search(text, max(begin - 14, 0), begin)
        if aside is None and before and _ENDS_CLAUSE.match(text, position):
            begin = before.start()
        elif aside is None:
            named[hit[0]] = hit
            begin = position
            aside = _BECAUSE.match(text, position)
        position = aside.end() if aside else position
        text = text[:begin] + " " * (position - begin) + text[position:]
    if len(named) != 1:
        return None
    letter, begin, stop = next(iter(named.values()))
    if letter is None or _sentence_denies(text, begin, stop):
        return NOTHING
    return Parsed(letter, begin, stop)
