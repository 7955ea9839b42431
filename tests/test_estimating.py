from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine, quiz, write
from scripted import LetterEmbedder, ScriptedEngine, slowly

from robustft.cleaning import run_clean
from robustft.config import CleanConfig
from robustft.estimating import estimate


def test_the_sample_stands_for_the_corpus(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [*quiz(1500), b"{broken"])
    config = CleanConfig(input=str(source), out=tmp_path / "out", detector="paper")
    found = estimate(config, engine=ScriptedEngine(), embedder=LetterEmbedder())
    assert not (tmp_path / "out").exists()
    assert (found.records, found.rejects, found.sample) == (1500, 1, 64)
    assert found.hours > 0
    assert found.memory_bytes > 10_000_000
    run_clean(config, engine=ScriptedEngine(), embedder=LetterEmbedder())
    spent = json.loads((tmp_path / "out/manifest.json").read_text())["experts"]
    for name in ("prompt_tokens", "new_tokens"):
        real = sum(cost[name] for cost in spent.values())
        assert getattr(found, name) == pytest.approx(real, rel=0.15)
    disk = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert found.disk_bytes == pytest.approx(disk, rel=0.3)


@pytest.mark.parametrize(
    ("settings", "votes", "searches"),
    [
        ({"detector": "paper"}, 0, 1),
        ({"detector": "crowd"}, 1, 1),
        ({"detector": "crowd", "without": frozenset({"cer"})}, 1, 0),
    ],
)
def test_the_search_for_neighbours_grows_with_the_square(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any, votes: int, searches: int
) -> None:
    monkeypatch.setattr("robustft.estimating._seconds_a_pair", lambda *given: 3600.0)
    monkeypatch.setattr("robustft.estimating.VOTERS", 500)
    source = write(tmp_path / "in.jsonl", quiz(1500))
    config = CleanConfig(input=str(source), out=tmp_path / "out", **settings)
    found = estimate(config, engine=ScriptedEngine(), embedder=LetterEmbedder())
    assert 0 < found.noisy < 1
    pairs = votes * 1500 * 500 + searches * found.noisy * 1500**2
    assert found.search_hours == pytest.approx(pairs)
    assert found.hours > found.search_hours
    assert f", up to {pairs:,.1f} hours of it for nearest neighbours" in str(found)


def test_the_crowd_may_answer_nobody_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustft.estimating._seconds_a_pair", lambda *given: 0.0)
    source = write(tmp_path / "in.jsonl", quiz(80))
    found = {}
    for detector in ("paper", "crowd"):
        config = CleanConfig(input=str(source), out=tmp_path / "out", detector=detector)
        engine = ScriptedEngine(before_batch=slowly(0.02))
        found[detector] = estimate(config, engine=engine, embedder=LetterEmbedder())
    assert found["paper"].least_hours == found["paper"].hours
    assert 0 < found["crowd"].least_hours < found["crowd"].hours
    wide = replace(found["crowd"], least_hours=1.0, hours=5.0)
    assert "60 minutes to 5.0 hours with one process like this one, the more the more" in str(wide)
    assert "the more" not in str(found["paper"])


def test_shards_share_the_time_by_whole_units(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", quiz(40))
    config = CleanConfig(input=str(source), out=tmp_path / "out", detector="paper")
    one = estimate(config, shards=4, engine=ScriptedEngine(), embedder=LetterEmbedder())
    assert one.largest_share == 1.0  # 40 records are one unit: it cannot be cut
    many = replace(one, records=10 * 512, hours=10.0, least_hours=10.0)
    assert many.largest_share == 0.3
    assert "\n4 shards      3.0 hours each, where every one has" in str(many)


def test_the_command(run: CommandLine, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", quiz(30))
    done = run("clean", source, "--out", tmp_path / "out", "--estimate")
    assert done.status == 0
    assert done.out.startswith("30 records, 0 unreadable\ntokens ")
    assert "measured on   30 records" in done.out
    assert not (tmp_path / "out").exists()
    assert "shards" not in done.out
    cut = ("--shard", "0/4", "--processes", "2")
    assert "\n8 shards      " in run("clean", source, "--out", tmp_path, "--estimate", *cut).out
    done = run("clean", source, "--out", tmp_path / "out", "--estimate", "--limit", "1")
    assert "measured on   1 record spread over the input, " in done.out
