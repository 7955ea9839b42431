"""The one exception whose message is meant for the user, not for a debugger."""

from __future__ import annotations


class UserError(ValueError):
    """The user's input or arguments are wrong; `str(error)` is one clear line (exit status 2).

    The line names file, line and field where they apply, then what was expected and what was
    found: `data.csv, line 7, field 'options': expected a JSON list, found 'a|b|c'`.
    """

    told = False  # whether that line stands on stderr already


class EngineLost(RuntimeError):
    """The engine stopped answering in the middle of a run; what is finished is kept."""


class UnfinishedError(UserError):
    """Other shards have to get further first; the same command goes on from here."""
