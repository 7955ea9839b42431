"""`--engine openai` on the tests' own server."""

from __future__ import annotations

from pathlib import Path

from faulty_server import FaultyServer
from scripted import LetterEmbedder

from robustft.cleaning import run_clean
from robustft.config import CleanConfig, EngineConfig, ExpertConfig
from robustft.engines import Engine, Message, Prompt
from robustft.engines.http import JsonClient
from robustft.engines.probing import connect

KEY = "sk-test-0123456789abcdefSECRET"
VOCABULARY = 271


def client(
    server: FaultyServer, retries: int = 3, timeout: float = 30.0, longest_wait: float = 0.05
) -> JsonClient:
    return JsonClient(
        server.url, concurrency=16, timeout=timeout, retries=retries, backoff=0.005,
        longest_wait=longest_wait, largest=2**22,
    )  # fmt: skip


def config(server: FaultyServer, tiny_model: Path | None) -> EngineConfig:
    tokenizer = None if tiny_model is None else str(tiny_model)
    return EngineConfig(engine="openai", base_url=server.url, tokenizer=tokenizer)


def engine(server: FaultyServer, tiny_model: Path | None, **options: float) -> Engine:
    server.completions = tiny_model is not None
    return connect(config(server, tiny_model), client(server, **options))  # type: ignore[arg-type]


def questions(count: int) -> tuple[list[Prompt], list[tuple[str, ...]]]:
    prompts = [Prompt((Message("user", f"Question {i}?"),), "Answer:") for i in range(count)]
    return prompts, [(" A", " B", " C")] * count


def clean(path: Path, out: Path, made: Engine) -> None:
    experts = ExpertConfig(rounds=1, reasoning_tokens=4)
    config = CleanConfig(input=str(path), out=out, detector="paper", experts=experts)
    run_clean(config, engine=made, embedder=LetterEmbedder())
