"""`robustft.clean`, the call from Python."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from scripted import LetterEmbedder, ScriptedEngine

import robustft as rft
from robustft.cli.clean import _clean_config
from robustft.cli.settings import parse
from robustft.config import TunedConfig
from robustft.errors import UserError
from robustft.methods import clean_by
from robustft.store import folder_lock

ROWS = [{"question": f"Q{i}?", "options": ["x", "y"], "answer": "A"} for i in range(6)]


def clean(out: Path, **settings: Any) -> rft.CleanResult:
    models = {"engine": ScriptedEngine(), "embedder": LetterEmbedder()}
    return rft.clean(ROWS, out=out, **models | settings)


def test_settings_of_the_experts_are_settings(tmp_path: Path) -> None:
    clean(tmp_path, rounds=3, reasoning_tokens=50)
    config = json.loads((tmp_path / "manifest.json").read_text())["config"]
    assert (config["experts.rounds"], config["experts.reasoning_tokens"]) == (3, 50)


def test_settings_of_the_engine_are_settings_where_none_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[rft.CleanConfig] = []
    monkeypatch.setattr("robustft.cleaning.run_clean", lambda config, **_: asked.append(config))
    rft.clean(
        ROWS, out=tmp_path, model="m", device="cpu", samples=3, temperature=0.7, folds=2,
        fold_epochs=5,
    )  # fmt: skip
    (config,) = asked
    assert config.engine == rft.EngineConfig(model="m", device="cpu", temperature=0.7)
    assert config.tuned == TunedConfig(folds=2, fold_epochs=5)
    assert config.experts.samples == 3
    with pytest.raises(UserError, match="give device, temperature or engine, not both"):
        clean(tmp_path, temperature=0.7, device="cpu")


@pytest.mark.parametrize(
    ("given", "room"),
    [
        ({}, (64, 128)),
        ({"model": "m"}, (256, 512)),
        ({"engine": rft.EngineConfig(engine="openai", base_url="http://x/v1")}, (256, 512)),
        ({"engine": ScriptedEngine()}, (256, 512)),
        ({"reasoning_tokens": 9}, (9, 128)),
        ({"experts": rft.ExpertConfig(answer_tokens=7), "reasoning_tokens": 9}, (9, 7)),
    ],
)
def test_the_embedded_model_gets_less_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], room: tuple[int, int]
) -> None:
    asked: list[rft.CleanConfig] = []
    monkeypatch.setattr("robustft.cleaning.run_clean", lambda config, **_: asked.append(config))
    rft.clean(ROWS, out=tmp_path, **given)
    assert (asked[0].experts.reasoning_tokens, asked[0].experts.answer_tokens) == room


@pytest.mark.parametrize(
    ("options", "room"),
    [([], (64, 128)), (["--model", "m"], (256, 512)), (["--answer-tokens", "9"], (64, 9))],
)
def test_so_does_it_from_the_command_line(
    tmp_path: Path, options: list[str], room: tuple[int, int]
) -> None:
    config = _clean_config(parse(["clean", "in.jsonl", "--out", str(tmp_path), *options]))
    assert (config.experts.reasoning_tokens, config.experts.answer_tokens) == room


def test_an_engine_is_one_or_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match="engine must be an EngineConfig or an Engine, got 'openai'"
    ):
        clean(tmp_path, engine="openai")
    with pytest.raises(UserError, match="model or engine, not both"):
        clean(tmp_path, engine=rft.EngineConfig(model="a"), model="b")
    with pytest.raises(UserError, match="no/such/folder"):
        clean(tmp_path, engine=rft.EngineConfig(model=str(tmp_path / "no/such/folder")))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"second_opinion": None}, "second_opinion must be a path or several, got None"),
        ({"second_opinion": 5}, "second_opinion must be a path or several, got 5"),
        ({"second_opinion": [None]}, r"second_opinion must be a path or several, got \[None\]"),
        ({"second_opinion": b"run"}, "second_opinion must be a path or several, got b'run'"),
        (
            {"second_opinion": {"run": 1}},
            "second_opinion must be a path or several, got {'run': 1}",
        ),
        ({"second_opinion": "text"}, "--second-opinion text: expected the --out of a finished"),
        ({"without": None}, "without must be a name or several, got None"),
        ({"without": 5}, "without must be a name or several, got 5"),
        ({"threads": "2"}, "threads must be a whole number, got '2'"),
        ({"folds": "2"}, "folds must be a whole number, got '2'"),
        ({"rounds": 2.0}, "rounds must be a whole number, got 2.0"),
        ({"calibrate": "no"}, "calibrate must be True or False, got 'no'"),
        ({"dataset_info": "no"}, "dataset_info must be True or False, got 'no'"),
        ({"split": None}, "split must be text, got None"),
        ({"out": 5}, "out must be a path, got 5"),
        ({"embedder": 5}, "embedder must be a model's name or a TextEmbedder, got 5"),
        ({"experts": {"rounds": 1}}, "experts must be an ExpertConfig, got {'rounds': 1}"),
        ({"experts": {}}, "experts must be an ExpertConfig, got {}"),
        ({"engine": None, "model": 5}, "model must be text, got 5"),
        ({"engine": None, "device": 7}, "device must be text, got 7"),
        ({"engine": None, "temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"engine": None, "temperature": True}, "temperature must be a number, got True"),
    ],
)
def test_a_setting_of_another_type_is_refused_by_name(
    settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=expected):
        clean(**{"out": tmp_path, **settings})


def test_models_may_be_named_by_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[rft.CleanConfig] = []
    monkeypatch.setattr("robustft.cleaning.run_clean", lambda config, **_: asked.append(config))
    rft.clean(ROWS, out=tmp_path, model=tmp_path / "model", embedder=tmp_path / "embedder")
    assert asked[0].engine.model == str(tmp_path / "model")
    assert asked[0].embedder == str(tmp_path / "embedder")


def test_an_unknown_setting_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no setting 'betta'; did you mean 'beta'\?"):
        clean(tmp_path, betta=0.5)
    with pytest.raises(UserError, match=r"no setting 'round'; did you mean 'rounds'\?"):
        clean(tmp_path, round=1)


def test_the_public_names_are_all_there_is() -> None:
    assert dir(rft) == sorted(rft.__all__)
    assert all(getattr(rft, name) is not None for name in rft.__all__)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("cleaned.jsonl", {}),
        ("manifest.json", {}),
        ("messages.jsonl", {"dataset_info": True}),
        ("dataset_info.json", {"dataset_info": True}),
    ],
)
def test_files_of_somebody_else_stay(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    (tmp_path / name).write_text("mine")
    (tmp_path / "in.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(UserError, match=f"{name}: is there already"):
        clean(tmp_path, **settings)
    assert (tmp_path / name).read_text() == "mine"
    for method in ("self-label", "self-select"):  # the refused run has left no sign of its own
        with pytest.raises(UserError, match=f"{name}: is there already"):
            clean_by(method, rft.CleanConfig(str(tmp_path / "in.jsonl"), tmp_path, **settings))


def test_the_input_is_never_an_output(tmp_path: Path) -> None:
    given = tmp_path / "messages.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    before = given.read_bytes()
    with pytest.raises(UserError, match=r"messages.jsonl: would be overwritten"):
        rft.clean(given, out=tmp_path, dataset_info=True)
    assert given.read_bytes() == before


def test_rows_of_one_call_do_not_replace_those_of_another(tmp_path: Path) -> None:
    (tmp_path / "input.jsonl").write_text("mine")
    clean(tmp_path)
    inputs = sorted(tmp_path.glob("input*.jsonl"))
    with folder_lock(tmp_path), pytest.raises(UserError, match="another run is working"):
        rft.clean(ROWS[:3], out=tmp_path, engine=ScriptedEngine(), embedder=LetterEmbedder())
    assert (tmp_path / "input.jsonl").read_text() == "mine"
    assert set(inputs) < set(tmp_path.glob("input*.jsonl"))
    assert [path.read_bytes().count(b"\n") for path in inputs if path.stat().st_size > 4] == [6]


def test_rows_of_a_killed_call_go(tmp_path: Path) -> None:
    class Deadly:
        def keys(self) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

    process = os.fork()
    if not process:
        rft.clean([ROWS[0], Deadly()], out=tmp_path, engine=ScriptedEngine())
    os.waitpid(process, 0)
    assert len(list(tmp_path.glob(".input.*"))) == 1
    clean(tmp_path)
    assert list(tmp_path.glob(".input.*")) == []


@pytest.mark.parametrize("bad", ["question", ROWS[0] | {"x": {1j}}, ROWS[0] | {"x": "\ud800"}])
def test_a_row_that_is_none_is_named(tmp_path: Path, bad: Any) -> None:
    models = {"engine": ScriptedEngine(), "embedder": LetterEmbedder()}
    with pytest.raises(UserError, match="data: row 1 must be a mapping of values that JSON has"):
        rft.clean([ROWS[0], bad], out=tmp_path, **models)
    assert list(tmp_path.iterdir()) == []


def test_exchange_files_name_the_records_as_verdicts_do_and_never_go_stale(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    rows = [{**row, "answer": "AB"[number % 2]} for number, row in enumerate(ROWS * 5)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"engine": ScriptedEngine(), "embedder": LetterEmbedder(), "detector": "paper"}

    def ids(name: str) -> list[str]:
        lines = (tmp_path / "out" / name).read_text().splitlines()
        return [json.loads(x)["id"] for x in lines if json.loads(x).get("answer", "") is not None]

    few = rft.clean(source, out=tmp_path / "out", beta=0.3, dataset_info=True, **settings)
    assert few.counts["drop"] > 0
    assert ids("messages.jsonl") == ids("verdicts.jsonl")
    more = rft.clean(source, out=tmp_path / "out", beta=1.0, **settings)
    assert more.counts["drop"] < few.counts["drop"]
    assert ids("messages.jsonl") == ids("verdicts.jsonl")


@pytest.mark.parametrize(
    ("data", "found"),
    [({"train": ROWS}, r"keys \['train'\]; give one"), (5, "found 5"), (None, "None")],
)
def test_data_that_is_no_rows_is_told(tmp_path: Path, data: Any, found: str) -> None:
    """A `datasets.DatasetDict` is a mapping of splits."""
    with pytest.raises(UserError, match=f"data: expected a path or rows, .*{found}"):
        rft.clean(data, out=tmp_path, engine=ScriptedEngine(), embedder=LetterEmbedder())


@pytest.mark.parametrize("rows", [[{"question": "a"}], [{"question": object()}], 7])
def test_rows_that_cannot_be_cleaned_leave_nothing_behind(tmp_path: Path, rows: Any) -> None:
    models: dict[str, Any] = {"engine": ScriptedEngine(), "embedder": LetterEmbedder()}
    with pytest.raises(UserError):
        rft.clean(rows, out=tmp_path / "out", **models)
    assert not (tmp_path / "out").exists()
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "input-mine.jsonl").touch()
    with pytest.raises(UserError):
        rft.clean(rows, out=kept, **models)
    assert [path.name for path in kept.iterdir()] == ["input-mine.jsonl"]


@pytest.mark.parametrize("given", [{"model": "nowhere.gguf"}, {"embedder": "/nowhere"}])
def test_a_model_that_cannot_be_one_leaves_nothing_behind(
    tmp_path: Path, given: dict[str, str]
) -> None:
    with pytest.raises(UserError, match="found nothing there"):
        rft.clean(ROWS, out=tmp_path / "out", **given)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_rows_of_a_run_that_broke_off_stay(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        clean(tmp_path / "out", engine=ScriptedEngine(before_batch=stop))
    assert len(list((tmp_path / "out").glob("input-*.jsonl"))) == 1
    clean(tmp_path / "out")
