"""Which engine a command line names, and what is said where it cannot be had."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from robustft.cli.settings import engine_config, parse
from robustft.config import EngineConfig
from robustft.engines.factory import load_engine
from robustft.errors import UserError

SERVER = ("--engine", "openai", "--base-url", "http://localhost:1/v1")


def test_every_option_of_the_engine_arrives() -> None:
    options = (
        "--tokenizer", "t", "--key-variable", "MY_KEY", "--concurrency", "3", "--timeout", "1.5",
        "--retries", "0", "--model", "m",
    )  # fmt: skip
    for command in (("clean", "x", "--out", "o"), ("score", "x", "--out", "o"), ("eval", "x")):
        assert engine_config(parse([*command, *SERVER, *options])) == EngineConfig(
            model="m", engine="openai", base_url="http://localhost:1/v1", tokenizer="t",
            key_variable="MY_KEY", concurrency=3, timeout=1.5, retries=0,
        )  # fmt: skip
        shared = parse([*command, "--engine", "vllm", "--tensor-parallel", "2"])
        assert engine_config(shared) == EngineConfig(engine="vllm", tensor_parallel=2)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--engine", "openai"), "needs --base-url"),
        (("--base-url", "http://localhost:1/v1"), "belongs to --engine openai"),
        (("--tokenizer", "t"), "--tokenizer belongs to --engine openai, not to transformers"),
        ((*SERVER, "--tensor-parallel", "2"), "belongs to --engine vllm, not to openai"),
        (("--engine", "elsewhere"), "--engine: expected one of transformers, openai, vllm"),
        ((*SERVER, "--timeout", "0"), "expected a number above 0"),
        ((*SERVER, "--concurrency", "0"), "expected a whole number from 1"),
        ((*SERVER, "--retries", "-1"), "expected a whole number from 0"),
        ((*SERVER, "--tensor-parallel", "0"), "expected a whole number from 1"),
    ],
)
def test_what_does_not_fit_is_named(arguments: tuple[str, ...], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        engine_config(parse(["eval", "x", *arguments]))


def test_a_server_takes_no_adapter(tmp_path: Path) -> None:
    config = EngineConfig(engine="openai", base_url="http://localhost:1/v1")
    with pytest.raises(UserError, match="loads its adapters itself"):
        load_engine(config, tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_where_it_is_not_installed() -> None:
    with pytest.raises(UserError, match="needs vllm, which is not installed: run `pip install"):
        load_engine(EngineConfig(engine="vllm"))


def test_how_answers_are_fetched_is_no_part_of_a_runs_identity() -> None:
    from robustft.config import CleanConfig

    def identity(**engine: object) -> dict[str, object]:
        made = EngineConfig(engine="openai", base_url="http://localhost:1/v1", **engine)  # type: ignore[arg-type]
        return CleanConfig(input="x", out=Path("o"), engine=made).fingerprint()

    assert identity() == identity(concurrency=99, timeout=1.0, retries=0, key_variable="K")
    assert identity() != identity(tokenizer="t")
