"""The options of a command: from the command line first, then from a `--config` file."""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from robustft.cli.arguments import Parser
from robustft.cli.options import build_parser
from robustft.config import EngineConfig
from robustft.errors import UserError

_Config = TypeVar("_Config")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options of the command line, those it does not name taken from `--config` where given.

    Raises UserError for anything unknown, missing or out of range; exits for --help, --version.
    """
    parser = build_parser()
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    named.add_argument("--config", nargs="?")
    path = named.parse_known_args(list(arguments))[0].config
    lists: dict[str, list[str]] = {}
    if path and arguments[0] in parser.commands:
        lists = _take_defaults(Path(path), arguments[0], parser)
    command = parser.commands.get(arguments[0])
    required = [action for action in command._actions if action.required] if command else []
    for needed in (False, True):  # a misspelt option is told before the one that it leaves missing
        for action in required:
            action.required = needed
        options, unknown = parser.parse_known_args(arguments)
        if unknown:
            asked = parser.commands[options.command]
            asked.error(f"unknown argument {unknown[0]!r}{_hint(unknown[0], asked)}")
    for field, values in lists.items():
        if not getattr(options, field):  # the command line names none
            setattr(options, field, values)
    return options


def _hint(argument: str, command: Parser) -> str:
    """What was probably meant."""
    name = argument.partition("=")[0]
    if name in command._option_string_actions:
        return "; options stand before --"
    if argument.startswith("-") and os.path.lexists(argument):
        return f"; a file of that name is written ./{argument}"
    close = difflib.get_close_matches(name, command._option_string_actions, 1, 0.7)
    return f"; did you mean {close[0]}?" if close and name.startswith("--") else ""


def _take_defaults(path: Path, command: str, parser: Parser) -> dict[str, list[str]]:
    """Make the values of a config file the defaults of `command`; returns repeatable options.

    Top-level values hold for the command at hand, those of a table [clean], [train], … for that
    command alone.
    """
    try:
        whole: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the config file: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: expected TOML, found: {error}") from error
    found = {name: value for name, value in whole.items() if name not in parser.commands}
    table = whole.get(command, {})
    if not isinstance(table, dict):
        raise UserError(f"{path}, field {command!r}: expected a table, found {table!r:.60}")
    found |= table
    target = parser.commands[command]
    actions = {
        flag.lstrip("-"): action
        for flag, action in target._option_string_actions.items()
        if action.dest not in {"help", "config"} and not flag.startswith("--no-")
    }
    positional = {one.dest: one.metavar or one.dest for one in target._get_positional_actions()}
    lists = {}
    for name, value in found.items():
        where = f"{path}, field {name!r}"
        action = actions.get(name.replace("_", "-"))
        if action is None:
            if name.lower() in positional:
                given = f"{target.prog} {positional[name.lower()]}"
                raise UserError(f"{where}: not an option; {given} is where it is given")
            near = difflib.get_close_matches(name.replace("_", "-"), actions, 1)
            known = ", ".join(sorted(actions))
            hint = f"did you mean {near[0]}?" if near else f"known are {known}"
            raise UserError(f"{where}: not an option of {target.prog}; {hint}")
        if isinstance(action.default, list):
            values = value if isinstance(value, list) else [value]
            lists[action.dest] = [str(_converted(action, item, where)) for item in values]
        else:
            target.set_defaults(**{action.dest: _converted(action, value, where)})
            action.required = False
    return lists


def _converted(action: argparse.Action, value: Any, where: str) -> Any:
    """`value` as the command line would have read it."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{where}: expected true or false, found {value!r:.60}")
        return value
    if action.nargs == "?" and isinstance(value, bool):  # the option without a value, or not at all
        return action.const if value else action.default
    if isinstance(value, list) and "," in str(action.metavar):
        value = ",".join(map(str, value))
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: expected a string or a number, found {value!r:.60}")
    if action.choices is not None and value not in action.choices:
        raise UserError(
            f"{where}: expected one of {', '.join(map(str, action.choices))}, found {value!r:.60}"
        )
    if not callable(action.type):
        return str(value)
    try:
        return action.type(str(value))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{where}: {error}") from error


def config_of(kind: Callable[..., _Config], options: argparse.Namespace, **given: Any) -> _Config:
    """A configuration whose fields are the options of their names, but for those `given`."""
    named = vars(options)
    names = inspect.signature(kind).parameters.keys() & named.keys() - given.keys()
    return kind(**{name: named[name] for name in names}, **given)


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """The engine that a command's options describe."""
    return config_of(EngineConfig, options)


def optional_path(name: str | None) -> Path | None:
    """The path of an option that may not be given."""
    return None if name is None else Path(name)
