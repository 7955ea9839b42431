"""The files of an output folder by name, and the manifest, which tells whose they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from robustft.files import write_atomically

MANIFEST = "manifest.json"
OUTPUTS = ("verdicts.jsonl", "rejects.jsonl", "report.html", MANIFEST)  # and the training set
MESSAGES, DATASET_INFO = "messages.jsonl", "dataset_info.json"  # with --dataset-info
EXCHANGE = (MESSAGES, DATASET_INFO)


def is_output(name: str, *, exchange: bool) -> bool:
    """Whether a run may write a file of that name; `exchange`: with `--dataset-info`."""
    return name.startswith("cleaned.") or name in OUTPUTS or (exchange and name in EXCHANGE)


def write_manifest(out: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest of a run whose outputs are there. Raises UserError where that fails."""
    body = orjson.dumps(facts, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    write_atomically(out / MANIFEST, body)


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of an earlier run; empty where a folder holds none that robustft wrote."""
    try:
        found = orjson.loads((out / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    ours = isinstance(found, dict) and {"method", "input", "config"} <= found.keys()
    return found if ours else {}


def made_by(out: Path, method: str, content_hash: str) -> bool:
    """Whether a folder's outputs are those of a method on the input of that `content_hash`."""
    found = read_manifest(out)
    return bool(found) and (found["method"], found["input"]["blake2b"]) == (method, content_hash)
