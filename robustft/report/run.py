"""From a finished cleaning run to the data its report is drawn from."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from robustft.config import CleanConfig, by_option
from robustft.prompts import LETTERS
from robustft.report import write_report
from robustft.report.data import (
    Counts,
    ExpertRow,
    Histogram,
    ModelRow,
    NeighbourRow,
    Opinion,
    ReportData,
    Suspect,
)
from robustft.verdicts import CleanResult, Judged

_SMALL = "a small model that the package carries: good for a first look, not for real verdicts"
_FILES = {
    "cleaned": "the training set: same schema and field order as the input",
    "verdicts.jsonl": "one line a record: verdict, score, action, experts, neighbours, reason",
    "rejects.jsonl": "input records that could not be read, with the reason",
    "manifest.json": "command, versions, models, counts, seconds, tokens",
    "run.sqlite": "every opinion of every expert; a resumed run asks nothing twice",
}
_EXCHANGE = {
    "messages.jsonl": "the training set as chat turns, for TRL, Axolotl, torchtune",
    "dataset_info.json": "what LLaMA-Factory must know to read it",
}


def write_run_report(
    config: CleanConfig, result: CleanResult, manifest: dict[str, Any], called: str = ""
) -> None:
    """Write `report.html` of a finished run; `called` as in `RecordSource`."""
    counts = result.counts
    small = _SMALL if manifest["models"]["small_embedded_model"] else ""
    models = manifest["models"]
    revision = "" if models["revision"] == "local" else models["revision"]  # the embedded one
    top = max(
        (float(values.max()) for values in (result.kept_nll, result.dropped_nll) if len(values)),
        default=1.0,
    )
    shared = next(iter(result.options)) if len(result.options) == 1 else ()
    texts = {letter: f" {text}" for letter, text in zip(LETTERS, shared, strict=False)}
    described = _FILES | (_EXCHANGE if config.dataset_info else {})
    files = {
        (result.cleaned.name if name == "cleaned" else name): described[name] for name in described
    }
    program, *arguments = manifest["command"]
    if Path(program).name == "robustft":  # wherever it lies here
        program = "robustft"
    data = ReportData(
        source=config.input,
        command=shlex.join((program, *arguments)),
        version=manifest["versions"]["robustft"],
        finished=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        counts=Counts(**{name: counts[name] for name in Counts.__dataclass_fields__}),
        reasons=result.reasons,
        reject_reasons=result.reject_reasons,
        before={f"{name}{texts.get(name, '')}": n for name, n in result.answers_before.items()},
        after={f"{name}{texts.get(name, '')}": n for name, n in result.answers_after.items()},
        scores_clean=Histogram(0.0, 1.0, tuple(result.score_counts[0])),
        scores_noisy=Histogram(0.0, 1.0, tuple(result.score_counts[1])),
        nll_kept=Histogram.of(result.kept_nll.tolist(), 0.0, max(top, 1e-6)),
        nll_dropped=Histogram.of(result.dropped_nll.tolist(), 0.0, max(top, 1e-6)),
        nll_threshold=None if math.isnan(result.threshold) else result.threshold,
        stage_seconds={name: s for name, s in result.seconds.items() if name != "total"},
        experts=_expert_rows(result, manifest["experts"]),
        models=(
            ModelRow("experts", models["model"], revision, small),
            ModelRow("embeddings", models["embedder"]),
        ),
        peak_memory_bytes=manifest["peak_memory_bytes"],
        settings=by_option(manifest["config"]),
        files=files,
        next_steps=result.next_steps,
        warnings=tuple(result.warnings),
        weights={} if result.powerless else result.weights,
        powerless=result.powerless,
        estimate="" if result.powerless else result.estimate,
        called=called,
        confusions=result.confusions,
        suspects=tuple(_suspect(judged) for judged in result.suspicious),
    )
    write_report(config.out / "report.html", data)


def _expert_rows(result: CleanResult, totals: dict[str, dict[str, float]]) -> tuple[ExpertRow, ...]:
    tallies: Counter[tuple[str, str]] = result.tallies
    rows = []
    asked = ("base", "reasoned", "checker", "tuned", "context", "review", *result.others)
    for name in dict.fromkeys((*asked, *result.weights)):
        if tallies[name, "asked"]:
            cost = totals.get(name, {})
            rows.append(
                ExpertRow(
                    name,
                    asked=tallies[name, "asked"],
                    answered=tallies[name, "answered"],
                    agreed=tallies[name, "agreed"],
                    prompt_tokens=int(cost.get("prompt_tokens", 0)),
                    generated_tokens=int(cost.get("new_tokens", 0)),
                    learner=name not in asked,
                )
            )
    return tuple(rows)


def _suspect(judged: Judged) -> Suspect:
    record = judged.record
    return Suspect(
        id=record.id,
        noise_score=judged.detection.noise_score,
        action=judged.action,
        question=record.question,
        given=record.answer,
        answer=None if judged.action == "drop" else judged.answer,
        options=record.options,
        opinions=tuple(
            Opinion(name, said.answer, _finite(said.nll), _finite(said.entropy))
            for name, said in judged.opinions.items()
        ),
        neighbours=tuple(
            NeighbourRow(near.id, cosine, near.question, near.answer)
            for cosine, near in judged.neighbours
        ),
        reason=judged.reason,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
