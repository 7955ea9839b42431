"""What the commands accept: the parser of the command line."""

from __future__ import annotations

from typing import Any

from robustft import __version__
from robustft.cli.arguments import (
    Parser,
    above_zero,
    count,
    integers,
    names,
    positive,
    shard,
    share,
)
from robustft.cli.groups import (
    add_engine,
    add_expert_options,
    add_input,
    add_model,
    add_scale,
    add_truth,
    add_tuned,
)
from robustft.config import TRACKERS


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


def _add_clean(commands: Any) -> None:
    parser = _command(
        commands, "clean", "Detect noisy answers, relabel them, keep the confident ones",
        "Writes cleaned.* (the training set), report.html, verdicts.jsonl, rejects.jsonl, "
        "manifest.json and run.sqlite to --out. Killed at any moment, the same command resumes.",
    )  # fmt: skip
    add_input(parser)
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
    add_truth(parser)
    add_model(parser)
    add_engine(parser)
    add_expert_options(parser)
    add_tuned(parser)
    parser.add_argument(
        "--estimate", action="store_true",
        help="tell what the run would cost (tokens, time, memory, disk), measured on 64 records, "
        "and write nothing (default: off)",
    )  # fmt: skip
    add_scale(parser)


def _add_merge(commands: Any) -> None:
    parser = _command(
        commands, "merge", "Write the outputs of a run that was cleaned in shards",
        "Selects over all shards; no model is asked anything.",
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
        help="a second opinion that the shards used, if it has moved; may be repeated (default: "
        "where they were)",
    )  # fmt: skip
    add_truth(parser)


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
    add_input(parser)
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="JSONL, one line a record (required)"
    )
    add_model(parser)
    add_engine(parser)


def _add_corrupt(commands: Any) -> None:
    parser = _command(
        commands, "corrupt", "A noisy copy at an exact rate, the truth kept beside it",
        "Rates nest for one seed: what is wrong at 0.3 is wrong at 0.5.",
    )  # fmt: skip
    add_input(parser)
    parser.add_argument(
        "--rate", type=share, default=0.3, metavar="SHARE", help="share of answers made wrong"
    )
    parser.add_argument("--seed", type=count, default=0, metavar="N", help="which answers, and how")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="file of the input's format (required)"
    )


def _add_train(commands: Any) -> None:
    parser = _command(
        commands, "train", "LoRA fine-tuning, loss on the response only",
        "Killed at any moment, the same command resumes.",
    )  # fmt: skip
    add_input(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="adapter folder (required)")
    add_model(parser)
    group = parser.add_argument_group("training")
    group.add_argument(
        "--epochs", type=positive, default=2, metavar="N", help="passes over the data"
    )
    group.add_argument(
        "--learning-rate", type=above_zero, default=1e-4, metavar="LR",
        help="peak learning rate",
    )  # fmt: skip
    group.add_argument(
        "--steps", type=positive, metavar="N",
        help="optimizer steps in place of --epochs, so that sets of different size are trained "
        "alike (default: as many as the epochs have)",
    )  # fmt: skip
    group.add_argument("--rank", type=positive, default=8, metavar="N", help="LoRA rank")
    group.add_argument("--batch-size", type=positive, default=8, metavar="N", help="records a step")
    group.add_argument(
        "--cutoff", type=positive, default=2048, metavar="N",
        help="longest record, tokens; at most the model's window",
    )  # fmt: skip
    group.add_argument(
        "--top-layers", type=positive, metavar="N",
        help="adapt only the last N layers, which is faster (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--seed", type=count, default=0, metavar="N", help="order of records and initial weights"
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
    add_input(parser, split="test")
    add_model(parser)
    add_engine(parser)
    parser.add_argument(
        "--adapter", metavar="DIR", help="LoRA adapter made by `robustft train` (default: none)"
    )
    parser.add_argument("--out", metavar="FILE", help="predictions as JSONL (default: not kept)")


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
    group.add_argument("--tasks", type=names, metavar="A,B", default=(),
                       help="mmlu, arc, pubmedqa, drop, fpb (default: the paper's)")  # fmt: skip
    group.add_argument("--noise", type=integers, metavar="N,M", default=(),
                       help="noise rates in percent (default: the paper's)")  # fmt: skip
    group.add_argument(
        "--methods", type=names, metavar="A,B", default=(),
        help="vanilla, hermes-3, tulu-3, self-label, sft, noiseal, self-rag, self-select, "
        "robustft-paper, robustft (default: the paper's)",
    )  # fmt: skip
    group.add_argument("--models", type=names, metavar="A,B", default=(),
                       help="models of table 2 (default: the paper's)")  # fmt: skip
    group.add_argument("--seeds", type=integers, metavar="N,M", default=(0,),
                       help="one run each (default: 0)")  # fmt: skip
    group.add_argument("--limit", type=positive, metavar="N",
                       help="only the first N training records (default: all)")  # fmt: skip
    group.add_argument("--test-limit", type=positive, metavar="N",
                       help="only the first N test records (default: all)")  # fmt: skip
    add_model(parser)
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
        more.add_argument(name, type=positive, metavar="N", help=f"{about} (default: the preset)")
    more.add_argument("--learning-rate", type=above_zero, metavar="LR",
                      help="peak learning rate (default: the preset)")  # fmt: skip
    more.add_argument("--hermes", metavar="MODEL", help="the model of the row hermes-3 (default: "
                      "NousResearch/Hermes-3-Llama-3.1-8B)")  # fmt: skip
    more.add_argument("--tulu", metavar="MODEL", help="the model of the row tulu-3 (default: "
                      "allenai/Llama-3.1-Tulu-3-8B-SFT)")  # fmt: skip
    more.add_argument("--rephrasings", metavar="FILE", help="instructions of figure 6, one a line "
                      "(default: five in English)")  # fmt: skip
    more.add_argument("--embedder", metavar="MODEL", help="sentence-embedding model (default: the "
                      "embedded MiniLM)")  # fmt: skip
    more.add_argument("--share", type=shard, metavar="I/N", default=(0, 1),
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
