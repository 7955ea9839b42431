"""The command line: `robustft clean | merge | train | eval | score | corrupt | …`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from robustft.cli.clean import run_clean, run_demo, run_merge
from robustft.cli.console import tell_small_model
from robustft.cli.options import build_parser
from robustft.cli.settings import config_of, engine_config, optional_path, parse
from robustft.cli.status import (
    DONE,
    INTERRUPTED,
    OTHER,
    TERMINATED,
    UNFINISHED,
    USER,
)
from robustft.errors import UnfinishedError, UserError
from robustft.terminal import printable

_OF_A_PATH = {errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG}  # nobody but the user can mend it
_RESUMABLE = {"clean", "demo", "eval", "reproduce", "score", "train"}  # with --out

# --- commands ------------------------------------------------------------------------------


def _run_score(options: argparse.Namespace) -> int:
    from robustft.scoring import score_file

    config = engine_config(options)
    summary = score_file(
        options.input, Path(options.out), config,
        schema=options.schema, limit=options.limit, split=options.split,
    )  # fmt: skip
    print(summary)
    tell_small_model(config)
    return DONE


def _run_corrupt(options: argparse.Namespace) -> int:
    from robustft.corruption import corrupt
    from robustft.records import open_records

    source = open_records(
        options.input, schema=options.schema, limit=options.limit, split=options.split
    )
    report = corrupt(source, options.rate, options.seed, Path(options.out), schema=options.schema)
    print(report)
    return DONE


def _run_train(options: argparse.Namespace) -> int:
    from robustft.config import TrainConfig
    from robustft.training import train

    config = config_of(
        TrainConfig,
        options,
        out=Path(options.out),
        report_to=tuple(options.report_to),
        engine=engine_config(options),
    )
    print(train(config))
    tell_small_model(config.engine)
    return DONE


def _run_eval(options: argparse.Namespace) -> int:
    from robustft.config import EvalConfig
    from robustft.evaluation import evaluate

    config = config_of(
        EvalConfig,
        options,
        adapter=optional_path(options.adapter),
        out=optional_path(options.out),
        engine=engine_config(options),
    )
    print(evaluate(config))
    tell_small_model(config.engine)
    return DONE


def _run_reproduce(options: argparse.Namespace) -> int:
    from robustft.config import ReproduceConfig
    from robustft.reproduction.grid import reproduce

    config = config_of(
        ReproduceConfig,
        options,
        out=Path(options.out),
        rephrasings=optional_path(options.rephrasings),
        engine=engine_config(options),
    )
    print(reproduce(config))
    return DONE


_BENCH_OPTIONS = {
    "vllm-python": ("pipeline",),
    "only": ("token-stats", "token-gradients", "linear-token-stats", "linear-token-gradients"),
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
    return int(module.main(arguments) or DONE)


# --- entry ---------------------------------------------------------------------------------

_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": run_demo,
    "clean": run_clean,
    "merge": run_merge,
    "train": _run_train,
    "eval": _run_eval,
    "score": _run_score,
    "corrupt": _run_corrupt,
    "reproduce": _run_reproduce,
    "bench": _run_bench,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. `arguments` are those of the process by default."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments:
        build_parser().print_help(sys.stderr)
        return USER
    command, verbose, resumable = "", False, False
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may hold what its encoding does not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        options = parse(arguments)
        options.arguments = arguments
        command, verbose = options.command, options.verbose
        estimates = getattr(options, "estimate", False)
        kept = command in _RESUMABLE and options.out is not None
        resumable = command == "merge" or (kept and not estimates)
        for name in ("input", "out"):  # a shell variable that is not set, most likely
            if getattr(options, name, None) == "":
                raise UserError(f"{'--' * (name == 'out')}{name}: expected a path, found nothing")
        if command not in ("clean", "demo"):
            _refuse_remote(getattr(options, "out", None))
        _refuse_unreachable(getattr(options, "out", None))
        _refuse_missing(getattr(options, "input", None))
        said = _Stdout(sys.stdout)
        with _logging(verbose), _ended_by_sigterm(), contextlib.redirect_stdout(said):
            status = _COMMANDS[command](options)
            said.flush()
        if said.lost is not None and not isinstance(said.lost, BrokenPipeError):
            return _fail(OTHER, f"stdout: {said.lost.strerror}; all but the words is done")
    except UserError as error:
        status = UNFINISHED if isinstance(error, UnfinishedError) else USER
        return status if error.told else _fail(status, str(error))
    except KeyboardInterrupt as error:
        after = "run the same command again to resume" if resumable else "no output was written"
        if isinstance(error, _TerminatedError):
            return _fail(TERMINATED, f"terminated; {after}")
        return _fail(INTERRUPTED, f"interrupted; {after}")
    except Exception as error:
        if verbose:
            raise
        if isinstance(error, OSError) and error.errno in _OF_A_PATH and error.filename is not None:
            return _fail(USER, f"{os.fsdecode(error.filename)}: {error.strerror}")
        return _fail(OTHER, _unexpected(error, resumable=resumable))
    return status


def _refuse_remote(out: str | None) -> None:
    from robustft.remote import is_remote

    if out is not None and is_remote(out):
        raise UserError(f"--out {out}: only clean writes to such addresses; name a local path")


def _refuse_unreachable(out: str | None) -> None:
    """Raise UserError for a place of which the system does not even tell what is there."""
    from robustft.remote import is_remote

    if out is not None and not is_remote(out):
        try:
            Path(out).stat()
        except (FileNotFoundError, NotADirectoryError):
            pass  # to be made, or told by who makes it
        except OSError as error:
            raise UserError(f"{out}: cannot be written: {error.strerror}") from None


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
    after_echo = "\n" if status == INTERRUPTED and sys.stderr.isatty() else ""  # of ^C
    print(f"{after_echo}robustft: {printable(message)}", file=sys.stderr)
    return status
