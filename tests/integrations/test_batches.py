"""Batch callables: what they add, and that they travel between processes."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustft.config import EngineConfig
from robustft.engines import Message, Prompt
from robustft.engines.transformers import TransformersEngine
from robustft.integrations.batches import (
    AgreeingAnswers,
    NearestNeighbours,
    ResponseScorer,
    build_index,
)

PROMPTS = ["Capital of France?", "Two and two?", "Say nothing.", "Colour of grass?"]
RESPONSES = ["Paris", "four, I believe", "", "green"]


@pytest.fixture
def scorer(tiny_model: Path) -> ResponseScorer:
    return ResponseScorer(str(tiny_model), device="cpu", dtype="float32")


def test_scores_are_the_engines_own(scorer: ResponseScorer, tiny_model: Path) -> None:
    batch = {"prompt": PROMPTS, "response": RESPONSES, "kept": [1, 2, 3, 4]}
    found = scorer(batch)
    engine = TransformersEngine(EngineConfig(model=str(tiny_model), device="cpu", dtype="float32"))
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        (score,) = engine.score([Prompt((Message("user", prompt),))], [response])
        assert found["response_tokens"][row] == score.tokens
        assert found["response_nll"][row] == pytest.approx(score.nll, abs=1e-4, nan_ok=True)
    assert math.isnan(found["response_nll"][2])
    assert found["kept"] == [1, 2, 3, 4]


@pytest.mark.parametrize("null", [None, float("nan")])
def test_a_null_is_not_scored(scorer: ResponseScorer, null: object) -> None:
    prompts = ["Hello?", null, "Hello?", [{"role": "user", "content": null}]]
    found = scorer({"prompt": prompts, "response": [null, "hi", "hi", "hi"]})
    alone = scorer({"prompt": ["Hello?"], "response": ["hi"]})
    for name, values in found.items():
        if name.startswith("response_"):
            unscored = {"response_tokens": 0, "response_truncated": False}.get(name, np.nan)
            expected = [unscored, unscored, alone[name][0], unscored]
            np.testing.assert_allclose(values, expected, atol=1e-4)
            assert values.dtype == alone[name].dtype
    none = scorer({"prompt": [null], "response": [null]})
    assert none["response_tokens"].tolist() == [0]


def test_turns_and_texts_are_the_same_prompt(scorer: ResponseScorer) -> None:
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    as_text = scorer({"prompt": PROMPTS, "response": RESPONSES})
    as_turns = scorer({"prompt": np.array(turns, object), "response": np.array(RESPONSES)})
    np.testing.assert_array_equal(as_text["response_nll"], as_turns["response_nll"])


def test_a_callable_travels_without_its_model(scorer: ResponseScorer) -> None:
    before = len(pickle.dumps(scorer))
    batch = {"prompt": PROMPTS, "response": RESPONSES}
    scored = scorer(batch)
    again = pickle.loads(pickle.dumps(scorer))
    assert len(pickle.dumps(scorer)) == before < 2000
    np.testing.assert_array_equal(again(batch)["response_nll"], scored["response_nll"])


def test_datasets_map(scorer: ResponseScorer, tmp_path: Path) -> None:
    from datasets import Dataset

    data = Dataset.from_dict({"prompt": PROMPTS * 3, "response": RESPONSES * 3})
    mapped = data.map(
        scorer, batched=True, batch_size=5, cache_file_name=str(tmp_path / "cache.arrow")
    )
    assert mapped.column_names[:3] == ["prompt", "response", "response_tokens"]
    direct = scorer({"prompt": PROMPTS, "response": RESPONSES})["response_nll"]
    np.testing.assert_allclose(mapped["response_nll"][:4], direct, atol=1e-4)


def test_agreement() -> None:
    batch = {
        "answers": [["Paris", " paris.", "Lyon"], ["4", "5"], [], ["a", None], None, ["b"]],
        "given": ["Lyon", "4", "x", "a", "a", None],
    }
    found = AgreeingAnswers(given="given")(batch)
    assert found["majority"] == ["Paris", "4", None, "a", None, "b"]
    np.testing.assert_allclose(found["majority_fraction"], [2 / 3, 0.5, 0, 1, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(found["given_support"], [1 / 3, 0.5, 0, 1, 0, 0], rtol=1e-6)
    assert found["semantic_entropy"][1] == pytest.approx(math.log(2))
    assert "given_support" not in AgreeingAnswers()(batch)
    with pytest.raises(KeyError, match="no column 'replies', only answers, given"):
        AgreeingAnswers("replies")(batch)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    words = ("amber", "birch", "cedar", "delta", "ember", "fjord")
    made = [f"The {a} of the {b} {n}" for n, a in enumerate(words) for b in words]
    return [*made[:20], made[3], *made[20:], made[3], made[30]]


def neighbours(index: Path, tiny_encoder: Path, **settings: Any) -> NearestNeighbours:
    return NearestNeighbours(index, embedder=str(tiny_encoder), **settings)


def test_duplicates_are_found_however_rows_are_batched(
    tmp_path: Path, tiny_encoder: Path, texts: list[str]
) -> None:
    index = tmp_path / "texts.knn"
    build_index(texts, index, embedder=str(tiny_encoder))
    lookup = neighbours(index, tiny_encoder, own="row", duplicate=0.999999)
    first = {text: texts.index(text) for text in texts}
    expected = [first[text] if first[text] < row else -1 for row, text in enumerate(texts)]
    for size in (1, 7, len(texts)):
        found: list[int] = []
        for low in range(0, len(texts), size):
            part = texts[low : low + size]
            batch = {"text": part, "row": list(range(low, low + len(part)))}
            found += lookup(batch)["duplicate_of"].tolist()
        assert found == expected
    assert [row for row, of in enumerate(found) if of >= 0] == [20, 37, 38]


@pytest.mark.parametrize("own", [None, "row"])
def test_a_null_has_no_neighbours_and_is_none(
    tmp_path: Path, tiny_encoder: Path, texts: list[str], own: str | None
) -> None:
    index, holed = tmp_path / "texts.knn", [texts[0], None, texts[1], None, texts[0]]
    build_index(holed, index, embedder=str(tiny_encoder))
    lookup = neighbours(index, tiny_encoder, own=own, k=2, duplicate=0.999999)
    found = lookup({"text": holed, "row": range(5)})
    assert found["duplicate_of"].tolist() == ([-1, -1, -1, -1, 0] if own else [0, -1, 2, -1, 0])
    for row in (1, 3):
        assert found["neighbours"][row].tolist() == [-1, -1]
        assert np.isnan(found["cosines"][row]).all()
    assert not np.isin(found["neighbours"][[0, 2, 4]], [1, 3]).any()


def test_a_foreign_text_finds_its_nearest(
    tmp_path: Path, tiny_encoder: Path, texts: list[str]
) -> None:
    index = tmp_path / "texts.knn"
    build_index(texts, index, embedder=str(tiny_encoder))
    lookup = pickle.loads(pickle.dumps(neighbours(index, tiny_encoder, k=2)))
    found = lookup({"text": [texts[5], texts[30]]})
    assert found["neighbours"].shape == found["cosines"].shape == (2, 2)
    assert found["neighbours"][:, 0].tolist() == [5, texts.index(texts[30])]
    assert found["duplicate_of"].tolist() == [5, texts.index(texts[30])]


def test_a_wrong_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"duplicate must be in \(0, 1\], got 2"):
        NearestNeighbours(tmp_path / "no.knn", duplicate=2)
