"""What a whole run does to a corpus, by the crowd."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from commandline import read, write
from runs import all_doubt, chat, choice_rows, run, worded_rows
from scripted import ScriptedEngine

from robustft.engines import Prompt


def test_the_crowd_corrects_a_corpus_with_fixed_options(tmp_path: Path) -> None:
    rows, truth = worded_rows(300, wrong=0.3)
    source = write(tmp_path / "in.jsonl", rows)
    result = run(source, tmp_path / "out", detector="crowd", beta=1.0)
    assert result.weights["base"] + result.weights["reasoned"] < 0.1
    verdicts = read(tmp_path / "out/verdicts.jsonl")
    final = [verdict["answer"] for verdict in verdicts]
    assert sum(a == b for a, b in zip(final, truth, strict=True)) > 290
    assert result.counts["relabel"] > 60


def test_selection_keeps_its_share_of_every_label_that_the_crowd_settled(tmp_path: Path) -> None:
    rows, _ = worded_rows(400, wrong=0.3, labels=(0, 0, 0, 0, 0, 0, 1, 1, 2))
    source = write(tmp_path / "in.jsonl", rows)
    run(source, tmp_path / "out", detector="crowd", beta=0.5)
    settled: dict[str, list[bool]] = {}
    for verdict in read(tmp_path / "out/verdicts.jsonl"):
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
    source = write(tmp_path / "in.jsonl", rows)
    result = run(source, tmp_path / "out", detector="crowd", beta=0.5)
    verdicts = read(tmp_path / "out/verdicts.jsonl")
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


def test_sets_of_options_are_judged_apart(tmp_path: Path) -> None:
    """Two label sets and single questions in one corpus; one odd record silences no learner."""
    rows, truth = worded_rows(300, wrong=0.3)
    for row in rows[200:]:
        row["options"] = ["no", "yes", "perhaps"]
    rows[7]["options"] = ["x", "y", "z", "another"]
    single = [row | {"options": [f"{i} {o}" for o in "xyz"]}
              for i, row in enumerate(choice_rows(50))]  # fmt: skip
    source = write(tmp_path / "in.jsonl", rows + single)
    result = run(source, tmp_path / "out", detector="crowd")
    verdicts = read(tmp_path / "out/verdicts.jsonl")
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
    source = write(tmp_path / "in.jsonl", [row | {"question": f"Q{i}?"} for i in range(5)])
    engine = ScriptedEngine(choose=all_doubt)  # says A of every question
    result = run(source, tmp_path / "out", engine, without=frozenset({"checker"}))
    assert result.counts["clean"] == 5


def test_a_model_that_gives_no_answer_contradicts_nobody(tmp_path: Path) -> None:
    rows = [{"question": f"What is {i}?", "answer": str(i)} for i in range(60)]

    def reply(prompt: Prompt) -> str:
        number = int(prompt.messages[-1].content.split("What is ")[1].split("?")[0])
        return "" if number % 10 == 0 else f"The answer is {number}."

    source = write(tmp_path / "in.jsonl", rows)
    result = run(
        source, tmp_path / "out", ScriptedEngine(reply=reply), detector="crowd",
        without=frozenset({"rel", "checker"}),
    )  # fmt: skip
    assert (result.counts["clean"], result.counts["unjudged"]) == (54, 6)
    silent = [v for v in read(tmp_path / "out/verdicts.jsonl") if v["verdict"] != "clean"]
    assert [one["given"] for one in silent] == [str(i) for i in range(0, 60, 10)]
    assert all(one["action"] == "keep" and "gave no answer" in one["reason"] for one in silent)


def test_experts_at_chance_change_nothing_and_say_so(tmp_path: Path) -> None:
    rows = [row | {"options": [f"{i} {o}" for o in "xyz"]} for i, row in
            enumerate(choice_rows(300))]  # fmt: skip
    source = write(tmp_path / "in.jsonl", rows)
    result = run(source, tmp_path / "out", detector="crowd")
    assert result.powerless
    assert "no more than chance would" in result.warnings[0]
    assert "experts" not in result.warnings[0]  # it may have been one
    assert (result.counts["clean"], result.counts["unjudged"]) == (0, 300)
    for verdict in read(tmp_path / "out/verdicts.jsonl"):
        assert (verdict["verdict"], verdict["noise_score"]) == ("not judged", None)
        assert verdict["reason"].endswith("; not judged")
    report = (tmp_path / "out/report.html").read_text()
    assert "could not judge these 300 records" in report
    assert "<h2>Most suspicious</h2>" not in report
    assert read(tmp_path / "out/cleaned.jsonl") == read(source)


def test_free_text_that_nobody_confirms_is_left_alone(tmp_path: Path) -> None:
    source = chat(choice_rows(30), tmp_path / "in.jsonl")
    result = run(source, tmp_path / "out", detector="crowd")
    assert result.powerless
    assert result.counts["keep"] == 30


def test_free_text_is_judged_by_agreement(tmp_path: Path) -> None:
    rows = [{"question": f"Q{i}?", "answer": "grey"} for i in range(40)]
    engine = ScriptedEngine(reply=lambda prompt: "grey")
    rows[30:] = [row | {"answer": "red"} for row in rows[30:]]
    source = write(tmp_path / "in.jsonl", rows)
    result = run(source, tmp_path / "out", engine, detector="crowd", beta=1.0)
    verdicts = read(tmp_path / "out/verdicts.jsonl")
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
