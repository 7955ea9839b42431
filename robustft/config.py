"""One frozen dataclass per stage; what the command line and a config file fill in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from robustft.errors import UserError

ABLATIONS = ("selection", "checker", "reviewer", "cer", "rel")
ENGINES = ("transformers", "openai", "vllm")
DETECTORS = ("crowd", "panel", "paper")
RETRIEVERS = ("exact", "approximate")
TRACKERS = ("tensorboard", "trackio", "wandb")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def _require(condition: bool, name: str, requirement: str, value: object) -> None:
    if not condition:
        raise UserError(f"{name} must be {requirement}, got {value!r}")


# How a field's annotation begins -> the type of its values, and that in words.
_KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "a whole number"),
    "float": (int | float, "a number"),
    "str": (str, "text"),
    "bool": (bool, "True or False"),
}


def _require_kinds(config: Any) -> None:
    """Raise UserError where a plain field holds a value of another type than it is annotated with.

    A bool is no number.
    """
    for one in dataclasses.fields(config):
        first, *others = str(one.type).split(" | ")
        value = getattr(config, one.name)
        if first in _KINDS and not (value is None and "None" in others):
            kind, wanted = _KINDS[first]
            right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            _require(right, one.name, wanted, value)


# Settings of an engine that say how its answers are fetched, not what they are.
ENGINE_MEANS = (
    "base_url", "key_variable", "concurrency", "timeout", "retries", "tensor_parallel",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Which model answers, and how it is run."""

    model: str | None = None  # hub id, folder or .gguf file; None: the embedded small model
    engine: str = "transformers"
    device: str = "auto"
    dtype: str = "auto"
    attention: str | None = None  # transformers' attn_implementation; None: its own choice
    batch_tokens: int | None = None  # tokens in one batch, prompt and reply; None: by the device
    temperature: float = 0.0  # 0: greedy
    base_url: str | None = None  # of the server (openai)
    tokenizer: str | None = None  # hub id or folder; None: the model's, where it can be loaded
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the server's key
    concurrency: int = 128  # requests in flight at most (openai)
    timeout: float = 300.0  # seconds for one try of one request (openai)
    retries: int = 5  # tries after the first (openai)
    tensor_parallel: int = 1  # GPUs that share one model (vllm)

    def __post_init__(self) -> None:
        _require_kinds(self)
        for name in ("concurrency", "tensor_parallel"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(self.retries >= 0, "retries", "at least 0", self.retries)
        _require(self.timeout > 0, "timeout", "above 0", self.timeout)
        served = self.engine == "openai"
        if served and self.base_url is None:
            raise UserError("--engine openai needs --base-url, such as http://localhost:8000/v1")
        if self.base_url is not None and not served:
            raise UserError(f"--base-url belongs to --engine openai, not to {self.engine}")
        if self.tokenizer is not None and not served:
            raise UserError(f"--tokenizer belongs to --engine openai, not to {self.engine}")
        if self.tensor_parallel > 1 and self.engine != "vllm":
            raise UserError(f"--tensor-parallel belongs to --engine vllm, not to {self.engine}")
        _require(self.engine in ENGINES, "engine", f"one of {', '.join(ENGINES)}", self.engine)
        _require(self.dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", self.dtype)
        warm = math.isfinite(self.temperature) and self.temperature >= 0
        _require(warm, "temperature", "a finite number of at least 0", self.temperature)
        tokens = self.batch_tokens
        _require(tokens is None or tokens >= 1, "batch_tokens", "at least 1", tokens)

    def fingerprint(self) -> dict[str, Any]:
        """What its answers depend on, but for `batch_tokens`, as flat JSON values."""
        return _flat(self, {"batch_tokens", *ENGINE_MEANS})


@dataclass(frozen=True, slots=True)
class ExpertConfig:
    """How the experts are asked (paper, eq. 1, 2, 5, 6)."""

    rounds: int = 2  # alternations of reasoning and reflection (eq. 2)
    samples: int = 1  # chains of reasoning whose answers are made into one (self-consistency)
    reasoning_tokens: int = 256  # at most, for each reasoning and each reflection
    answer_tokens: int = 512  # at most, for one free-text answer
    choice: Literal["likelihood", "generate"] = "likelihood"  # how a lettered answer is read
    calibrate: bool = False  # divide the letters' content-free probabilities out (Zhao et al. 2021)

    def __post_init__(self) -> None:
        _require_kinds(self)
        _require(self.rounds >= 1, "rounds", "at least 1", self.rounds)
        _require(self.samples >= 1, "samples", "at least 1", self.samples)
        _require(
            self.reasoning_tokens >= 1, "reasoning_tokens", "at least 1", self.reasoning_tokens
        )
        _require(self.answer_tokens >= 1, "answer_tokens", "at least 1", self.answer_tokens)
        modes = ("likelihood", "generate")
        _require(self.choice in modes, "choice", f"one of {', '.join(modes)}", self.choice)
        read = "likelihood where letters are calibrated: generated ones have no probabilities"
        _require(not self.calibrate or self.choice == "likelihood", "choice", read, self.choice)


def experts_for(small: bool, **settings: Any) -> ExpertConfig:
    """How to ask a model: `settings` (None: not given) over the defaults.

    The embedded small model rambles on as long as it may: it gets less room to reason and write.
    """
    room = {"reasoning_tokens": 64, "answer_tokens": 128} if small else {}
    given = {name: value for name, value in settings.items() if value is not None}
    return ExpertConfig(**{**room, **given})


@dataclass(frozen=True, slots=True)
class TunedConfig:
    """One more expert: the model itself, fine-tuned on what the crowd is surest of, out of fold."""

    folds: int = 0  # parts of the corpus, each judged by an adapter trained on the others; 0: none
    fold_epochs: int = 3
    fold_learning_rate: float = 1e-4
    fold_batch_size: int = 8
    fold_top_layers: int | None = None  # adapt only the last N layers; None: all

    def __post_init__(self) -> None:
        _require_kinds(self)
        _require(self.folds == 0 or self.folds >= 2, "folds", "0 (none) or at least 2", self.folds)
        for name in ("fold_epochs", "fold_batch_size"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        top = self.fold_top_layers
        _require(top is None or top >= 1, "fold_top_layers", "at least 1", top)
        rate = self.fold_learning_rate
        _require(math.isfinite(rate) and rate > 0, "fold_learning_rate", "above 0", rate)


@dataclass(frozen=True, slots=True)
class CleanConfig:
    """The main job: detect, relabel, select."""

    input: str
    out: Path
    schema: str | None = None
    split: str = "train"
    limit: int | None = None
    seed: int = 0
    detector: str = "crowd"
    second_opinion: tuple[str, ...] = ()  # finished runs whose models' answers join the crowd
    k: int = 3  # clean neighbours in the context (eq. 4)
    beta: float = 0.5  # share of the denoised records kept (eq. 8)
    without: frozenset[str] = frozenset()  # ablations of the paper's table 3
    embedder: str | None = None  # sentence-embedding model; None: the embedded MiniLM
    retriever: str = "exact"  # how neighbours are found; "approximate" needs faiss
    threads: int | None = None
    dataset_info: bool = False  # also write messages.jsonl and dataset_info.json
    engine: EngineConfig = field(default_factory=EngineConfig)
    experts: ExpertConfig = field(default_factory=ExpertConfig)
    tuned: TunedConfig = field(default_factory=TunedConfig)

    def __post_init__(self) -> None:
        _require_kinds(self)
        _require(isinstance(self.without, frozenset), "without", "a frozenset", self.without)
        _require(self.k >= 1, "k", "at least 1", self.k)
        in_range = math.isfinite(self.beta) and 0 <= self.beta <= 1
        _require(in_range, "beta", "in [0, 1]", self.beta)
        _require(self.limit is None or self.limit >= 1, "limit", "at least 1", self.limit)
        known = f"one of {', '.join(DETECTORS)}"
        _require(self.detector in DETECTORS, "detector", known, self.detector)
        known = f"one of {', '.join(RETRIEVERS)}"
        _require(self.retriever in RETRIEVERS, "retriever", known, self.retriever)
        differ = self.experts.samples == 1 or self.engine.temperature > 0
        greedy = "1 at temperature 0, where all samples are the same (see --temperature)"
        _require(differ, "samples", greedy, self.experts.samples)
        for name in self.without:
            _require(name in ABLATIONS, "without", f"one of {', '.join(ABLATIONS)}", name)
        runs = self.second_opinion
        named = isinstance(runs, tuple) and all(isinstance(run, str) for run in runs)
        _require(named, "second_opinion", "a tuple of strings", runs)
        heard = "crowd or panel where there are second opinions: the paper's rule hears none"
        _require(not self.second_opinion or self.votes, "detector", heard, self.detector)
        if self.tuned.folds:
            here = "transformers where folds are fine-tuned, which happens in this process"
            _require(self.engine.engine == "transformers", "engine", here, self.engine.engine)
            heard = "crowd where folds are fine-tuned, which learn from the given answers"
            _require(self.learners, "detector", heard, self.detector)

    @property
    def votes(self) -> bool:
        """Whether everyone who was heard has a vote, as by every detector but the paper's rule."""
        return self.detector != "paper"

    @property
    def learners(self) -> bool:
        """Whether learners, fitted to the given answers, are among the voters."""
        return self.detector == "crowd"

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the run it resumes, as flat JSON values."""
        free = {"out", "threads", "dataset_info"}
        if not self.second_opinion:
            free.add("second_opinion")
        if not self.tuned.folds:
            free |= {f"tuned.{one.name}" for one in dataclasses.fields(TunedConfig)}
        return _flat(self, free | {f"engine.{name}" for name in ENGINE_MEANS})


def _flat(config: Any, without: set[str]) -> dict[str, Any]:
    """Fields as JSON values; those of a nested config are named "outer.inner"."""
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            flat.update({f"{name}.{inner}": item for inner, item in value.items()})
        else:
            flat[name] = sorted(value) if isinstance(value, frozenset) else value
    return {name: value for name, value in flat.items() if name not in without}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, by the names of the command line."""
    said = []
    for name in sorted(before.keys() | now.keys()):
        was, is_ = before.get(name), now.get(name)
        if was == is_:
            continue
        if name == "input":
            said.append("the input is not the one that it began with")
        else:
            said.append(f"{_option(name)} was {_value(was)}, now {_value(is_)}")
    return said


def by_option(settings: Mapping[str, Any]) -> dict[str, str]:
    """A fingerprint as a person reads it: values as text, by the names of the command line."""
    return {_option(name): _value(value) for name, value in settings.items() if name != "input"}


def _option(name: str) -> str:
    option = name.rpartition(".")[2].replace("_", "-")
    if " " in option or option == "shards":
        return name  # what no option names
    return "-k" if option == "k" else f"--{option}"


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "not given"
    if value is None or isinstance(value, bool):
        return "given" if value else "not given"
    return str(value)


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """LoRA fine-tuning (eq. 9); the defaults are the paper's (LLaMA-Factory's)."""

    input: str
    out: Path
    schema: str | None = None
    split: str = "train"
    limit: int | None = None
    seed: int = 0
    epochs: int = 2
    steps: int | None = None  # optimizer steps, in place of epochs; None: as the epochs have it
    learning_rate: float = 1e-4  # at its peak; cosine after the warm-up
    warmup: float = 0.1  # share of the steps
    rank: int = 8
    alpha: int | None = None  # None: twice the rank
    dropout: float = 0.0
    batch_size: int = 8  # records a step
    cutoff: int = 2048  # longest record, tokens; at most the model's window
    top_layers: int | None = None  # adapt only the last N layers; None: all
    checkpoint_seconds: float = 60.0  # what a killed run loses at most
    report_to: tuple[str, ...] = ()  # trackers that get the numbers of every step
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        _require_kinds(self)
        for name in ("epochs", "rank", "batch_size"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("limit", "top_layers", "steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "at least 1", value)
        for name in self.report_to:
            _require(name in TRACKERS, "report_to", f"one of {', '.join(TRACKERS)}", name)
        _require(self.cutoff >= 16, "cutoff", "at least 16", self.cutoff)
        rate = self.learning_rate
        _require(math.isfinite(rate) and rate > 0, "learning_rate", "above 0", rate)
        _require(0 <= self.warmup < 1, "warmup", "in [0, 1)", self.warmup)
        _require(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)
        _require(self.alpha is None or self.alpha >= 1, "alpha", "at least 1", self.alpha)
        _require(self.seed >= 0, "seed", "at least 0", self.seed)

    @property
    def scale(self) -> int:
        """LoRA's alpha: as given, else twice the rank."""
        return 2 * self.rank if self.alpha is None else self.alpha

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the run it resumes, as flat JSON values."""
        free = {"input", "out", "checkpoint_seconds", "report_to", "engine.batch_tokens"}
        return _flat(self, free | {f"engine.{name}" for name in (*ENGINE_MEANS, "tokenizer")})


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """Accuracy of a model, with or without an adapter, on a test file."""

    input: str
    adapter: Path | None = None
    out: Path | None = None  # predictions as JSONL
    schema: str | None = None
    split: str = "test"
    limit: int | None = None
    answer_tokens: int = 256  # at most, for one free-text answer
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        _require_kinds(self)
        _require(self.limit is None or self.limit >= 1, "limit", "at least 1", self.limit)
        _require(self.answer_tokens >= 1, "answer_tokens", "at least 1", self.answer_tokens)

    def fingerprint(self) -> dict[str, Any]:
        """What the predictions depend on besides the files' content, as flat JSON values."""
        free = {"input", "out", "adapter", "engine.batch_tokens"}
        return _flat(self, free | {f"engine.{name}" for name in ENGINE_MEANS})


@dataclass(frozen=True, slots=True)
class ReproduceConfig:
    """A table or figure of the paper, on any model and data. None: as the preset has it."""

    what: str
    out: Path = Path("runs/reproduce")
    data: str | None = None  # a folder with one folder a task; None: the hub
    tasks: tuple[str, ...] = ()
    noise: tuple[int, ...] = ()  # percent
    methods: tuple[str, ...] = ()
    models: tuple[str, ...] = ()  # of table 2
    seeds: tuple[int, ...] = (0,)
    limit: int | None = None  # training records
    test_limit: int | None = None
    hermes: str | None = None
    tulu: str | None = None
    rephrasings: Path | None = None  # five instructions, one a line; None: those of the package
    epochs: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    top_layers: int | None = None
    rounds: int | None = None
    reasoning_tokens: int | None = None
    dry_run: bool = False
    share: tuple[int, int] = (0, 1)  # this process's part of the cells, of how many
    embedder: str | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        _require_kinds(self)
        for name in ("limit", "test_limit", "epochs", "batch_size", "top_layers", "rounds",
                     "reasoning_tokens"):  # fmt: skip
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "at least 1", value)
        _require(bool(self.seeds), "seeds", "at least one", self.seeds)
        for name in ("tasks", "noise", "methods", "models", "seeds"):
            value = getattr(self, name)
            _require(len(set(value)) == len(value), name, "different ones", value)
        for name, owner in (("models", "table2"), ("rephrasings", "fig6")):
            if getattr(self, name) and self.what != owner:
                raise UserError(f"--{name} belongs to {owner}, not to {self.what}")
        if self.models and self.engine.model:
            raise UserError("give --models or --model, not both")
        for rate in self.noise:
            _require(0 <= rate <= 100, "noise", "percents in [0, 100]", rate)
