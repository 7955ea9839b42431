"""The documents taken apart: Python snippets, commands, and the options and files they name."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "bench/README.md",
    ROOT / "robustft/crowd/README.md",
    ROOT / "robustft/engines/README.md",
]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.M)


@dataclass(frozen=True)
class Snippet:
    """A Python block; `line` is that of its first statement."""

    document: Path
    line: int
    code: str

    @property
    def imports(self) -> set[str]:
        """Top-level packages it imports."""
        return set(re.findall(r"^\s*(?:from|import) (\w+)", self.code, re.M))


def snippets(document: Path) -> list[Snippet]:
    """Every ```python block."""
    text = document.read_text(encoding="utf-8")
    return [
        Snippet(document, text[: match.start(2)].count("\n") + 1, match[2])
        for match in _FENCE.finditer(text)
        if match[1] == "python"
    ]


def commands(document: Path) -> list[list[str]]:
    """Every command in a shell or plain block, as words; output that a block shows is left out."""
    text = document.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        if match[1] in ("", "sh", "bash", "console"):
            whole = match[2].replace("\\\n", " ")
            for line in whole.splitlines():
                found += _split(line.strip().removeprefix("$ "))
    return found


def spans(document: Path) -> list[str]:
    """Inline code outside of blocks."""
    return _SPAN.findall(_FENCE.sub("", document.read_text(encoding="utf-8")))


def links(document: Path) -> list[tuple[Path, str]]:
    """(file, anchor) of every link into the repository; anchor "" where there is none."""
    found = []
    for target in _LINK.findall(document.read_text(encoding="utf-8")):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            found.append(((document.parent / path).resolve() if path else document, anchor))
    return found


def anchors(document: Path) -> set[str]:
    """What a link can jump to: headings in lower case, their punctuation dropped, hyphenated."""
    headings = _HEADING.findall(_FENCE.sub("", document.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


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
