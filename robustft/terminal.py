"""Words for the terminal: text from data and errors made safe to print, counts with their noun."""

from __future__ import annotations

from collections.abc import Sequence


def printable(text: str) -> str:
    """`text` on one line, control and bidirectional characters shown as escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def listed(names: Sequence[object]) -> str:
    """`3, 4, 7`; of more than twenty the first ones."""
    return ", ".join(map(str, names[:20])) + (" …" if len(names) > 20 else "")


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """`1 record`, `2 records`, `12,345 records`."""
    return f"{number:,} {plural_of(number, singular, plural)}"


def plural_of(number: int, singular: str, plural: str | None = None) -> str:
    """The noun, or verb, that belongs to a number: `was` or `were`."""
    return singular if number == 1 else plural or singular + "s"
