"""Groups of options that several commands share, or that are long."""

from __future__ import annotations

import argparse

from robustft.cli.arguments import (
    Parser,
    above_zero,
    at_least_zero,
    count,
    patience,
    positive,
    shard,
    share,
)
from robustft.config import ABLATIONS, DETECTORS, DTYPES, ENGINES, RETRIEVERS

_MODEL_DEFAULT = "(default: the small embedded model)"


def add_input(parser: Parser, split: str = "train") -> None:
    """What is read."""
    parser.add_argument(
        "input", metavar="INPUT",
        help="JSONL, JSON, CSV, TSV or Parquet file (also .gz, .zst), a folder of files of one "
        "kind, or a Hugging Face dataset id",
    )  # fmt: skip
    parser.add_argument(
        "--schema",
        help="choice, qa, alpaca, prompt-completion, messages or sharegpt; where fields have other "
        "names, list them, as in qa:Prompt,Label, alpaca:Instruction,Input,Output or "
        "choice:Question,Options,Answer (default: recognised by the fields)",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="only the first N records (default: all)"
    )
    parser.add_argument(
        "--split", default=split, help="which split of a dataset folder or hub dataset"
    )


def add_model(parser: Parser) -> None:
    """Which model answers, and how it is run."""
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
        "--batch-tokens", type=positive, metavar="N",
        help="tokens in one batch, prompt and reply; fewer need less memory (default: by the "
        "device)",
    )  # fmt: skip


def add_engine(parser: Parser) -> None:
    """Who runs it."""
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
        "--concurrency", type=positive, default=128, metavar="N",
        help="requests to the server at a time, at most; 16 at first, more as long as it keeps up",
    )  # fmt: skip
    group.add_argument(
        "--timeout", type=above_zero, default=300.0, metavar="SECONDS",
        help="longest wait for one reply of the server",
    )  # fmt: skip
    group.add_argument(
        "--retries", type=count, default=5, metavar="N",
        help="further tries of a request that failed, with growing pauses",
    )  # fmt: skip
    group.add_argument(
        "--tensor-parallel", type=positive, default=1, metavar="N",
        help="GPUs that share one model (vllm)",
    )  # fmt: skip


def add_expert_options(parser: Parser) -> None:
    """The method: detection, denoising, selection."""
    group = parser.add_argument_group("method")
    group.add_argument(
        "--detector", default="crowd", choices=DETECTORS,
        help="what splits clean from noisy: a crowd of models and of learners on the corpus, each "
        "weighted by what it knows; a panel of the models alone; or the paper's rule",
    )  # fmt: skip
    group.add_argument(
        "--second-opinion", action="append", metavar="DIR", default=[],
        help="the --out of a finished run of another model on the same input, whose answers join "
        "the crowd; may be repeated (default: none)",
    )  # fmt: skip
    group.add_argument(
        "-k", type=positive, default=3, help="clean neighbours shown when a record is answered "
        "again",
    )  # fmt: skip
    group.add_argument(
        "--beta", type=share, default=0.5, metavar="SHARE",
        help="share of the noisy records kept, the most confident first",
    )  # fmt: skip
    group.add_argument(
        "--rounds", type=positive, default=2, metavar="N",
        help="alternations of reasoning and reflection",
    )  # fmt: skip
    group.add_argument(
        "--samples", type=positive, default=1, metavar="N",
        help="chains of reasoning, sampled at --temperature and combined into one answer "
        "(self-consistency)",
    )  # fmt: skip
    group.add_argument(
        "--reasoning-tokens", type=positive, metavar="N",
        help="longest reasoning and longest reflection (default: 256; 64 with the embedded model)",
    )  # fmt: skip
    group.add_argument(
        "--answer-tokens", type=positive, metavar="N",
        help="longest free-text answer (default: 512; 128 with the embedded model)",
    )  # fmt: skip
    group.add_argument(
        "--choice", choices=("likelihood", "generate"), default="likelihood",
        help="read a lettered answer from the probabilities of the letters (likelihood) or from "
        "generated text (generate)",
    )  # fmt: skip
    group.add_argument(
        "--calibrate", action=argparse.BooleanOptionalAction, default=False,
        help="divide the letters' probabilities by those that the model gives after an empty "
        "question (default: off)",
    )  # fmt: skip
    group.add_argument(
        "--without", action="append", metavar="PART", choices=ABLATIONS, default=[],
        help="leave a part out, as in the paper's table 3: selection, checker, reviewer, cer "
        "(context-enhanced relabeling) or rel (reasoning); may be repeated (default: nothing)",
    )  # fmt: skip
    group.add_argument(
        "--temperature", type=at_least_zero, default=0.0, metavar="T", help="0 is greedy"
    )
    group.add_argument("--seed", type=count, default=0, metavar="N", help="seed of all sampling")
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
        "--threads", type=positive, metavar="N", help="CPU threads (default: all cores)"
    )


def add_tuned(parser: Parser) -> None:
    """The fine-tuned expert."""
    group = parser.add_argument_group(
        "fine-tuned expert",
        "One more member of the crowd, for multiple choice: the model itself with LoRA, trained on "
        "the records that the others are surest of and asked about those it has not seen.",
    )
    group.add_argument(
        "--folds", type=positive, metavar="N",
        help="cut the records into N parts, each judged by an adapter trained on the others "
        "(default: no such expert)",
    )  # fmt: skip
    group.add_argument("--fold-epochs", type=positive, default=3, metavar="N", help="as in train")
    group.add_argument(
        "--fold-learning-rate", type=above_zero, default=1e-4, metavar="LR", help="as in train"
    )
    group.add_argument(
        "--fold-batch-size", type=positive, default=8, metavar="N", help="records a step"
    )
    group.add_argument(
        "--fold-top-layers", type=positive, metavar="N",
        help="adapt only the last N layers, which is faster (default: all)",
    )  # fmt: skip


def add_truth(parser: Parser) -> None:
    """What verdicts are compared with."""
    parser.add_argument(
        "--truth", metavar="FILE",
        help="compare the verdicts with the truth, in input order: what robustft corrupt writes, "
        "or the records with right answers; nothing else reads it (default: not compared)",
    )  # fmt: skip


def add_scale(parser: Parser) -> None:
    """Many machines and processes."""
    group = parser.add_argument_group("many machines and processes")
    group.add_argument(
        "--shard", type=shard, metavar="I/N",
        help="work on shard I (from 0) of N; all shards share --out on one file system and wait "
        "for each other where they must; `robustft merge` writes the outputs (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--wait", type=patience, default=600.0, metavar="SECONDS",
        help="how long a shard waits for another one to finish the same phase",
    )  # fmt: skip
    group.add_argument(
        "--processes", type=positive, default=1, metavar="N",
        help="run N shards at once on this machine, then merge",
    )  # fmt: skip
    group.add_argument(
        "--gpus", type=positive, default=1, metavar="N",
        help="like --processes, with one GPU each",
    )  # fmt: skip
    group.add_argument(
        "--ray", nargs="?", const="local", metavar="ADDRESS",
        help="work on a Ray cluster, with one actor per GPU or as many as --processes says; "
        "without ADDRESS a cluster is started here (default: off)",
    )  # fmt: skip
