"""Every kind of bad input through `robustft clean`: one clear line or a reject, never a traceback.

What each reader does with each of them in detail is in test_bad_input_records.py.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from scripted import LetterEmbedder, ScriptedEngine

from robustft import cleaning
from robustft.cli import main

GOOD = {"question": "What is the colour of the sky?", "options": ["red", "blue"], "answer": "B"}
Status = Callable[..., tuple[int, str, str]]


def lines(*rows: object) -> bytes:
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)


@pytest.fixture
def clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Status:
    """Run `robustft clean` on bytes under a file name; returns status, stdout, stderr."""
    monkeypatch.setattr(cleaning, "load_engine", lambda config: ScriptedEngine())
    monkeypatch.setattr(cleaning, "Embedder", lambda spec: LetterEmbedder())

    def run(name: str, data: bytes | None, *options: str, out: Path | None = None) -> object:
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        capsys.readouterr()
        folder = str(out or tmp_path / "out")
        status = main(["clean", str(path), "--out", folder, "--detector", "paper", *options])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return status, printed.out, printed.err

    return run  # type: ignore[return-value]


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit status 2, nothing on stdout, and one line on stderr with all of `words`."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err


def rejected(result: tuple[int, str, str], folder: Path, *words: str, good: int = 2) -> None:
    """Exit status 0, `good` verdicts, one reject whose reason has all of `words`."""
    assert result[0] == 0, result[2]
    assert len((folder / "verdicts.jsonl").read_text().splitlines()) == good
    (reject,) = map(json.loads, (folder / "rejects.jsonl").read_text().splitlines())
    for word in words:
        assert word in reject["reason"]
    assert "1 of them unreadable" in result[2]


def test_missing_file(clean: Status) -> None:
    refused(clean("absent.jsonl", None), "absent.jsonl")


def test_empty_file(clean: Status) -> None:
    refused(clean("empty.jsonl", b""), "empty.jsonl")


def test_directory(clean: Status, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    refused(clean("folder", None), "folder")


def test_unreadable_file(clean: Status, tmp_path: Path) -> None:
    # A permission test would mean nothing for root; a link that leads round is unreadable to all.
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    refused(clean("loop.jsonl", None), "loop.jsonl")


def test_wrong_extension(clean: Status) -> None:
    refused(clean("data.docx", lines(GOOD)), "data.docx", ".jsonl")


def test_a_name_that_is_not_utf8(
    clean: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(clean("caf\udce9.jsonl", lines(GOOD)), "is not UTF-8")
    refused(clean("d.jsonl", lines(GOOD), out=tmp_path / "caf\udce9"), "is not UTF-8")
    monkeypatch.setattr(sys, "argv", ["robustft", "--config", "caf\udce9.toml"])
    assert clean("d.jsonl", lines(GOOD))[0] == 0
    command = json.loads((tmp_path / "out/manifest.json").read_text())["command"]
    assert command[-1] == r"caf\udce9.toml"


def test_unknown_schema(clean: Status) -> None:
    refused(clean("d.jsonl", lines({"alpha": 1, "beta": 2})), "alpha")
    refused(clean("d.jsonl", lines(GOOD), "--schema", "nonsense"), "nonsense", "choice")


def test_missing_field(clean: Status, tmp_path: Path) -> None:
    bad = {"question": "q?", "options": ["a", "b"]}
    rejected(clean("d.jsonl", lines(GOOD, bad, GOOD)), tmp_path / "out", "answer")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"options": "a|b"}, ("options",)),
        ({"answer": "Z"}, ("answer",)),
        ({"options": ["only one"], "answer": "A"}, ("options",)),
    ],
    ids=["options-not-a-list", "answer-outside-the-options", "one-option"],
)
def test_bad_options(
    clean: Status, tmp_path: Path, change: dict[str, object], words: tuple[str, ...]
) -> None:
    rejected(clean("d.jsonl", lines(GOOD, GOOD | change, GOOD)), tmp_path / "out", *words)


def test_duplicate_ids(clean: Status, tmp_path: Path) -> None:
    rows = [GOOD | {"id": "same", "question": f"{i}?"} for i in range(3)]
    assert clean("d.jsonl", lines(*rows))[0] == 0
    verdicts = (tmp_path / "out/verdicts.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in verdicts] == ["same", "same#2", "same#3"]


@pytest.mark.parametrize(
    "bad",
    [
        b'{"question": "\xff\xfe", "options": ["a", "b"], "answer": "A"}',
        b'{"question": "nul \x00", "options": ["a", "b"], "answer": "A"}',
        b'{"question": NaN, "options": ["a", "b"], "answer": "A"}',
        b'{"question": "' + b"x" * 10_000_000 + b'", "options": ["a", "b"], "answer": "A"}',
        b'{"question": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"{broken",
    ],
    ids=["invalid-utf8", "nul", "nan", "10-mb-line", "nesting-100000", "broken-json"],
)
def test_bad_lines(clean: Status, tmp_path: Path, bad: bytes) -> None:
    rejected(clean("d.jsonl", lines(GOOD, bad, GOOD)), tmp_path / "out")


def test_truncated_gzip(clean: Status, tmp_path: Path) -> None:
    rows = [GOOD | {"question": f"{i} {os.urandom(30).hex()}?"} for i in range(300)]
    whole = gzip.compress(lines(*rows), mtime=0)
    status, _, err = clean("d.jsonl.gz", whole[: len(whole) // 2])
    assert status == 0, err
    verdicts = len((tmp_path / "out/verdicts.jsonl").read_text().splitlines())
    assert 0 < verdicts < 300
    (reject,) = map(json.loads, (tmp_path / "out/rejects.jsonl").read_text().splitlines())
    assert "gzip" in reject["reason"] or "truncated" in reject["reason"]


def test_csv_with_a_broken_quote(clean: Status, tmp_path: Path) -> None:
    header = b"question,options,answer\n"
    good = b'sky?,"[""red"", ""blue""]",B\n'
    result = clean("d.csv", header + good + good + b'"never closed,x,A\n' + good)
    assert result[0] == 0, result[2]
    verdicts = len((tmp_path / "out/verdicts.jsonl").read_text().splitlines())
    rejects = len((tmp_path / "out/rejects.jsonl").read_text().splitlines())
    assert verdicts >= 2
    assert rejects >= 1


def test_every_record_rejected(clean: Status) -> None:
    refused(clean("d.jsonl", lines(GOOD | {"answer": "Z"}, b"{broken")), "d.jsonl")


def test_model_folder_without_tokenizer_and_pickle_checkpoint(
    clean: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real engine
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"")
    refused(clean("d.jsonl", lines(GOOD), "--model", str(folder)), "tokenizer")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(clean("d.jsonl", lines(GOOD), "--model", str(folder)), "pickle")


@pytest.mark.parametrize("options", [["--beta", "0"], ["--beta", "1"], ["-k", "50"], []])
def test_one_record_and_extreme_settings(clean: Status, options: list[str]) -> None:
    assert clean("d.jsonl", lines(GOOD), *options)[0] == 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--beta", "1.5"], "1.5"),
        (["-k", "0"], "'0'"),
        (["--limit", "none"], "'none'"),
        (["--without", "everything"], "everything"),
        (["--detector", "magic"], "magic"),
        (["--config", "absent.toml"], "absent.toml"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_arguments(clean: Status, options: list[str], word: str) -> None:
    refused(clean("d.jsonl", lines(GOOD), *options), word)


def test_disk_full(clean: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        status, out, err = clean("d.jsonl", lines(GOOD))
    assert status in (1, 2)
    assert out == ""
    assert "No space left on device" in err.splitlines()[-1]
    assert not (tmp_path / "out/verdicts.jsonl").exists()
    assert clean("d.jsonl", lines(GOOD))[0] == 0  # the same command resumes


@pytest.mark.parametrize("room", [0, 40 << 10, 120 << 10])
def test_disk_full_while_writing(clean: Status, tmp_path: Path, room: int) -> None:
    """Whichever file meets the limit, the error is one line and a later run makes up for it."""
    rows = [GOOD | {"question": f"{i} {'why ' * 50}?"} for i in range(300)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    data = lines(*rows)
    (tmp_path / "d.jsonl").write_bytes(data)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        result = clean("d.jsonl", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    status, out, err = result
    assert (status, out) == (2, "")
    assert str(tmp_path / "out") in err.splitlines()[-1]
    assert not (tmp_path / "out/verdicts.jsonl").exists()
    assert clean("d.jsonl", None)[0] == 0
    assert len((tmp_path / "out/verdicts.jsonl").read_text().splitlines()) == 300


def test_damaged_store(clean: Status, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/run.sqlite").write_bytes(b"no database" * 1000)
    refused(clean("d.jsonl", lines(GOOD)), "run.sqlite", "cannot be used as the run's store")


def test_damaged_weights(
    clean: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    monkeypatch.undo()  # the real engine
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:1000])
    refused(clean("d.jsonl", lines(GOOD), "--model", str(folder)), "cannot load the model")
    (tmp_path / "junk.gguf").write_bytes(b"GGUF junk")
    refused(clean("d.jsonl", lines(GOOD), "--model", str(tmp_path / "junk.gguf")), "junk.gguf: ")
    (folder / "config.json").write_text(
        '{"model_type": "own", '
        '"auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}'
    )
    (folder / "own.py").write_text("raise SystemExit('this code must never run')")
    refused(clean("d.jsonl", lines(GOOD), "--model", str(folder)), "never run")


@pytest.mark.parametrize("out", ["file", "file/out", "file/out/more"])
def test_a_file_where_the_output_folder_would_be(clean: Status, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("")
    result = clean("d.jsonl", lines(GOOD), out=tmp_path / out)
    refused(result, f"{tmp_path}/file: is a file; expected a folder")


def test_control_characters_never_reach_the_terminal(clean: Status) -> None:
    result = clean("d.jsonl", lines(GOOD), "--schema", "\x1b[31mred\u202e")
    refused(result)
    assert "\x1b" not in result[2]
    assert "\u202e" not in result[2]


INTERRUPTED = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from scripted import LetterEmbedder, ScriptedEngine, slowly
from robustft import cleaning
from robustft.cli import main
cleaning.load_engine = lambda config: ScriptedEngine(before_batch=slowly(0.2))
cleaning.Embedder = lambda spec: LetterEmbedder()
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c(clean: Status, tmp_path: Path) -> None:
    rows = [GOOD | {"question": f"{i}?"} for i in range(200)]
    data = tmp_path / "d.jsonl"
    data.write_bytes(lines(*rows))
    command = [sys.executable, "-c", INTERRUPTED, "clean", str(data), "--out",
               str(tmp_path / "out"), "--detector", "paper"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    store = tmp_path / "out/embeddings.f32"
    deadline = time.monotonic() + 300  # a machine may be busy
    while not (store.exists() and store.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "run the same command again to resume" in err
    status, _, err = clean("d.jsonl", data.read_bytes())
    assert status == 0
    assert "resuming" in err
