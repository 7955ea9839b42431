from __future__ import annotations

import csv
import json
import math
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scripted import LetterEmbedder, ScriptedEngine

from robustft import shards
from robustft.cleaning import clean, run_clean
from robustft.config import ABLATIONS, CleanConfig, ExpertConfig
from robustft.detection.rule import Asked, paper_rule
from robustft.engines import Generation, Prompt
from robustft.errors import UserError
from robustft.prompts import context_prompt
from robustft.records import Record, open_records
from robustft.relabeling import relabel
from robustft.retrieval import CosineKNN
from robustft.store import UNIT_ROWS, Opinion, unpack

HERE = Path(__file__).parent
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "iris", "jade")


def choice_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "id": f"r{i}",
            "note": {"kept": [i, None]},
            "question": f"Number {i}: {' '.join(rng.choices(WORDS, k=6))}?",
            "options": ["red", "green", "blue"],
            "answer": rng.choice("ABC"),
        }
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(path: Path, out: Path, engine: ScriptedEngine | None = None, **settings: Any) -> Any:
    settings.setdefault("detector", "paper")
    config = CleanConfig(input=str(path), out=out, experts=ExpertConfig(rounds=2), **settings)
    return run_clean(config, engine=engine or ScriptedEngine(), embedder=LetterEmbedder())  # type: ignore[arg-type]


def all_doubt(prompt: Prompt, candidates: Sequence[str]) -> list[float]:
    """A checker that never believes; the content-free question gets even odds."""
    if candidates == (" Yes", " No"):
        return [0.5, 0.5] if "N/A" in prompt.messages[-1].content else [0.1, 0.9]
    return [0.7] + [0.1] * (len(candidates) - 1)


def all_trust(prompt: Prompt, candidates: Sequence[str]) -> list[float]:
    return list(reversed(all_doubt(prompt, candidates)))


def test_every_input_line_is_accounted_for(tmp_path: Path) -> None:
    rows: list[Any] = choice_rows(700)
    rows[3:3] = ["{broken", json.dumps({"question": "no options or answer"})]
    result = run(write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out")
    counts = result.counts
    assert counts["input"] == 702
    assert counts["keep"] + counts["relabel"] + counts["drop"] + counts["rejected"] == 702
    assert counts["rejected"] == 2
    verdicts = read_jsonl(tmp_path / "out/verdicts.jsonl")
    assert [verdict["id"] for verdict in verdicts] == [f"r{i}" for i in range(700)]
    assert [verdict["line"] for verdict in verdicts] == [1, 2, 3, *range(6, 703)]
    assert Counter(v["action"] for v in verdicts) == Counter(
        {name: counts[name] for name in ("keep", "relabel", "drop")}
    )
    assert [reject["line"] for reject in read_jsonl(tmp_path / "out/rejects.jsonl")] == [4, 5]
    assert all(0 <= v["noise_score"] <= 1 and v["reason"] for v in verdicts)
    assert min(counts[name] for name in ("keep", "relabel", "drop", "clean", "noisy")) > 0
    for name in ("report.html", "manifest.json", "run.sqlite"):
        assert (tmp_path / "out" / name).stat().st_size > 0


def test_lines_of_several_files_name_theirs(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("sub/a.jsonl", "b\udcff.jsonl"):
        write_jsonl(folder / name, [*choice_rows(2), "{broken"])
    run(folder, tmp_path / "out")
    files = ("b\\xff.jsonl", "sub/a.jsonl")
    verdicts = read_jsonl(tmp_path / "out/verdicts.jsonl")
    assert [(one["file"], one["line"]) for one in verdicts] == [
        (name, line) for name in files for line in (1, 2)
    ]
    rejects = read_jsonl(tmp_path / "out/rejects.jsonl")
    assert [(one["file"], one["line"]) for one in rejects] == [(name, 3) for name in files]
    assert rejects[0]["reason"] == rejects[1]["reason"]
    run(folder / "sub", tmp_path / "one")
    for name in ("verdicts.jsonl", "rejects.jsonl"):
        assert not any("file" in line for line in read_jsonl(tmp_path / "one" / name))


@pytest.mark.parametrize("kind", [pa.int64(), pa.float64()])
def test_a_new_answer_that_the_column_does_not_hold_drops_its_record(
    tmp_path: Path, kind: pa.DataType
) -> None:
    replies = {"whole": "13", "half": "12.5", "third": "1/3"}
    names = [name for name in replies for _ in range(4)]
    table = {"question": [f"{name} {n}" for n, name in enumerate(names)], "answer": [7] * 12}
    schema = pa.schema({"question": pa.string(), "answer": kind})
    pq.write_table(pa.table(table, schema=schema), tmp_path / "in.parquet")

    def reply(prompt: Prompt) -> str:
        asked = prompt.messages[-1].content
        return f"Answer: {max(replies.items(), key=lambda one: asked.rfind(one[0]))[1]}"

    engine = ScriptedEngine(choose=all_doubt, reply=reply)
    result = run(tmp_path / "in.parquet", tmp_path / "out", engine, beta=1.0)
    verdicts = read_jsonl(tmp_path / "out/verdicts.jsonl")
    fits = {"whole": True, "half": pa.types.is_floating(kind), "third": False}
    for verdict, name in zip(verdicts, names, strict=True):
        assert verdict["action"] == ("relabel" if fits[name] else "drop")
        assert verdict["answer"] == (replies[name] if fits[name] else None)
        told = f"the new answer {replies[name]!r} does not fit the column's type ({kind})"
        assert (told in verdict["reason"]) != fits[name]
    written = pq.read_table(tmp_path / "out/cleaned.parquet")
    assert written.schema.field("answer").type == kind
    expected = [float(replies[name]) for name in names if fits[name]]
    assert written["answer"].to_pylist() == expected
    counts = result.counts
    assert (counts["relabel"], counts["drop"], counts["input"]) == (
        len(expected),
        12 - len(expected),
        12,
    )
    assert result.reasons["drop: new answer does not fit the column"] == counts["drop"]


def test_the_training_set_keeps_schema_order_and_unknown_fields(tmp_path: Path) -> None:
    rows = choice_rows(60)
    run(write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out")
    verdicts = {v["id"]: v for v in read_jsonl(tmp_path / "out/verdicts.jsonl")}
    expected = [
        row | {"answer": verdicts[row["id"]]["answer"]}
        for row in rows
        if verdicts[row["id"]]["action"] != "drop"
    ]
    cleaned = read_jsonl(tmp_path / "out/cleaned.jsonl")
    assert cleaned == expected
    assert [list(row) for row in cleaned] == [list(row) for row in expected]


def test_selection_keeps_the_most_confident_half(tmp_path: Path) -> None:
    run(write_jsonl(tmp_path / "in.jsonl", choice_rows(200)), tmp_path / "out", beta=0.5)
    noisy = [v for v in read_jsonl(tmp_path / "out/verdicts.jsonl") if v["verdict"] == "noisy"]
    kept = [v["experts"]["context"]["nll"] for v in noisy if v["action"] != "drop"]
    dropped = [v["experts"]["context"]["nll"] for v in noisy if v["action"] == "drop"]
    assert len(kept) == int(len(noisy) * 0.5 + 0.5)
    assert max(kept) <= min(dropped)


def test_neighbours_are_clean_and_never_the_record_itself(tmp_path: Path) -> None:
    run(write_jsonl(tmp_path / "in.jsonl", choice_rows(300)), tmp_path / "out", k=4)
    verdicts = {v["id"]: v for v in read_jsonl(tmp_path / "out/verdicts.jsonl")}
    for id_, verdict in verdicts.items():
        cosines = [near["cosine"] for near in verdict["neighbours"]]
        assert cosines == sorted(cosines, reverse=True)
        assert len(cosines) == (4 if verdict["verdict"] == "noisy" else 0)
        for near in verdict["neighbours"]:
            assert near["id"] != id_
            assert verdicts[near["id"]]["verdict"] == "clean"


def test_neighbours_of_an_embedding_that_many_share_are_sought_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sought = []

    class Index(CosineKNN):
        def search(self, queries: Any, *given: Any, **named: Any) -> Any:
            sought.append(len(queries))
            return super().search(queries, *given, **named)

    monkeypatch.setattr("robustft.corpus.CosineKNN", Index)
    # To an embedder that looks at their length alone, many questions are one.
    monkeypatch.setattr(LetterEmbedder, "encode", lambda self, texts: np.array(
        [np.eye(26, dtype=np.float32)[len(text) % 3] for text in texts]
    ))  # fmt: skip
    run(write_jsonl(tmp_path / "in.jsonl", choice_rows(300)), tmp_path / "out")
    noisy = [v for v in read_jsonl(tmp_path / "out/verdicts.jsonl") if v["verdict"] == "noisy"]
    assert sum(sought) == 3 < len(noisy)
    assert len({json.dumps(verdict["neighbours"]) for verdict in noisy}) == 3
    assert {near["cosine"] for verdict in noisy for near in verdict["neighbours"]} == {1.0}


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_beta_zero_and_one(tmp_path: Path, beta: float) -> None:
    result = run(write_jsonl(tmp_path / "in.jsonl", choice_rows(50)), tmp_path / "out", beta=beta)
    noisy = result.counts["noisy"]
    assert result.counts["drop"] == (noisy if beta == 0 else 0)


def test_approximate_retrieval_shows_clean_neighbours_too(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    source = write_jsonl(tmp_path / "in.jsonl", choice_rows(60))
    run(source, tmp_path / "out", retriever="approximate")
    verdicts = read_jsonl(tmp_path / "out" / "verdicts.jsonl")
    clean_ids = {v["id"] for v in verdicts if v["verdict"] == "clean"}
    shown = [n["id"] for v in verdicts for n in v["neighbours"]]
    assert shown
    assert set(shown) <= clean_ids


def test_an_all_noisy_corpus_and_so_an_empty_clean_set(tmp_path: Path) -> None:
    engine = ScriptedEngine(choose=all_doubt)
    result = run(write_jsonl(tmp_path / "in.jsonl", choice_rows(20)), tmp_path / "out", engine)
    assert result.counts["noisy"] == 20
    assert result.counts["drop"] == 10
    assert any("no record was found clean" in warning for warning in result.warnings)
    assert (tmp_path / "out/report.html").exists()


@pytest.mark.parametrize("shared", [True, False])
def test_the_report_names_answers_by_their_text_where_options_are_shared(
    tmp_path: Path, shared: bool
) -> None:
    rows = choice_rows(9)
    rows[0]["options"] = rows[1]["options"] = ["a <b>", "green", "blue"]
    run(write_jsonl(tmp_path / "in.jsonl", rows[: 2 if shared else 9]), tmp_path / "out")
    report = (tmp_path / "out/report.html").read_text()
    answers = report.partition("Answers before and after")[2].partition("</figure>")[0]
    labels = re.findall('<text class="label"[^>]*>([^<]*)', answers)
    texts = {"A": "A a &lt;b&gt;", "B": "B green", "C": "C blue"}
    given = sorted({row["answer"] for row in rows[: 2 if shared else 9]})
    assert labels == [texts[letter] if shared else letter for letter in given]


def test_an_all_clean_corpus_comes_out_as_it_went_in(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", choice_rows(20))
    result = run(source, tmp_path / "out", ScriptedEngine(choose=all_trust))
    assert result.counts["keep"] == 20
    assert read_jsonl(tmp_path / "out/cleaned.jsonl") == read_jsonl(source)


def test_one_record(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", choice_rows(1))
    assert run(source, tmp_path / "a", ScriptedEngine(choose=all_trust)).counts["keep"] == 1
    assert run(source, tmp_path / "b", ScriptedEngine(choose=all_doubt)).counts["noisy"] == 1


def test_an_option_that_stands_twice_is_one_answer(tmp_path: Path) -> None:
    row = {"question": "q?", "options": ["yes", "no", "yes"], "answer": "A"}
    [record] = open_records(str(write_jsonl(tmp_path / "in.jsonl", [row])))
    assert isinstance(record, Record)
    said = Opinion("C", probabilities=(0.1, 0.2, 0.7))
    found = paper_rule(Asked(record, said, None, None))
    assert not found.noisy
    assert found.noise_score == pytest.approx(0.2)


def test_k_larger_than_the_clean_set(tmp_path: Path) -> None:
    result = run(write_jsonl(tmp_path / "in.jsonl", choice_rows(12)), tmp_path / "out", k=50)
    clean_count = result.counts["clean"]
    assert 0 < clean_count < 12
    assert any(f"only {clean_count} clean records exist" in w for w in result.warnings)
    noisy = [v for v in read_jsonl(tmp_path / "out/verdicts.jsonl") if v["verdict"] == "noisy"]
    assert all(len(v["neighbours"]) == clean_count for v in noisy)


@pytest.mark.parametrize("part", ABLATIONS)
def test_ablations_leave_out_what_they_say(tmp_path: Path, part: str) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", choice_rows(40))
    result = run(source, tmp_path / "out", without=frozenset({part}))
    experts = {
        name for verdict in read_jsonl(tmp_path / "out/verdicts.jsonl") for name in
        verdict["experts"]
    }  # fmt: skip
    everyone = {"base", "reasoned", "checker", "context", "review"}
    left_out = {"checker": {"checker"}, "reviewer": {"review"}, "cer": {"context"},
                "rel": {"reasoned"}, "selection": set()}[part]  # fmt: skip
    assert experts == everyone - left_out
    assert result.counts["noisy"] > 0
    if part == "selection":
        assert result.counts["drop"] == 0


def test_duplicate_questions_are_asked_once(tmp_path: Path) -> None:
    rows = choice_rows(10)
    twice = [*rows, *({**row, "id": row["id"] + "b"} for row in rows)]
    engine = ScriptedEngine(choose=all_trust)
    run(write_jsonl(tmp_path / "in.jsonl", twice), tmp_path / "out", engine)
    once = ScriptedEngine(choose=all_trust)
    run(write_jsonl(tmp_path / "in2.jsonl", rows), tmp_path / "out2", once)
    assert len(engine.asked) == len(once.asked)


def test_a_finished_run_asks_nothing_again(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", choice_rows(40))
    run(source, tmp_path / "out")
    before = (tmp_path / "out/verdicts.jsonl").read_bytes()
    engine = ScriptedEngine()
    run(source, tmp_path / "out", engine)
    assert engine.asked == []
    assert (tmp_path / "out/verdicts.jsonl").read_bytes() == before


def test_a_changed_configuration_or_input_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", choice_rows(5))
    run(source, tmp_path / "out")
    with pytest.raises(UserError, match="-k was 3, now 4"):
        run(source, tmp_path / "out", k=4)
    write_jsonl(source, choice_rows(6))
    with pytest.raises(UserError, match="the input is not the one that it began with"):
        run(source, tmp_path / "out")


def test_another_share_is_selected_without_asking_again(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", choice_rows(100))
    run(source, tmp_path / "out", beta=0.25)
    engine = ScriptedEngine()
    more = run(source, tmp_path / "out", engine, beta=0.75)
    assert engine.asked == []
    run(source, tmp_path / "fresh", beta=0.75)
    for name in ("cleaned.jsonl", "verdicts.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    assert more.counts["relabel"] > 0


def test_settings_are_named_in_errors(tmp_path: Path) -> None:
    for settings, says in (
        ({"betta": 1.0}, "no setting 'betta'; did you mean 'beta'"),
        ({"k": "3"}, "k must be a whole number, got '3'"),
        ({"beta": None}, "beta must be a number, got None"),
        ({"without": ["rel", "frob"]}, "without must be one of"),
    ):
        with pytest.raises(UserError, match=says):
            clean(choice_rows(8), out=tmp_path / "out", engine=ScriptedEngine(), **settings)
    made = clean(
        choice_rows(8), out=tmp_path, engine=ScriptedEngine(), embedder=LetterEmbedder(),
        without="rel",
    )  # fmt: skip
    assert len(repr(made)) < 1500


def test_rows_in_memory(tmp_path: Path) -> None:
    result = clean(choice_rows(8), out=tmp_path, engine=ScriptedEngine(), embedder=LetterEmbedder())
    assert result.counts["input"] == 8
    assert len(read_jsonl(tmp_path / "verdicts.jsonl")) == 8


def test_rows_in_memory_replace_nothing(tmp_path: Path) -> None:
    mine = tmp_path / "input.jsonl"
    mine.write_text("mine")
    first, second = choice_rows(20), choice_rows(20, seed=1)
    said: list[str] = []

    def call_again() -> None:
        if not said:
            with pytest.raises(UserError, match="another run is working") as error:
                clean(second, out=tmp_path, engine=ScriptedEngine(), embedder=LetterEmbedder())
            said.append(str(error.value))

    engine = ScriptedEngine(before_batch=call_again)
    clean(first, out=tmp_path, engine=engine, embedder=LetterEmbedder(), detector="paper")
    assert said
    assert mine.read_text() == "mine"
    questions = {row["question"] for row in read_jsonl(tmp_path / "cleaned.jsonl")}
    assert questions
    assert questions <= {row["question"] for row in first}


@pytest.mark.parametrize("count", [29, 30, 31])
def test_an_input_that_changes_while_it_is_worked_on(tmp_path: Path, count: int) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", choice_rows(30))
    before = source.read_bytes()
    run(source, tmp_path / "whole")

    def edit() -> None:
        write_jsonl(source, choice_rows(count, seed=1))

    with pytest.raises(UserError, match=r"in\.jsonl: has changed since the run began; put it back"):
        run(source, tmp_path / "out", ScriptedEngine(before_batch=edit))
    assert not (tmp_path / "out/cleaned.jsonl").exists()
    source.write_bytes(before)
    again = ScriptedEngine()
    run(source, tmp_path / "out", again)
    assert again.asked == []
    for name in ("verdicts.jsonl", "cleaned.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def alpaca(rows: list[dict[str, Any]], path: Path) -> Path:
    body = [{"instruction": r["question"], "input": "", "output": f"It is {r['answer']}."} for r in
            rows]  # fmt: skip
    path.write_text(json.dumps(body))
    return path


def chat(rows: list[dict[str, Any]], path: Path) -> Path:
    turns = [
        [{"role": "user", "content": r["question"]},
         {"role": "assistant", "content": f"A long answer about {r['answer']} and more words."}]
        for r in rows
    ]  # fmt: skip
    return write_jsonl(path, [{"messages": messages} for messages in turns])


def table(rows: list[dict[str, Any]], path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def comma(rows: list[dict[str, Any]], path: Path) -> Path:
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["question", "options", "answer"])
        for row in rows:
            writer.writerow([row["question"], json.dumps(row["options"]), row["answer"]])
    return path


@pytest.mark.parametrize(
    ("make", "name"),
    [(alpaca, "a.json"), (chat, "a.jsonl"), (table, "a.parquet"), (comma, "a.csv")],
)
def test_every_format_and_schema(tmp_path: Path, make: Any, name: str) -> None:
    rows = [{k: v for k, v in row.items() if k != "note"} for row in choice_rows(40)]
    result = run(make(rows, tmp_path / name), tmp_path / "out")
    assert result.cleaned.name == f"cleaned{Path(name).suffix}"
    assert result.counts["keep"] + result.counts["relabel"] + result.counts["drop"] == 40
    assert len(read_jsonl(tmp_path / "out/verdicts.jsonl")) == 40
    again = run(result.cleaned, tmp_path / "out2")  # what was written can be read
    assert again.counts["input"] == result.counts["keep"] + result.counts["relabel"]


def test_interrupted_anywhere_the_result_is_the_same(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", choice_rows(60))
    run(source, tmp_path / "whole")
    countdown = random.Random(1)
    for _ in range(200):
        left = countdown.randint(0, 12)

        def tick() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt

        try:
            run(source, tmp_path / "parts", ScriptedEngine(before_batch=tick))
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "parts/verdicts.jsonl").exists()
    else:
        pytest.fail("never finished")
    for name in ("verdicts.jsonl", "cleaned.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_server_is_asked_about_several_units_at_a_time(tmp_path: Path) -> None:
    """The bytes are those of one at a time."""
    meeting, mine = threading.Barrier(2, timeout=120), threading.local()

    def meet() -> None:  # nobody gets on before two units are at work
        if not hasattr(mine, "met"):
            mine.met = meeting.wait()

    source = write_jsonl(tmp_path / "in.jsonl", choice_rows(2 * UNIT_ROWS + 60))
    engine = ScriptedEngine(before_batch=meet)
    engine.at_a_time = 2  # type: ignore[attr-defined]
    run(source, tmp_path / "together", engine)
    assert_asked_once(tmp_path / "together/run.sqlite")
    run(source, tmp_path / "alone")
    for name in ("verdicts.jsonl", "cleaned.jsonl"):
        alone = (tmp_path / "alone" / name).read_bytes()
        assert (tmp_path / "together" / name).read_bytes() == alone


def assert_asked_once(store: Path) -> None:
    """No question of a store was put twice, and every one was paid for."""
    rows = sqlite3.connect(store).execute(
        "SELECT unit, expert, round, opinions, questions FROM batches"
    )
    asked: Counter[tuple[Any, ...]] = Counter()
    questions = 0
    for unit, expert, round_, body, count in rows:
        questions += count
        asked.update((unit, expert, round_, said.row) for said in unpack(body))
    assert asked
    assert set(asked.values()) == {1}
    assert questions == len(asked)


KILLED = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
from pathlib import Path
from test_pipeline import run
from scripted import ScriptedEngine, slowly
run(Path(sys.argv[1]), Path(sys.argv[2]), ScriptedEngine(before_batch=slowly(0.02)))
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_nothing_is_asked_twice(tmp_path: Path, kills: int) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", choice_rows(200))
    run(source, tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out")]
    moments = random.Random(kills)
    for _ in range(kills):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (tmp_path / "out/run.sqlite").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 2.5))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    for name in ("verdicts.jsonl", "cleaned.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert_asked_once(tmp_path / "out/run.sqlite")


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    config = CleanConfig(input="x", out=tmp_path)
    for change, message in (
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"without": frozenset({"x"})}, "without must be one of"),
    ):
        with pytest.raises(UserError, match=message):
            replace(config, **change)


def worded_rows(
    count: int, wrong: float, labels: Sequence[int] = (0, 1, 2), own: int = 5
) -> tuple[list[dict[str, Any]], list[str]]:
    """Questions of five words that tell the label, and the true answers; given ones go wrong.

    labels: what true labels are drawn from. own: how many words are the label's own, the others
    being those of any one label.
    """
    rng = random.Random(0)
    rows, truth = [], []
    for i in range(count):
        label, other = rng.choice(labels), rng.randrange(3)
        near, far = (("zebra zoo", "quick quiz", "happy yarn")[k].split() for k in (label, other))
        words = rng.choices(near, k=own) + rng.choices(far, k=5 - own)
        given = label if rng.random() > wrong else (label + rng.choice((1, 2))) % 3
        truth.append("ABC"[label])
        rows.append({"question": f"{' '.join(words)} {i}", "options": ["x", "y", "z"],
                     "answer": "ABC"[given]})  # fmt: skip
    return rows, truth


def test_the_crowd_corrects_a_corpus_with_fixed_options(tmp_path: Path) -> None:
    rows, truth = worded_rows(300, wrong=0.3)
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    result = run(source, tmp_path / "out", detector="crowd", beta=1.0)
    assert result.weights["base"] + result.weights["reasoned"] < 0.1
    verdicts = read_jsonl(tmp_path / "out/verdicts.jsonl")
    final = [verdict["answer"] for verdict in verdicts]
    assert sum(a == b for a, b in zip(final, truth, strict=True)) > 290
    assert result.counts["relabel"] > 60


def test_selection_keeps_its_share_of_every_label_that_the_crowd_settled(tmp_path: Path) -> None:
    rows, _ = worded_rows(400, wrong=0.3, labels=(0, 0, 0, 0, 0, 0, 1, 1, 2))
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    run(source, tmp_path / "out", detector="crowd", beta=0.5)
    settled: dict[str, list[bool]] = {}
    for verdict in read_jsonl(tmp_path / "out/verdicts.jsonl"):
        if verdict["verdict"] == "noisy":
            label = verdict["reason"].removeprefix("crowd: ")[0]
            wrong = f"given answer wrong with probability {verdict['noise_score']:.2f};"
            assert wrong in verdict["reason"]
            settled.setdefault(label, []).append(verdict["action"] == "relabel")
    assert set(settled) == set("ABC")
    for kept in settled.values():
        assert sum(kept) == int(0.5 * len(kept) + 0.5)


def test_an_answer_found_clean_is_held_to_the_standard_of_the_new_ones(tmp_path: Path) -> None:
    rows, _ = worded_rows(400, wrong=0.4, own=3)  # many are hard to tell
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    result = run(source, tmp_path / "out", detector="crowd", beta=0.5)
    verdicts = read_jsonl(tmp_path / "out/verdicts.jsonl")
    least: dict[str, float] = {}  # certainty of the new labels that are kept
    for one in verdicts:
        if one["verdict"] == "noisy" and one["action"] != "drop":
            sure = math.exp(-float(one["reason"].rpartition("(nll ")[2].rstrip(")")))
            assert one["experts"]["regression"]["probabilities"]
            least[one["answer"]] = min(sure, least.get(one["answer"], 0.7))
    assert set(least) == set("ABC")
    doubtful = 0
    for one in verdicts:
        if one["verdict"] == "clean":
            margin = 1 - one["noise_score"] - least[one["given"]]
            assert abs(margin) < 1e-3 or (one["action"] == "keep") == (margin > 0)
            doubtful += one["action"] == "drop"
    assert doubtful == result.reasons["drop: given answer too uncertain"] > 0
    without = run(
        source, tmp_path / "all", detector="crowd", without=frozenset({"selection"}), beta=0.5
    )
    assert without.counts["drop"] == 0


def test_the_time_of_a_killed_session_counts(tmp_path: Path) -> None:
    steps = iter((lambda: time.sleep(0.3), lambda: None, sys.exit))
    engine = ScriptedEngine(before_batch=lambda: next(steps)())
    source = write_jsonl(tmp_path / "in.jsonl", choice_rows(4))
    with pytest.raises(SystemExit):
        run(source, tmp_path / "out", engine)
    assert run(source, tmp_path / "out").seconds["detect"] > 0.3


def test_the_times_of_the_stages_are_those_of_all_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def take(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr("robustft.store.time.perf_counter", lambda: now)
    source = write_jsonl(tmp_path / "in.jsonl", choice_rows(4))
    config = CleanConfig(str(source), tmp_path / "out", detector="paper")
    engine = ScriptedEngine(before_batch=lambda: take(0.05))
    first, second = (
        run_clean(
            config,
            engine=engine,
            embedder=LetterEmbedder(),
            announce=lambda known, loading=loading: take(loading),  # type: ignore[misc]
        )
        for loading in (0.4, 0.2)
    )
    assert (first.earlier, second.earlier) == (0, pytest.approx(first.seconds["total"]))
    assert first.seconds["total"] > 0.4
    assert first.seconds["load"] == pytest.approx(0.4)
    assert second.seconds["load"] == pytest.approx(0.6)
    assert second.seconds["detect"] == first.seconds["detect"] > 0
    for one in (first, second):
        stages = sum(value for name, value in one.seconds.items() if name != "total")
        assert stages == pytest.approx(one.seconds["total"] + one.earlier)


def test_the_time_of_publishing_is_that_of_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    publish = shards.publish

    def slow(folder: Path, *rest: Any) -> None:
        nonlocal now
        publish(folder, *rest)
        now += 3.0

    monkeypatch.setattr("robustft.store.time.perf_counter", lambda: now)
    monkeypatch.setattr("robustft.pipeline.publish", slow)
    result = run(write_jsonl(tmp_path / "in.jsonl", choice_rows(4)), tmp_path / "out")
    assert {stage: result.seconds[stage] for stage in ("detect", "relabel", "load")} == {
        "detect": 3.0, "relabel": 3.0, "load": 0.0,
    }  # fmt: skip


def test_sets_of_options_are_judged_apart(tmp_path: Path) -> None:
    """Two label sets and single questions in one corpus; one odd record silences no learner."""
    rows, truth = worded_rows(300, wrong=0.3)
    for row in rows[200:]:
        row["options"] = ["no", "yes", "perhaps"]
    rows[7]["options"] = ["x", "y", "z", "another"]
    single = [row | {"options": [f"{i} {o}" for o in "xyz"]}
              for i, row in enumerate(choice_rows(50))]  # fmt: skip
    source = write_jsonl(tmp_path / "in.jsonl", rows + single)
    result = run(source, tmp_path / "out", detector="crowd")
    verdicts = read_jsonl(tmp_path / "out/verdicts.jsonl")
    assert "on 51 records no expert is better than chance" in result.warnings[0]
    assert result.counts["unjudged"] == 51
    for one in (verdicts[7], *verdicts[300:]):
        assert (one["verdict"], one["noise_score"], one["action"]) == ("not judged", None, "keep")
    wrong = [row["answer"] != right for row, right in zip(rows, truth, strict=True)]
    found = [one["verdict"] == "noisy" for one in verdicts[:300]]
    hits = sum(a and b for a, b in zip(wrong, found, strict=True))
    assert hits > 0.9 * sum(wrong)
    assert hits > 0.9 * sum(found)


def test_options_that_read_alike_are_one_answer(tmp_path: Path) -> None:
    options = ["red", "green", "red"]
    row = {"question": "Which?", "options": options, "answer": "C"}
    source = write_jsonl(tmp_path / "in.jsonl", [row | {"question": f"Q{i}?"} for i in range(5)])
    engine = ScriptedEngine(choose=all_doubt)  # says A of every question
    result = run(source, tmp_path / "out", engine, without=frozenset({"checker"}))
    assert result.counts["clean"] == 5


def test_a_model_that_gives_no_answer_contradicts_nobody(tmp_path: Path) -> None:
    rows = [{"question": f"What is {i}?", "answer": str(i)} for i in range(60)]

    def reply(prompt: Prompt) -> str:
        number = int(prompt.messages[-1].content.split("What is ")[1].split("?")[0])
        return "" if number % 10 == 0 else f"The answer is {number}."

    source = write_jsonl(tmp_path / "in.jsonl", rows)
    result = run(
        source, tmp_path / "out", ScriptedEngine(reply=reply), detector="crowd",
        without=frozenset({"rel", "checker"}),
    )  # fmt: skip
    assert (result.counts["clean"], result.counts["unjudged"]) == (54, 6)
    silent = [v for v in read_jsonl(tmp_path / "out/verdicts.jsonl") if v["verdict"] != "clean"]
    assert [one["given"] for one in silent] == [str(i) for i in range(0, 60, 10)]
    assert all(one["action"] == "keep" and "gave no answer" in one["reason"] for one in silent)


def test_experts_at_chance_change_nothing_and_say_so(tmp_path: Path) -> None:
    rows = [row | {"options": [f"{i} {o}" for o in "xyz"]} for i, row in
            enumerate(choice_rows(300))]  # fmt: skip
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    result = run(source, tmp_path / "out", detector="crowd")
    assert result.powerless
    assert "no more than chance would" in result.warnings[0]
    assert "experts" not in result.warnings[0]  # it may have been one
    assert (result.counts["clean"], result.counts["unjudged"]) == (0, 300)
    for verdict in read_jsonl(tmp_path / "out/verdicts.jsonl"):
        assert (verdict["verdict"], verdict["noise_score"]) == ("not judged", None)
        assert verdict["reason"].endswith("; not judged")
    assert "No record was suspicious enough" in (tmp_path / "out/report.html").read_text()
    assert read_jsonl(tmp_path / "out/cleaned.jsonl") == read_jsonl(source)


def test_free_text_that_nobody_confirms_is_left_alone(tmp_path: Path) -> None:
    source = chat(choice_rows(30), tmp_path / "in.jsonl")
    result = run(source, tmp_path / "out", detector="crowd")
    assert result.powerless
    assert result.counts["keep"] == 30


def test_free_text_is_judged_by_agreement(tmp_path: Path) -> None:
    rows = [{"question": f"Q{i}?", "answer": "grey"} for i in range(40)]
    engine = ScriptedEngine(reply=lambda prompt: "grey")
    rows[30:] = [row | {"answer": "red"} for row in rows[30:]]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    result = run(source, tmp_path / "out", engine, detector="crowd", beta=1.0)
    verdicts = read_jsonl(tmp_path / "out/verdicts.jsonl")
    assert [v["verdict"] for v in verdicts] == ["clean"] * 30 + ["noisy"] * 10
    assert result.noise_rate is not None
    assert result.noise_rate.low < 0.25 < result.noise_rate.high
    assert 0.5 < result.expected_precision <= 1
    manifest = json.loads((tmp_path / "out/manifest.json").read_bytes())
    assert manifest["noise_rate"]["value"] == pytest.approx(result.noise_rate.value)
    report = (tmp_path / "out/report.html").read_text()
    assert "An estimated " in report
    shown = re.sub("(<[^>]*>)+", " ", report)
    for option, value in (("--reasoning-tokens", 256), ("--without", "not given")):
        assert f"{option} {value} " in shown


def test_a_text_that_was_cut_off_is_no_answer(tmp_path: Path) -> None:
    class Rambling(ScriptedEngine):
        def _generation(self, text: str) -> Generation:
            return replace(super()._generation(text), finished="Q3" not in text)

    long = "The process begins when the egg is laid and then the"
    rows = [{"question": f"Q{i}?", "answer": f"{long} end of {i}."} for i in range(9)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)

    def said(prompt: Prompt) -> str:
        asked = next(m.content for m in reversed(prompt.messages) if m.content[0] == "Q")
        return f"{long}, {asked[:2]}" + "." * 99

    engine = Rambling(reply=said)
    result = run(source, tmp_path / "out", engine, detector="paper", without=frozenset({"checker"}))
    cut = read_jsonl(tmp_path / "out/verdicts.jsonl")[3]
    assert {one["answer"] for one in cut["experts"].values()} == {None}
    assert (cut["action"], cut["answer"]) == ("drop", None)
    assert result.cut_off == 3  # base, reasoned and context
    assert "3 replies did not end within --answer-tokens 512" in "".join(result.warnings)


@pytest.mark.parametrize("silent", ["context", "reasoned"])
def test_confidence_is_that_of_an_expert_who_answered(silent: str) -> None:
    said = {name: Opinion("Paris", nll=0.2) for name in ("reasoned", "context")}
    said[silent] = Opinion(None)
    label = relabel(said["reasoned"], Opinion("Rome", nll=0.9), said["context"], Opinion("Paris"))
    assert (label.answer, label.nll) == ("Paris", 0.2)


def test_neighbours_stand_before_the_conversation() -> None:
    context = (("system", "Be brief."), ("user", "How warm is it?"), ("assistant", "68 F"))
    record = Record(0, 1, "0", "And in Celsius?", None, "20", context, {})
    asked = context_prompt(record, "number", [("2 + 2?", None, "4"), ("1 + 1?", None, "2")])
    roles = [message.role for message in asked.messages]
    assert roles == ["system", *["user", "assistant"] * 3, "user"]
    said = [message.content for message in asked.messages]
    assert said[5:7] == ["How warm is it?", "68 F"]
    assert [one.split("\n")[0] for one in said[1:5]] == [
        "1 + 1?",
        "Answer: 2",
        "2 + 2?",
        "Answer: 4",
    ]
