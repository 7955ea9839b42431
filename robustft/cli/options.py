"""What the commands accept: the parser of the command line."""

from __future__ import annotations

import argparse
import math
from typing import Any, NoReturn

from robustft import __version__
from robustft.config import ABLATIONS, DETECTORS, DTYPES, ENGINES, RETRIEVERS, TRACKERS
from robustft.errors import UserError

_MODEL_DEFAULT = "(default: the small embedded model)"
_MOST = 2**31 - 1


class _Help(argparse.HelpFormatter):
    """Names the default of every option, unless its help says it in words."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        told = "(default" in text or action.default in (None, argparse.SUPPRESS)
        return text if told or action.required else f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse, with its errors in the form of all other user errors."""

    commands: dict[str, Parser]

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_Help, allow_abbrev=False, **settings)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"expected one of {known}, found {value!r}")

    def error(self, message: str) -> NoReturn:
        """Raise the one line that `main` prints."""
        raise UserError(f"{message} (see {self.prog} --help)")


def _share(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1], found {text!r}")
    return value


def _at_least_zero(text: str) -> float:
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, found {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _integer(text: str, least: int) -> int:
    value = int(text) if text.isascii() and text.isdecimal() and len(text) < 12 else -1
    if not least <= value <= _MOST:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from {least} to {_MOST}, found {text!r}"
        )
    return value


def _positive(text: str) -> int:
    return _integer(text, 1)


def _count(text: str) -> int:
    return _integer(text, 0)


def _above_zero(text: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def _patience(text: str) -> float:
    return math.inf if text == "inf" else _at_least_zero(text)


def _shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of) <= 100_000):
        raise argparse.ArgumentTypeError(
            f"expected I/N with I from 0 to N - 1, such as 0/4, found {text!r}"
        )
    return int(number), int(of)


def build_parser() -> Parser:
    """The parser of the whole command line; `commands` holds that of each command."""
    parser = Parser(
        prog="robustft",
        description="Clean noisy supervised fine-tuning data (RobustFT, arXiv 2412.14922), "
        "fine-tune on it, and measure the difference.",
        epilog="Start with `robustft demo`; `robustft COMMAND --help` explains a command. "
        "Results go to stdout, progress to stderr. Exit status: 0 done, 2 wrong input or "
        "arguments, 3 no expert is better than chance (nothing changed), 4 other shards are still "
        "at work (the same command goes on), 130 interrupted and 143 terminated (the same command "
        "resumes), 1 anything else.",
    )
    parser.add_argument("--version", action="version", version=f"robustft {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, title="commands", parser_class=Parser
    )
    for add in (
        _add_demo,
        _add_clean,
        _add_merge,
        _add_train,
        _add_eval,
        _add_score,
        _add_corrupt,
        _add_reproduce,
        _add_bench,
    ):
        add(commands)
    parser.commands = dict(commands.choices)
    return parser


def _command(commands: Any, name: str, help_: str, more: str = "") -> Parser:
    parser: Parser = commands.add_parser(name, help=help_, description=f"{help_}. {more}".strip())
    parser.add_argument(
        "--config", metavar="FILE",
        help="a TOML file of options, named as here without the dashes; the command line wins "
        "(default: none)",
    )  # fmt: skip
    parser.add_argument(
        "-v", "--verbose", action="store_true",
        help="show what the libraries log, and tracebacks (default: off)",
    )  # fmt: skip
    return parser


def _add_input(parser: Parser, split: str = "train") -> None:
    parser.add_argument(
        "input", metavar="INPUT",
        help="JSONL, JSON, CSV or Parquet file (also .gz, .zst), a folder of them, or a Hugging "
        "Face dataset id",
    )  # fmt: skip
    parser.add_argument(
        "--schema",
        help="choice, qa, alpaca, prompt-completion, messages or sharegpt, where fields have names "
        "of their own with these, as in qa:Prompt,Label, alpaca:Instruction,Input,Output or "
        "choice:Question,Options,Answer (default: told by the fields)",
    )
    parser.add_argument(
        "--limit", type=_positive, metavar="N", help="only the first N records (default: all)"
    )
    parser.add_argument(
        "--split", default=split, help="which split of a dataset folder or hub dataset"
    )


def _add_model(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", help=f"hub id, local folder or .gguf file {_MODEL_DEFAULT}")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--dtype", default="auto", choices=DTYPES, help="type of its weights")
    group.add_argument(
        "--attention", metavar="NAME",
        help="attention implementation of transformers, such as sdpa or eager (default: its own "
        "choice)",
    )  # fmt: skip
    group.add_argument(
        "--batch-tokens", type=_positive, metavar="N",
        help="tokens in one batch, prompt and reply; fewer need less memory (default: by the "
        "device)",
    )  # fmt: skip


def _add_engine(parser: Parser) -> None:
    group = parser.add_argument_group(
        "engine",
        "Who runs the model: this process (transformers, or vllm where it is installed), or any "
        "OpenAI-compatible server (openai), which is first asked what it can really do.",
    )
    group.add_argument(
        "--engine", default="transformers", choices=ENGINES, help="who runs the model"
    )
    group.add_argument(
        "--base-url", metavar="URL",
        help="the server, such as http://localhost:8000/v1; --model is then the name it serves "
        "(default: its only one)",
    )  # fmt: skip
    group.add_argument(
        "--tokenizer", metavar="MODEL",
        help="hub id or folder of the served model's tokenizer: with it prompts are token ids, and "
        "given text can be scored (default: that of --model, where that is a folder or hub id)",
    )  # fmt: skip
    group.add_argument(
        "--key-variable", default="OPENAI_API_KEY", metavar="NAME",
        help="environment variable that holds the server's key, where it needs one",
    )  # fmt: skip
    group.add_argument(
        "--concurrency", type=_positive, default=128, metavar="N",
        help="requests to the server at a time, at most; 16 at first, more as long as it keeps up",
    )  # fmt: skip
    group.add_argument(
        "--timeout", type=_above_zero, default=300.0, metavar="SECONDS",
        help="longest wait for one reply of the server",
    )  # fmt: skip
    group.add_argument(
        "--retries", type=_count, default=5, metavar="N",
        help="further tries of a request that failed, with growing pauses",
    )  # fmt: skip
    group.add_argument(
        "--tensor-parallel", type=_positive, default=1, metavar="N",
        help="GPUs that share one model (vllm)",
    )  # fmt: skip


def _add_expert_options(parser: Parser) -> None:
    group = parser.add_argument_group("method")
    group.add_argument(
        "--detector", default="crowd", choices=DETECTORS,
        help="what splits clean from noisy: models and learners on the corpus as a crowd, each "
        "weighted by what it knows; a panel of the models alone; or the paper's rule",
    )  # fmt: skip
    group.add_argument(
        "--second-opinion", action="append", metavar="DIR", default=[],
        help="the --out of a finished run of another model on the same input, whose answers join "
        "the crowd; may be repeated (default: none)",
    )  # fmt: skip
    group.add_argument(
        "-k", type=_positive, default=3, help="clean neighbours shown when a record is answered "
        "again",
    )  # fmt: skip
    group.add_argument(
        "--beta", type=_share, default=0.5, metavar="SHARE",
        help="share of the noisy records kept, the most confident first",
    )  # fmt: skip
    group.add_argument(
        "--rounds", type=_positive, default=2, metavar="N",
        help="alternations of reasoning and reflection",
    )  # fmt: skip
    group.add_argument(
        "--samples", type=_positive, default=1, metavar="N",
        help="chains of reasoning, sampled at --temperature, whose answers are made into one "
        "(self-consistency)",
    )  # fmt: skip
    group.add_argument(
        "--reasoning-tokens", type=_positive, metavar="N",
        help="longest reasoning and longest reflection (default: 256, of the embedded model 64)",
    )  # fmt: skip
    group.add_argument(
        "--answer-tokens", type=_positive, metavar="N",
        help="longest free-text answer (default: 512, of the embedded model 128)",
    )  # fmt: skip
    group.add_argument(
        "--choice", choices=("likelihood", "generate"), default="likelihood",
        help="read a lettered answer from the probabilities of the letters (likelihood) or from "
        "generated text (generate)",
    )  # fmt: skip
    group.add_argument(
        "--calibrate", action=argparse.BooleanOptionalAction, default=False,
        help="divide out of the letters' probabilities what the model answers to an empty "
        "question (default: off)",
    )  # fmt: skip
    group.add_argument(
        "--without", action="append", metavar="PART", choices=ABLATIONS, default=[],
        help="leave a part out, as in the paper's table 3: selection, checker, reviewer, cer "
        "(context-enhanced relabeling) or rel (reasoning); may be repeated (default: nothing)",
    )  # fmt: skip
    group.add_argument(
        "--temperature", type=_at_least_zero, default=0.0, metavar="T", help="0 is greedy"
    )
    group.add_argument("--seed", type=_count, default=0, metavar="N", help="seed of all sampling")
    group.add_argument(
        "--embedder", metavar="MODEL",
        help="sentence-embedding model, hub id or folder (default: the embedded MiniLM)",
    )  # fmt: skip
    group.add_argument(
        "--retriever", default="exact", choices=RETRIEVERS,
        help="how neighbours are found (approximate is faiss HNSW: may miss some, and the "
        "ones it misses may differ from run to run)",
    )  # fmt: skip
    group.add_argument(
        "--threads", type=_positive, metavar="N", help="CPU threads (default: all cores)"
    )


def _add_tuned(parser: Parser) -> None:
    group = parser.add_argument_group(
        "fine-tuned expert",
        "One more member of the crowd, for multiple choice: the model itself with LoRA, trained on "
        "the records that the others are surest of and asked about those it has not seen.",
    )
    group.add_argument(
        "--folds", type=_positive, metavar="N",
        help="cut the records into N parts; an adapter trained on the others judges each "
        "(default: no such expert)",
    )  # fmt: skip
    group.add_argument("--fold-epochs", type=_positive, default=3, metavar="N", help="as in train")
    group.add_argument(
        "--fold-learning-rate", type=_above_zero, default=1e-4, metavar="LR", help="as in train"
    )
    group.add_argument(
        "--fold-batch-size", type=_positive, default=8, metavar="N", help="records a step"
    )
    group.add_argument(
        "--fold-top-layers", type=_positive, metavar="N",
        help="adapt only the last N layers, which is faster (default: all)",
    )  # fmt: skip


def _add_clean(commands: Any) -> None:
    parser = _command(
        commands, "clean", "Detect noisy answers, relabel them, keep the confident ones",
        "Writes cleaned.* (the training set), report.html, verdicts.jsonl, rejects.jsonl, "
        "manifest.json and run.sqlite to --out. Killed at any moment, the same command resumes.",
    )  # fmt: skip
    _add_input(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="output folder (required)")
    parser.add_argument(
        "--dataset-info", action="store_true",
        help="also write messages.jsonl (the training set as chat turns, for TRL, Axolotl, "
        "torchtune) and dataset_info.json (for LLaMA-Factory) (default: off)",
    )  # fmt: skip
    parser.add_argument(
        "--method", default="robustft",
        choices=("robustft", "self-label", "self-select", "noiseal"),
        help="robustft, or a baseline of the paper's table 1, which writes no report and keeps "
        "the model's answers in answers.sqlite",
    )  # fmt: skip
    _add_truth(parser)
    _add_model(parser)
    _add_engine(parser)
    _add_expert_options(parser)
    _add_tuned(parser)
    parser.add_argument(
        "--estimate", action="store_true",
        help="say what the run would cost (tokens, time, memory, disk), measured on 64 records, "
        "and write nothing (default: off)",
    )  # fmt: skip
    _add_scale(parser)


def _add_truth(parser: Parser) -> None:
    parser.add_argument(
        "--truth", metavar="FILE",
        help="compare the verdicts with the truth, in input order: what robustft corrupt writes, "
        "or the records with right answers; nothing else reads it (default: not compared)",
    )  # fmt: skip


def _add_scale(parser: Parser) -> None:
    group = parser.add_argument_group("many machines and processes")
    group.add_argument(
        "--shard", type=_shard, metavar="I/N",
        help="work on shard I (from 0) of N; all shards share --out on one file system and wait "
        "for each other where they must; `robustft merge` writes the outputs (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--wait", type=_patience, default=600.0, metavar="SECONDS",
        help="how long a shard waits for the next of the others to get as far",
    )  # fmt: skip
    group.add_argument(
        "--processes", type=_positive, default=1, metavar="N",
        help="so many shards at once on this machine, then merge",
    )  # fmt: skip
    group.add_argument(
        "--gpus", type=_positive, default=1, metavar="N",
        help="as --processes, each with a GPU of its own",
    )  # fmt: skip
    group.add_argument(
        "--ray", nargs="?", const="local", metavar="ADDRESS",
        help="work on a Ray cluster with as many actors as --processes or its GPUs say; without "
        "ADDRESS one is started here (default: off)",
    )  # fmt: skip


def _add_merge(commands: Any) -> None:
    parser = _command(
        commands, "merge", "Write the outputs of a run that was cleaned in shards",
        "Selects over all shards; nobody is asked anything.",
    )  # fmt: skip
    parser.add_argument(
        "folders", nargs="+", metavar="DIR", help="--out of `robustft clean --shard`"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder for the outputs (default: the first DIR)"
    )
    parser.add_argument(
        "--input", metavar="INPUT", help="the input, if it has moved (default: where it was)"
    )
    parser.add_argument(
        "--second-opinion", action="append", metavar="DIR", default=[],
        help="a run that the shards have heard, if it has moved; may be repeated (default: where "
        "they were)",
    )  # fmt: skip
    _add_truth(parser)


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands, "demo", "Clean the bundled example corpus with the embedded models",
        "Some minutes on two cores; shows everything that `clean` writes.",
    )  # fmt: skip
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="output folder")


def _add_score(commands: Any) -> None:
    parser = _command(
        commands, "score",
        "Token statistics of every given response (nll, entropy, margin, rank); nothing generated",
        "Killed at any moment, the same command resumes.",
    )  # fmt: skip
    _add_input(parser)
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="JSONL, one line a record (required)"
    )
    _add_model(parser)
    _add_engine(parser)


def _add_corrupt(commands: Any) -> None:
    parser = _command(
        commands, "corrupt", "A noisy copy at an exact rate, the truth kept beside it",
        "Rates nest for one seed: what is wrong at 0.3 is wrong at 0.5.",
    )  # fmt: skip
    _add_input(parser)
    parser.add_argument(
        "--rate", type=_share, default=0.3, metavar="SHARE", help="share of answers made wrong"
    )
    parser.add_argument(
        "--seed", type=_count, default=0, metavar="N", help="which answers, and how"
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="file of the input's format (required)"
    )


def _add_train(commands: Any) -> None:
    parser = _command(
        commands, "train", "LoRA fine-tuning, loss on the response only",
        "Killed at any moment, the same command resumes.",
    )  # fmt: skip
    _add_input(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="adapter folder (required)")
    _add_model(parser)
    group = parser.add_argument_group("training")
    group.add_argument(
        "--epochs", type=_positive, default=2, metavar="N", help="passes over the data"
    )
    group.add_argument(
        "--learning-rate", type=_above_zero, default=1e-4, metavar="LR",
        help="peak learning rate",
    )  # fmt: skip
    group.add_argument(
        "--steps", type=_positive, metavar="N",
        help="optimizer steps in place of --epochs, so that sets of different size are trained "
        "alike (default: as many as the epochs have)",
    )  # fmt: skip
    group.add_argument("--rank", type=_positive, default=8, metavar="N", help="LoRA rank")
    group.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="records a step"
    )
    group.add_argument(
        "--cutoff", type=_positive, default=2048, metavar="N",
        help="longest record, tokens; at most the model's window",
    )  # fmt: skip
    group.add_argument(
        "--top-layers", type=_positive, metavar="N",
        help="adapt only the last N layers, which is faster (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--seed", type=_count, default=0, metavar="N", help="order of records and initial weights"
    )
    group.add_argument(
        "--report-to", action="append", metavar="NAME", choices=TRACKERS, default=[],
        help="send loss, token entropy and noise score of every step to tensorboard, trackio or "
        "wandb; may be repeated (default: nowhere)",
    )  # fmt: skip


def _add_eval(commands: Any) -> None:
    parser = _command(
        commands, "eval", "Accuracy of a model, and of an adapter, on a test file",
        "Killed at any moment, the same command resumes where --out is given.",
    )  # fmt: skip
    _add_input(parser, split="test")
    _add_model(parser)
    _add_engine(parser)
    parser.add_argument(
        "--adapter", metavar="DIR", help="LoRA adapter made by `robustft train` (default: none)"
    )
    parser.add_argument("--out", metavar="FILE", help="predictions as JSONL (default: not kept)")


def _names(text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"expected names between commas, found {text!r}")
    return found


def _integers(text: str) -> tuple[int, ...]:
    return tuple(_integer(part, 0) for part in _names(text))


def _add_reproduce(commands: Any) -> None:
    parser = _command(
        commands, "reproduce", "A table or figure of the paper, on any model and data",
        "Writes NAME.csv, NAME.md, NAME.png and NAME.svg to --out; answers, embeddings, training "
        "sets, adapters and evaluations are kept in its folder cache and shared by all tables "
        "and figures. Killed at any moment, the same command resumes.",
    )  # fmt: skip
    studies = ("table1", "table2", "table3", "fig1", "fig3", "fig4", "fig5", "fig6")
    parser.add_argument("what", choices=studies, metavar="WHAT", help=", ".join(studies))
    parser.add_argument("--out", default="runs/reproduce", metavar="DIR", help="output folder")
    parser.add_argument(
        "--data", metavar="DIR",
        help="folder with one folder a task (labeled, noisy30, …, test as CSV, JSONL or Parquet) "
        "(default: the Hugging Face hub)",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="only print the plan, in tokens and time "
        "(default: off)",
    )  # fmt: skip
    group = parser.add_argument_group("what to leave out")
    group.add_argument("--tasks", type=_names, metavar="A,B", default=(),
                       help="mmlu, arc, pubmedqa, drop, fpb (default: the paper's)")  # fmt: skip
    group.add_argument("--noise", type=_integers, metavar="N,M", default=(),
                       help="noise rates in percent (default: the paper's)")  # fmt: skip
    group.add_argument(
        "--methods", type=_names, metavar="A,B", default=(),
        help="vanilla, hermes-3, tulu-3, self-label, sft, noiseal, self-rag, self-select, "
        "robustft-paper, robustft (default: the paper's)",
    )  # fmt: skip
    group.add_argument("--models", type=_names, metavar="A,B", default=(),
                       help="models of table 2 (default: the paper's)")  # fmt: skip
    group.add_argument("--seeds", type=_integers, metavar="N,M", default=(0,),
                       help="one run each (default: 0)")  # fmt: skip
    group.add_argument("--limit", type=_positive, metavar="N",
                       help="only the first N training records (default: all)")  # fmt: skip
    group.add_argument("--test-limit", type=_positive, metavar="N",
                       help="only the first N test records (default: all)")  # fmt: skip
    _add_model(parser)
    more = parser.add_argument_group(
        "settings", "by default the paper's, or smaller ones for the embedded small model"
    )
    for name, about in (
        ("--rounds", "alternations of reasoning and reflection"),
        ("--reasoning-tokens", "longest reasoning and longest reflection"),
        ("--epochs", "passes over the noisy set; every row takes as many steps"),
        ("--batch-size", "records a step"),
        ("--top-layers", "adapt only the last N layers"),
    ):
        more.add_argument(name, type=_positive, metavar="N", help=f"{about} (default: the preset)")
    more.add_argument("--learning-rate", type=_above_zero, metavar="LR",
                      help="peak learning rate (default: the preset)")  # fmt: skip
    more.add_argument("--hermes", metavar="MODEL", help="the model of the row hermes-3 (default: "
                      "NousResearch/Hermes-3-Llama-3.1-8B)")  # fmt: skip
    more.add_argument("--tulu", metavar="MODEL", help="the model of the row tulu-3 (default: "
                      "allenai/Llama-3.1-Tulu-3-8B-SFT)")  # fmt: skip
    more.add_argument("--rephrasings", metavar="FILE", help="instructions of figure 6, one a line "
                      "(default: five in English)")  # fmt: skip
    more.add_argument("--embedder", metavar="MODEL", help="sentence-embedding model (default: the "
                      "embedded MiniLM)")  # fmt: skip
    more.add_argument("--share", type=_shard, metavar="I/N", default=(0, 1),
                      help="only every Nth cell from the Ith, and no table: set by itself where "
                      "there are several GPUs (default: all)")  # fmt: skip


def _add_bench(commands: Any) -> None:
    parser = _command(commands, "bench", "Speed of the kernels on this machine, beside their peers")
    what = ("consistency", "knn", "token-stats", "token-gradients", "linear-token-stats",
            "linear-token-gradients", "score", "pipeline")  # fmt: skip
    parser.add_argument("what", choices=what, metavar="WHAT", help=", ".join(what))
    parser.add_argument(
        "--quick", action="store_true", help="fewer sizes, under a minute (default: off)"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="append CSV rows to this file (default: stdout only)"
    )
    parser.add_argument(
        "--vllm-python", metavar="PATH",
        help="pipeline: an interpreter that has vLLM, as a peer (default: left out)",
    )  # fmt: skip
    parser.add_argument("--only", metavar="TEXT", help="the four of tokens: the cases whose name "
                        "holds this, 'V=49152 float32' say (default: all)")  # fmt: skip
    parser.add_argument("--data", metavar="FILE",
                        help="score: records to score (default: the bundled corpus)")  # fmt: skip
    parser.add_argument("--model", metavar="MODEL",
                        help="score: as for robustft score (default: embedded)")  # fmt: skip
