"""`clean`: one call from an input file to an output folder, and what is left beside the data."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson
import torch

import robustft
from robustft.config import CleanConfig, EngineConfig, ExpertConfig
from robustft.embedding import Embedder, TextEmbedder
from robustft.engines import Engine
from robustft.engines.factory import load_engine
from robustft.errors import UserError
from robustft.exchange import write_exchange
from robustft.files import atomic_file
from robustft.pipeline import CleanResult, CleanRun, count_records
from robustft.records import RecordSource, open_records, output_name, reopened
from robustft.reporting import write_run_report
from robustft.store import Stopwatch, Store, folder_lock

_PACKAGES = ("torch", "transformers", "triton", "numpy", "tokenizers", "safetensors")


def clean(
    data: str | Path | Iterable[Mapping[str, Any]],
    *,
    out: str | Path,
    model: str | None = None,
    engine: Engine | None = None,
    embedder: TextEmbedder | str | None = None,
    experts: ExpertConfig | None = None,
    **settings: Any,
) -> CleanResult:
    """Clean a noisy SFT corpus: detect, relabel, select (RobustFT, arXiv 2412.14922).

    Parameters
    ----------
    data: a file (JSONL, JSON, CSV, Parquet, .gz, .zst), a hub dataset id, or rows as mappings.
    out: the output folder; a folder with an unfinished run is resumed.
    model: hub id, folder or .gguf file; None is the embedded small model.
    engine: a ready `robustft.engines.Engine` instead of `model`.
    embedder: a sentence-embedding model by name, or a ready one; None is the embedded MiniLM.
    experts, settings: the other fields of `robustft.config.CleanConfig`.

    Raises:
    ------
    UserError (a ValueError) with one clear line where the input or an argument is wrong.
    """
    folder = Path(out)
    if not isinstance(data, str | Path):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "input.jsonl"
        with atomic_file(path) as handle:
            handle.writelines(orjson.dumps(dict(row)) + b"\n" for row in data)
        data = path
    config = CleanConfig(
        input=str(data),
        out=folder,
        engine=EngineConfig(model=model),
        embedder=embedder if isinstance(embedder, str) else None,
        experts=experts or ExpertConfig(),
        **settings,
    )
    ready = None if isinstance(embedder, str) else embedder
    return run_clean(config, engine=engine, embedder=ready)


@dataclass(frozen=True, slots=True)
class Announcement:
    """What is known before the first question is asked."""

    records: int
    rejects: int
    model: str
    embedder: str
    small_models: bool
    resumed: bool


def run_clean(
    config: CleanConfig,
    *,
    engine: Engine | None = None,
    embedder: TextEmbedder | None = None,
    announce: Callable[[Announcement], None] = lambda announcement: None,
) -> CleanResult:
    """Run `config` from the input file to the report; see `clean` for errors."""
    watch = Stopwatch()
    source = open_records(
        config.input, schema=config.schema, limit=config.limit, split=config.split
    )
    total, rejects, first = count_records(source)
    if total == 0:
        why = f"; line {first.line}: {first.reason}" if first else ""
        raise UserError(f"{config.input}: no readable record ({rejects} rejected{why})")
    _refuse_overwriting(config, source)
    if config.threads:
        torch.set_num_threads(min(config.threads, os.cpu_count() or 1))
    with folder_lock(config.out), Store(config.out / "run.sqlite") as store:
        identity = config.fingerprint() | {"input": source.content_hash}
        del identity["engine.batch_tokens"]  # a run that died for memory may go on with fewer
        resumed = store.holds(identity)
        engine = engine or load_engine(config.engine)
        embedder = embedder or Embedder(config.embedder)
        models = {"model": f"{engine.model_id}@{engine.revision}", "embedder": embedder.model_id}
        store.claim(models, name="models")
        # Only now: a run that failed for a wrong --model or --device leaves the folder free.
        store.claim(identity)
        announce(
            Announcement(
                total, rejects, engine.model_id, embedder.model_id,
                bool(getattr(engine, "embedded", False)), resumed,
            )
        )  # fmt: skip
        run = CleanRun(config, source, engine, embedder, store)
        result = run.execute(total)
        result.counts["rejected"] = rejects
        result.counts["input"] = total + rejects
        if truncated := getattr(engine, "truncated", 0):
            result.warn(f"{truncated} prompts exceeded the model's window and lost their middle")
        if config.dataset_info and result.counts["keep"] + result.counts["relabel"]:
            write_exchange(reopened(source, result.cleaned), config.out)
        result.seconds["total"] = round(watch.seconds(), 3)
        manifest = _manifest(config, result, store, engine, embedder, source.content_hash)
        with atomic_file(config.out / "manifest.json") as handle:
            handle.write(orjson.dumps(manifest, option=orjson.OPT_INDENT_2) + b"\n")
        write_run_report(config, result, manifest)
    return result


def _refuse_overwriting(config: CleanConfig, source: RecordSource) -> None:
    """No output may land on the input, nor among the files of an input folder."""
    given, out = Path(config.input).resolve(), config.out.resolve()
    if given.is_dir() and out.is_relative_to(given):
        raise UserError(f"{config.out}: lies in the input folder; choose another --out")
    if given in {out / output_name(source), out / "verdicts.jsonl", out / "rejects.jsonl"}:
        raise UserError(f"{config.input}: would be overwritten; choose another --out")


def _manifest(
    config: CleanConfig,
    result: CleanResult,
    store: Store,
    engine: Engine,
    embedder: TextEmbedder,
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
        "command": sys.argv,
        "config": config.fingerprint(),
        "input": {"path": config.input, "blake2b": content_hash},
        "versions": versions,
        "platform": platform.platform(),
        "models": {
            "engine": engine.name,
            "model": engine.model_id,
            "revision": engine.revision,
            "embedder": embedder.model_id,
            "small_embedded_model": bool(getattr(engine, "embedded", False)),
        },
        "counts": dict(result.counts),
        "warnings": result.warnings,
        "crowd_weights": result.weights,
        "powerless": result.powerless,
        "threshold_nll": result.threshold,
        "agreed_with_given": {
            name: count for (name, what), count in result.tallies.items() if what == "agreed"
        },
        "seconds": result.seconds,
        "experts": store.totals(),
        "peak_memory_bytes": peak,
    }
