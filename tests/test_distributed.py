"""Shards and `merge`: the bytes of one process, whatever is killed, late or missing."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine, call, quiz, write
from scripted import FlakyEngine, LetterEmbedder, ScriptedEngine

from robustft import decisions
from robustft.cleaning import run_clean
from robustft.cli.settings import parse
from robustft.config import CleanConfig, EngineConfig
from robustft.distributed import merge, run_shard
from robustft.distributed.processes import _Child, run_children, run_processes
from robustft.errors import UnfinishedError, UserError
from robustft.verdicts import CleanResult

HERE = Path(__file__).parent
RESULTS = ("verdicts.jsonl", "cleaned.jsonl", "rejects.jsonl")
ROWS = 1400  # three units: shards of two, one and no unit


def rows(count: int = ROWS) -> list[Any]:
    """Questions, some of them twice, and lines that cannot be read."""
    found: list[Any] = quiz(count)
    found[700:705] = quiz(5)
    found[30:30] = [b"{broken", b'{"question": "no options"}']
    return found


def learnable() -> list[Any]:
    """Questions whose letters tell the answer, 30 % of them wrong, some without options."""
    rng = random.Random(0)
    found: list[Any] = [b"{broken", b"[]"]
    for number in range(ROWS):
        label = rng.randrange(3)
        words = rng.choices(("zebra zoo", "quick quiz", "happy yarn")[label].split(), k=5)
        given = label if rng.random() > 0.3 else rng.randrange(3)
        row = {"question": f"{' '.join(words)} {number}", "options": ["x", "y", "z"]}
        found.append({"id": number, **row, "answer": "ABC"[given]})
    return found


def config(source: Path, out: Path, **settings: Any) -> CleanConfig:
    return CleanConfig(input=str(source), out=out, **{"detector": "paper", **settings})


def whole(source: Path, out: Path, **settings: Any) -> CleanResult:
    return run_clean(
        config(source, out, **settings), engine=ScriptedEngine(), embedder=LetterEmbedder()
    )


def shard(
    source: Path, out: Path, number: int, of: int, engine: ScriptedEngine | None = None,
    wait: float = 0, **settings: Any,
) -> list[int]:  # fmt: skip
    return run_shard(
        config(source, out, **settings), number, of, wait=wait,
        engine=engine or ScriptedEngine(), embedder=LetterEmbedder(),
    )  # fmt: skip


def all_shards(source: Path, out: Path, of: int, **settings: Any) -> None:
    """Every shard twice, as an array job that is submitted again."""
    order = list(range(of))
    random.Random(of).shuffle(order)
    for number in order[:-1]:
        with pytest.raises(UnfinishedError):
            shard(source, out, number, of, **settings)
    left = [shard(source, out, number, of, **settings) for number in reversed(order)]
    assert left[-1] == []


def same(one: Path, other: Path) -> None:
    for name in RESULTS:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("in") / "in.jsonl", rows())


@pytest.mark.parametrize(("detector", "of"), [("paper", 3), ("crowd", 2)])
def test_merged_shards_are_the_run_of_one_process(tmp_path: Path, of: int, detector: str) -> None:
    source = write(tmp_path / "in.jsonl", rows() if detector == "paper" else learnable())
    expected = whole(source, tmp_path / "whole", detector=detector, beta=0.7)
    all_shards(source, tmp_path / "out", of, detector=detector, beta=0.7)
    result = merge([tmp_path / "out"])
    same(tmp_path / "whole", tmp_path / "out")
    assert result.counts == expected.counts
    assert repr(result.threshold) == repr(expected.threshold)
    assert result.weights == expected.weights
    assert result.confusions == expected.confusions
    assert bool(result.confusions) == (detector == "crowd")
    assert result.counts["input"] == ROWS + 2
    assert result.counts["relabel"] > 90
    assert (tmp_path / "out/report.html").stat().st_size > 0
    totals = json.loads((tmp_path / "out/manifest.json").read_text())["experts"]
    assert totals == {
        name: {**cost, "seconds": totals[name]["seconds"]}
        for name, cost in json.loads((tmp_path / "whole/manifest.json").read_text())[
            "experts"
        ].items()
    }


def test_more_shards_than_units_leave_some_empty(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", quiz(20))
    whole(source, tmp_path / "whole")
    assert shard(source, tmp_path / "out", 0, 3) == [2]  # empty ones have nothing to do
    assert shard(source, tmp_path / "out", 2, 3) == []
    merge([tmp_path / "out"])
    same(tmp_path / "whole", tmp_path / "out")


def test_a_shard_says_whom_it_misses_and_asks_nothing_twice(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UnfinishedError, match=r"shard 0/2: the detection of shard 1 is not fin"):
        shard(source, out, 0, 2)
    with pytest.raises(UnfinishedError, match=r"of 2 shards these are not finished: 0, 1"):
        merge([out])
    engine = ScriptedEngine()
    with pytest.raises(UnfinishedError):
        shard(source, out, 0, 2, engine)
    assert engine.asked == []
    assert shard(source, out, 1, 2) == [0]
    with pytest.raises(UnfinishedError, match="not finished: 0;"):
        merge([out])


def test_shards_of_several_folders_are_merged_elsewhere(tmp_path: Path, source: Path) -> None:
    whole(source, tmp_path / "whole")
    all_shards(source, tmp_path / "a", 2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = sorted((tmp_path / "a/shards").glob("rows-*"))
    shutil.rmtree(second)
    shutil.rmtree(tmp_path / "b/shards" / first.name)
    with pytest.raises(UnfinishedError, match="not finished: 1;"):
        merge([tmp_path / "a"])
    moved = tmp_path / "moved.jsonl"
    shutil.copy(source, moved)
    folders = [first, tmp_path / "b"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/verdicts.jsonl").write_text("mine")
    (tmp_path / "mine/.lock").touch()  # as a refused command leaves it
    with pytest.raises(UserError, match="was not written by this command"):
        merge(folders, tmp_path / "mine", data=str(moved))
    with pytest.raises(UserError, match="whole: holds a run of robustft"):
        merge(folders, tmp_path / "whole", data=str(moved))
    for _ in range(2):  # what it wrote itself it may write again
        merge(folders, tmp_path / "out", data=str(moved))
    same(tmp_path / "whole", tmp_path / "out")


def test_a_merge_killed_before_its_manifest_goes_on(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    all_shards(source, tmp_path / "shards", 2)
    with monkeypatch.context() as patched:
        patched.setattr("robustft.finishing.write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            merge([tmp_path / "shards"], tmp_path / "out")
    assert (tmp_path / "out/verdicts.jsonl").exists()
    merge([tmp_path / "shards"], tmp_path / "out")
    assert (tmp_path / "out/report.html").exists()


def test_an_interrupted_merge_can_be_resumed_and_says_so(
    run: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("robustft.distributed.merge", interrupted)
    done = run("merge", tmp_path)
    assert done.status == 130
    assert done.err == "robustft: interrupted; run the same command again to resume\n"


def test_what_does_not_fit_together_is_refused(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UnfinishedError):
        shard(source, out, 0, 2)
    with pytest.raises(UserError, match=r"--beta was 0\.5, now 0\.6"):
        shard(source, out, 1, 2, beta=0.6)
    with pytest.raises(UserError, match="shards was 2, now 3"):
        shard(source, out, 1, 3)
    with pytest.raises(UserError, match="holds the shards of a run"):
        whole(source, out)
    other = write(tmp_path / "other.jsonl", quiz(600))
    with pytest.raises(UserError, match="the input is not the one that it began with"):
        shard(other, out, 1, 2)
    with pytest.raises(UserError, match="holds no shards"):
        merge([tmp_path])
    with pytest.raises(UserError, match=r"nodir: is no folder; expected the --out of"):
        merge([tmp_path / "nodir"])
    whole(source, tmp_path / "one")
    with pytest.raises(UserError, match="one: needs no merge: it was not cleaned in shards"):
        merge([tmp_path / "one"])
    with pytest.raises(UserError, match="holds a run of one process"):
        shard(source, tmp_path / "one", 0, 2)
    assert [shard(source, out, number, 2) for number in (1, 0)] == [[0], []]
    with pytest.raises(UserError, match="is not the input"):
        merge([out], data=str(other))


def test_a_shard_run_again_while_another_splits_the_corpus(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may not take back what the split, which is about to be published, rests on."""
    out, left = tmp_path / "out", []
    with pytest.raises(UnfinishedError):
        shard(source, out, 1, 2, FlakyEngine(every=40))
    again = threading.Thread(target=lambda: left.append(shard(source, out, 1, 2, wait=60)))
    publish = decisions.publish

    def late(folder: Path, *rest: Any) -> None:
        if folder.name == "conclusion":
            again.start()
            again.join(1.0)  # long enough to have withdrawn something
        publish(folder, *rest)

    monkeypatch.setattr(decisions, "publish", late)
    shard(source, out, 0, 2)
    again.join()
    assert left in ([[]], [[0]])
    result = merge([out])
    assert result.counts["input"] == ROWS + 2
    assert result.unanswered > 0
    assert "(verdicts.jsonl says why)" in result.warnings[-1]
    assert "same command" not in result.warnings[-1]  # it would ask nothing again


def test_no_split_without_every_shard(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard may begin to ask again right after another has seen it finished."""
    out = tmp_path / "out"
    with pytest.raises(UnfinishedError):
        shard(source, out, 1, 2)
    for phase in out.glob("shards/rows-*/phases/detected"):
        shutil.rmtree(phase)
    monkeypatch.setattr("robustft.distributed.wait_for", lambda *_: None)
    with pytest.raises(UnfinishedError, match="shard 1/2 asks again what failed before"):
        shard(source, out, 0, 2)
    assert not (out / "phases/conclusion").exists()


def test_what_killed_processes_left_of_the_plan_goes(tmp_path: Path, source: Path) -> None:
    shards = tmp_path / "out" / "shards"
    (shards / ".plan.ab12.tmp").mkdir(parents=True)
    (shards / ".plan.ab12.tmp" / "facts.json").touch()
    shard(source, tmp_path / "out", 0, 1)
    assert list(shards.glob(".plan.*")) == []


def test_a_damaged_plan_is_told(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UnfinishedError):
        shard(source, tmp_path / "out", 0, 2)
    facts = tmp_path / "out/shards/plan/facts.json"
    facts.write_text("{}")
    with pytest.raises(UserError, match="not the plan of a run"):
        merge([tmp_path / "out"])


ONE = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import robustft.cleaning
from scripted import LetterEmbedder, ScriptedEngine, slowly
robustft.cleaning.load_engine = lambda _: ScriptedEngine(before_batch=slowly(0.01))
robustft.cleaning.Embedder = lambda _: LetterEmbedder()
from robustft.cli import main
sys.exit(main())
"""


def test_shards_killed_at_random_moments_lose_and_repeat_nothing(
    tmp_path: Path, source: Path
) -> None:
    from runs import assert_asked_once

    whole(source, tmp_path / "whole")
    out = tmp_path / "out"

    def start(number: int) -> subprocess.Popen[bytes]:
        arguments = ["clean", str(source), "--out", str(out), "--detector", "paper"]
        arguments += ["--shard", f"{number}/2", "--wait", "300"]
        return subprocess.Popen([sys.executable, "-c", ONE, *arguments], stderr=subprocess.DEVNULL)

    moments = random.Random(3)
    running = [start(0), start(1)]
    for _ in range(4):
        time.sleep(moments.uniform(1, 6))
        number = moments.randrange(2)
        os.kill(running[number].pid, signal.SIGKILL)
        running[number].wait()
        running[number] = start(number)
    assert [process.wait(300) for process in running] == [0, 0]
    merge([out])
    same(tmp_path / "whole", out)
    for store in out.glob("shards/rows-*/run.sqlite"):
        assert_asked_once(store)


def test_processes_of_one_machine(tmp_path: Path, tiny_model: Path, tiny_encoder: Path) -> None:
    source = write(tmp_path / "in.jsonl", quiz(600))
    without = ("rel", "checker", "reviewer")
    settings = {"without": frozenset(without), "embedder": str(tiny_encoder), "threads": 1}
    settings["engine"] = EngineConfig(model=str(tiny_model))
    run_clean(config(source, tmp_path / "one", **settings))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "robustft", "clean", source, "--out", tmp_path / "two"),
            *("--model", tiny_model, "--embedder", tiny_encoder, "--detector", "paper"),
            *(word for part in without for word in ("--without", part)),
            *("--threads", "1", "--processes", "2"),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "600 records" in done.stdout
    assert done.stderr.count("600 records, read as choice") == 1  # not once for every process
    same(tmp_path / "one", tmp_path / "two")


def child(code: str) -> _Child:
    return _Child("0/2", [sys.executable, "-c", f"import os, sys; {code}"], dict(os.environ))


def test_a_process_that_fails_ends_the_others_with_its_own_words() -> None:
    slow = child("import time; time.sleep(60)")
    failing = child("print('robustft: beta was 1', file=sys.stderr); sys.exit(2)")
    with pytest.raises(UserError, match=r"^shard 0/2: beta was 1$"):
        run_children([slow, failing])
    named = child("print('robustft: shard 0/2: is late', file=sys.stderr); sys.exit(4)")
    with pytest.raises(UnfinishedError, match=r"^shard 0/2: is late$"):
        run_children([named])
    assert slow.process.returncode is not None


def test_a_shard_that_fails_without_a_word_is_told() -> None:
    with pytest.raises(UserError, match="status 2 and said nothing") as caught:
        run_children([child("sys.exit(2)")])
    assert not caught.value.told


def test_a_mistake_is_told_once_however_many_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write(tmp_path / "bad.jsonl", [{"x": 1}])
    done = call(capsys, "clean", bad, "--out", tmp_path / "o", "--processes", "2")
    assert done.status == 2
    assert "no known schema has these fields: x" in done.complaint


def test_a_process_may_say_a_line_again_but_not_after_another(
    capsys: pytest.CaptureFixture[str],
) -> None:
    twice = child("print('same\\nsame', file=sys.stderr)")
    told: dict[str, str] = {}
    for name in ("0/2", "1/2"):
        run_children([_Child(name, twice.command, twice.environment, told)])
    assert capsys.readouterr().err == "same\nsame\n"


def test_processes_wait_for_each_other_as_long_as_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[_Child] = []
    monkeypatch.setattr("robustft.distributed.processes.run_children", made.extend)
    run_processes(["clean", "--out", "o", "--", "-in.jsonl"], (0, 1), 2, pinned=False)
    options = parse(made[1].command[3:])
    assert (options.shard, options.wait, options.input) == ((1, 2), math.inf, "-in.jsonl")
    made.clear()
    # Other machines' shards may never come.
    run_processes(["clean", "in", "--out", "o"], (1, 3), 2, pinned=False)
    options = parse(made[0].command[3:])
    assert (options.shard, options.wait) == ((2, 6), 600.0)


def test_a_process_that_is_killed_is_started_again(tmp_path: Path) -> None:
    count = tmp_path / "count"
    die = f"open({str(count)!r}, 'a').write('x'); os.kill(os.getpid(), 9)"
    once = child(f"os.path.exists({str(count)!r}) and sys.exit(); {die}")
    run_children([once])
    assert count.read_text() == "x"
    with pytest.raises(UserError, match="killed 4 times"):
        run_children([child(die)])


def test_the_commands(run: CommandLine, tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    arguments = ("clean", source, "--out", out, "--detector", "paper", "--wait", "0")
    first = run(*arguments, "--shard", "0/2")
    assert first.status == 4
    told = first.err.splitlines()
    assert told[-1].endswith("then the same command again")
    assert told[0].startswith("robustft: 1,402 records, 2 of them unreadable, read as choice (")
    assert told[1].startswith("robustft: experts: ")
    assert told[-2] == "robustft: shard 0/2: records 0 to 512 of 1,400"
    assert "resuming" not in first.err
    assert "still at work: shard 0" in run(*arguments, "--shard", "1/2").out
    done = run(*arguments, "--shard", "0/2")
    assert done.status == 0
    assert "robustft: resuming; what was asked before is not asked again\n" in done.err
    assert f"next:\n  robustft merge {out}" in done.out
    assert f"{ROWS + 2:,} records" in run("merge", out).out
    assert "--truth belongs to robustft merge" in run.refused(
        *arguments, "--shard", "0/2", "--truth", source
    )
    told = run("merge", out, "--truth", source).out  # as if every given answer were right
    assert f"0 of {ROWS:,} given answers are wrong" in told
    assert told.index("truth  ") < told.index("next:")
    for wrong in ("2/2", "x", "1", "a/2", "0/0"):
        assert "expected I/N" in run.refused(*arguments, "--shard", wrong)


def test_merge_reads_a_truth_in_the_schema_of_the_shards(run: CommandLine, tmp_path: Path) -> None:
    names = {"question": "Q", "options": "O", "answer": "L"}
    renamed = [{names.get(key, key): value for key, value in row.items()} for row in quiz(20)]
    source, out = write(tmp_path / "in.jsonl", renamed), tmp_path / "out"
    options = ("--detector", "paper", "--schema", "choice:Q,O,L", "--shard", "0/1")
    assert run("clean", source, "--out", out, *options).status == 0
    assert "0 of 20 given answers are wrong" in run("merge", out, "--truth", source).out
