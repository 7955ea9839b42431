"""The files of an output folder by name, and the manifest, which tells whose they are."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from robustft.config import CleanConfig
from robustft.files import write_atomically
from robustft.terminal import printable

METHOD = "robustft"  # as the manifest names it
MANIFEST = "manifest.json"
OUTPUTS = ("verdicts.jsonl", "rejects.jsonl", "report.html", MANIFEST)  # and the training set
MESSAGES, DATASET_INFO = "messages.jsonl", "dataset_info.json"  # with --dataset-info
ANSWERS = "answers.sqlite"  # with --method: what the model has said
EXCHANGE = (MESSAGES, DATASET_INFO)


def is_output(name: str, *, exchange: bool) -> bool:
    """Whether a run may write a file of that name; `exchange`: with `--dataset-info`."""
    return name.startswith("cleaned.") or name in OUTPUTS or (exchange and name in EXCHANGE)


def identity(config: CleanConfig, method: str, content_hash: str) -> dict[str, Any]:
    """What a manifest says of whose outputs these are: the method, its settings, its input."""
    return {
        "method": method,
        "config": config.fingerprint(),
        "input": {"path": config.input, "blake2b": content_hash},
    }


def command() -> list[str]:
    """The command line as a manifest holds it: what is not UTF-8 or controls as escapes."""
    return list(map(printable, sys.argv))


def write_manifest(out: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest of a run whose outputs are there. Raises UserError where that fails."""
    body = orjson.dumps(facts, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    write_atomically(out / MANIFEST, body)


def claim(out: Path, facts: Mapping[str, Any]) -> None:
    """Say whose the outputs will be before any is there; a manifest of ours is left as it is.

    With it (`facts` is an `identity`) a command that was killed between its outputs and their
    manifest finds its folder its own when it is called again.
    """
    if not read_manifest(out):
        write_manifest(out, facts)


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of an earlier run; empty where a folder holds none that robustft wrote.

    One that was killed before its end may have no "counts" (see `claim`).
    """
    try:
        found = orjson.loads((out / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    match found:
        case {"method": _, "config": _, "input": {"blake2b": _}}:  # what `identity` names
            return dict(found)
    return {}


def made_by(out: Path, method: str, content_hash: str) -> bool:
    """Whether a folder's outputs are those of a method on the input of that `content_hash`."""
    found = read_manifest(out)
    return bool(found) and (found["method"], found["input"]["blake2b"]) == (method, content_hash)
