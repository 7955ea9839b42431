"""`robustft clean`, and what else ends in its outputs: `merge` and `demo`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import robustft
from robustft.cli.console import (
    print_announcement,
    print_baseline_summary,
    print_clean_summary,
    print_shard_summary,
    tell_small_model,
)
from robustft.cli.options import build_parser
from robustft.cli.settings import config_of, engine_config, optional_path, parse
from robustft.cli.status import DONE, POWERLESS
from robustft.config import CleanConfig, ExpertConfig, TunedConfig, experts_for
from robustft.errors import UserError


def run_clean(options: argparse.Namespace) -> int:
    """`robustft clean`; the exit status."""
    from robustft.remote import is_remote, output_folder

    many = options.ray or options.shard or options.processes > 1 or options.gpus > 1
    if options.shard and options.truth:
        raise UserError("--truth belongs to robustft merge, which writes the outputs of all shards")
    if is_remote(options.out) and many:
        raise UserError(
            f"--out {options.out}: shards work in a folder that all of them share; choose one on a "
            "mounted file system"
        )
    exchange, writes = options.dataset_info, not options.estimate
    with output_folder(options.out, options.input, exchange=exchange, writes=writes) as folder:
        options.out = str(folder)
        return _clean_into_folder(options)


def _clean_into_folder(options: argparse.Namespace) -> int:
    from robustft import cleaning
    from robustft.tuned import refuse_folds

    config = _clean_config(options)
    if options.truth:
        from robustft.truth import check

        check(options.truth, cleaning.open_source(config), config.schema)
    if options.method != "robustft":
        from robustft.methods import clean_by

        refuse_folds(config, f"--method {options.method}")
        _refuse_options_of_robustft(options)
        result = clean_by(options.method, config)
        print_baseline_summary(result, options.method, _compared(result, options))
        tell_small_model(config.engine)
        return DONE
    if options.estimate:
        from robustft.estimating import estimate

        count = max(options.processes, options.gpus)
        print(estimate(config, shards=count * (options.shard[1] if options.shard else 1)))
        if config.tuned.folds:
            print("not counted   the training of --folds")
        if config.learners:
            print("not counted   fitting the crowd's learners, where records share their options: "
                  "about 3 s for every 1,000 records, 2 minutes at most")  # fmt: skip
        return DONE
    if options.ray or options.shard or options.processes > 1 or options.gpus > 1:
        refuse_folds(config, "shards")
        return (_run_ray if options.ray else _run_shards)(options, config)
    return _conclude(cleaning.run_clean(config, announce=print_announcement), options)


# What means something to --method robustft alone.
_ITS_OWN = (
    "detector", "second_opinion", "beta", "without", "retriever", "rounds", "samples",
    "reasoning_tokens", "estimate", "shard", "processes", "gpus", "ray",
)  # fmt: skip


def _refuse_options_of_robustft(options: argparse.Namespace) -> None:
    defaults = build_parser().commands["clean"]
    for name in _ITS_OWN:
        if getattr(options, name) not in (defaults.get_default(name), []):
            raise UserError(
                f"--{name.replace('_', '-')} belongs to --method robustft, not to "
                f"{options.method}: leave it out"
            )


def _conclude(result: Any, options: argparse.Namespace) -> int:
    """Print what was done; the exit status."""
    print_clean_summary(result, _compared(result, options))
    return POWERLESS if result.powerless else DONE


def _compared(result: Any, options: argparse.Namespace) -> str:
    """The verdicts beside the truth, where that is given."""
    from robustft.truth import compare

    if not options.truth:
        return ""
    return str(compare(result.out, options.truth, getattr(options, "schema", None)))


def _run_shards(options: argparse.Namespace, config: CleanConfig) -> int:
    from robustft.distributed import merge, run_shard
    from robustft.distributed.processes import require_gpus, run_processes
    from robustft.store import Stopwatch

    count, pinned = max(options.processes, options.gpus), options.gpus > 1
    if pinned:
        require_gpus(options.gpus)
    if count > 1:
        watch = Stopwatch()
        run_processes(options.arguments, options.shard or (0, 1), count, pinned=pinned)
        if options.shard:
            return DONE
        result = merge([config.out], second_opinion=config.second_opinion, watch=watch)
        return _conclude(result, options)
    missing = run_shard(config, *options.shard, wait=options.wait, announce=print_announcement)
    print_shard_summary(options.shard, missing, config)
    return DONE


def _run_ray(options: argparse.Namespace, config: CleanConfig) -> int:
    from robustft.distributed.raycluster import run_ray

    if options.shard:
        raise UserError("--shard does not go with --ray, which makes shards of its own")
    address = None if options.ray == "local" else options.ray
    count = max(options.processes, options.gpus)
    actors = count if count > 1 else None
    return _conclude(run_ray(config, address, actors, announce=print_announcement), options)


def run_merge(options: argparse.Namespace) -> int:
    """`robustft merge`; the exit status."""
    from robustft.distributed import config_of_shards, merge

    folders = list(map(Path, options.folders))
    if options.truth:
        from robustft.truth import check

        options.schema = config_of_shards(folders[0]).schema
        check(options.truth, schema=options.schema)
    result = merge(
        folders, optional_path(options.out), data=options.input,
        second_opinion=options.second_opinion,
    )  # fmt: skip
    return _conclude(result, options)


def _clean_config(options: argparse.Namespace) -> CleanConfig:
    from robustft.models import is_small

    engine = engine_config(options)
    experts = {field.name: getattr(options, field.name) for field in fields(ExpertConfig)}
    return config_of(
        CleanConfig,
        options,
        out=Path(options.out),
        without=frozenset(options.without),
        second_opinion=tuple(options.second_opinion),
        engine=engine,
        experts=experts_for(is_small(engine), **experts),
        tuned=config_of(TunedConfig, options, folds=options.folds or 0),
    )


def run_demo(options: argparse.Namespace) -> int:
    """`robustft demo`: clean the bundled corpus; the exit status."""
    defaults = parse(
        ["clean", str(demo_corpus()), "--out", options.out, "--reasoning-tokens", "48",
         "--rounds", "1", "--truth", str(demo_corpus().with_suffix(".truth.jsonl"))]
    )  # fmt: skip
    return run_clean(defaults)


def demo_corpus() -> Path:
    """The bundled example corpus: messages to a help desk, 30 % of their labels wrong."""
    return Path(robustft.__file__).parent / "data" / "demo.jsonl"
