"""A datatrove filter that scores documents with a language model and drops unlikely ones."""

from __future__ import annotations

import dataclasses
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.disk_base import DiskWriter

from robustft.integrations.batches import ResponseScorer

__all__ = ["ResponseFilter", "from_messages"]


def from_messages(
    reader: Any, data: dict[str, Any], path: str, id_in_file: int | str
) -> dict[str, Any]:
    """Read a line of `messages.jsonl`: an `adapter` for datatrove's `JsonlReader`.

    The last turn becomes the document's text, the turns before it its metadata "prompt".
    """
    *prompt, answer = data["messages"]
    return {
        "text": answer["content"],
        "id": str(data.get("id", f"{path}/{id_in_file}")),
        "metadata": {"prompt": prompt},
    }


class ResponseFilter(BaseFilter):  # type: ignore[misc]
    """Notes the token statistics of every document; drops those above `max_nll`.

    A document's text is the response to its metadata "prompt" (a text, or chat turns; an empty text
    where there is none). Its metadata gain `response_nll`, `response_entropy` and the other columns
    of `robustft.integrations.batches.ResponseScorer`. The model is loaded in the worker, once.

    Args:
        model: hub id, folder or .gguf file; None is the embedded small model.
        max_nll: nats a token (eq. 7 of arXiv 2412.14922) above which a document is dropped; None
            drops nothing.
        batch_size: documents scored together.
        exclusion_writer: gets the dropped documents.
        options: other fields of `robustft.config.EngineConfig`, such as device or dtype.
    """

    name = "robustft response filter"
    _requires_dependencies = ("robustft",)

    def __init__(
        self,
        model: str | None = None,
        *,
        max_nll: float | None = None,
        batch_size: int = 64,
        exclusion_writer: DiskWriter | None = None,
        **options: Any,
    ) -> None:
        super().__init__(exclusion_writer, batch_size)
        self.max_nll = max_nll
        self.scorer = ResponseScorer(model, **options)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Judge one document."""
        return self.filter_batch([doc])[0]

    def filter_batch(self, batch: list[Document]) -> list[bool | tuple[bool, str]]:
        """Judge a batch of documents."""
        prompts = [doc.metadata.get("prompt") or "" for doc in batch]
        scores = self.scorer.score(prompts, [doc.text for doc in batch])
        kept: list[bool | tuple[bool, str]] = []
        for doc, score in zip(batch, scores, strict=True):
            doc.metadata.update(
                {f"response_{name}": value for name, value in dataclasses.asdict(score).items()}
            )
            if score.tokens:  # one NaN would make NaN of the pipeline's mean
                self.stat_update("nll", value=score.nll)
            above = self.max_nll is not None and not score.nll <= self.max_nll
            kept.append((False, "unlikely") if above else True)
        return kept
