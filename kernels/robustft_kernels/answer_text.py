"""Answers as text, made comparable: one normalisation for all of them at once, then token ids.

All answers travel joined into one string, so that Unicode work happens in a few calls whatever
their number.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Unit = Literal["answer", "word", "character"]

# Private-use characters that stand for something while punctuation is removed.
_END, _POINT, _MINUS = "\ue002", "\ue000", "\ue001"
_RESERVED = str.maketrans(dict.fromkeys((_END, _POINT, _MINUS), " "))
_RAISED = re.compile(r"(?<=\d)(?=[²³¹¼-¾⁰-⁹₀-₉⅐-⅞])")  # NFKC would make "1½" 11/2 and "10²" 102
_SHARP = re.compile(r"(?<=[^\W\d_])#(?!\w)")  # "C#" is not "C"
_DECIMAL_POINT = re.compile(r"(?<=\d)\.(?=\d)|(?<!\w)\.(?=\d)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SIGN = re.compile(r"(?<![\w)\]])[-−](?=[\d.$€£¥])")
_ARTICLE = re.compile(rf"(?<!\S)(?:an?|the) +(?=[^\s{_END}])")
_UNSPACED = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")


class _Roles(dict[int, str]):
    """What each character becomes: kept, dropped (joins "U.S." to "us") or a space."""

    def __missing__(self, code: int) -> str:
        ch = chr(code)
        if ch in "'’.\u00ad":  # the last is a soft hyphen, which shows nothing
            role = ""
        else:
            category = unicodedata.category(ch)
            role = " " if category[0] in "PZC" or category == "Sc" else ch
        self[code] = role
        return role


_ROLES = _Roles({ord(_END): f" {_END} ", ord(_POINT): ".", ord(_MINUS): "-"})


def normalise(texts: Sequence[str]) -> list[str]:
    """Each text in NFKC, case folded, without articles and punctuation, single spaces.

    Numbers keep sign and decimal point and lose thousands separators; scripts written without
    spaces split into characters. A text of nothing but punctuation is kept (case folded).
    """
    joined = _END.join(text.translate(_RESERVED) for text in texts)
    apart = _SHARP.sub("♯", _RAISED.sub(" ", joined))
    folded = unicodedata.normalize("NFKC", apart).replace("⁄", "/").casefold()
    plain = _SIGN.sub(_MINUS, _DECIMAL_POINT.sub(_POINT, _THOUSANDS.sub("", folded)))
    plain = plain.translate(_ROLES)
    if not plain.isascii():
        plain = _UNSPACED.sub(r" \1 ", plain)
    plain = _ARTICLE.sub("", " ".join(plain.split()))
    results = [text.strip() for text in plain.split(_END)] if texts else []
    for i, text in enumerate(results):
        if not text:
            results[i] = unicodedata.normalize("NFKC", texts[i]).casefold().strip()
    return results


def encode(
    texts: Sequence[str], unit: Unit, normaliser: Callable[[str], str] | None = None
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Texts as ids of whole answers, words or characters.

    Returns (ids [T], offsets [len(texts) + 1]); text i is ids[offsets[i]:offsets[i + 1]]. Equal
    units have equal ids within one call. `normaliser` replaces `normalise`, one text at a time.
    """
    clean = normalise(texts) if normaliser is None else [normaliser(text) for text in texts]
    if unit == "character":
        offsets = _offsets([len(text) for text in clean])
        raw = "".join(clean).encode("utf-32-le", "surrogatepass")
        return np.frombuffer(raw, dtype=np.int32), offsets
    if unit == "answer":
        return _ids(clean), np.arange(len(clean) + 1, dtype=np.int64)
    words = [text.split() for text in clean]
    flat = [word for answer in words for word in answer]
    return _ids(flat), _offsets([len(answer) for answer in words])


def _offsets(lengths: Sequence[int]) -> NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(np.asarray(lengths, dtype=np.int64), out=offsets[1:])
    return offsets


def _ids(units: Sequence[str]) -> NDArray[np.int32]:
    table: dict[str, Any] = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    return np.fromiter(map(table.__getitem__, units), dtype=np.int32, count=len(units))
