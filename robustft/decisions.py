"""What the corpus as a whole decides: the split into clean and noisy, and the share that is kept.

The split is computed by one process from what every shard has published, and published in turn;
whatever it rests on is taken back under the same lock.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robustft.config import CleanConfig
from robustft.corpus import Corpus
from robustft.crowd import Estimate
from robustft.detection import (
    Conclusion,
    CrowdDetector,
    Detector,
    Evidence,
    PaperDetector,
    stacked,
)
from robustft.errors import UnfinishedError
from robustft.files import locked, remove_leftovers
from robustft.progress import Stages
from robustft.second_opinions import SecondOpinions
from robustft.selection import select_confident
from robustft.shards import Published, Shard, first_conclusion, publish, withdraw
from robustft.store import Stopwatch, Store
from robustft.terminal import counted

_LEARNED = "learned "  # before a learner's name, where its opinions are published
_CERTAIN = 0.7  # an answer found clean is kept at any rate where it is right with this probability


def make_detector(config: CleanConfig) -> Detector:
    """The detector that a configuration names."""
    if not config.votes:
        return PaperDetector()
    others = SecondOpinions(config.second_opinion).names
    return CrowdDetector(others, learners=config.learners)


def conclude(
    config: CleanConfig,
    shards: Sequence[Shard],
    target: Path,
    corpus: Corpus,
    more: Evidence | None = None,
    seconds: Mapping[str, float] | None = None,
) -> Conclusion:
    """The split of the whole corpus; published at `target` once and then read from there.

    `more`: evidence that was not gathered shard by shard; `seconds`: what that took, by stage.
    One process computes it, others wait. Raises UnfinishedError where a shard has begun to detect
    again since the caller looked.
    """
    if not target.is_dir():
        with _deciding(target):
            if not target.is_dir():
                _publish_split(config, shards, target, corpus, more, seconds)
    read = Published(target)
    learners = dict.fromkeys(name for votes in read.facts["votes"] for name in votes)
    return Conclusion(
        read["noisy"],
        read["unjudged"],
        read["pooled"],
        read["wrong"],
        read["jury"],
        read.facts["votes"],
        read.facts["powerless"],
        Estimate(**rate) if (rate := read.facts["noise_rate"]) else None,
        math.nan if (share := read.facts["expected_precision"]) is None else share,
        {name: read[_LEARNED + name] for name in learners if _LEARNED + name in read},
        tuple(read.facts["warnings"]),
        read.facts.get("stage_seconds", {}),  # a run of an older version told none
    )


def _publish_split(
    config: CleanConfig,
    shards: Sequence[Shard],
    target: Path,
    corpus: Corpus,
    more: Evidence | None,
    seconds: Mapping[str, float] | None,
) -> None:
    """Compute the split and publish it; see `conclude`. Only for who holds it (`_deciding`)."""
    again = [shard.number for shard in shards if not shard.phase("detected").is_dir()]
    if again:
        raise UnfinishedError(
            f"shard {again[0]}/{shards[0].of} asks again what failed before: run the same command "
            "when it is through"
        )
    watch = Stopwatch()
    evidence = stacked([Published(shard.phase("detected")).arrays for shard in shards])
    evidence |= more or {}
    with Stages("split") as stages:
        found = make_detector(config).conclude(evidence, corpus, stages)
    publish(
        target,
        {
            "noisy": found.noisy,
            "unjudged": found.unjudged,
            "pooled": found.pooled,
            "wrong": found.wrong,
            "jury": found.jury,
            **{f"{_LEARNED}{name}": values for name, values in found.learned.items()},
        },
        {
            "votes": list(map(dict, found.votes)),
            "powerless": found.powerless,
            "noise_rate": found.noise_rate,
            "expected_precision": found.expected_precision,
            "warnings": [*found.warnings, *_on_the_clean_set(config, found)],
            "stage_seconds": {"split": watch.seconds(), **(seconds or {})},
        },
    )


def _on_the_clean_set(config: CleanConfig, found: Conclusion) -> list[str]:
    clean = int(found.clean.sum())
    if "cer" in config.without or not found.noisy.any() or clean >= config.k:
        return []
    if clean == 0:
        return ["no record was found clean: noisy ones are answered without examples"]
    exist = counted(clean, "clean record exists", "clean records exist")
    return [f"k is {config.k}, but only {exist}: using {clean}"]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which records stay in the training set (eq. 8)."""

    selected: NDArray[np.bool_]  # [N] by position: denoised, and kept
    doubtful: NDArray[np.bool_]  # [N] found clean, but less certain than the new labels kept
    kept: NDArray[np.float64]  # response entropy of those kept, nats
    dropped: NDArray[np.float64]  # and of those dropped for it
    cuts: Mapping[int, float]  # the largest kept, nats, by label (-1: not the crowd's)
    label: NDArray[np.int64]  # [N] by position, whose cut counts

    @property
    def threshold(self) -> float:
        """The largest response entropy kept, nats; NaN where nothing is."""
        return max((cut for cut in self.cuts.values() if not math.isnan(cut)), default=math.nan)


def select(config: CleanConfig, shards: Sequence[Shard], conclusion: Conclusion) -> Selection:
    """The most confident share of all denoised records.

    Where the crowd settled the labels, of every label: it is surest of the commonest one, and the
    rare ones would all but vanish from the training set. An answer found clean is then held to the
    standard of the new ones of its label, but never to more than `_CERTAIN`.
    """
    parts = [Published(shard.phase("relabeled"))["nll"] for shard in shards]
    nll = np.concatenate(parts)
    labelled = ~np.isnan(nll)
    positions, nll = np.flatnonzero(conclusion.noisy)[labelled], nll[labelled]
    beta = 1.0 if "selection" in config.without else config.beta
    own = conclusion.own_labels()
    labels = own[positions]
    mask = np.zeros(len(nll), np.bool_)
    cuts = {}
    doubtful = np.zeros(len(own), np.bool_)
    for label in np.unique(labels):
        same = np.flatnonzero(labels == label)
        kept, worst = select_confident(nll[same], beta)
        mask[same[kept]] = True
        cuts[int(label)] = worst
        if label >= 0 and beta < 1.0:
            certain = math.exp(-worst) if kept.any() else _CERTAIN
            unsure = conclusion.wrong > 1.0 - min(certain, _CERTAIN)
            doubtful |= conclusion.clean & (own == label) & unsure
    selected = np.zeros(len(conclusion.noisy), np.bool_)
    selected[positions[mask]] = True
    finite = np.isfinite(nll)
    return Selection(selected, doubtful, nll[mask & finite], nll[~mask & finite], cuts, own)


def reopen(shard: Shard, store: Store, target: Path, *, alone: bool) -> None:
    """Ask again what failed in an earlier session, unless others may have built on it.

    That is so once the split is published at `target`, but for a shard that is `alone`.
    """
    if not store.has_failures:
        return
    with _deciding(target):
        if target.is_dir() and not alone:
            return
        # What rests on the failures goes first: killed in between, the next session begins here.
        _withdraw_verdicts(shard, store, target)
        store.forgive()


def judge_again(shard: Shard, store: Store, target: Path) -> None:
    """Leave the verdicts on the only shard to another detector; nobody is asked the same again."""
    with _deciding(target):
        _withdraw_verdicts(shard, store, target)
        store.judge_again()


def _withdraw_verdicts(shard: Shard, store: Store, target: Path) -> None:
    """Take back the split and what each phase has published; the time of it all stays known."""
    spent = Published(target).facts.get("stage_seconds", {}) if target.is_dir() else {}
    phases = shard.phase("relabeled"), shard.phase("detected")
    withdraw(target)
    for stage, seconds in spent.items():
        store.keep_seconds(stage, store.seconds(stage) + seconds)
    for folder in (first_conclusion(target), *phases):
        withdraw(folder)


@contextlib.contextmanager
def _deciding(target: Path) -> Iterator[None]:
    """Hold the split of the corpus: nobody else computes it, or takes back what it rests on."""
    with locked(target.parent / ".deciding", wait="splits the corpus") as held:
        if held is not None:
            remove_leftovers(target.parent, target.name)
        yield
