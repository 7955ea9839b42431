"""Places where no output can be: every command says so in one line, and leaves nothing there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from commandline import CommandLine, quiz, write

FILES: dict[str, tuple[object, ...]] = {  # whose --out is a file
    "corrupt": ("corrupt", "IN", "--rate", 0.3),
    "score": ("score", "IN"),
    "eval": ("eval", "IN"),
    "bench": ("bench", "consistency", "--quick"),
}
FOLDERS: dict[str, tuple[object, ...]] = {
    "clean": ("clean", "IN"),
    "shard": ("clean", "IN", "--shard", "0/2"),
    "method": ("clean", "IN", "--method", "self-label"),
    "train": ("train", "IN"),
    "reproduce": ("reproduce", "table1", "--data", "TASKS", "--tasks", "fpb", "--noise", 30),
}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[object, object]:
    source = write(tmp_path / "in.jsonl", quiz(4))
    tasks = tmp_path / "tasks"
    (tasks / "fpb").mkdir(parents=True)
    for name in ("labeled", "test"):
        write(tasks / "fpb" / f"{name}.jsonl", quiz(4))
    return {"IN": source, "TASKS": tasks}


def arguments(command: tuple[object, ...], inputs: dict[object, object]) -> list[object]:
    return [inputs.get(word, word) for word in command]


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.parametrize("command", [*FILES, *FOLDERS])
@pytest.mark.parametrize("below", ["", "more"])
def test_a_file_in_the_way_is_named(
    run: CommandLine, tmp_path: Path, inputs: dict[object, object], command: str, below: str
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    out = tmp_path / "notes.txt" / below / ("out.jsonl" if command in FILES else "")
    before = tree(tmp_path)
    asked = arguments({**FILES, **FOLDERS}[command], inputs)
    said = run.refused(*asked, "--out", out)
    file = tmp_path / "notes.txt"
    if command in FOLDERS and command != "reproduce":
        assert said == f"robustft: {file}: is a file; expected a folder"
    else:
        assert said == f"robustft: {out}: cannot be written: {file} is a file; expected a folder"
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", [*FILES, *FOLDERS])
def test_a_place_that_cannot_be_written_is_named(
    run: CommandLine, tmp_path: Path, inputs: dict[object, object], command: str
) -> None:
    """/proc takes files of nobody, so this holds for root, too."""
    before = tree(tmp_path)
    asked = arguments({**FILES, **FOLDERS}[command], inputs)
    said = run.refused(*asked, "--out", f"/proc/robustft/{'out.jsonl' * (command in FILES)}")
    assert said.startswith("robustft: /proc/robustft")
    assert "cannot be written: No such file or directory" in said
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", [*FILES, *FOLDERS])
@pytest.mark.parametrize("place", ["long", "loop", "closed"])
def test_a_place_that_cannot_be_looked_at_is_named(
    run: CommandLine,
    tmp_path: Path,
    inputs: dict[object, object],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    place: str,
) -> None:
    name = {"long": "x" * 256, "loop": "loop", "closed": "closed"}[place]
    (tmp_path / "loop").symlink_to("loop")
    look = Path.stat

    def stat(path: Path, **options: bool) -> os.stat_result:  # root may look everywhere
        if "closed" in path.parts:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return look(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    asked = arguments({**FILES, **FOLDERS}[command], inputs)
    said = run.refused(*asked, "--out", tmp_path / name)
    assert said.startswith(f"robustft: {tmp_path / name}: cannot be written: ")


@pytest.mark.parametrize("option", ["--model", "--embedder", "--second-opinion", "--truth"])
def test_a_name_that_no_file_can_have_is_told(
    run: CommandLine, tmp_path: Path, inputs: dict[object, object], option: str
) -> None:
    name = "x" * 256
    said = run.refused("clean", inputs["IN"], "--out", tmp_path / "o", option, name)
    assert name in said
    assert said.endswith("File name too long")


def test_a_folder_of_several_kinds_is_told_and_nothing_made(
    run: CommandLine, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", quiz(4))
    (folder / "b.tsv").write_text("question\tanswer\na\tb\n")
    (folder / "README.md").write_text("what this is")
    said = run.refused("clean", folder, "--out", tmp_path / "out")
    assert "expected data files of one kind, found .jsonl (a.jsonl), .tsv (b.tsv): give" in said
    assert not (tmp_path / "out").exists()
    (folder / "b.tsv").unlink()
    assert run("clean", folder, "--out", tmp_path / "out", "--detector", "paper").status == 0


def test_of_a_run_given_for_its_training_set_that_is_named(
    run: CommandLine, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.jsonl", quiz(4))
    out = tmp_path / "out"
    assert run("clean", source, "--out", out, "--detector", "paper").status == 0
    adapter = out / "adapter"  # whose name of a file has the mark of a split
    adapter.mkdir()
    (adapter / "training.json").write_text("[]")
    said = run.refused("corrupt", out, "--out", tmp_path / "copy.jsonl")
    told = f"give one file, such as {out / 'cleaned.jsonl'}, its training set"
    assert said == f"robustft: {out}: holds the outputs of a run: {told}"
    (out / "cleaned.jsonl").unlink()
    said = run.refused("corrupt", out, "--out", tmp_path / "copy.jsonl")
    assert said == f"robustft: {out}: holds the outputs of a run: give one file"


@pytest.mark.parametrize("command", ["score", "eval"])
@pytest.mark.parametrize("name", ["o.parquet", "o.CSV", "o.jsonl.zst"])
def test_lines_are_not_written_under_the_name_of_another_format(
    run: CommandLine, tmp_path: Path, inputs: dict[object, object], command: str, name: str
) -> None:
    out = tmp_path / name
    said = run.refused(command, inputs["IN"], "--out", out)
    assert said == f"robustft: {out}: expected a name ending in .jsonl, which is what is written"
    assert not out.exists()
