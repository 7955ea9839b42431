"""Whose the files of an output folder are."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustft.outputs import MANIFEST, claim, made_by, read_manifest, write_manifest

FACTS = {"method": "self-label", "config": {}, "input": {"blake2b": "c0ffee"}}


@pytest.mark.parametrize(
    "body",
    [
        None, b"", b"{broken", b"[]", b'{"method": "mine"}',
        b'{"method": "self-label", "config": {}, "input": "in.jsonl"}',
    ],
)  # fmt: skip
def test_a_manifest_of_somebody_else_is_none(tmp_path: Path, body: bytes | None) -> None:
    if body is not None:
        (tmp_path / MANIFEST).write_bytes(body)
    assert read_manifest(tmp_path) == {}
    assert not made_by(tmp_path, "self-label", "c0ffee")


def test_a_manifest_tells_method_and_input(tmp_path: Path) -> None:
    write_manifest(tmp_path, FACTS)
    assert read_manifest(tmp_path) == FACTS
    assert made_by(tmp_path, "self-label", "c0ffee")
    assert not made_by(tmp_path, "self-select", "c0ffee")
    assert not made_by(tmp_path, "self-label", "decaf")


def test_a_claim_leaves_a_manifest_as_it_is(tmp_path: Path) -> None:
    claim(tmp_path, FACTS)
    assert made_by(tmp_path, "self-label", "c0ffee")
    whole = FACTS | {"counts": {"keep": 3}}
    write_manifest(tmp_path, whole)
    claim(tmp_path, FACTS)
    assert read_manifest(tmp_path) == whole
