"""What the commands print: announcements on stderr, results on stdout."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from robustft.config import CleanConfig, EngineConfig
from robustft.terminal import counted, listed, percentages, printable

if TYPE_CHECKING:  # which import what takes seconds
    from robustft.cleaning import Announcement
    from robustft.verdicts import CleanResult


def print_announcement(known: Announcement) -> None:
    """First lines of a run: what was read and which models will be asked."""
    bad = f", {known.rejects:,} of them unreadable" if known.rejects else ""
    read = counted(known.records + known.rejects, "record")
    if known.limit == known.records:
        read = f"the first {read}, by --limit {known.limit}"
    print(printable(f"robustft: {read}{bad}, read as {known.schema}"), file=sys.stderr)
    print(
        printable(f"robustft: experts: {known.models.model}; embeddings: {known.models.embedder}"),
        file=sys.stderr,
    )
    if found := known.models.abilities.found:
        print(printable(f"robustft: server: {'; '.join(found)}"), file=sys.stderr)
    if known.models.small_embedded_model:
        print_small_model()
    if known.free_texts:
        print(
            "robustft: most answers are free texts. Two good ones may share few words, so their "
            "agreement tells little, and few or none will be judged. --detector paper goes by the "
            "checker.",
            file=sys.stderr,
        )
    if known.resumed:
        anew = f"; --detector {known.judged_by} judges anew" if known.judged_by else ""
        print(
            f"robustft: resuming; what was asked before is not asked again{anew}", file=sys.stderr
        )


def tell_small_model(engine: EngineConfig) -> None:
    """Beside a result: what it is worth, where the default model made it."""
    from robustft.models import is_small

    if is_small(engine):
        print_small_model()


def print_small_model() -> None:
    """What the default model is good for."""
    from robustft.models import DEFAULT_MODEL

    print(
        f"robustft: {DEFAULT_MODEL} is a small model: fine to see how everything works, too weak "
        "for real work. Name a stronger one with --model.",
        file=sys.stderr,
    )


def print_clean_summary(result: CleanResult, compared: str = "") -> None:
    """What happened, where the files are, how it compares with a truth and what to run next."""
    counts, out = result.counts, result.out
    judged = f"{counts['clean']:,} found clean, {counts['noisy']:,} noisy"
    if counts["unjudged"]:
        judged += f", {counts['unjudged']:,} not judged"
    if result.powerless:
        judged = "not judged, nothing changed"
    print(f"{counted(counts['input'], 'record')}: {judged}, {counts['rejected']:,} unreadable")
    for action, meaning in (
        ("keep", "as given"),
        ("relabel", "new answer, from the experts or the corpus"),
        ("drop", "no answer, given or new, was confident enough"),
        ("rejected", f"could not be read: see {out / 'rejects.jsonl'}"),
    ):
        if counts[action] or not (result.powerless or action == "rejected"):
            name = {"keep": "kept", "relabel": "relabeled", "drop": "dropped"}.get(action, action)
            print(f"  {name:<10} {counts[action]:>8,}  {meaning}")
    if result.weights and not result.powerless:
        shares = zip(result.weights, percentages([*result.weights.values()]), strict=True)
        print(f"votes         {', '.join(f'{name} {share}%' for name, share in shares)}")
    if result.estimate and not result.powerless:
        print(f"noise         {result.estimate}")
    if rule := next((one for one in result.confusions if one.prevails), None):
        print(f"mostly        {rule}")
    print(f"training set  {result.cleaned}")
    print(f"report        {out / 'report.html'}  (open it in a browser)")
    print(f"verdicts      {out / 'verdicts.jsonl'}")
    print(f"took          {result.seconds['total']:.0f} s{_elsewhere(result)}")
    if compared:
        print(compared)
    nothing = "nothing is left to train on: the report says why; a larger --beta keeps more"
    _print_next_steps(result, "" if result.powerless else nothing)


def _print_next_steps(result: CleanResult, otherwise: str) -> None:
    if result.next_steps:
        print("next:", *result.next_steps, sep="\n  ")
    elif otherwise:
        print(otherwise)


def _elsewhere(result: CleanResult) -> str:
    """The time of earlier sessions, or that of shards, which may have worked at the same time."""
    if result.earlier is None:
        shards = sum(seconds for name, seconds in result.seconds.items() if name != "total")
        return f"; the stages of all shards {shards:.0f} s, added up" if shards >= 1 else ""
    return f", and {result.earlier:.0f} s in earlier sessions" if result.earlier >= 1 else ""


def print_baseline_summary(result: CleanResult, method: str, compared: str = "") -> None:
    """What a baseline did, as `print_clean_summary`."""
    counts = result.counts
    done = ", ".join(
        f"{counts[name]:,} {word}"
        for name, word in (
            ("keep", "kept as given"),
            ("relabel", "relabeled"),
            ("drop", "dropped"),
            ("rejected", "unreadable"),
        )
    )
    print(f"{counted(counts['input'], 'record')}: {done} ({method})")
    print(f"training set  {result.cleaned}")
    print(f"verdicts      {result.out / 'verdicts.jsonl'}")
    print(f"took          {result.seconds['total']:.0f} s")
    if compared:
        print(compared)
    _print_next_steps(result, "nothing is left to train on")


def print_shard_summary(
    shard: tuple[int, int], missing: Sequence[int], config: CleanConfig
) -> None:
    """A finished shard: what is still to come."""
    print(f"shard {shard[0]}/{shard[1]} is finished")
    if missing:
        print(f"still at work: {'shard' if len(missing) == 1 else 'shards'} {listed(missing)}")
    print("then:" if missing else "next:")
    print(f"  {shlex.join(['robustft', 'merge', str(config.out)])}")
