"""Cleaned data through a datatrove pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commandline import read

pytestmark = pytest.mark.integration
pytest.importorskip("datatrove")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [line for path in sorted(folder.rglob("*.jsonl")) for line in read(path)]


def test_cleaned_records_stream_through(cleaned: Path, tiny_model: Path, tmp_path: Path) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    from robustft.integrations.datatrove_step import ResponseFilter, from_messages

    source = read(cleaned / "messages.jsonl")
    median = 8.0
    # Two tasks in two processes: the step is pickled, each worker loads the model.
    for part in range(2):
        (tmp_path / "in").mkdir(exist_ok=True)
        chosen = source[part::2]
        (tmp_path / f"in/{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in chosen))
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(tmp_path / "in"), adapter=from_messages),
            ResponseFilter(
                str(tiny_model), device="cpu", max_nll=median, batch_size=16,
                exclusion_writer=JsonlWriter(str(tmp_path / "dropped"), compression=None),
            ),
            JsonlWriter(str(tmp_path / "kept"), compression=None),
        ],
        tasks=2, workers=2, logging_dir=str(tmp_path / "logs"),
    ).run()  # fmt: skip
    kept, dropped = lines(tmp_path / "kept"), lines(tmp_path / "dropped")
    assert sorted(str(line["id"]) for line in [*kept, *dropped]) == sorted(r["id"] for r in source)
    assert kept
    assert dropped
    answers = {r["id"]: r["messages"][-1]["content"] for r in source}
    for line in kept:
        assert line["text"] == answers[line["id"]]
        assert line["metadata"]["response_nll"] <= median
    assert all(line["metadata"]["response_nll"] > median for line in dropped)
    assert {line["metadata"]["filter_reason"] for line in dropped} == {"unlikely"}


def test_an_empty_document_leaves_the_mean_as_it_is(tiny_model: Path) -> None:
    from datatrove.data import Document

    from robustft.integrations.datatrove_step import ResponseFilter

    step = ResponseFilter(str(tiny_model), device="cpu")
    full, empty = (Document(text=text, id=text) for text in ("four, I believe", ""))
    assert step.filter_batch([full, empty]) == [True, True]
    nll = step.stats.stats["nll"]
    assert (nll.n, nll.mean) == (1, full.metadata["response_nll"])
