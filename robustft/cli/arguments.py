"""The parser of a command line and the types of its values, with errors as all user errors have."""

from __future__ import annotations

import argparse
import math
from typing import Any, NoReturn

from robustft.errors import UserError

_MOST = 2**31 - 1


class _Help(argparse.HelpFormatter):
    """Names the default of every option, unless its help says it in words."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        told = "(default" in text or action.default in (None, argparse.SUPPRESS)
        return text if told or action.required else f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse, with its errors in the form of all other user errors."""

    commands: dict[str, Parser]

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_Help, allow_abbrev=False, **settings)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"expected one of {known}, found {value!r}")

    def error(self, message: str) -> NoReturn:
        """Raise the one line that `main` prints."""
        raise UserError(f"{message} (see {self.prog} --help)")


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1], found {text!r}")
    return value


def at_least_zero(text: str) -> float:
    """A finite number of 0 or more."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, found {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _integer(text: str, least: int) -> int:
    value = int(text) if text.isascii() and text.isdecimal() and len(text) < 12 else -1
    if not least <= value <= _MOST:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from {least} to {_MOST}, found {text!r}"
        )
    return value


def positive(text: str) -> int:
    """A whole number from 1."""
    return _integer(text, 1)


def count(text: str) -> int:
    """A whole number from 0."""
    return _integer(text, 0)


def above_zero(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def patience(text: str) -> float:
    """Seconds, or inf."""
    return math.inf if text == "inf" else at_least_zero(text)


def shard(text: str) -> tuple[int, int]:
    """I/N as (I, N)."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of) <= 100_000):
        raise argparse.ArgumentTypeError(
            f"expected I/N with I from 0 to N - 1, such as 0/4, found {text!r}"
        )
    return int(number), int(of)


def names(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"expected names between commas, found {text!r}")
    return found


def integers(text: str) -> tuple[int, ...]:
    """Whole numbers between commas."""
    return tuple(_integer(part, 0) for part in names(text))
