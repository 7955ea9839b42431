"""The end of a run: selection, the outputs, the manifest and the report."""

from __future__ import annotations

import platform
import resource
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import robustft
from robustft.config import CleanConfig
from robustft.corpus import Corpus
from robustft.decisions import select
from robustft.detection import Conclusion
from robustft.embedding import TextEmbedder
from robustft.engines import Abilities, Engine
from robustft.engines.encoding import cuts_told
from robustft.exchange import exchange
from robustft.next_steps import to_train_and_evaluate
from robustft.outputs import METHOD, command, identity, read_manifest, write_manifest
from robustft.records import RecordSource
from robustft.report.run import write_run_report
from robustft.second_opinions import SecondOpinions
from robustft.shards import Published, Shard
from robustft.store import Stopwatch, Store
from robustft.terminal import counted, plural_of
from robustft.verdicts import CleanResult, write_outputs

_PACKAGES = ("torch", "transformers", "triton", "numpy", "tokenizers", "safetensors")

_PHASES = ("detected", "relabeled")
# Stages whose time the store has; of the split, that of those which were taken back.
_TIMED = ("detect", "split", "folds", "relabel")


@dataclass(frozen=True, slots=True)
class Models:
    """Who was asked, as the manifest names it."""

    engine: str
    model: str
    revision: str
    embedder: str
    small_embedded_model: bool
    abilities: Abilities

    @classmethod
    def of(cls, engine: Engine, embedder: TextEmbedder) -> Models:
        """The names of loaded models."""
        names = engine.name, engine.model_id, engine.revision, embedder.model_id
        return cls(*names, engine.embedded, engine.abilities)

    def identity(self) -> dict[str, str]:
        """What a resumed run must share with the run it resumes."""
        return {"model": f"{self.model}@{self.revision}", "embedder": self.embedder}


def seconds_before(store: Store, target: Path) -> dict[str, float]:
    """What earlier sessions of a run have spent, by stage; `target`: where its split is published.

    To be asked for once the models are loaded, before a phase begins.
    """
    spent = Counter({stage: store.seconds(stage) for stage in ("load", *_TIMED)})
    if target.is_dir():
        spent.update(Published(target).facts.get("stage_seconds", {}))
    return dict(spent)


def finish(
    config: CleanConfig,
    source: RecordSource,
    parts: Iterator[tuple[Shard, Store]],
    corpus: Corpus,
    conclusion: Conclusion,
    models: Models,
    watch: Stopwatch,
    spent: Mapping[str, float] | None = None,
) -> CleanResult:
    """Select, write every output, and say what was done.

    `parts` gives every shard, all of which have relabeled, with its store, in input order;
    `spent` is what `seconds_before` said, None for shards that are merged.
    """
    writing = Stopwatch()
    shards: list[Shard] = []
    totals: dict[str, Counter[str]] = {}
    seconds = Counter({"detect": 0.0, **conclusion.stage_seconds, "relabel": 0.0})

    def noted() -> Iterator[tuple[Shard, Store]]:
        for shard, store in parts:
            shards.append(shard)
            for expert, cost in store.totals().items():
                totals.setdefault(expert, Counter()).update(cost)
            seconds.update({stage: took for stage in _TIMED if (took := store.seconds(stage))})
            yield shard, store

    selection = select(config, corpus.shards, conclusion)
    result = write_outputs(config, source, noted(), corpus, conclusion, selection)
    truncated = sum(
        Published(shard.phase(phase)).facts["truncated"] for shard in shards for phase in _PHASES
    )
    stages: dict[str, float] = {**seconds, "write": writing.seconds()}
    result.counts["rejected"] = corpus.intake.rejects
    result.counts["input"] = corpus.intake.records + corpus.intake.rejects
    _warn(result, config, conclusion, models, truncated, alone=shards[0].of == 1)
    total = watch.seconds()
    if spent is not None:  # whatever was no other stage: reading the input, loading the models
        result.earlier = sum(spent.values())
        rest = total + result.earlier - sum(stages.values())
        stages = {"load": max(rest, 0.0), **stages}
    result.seconds = {name: round(value, 3) for name, value in stages.items()}
    result.seconds["total"] = round(total, 3)
    if result.left and not result.powerless:
        result.next_steps = to_train_and_evaluate(
            result.cleaned, config.out, config.engine, config.schema
        )
    # An earlier session's would be stale: another --beta keeps other records.
    if read_manifest(config.out).get("dataset_info"):
        config = replace(config, dataset_info=True)
    manifest = _manifest(config, result, models, totals, source.content_hash)
    write_manifest(config.out, manifest)
    if config.dataset_info:  # only now: the manifest is what tells that these files are ours
        exchange(source, result.cleaned, left=result.left)
    write_run_report(config, result, manifest, source.called)
    return result


def _warn(
    result: CleanResult,
    config: CleanConfig,
    conclusion: Conclusion,
    models: Models,
    truncated: int,
    *,
    alone: bool,
) -> None:
    """Tell what the user should know of the result; `alone`: the run has one shard."""
    for warning in conclusion.warnings:
        result.warn(warning)
    for letter in vanished(result.answers_before, result.answers_after):
        before, after = result.answers_before[letter], result.answers_after[letter]
        result.warn(left_the_set(letter, before, after, config))
    if not models.abilities.choose and config.experts.choice == "likelihood":
        result.warn(
            "the engine gives no probabilities of given words: lettered answers, checker and "
            "reviewer were read from generated text"
        )
    if result.cut_off:
        result.warn(
            f"{counted(result.cut_off, 'reply', 'replies')} did not end within --answer-tokens "
            f"{config.experts.answer_tokens} and {plural_of(result.cut_off, 'counts', 'count')} as "
            "no answer; raise it"
        )
    if truncated:
        result.warn(cuts_told(truncated))
    if result.unanswered:
        # What shards have built on together stays.
        again = "; the same command asks those questions again" if alone else ""
        result.warn(
            f"{counted(result.unanswered, 'record')} got no reply from the engine on some question "
            f"(verdicts.jsonl says why){again}"
        )


def vanished(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """Answers of at least five records that lost three quarters of their share."""
    share = sum(after.values()) / max(sum(before.values()), 1)
    return [
        answer
        for answer, count in sorted(before.items())
        if count >= 5 and after.get(answer, 0) < share * count / 4
    ]


def left_the_set(answer: str, before: int, after: int, config: CleanConfig) -> str:
    """The warning about an answer that `vanished`; what keeps more of it, where anything does."""
    # Where nothing is selected, its records have a new answer: no share keeps more of them.
    selected = config.beta < 1 and "selection" not in config.without
    return (
        f"answer {answer} has all but left the training set: {counted(before, 'record')} before, "
        f"{after:,} after; verdicts.jsonl says why{', --beta 1 keeps more' if selected else ''}"
    )


def _manifest(
    config: CleanConfig,
    result: CleanResult,
    models: Models,
    totals: dict[str, Counter[str]],
    content_hash: str,
) -> dict[str, Any]:
    versions = {"robustft": robustft.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # ru_maxrss is in KiB
    return {
        **identity(config, METHOD, content_hash),
        "command": command(),
        "dataset_info": config.dataset_info,
        "versions": versions,
        "platform": platform.platform(),
        "models": asdict(models),
        "second_opinions": SecondOpinions(config.second_opinion).models,
        "counts": dict(result.counts),
        "unanswered": result.unanswered,
        "warnings": result.warnings,
        "crowd_weights": result.weights,
        "powerless": result.powerless,
        "noise_rate": result.noise_rate,
        "expected_precision": result.expected_precision,
        "confusions": result.confusions,
        "threshold_nll": result.threshold,
        "agreed_with_given": {
            name: count for (name, what), count in result.tallies.items() if what == "agreed"
        },
        "seconds": result.seconds,
        "experts": totals,
        "peak_memory_bytes": peak,
    }
