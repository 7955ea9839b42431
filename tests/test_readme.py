"""The documents keep their word: snippets run, commands parse, options, files and links exist.

Snippets run in a folder with `train.jsonl`, `test.jsonl` and a finished run in `runs/first`; what
looks like a hub id is a folder with a tiny random model. Names they may use without defining them
are those of `names`. A snippet that imports a package of the extra [integrations] is an
integration test.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import quiz, write
from readme import DOCUMENTS, ROOT, Snippet, anchors, commands, links, snippets, spans
from scripted import LetterEmbedder, ScriptedEngine

import robustft
from robustft.cleaning import run_clean
from robustft.cli.options import build_parser
from robustft.cli.settings import parse
from robustft.config import CleanConfig, EngineConfig

MODELS = ("meta-llama/Llama-3.1-8B-Instruct",)
EMBEDDERS = ("sentence-transformers/all-MiniLM-L6-v2",)
HEAVY = {"trl", "datatrove", "ray", "trackio", "tensorboard", "llamafactory"}


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_encoder: Path) -> Path:
    """Where snippets run."""
    home = tmp_path_factory.mktemp("readme")
    write(home / "train.jsonl", quiz(40))
    write(home / "test.jsonl", quiz(10, seed=1))
    for names, target in ((MODELS, tiny_model), (EMBEDDERS, tiny_encoder)):
        for name in names:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).symlink_to(target)
    config = CleanConfig(
        input="train.jsonl",
        out=Path("runs/first"),
        engine=EngineConfig(model=MODELS[0]),
        dataset_info=True,
    )
    with working_in(home):
        run_clean(config, engine=ScriptedEngine(), embedder=LetterEmbedder())
    return home


@pytest.fixture
def names() -> dict[str, Any]:
    """What a snippet may use without defining it."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    return {
        "rft": robustft,
        "np": np,
        "torch": torch,
        "logits": torch.randn(2, 5, 64),  # [batch, positions, V]
        "target_ids": torch.randint(64, (2, 5)),
        "hidden": torch.randn(2, 5, 16),  # [batch, positions, D]
        "lm_head_weight": torch.randn(64, 16),  # [V, D]
        "answers": [["Paris", " paris.", "Lyon"], ["4", "five"]],
        "embeddings": random.standard_normal((50, 24), dtype=np.float32),
        "queries": random.standard_normal((4, 24), dtype=np.float32),
        "texts": [f"text number {n}" for n in range(8)] * 2,
    }


def case(snippet: Snippet) -> Any:
    marks = [pytest.mark.integration] if snippet.imports & HEAVY else []
    return pytest.param(snippet, id=f"{name(snippet.document)}:{snippet.line}", marks=marks)


def name(document: Path) -> str:
    return str(document.relative_to(ROOT))


def each(parts: Callable[[Path], list[Any]]) -> list[Any]:
    """What `parts` finds in any of the documents."""
    return [part for document in DOCUMENTS for part in parts(document)]


@pytest.mark.parametrize("snippet", [case(snippet) for snippet in each(snippets)])
def test_a_snippet_runs(
    snippet: Snippet, folder: Path, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = [name for name in snippet.imports if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f"{absent[0]} is not installed")
    monkeypatch.setattr("robustft.cleaning.load_engine", lambda _: ScriptedEngine())
    monkeypatch.setattr("robustft.cleaning.Embedder", lambda _: LetterEmbedder())
    padded = "\n" * (snippet.line - 1) + snippet.code
    with working_in(folder):
        exec(compile(padded, str(snippet.document), "exec"), names)


def test_there_is_something_to_check() -> None:
    assert len(each(snippets)) > 4
    assert len(each(commands)) > 9
    assert len(each(links)) > 9


@pytest.mark.parametrize("words", each(commands), ids=" ".join)
def test_a_command_is_accepted(words: list[str], folder: Path) -> None:
    program, *arguments = words
    if program == "robustft":
        with working_in(folder):
            parse(arguments)
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(arguments) <= set(targets)
    elif program == "python" and arguments[0].endswith(".py"):
        assert (ROOT / arguments[0]).is_file()
    elif "robustft" in arguments[:2]:  # python -m robustft
        parse(arguments[2:])


@pytest.mark.parametrize("span", [s for s in each(spans) if s.startswith("robustft ")])
def test_a_command_in_the_text_exists(span: str) -> None:
    """`robustft eval INPUT [--adapter DIR]`: the command and its options, not their values."""
    commands = build_parser().commands
    command = span.split()[1]
    if command.isupper() or command.startswith("-"):  # `robustft COMMAND --help`
        return
    assert command in commands
    known = commands[command]._option_string_actions
    for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", span):
        assert option in known, f"{command} has no {option}"


def test_options_named_in_the_text_exist() -> None:
    known = {
        option
        for parser in build_parser().commands.values()
        for option in parser._option_string_actions
    }
    for span in each(spans):
        if re.match(r"--?[a-z]", span):
            option = re.split(r"[\s=|\[]", span)[0]
            assert option in known, f"no command has {option}: `{span}`"


def test_files_named_in_the_text_exist() -> None:
    places = r"(?:robustft|kernels|csrc|bench|tests)/[\w./-]+"
    for span in each(spans):
        if re.fullmatch(places, span):
            assert (ROOT / span).exists(), f"`{span}`"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document: Path) -> None:
    for target, anchor in links(document):
        assert target.exists(), f"{name(document)}: {target}"
        if anchor:
            assert anchor in anchors(target), f"{name(document)}: {target}#{anchor}"
