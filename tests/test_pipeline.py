"""What a whole run does to a corpus, by the paper's detector."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import read, write
from runs import all_doubt, all_trust, choice_rows, run
from scripted import LetterEmbedder, ScriptedEngine

from robustft.cleaning import clean
from robustft.config import ABLATIONS, CleanConfig
from robustft.detection.rule import Asked, paper_rule
from robustft.engines import Generation, Prompt
from robustft.errors import UserError
from robustft.opinions import Opinion
from robustft.prompts import context_prompt
from robustft.records import Record, open_records
from robustft.relabeling import relabel
from robustft.retrieval import CosineKNN


def test_every_input_line_is_accounted_for(tmp_path: Path) -> None:
    rows: list[Any] = choice_rows(700)
    rows[3:3] = [b"{broken", {"question": "no options or answer"}]
    result = run(write(tmp_path / "in.jsonl", rows), tmp_path / "out")
    counts = result.counts
    assert counts["input"] == 702
    assert counts["keep"] + counts["relabel"] + counts["drop"] + counts["rejected"] == 702
    assert counts["rejected"] == 2
    verdicts = read(tmp_path / "out/verdicts.jsonl")
    assert [verdict["id"] for verdict in verdicts] == [f"r{i}" for i in range(700)]
    assert [verdict["line"] for verdict in verdicts] == [1, 2, 3, *range(6, 703)]
    assert Counter(v["action"] for v in verdicts) == Counter(
        {name: counts[name] for name in ("keep", "relabel", "drop")}
    )
    assert [reject["line"] for reject in read(tmp_path / "out/rejects.jsonl")] == [4, 5]
    assert all(0 <= v["noise_score"] <= 1 and v["reason"] for v in verdicts)
    assert min(counts[name] for name in ("keep", "relabel", "drop", "clean", "noisy")) > 0
    for name in ("report.html", "manifest.json", "run.sqlite"):
        assert (tmp_path / "out" / name).stat().st_size > 0


def test_selection_keeps_the_most_confident_half(tmp_path: Path) -> None:
    run(write(tmp_path / "in.jsonl", choice_rows(200)), tmp_path / "out", beta=0.5)
    noisy = [v for v in read(tmp_path / "out/verdicts.jsonl") if v["verdict"] == "noisy"]
    kept = [v["experts"]["context"]["nll"] for v in noisy if v["action"] != "drop"]
    dropped = [v["experts"]["context"]["nll"] for v in noisy if v["action"] == "drop"]
    assert len(kept) == int(len(noisy) * 0.5 + 0.5)
    assert max(kept) <= min(dropped)


def test_neighbours_are_clean_and_never_the_record_itself(tmp_path: Path) -> None:
    run(write(tmp_path / "in.jsonl", choice_rows(300)), tmp_path / "out", k=4)
    verdicts = {v["id"]: v for v in read(tmp_path / "out/verdicts.jsonl")}
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
    run(write(tmp_path / "in.jsonl", choice_rows(300)), tmp_path / "out")
    noisy = [v for v in read(tmp_path / "out/verdicts.jsonl") if v["verdict"] == "noisy"]
    assert sum(sought) == 3 < len(noisy)
    assert len({json.dumps(verdict["neighbours"]) for verdict in noisy}) == 3
    assert {near["cosine"] for verdict in noisy for near in verdict["neighbours"]} == {1.0}


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_beta_zero_and_one(tmp_path: Path, beta: float) -> None:
    result = run(write(tmp_path / "in.jsonl", choice_rows(50)), tmp_path / "out", beta=beta)
    noisy = result.counts["noisy"]
    assert result.counts["drop"] == (noisy if beta == 0 else 0)


def test_approximate_retrieval_shows_clean_neighbours_too(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    source = write(tmp_path / "in.jsonl", choice_rows(60))
    run(source, tmp_path / "out", retriever="approximate")
    verdicts = read(tmp_path / "out" / "verdicts.jsonl")
    clean_ids = {v["id"] for v in verdicts if v["verdict"] == "clean"}
    shown = [n["id"] for v in verdicts for n in v["neighbours"]]
    assert shown
    assert set(shown) <= clean_ids


def test_an_all_noisy_corpus_and_so_an_empty_clean_set(tmp_path: Path) -> None:
    engine = ScriptedEngine(choose=all_doubt)
    result = run(write(tmp_path / "in.jsonl", choice_rows(20)), tmp_path / "out", engine)
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
    run(write(tmp_path / "in.jsonl", rows[: 2 if shared else 9]), tmp_path / "out")
    report = (tmp_path / "out/report.html").read_text()
    answers = report.partition("Answers before and after")[2].partition("</figure>")[0]
    labels = re.findall('<text class="label"[^>]*>([^<]*)', answers)
    texts = {"A": "A a &lt;b&gt;", "B": "B green", "C": "C blue"}
    given = sorted({row["answer"] for row in rows[: 2 if shared else 9]})
    assert labels == [texts[letter] if shared else letter for letter in given]


def test_an_all_clean_corpus_comes_out_as_it_went_in(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", choice_rows(20))
    result = run(source, tmp_path / "out", ScriptedEngine(choose=all_trust))
    assert result.counts["keep"] == 20
    assert read(tmp_path / "out/cleaned.jsonl") == read(source)


def test_one_record(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", choice_rows(1))
    assert run(source, tmp_path / "a", ScriptedEngine(choose=all_trust)).counts["keep"] == 1
    assert run(source, tmp_path / "b", ScriptedEngine(choose=all_doubt)).counts["noisy"] == 1


def test_an_option_that_stands_twice_is_one_answer(tmp_path: Path) -> None:
    row = {"question": "q?", "options": ["yes", "no", "yes"], "answer": "A"}
    [record] = open_records(str(write(tmp_path / "in.jsonl", [row])))
    assert isinstance(record, Record)
    said = Opinion("C", probabilities=(0.1, 0.2, 0.7))
    found = paper_rule(Asked(record, said, None, None))
    assert not found.noisy
    assert found.noise_score == pytest.approx(0.2)


def test_k_larger_than_the_clean_set(tmp_path: Path) -> None:
    result = run(write(tmp_path / "in.jsonl", choice_rows(12)), tmp_path / "out", k=50)
    clean_count = result.counts["clean"]
    assert 0 < clean_count < 12
    assert any(f"only {clean_count} clean records exist" in w for w in result.warnings)
    noisy = [v for v in read(tmp_path / "out/verdicts.jsonl") if v["verdict"] == "noisy"]
    assert all(len(v["neighbours"]) == clean_count for v in noisy)


@pytest.mark.parametrize("part", ABLATIONS)
def test_ablations_leave_out_what_they_say(tmp_path: Path, part: str) -> None:
    source = write(tmp_path / "in.jsonl", choice_rows(40))
    result = run(source, tmp_path / "out", without=frozenset({part}))
    experts = {
        name for verdict in read(tmp_path / "out/verdicts.jsonl") for name in
        verdict["experts"]
    }  # fmt: skip
    everyone = {"base", "reasoned", "checker", "context", "review"}
    left_out = {"checker": {"checker"}, "reviewer": {"review"}, "cer": {"context"},
                "rel": {"reasoned"}, "selection": set()}[part]  # fmt: skip
    assert experts == everyone - left_out
    assert result.counts["noisy"] > 0
    if part == "selection":
        assert result.counts["drop"] == 0


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


def test_a_text_that_was_cut_off_is_no_answer(tmp_path: Path) -> None:
    class Rambling(ScriptedEngine):
        def _generation(self, text: str) -> Generation:
            return replace(super()._generation(text), finished="Q3" not in text)

    long = "The process begins when the egg is laid and then the"
    rows = [{"question": f"Q{i}?", "answer": f"{long} end of {i}."} for i in range(9)]
    source = write(tmp_path / "in.jsonl", rows)

    def said(prompt: Prompt) -> str:
        asked = next(m.content for m in reversed(prompt.messages) if m.content[0] == "Q")
        return f"{long}, {asked[:2]}" + "." * 99

    engine = Rambling(reply=said)
    result = run(source, tmp_path / "out", engine, detector="paper", without=frozenset({"checker"}))
    cut = read(tmp_path / "out/verdicts.jsonl")[3]
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
    asked = context_prompt(record, [("2 + 2?", None, "4"), ("1 + 1?", None, "2")])
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
