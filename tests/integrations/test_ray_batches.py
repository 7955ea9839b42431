"""Batch callables in Ray Data's workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustft.integrations.batches import AgreeingAnswers, ResponseScorer

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="ray is not installed ([integrations])")
    ray.init(num_cpus=4, include_dashboard=False, configure_logging=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


def test_scores_come_back_from_an_actor(ray: Any, tiny_model: Path) -> None:
    rows = [{"prompt": f"Question {n}?", "response": f"answer {n}", "row": n} for n in range(20)]
    settings = {"model": str(tiny_model), "device": "cpu", "dtype": "float32"}
    scored = ray.data.from_items(rows).map_batches(
        ResponseScorer, fn_constructor_kwargs=settings, batch_size=8,
        compute=ray.data.ActorPoolStrategy(size=1),
    )  # fmt: skip
    found = {row["row"]: row["response_nll"] for row in scored.take_all()}
    batch = {"prompt": [r["prompt"] for r in rows], "response": [r["response"] for r in rows]}
    here = ResponseScorer(**settings)(batch)["response_nll"]
    np.testing.assert_allclose([found[n] for n in range(20)], here, atol=1e-4)


def test_agreement_in_a_task(ray: Any) -> None:
    rows = [{"answers": ["4", "4.", "five"]}, {"answers": ["a", "b"]}]
    found = ray.data.from_items(rows).map_batches(AgreeingAnswers()).take_all()
    assert sorted(row["majority"] for row in found) == ["4", "a"]
