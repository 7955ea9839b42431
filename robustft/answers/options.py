"""The texts of a question's options, ready to be found in a reply."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

from robustft.answers.numerals import canonical, whole_number

# Words and numbers, and the symbols that tell options apart ("<" from ">"); light punctuation no.
_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+|[^\w\s.,;:!?\"'`“”‘’*()\[\]{}]|_")


def tokens(text: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, int, int]]:
    """(casefolded token, start, stop) for the words, numbers and symbols of `text[start:stop]`."""
    for match in _TOKEN.finditer(text, start, len(text) if stop is None else stop):
        token = unicodedata.normalize("NFKC", match[0]).casefold()
        if ("." in token or "," in token) and (number := whole_number(token)):
            token = canonical(number)  # "18.0" is "18"
        yield ("-" if token in "−–—" else token), match.start(), match.end()


def _key(text: str) -> tuple[str, ...]:
    words = tuple(token for token, _, _ in tokens(text))
    return words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words


class Options:
    """The options' texts, ready for look-up; a text two options share names neither."""

    def __init__(self, options: Sequence[str]) -> None:
        keys = [_key(option) for option in options]
        self.count = min(len(options), 26)
        self.letter = {key: chr(65 + i) for i, key in enumerate(keys[: self.count]) if key}
        self.shared = {key for key in keys if keys.count(key) > 1}
        self.longest = max((len(key) for key in keys), default=0)
        self.reach = 2 * max((len(option) for option in options), default=0) + 16

    def exactly(self, text: str) -> str | None:
        """The letter of the option that says what all of `text` says."""
        key = _key(text)
        return None if key in self.shared else self.letter.get(key)

    def prefix(self, text: str, start: int) -> tuple[str | None, int, int] | None:
        """The longest option text that begins at `start`: (letter or None if shared, span)."""
        found: list[tuple[str, int, int]] = []
        for token in tokens(text, start, start + self.reach):
            if found or token[0] not in ("a", "an", "the") or (token[0],) in self.letter:
                found.append(token)
            if len(found) == self.longest:
                break
        for size in range(len(found), 0, -1):
            key = tuple(token for token, _, _ in found[:size])
            if key in self.letter:
                letter = None if key in self.shared else self.letter[key]
                return letter, found[0][1], found[size - 1][2]
        return None
