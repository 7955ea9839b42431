"""Every row of the paper's tables, on a corpus small enough to follow by hand."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scripted import REASON, FlakyEngine, LetterEmbedder, ScriptedEngine

from robustft.cli import main
from robustft.config import CleanConfig
from robustft.engines import Failure, Prompt
from robustft.errors import UserError
from robustft.methods import METHODS, Setting, clean_by, find_method
from robustft.methods.noiseal import _NoiseAL
from robustft.methods.scorers import Scorer, ngram_features, sharpened
from robustft.prompts import neutral_select_prompt
from robustft.records import Record, open_records

COLOURS = ("apple", "banana", "cherry")


def corpus(path: Path, size: int = 90, wrong: float = 0.25) -> tuple[str, list[str]]:
    """Questions that spell their answer; a random share `wrong` of the answers is another one."""
    truth, rows = [], []
    changed = set(random.Random(0).sample(range(size), round(size * wrong)))
    for n in range(size):
        right = n % 3
        truth.append("ABC"[right])
        given = (right + 1) % 3 if n in changed else right
        question = f"{COLOURS[right]} {COLOURS[right]} number {n}"
        rows.append({"question": question, "options": json.dumps(COLOURS), "answer": "ABC"[given]})
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, ["question", "options", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    return str(path), truth


def knowing(prompt: Prompt, candidates: Sequence[str]) -> list[float]:
    """A model that reads the fruit in the last question, and trusts answers that name it."""
    asked = prompt.messages[-1].content
    fruit = asked.split()[0]
    right = COLOURS.index(fruit) if fruit in COLOURS else -1
    if list(candidates) in ([" Y", " N"], [" Yes", " No"]):
        trusted = right >= 0 and f"Proposed answer: {'ABC'[right]}." in asked
        return [0.6, 0.4] if trusted else [0.4, 0.6] if right >= 0 else [0.5, 0.5]
    return [0.8 if place == right else 0.1 for place in range(len(candidates))]


def setting(path: str, out: Path, **changes: object) -> Setting:
    engine = ScriptedEngine(choose=knowing)
    return Setting(CleanConfig(input=path, out=out, **changes), engine, LetterEmbedder())


def answers(out: Path) -> list[Record]:
    return [item for item in open_records(str(out / "cleaned.csv")) if isinstance(item, Record)]


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str], tuple[list[Record], list[str]]]:
    def make(name: str) -> tuple[list[Record], list[str]]:
        path, truth = corpus(tmp_path / "noisy.csv")
        prepare = METHODS[name].prepare
        assert prepare is not None
        result = prepare(setting(path, tmp_path / name))
        assert result.cleaned == tmp_path / name / "cleaned.csv"
        counts = result.counts
        assert counts["keep"] + counts["relabel"] + counts["drop"] == 90
        verdicts = (tmp_path / name / "verdicts.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in verdicts] == [str(n) for n in range(90)]
        return answers(tmp_path / name), truth

    return make


def right(records: Sequence[Record]) -> float:
    named = [record.question.split()[0] for record in records]
    return float(np.mean([COLOURS.index(n) == "ABC".index(r.answer)
                          for n, r in zip(named, records, strict=True)]))  # fmt: skip


def test_self_label_gives_the_models_own_answers(made: Callable[..., object]) -> None:
    records, truth = made("self-label")
    assert [record.answer for record in records] == truth


def test_self_label_takes_nothing_from_a_given_answer_that_is_half_right(tmp_path: Path) -> None:
    given = "The capital city of France is Lyon, in the south."
    own = "The capital city of France is Paris, in the north."
    path = tmp_path / "noisy.jsonl"
    path.write_text(json.dumps({"question": "Where is it?", "answer": given}) + "\n")
    engine = ScriptedEngine(reply=lambda prompt: own)
    prepare = METHODS["self-label"].prepare
    assert prepare is not None
    config = CleanConfig(input=str(path), out=tmp_path / "out")
    result = prepare(Setting(config, engine, LetterEmbedder()))
    assert json.loads(result.cleaned.read_text())["answer"] == own


def test_self_select_keeps_what_the_model_trusts(made: Callable[..., object]) -> None:
    records, _ = made("self-select")
    assert len(records) == 90 - round(90 * 0.25)
    assert right(records) == 1.0


def test_self_select_asks_a_server_what_it_says_to_an_empty_question_once(tmp_path: Path) -> None:
    empty = neutral_select_prompt()

    def choose(prompt: Prompt, candidates: Sequence[str]) -> list[float]:
        time.sleep(0.2 * (prompt == empty))
        return knowing(prompt, candidates)

    engine = ScriptedEngine(choose=choose)
    engine.at_a_time = 3
    path, _ = corpus(tmp_path / "noisy.csv", 3 * 512)
    prepare = METHODS["self-select"].prepare
    assert prepare is not None
    prepare(Setting(CleanConfig(input=path, out=tmp_path / "out"), engine, LetterEmbedder()))
    assert engine.asked.count(empty) == 1


def test_noiseal_finds_wrong_answers_and_has_them_labelled(made: Callable[..., object]) -> None:
    records, _ = made("noiseal")
    assert len(records) > 70
    assert right(records) > 0.95


def test_the_papers_robustft_finds_wrong_answers(made: Callable[..., object]) -> None:
    records, _ = made("robustft-paper")
    assert right(records) > 0.9


def test_robustft_by_the_default_detector_harms_nothing(made: Callable[..., object]) -> None:
    records, _ = made("robustft")
    assert right(records) >= 0.75  # what the given answers have


@pytest.mark.parametrize("name", ["self-label", "self-select", "noiseal"])
def test_a_record_without_a_reply_stays_as_given(tmp_path: Path, name: str) -> None:
    path, _ = corpus(tmp_path / "noisy.csv")
    prepare = METHODS[name].prepare
    assert prepare is not None
    flaky = FlakyEngine(7, choose=knowing)
    config = CleanConfig(input=path, out=tmp_path / "out")
    result = prepare(Setting(config, flaky, LetterEmbedder()))
    lines = [json.loads(line) for line in (tmp_path / "out/verdicts.jsonl").open()]
    assert [line["line"] for line in lines] == list(range(2, len(lines) + 2))  # below the header
    failed = [line for line in lines if REASON in line["reason"]]
    assert len(failed) == result.unanswered > 0
    for line in failed:
        assert (line["action"], line["answer"]) == ("keep", line["given"])
    assert "records got no reply from the engine and stay as given" in result.warnings[0]
    manifest = json.loads((tmp_path / "out/manifest.json").read_bytes())
    assert manifest["unanswered"] == len(failed)
    again = prepare(Setting(config, ScriptedEngine(choose=knowing), LetterEmbedder()))
    prepare(setting(path, tmp_path / "whole"))
    assert (again.unanswered, again.warnings) == (0, [])
    for output in ("cleaned.csv", "verdicts.jsonl"):
        assert (tmp_path / "out" / output).read_bytes() == (
            tmp_path / "whole" / output
        ).read_bytes()


def test_rejects_of_several_files_name_theirs(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "ab":
        path = tmp_path / f"in/{name}.jsonl"
        path.write_text('{"question": "q", "answer": "a"}\n{broken\n')
    prepare = METHODS["self-label"].prepare
    assert prepare is not None
    prepare(setting(str(tmp_path / "in"), tmp_path / "out"))
    rejects = [json.loads(x) for x in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [(one["file"], one["line"]) for one in rejects] == [("a.jsonl", 2), ("b.jsonl", 2)]
    assert [(one["bytes"], one["data"]) for one in rejects] == [(7, "{broken")] * 2


def test_a_label_that_the_column_does_not_hold_drops_its_record(tmp_path: Path) -> None:
    table = pa.table({"question": [f"q{n}" for n in range(6)], "answer": range(6)})
    pq.write_table(table, tmp_path / "in.parquet")
    engine = ScriptedEngine(reply=lambda prompt: "Answer: 12.5")
    prepare = METHODS["self-label"].prepare
    assert prepare is not None
    config = CleanConfig(input=str(tmp_path / "in.parquet"), out=tmp_path / "out")
    result = prepare(Setting(config, engine, LetterEmbedder()))
    assert (result.counts["drop"], result.counts["input"]) == (6, 6)
    verdict = json.loads((tmp_path / "out/verdicts.jsonl").read_text().splitlines()[0])
    assert verdict["reason"] == (
        "the model's own answer; the new answer '12.5' does not fit the column's type (int64)"
    )


@pytest.mark.parametrize("name", ["self-label", "noiseal"])
def test_an_input_that_changes_while_it_is_worked_on(tmp_path: Path, name: str) -> None:
    path, _ = corpus(tmp_path / "noisy.csv")
    prepare = METHODS[name].prepare
    assert prepare is not None

    def edit() -> None:
        corpus(tmp_path / "noisy.csv", wrong=0.1)

    engine = ScriptedEngine(choose=knowing, before_batch=edit)
    config = CleanConfig(input=path, out=tmp_path / "out")
    with pytest.raises(UserError, match=r"noisy\.csv: has changed since the run began"):
        prepare(Setting(config, engine, LetterEmbedder()))
    assert not (tmp_path / "out/cleaned.csv").exists()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("self-label", "robustft: self-label: 100%"),
        ("self-select", "robustft: self-select: 100%"),
        ("noiseal", "robustft: noiseal · labels, 1 of 4: 100%"),
    ],
)
def test_what_takes_long_says_how_far_it_is(
    name: str, told: str, made: Callable[..., object], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("robustft.progress._SECONDS_BETWEEN_LINES", 0)
    made(name)
    assert told in capsys.readouterr().err


def test_noiseal_on_open_answers(tmp_path: Path) -> None:
    words = ("ant", "bee", "cow", "dog", "elk")
    rows = [{"question": f"{words[n % 5]} {words[n % 5]}?", "answer": str(2 * (n % 5))}
            for n in range(60)]  # fmt: skip
    rows[7]["answer"] = "99"
    path = tmp_path / "open.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine = ScriptedEngine(reply=lambda prompt: " 4")
    config = CleanConfig(input=str(path), out=tmp_path / "out")
    prepare = METHODS["noiseal"].prepare
    assert prepare is not None
    result = prepare(Setting(config, engine, LetterEmbedder()))
    assert sum(result.counts[name] for name in ("keep", "relabel", "drop")) == 60
    assert result.counts["keep"] > 20


def test_noiseal_learns_what_the_model_says_not_what_it_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("ant", "bee", "cow", "dog", "elk")
    rows = [{"question": f"{words[n % 5]} {words[n % 5]}?", "answer": words[n // 7 % 5]}
            for n in range(60)]  # fmt: skip
    rows.append({"question": "how many?", "answer": "7"})  # no other candidate is of its kind
    path = tmp_path / "open.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = [item for item in open_records(str(path)) if isinstance(item, Record)]
    engine = ScriptedEngine(reply=lambda prompt: " a zebra")
    method = _NoiseAL(
        Setting(CleanConfig(input=str(path), out=tmp_path / "out"), engine, LetterEmbedder()),
        records,
    )
    epoch, seen = Scorer.epoch, 0

    def checked(scorer: Scorer, *lessons: Any) -> None:
        nonlocal seen
        texts = [
            f"{record.question}\n{candidate}"
            for record, answers in zip(records, method._answers, strict=True)
            for candidate in [*answers, *[""] * (method._width - len(answers))]
        ]
        strong, weak = method._scorers
        np.testing.assert_array_equal(strong.features, LetterEmbedder().encode(texts))
        assert (weak.features != ngram_features(texts)).nnz == 0
        seen += sum("zebra" in text for text in texts)
        epoch(scorer, *lessons)

    monkeypatch.setattr(Scorer, "epoch", checked)
    method.run()
    assert seen
    assert (method._learn(60, "12"), method._answers[60]) == (1, ["7", "12"])
    assert [answers[0] for answers in method._answers] == [row["answer"] for row in rows]


def test_an_empty_reliable_set_still_ends(tmp_path: Path) -> None:
    path, _ = corpus(tmp_path / "noisy.csv", size=3, wrong=1.0)
    prepare = METHODS["noiseal"].prepare
    assert prepare is not None
    result = prepare(setting(path, tmp_path / "out"))
    assert sum(result.counts[name] for name in ("keep", "relabel", "drop")) == 3


def test_rows_that_train_nothing() -> None:
    assert [m.name for m in METHODS.values() if not m.trains] == [
        "vanilla", "hermes-3", "tulu-3", "self-rag",
    ]  # fmt: skip
    assert METHODS["self-rag"].demonstrations == 3
    with pytest.raises(UserError, match="method must be one of vanilla"):
        find_method("magic")


def test_scorer_losses_pull_the_way_they_should() -> None:
    features = np.eye(4, dtype=np.float32)
    scorer = Scorer(features, 2, True, seed=0)
    rows, nothing = np.arange(4), np.zeros(0, np.int64)
    labels = np.array([0, 1, 0, 1])
    for _ in range(60):  # reliable: 0, 1; purified: 2; hard: 3
        scorer.epoch((rows[:2], labels[:2]), (rows[2:3], labels[2:3]),
                     (rows[3:], np.array([[0.1, 0.9]])))  # fmt: skip
    assert scorer.probabilities(4).argmax(1).tolist() == [0, 1, 0, 1]
    assert sharpened(np.array([[0.4, 0.6]]))[0, 1] == pytest.approx(0.36 / 0.52)
    pairs = Scorer(np.eye(8, dtype=np.float32), 2, False, seed=0)
    for _ in range(40):
        pairs.epoch((rows, labels), (nothing, nothing), (nothing, np.zeros((0, 2))))
    assert pairs.probabilities(4).argmax(1).tolist() == labels.tolist()


def test_clean_with_a_baseline(
    tmp_path: Path, tiny_model: Path, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = corpus(tmp_path / "noisy.csv", size=9)
    command = [
        "clean", path, "--out", str(tmp_path / "out"), "--method", "self-label", "--model",
        str(tiny_model), "--embedder", str(tiny_encoder), "--device", "cpu",
    ]  # fmt: skip
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.startswith("9 records:")
    assert "(self-label)" in said
    assert len(answers(tmp_path / "out")) == 9
    assert main(["clean", path, "--out", str(tmp_path / "b"), "--method", "sft"]) == 2
    assert "--method" in capsys.readouterr().err
    with pytest.raises(UserError, match="'sft' makes no training set"):
        clean_by("sft", CleanConfig(input=path, out=tmp_path / "c"))


def test_a_baseline_killed_before_its_manifest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    path, _ = corpus(tmp_path / "noisy.csv", size=9)
    prepare = METHODS["self-label"].prepare
    assert prepare is not None
    with monkeypatch.context() as patched:
        patched.setattr("robustft.methods.decisions.write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(setting(path, tmp_path / "out"))
    assert (tmp_path / "out/cleaned.csv").exists()
    prepare(setting(path, tmp_path / "out"))
    assert json.loads((tmp_path / "out/manifest.json").read_text())["counts"]["input"] == 9


@pytest.mark.parametrize("name", ["self-label", "self-select", "noiseal"])
def test_a_killed_baseline_goes_on_and_asks_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path, _ = corpus(tmp_path / "noisy.csv")
    batches = itertools.count()

    def killing() -> None:
        if next(batches) == 3:
            raise KeyboardInterrupt

    def asked_by(out: str, **engine: Any) -> list[Prompt]:
        ready = ScriptedEngine(choose=knowing, **engine)
        monkeypatch.setattr("robustft.methods.load_engine", lambda _: ready)
        monkeypatch.setattr("robustft.methods.Embedder", lambda _: LetterEmbedder())
        with contextlib.suppress(KeyboardInterrupt):
            clean_by(name, CleanConfig(input=path, out=tmp_path / out))
        return ready.asked

    whole = asked_by("whole")
    first, second, third = asked_by("out", before_batch=killing), asked_by("out"), asked_by("out")
    assert len(first) + len(second) == len(whole)
    assert first
    assert not third
    assert list((tmp_path / "out").glob("answers.*")) == [tmp_path / "out" / "answers.sqlite"]
    for file in ("cleaned.csv", "verdicts.jsonl", "rejects.jsonl"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_an_engine_is_asked_in_batches_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wide(ScriptedEngine):
        def plan(self, prompts: Sequence[Prompt], max_new_tokens: int = 0) -> list[list[int]]:
            return [list(range(len(prompts)))]

    path, _ = corpus(tmp_path / "noisy.csv", size=200)
    batches: list[None] = []
    ready = Wide(choose=knowing, before_batch=lambda: batches.append(None))
    monkeypatch.setattr("robustft.methods.load_engine", lambda _: ready)
    clean_by("self-label", CleanConfig(input=path, out=tmp_path / "out"))
    assert len(ready.asked) == 200
    assert len(batches) == 1


def test_a_baseline_for_other_trainers(tmp_path: Path) -> None:
    path, _ = corpus(tmp_path / "noisy.csv", size=9)
    prepare = METHODS["self-label"].prepare
    assert prepare is not None
    for _ in range(2):
        prepare(setting(path, tmp_path / "out", dataset_info=True))
    kept = answers(tmp_path / "out")
    lines = [json.loads(x) for x in (tmp_path / "out/messages.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [record.id for record in kept]
    assert "messages" in json.loads((tmp_path / "out/dataset_info.json").read_text())


@pytest.mark.parametrize("name", ["self-label", "self-select"])
def test_a_record_without_a_reply_stays_as_given_and_is_told(tmp_path: Path, name: str) -> None:
    class Failing(ScriptedEngine):
        def choose(self, prompts: Sequence[Prompt], *rest: Any) -> list[Any]:
            said = super().choose(prompts, *rest)
            number = [prompt.messages[-1].content for prompt in prompts]
            return [
                Failure("HTTP 500") if "number 7" in asked else one
                for asked, one in zip(number, said, strict=True)
            ]

    path, _ = corpus(tmp_path / "noisy.csv")
    prepare = METHODS[name].prepare
    assert prepare is not None
    config = CleanConfig(input=path, out=tmp_path / "out")
    result = prepare(Setting(config, Failing(choose=knowing), LetterEmbedder()))
    verdicts = [json.loads(x) for x in (tmp_path / "out/verdicts.jsonl").read_text().splitlines()]
    lost = [one for one in verdicts if one["reason"] == "not judged: no reply: HTTP 500"]
    assert result.unanswered == len(lost) == 11  # 7, 70 to 79
    assert all(one["action"] == "keep" and one["answer"] == one["given"] for one in lost)
    assert "11 records got no reply" in result.warnings[-1]
