"""The report's table of options given in place of others."""

from __future__ import annotations

from collections.abc import Sequence

from robustft.confusions import Confusion
from robustft.report import markup


def confusions_table(confusions: Sequence[Confusion]) -> str:
    """<table>, one row a pair; empty where there is none."""
    if not confusions:
        return ""
    rows = "".join(
        f"<tr><td>{_option(one.given)}</td><td>{_option(one.right)}</td>"
        f"<td class='num'>{one.records:,}</td>"
        f"<td class='num'>{markup.percent(one.records, one.held_right)}</td></tr>"
        for one in confusions
    )
    return (
        "<table><thead><tr><th>Given</th><th>in place of</th><th class='num'>records</th>"
        f"<th class='num'>share</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _option(text: str) -> str:
    return markup.data(text, 80) if text else "<i>empty</i>"
