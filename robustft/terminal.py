"""Words for the terminal: text from data and errors made safe to print, counts with their noun."""

from __future__ import annotations

from collections.abc import Sequence


def printable(text: str) -> str:
    """`text` on one line, control and bidirectional characters shown as escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def percentages(shares: Sequence[float]) -> list[int]:
    """Shares of one whole as whole percentages that add up to 100 (largest remainder)."""
    exact = [100 * share for share in shares]
    found = list(map(int, exact))
    by_rest = sorted(range(len(exact)), key=lambda one: found[one] - exact[one])
    for one in by_rest[: round(sum(exact)) - sum(found)]:
        found[one] += 1
    return found


def listed(names: Sequence[object]) -> str:
    """`3, 4, 7`; of more than twenty the first ones."""
    return ", ".join(map(str, names[:20])) + (" …" if len(names) > 20 else "")


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """`1 record`, `2 records`, `12,345 records`."""
    return f"{number:,} {plural_of(number, singular, plural)}"


def plural_of(number: int, singular: str, plural: str | None = None) -> str:
    """The noun, or verb, that belongs to a number: `was` or `were`."""
    return singular if number == 1 else plural or singular + "s"
