"""The command line: `robustft clean | train | eval | score | corrupt | demo | bench`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from robustft import __version__
from robustft.errors import UserError

_DONE, _OTHER, _USER, _POWERLESS, _INTERRUPTED = 0, 1, 2, 3, 130
_log = logging.getLogger("robustft")


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors in the form of all other user errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1], found {text!r}")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def _build_parser() -> _Parser:
    parser = _Parser(
        prog="robustft",
        description="Clean noisy supervised fine-tuning data (RobustFT, arXiv 2412.14922), "
        "fine-tune on it, and measure the difference.",
        epilog="Start with `robustft demo`. Results go to stdout, progress to stderr. "
        "Exit status: 0 done, 2 wrong input or arguments, 3 no expert is better than chance "
        "(nothing changed), 130 interrupted (the same command resumes), 1 anything else.",
    )
    parser.add_argument("--version", action="version", version=f"robustft {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (_add_demo, _add_clean, _add_train, _add_eval, _add_score, _add_corrupt, _add_bench):
        add(commands)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], help_: str, more: str = ""
) -> _Parser:
    parser: _Parser = commands.add_parser(
        name,
        help=help_,
        description=f"{help_}. {more}".strip(),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--config", metavar="FILE", help="a TOML file of options; the command line wins"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log what the libraries say")
    return parser


def _add_input(parser: _Parser) -> None:
    parser.add_argument(
        "input",
        metavar="INPUT",
        help="JSONL, JSON, CSV or Parquet file (also .gz, .zst), or a Hugging Face dataset id",
    )
    parser.add_argument(
        "--schema",
        help="choice, qa, alpaca, prompt-completion, messages or sharegpt; found by itself",
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N records")


def _add_model(parser: _Parser) -> None:
    parser.add_argument(
        "--model", help="hub id, local folder or .gguf file; the small embedded model by default"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--attention", help="transformers attn_implementation, e.g. sdpa, eager")
    parser.add_argument(
        "--batch-tokens", type=_positive, metavar="N",
        help="tokens in one batch, prompt and reply; chosen by the device",
    )  # fmt: skip


def _add_expert_options(parser: _Parser) -> None:
    parser.add_argument(
        "--detector", default="crowd",
        help="what splits clean from noisy: crowd (experts weighted by what they know) or paper",
    )  # fmt: skip
    parser.add_argument("-k", type=_positive, default=3, help="clean neighbours in the context")
    parser.add_argument(
        "--beta", type=_share, default=0.5, help="share of the relabeled records kept"
    )
    parser.add_argument(
        "--rounds", type=_positive, default=2, help="alternations of reasoning and reflection"
    )
    parser.add_argument(
        "--reasoning-tokens", type=_positive, default=64, metavar="N",
        help="longest reasoning and reflection, each",
    )  # fmt: skip
    parser.add_argument(
        "--answer-tokens", type=_positive, default=128, metavar="N",
        help="longest free-text answer",
    )  # fmt: skip
    parser.add_argument(
        "--choice", choices=("likelihood", "generate"), default="likelihood",
        help="read a lettered answer from one prefill, or from generated text",
    )  # fmt: skip
    parser.add_argument(
        "--calibrate", action=argparse.BooleanOptionalAction, default=False,
        help="divide out of the option likelihoods what the model answers to an empty question",
    )  # fmt: skip
    parser.add_argument(
        "--without", action="append", metavar="PART", default=[],
        help="leave a part out, as in the paper's table 3: selection, checker, reviewer, cer "
        "(context-enhanced relabeling) or rel (reasoning); may be repeated",
    )  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0, help="seed of all sampling")
    parser.add_argument("--embedder", help="sentence-embedding model; the embedded MiniLM")
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads")


def _add_clean(commands: Any) -> None:
    parser = _command(
        commands,
        "clean",
        _run_clean,
        "Detect noisy answers, relabel them, keep the confident ones",
        "Writes cleaned.*, verdicts.jsonl, rejects.jsonl, report.html, manifest.json and "
        "run.sqlite to --out. Killed at any moment, the same command resumes.",
    )
    _add_input(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="output folder")
    parser.add_argument("--split", default="train", help="split of a hub dataset")
    parser.add_argument("--engine", default="transformers", help="where answers come from")
    _add_model(parser)
    _add_expert_options(parser)


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands, "demo", _run_demo, "Clean the bundled example corpus with the embedded models"
    )
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="output folder")


def _add_score(commands: Any) -> None:
    parser = _command(
        commands, "score", _run_score,
        "Token statistics of every given response (nll, entropy, margin, rank); nothing generated",
    )  # fmt: skip
    _add_input(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="JSONL, one line a record")
    _add_model(parser)


def _add_corrupt(commands: Any) -> None:
    parser = _command(
        commands,
        "corrupt",
        _run_corrupt,
        "A noisy copy at an exact rate, the truth kept beside it",
        "Rates nest for one seed: what is wrong at 0.3 is wrong at 0.5.",
    )
    _add_input(parser)
    parser.add_argument("--rate", type=_share, default=0.3, help="share of answers made wrong")
    parser.add_argument("--seed", type=int, default=0, help="which answers, and how")
    parser.add_argument("--out", required=True, metavar="FILE", help="same format as INPUT")


def _add_train(commands: Any) -> None:
    parser = _command(
        commands, "train", _run_train, "LoRA fine-tuning, loss on the response only",
        "Killed at any moment, the same command resumes.",
    )  # fmt: skip
    _add_input(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="adapter folder")
    _add_model(parser)
    parser.add_argument("--epochs", type=_positive, default=2, help="passes over the data")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="peak learning rate")
    parser.add_argument("--rank", type=_positive, default=8, help="LoRA rank")
    parser.add_argument("--batch-size", type=_positive, default=16, help="records a step")
    parser.add_argument("--cutoff", type=_positive, default=2048, help="longest record, tokens")
    parser.add_argument(
        "--top-layers", type=_positive, metavar="N", help="adapt only the last N layers (faster)"
    )
    parser.add_argument("--seed", type=int, default=0, help="order of records and initial weights")


def _add_eval(commands: Any) -> None:
    parser = _command(
        commands, "eval", _run_eval, "Accuracy of a model, and of an adapter, on a test file"
    )
    _add_input(parser)
    _add_model(parser)
    parser.add_argument("--adapter", metavar="DIR", help="LoRA adapter made by `robustft train`")
    parser.add_argument("--out", metavar="FILE", help="predictions as JSONL")


def _add_bench(commands: Any) -> None:
    parser = _command(
        commands, "bench", _run_bench, "Speed of the kernels on this machine, beside their peers"
    )
    parser.add_argument(
        "what", choices=("token-stats", "linear-token-stats", "consistency", "knn"), metavar="WHAT",
        help="token-stats, linear-token-stats, consistency or knn",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="fewer sizes, under a minute")
    parser.add_argument("--out", metavar="FILE", help="append CSV rows to this file")


# --- commands ------------------------------------------------------------------------------


def _engine_config(options: argparse.Namespace) -> Any:
    from robustft.config import EngineConfig

    return EngineConfig(
        model=options.model,
        engine=getattr(options, "engine", "transformers"),
        device=options.device,
        dtype=options.dtype,
        attention=options.attention,
        batch_tokens=options.batch_tokens,
        temperature=getattr(options, "temperature", 0.0),
    )


def _run_clean(options: argparse.Namespace) -> int:
    from robustft.config import CleanConfig, ExpertConfig

    config = CleanConfig(
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
        threads=options.threads,
        engine=_engine_config(options),
        experts=ExpertConfig(
            rounds=options.rounds,
            reasoning_tokens=options.reasoning_tokens,
            answer_tokens=options.answer_tokens,
            choice=options.choice,
            calibrate=options.calibrate,
        ),
    )
    from robustft.console import print_announcement, print_clean_summary

    if options.threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    from robustft.cleaning import run_clean

    result = run_clean(config, announce=print_announcement)
    print_clean_summary(result)
    return _POWERLESS if result.powerless else _DONE


def _run_demo(options: argparse.Namespace) -> int:
    from robustft.console import print_demo_truth

    defaults = _build_parser().parse_args(
        ["clean", str(demo_corpus()), "--out", options.out, "--reasoning-tokens", "48",
         "--rounds", "1"]
    )  # fmt: skip
    status = _run_clean(defaults)
    print_demo_truth(Path(options.out), demo_corpus().with_suffix(".truth.jsonl"))
    return status


def demo_corpus() -> Path:
    """The bundled example corpus: messages to a help desk, 30 % of their labels wrong."""
    return Path(__file__).parent / "data" / "demo.jsonl"


def _run_score(options: argparse.Namespace) -> int:
    from robustft.scoring import score_file

    config = _engine_config(options)
    summary = score_file(
        options.input, Path(options.out), config, schema=options.schema, limit=options.limit
    )
    print(summary)
    return _DONE


def _run_corrupt(options: argparse.Namespace) -> int:
    from robustft.corruption import corrupt
    from robustft.records import open_records

    source = open_records(options.input, schema=options.schema, limit=options.limit)
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
        limit=options.limit,
        engine=_engine_config(options),
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        rank=options.rank,
        batch_size=options.batch_size,
        cutoff=options.cutoff,
        top_layers=options.top_layers,
        seed=options.seed,
    )
    print(train(config))
    return _DONE


def _run_eval(options: argparse.Namespace) -> int:
    from robustft.config import EvalConfig
    from robustft.evaluation import evaluate

    config = EvalConfig(
        input=options.input,
        schema=options.schema,
        limit=options.limit,
        adapter=None if options.adapter is None else Path(options.adapter),
        out=None if options.out is None else Path(options.out),
        engine=_engine_config(options),
    )
    print(evaluate(config))
    return _DONE


def _run_bench(options: argparse.Namespace) -> int:
    import importlib

    names = {"linear-token-stats": "linear_token_stats", "token-stats": "token_stats"}
    module = importlib.import_module(f"robustft.benchmarks.{names.get(options.what, options.what)}")
    arguments = ["--quick"] if options.quick else []
    arguments += ["--out", options.out] if options.out else []
    return int(module.main(arguments) or _DONE)


# --- entry ---------------------------------------------------------------------------------


def _with_config_file(parser: _Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse, with defaults from --config FILE where it is given."""
    options = parser.parse_args(arguments)
    if not options.config:
        return options
    path = Path(options.config)
    try:
        found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the config file: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected TOML, found: {error}") from error
    found = found.get(options.command, found)
    known = vars(options)
    extra = []
    for name, value in found.items():
        field = name.replace("-", "_")
        if field not in known or field in {"command", "run", "config"}:
            raise UserError(f"{path}, field {name!r}: not an option of `{options.command}`")
        if field == "input":
            raise UserError(f"{path}, field 'input': name the input on the command line")
        flag = f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            extra.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            for item in value if isinstance(value, list) else [value]:
                extra.append(f"{flag}={item}" if flag.startswith("--") else f"{flag}{item}")
    # File options first: of two, argparse takes the later.
    return parser.parse_args([arguments[0], *extra, *arguments[1:]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verbose = "-v" in arguments or "--verbose" in arguments
    logging.basicConfig(format="robustft: %(message)s", stream=sys.stderr, level=logging.WARNING)
    if not verbose:
        logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        options = _with_config_file(_build_parser(), arguments)
        status: int = options.run(options)
    except UserError as error:
        print(f"robustft: {printable(str(error))}", file=sys.stderr)
        return _USER
    except KeyboardInterrupt:
        print("\nrobustft: interrupted; run the same command again to resume", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _OTHER
    except Exception as error:
        if verbose:
            raise
        text = str(error).strip().splitlines()
        name = type(error).__name__
        print(
            f"robustft: {name}: {printable(text[0]) if text else 'no message'} (-v shows more); "
            "what is finished is kept, the same command resumes",
            file=sys.stderr,
        )
        return _OTHER
    return status


def printable(text: str) -> str:
    """`text` on one line, control and bidirectional characters shown as escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
