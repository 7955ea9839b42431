"""Inputs and outputs on file systems behind fsspec: memory:// and file:// stand for them all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fsspec
import pytest
from commandline import CommandLine, quiz, write
from scripted import LetterEmbedder, ScriptedEngine

from robustft.cleaning import clean
from robustft.errors import UserError
from robustft.records import open_records
from robustft.remote import fetched, is_remote, output_folder

URL = "memory://bucket/deep/in.jsonl"


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTFT_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe(URL, write(tmp_path / "in.jsonl", [*quiz(20), b"{broken"]).read_bytes())


def test_what_is_remote() -> None:
    for url in (
        "s3://b/x.jsonl",
        "gs://b/x",
        "hf://datasets/a/b/x.csv",
        "memory://x",
        "https://h/x",
    ):
        assert is_remote(url)
    for path in ("x.jsonl", "/a/b", "c:/x", "a/b:c", "://x", "filecache::s3://b/x"):
        assert not is_remote(path)


def test_from_one_store_to_another_as_from_file_to_folder(tmp_path: Path) -> None:
    there = f"file://{tmp_path}/there"
    for data, out in ((tmp_path / "in.jsonl", tmp_path / "here"), (URL, there), (URL, there)):
        result = clean(
            data, out=out, engine=ScriptedEngine(), embedder=LetterEmbedder(), detector="paper"
        )
        assert (result.counts["input"], result.counts["rejected"]) == (21, 1)
    for name in ("cleaned.jsonl", "verdicts.jsonl", "rejects.jsonl"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    left = {path.name for path in (tmp_path / "here").iterdir() if path.is_file()}
    missing = left - {path.name for path in (tmp_path / "there").iterdir()}
    assert missing == {".lock", "run.sqlite", "embeddings.f32"}


def test_a_copy_is_made_once_and_again_when_the_file_changes(tmp_path: Path) -> None:
    first = fetched(URL)
    stamp = first.stat().st_mtime_ns
    assert fetched(URL) == first
    assert first.stat().st_mtime_ns == stamp
    fsspec.filesystem("memory").pipe(URL, b'{"question": "q?", "answer": "a"}\n')
    assert fetched(URL) != first
    assert len([*open_records(URL)]) == 1


def test_nothing_is_copied_from_a_run_that_failed(tmp_path: Path) -> None:
    there = f"file://{tmp_path}/there"
    with pytest.raises(UserError, match="no known schema"):
        clean([{"a": 1}], out=there, engine=ScriptedEngine(), embedder=LetterEmbedder())
    assert not (tmp_path / "there").exists()


def test_files_of_somebody_else_and_the_input_stay(tmp_path: Path) -> None:
    rows = [{"question": f"Q{i}?", "options": ["x", "y"], "answer": "A"} for i in range(5)]
    there = f"file://{tmp_path}"
    models = {"engine": ScriptedEngine(), "embedder": LetterEmbedder(), "detector": "paper"}
    given = tmp_path / "cleaned.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = given.read_bytes()
    with pytest.raises(UserError, match=r"cleaned.jsonl: would be overwritten"):
        clean(f"{there}/cleaned.jsonl", out=there, **models)
    with pytest.raises(UserError, match=r"cleaned.jsonl: is there already and was not written"):
        clean(rows, out=there, **models)
    assert given.read_bytes() == whole
    out = f"file://{tmp_path}/run"
    clean(rows, out=out, **models)
    clean(rows, out=out, **models)  # its own files are replaced
    assert not list((tmp_path / "run").glob("input*"))


def test_what_cannot_be_had_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^memory://bucket/x.jsonl: no such file$"):
        open_records("memory://bucket/x.jsonl")
    with pytest.raises(UserError, match=r"^memory://bucket/deep: is a folder"):
        open_records("memory://bucket/deep")
    with pytest.raises(UserError, match=r"^nowhere://x/y.jsonl: .*nowhere"):
        open_records("nowhere://x/y.jsonl")
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"^file://.*/file/out: "),
        output_folder(f"file://{tmp_path}/file/out") as folder,
    ):
        folder.mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match=r"need fsspec; install robustft\[remote\]"):
        open_records(URL)


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = CommandLine(monkeypatch, capsys)
    there = f"file://{tmp_path}/there"
    done = run("clean", URL, "--out", there, "--detector", "paper")
    assert done.status == 0
    assert f"{there}: at work in" in done.err
    assert (tmp_path / "there/manifest.json").exists()
    refused = run.refused("clean", URL, "--out", there, "--shard", "0/2")
    assert "a folder that all of them share" in refused
