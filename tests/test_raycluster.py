"""`clean --ray` without Ray: a stand-in that calls its actors at once, in this process."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commandline import quiz, write
from scripted import LetterEmbedder, ScriptedEngine

from robustft.cleaning import Announcement, run_clean
from robustft.config import CleanConfig
from robustft.distributed.raycluster import _cores_each, run_ray
from robustft.errors import UserError


class TaskError(Exception):
    """What an actor's method raised."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Actor:
    def __init__(self, made: Any) -> None:
        self._made = made

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Any:
            try:
                return getattr(self._made, name)(*arguments)
            except UserError as error:
                raise TaskError(error) from None

        return SimpleNamespace(remote=remote)


class ActorPool:
    def __init__(self, actors: list[Actor]) -> None:
        self._actors = actors

    def map_unordered(self, call: Any, values: list[Any]) -> Any:
        return [call(self._actors[n % len(self._actors)], value) for n, value in enumerate(values)]


@pytest.fixture(autouse=True)
def ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def remote(kind: Any) -> Any:
        actors = SimpleNamespace(remote=lambda *arguments: Actor(kind(*arguments)))
        return SimpleNamespace(options=lambda **_: actors)

    stand_in = SimpleNamespace(
        init=lambda *_, **__: None, shutdown=lambda: None, put=lambda value: value,
        get=lambda value: value, cluster_resources=lambda: {"CPU": 4}, remote=remote,
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 4.0}}],
        util=SimpleNamespace(ActorPool=ActorPool),
        exceptions=SimpleNamespace(RayTaskError=TaskError, RayError=RuntimeError),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", stand_in)


def loader(_: CleanConfig) -> tuple[Any, Any]:
    return ScriptedEngine(), LetterEmbedder()


def config(tmp_path: Path, out: Path, rows: int = 600) -> CleanConfig:
    source = write(tmp_path / "in.jsonl", quiz(rows))
    return CleanConfig(input=str(source), out=out, detector="paper")


def test_it_says_what_clean_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[Announcement] = []
    plain = config(tmp_path, Path("one"))
    engine, embedder = loader(plain)
    run_clean(plain, engine=engine, embedder=embedder, announce=said.append)
    for _ in range(2):
        result = run_ray(config(tmp_path, Path("ray")), None, 2, loader, said.append)
    assert said[0] == said[1]
    assert [one.resumed for one in said] == [False, False, True]
    assert result.cleaned == Path("ray/cleaned.jsonl")  # as it was asked for
    assert Path("ray/verdicts.jsonl").read_bytes() == Path("one/verdicts.jsonl").read_bytes()


def test_its_time_is_that_of_the_whole_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[Any] = []
    monkeypatch.setattr(
        "robustft.distributed.raycluster.merge",
        lambda _, watch=None, **options: watched.append(watch),
    )
    run_ray(config(tmp_path, tmp_path / "out", rows=20), None, 1, loader)
    assert watched[0].seconds() > 0


def test_models_that_do_not_load_are_told_in_their_own_words(tmp_path: Path) -> None:
    def failing(_: CleanConfig) -> tuple[Any, Any]:
        raise UserError("no such model")

    with pytest.raises(UserError, match=r"^no such model$"):
        run_ray(config(tmp_path, tmp_path / "out"), None, 2, failing)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("client", ["", "ray://"])
def test_an_address_where_nothing_listens_is_refused_at_once(tmp_path: Path, client: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=f"--ray {client}127.0.0.1:{port}: cannot connect"):
        run_ray(config(tmp_path, tmp_path / "out"), f"{client}127.0.0.1:{port}", 1, loader)


@pytest.mark.parametrize(
    ("nodes", "count", "each"),
    [([8], 4, 2), ([3, 3], 3, 1), ([2], 8, 0.25), ([1, 1], 3, 0.5), ([16, 2], 9, 2), ([], 1, 1)],
)
def test_every_actor_finds_a_node(nodes: list[int], count: int, each: float) -> None:
    assert _cores_each(nodes, count) == each


def test_workers_find_second_opinions_from_where_they_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = replace(config(tmp_path, tmp_path / "other", rows=20), detector="crowd")
    other = ScriptedEngine()
    other.model_id = "other"
    run_clean(plain, engine=other, embedder=LetterEmbedder())

    def elsewhere(_: CleanConfig) -> tuple[Any, Any]:
        monkeypatch.chdir("/")
        return loader(_)

    both = replace(plain, out=tmp_path / "both", second_opinion=("other",))
    assert run_ray(both, None, 1, elsewhere).others == ("other",)
