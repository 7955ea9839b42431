"""The values of a row, checked and as text."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from decimal import Decimal
from math import isfinite
from typing import Any

from robustft.records.formats import BadRowError, type_name
from robustft.records.framing import MAX_LINE_BYTES, field_names

_PLAIN_NUMBER = re.compile(r"\s*[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?\s*")


def field(row: Mapping[str, Any], name: str, *, within: bool = True) -> Any:
    """Return a field that must be there.

    Unless it is to be written to, `question.stem` may be `stem` `within` the object `question`.
    """
    if name in row:
        return row[name]
    outer, dot, inner = name.partition(".")
    value = row.get(outer) if dot and within else None
    if isinstance(value, Mapping) and inner in value:
        return value[inner]
    raise BadRowError(f"missing field {name!r}; fields found: {field_names(row)}")


def has_field(row: Mapping[str, Any], name: str) -> bool:
    """Whether `field` finds one."""
    outer, dot, inner = name.partition(".")
    within = row.get(outer) if dot and name not in row else None
    return name in row or (isinstance(within, Mapping) and inner in within)


def text(value: Any, name: str) -> str:
    """Return text as it stands, numbers as their digits; anything else is a bad row."""
    if type(value) is str and len(value) <= MAX_LINE_BYTES and "\0" not in value:
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and not isfinite(value):
            raise BadRowError(f"field {name!r}: expected a finite number, found {value}")
        value = str(value)
    elif isinstance(value, Decimal):
        value = f"{value:f}"
    if not isinstance(value, str):
        raise BadRowError(f"field {name!r}: expected text, found {type_name(value)}")
    if "\0" in value:
        raise BadRowError(f"field {name!r}: contains a NUL character")
    if len(value) > MAX_LINE_BYTES:
        raise BadRowError(f"field {name!r}: longer than {MAX_LINE_BYTES} characters")
    return value


def filled(value: str, what: str, name: str) -> str:
    """`value`; a bad row where nothing but white space stands there."""
    if not value or value.isspace():
        raise BadRowError(f"empty {what} (field {name!r})")
    return value


def like(given: Any, answer: str) -> Any:
    """Give `answer` the type of the value it replaces, where it can be written that way."""
    number = isinstance(given, (int, float, Decimal)) and not isinstance(given, bool)
    if not number or _PLAIN_NUMBER.fullmatch(answer) is None:
        return answer
    if isinstance(given, Decimal):
        return Decimal(answer.strip())
    if isinstance(given, int):
        with contextlib.suppress(ValueError):  # a fraction, or beyond Python's limit of digits
            return int(answer)
    value = float(answer)
    return value if isfinite(value) else answer
