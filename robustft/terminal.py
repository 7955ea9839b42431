"""Text from data and errors, made safe to print."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` on one line, control and bidirectional characters shown as escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
