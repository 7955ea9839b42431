"""Text into HTML: escaped, bounded, and with nothing invisible left in it."""

from __future__ import annotations

import html
import re
import unicodedata

# Invisible or reordering characters that a hostile record can hide behind. Zero-width joiner and
# non-joiner stay: emoji and several scripts need them, and they reorder nothing.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff\ud800-\udfff]"
)
_NONCHARACTERS = re.compile("[\ufdd0-\ufdef\ufffe\uffff]")
# More than a few combining marks in a row only serve to paint over the neighbouring lines.
_STACKED_MARKS = re.compile(
    "([\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff]{4})"
    "[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff]+"
)


def plain(text: str, limit: int = 200) -> str:
    """`text` for an attribute or an SVG label: one line, escaped, hidden characters as U+XXXX."""
    flat = _NONCHARACTERS.sub(_name, _HIDDEN.sub(_name, _cut(text, limit)[0]))
    return html.escape(" ".join(_STACKED_MARKS.sub(r"\1", flat).split()))


def data(text: str, limit: int = 1500) -> str:
    """`text` for the page's body: escaped, line breaks kept, hidden characters as marked escapes.

    Wrapped in <bdi>, so that right-to-left text reads right and cannot reorder what is around it.
    """
    shown, left_out = _cut(text, limit)
    shown = _STACKED_MARKS.sub(r"\1", shown.replace("\r\n", "\n"))
    pieces: list[str] = []
    for index, piece in enumerate(re.split(f"({_HIDDEN.pattern}|{_NONCHARACTERS.pattern})", shown)):
        if index % 2 == 0:
            pieces.append(html.escape(piece))
        else:
            title = html.escape(unicodedata.name(piece, "control character").capitalize())
            pieces.append(f'<span class="hidden" title="{title}">{_code(piece)}</span>')
    more = f'<span class="more"> … {left_out:,} more characters</span>' if left_out else ""
    return f'<bdi dir="auto">{"".join(pieces)}</bdi>{more}'


def percent(part: float, whole: float) -> str:
    """Share as a person writes it: `12 %`, `0.4 %`, `–` when there is no whole."""
    if whole <= 0:
        return "–"
    share = 100 * part / whole
    if 0 < share < 0.1:
        return "< 0.1 %"
    exact = share in (0, 100)
    return f"{share:.0f} %" if exact or 10 <= share < 99 else f"{share:.1f} %"


def seconds(value: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`."""
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _cut(text: str, limit: int) -> tuple[str, int]:
    """The first `limit` characters, and how many were left out."""
    return (text, 0) if len(text) <= limit else (text[:limit], len(text) - limit)


def _code(character: str) -> str:
    return f"U+{ord(character):04X}"


def _name(match: re.Match[str]) -> str:
    return f"⟨{_code(match.group())}⟩"
