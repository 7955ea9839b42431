"""The README taken apart: its Python snippets, its commands and the options it names."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
_SPAN = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Snippet:
    """A Python block; `line` is that of its first statement."""

    line: int
    code: str

    @property
    def imports(self) -> set[str]:
        """Top-level packages it imports."""
        return set(re.findall(r"^\s*(?:from|import) (\w+)", self.code, re.M))


def snippets(text: str) -> list[Snippet]:
    """Every ```python block."""
    return [
        Snippet(text[: match.start(2)].count("\n") + 1, match[2])
        for match in _FENCE.finditer(text)
        if match[1] == "python"
    ]


def commands(text: str) -> list[list[str]]:
    """Every command in a shell or plain block, as words; output that a block shows is left out."""
    found = []
    for match in _FENCE.finditer(text):
        if match[1] in ("", "sh", "bash", "console"):
            whole = match[2].replace("\\\n", " ")
            for line in whole.splitlines():
                found += _split(line.strip().removeprefix("$ "))
    return found


def spans(text: str) -> list[str]:
    """Inline code outside of blocks."""
    return _SPAN.findall(_FENCE.sub("", text))


def _split(line: str) -> list[list[str]]:
    """The commands of one line: what stands between pipes, && and redirections."""
    if not re.match(r"(\w+=\S+ )*(robustft|make|pip|python|pytest) ", line):
        return []
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&;<>"):
            parts.append([])
        else:
            parts[-1].append(word)
    stripped = []
    for part in parts:
        while part and re.fullmatch(r"\w+=.*", part[0]):
            part = part[1:]
        stripped.append(part)
    return [part for part in stripped if part]
