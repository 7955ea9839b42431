"""The command line: `robustft clean | merge | train | eval | score | corrupt | …`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import robustft
from robustft.errors import UnfinishedError, UserError
from robustft.terminal import printable

if TYPE_CHECKING:
    from robustft.config import EngineConfig

_DONE, _OTHER, _USER, _POWERLESS, _UNFINISHED, _INTERRUPTED = 0, 1, 2, 3, 4, 130
_TERMINATED = 143  # as a shell tells SIGTERM
_RESUMABLE = {"clean", "demo", "eval", "reproduce", "score", "train"}  # with --out

# --- commands ------------------------------------------------------------------------------


def _engine_config(options: argparse.Namespace) -> EngineConfig:
    from robustft.config import EngineConfig

    given = vars(options)
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    return EngineConfig(**{name: given[name] for name in names & given.keys()})


def _tell_small_model(engine: EngineConfig) -> None:
    """Beside a result: what it is worth, where the default model made it."""
    from robustft.cli.console import print_small_model
    from robustft.models import DEFAULT_MODEL

    if engine.engine != "openai" and engine.model in (None, DEFAULT_MODEL):
        print_small_model()


def _run_clean(options: argparse.Namespace) -> int:
    from robustft.remote import is_remote, output_folder

    many = options.ray or options.shard or options.processes > 1 or options.gpus > 1
    if is_remote(options.out) and many:
        raise UserError(
            f"--out {options.out}: shards work in a folder that all of them share; choose one on a "
            "mounted file system"
        )
    with output_folder(options.out, options.input, exchange=options.dataset_info) as folder:
        options.out = str(folder)
        return _clean_into_folder(options)


def _clean_into_folder(options: argparse.Namespace) -> int:
    from robustft.cleaning import run_clean
    from robustft.cli.console import (
        print_announcement,
        print_baseline_summary,
    )
    from robustft.tuned import refuse_folds

    config = _clean_config(options)
    if options.truth:
        from robustft.truth import check

        check(options.truth)
    if options.method != "robustft":
        from robustft.methods import clean_by

        refuse_folds(config, f"--method {options.method}")
        _refuse_options_of_robustft(options)
        result = clean_by(options.method, config)
        print_baseline_summary(result, options.method)
        _tell_small_model(config.engine)
        _print_truth(result, options)
        return _DONE
    if options.estimate:
        from robustft.estimating import estimate

        print(estimate(config))
        if config.tuned.folds:
            print("not counted   the training of --folds")
        if config.detector == "crowd":
            print("not counted   fitting the crowd's learners, where records share their options: "
                  "about 3 s for every 1,000 records, 2 minutes at most")  # fmt: skip
        return _DONE
    if options.ray or options.shard or options.processes > 1 or options.gpus > 1:
        refuse_folds(config, "shards")
        return (_run_ray if options.ray else _run_shards)(options, config)
    return _conclude(run_clean(config, announce=print_announcement), options)


# What means something to --method robustft alone.
_ITS_OWN = (
    "detector", "beta", "without", "retriever", "rounds", "samples", "reasoning_tokens", "estimate",
    "shard", "processes", "gpus", "ray",
)  # fmt: skip


def _refuse_options_of_robustft(options: argparse.Namespace) -> None:
    from robustft.cli.options import build_parser

    defaults = build_parser().commands["clean"]
    for name in _ITS_OWN:
        if getattr(options, name) not in (defaults.get_default(name), []):
            raise UserError(
                f"--{name.replace('_', '-')} belongs to --method robustft, not to "
                f"{options.method}: leave it out"
            )


def _conclude(result: Any, options: argparse.Namespace) -> int:
    """Print what was done; the exit status."""
    from robustft.cli.console import print_clean_summary

    print_clean_summary(result)
    _print_truth(result, options)
    return _POWERLESS if result.powerless else _DONE


def _print_truth(result: Any, options: argparse.Namespace) -> None:
    from robustft.records import open_records
    from robustft.truth import compare

    if getattr(options, "truth", None):  # `merge` has no such option
        source = open_records(
            options.input, schema=options.schema, limit=options.limit, split=options.split
        )
        print(compare(result.out, options.truth, source))


def _run_shards(options: argparse.Namespace, config: Any) -> int:
    from robustft.cli.console import print_shard_summary
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
            return _DONE
        return _conclude(merge([config.out], watch=watch), options)
    missing = run_shard(config, *options.shard, wait=options.wait)
    print_shard_summary(options.shard, missing, config)
    return _DONE


def _run_ray(options: argparse.Namespace, config: Any) -> int:
    from robustft.distributed.raycluster import run_ray

    if options.shard:
        raise UserError("--shard does not go with --ray, which makes shards of its own")
    address = None if options.ray == "local" else options.ray
    count = max(options.processes, options.gpus)
    return _conclude(run_ray(config, address, count if count > 1 else None), options)


def _run_merge(options: argparse.Namespace) -> int:
    from robustft.distributed import merge

    out = None if options.out is None else Path(options.out)
    return _conclude(merge(list(map(Path, options.folders)), out, data=options.input), options)


def _clean_config(options: argparse.Namespace) -> Any:
    from robustft.config import CleanConfig, ExpertConfig, TunedConfig

    return CleanConfig(
        input=options.input,
        out=Path(options.out),
        schema=options.schema,
        split=options.split,
        limit=options.limit,
        seed=options.seed,
        detector=options.detector,
        k=options.k,
        beta=options.beta,
        without=frozenset(options.without),
        embedder=options.embedder,
        retriever=options.retriever,
        threads=options.threads,
        dataset_info=options.dataset_info,
        engine=_engine_config(options),
        experts=ExpertConfig(
            rounds=options.rounds,
            samples=options.samples,
            reasoning_tokens=options.reasoning_tokens,
            answer_tokens=options.answer_tokens,
            choice=options.choice,
            calibrate=options.calibrate,
        ),
        tuned=TunedConfig(
            folds=options.folds or 0,
            epochs=options.fold_epochs,
            learning_rate=options.fold_learning_rate,
            batch_size=options.fold_batch_size,
            top_layers=options.fold_top_layers,
        ),
    )


def _run_demo(options: argparse.Namespace) -> int:
    from robustft.cli.settings import parse

    defaults = parse(
        ["clean", str(demo_corpus()), "--out", options.out, "--reasoning-tokens", "48",
         "--rounds", "1", "--truth", str(demo_corpus().with_suffix(".truth.jsonl"))]
    )  # fmt: skip
    return _run_clean(defaults)


def demo_corpus() -> Path:
    """The bundled example corpus: messages to a help desk, 30 % of their labels wrong."""
    return Path(robustft.__file__).parent / "data" / "demo.jsonl"


def _run_score(options: argparse.Namespace) -> int:
    from robustft.scoring import score_file

    config = _engine_config(options)
    summary = score_file(
        options.input, Path(options.out), config,
        schema=options.schema, limit=options.limit, split=options.split,
    )  # fmt: skip
    print(summary)
    _tell_small_model(config)
    return _DONE


def _run_corrupt(options: argparse.Namespace) -> int:
    from robustft.corruption import corrupt
    from robustft.records import open_records

    source = open_records(
        options.input, schema=options.schema, limit=options.limit, split=options.split
    )
    report = corrupt(source, options.rate, options.seed, Path(options.out))
    print(report)
    return _DONE


def _run_train(options: argparse.Namespace) -> int:
    from robustft.config import TrainConfig
    from robustft.training import train

    config = TrainConfig(
        input=options.input,
        out=Path(options.out),
        schema=options.schema,
        split=options.split,
        limit=options.limit,
        engine=_engine_config(options),
        epochs=options.epochs,
        steps=options.steps,
        learning_rate=options.learning_rate,
        rank=options.rank,
        batch_size=options.batch_size,
        cutoff=options.cutoff,
        top_layers=options.top_layers,
        seed=options.seed,
        report_to=tuple(options.report_to),
    )
    print(train(config))
    _tell_small_model(config.engine)
    return _DONE


def _run_eval(options: argparse.Namespace) -> int:
    from robustft.config import EvalConfig
    from robustft.evaluation import evaluate

    config = EvalConfig(
        input=options.input,
        schema=options.schema,
        split=options.split,
        limit=options.limit,
        adapter=None if options.adapter is None else Path(options.adapter),
        out=None if options.out is None else Path(options.out),
        engine=_engine_config(options),
    )
    print(evaluate(config))
    _tell_small_model(config.engine)
    return _DONE


def _run_reproduce(options: argparse.Namespace) -> int:
    from robustft.config import ReproduceConfig
    from robustft.reproduction.grid import reproduce

    config = ReproduceConfig(
        what=options.what,
        out=Path(options.out),
        data=options.data,
        tasks=options.tasks,
        noise=options.noise,
        methods=options.methods,
        models=options.models,
        seeds=options.seeds,
        limit=options.limit,
        test_limit=options.test_limit,
        hermes=options.hermes,
        tulu=options.tulu,
        rephrasings=None if options.rephrasings is None else Path(options.rephrasings),
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        top_layers=options.top_layers,
        rounds=options.rounds,
        reasoning_tokens=options.reasoning_tokens,
        dry_run=options.dry_run,
        share=options.share,
        embedder=options.embedder,
        engine=_engine_config(options),
    )
    print(reproduce(config))
    return _DONE


_BENCH_OPTIONS = {
    "vllm-python": ("pipeline",),
    "only": ("token-stats", "token-gradients", "linear-token-stats"),
    "data": ("score",),
    "model": ("score",),
}


def _run_bench(options: argparse.Namespace) -> int:
    import importlib

    module = importlib.import_module("robustft.benchmarks." + options.what.replace("-", "_"))
    arguments = ["--quick"] if options.quick else []
    arguments += ["--out", options.out] if options.out else []
    for name, owners in _BENCH_OPTIONS.items():
        value = getattr(options, name.replace("-", "_"))
        if value is not None:
            if options.what not in owners:
                owner = ", ".join(owners)
                raise UserError(f"--{name} belongs to bench {owner}, not to {options.what}")
            arguments += [f"--{name}", value]
    return int(module.main(arguments) or _DONE)


# --- entry ---------------------------------------------------------------------------------

_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _run_demo,
    "clean": _run_clean,
    "merge": _run_merge,
    "train": _run_train,
    "eval": _run_eval,
    "score": _run_score,
    "corrupt": _run_corrupt,
    "reproduce": _run_reproduce,
    "bench": _run_bench,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. `arguments` are those of the process by default."""
    from robustft.cli.options import build_parser
    from robustft.cli.settings import parse

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments:
        build_parser().print_help(sys.stderr)
        return _USER
    command, verbose, resumable = "", False, False
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may hold what its encoding does not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        options = parse(arguments)
        options.arguments = arguments
        command, verbose = options.command, options.verbose
        estimates = getattr(options, "estimate", False)
        resumable = command in _RESUMABLE and options.out is not None and not estimates
        for name in ("input", "out"):  # a shell variable that is not set, most likely
            if getattr(options, name, None) == "":
                raise UserError(f"{'--' * (name == 'out')}{name}: expected a path, found nothing")
        if command not in ("clean", "demo"):
            _refuse_remote(getattr(options, "out", None))
        _refuse_missing(getattr(options, "input", None))
        said = _Stdout(sys.stdout)
        with _logging(verbose), _ended_by_sigterm(), contextlib.redirect_stdout(said):
            status = _COMMANDS[command](options)
            said.flush()
        if said.lost is not None and not isinstance(said.lost, BrokenPipeError):
            return _fail(_OTHER, f"stdout: {said.lost.strerror}; all but the words is done")
    except UnfinishedError as error:
        return _fail(_UNFINISHED, str(error))
    except UserError as error:
        return _fail(_USER, str(error))
    except KeyboardInterrupt as error:
        after = "run the same command again to resume" if resumable else "no output was written"
        if isinstance(error, _TerminatedError):
            return _fail(_TERMINATED, f"terminated; {after}")
        return _fail(_INTERRUPTED, f"interrupted; {after}")
    except Exception as error:
        if verbose:
            raise
        return _fail(_OTHER, _unexpected(error, resumable=resumable))
    return status


def _refuse_remote(out: str | None) -> None:
    from robustft.remote import is_remote

    if out is not None and is_remote(out):
        raise UserError(f"--out {out}: only clean writes to such addresses; name a local path")


def _refuse_missing(path: str | None) -> None:
    """Raise UserError for an input that is not there, before the seconds that importing takes."""
    from robustft.records.sources import find
    from robustft.remote import is_remote

    if path is not None and not is_remote(path):
        find(Path(path), path)


@contextlib.contextmanager
def _logging(verbose: bool) -> Iterator[None]:
    """Warnings of robustft always reach stderr; what the libraries say only with --verbose."""
    logger = logging.getLogger(None if verbose else "robustft")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{'%(name)s' if verbose else 'robustft'}: %(message)s"))
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            if not verbose:
                warnings.simplefilter("ignore")
                for library in ("TRANSFORMERS", "HF_HUB", "DATASETS"):
                    os.environ.setdefault(f"{library}_VERBOSITY", "error")
                for name in ("transformers", "huggingface_hub", "datasets", "torch"):
                    logging.getLogger(name).setLevel(logging.ERROR)
            yield
    finally:
        logger.removeHandler(handler)


def _unexpected(error: Exception, *, resumable: bool) -> str:
    """One line for an error that no check foresaw."""
    first = (str(error).strip().splitlines() or ["no message"])[0]
    kept = "; what is finished is kept, the same command resumes" if resumable else ""
    return f"{type(error).__name__}: {first} (--verbose shows more){kept}"


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, as Slurm and Kubernetes send it: handled wherever Ctrl-C is."""


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    def end(*_: object) -> None:
        raise _TerminatedError

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread
        before = None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


class _Stdout:
    """Standard output whose reader may leave or whose disk may fill: the work goes on.

    `lost` says why words were lost, where they were.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or remember why not."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, or remember why not."""
        self._try(self._stream.flush)

    def _try(self, step: Callable[[], object]) -> None:
        if self.lost is None:
            try:
                step()
            except OSError as error:
                self.lost = error
                # What is buffered goes nowhere, or the interpreter would complain at its end.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def _fail(status: int, message: str) -> int:
    """Say in one line on stderr why the command ends with `status`."""
    _Stdout(sys.stdout).flush()
    after_echo = "\n" if status == _INTERRUPTED and sys.stderr.isatty() else ""  # of ^C
    print(f"{after_echo}robustft: {printable(message)}", file=sys.stderr)
    return status
