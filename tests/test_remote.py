"""Inputs and outputs on file systems behind fsspec: memory:// and file:// stand for them all."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

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
    assert not list((tmp_path / "there").iterdir())


def run(data: object, out: str, engine: ScriptedEngine | None = None, **settings: Any) -> None:
    clean(
        data, out=out, engine=engine or ScriptedEngine(), embedder=LetterEmbedder(),
        detector="paper", **settings,
    )  # fmt: skip


@pytest.mark.parametrize("out", ["memory://bucket/out", "file://{}/there"])
@pytest.mark.parametrize("name", ["cleaned.jsonl", "manifest.json", "messages.jsonl"])
def test_files_of_somebody_else_stay(tmp_path: Path, out: str, name: str) -> None:
    out = out.format(tmp_path)
    system, path = fsspec.core.url_to_fs(out)
    system.makedirs(path, exist_ok=True)
    never = ScriptedEngine()

    def place() -> None:
        system.pipe(f"{path}/{name}", b"mine")

    place()
    for _ in range(2):
        with pytest.raises(UserError, match=rf"^{out}/{name}: is there already and was not wri"):
            run(URL, out, never, dataset_info=True)
    assert never.asked == []
    system.rm(f"{path}/{name}")
    with pytest.raises(UserError, match=rf"^{out}/{name}: is there already and was not written"):
        run(URL, out, ScriptedEngine(before_batch=place), dataset_info=True)
    assert [one.rpartition("/")[2] for one in system.ls(path, detail=False)] == [name]
    assert system.cat(f"{path}/{name}") == b"mine"
    system.rm(f"{path}/{name}")
    run(URL, out, never, dataset_info=True)  # moved away: what was asked is copied
    assert never.asked == []
    assert system.exists(f"{path}/manifest.json")


def test_the_input_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    source = write(folder / "cleaned.jsonl", quiz(20))
    before = source.read_bytes()
    for data in (source, f"file://{source}"):
        for out in (f"file://{folder}", f"file://{folder}/", f"file://{tmp_path}/link"):
            with pytest.raises(UserError, match=r"cleaned\.jsonl: would be overwritten"):
                run(data, out)
    with pytest.raises(UserError, match="lies in the input folder"):
        run(folder, f"file://{folder}/out")
    assert source.read_bytes() == before
    fsspec.filesystem("memory").pipe("memory://bucket/cleaned.jsonl", before)
    with pytest.raises(UserError, match=r"^memory://bucket/cleaned\.jsonl: would be overwritten"):
        run("memory://bucket/cleaned.jsonl", "memory://bucket/")


def test_a_copy_that_broke_off_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    put, left = type(memory).put_file, 2

    def breaking(self: Any, *arguments: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ConnectionError("reset by peer")
        put(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "put_file", breaking)
        with pytest.raises(UserError, match="reset by peer"):
            run(URL, "memory://bucket/out")
    assert len(memory.ls("/bucket/out")) == 2
    run(URL, "memory://bucket/out")
    assert memory.exists("/bucket/out/manifest.json")
    run(URL, "memory://bucket/out", beta=1.0)


def test_a_place_that_cannot_be_written_is_told_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def denied(*_: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", denied)
    engine = ScriptedEngine()
    with pytest.raises(UserError, match=r"^memory://bucket/out: Access Denied$"):
        run(URL, "memory://bucket/out", engine)
    assert engine.asked == []


def test_a_web_page_is_fetched_again_unless_its_server_marks_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    marks: dict[str, str] = {}

    class Web:
        def info(self, path: str) -> dict[str, Any]:
            return {"type": "file", "size": None, **marks}

        def ukey(self, path: str) -> str:
            return "of the address"

        def open(self, path: str, mode: str) -> io.BytesIO:
            return io.BytesIO(body)

    url = "https://host/in.jsonl?x=1"
    monkeypatch.setattr("robustft.remote._opened", lambda url: (Web(), url))
    body = b"1"
    assert fetched(url).read_bytes() == b"1"
    body = b"2"
    assert fetched(url).read_bytes() == b"1"  # one process sees one version
    monkeypatch.setattr("robustft.remote._FETCHED", set())
    assert fetched(url).read_bytes() == b"2"
    marks["ETag"], body = "one", b"3"
    first = fetched(url)
    body = b"4"
    monkeypatch.setattr("robustft.remote._FETCHED", set())
    assert fetched(url) == first
    assert first.read_bytes() == b"3"
    marks["ETag"] = "two"
    assert fetched(url).read_bytes() == b"4"


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


def test_the_command_line(run: CommandLine, tmp_path: Path) -> None:
    there = f"file://{tmp_path}/there"
    done = run("clean", URL, "--out", there, "--detector", "paper")
    assert done.status == 0
    assert f"{there}: at work in" in done.err
    assert f"{there}: holds the files now" in done.err
    assert "manifest.json" in (left := sorted(one.name for one in (tmp_path / "there").iterdir()))
    assert ".robustft" not in left
    other = f"file://{tmp_path}/other"
    assert run("clean", URL, "--out", other, "--estimate").status == 0
    assert not (tmp_path / "other").exists()
    (tmp_path / "there/manifest.json").unlink()
    assert run("clean", URL, "--out", there, "--estimate").status == 0
    assert not (tmp_path / "there/manifest.json").exists()
    refused = run.refused("clean", URL, "--out", there, "--shard", "0/2")
    assert "a folder that all of them share" in refused
