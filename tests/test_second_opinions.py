"""Finished runs of other models as witnesses for the crowd."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import read, write
from runs import choice_rows
from scripted import LetterEmbedder, ScriptedEngine

from robustft import crowd
from robustft.cleaning import clean, run_clean
from robustft.config import CleanConfig
from robustft.detection.detectors import CrowdDetector
from robustft.distributed import merge, run_shard
from robustft.engines import Prompt
from robustft.errors import UnfinishedError, UserError
from robustft.estimating import estimate
from robustft.second_opinions import SecondOpinions

COUNT = 700  # two units
QUICK = {"without": frozenset({"rel", "checker", "reviewer"})}


def sums(count: int = COUNT, wrong: float = 0.3) -> list[dict[str, Any]]:
    """Sums, some of them wrong."""
    rng = np.random.default_rng(0)
    answers = [n + 1 + 10 * int(rng.random() < wrong) for n in range(count)]
    return [
        {"id": f"s{n}", "question": f"What is {n} plus 1?", "answer": str(answer)}
        for n, answer in enumerate(answers)
    ]


class Adder(ScriptedEngine):
    """Adds, and errs on its own share of the sums, each time in another way."""

    def __init__(self, name: str, right: float, seed: int) -> None:
        super().__init__(reply=self._add)
        self.model_id = name
        rng = np.random.default_rng(seed)
        self._error = np.where(rng.random(COUNT) < right, 0, rng.integers(100, 200, COUNT))

    def _add(self, prompt: Prompt) -> str:
        number = int(prompt.messages[-1].content.rpartition("What is ")[2].partition(" plus")[0])
        return str(number + 1 + self._error[number])


def run(source: Path, out: Path, engine: ScriptedEngine, **settings: Any) -> Any:
    config = CleanConfig(input=str(source), out=out, **{**QUICK, **settings})
    return run_clean(config, engine=engine, embedder=LetterEmbedder())  # type: ignore[arg-type]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", [b"{broken", *sums()])


@pytest.fixture
def other(source: Path, tmp_path: Path) -> Path:
    run(source, tmp_path / "other", Adder("hub/other", 0.8, 1))
    return tmp_path / "other"


def test_with_a_second_opinion_wrong_answers_are_found(source: Path, other: Path) -> None:
    out = other.parent / "both"
    alone = run(source, other.parent / "alone", Adder("own", 0.7, 2))
    assert alone.counts["noisy"] == 0
    assert "--second-opinion" in alone.warnings[0]
    both = run(source, out, Adder("own", 0.7, 2), second_opinion=(str(other),))
    wrong = [int(row["answer"]) != n + 1 for n, row in enumerate(sums())]
    verdicts = read(out / "verdicts.jsonl")
    noisy = [one["verdict"] == "noisy" for one in verdicts]
    hits = sum(a and b for a, b in zip(wrong, noisy, strict=True))
    assert hits / sum(noisy) > 0.8
    assert hits / sum(wrong) > 0.8
    assert both.noise_rate.low < 0.3 < both.noise_rate.high
    assert both.weights.keys() == {"model", "other"}
    assert not both.warnings
    heard = read(other / "verdicts.jsonl")
    for one, before in zip(verdicts, heard, strict=True):
        assert one["experts"]["other"]["answer"] == before["experts"]["base"]["answer"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["second_opinions"] == {"other": "hub/other@1"}
    report = (out / "report.html").read_text()
    assert f">{other}<" in report
    assert "hub/other" not in report
    assert ">other<" in report


def test_nothing_is_asked_twice_and_the_runs_must_stay(source: Path, other: Path) -> None:
    out, engine = other.parent / "both", Adder("own", 0.7, 2)
    run(source, out, engine, second_opinion=(str(other),))
    before = (out / "verdicts.jsonl").read_bytes()
    moved = other.rename(other.parent / "moved")
    again = Adder("own", 0.7, 2)
    run(source, out, again, second_opinion=(str(moved),))
    assert not again.asked
    assert (out / "verdicts.jsonl").read_bytes() == before
    with pytest.raises(UserError, match=r"--second-opinion was hub/other@1, now not given"):
        run(source, out, again)


def test_shards_hear_what_one_process_hears(source: Path, other: Path) -> None:
    second = {"second_opinion": (str(other),)}
    one, out = other.parent / "one", other.parent / "shards"
    run(source, one, Adder("own", 0.7, 2), **second)
    config = CleanConfig(input=str(source), out=out, **QUICK, **second)  # type: ignore[arg-type]
    models = {"engine": Adder("own", 0.7, 2), "embedder": LetterEmbedder()}
    with pytest.raises(UnfinishedError):
        run_shard(config, 0, 2, wait=0, **models)  # type: ignore[arg-type]
    assert run_shard(config, 1, 2, wait=0, **models) == [0]  # type: ignore[arg-type]
    assert run_shard(config, 0, 2, wait=0, **models) == []  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"found shards that are not merged: run `robustft merge"):
        run(source, other.parent / "c", Adder("c", 0.7, 3), second_opinion=(str(out),))
    merge([out])
    assert (out / "verdicts.jsonl").read_bytes() == (one / "verdicts.jsonl").read_bytes()


def test_letters_are_heard_with_their_probabilities(tmp_path: Path) -> None:
    rows = choice_rows(60)
    source = write(tmp_path / "in.jsonl", rows)

    def knowing(share: float) -> Callable[..., list[float]]:
        def choose(prompt: Prompt, candidates: Any) -> list[float]:
            n = int(prompt.messages[-1].content.rpartition("Number ")[2].partition(":")[0])
            right = n % 20 >= 6  # or the given one is wrong
            at = (ord(rows[n]["answer"]) - ord("A") + (not right)) % 3
            return [share if k == at else (1 - share) / 2 for k in range(len(candidates))]

        return choose

    engine = ScriptedEngine(choose=knowing(0.9))
    engine.model_id = "../base"
    run(source, tmp_path / "other", engine)
    weak = ScriptedEngine(choose=lambda prompt, candidates: [1 / len(candidates)] * len(candidates))
    found = run(source, tmp_path / "both", weak, second_opinion=(str(tmp_path / "other"),))
    assert found.weights["base 2"] > 0.5  # "base" is one of its own experts
    verdicts = read(tmp_path / "both/verdicts.jsonl")
    before = read(tmp_path / "other/verdicts.jsonl")
    for one, alone in zip(verdicts, before, strict=True):
        assert one["noise_score"] == pytest.approx(alone["noise_score"], abs=1e-3)
        said = one["experts"]["base 2"]["probabilities"]
        assert said == pytest.approx(alone["experts"]["base"]["probabilities"])
    # The crowd's label stands: this model knows less than the other.
    noisy = [one for one in verdicts if one["verdict"] == "noisy"]
    assert noisy
    assert all("label from the crowd" in one["reason"] for one in noisy)


def test_free_texts_are_not_compared_with_other_models(tmp_path: Path) -> None:
    """Models that write alike would outvote every given text that is written otherwise."""
    words = "a model says this and that about the number in so many words and goes on about it"
    rows = [
        {"question": f"Tell me about {n}.", "answer": f"people write of {n} in another way {n * 7}"}
        for n in range(60)
    ]
    source = write(tmp_path / "in.jsonl", rows)

    def model(name: str) -> ScriptedEngine:
        engine = ScriptedEngine(reply=lambda prompt: f"{words}, {name} {len(str(prompt)) % 3}")
        engine.model_id = name
        return engine

    run(source, tmp_path / "other", model("other"))
    found = run(source, tmp_path / "both", model("own"), second_opinion=(str(tmp_path / "other"),))
    assert found.counts["noisy"] == 0
    assert found.warnings[0] == "60 free texts are compared with this model's alone"


@pytest.mark.parametrize("number", [600, 3])
def test_missing_verdicts_are_told_before_anybody_is_asked(
    number: int, source: Path, other: Path
) -> None:
    line(other, number, None)
    engine = Adder("own", 0.7, 2)
    with pytest.raises(UserError, match=r"expected 188 verdicts from line 513 on, .* found 187"):
        run(source, other.parent / "both", engine, second_opinion=(str(other),))
    assert not engine.asked


def test_one_free_text_is_told_of_as_one(tmp_path: Path) -> None:
    text = {"id": "t", "question": "Tell me of the sea.", "answer": "It is wide and blue and deep."}
    source = write(tmp_path / "in.jsonl", [*sums(60), text])

    def model(name: str, seed: int) -> ScriptedEngine:
        adder = Adder(name, 0.8, seed)
        engine = ScriptedEngine(
            reply=lambda prompt: (
                "What others say of the sea is this and that, and so on and so forth."
                if "sea" in prompt.messages[-1].content
                else adder._add(prompt)
            )
        )
        engine.model_id = name
        return engine

    run(source, tmp_path / "other", model("other", 1))
    other = (str(tmp_path / "other"),)
    found = run(source, tmp_path / "both", model("own", 2), second_opinion=other)
    assert found.warnings[0] == "1 free text is compared with this model's alone"
    assert found.warnings[1] == "on 1 record no expert is better than chance: it is kept as given"


def test_a_copy_of_the_model_confirms_nothing(source: Path, other: Path) -> None:
    found = run(source, other.parent / "both", Adder("copy", 0.8, 1), second_opinion=(str(other),))
    assert found.counts["noisy"] == 0
    assert found.weights.keys() == {"model"}
    assert (
        "other gives this model's answers where both contradict the given one" in found.warnings[0]
    )
    assert "with one model alone" in found.warnings[1]


def test_where_a_copy_alone_gave_an_answer_nothing_is_judged() -> None:
    rng = np.random.default_rng(0)
    others_right = rng.random((1000, 2)) < 0.8
    given_right = rng.random(1000) < 0.3
    said = np.column_stack([given_right, others_right[:, [0, 0]], others_right[:, 1]])
    clusters = crowd.renumbered(np.where(said, 0, rng.integers(1, 9, (1000, 4))[:, [0, 1, 1, 2]]))
    clusters[:200, [1, 3]] = -1
    nobody = np.zeros(1000, np.int64)
    evidence = {
        "unjudged": nobody > 0, "question": np.arange(1000), "given": nobody - 1,
        "options": nobody, "width": nobody, "clusters": crowd.renumbered(clusters),
        "answered": nobody == 0,
    }  # fmt: skip
    found = CrowdDetector(["copy", "other"]).conclude(evidence, None)  # type: ignore[arg-type]
    assert "copy gives this model's answers" in found.warnings[0]
    assert not found.noisy[:200].any()
    assert np.isnan(found.wrong[:200]).all()
    assert found.noisy[200:].mean() > 0.6


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("hub/Other-7B", ("Other-7B", "Other-7B 2")),
        ("runs/tuned/", ("tuned 2", "tuned 3")),
        ("reasoning", ("reasoning 2", "reasoning 3")),  # or it would be told that expert's tokens
        ("/", ("other", "other 2")),
        ("a/" + "x" * 300, ("x" * 48, "x" * 48 + " 2")),
    ],
)
def test_every_run_has_a_short_name_of_its_own(
    model: str, names: tuple[str, ...], source: Path, other: Path
) -> None:
    edit(other, models={"model": model})
    assert SecondOpinions([str(other), str(other)]).names == names
    assert SecondOpinions([]).names == ()


def test_a_model_may_have_any_name(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "other", Adder("hub/" + "\x1b[31m<xmp>&\u202e" * 40, 0.8, 1))
    found = run(
        source, tmp_path / "both", Adder("own", 0.7, 2), second_opinion=(str(tmp_path / "other"),)
    )
    assert found.weights.keys() == {"model", *found.others}
    assert "<xmp>" not in (tmp_path / "both/report.html").read_text()


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (shutil.rmtree, "expected the --out of a finished `robustft clean`, found nothing there"),
        (lambda run: (run / "verdicts.jsonl").unlink(), "found no verdicts.jsonl in it"),
        (lambda run: (run / "manifest.json").unlink(), "found one that is not finished: run its"),
        (lambda run: only(run, "verdicts.jsonl"), "found no manifest.json in it"),
        (lambda run: only(run), r"found no manifest\.json and no verdicts\.jsonl in it"),
        (
            lambda run: (shutil.rmtree(run), run.write_text("")),
            "finished `robustft clean`, found a file",
        ),
        (lambda run: edit(run, method="self-label"), "found one of --method self-label, in which"),
        (lambda run: edit(run, models=None), "found another manifest.json"),
        (
            lambda run: edit(run, config={"limit": 5}),
            r"with the same --schema, --split and --limit, found one on \S+in\.jsonl: --limit was "
            "5, now not given",
        ),
        (
            lambda run: edit(run, input={"blake2b": "0"}),
            r"a run on the same input .* found one on \S+in\.jsonl: its content was another",
        ),
        (lambda run: line(run, 600, None), "expected 188 verdicts from line 513 on"),
        (lambda run: line(run, 600, "{"), r"line 601: expected the verdict on record 's600'"),
        (lambda run: line(run, 3, "[]"), r"line 4: expected the verdict on record 's3'"),
        (lambda run: line(run, 3, '{"given": "4", "experts": {"base": {"answer": 4}}}'), "line 4"),
        (lambda run: line(run, 3, '{"given": "5", "experts": {"base": {"answer": ""}}}'), "line 4"),
    ],
)
def test_what_is_no_finished_run_on_this_input_is_told(
    spoil: Callable[[Path], object], expected: str, source: Path, other: Path
) -> None:
    spoil(other)
    with pytest.raises(UserError, match=expected):
        run(source, other.parent / "both", Adder("own", 0.7, 2), second_opinion=(str(other),))


@pytest.mark.parametrize(("name", "runs"), [("hub/other", 1), ("own", 2)])
def test_what_one_model_says_twice_is_not_confirmed(
    name: str, runs: int, source: Path, other: Path
) -> None:
    told = "found one that has asked hub/other, as"
    with pytest.raises(UserError, match=told):
        run(source, other.parent / "both", Adder(name, 0.7, 2),
            second_opinion=(str(other),) * runs)  # fmt: skip


def edit(folder: Path, **facts: Any) -> None:
    path = folder / "manifest.json"
    found = json.loads(path.read_text())
    for name, values in facts.items():
        found[name] = found[name] | values if isinstance(values, dict) else values
    path.write_text(json.dumps(found))


def only(folder: Path, *names: str) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in names:
            path.unlink()


def line(folder: Path, number: int, text: str | None) -> None:
    path = folder / "verdicts.jsonl"
    lines = path.read_text().splitlines()
    lines[number : number + 1] = [] if text is None else [text]
    path.write_text("\n".join([*lines, ""]))


@pytest.mark.parametrize(
    "shares", ["[0.5, 0.5]", "[-1, 1, 1]", "[0, 0, 0]", '"abc"', '["a", 1, 1]']
)
def test_probabilities_of_a_damaged_run_are_not_believed(shares: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", choice_rows(5))
    engine = ScriptedEngine()
    engine.model_id = "other"
    run(source, tmp_path / "other", engine)
    given = choice_rows(5)[2]["answer"]
    said = f'{{"base": {{"answer": "A", "probabilities": {shares}}}}}'
    line(tmp_path / "other", 2, f'{{"given": "{given}", "experts": {said}}}')
    with pytest.raises(UserError, match=r"verdicts\.jsonl, line 3: expected the verdict"):
        run(source, tmp_path / "b", ScriptedEngine(), second_opinion=(str(tmp_path / "other"),))


def test_the_papers_rule_hears_no_second_opinion(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="detector must be crowd or panel where there are second"):
        CleanConfig(input="x", out=tmp_path, detector="paper", second_opinion=("y",))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("s3://bucket/run", r"--second-opinion s3://bucket/run: expected a folder of this machine"),
        ("caf\udce9", "the name is not UTF-8, as a manifest is"),
        ("", "^--second-opinion: expected a folder, found nothing$"),
    ],
)
def test_runs_that_cannot_be_read_or_named(
    name: str, expected: str, source: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(other.parent)
    shutil.copytree(other, Path("caf\udce9"))
    with pytest.raises(UserError, match=expected):
        run(source, other.parent / "both", Adder("own", 0.7, 2), second_opinion=(name,))


@pytest.mark.parametrize("runs", ["other", ["other"], (Path("other"),)])
def test_a_configuration_takes_a_tuple_of_names(runs: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="second_opinion must be a tuple of strings"):
        CleanConfig(input="x", out=tmp_path, second_opinion=runs)


def test_a_merge_elsewhere_finds_the_runs(
    source: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(other.parent)
    second = {"second_opinion": (other.name,)}
    config = CleanConfig(input=str(source), out=other.parent / "b", **QUICK, **second)  # type: ignore[arg-type]
    run_shard(config, 0, 1, engine=Adder("own", 0.7, 2), embedder=LetterEmbedder())  # type: ignore[arg-type]
    monkeypatch.chdir("/")
    assert merge([other.parent / "b"]).others == ("other",)


def test_a_merge_is_told_where_a_run_has_moved(source: Path, other: Path) -> None:
    out = other.parent / "b"
    third = other.parent / "third"
    run(source, third, Adder("hub/third", 0.7, 3))
    config = CleanConfig(
        input=str(source), out=out, second_opinion=(str(other), str(third)), **QUICK
    )  # type: ignore[arg-type]
    run_shard(config, 0, 1, engine=Adder("own", 0.7, 2), embedder=LetterEmbedder())  # type: ignore[arg-type]
    merge([out])
    before = (out / "verdicts.jsonl").read_bytes()
    moved = str(other.rename(other.parent / "moved"))
    told = "found nothing there; hub/other@1 was heard from there: if it has moved, say where with"
    with pytest.raises(UserError, match=told):
        merge([out])
    assert merge([out], second_opinion=[moved]).others == ("other", "third")
    assert (out / "verdicts.jsonl").read_bytes() == before
    with pytest.raises(UserError, match=r"before, of hub/other@1, hub/third@1, found one of own@1"):
        merge([out], second_opinion=[moved, str(out)])
    shutil.copytree(third, other)
    with pytest.raises(UserError, match=r"found a run of hub/third@1; hub/other@1 was heard from"):
        merge([out])


def test_clean_takes_a_path_or_several(source: Path, other: Path) -> None:
    result = clean(
        source, out=other.parent / "both", engine=Adder("own", 0.7, 2), embedder=LetterEmbedder(),
        second_opinion=f"file://{other}", **QUICK,
    )  # fmt: skip
    assert result.others == ("other",)


def test_the_cost_is_estimated_and_a_wrong_run_is_told_then(source: Path, other: Path) -> None:
    models = {"engine": Adder("own", 0.7, 2), "embedder": LetterEmbedder()}
    config = CleanConfig(
        input=str(source), out=other.parent / "both", second_opinion=(str(other),), **QUICK
    )  # type: ignore[arg-type]
    assert estimate(config, **models).records == COUNT  # type: ignore[arg-type]
    edit(other, input={"blake2b": "0"})
    with pytest.raises(UserError, match="expected a run on the same input"):
        estimate(config, **models)  # type: ignore[arg-type]


@pytest.mark.data
def test_real_solutions_beside_one_model_and_beside_two(real_data: Path, tmp_path: Path) -> None:
    """Solutions of the weakest model, 78 % of them wrong, judged by two others."""
    solved = read(real_data / "gsm8k_solutions/solutions.jsonl")

    def solver(name: str) -> ScriptedEngine:
        def reply(prompt: Prompt) -> str:
            asked = prompt.messages[-1].content
            return next(one[name]["solution"] for one in solved if one["question"] in asked)

        engine = ScriptedEngine(reply=reply)
        engine.model_id = name
        return engine

    given = "6b_finetuning"
    rows = [{"question": one["question"], "answer": one[given]["solution"]} for one in solved]
    source = write(tmp_path / "in.jsonl", rows)
    alone = run(source, tmp_path / "a", solver("6b_verification"))
    assert alone.counts["noisy"] == 0
    run(source, tmp_path / "b", solver("175b_verification"),
        second_opinion=(str(tmp_path / "a"),))  # fmt: skip
    verdicts = read(tmp_path / "b/verdicts.jsonl")
    wrong = [not one[given]["is_correct"] for one in solved]
    noisy = [one["verdict"] == "noisy" for one in verdicts]
    hits = sum(a and b for a, b in zip(wrong, noisy, strict=True))
    assert hits / sum(noisy) > 0.9
    assert hits / sum(wrong) > 0.9
