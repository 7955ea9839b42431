"""The command line as its user meets it: exit status, stdout, stderr, and what lies in the folder.

Most runs happen in this process with scripted experts; a few use a tiny real model, and two a
process of their own.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shlex
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from commandline import SMALL_MODEL, CommandLine, call, quiz, read, write
from scripted import LetterEmbedder, ScriptedEngine

from robustft.cleaning import Announcement, run_clean
from robustft.cli.console import print_announcement, print_clean_summary
from robustft.cli.settings import parse
from robustft.config import CleanConfig
from robustft.engines import Abilities
from robustft.engines.factory import load_engine
from robustft.errors import UserError
from robustft.finishing import Models
from robustft.models import hub_answers
from robustft.verdicts import CleanResult

COMMANDS = ("demo", "clean", "train", "eval", "score", "corrupt", "bench")
PAPER = ("--detector", "paper")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", quiz(30))


# --- help --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option_and_its_default(run: CommandLine, command: str) -> None:
    done = run(command, "--help")
    assert (done.status, done.err) == (0, "")
    text = re.sub(r"\s+", " ", done.out)
    options = set(re.findall(r"(?<![\w-])--[a-z-]+", text)) - {"--help"}
    described = text.split("options:", 1)[1]
    assert options
    for option in options:
        assert option in described
    # Every option but the required ones says what holds without it.
    entries = len(re.findall(r"^  -", done.out, re.M)) - 1  # less --help
    required = done.out.count("(required)")
    assert len(re.findall(r"\(default: ", text)) == entries - required
    assert "(default: None)" not in text


def test_the_overview_names_every_command_and_exit_status(run: CommandLine) -> None:
    text = run("--help").out
    assert all(f"    {command} " in text for command in COMMANDS)
    assert all(f" {status} " in " ".join(text.split()) for status in (0, 1, 2, 3, 130))
    assert run("--version").out.startswith("robustft 0.")


def test_no_command_at_all_shows_the_overview(run: CommandLine) -> None:
    done = run()
    assert (done.status, done.out) == (2, "")
    assert done.err == run("--help").out


@pytest.mark.parametrize("command", ["clean", "train", "eval", "score", "corrupt"])
def test_a_missing_input_is_told_before_anything_heavy_is_imported(command: str) -> None:
    arguments = [command, "nothing.jsonl", "--out", "o", *["--rate=0.3"] * (command == "corrupt")]
    program = (
        f"import sys\nfrom robustft.cli import main\nstatus = main({arguments})\n"
        "print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "2 False\n"
    assert done.stderr == "robustft: nothing.jsonl: No such file or directory\n"


def test_a_file_whose_name_looks_like_an_option(
    run: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "-x.jsonl", quiz(4))
    said = run.refused("clean", "-x.jsonl", "--out", "o")
    assert "unknown argument '-x.jsonl'; a file of that name is written ./-x.jsonl" in said
    assert run("clean", "./-x.jsonl", "--out", "o", "--detector", "paper").status == 0


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; t = time.process_time()\n"
        "import robustft.cli\n"
        "try: robustft.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'pyarrow', 'tqdm'} & set(sys.modules)\n"
        "print(time.process_time() - t, heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy = done.stderr.split(" ", 1)
    assert float(seconds) < 0.5
    assert heavy.strip() == "set()"


# --- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("frob",), "COMMAND: expected one of demo, clean, "),
        (("clean",), "required: INPUT, --out (see robustft clean --help)"),
        (("clean", "x", "--out", "o", "--frob"), "unknown argument '--frob'"),
        (("clean", "x", "--out", "o", "--bta=1"), "argument '--bta=1'; did you mean --beta?"),
        (("clean", "x", "y", "--out", "o"), "unknown argument 'y' (see robustft clean --help)"),
        (("clean", "x", "--ou", "o"), "unknown argument '--ou'; did you mean --out?"),
        (("clean", "x", "--outt", "o"), "unknown argument '--outt'; did you mean --out?"),
        (("clean", "--outt", "o"), "unknown argument '--outt'; did you mean --out?"),
        (("clean", "--", "x", "--out", "o"), "unknown argument '--out'; options stand before --"),
        (("clean", "-", "--out", "o"), "-: input is read twice; save what is piped to"),
        (("clean", "x", "--out", "o", "--beta", "2"), "expected a number in [0, 1], found '2'"),
        (("clean", "x", "--out", "o", "--beta", "nan"), "--beta: expected a number in [0, 1]"),
        (("clean", "x", "--out", "o", "-k", "0"), "-k: expected a whole number from 1"),
        (("clean", "x", "--out", "o", "-k", "9" * 20), "-k: expected a whole number from 1"),
        (("clean", "x", "--out", "o", "--seed", "-1"), "--seed: expected a whole number from 0"),
        (("clean", "x", "--out", "o", "--temperature", "inf"), "--temperature: expected a number"),
        (("clean", "x", "--out", "o", "--engine", "y"), "--engine: expected one of"),
        (("clean", "x", "--out", "o", "--detector", "y"), "--detector: expected one of"),
        (("clean", "x", "--out", "o", "--without", "y"), "--without: expected one of selection"),
        (("clean", "x", "--out", "o", "--dtype", "int8"), "--dtype: expected one of"),
        (("corrupt", "x", "--out", "o", "--rate", "1.1"), "--rate: expected a number in [0, 1]"),
        (("bench", "frob"), "WHAT: expected one of consistency, knn, "),
    ],
)
def test_wrong_arguments(
    run: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").touch()
    assert complaint in run.refused(*arguments)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--device", "mps"), "device must be auto, cpu, cuda or cuda:N, got 'mps'"),
        (("--device", "cuda:99"), "device is cuda:99, but torch sees"),
        (("--model", ""), "expected a model folder, a .gguf file or a hub id, found ''"),
        (("--model", "no/such/folder/"), "no/such/folder/: cannot load the tokenizer"),
        (("--model", "./nothing"), "./nothing: expected a model folder"),
        (("--model", "nothing.gguf"), "nothing.gguf: expected a model folder"),
    ],
)
def test_wrong_models(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...],
    complaint: str,
) -> None:  # fmt: skip
    done = call(capsys, "clean", source, "--out", tmp_path / "out", *options)
    assert done.status == 2
    assert complaint in done.complaint


def test_an_unreachable_hub_is_asked_once(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked = []

    class Nowhere:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Nowhere)
    hub_answers.cache_clear()
    try:
        done = call(capsys, "clean", source, "--out", tmp_path / "out", "--model", "owner/name")
    finally:
        hub_answers.cache_clear()
    assert done.status == 2
    assert "owner/name: cannot load the tokenizer" in done.complaint
    assert "the hub does not answer" in done.complaint
    assert len(asked) == 1


# --- config files --------------------------------------------------------------------------------


def config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_options_from_a_config_file(run: CommandLine, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "made by config"
    file = config(
        tmp_path,
        f'out = "{out}"\nlimit = 7\nbatch-tokens = 99\ndetector = "paper"\n'
        'without = ["selection", "checker"]\ncalibrate = true\nverbose = false\n'
        "[clean]\nbeta = 0.25\n[train]\nepochs = 9\n",
    )
    assert run("clean", source, "--config", file).status == 0
    manifest = read_manifest(out)
    assert manifest["counts"]["input"] == 7
    settings = manifest["config"]
    assert (settings["beta"], settings["limit"], settings["engine.batch_tokens"]) == (0.25, 7, 99)
    assert settings["without"] == ["checker", "selection"]
    assert settings["experts.calibrate"] is True


@pytest.mark.parametrize("start", ["", "\ufeff"])  # what Windows editors put before the text
def test_an_option_whose_value_may_be_left_out_in_a_config_file(tmp_path: Path, start: str) -> None:
    for value, ray in (("true", "local"), ("false", None), ("'10.0.0.1:6379'", "10.0.0.1:6379")):
        file = config(tmp_path, f"{start}ray = {value}\nlimit = 3\n")
        options = parse(["clean", "in.jsonl", "--out", "o", "--config", str(file)])
        assert (options.ray, options.limit) == (ray, 3)


def test_the_command_line_wins(run: CommandLine, source: Path, tmp_path: Path) -> None:
    file = config(tmp_path, 'out = "/proc/no"\nbeta = 0.25\nk = 9\nwithout = "rel"\n')
    out = tmp_path / "out"
    done = run(
        "clean", source, "--config", file, "--out", out, "--beta", "0.75", "--without", "cer",
        *PAPER,
    )  # fmt: skip
    assert done.status == 0
    settings = read_manifest(out)["config"]
    assert (settings["beta"], settings["k"], settings["without"]) == (0.75, 9, ["cer"])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("frob = 1\n", "run.toml, field 'frob': not an option of robustft clean; known are"),
        ("[clean]\nrate = 0.5\n", "field 'rate': not an option of robustft clean"),
        (
            "input = 'x'\n",
            "'input': not an option; robustft clean INPUT is where it is given",
        ),
        (
            "INPUT = 'x'\n",
            "'INPUT': not an option; robustft clean INPUT is where it is given",
        ),
        ("beta = 2\n", "run.toml, field 'beta': expected a number in [0, 1], found '2'"),
        ("beta = true\n", "field 'beta': expected a string or a number, found True"),
        ("beta = [0.1, 0.2]\n", "field 'beta': expected a string or a number, found [0.1"),
        ("calibrate = 1\n", "field 'calibrate': expected true or false, found 1"),
        ("choice = 'x'\n", "field 'choice': expected one of likelihood, generate, found 'x'"),
        ("clean = 1\n", "field 'clean': expected a table, found 1"),
        ("k = = 1\n", "run.toml: expected TOML, found: Invalid value (at line 1"),
    ],
)
def test_a_wrong_config_file(
    run: CommandLine, source: Path, tmp_path: Path, text: str, complaint: str
) -> None:
    file = config(tmp_path, text)
    assert complaint in run.refused("clean", source, "--out", tmp_path / "o", "--config", file)


def test_a_missing_config_file(run: CommandLine, source: Path, tmp_path: Path) -> None:
    said = run.refused("clean", source, "--out", tmp_path / "o", "--config", tmp_path / "none")
    assert "none: cannot read the config file: No such file" in said


# --- clean -------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, dict[str, object]]:
    value: dict[str, dict[str, object]] = json.loads((folder / "manifest.json").read_text())
    return value


def test_clean_says_what_happened_and_what_to_run_next(
    run: CommandLine, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "the folder"
    done = run("clean", source, "--out", out, *PAPER)
    assert done.status == 0
    assert done.out.startswith("30 records: ")
    for name in ("cleaned.jsonl", "report.html", "verdicts.jsonl"):
        assert str(out / name) in done.out
    kept = {word: int(re.search(rf"{word} +(\d+)", done.out)[1]) for word in
            ("kept", "relabeled", "dropped")}  # type: ignore[index]  # fmt: skip
    assert sum(kept.values()) == 30
    assert len(read(out / "cleaned.jsonl")) == kept["kept"] + kept["relabeled"]
    assert f"robustft train '{out / 'cleaned.jsonl'}' --out '{out / 'adapter'}'" in done.out
    # stderr: only what was read, and by whom; nothing from libraries.
    assert done.err.splitlines() == [
        "robustft: 30 records, read as choice (question, options, answer)",
        "robustft: experts: scripted; embeddings: letters",
    ]


@pytest.mark.parametrize(
    ("earlier", "told"),
    [
        (0.0, "took          5 s"),
        (58.2, "took          5 s, and 58 s in earlier sessions"),
        (None, "took          5 s; the stages of all shards 61 s, added up"),
    ],
)
def test_the_time_that_others_took_is_told_apart(
    capsys: pytest.CaptureFixture[str], earlier: float | None, told: str
) -> None:
    seconds = {"detect": 40.5, "relabel": 20.1, "write": 0.2, "total": 5.2}
    print_clean_summary(
        CleanResult(Path("out"), Path("out/cleaned.jsonl"), seconds=seconds, earlier=earlier)
    )
    assert told in capsys.readouterr().out.splitlines()


def test_shares_of_the_votes_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    result = CleanResult(Path("out"), Path("out/cleaned.jsonl"), seconds={"total": 1.0})
    result.weights = {"base": 0.335, "reasoned": 0.0, "regression": 0.335, "neighbours": 0.33}
    print_clean_summary(result)
    said = "votes         base 34%, reasoned 0%, regression 33%, neighbours 33%"
    assert said in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("limit", "told"), [(12, "the first 12 records, by --limit 12"), (31, "30 records")]
)
def test_an_input_that_may_go_on_is_told(
    run: CommandLine, source: Path, tmp_path: Path, limit: int, told: str
) -> None:
    done = run("clean", source, "--out", tmp_path / "out", "--limit", limit, *PAPER)
    assert f"robustft: {told}, read as choice (" in done.err


@pytest.mark.parametrize(
    ("options", "answer", "called"),
    [
        (["red", "green", "blue"], 1, "; answers 0, 1, 2 are called A, B, C"),
        ({"label": ["1", "2"], "text": ["x", "y"]}, "2", "; answers 1, 2 are called A, B"),
        ({"label": ["A", "B"], "text": ["x", "y"]}, "B", ""),
        (["red", "green"], "green", ""),
    ],
)
def test_clean_says_what_it_calls_answers_that_are_no_letters(
    run: CommandLine, tmp_path: Path, options: object, answer: object, called: str
) -> None:
    rows = [{"question": f"{n}?", "options": options, "answer": answer} for n in range(8)]
    rows[0]["answer"] = 0 if answer == 1 else answer  # counted from 0
    source = write(tmp_path / "in.jsonl", rows)
    done = run("clean", source, "--out", tmp_path / "out", "--detector", "paper")
    assert f"robustft: 8 records, read as choice (question, options, answer){called}\n" in done.err


def test_another_detector_is_told(run: CommandLine, source: Path, tmp_path: Path) -> None:
    again = ("clean", source, "--out", tmp_path / "out", "--detector")
    resuming = "robustft: resuming; what was asked before is not asked again"
    assert run(*again, "paper").status == 0
    for detector, more in (("paper", ""), ("panel", "; --detector panel judges anew")):
        assert f"{resuming}{more}" in run(*again, detector).err.splitlines()


def test_rejects_are_counted_on_both_streams(run: CommandLine, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [*quiz(9), b"{broken"])
    done = run("clean", source, "--out", tmp_path / "out", *PAPER)
    assert "10 records, 1 of them unreadable" in done.err
    assert re.search(r"rejected +1  could not be read", done.out)
    assert read(tmp_path / "out/rejects.jsonl")[0]["line"] == 10


def test_a_finished_run_is_repeated_without_a_question(
    run: CommandLine, source: Path, tmp_path: Path
) -> None:
    first = run("clean", source, "--out", tmp_path / "out", *PAPER)

    def never() -> None:
        raise AssertionError("asked again")

    run.script(before_batch=never)
    second = run("clean", source, "--out", tmp_path / "out", *PAPER)
    assert second.status == 0
    assert "resuming" in second.err
    assert re.sub("took.*", "", second.out) == re.sub("took.*", "", first.out)


def test_a_changed_configuration_is_refused_with_the_difference(
    run: CommandLine, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run("clean", source, "--out", out, *PAPER)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".jsonl"}
    said = run.refused("clean", source, "--out", out, *PAPER, "--seed", "7", "-k", "5")
    assert "-k was 3, now 5; --seed was 0, now 7; choose another --out" in said
    assert {name: (out / name).read_bytes() for name in before} == before
    # Memory is no part of the result: a run may go on with smaller batches.
    assert run("clean", source, "--out", out, *PAPER, "--batch-tokens", "100").status == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("clean", "", "--out", "x"), "input: expected a path, found nothing"),
        (("clean", "in.jsonl", "--out", ""), "--out: expected a path, found nothing"),
        (("clean", "in.jsonl", "--out", "x", "--split", "foo"), "has no split 'foo'"),
        (("clean", "in.jsonl", "--out", "x", "--folds", "16"), "expected at most half the number"),
        (("clean", "in.jsonl", "--out", "x", "--gpus", "99"), "--gpus 99: found "),
        (
            ("clean", "in.jsonl", "--out", "x", "--calibrate", "--choice", "generate"),
            "choice must be likelihood where letters are calibrated",
        ),
    ],
)
def test_what_would_have_no_effect_or_a_bad_one_is_refused(
    run: CommandLine, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...], says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert says in run.refused(*arguments)
    assert not (tmp_path / "run.sqlite").exists()


def test_a_run_that_never_began_leaves_the_folder_free(
    source: Path, tmp_path: Path, run: CommandLine, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    monkeypatch.setattr("robustft.cleaning.load_engine", load_engine)
    assert "./no" in run.refused("clean", source, "--out", out, "--model", "./no", *PAPER)
    run = CommandLine(monkeypatch, capsys)
    assert run("clean", source, "--out", out, *PAPER).status == 0


def test_a_run_that_never_began_leaves_nothing(
    source: Path, tmp_path: Path, run: CommandLine, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def no_engine(*_: object) -> None:
        raise UserError("no such GPU")

    out = tmp_path / "out"
    clean = ("clean", source, "--out", out, *PAPER)
    monkeypatch.setattr("robustft.cleaning.load_engine", no_engine)
    assert "no such GPU" in run.refused(*clean)
    assert [path.name for path in out.iterdir()] == [".lock"]
    killed = out / "phases" / "input-0123"  # what one that was killed before it began has read
    killed.mkdir(parents=True)
    run = CommandLine(monkeypatch, capsys)
    assert run(*clean, "--limit", 7).status == 0
    (kept,) = (out / "phases").glob("input-*")
    assert kept != killed
    monkeypatch.setattr("robustft.cleaning.load_engine", no_engine)
    assert "no such GPU" in run.refused(*clean, "--limit", 7)
    assert kept.is_dir()
    assert (out / "run.sqlite").exists()


def test_a_second_run_on_a_busy_folder(run: CommandLine, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w+") as lock:
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = run.refused("clean", source, "--out", out)
    assert "another run is working in this folder (process 4711)" in said
    assert [path.name for path in out.iterdir()] == [".lock"]


def test_outputs_never_land_on_the_input(run: CommandLine, tmp_path: Path) -> None:
    source = write(tmp_path / "cleaned.jsonl", quiz(3))
    before = source.read_bytes()
    assert "would be overwritten" in run.refused("clean", source, "--out", tmp_path)
    chat = write(tmp_path / "messages.jsonl", quiz(3))
    asked = ("clean", chat, "--out", tmp_path, "--dataset-info")
    assert "would be overwritten" in run.refused(*asked)
    assert "is the input itself" in run.refused("score", source, "--out", source)
    assert "is the input itself" in run.refused("corrupt", source, "--out", source)
    inside = tmp_path / "out"
    for command in ("clean", "train", "score", "eval --split train", "corrupt"):
        asked = (*command.split(), tmp_path, "--out", inside.with_suffix(".jsonl"))
        assert "lies in the input folder" in run.refused(*asked)
    assert source.read_bytes() == before


def test_an_unforeseen_error_is_one_line_and_status_1(
    run: CommandLine, source: Path, tmp_path: Path
) -> None:
    def burn() -> None:
        raise RuntimeError("the accelerator\nis on fire")

    run.script(before_batch=burn)
    done = run("clean", source, "--out", tmp_path / "out", *PAPER)
    assert done.status == 1
    *_, last = done.err.splitlines()
    assert last.startswith("robustft: RuntimeError: the accelerator (--verbose shows more); what")
    with pytest.raises(RuntimeError):
        run("clean", source, "--out", tmp_path / "out", *PAPER, "--verbose")


def test_a_message_cannot_move_the_cursor(run: CommandLine, tmp_path: Path) -> None:
    said = run.refused("clean", tmp_path / "\x1b[2J\u202e.jsonl", "--out", tmp_path / "o")
    assert "\x1b" not in said
    assert "\\x1b[2J\\u202e.jsonl: No such file" in said


# --- score, corrupt ------------------------------------------------------------------------------


def test_score_writes_one_line_a_record(run: CommandLine, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [*quiz(5), b"{broken"])
    done = run("score", source, "--out", tmp_path / "s.jsonl")
    assert (done.status, done.err) == (0, SMALL_MODEL)
    assert "5 responses scored, 1 unreadable record\n" in done.out
    assert str(tmp_path / "s.jsonl") in done.out
    lines = read(tmp_path / "s.jsonl")
    assert [line.get("id") for line in lines] == ["r0", "r1", "r2", "r3", "r4", None]
    assert {"nll", "entropy", "margin", "rank"} <= lines[0].keys()


def test_corrupt_says_how_many_and_where_the_truth_is(run: CommandLine, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", quiz(10))
    done = run("corrupt", source, "--rate", "0.3", "--out", tmp_path / "n.jsonl")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("3 of 10 answers made wrong (rate 0.3, seed 0)\n")
    assert str(tmp_path / "n.jsonl.truth.jsonl") in done.out
    changed = [a != b for a, b in zip(read(source), read(tmp_path / "n.jsonl"), strict=True)]
    truth = read(tmp_path / "n.jsonl.truth.jsonl")
    assert changed == [line["corrupted"] for line in truth]
    assert sum(changed) == 3


def test_the_next_command_names_what_this_one_was_told(run: CommandLine, tmp_path: Path) -> None:
    rows = [{"Text": f"{n} + 1?", "Label": str(n + 1)} for n in range(10)]
    source = write(tmp_path / "in.jsonl", rows)
    named = ("--schema", "qa:Text,Label")
    for arguments in (
        ("corrupt", source, "--out", tmp_path / "noisy.jsonl", *named),
        ("clean", source, "--out", tmp_path / "own", "--method", "self-label", *named),
    ):
        done = run(*arguments)
        command = shlex.split(done.out.partition("next:\n")[2].splitlines()[0])
        assert command[command.index("--schema") + 1] == "qa:Text,Label"
        if command[1] == "clean":
            assert run(*command[1:], "--detector", "paper").status == 0


def test_the_output_of_corrupt_is_of_the_inputs_format(run: CommandLine, source: Path) -> None:
    said = run.refused("corrupt", source, "--out", source.with_suffix(".csv"))
    assert "expected a name ending in .jsonl" in said


# --- with a real model -------------------------------------------------------------------------


def test_the_whole_way_with_a_tiny_real_model(
    tiny_model: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", quiz(12))
    model = ("--model", tiny_model, "--dtype", "float32")
    done = call(
        capsys, "clean", source, "--out", tmp_path / "out", *model, "--embedder", tiny_encoder,
        "--reasoning-tokens", "2", "--rounds", "1", "--threads", "1", *PAPER,
    )  # fmt: skip
    assert done.status == 0
    assert [line for line in done.err.splitlines() if not line.startswith("robustft: ")] == []
    assert f"--model {tiny_model}" in done.out
    assert len(read(tmp_path / "out/verdicts.jsonl")) == 12
    scored = call(capsys, "score", source, "--out", tmp_path / "s.jsonl", *model)
    assert (scored.status, scored.err) == (0, "")
    assert all(line["nll"] > 0 for line in read(tmp_path / "s.jsonl"))


# --- processes of their own ----------------------------------------------------------------------

SLOW = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import robustft.cleaning
from scripted import LetterEmbedder, ScriptedEngine, slowly
seconds = float(sys.argv.pop(1))
robustft.cleaning.load_engine = lambda _: ScriptedEngine(before_batch=slowly(seconds))
robustft.cleaning.Embedder = lambda _: LetterEmbedder()
from robustft.cli import main
sys.exit(main())
"""


def opinions(folder: Path) -> int:
    try:
        with sqlite3.connect(f"file:{folder / 'run.sqlite'}?mode=ro", uri=True) as store:
            return int(store.execute("SELECT SUM(questions) FROM batches").fetchone()[0] or 0)
    except sqlite3.Error:
        return 0


def test_ctrl_c_saves_and_the_same_command_resumes(run: CommandLine, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", quiz(60)), tmp_path / "out"
    arguments = ["clean", str(source), "--out", str(out), *PAPER]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "0.1", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300  # a machine may be busy
    while opinions(out) < 16 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.splitlines()[-1] == (
        "robustft: interrupted; run the same command again to resume"
    )
    assert "Traceback" not in stderr
    kept = opinions(out)
    assert kept >= 16
    assert not (out / "verdicts.jsonl").exists()
    done = run(*arguments)
    assert done.status == 0
    assert "resuming" in done.err
    assert run("clean", source, "--out", tmp_path / "whole", *PAPER).status == 0
    whole = (tmp_path / "whole/verdicts.jsonl").read_bytes()
    assert (out / "verdicts.jsonl").read_bytes() == whole


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("sink", ["closed pipe", "full disk"])
def test_nobody_reads_stdout(tmp_path: Path, sink: str, unbuffered: str) -> None:
    source = write(tmp_path / "in.jsonl", quiz(10))
    command = [sys.executable, "-c", "import sys; from robustft.cli import main; sys.exit(main())",
               "corrupt", str(source), "--out", str(tmp_path / "n.jsonl")]  # fmt: skip
    if sink == "full disk":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stdout = os.pipe()
        os.close(reader)
    done = subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(stdout)
    said = done.stderr.splitlines()
    assert (done.returncode, len(said)) == ((1, 1) if sink == "full disk" else (0, 0))
    assert all("stdout: No space left" in line for line in said)
    assert (tmp_path / "n.jsonl").exists()


def on_terminal(code: str, columns: int) -> bytes:
    """What a terminal of so many columns gets from `code`."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=follower, stdout=follower)
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 4096):
            shown += chunk
    except OSError:  # how Linux says that the other side is gone
        pass
    os.close(leader)
    assert process.wait() == 0
    return shown


@pytest.mark.parametrize("columns", [80, 40])
def test_a_terminal_sees_a_bar_and_then_a_clean_line(columns: int) -> None:
    shown = on_terminal(
        "import time\nfrom robustft.progress import Progress\n"
        "with Progress('shard 12/64 detect', 4) as bar:\n"
        "    for _ in range(4): time.sleep(0.7); bar.update(1, 'base')\n"
        "import sys; print('after', file=sys.stderr)",
        columns,
    )
    # The time before the step and the bar, which a narrow terminal cuts.
    end = rb"00:0\d elapsed, base\] \|.*" if columns == 80 else rb"0?"
    assert re.search(rb"\rshard 12/64 detect: 100% \[00:00 left, " + end + rb"\r", shown)
    assert shown.endswith(b"\r\nafter\r\n")


def test_a_terminal_that_does_not_say_how_wide_it_is_sees_lines() -> None:
    shown = on_terminal(
        "import time\nfrom robustft import progress\n"
        "progress._SECONDS_BETWEEN_LINES = 0.1\n"
        "with progress.Progress('detect', 2) as bar:\n"
        "    for _ in range(2): time.sleep(0.2); bar.update(1, 'base')\n",
        0,
    )
    assert b"robustft: detect \xc2\xb7 base: 100%, 00:00 elapsed, 00:00 left\r\n" in shown


def test_a_terminal_sees_what_has_begun_and_nothing_of_what_is_soon_over() -> None:
    shown = on_terminal(
        "import time\nfrom robustft.progress import Progress\n"
        "with Progress('read', 4) as bar: bar.update(4)\n"
        "with Progress('detect', 4): time.sleep(2.2)\n"
        "import sys; print('after', file=sys.stderr)",
        80,
    )
    assert re.search(rb"^\s*detect:   0% \[\? left, 00:02 elapsed\] \|", shown)
    assert shown.endswith(b"\r\nafter\r\n")


def test_an_interrupt_while_a_bar_is_drawn_ends_the_run() -> None:
    shown = on_terminal(
        "import sys, threading, time\nfrom robustft import progress\n"
        "progress._SILENT_SECONDS = 0.1\n"
        "def interrupted(*told, **how):\n"
        "    if threading.current_thread() is threading.main_thread(): raise KeyboardInterrupt\n"
        "try:\n"
        "    with progress.Progress('detect', 4) as bar:\n"
        "        time.sleep(0.3)\n"
        "        bar._bar.display = interrupted\n"
        "        try: bar.update(1)\n"
        "        finally: time.sleep(0.3)\n"  # as long as a run may take to tidy up
        "except KeyboardInterrupt: print('interrupted', file=sys.stderr)",
        80,
    )
    assert shown.endswith(b"interrupted\r\n")


# --- what is not robustft's to overwrite -----------------------------------------------------


@pytest.mark.parametrize("command", ["score", "eval", "corrupt --rate 0.5"])
def test_the_input_and_other_people_s_files_stay(
    run: CommandLine, command: str, tmp_path: Path
) -> None:
    source = write(
        tmp_path / "in.jsonl", [{"question": f"{n} + 1?", "answer": n + "1"} for n in "123"]
    )
    other = write(tmp_path / "mine.jsonl", [{"mine": True}])
    before = source.read_bytes(), other.read_bytes()
    arguments = (command + f" {source} --out").split()
    done = run(*arguments, str(source))
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "in.jsonl: is the input itself; choose another name" in done.err
    done = run(*arguments, str(other))
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "mine.jsonl: is there already and was not written by this command" in done.err
    assert (source.read_bytes(), other.read_bytes()) == before
    if "corrupt" in command:  # needs no model: what it wrote itself it may write again
        own = str(tmp_path / "own.jsonl")
        assert [run(*arguments, own).status for _ in range(2)] == [0, 0]


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("clean", "report.html"),
        ("clean --dataset-info", "messages.jsonl"),
        ("clean --dataset-info", "dataset_info.json"),
        ("clean --method self-label", "verdicts.jsonl"),
        ("train", "README.md"),
    ],
)
def test_a_folder_of_somebody_else_stays(
    run: CommandLine, command: str, name: str, tmp_path: Path
) -> None:
    source = write(
        tmp_path / "in.jsonl", [{"question": f"{n} + 1?", "answer": n + "1"} for n in "123"]
    )
    mine = tmp_path / "project" / name
    mine.parent.mkdir()
    mine.write_text("mine")
    for _ in range(2):  # what the first one leaves there is no leave for the second
        done = run(*command.split(), str(source), "--out", str(mine.parent))
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert f"{name}: is there already and was not written by this command" in done.err
        assert mine.read_text() == "mine"
    if name == "verdicts.jsonl":
        run.refused("clean", source, "--out", mine.parent)
        run.refused("clean", source, "--out", mine.parent, "--method", "self-label")
        assert mine.read_text() == "mine"


def test_a_method_writes_over_its_own_outputs_alone(run: CommandLine, tmp_path: Path) -> None:
    source, other = write(tmp_path / "in.jsonl", quiz(9)), write(tmp_path / "b.jsonl", quiz(8))
    ours, theirs = tmp_path / "ours", tmp_path / "the irs"
    label = ("clean", source, "--method", "self-label", "--out")
    assert run("clean", source, "--out", ours, "--detector", "paper").status == 0
    before = (ours / "verdicts.jsonl").read_bytes()
    assert "ours: holds a run of robustft; choose another --out" in run.refused(*label, ours)
    assert (ours / "verdicts.jsonl").read_bytes() == before
    for _ in range(2):
        done = run(*label, theirs)
        assert done.status == 0
        assert done.err == SMALL_MODEL
    assert f"next:\n  robustft train '{theirs}/cleaned.jsonl' --out '{theirs}/adapter'" in done.out
    assert f"\n  robustft eval TEST_FILE --adapter '{theirs}/adapter'" in done.out
    before = (theirs / "verdicts.jsonl").read_bytes()
    for arguments in (
        ("clean", source),
        ("clean", source, "--method", "self-select"),
        ("clean", other, "--method", "self-label"),
        ("clean", theirs / "cleaned.jsonl", "--method", "self-label"),
        ("clean", f"file://{theirs}/cleaned.jsonl", "--method", "self-label"),
    ):
        assert "choose another --out" in run.refused(*arguments, "--out", theirs)
        assert (theirs / "verdicts.jsonl").read_bytes() == before


def test_a_servers_words_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "evil\x1b]0;pwned\x07\x1b[2J"
    can = Abilities(found=(f"serves {evil}",))
    models = Models("openai", evil, "", "MiniLM", False, can)
    print_announcement(Announcement(3, 0, "qa (question, answer)", models, resumed=False))
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "\x07" not in said
    assert "evil\\x1b]0;pwned" in said


@pytest.mark.parametrize(
    ("answer", "detector", "told"),
    [
        ("A long reply, in words of its own.", "crowd", True),
        ("A long reply, in words of its own.", "paper", False),
        ("Six and one are seven, then.\n#### 7", "crowd", False),
        ("grey", "crowd", False),
    ],
)
def test_before_free_texts_are_asked_about_their_detector_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: str, detector: str, told: bool
) -> None:
    rows = [{"question": f"Question {n}?", "answer": answer} for n in range(4)]
    source = tmp_path / "in.jsonl"
    write(source, rows)
    config = CleanConfig(input=str(source), out=tmp_path / "out", detector=detector)  # type: ignore[arg-type]
    run_clean(
        config, engine=ScriptedEngine(), embedder=LetterEmbedder(), announce=print_announcement
    )
    assert ("robustft: most answers are free texts" in capsys.readouterr().err) == told


@pytest.mark.parametrize(
    "given",
    ["--estimate", "--shard 0/4", "--processes 2", "--gpus 8", "--ray", "--beta 0.2",
     "--without cer", "--detector paper"],
)  # fmt: skip
def test_a_baseline_refuses_what_it_would_ignore(
    run: CommandLine, tmp_path: Path, given: str
) -> None:
    source = write(tmp_path / "in.jsonl", quiz(3))
    arguments = ("clean", source, "--method", "self-label", "--out", tmp_path / "out")
    said = run.refused(*arguments, *given.split())
    assert f"{given.split()[0]} belongs to --method robustft, not to self-label" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["train", "eval", "score", "corrupt"])
def test_only_clean_writes_to_remote_storage(
    run: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "in.jsonl", quiz(3))
    rate = ["--rate", "0.5"] * (command == "corrupt")
    said = run.refused(command, source, "--out", "s3://bucket/o.jsonl", *rate)
    assert "--out s3://bucket/o.jsonl: only clean writes to such addresses" in said
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_stdout_that_cannot_spell_a_path(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", quiz(9))
    done = subprocess.run(
        [sys.executable, "-m", "robustft", "corrupt", str(source), "--rate", "0.5", "--out",
         str(tmp_path / "né.jsonl")],
        env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "n\\xe9.jsonl" in done.stdout


def test_lists_in_a_config_file(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('tasks = ["fpb", "arc"]\nnoise = [30, 50]\nseeds = 3\n')
    options = parse(["reproduce", "table1", "--config", str(config)])
    assert (options.tasks, options.noise, options.seeds) == (("fpb", "arc"), (30, 50), (3,))
