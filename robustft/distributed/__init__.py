"""Several machines or processes and no coordinator: shards on a shared file system, then `merge`.

Every process works on a shard of its own and publishes each phase. What the corpus as a whole
decides (the split, the clean set, the selection) is computed from all shards, so the result is that
of one process. A shard that needs the others' phase waits for it; a killed one goes on where it
was when its command is run again.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from robustft.cleaning import (
    Announcement,
    identity_of,
    load,
    open_source,
    refuse_runs,
    spare_folder,
)
from robustft.config import CleanConfig, EngineConfig, ExpertConfig, TunedConfig
from robustft.corpus import Corpus
from robustft.decisions import conclude, reopen
from robustft.embedding import TextEmbedder
from robustft.engines import Abilities, Engine
from robustft.errors import UnfinishedError, UserError
from robustft.files import locked, remove_leftovers
from robustft.finishing import Models, finish
from robustft.intake import Intake, intake_folder, take_in
from robustft.outputs import METHOD, claim, identity, made_by
from robustft.pipeline import ShardRun, long_lived
from robustft.records import RecordSource
from robustft.second_opinions import found_again, full_paths
from robustft.shards import Published, Shard, conclusion_folder, plan_folder, publish, split
from robustft.store import UNIT_ROWS, Stopwatch, Store, folder_lock, refuse_changes
from robustft.terminal import listed
from robustft.tuned import refuse_folds
from robustft.verdicts import CleanResult

_SECONDS_BETWEEN_LOOKS = 1.0
_DOING = {"detected": "detection", "relabeled": "relabeling"}


@dataclass(frozen=True, slots=True)
class Plan:
    """What all shards of an output folder share."""

    config: CleanConfig
    identity: dict[str, Any]
    models: Models
    records: int
    of: int

    def shards(self) -> list[Shard]:
        """All shards, in input order; the last ones may be empty."""
        return split(self.records, self.of, self.config.out, self.identity["input"])

    def intake(self, root: Path | None = None) -> Intake:
        """The input as it was read; `root`: an output folder that has it."""
        return Intake(intake_folder(root or self.config.out, self.identity))

    def agree(self) -> Plan:
        """Publish the plan, or find that an earlier one is the same; returns that one.

        Raises UserError naming the differences.
        """
        out = self.config.out
        if (out / "run.sqlite").exists():
            raise UserError(f"{out}: holds a run of one process; choose another --out")
        facts = {**asdict(self), "config": _plain(self.config)}
        folder = plan_folder(out)
        with locked(folder.parent / ".planning", wait="plans the shards") as held:
            if held is not None:
                remove_leftovers(folder.parent, folder.name)
            if not folder.is_dir():
                publish(folder, {}, facts)
        found = read_plan(out)
        refuse_changes(out, found._shared(), self._shared())
        return replace(found, config=self.config)

    def _shared(self) -> dict[str, Any]:
        models = {f"{name} loaded": value for name, value in self.models.identity().items()}
        return {**self.identity, **models, "shards": self.of, "beta": self.config.beta}


def read_plan(out: Path) -> Plan:
    """The plan in an output folder; raises UserError where there is none."""
    folder = plan_folder(out)
    if not folder.is_dir():
        raise _without_shards(out)
    facts = Published(folder).facts
    try:
        config = dict(facts["config"])
        parts = {
            "out": out,
            "without": frozenset(config["without"]),
            "second_opinion": tuple(config.get("second_opinion", ())),
            "engine": EngineConfig(**config["engine"]),
            "experts": ExpertConfig(**config["experts"]),
            "tuned": TunedConfig(),  # shards have no folds
        }
        can = facts["models"]["abilities"]
        abilities = Abilities(**{**can, "found": tuple(can["found"])})
        models = Models(**{**facts["models"], "abilities": abilities})
        return Plan(
            CleanConfig(**{**config, **parts}), dict(facts["identity"]), models,
            int(facts["records"]), int(facts["of"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: is not the plan of a run ({error!r:.200})") from error


def _without_shards(folder: Path) -> UserError:
    if (folder / "run.sqlite").exists():
        return UserError(f"{folder}: needs no merge: it was not cleaned in shards")
    held = "holds no shards" if folder.is_dir() else "is no folder"
    return UserError(f"{folder}: {held}; expected the --out of `robustft clean --shard`")


def _plain(config: CleanConfig) -> dict[str, Any]:
    """A configuration as JSON; local paths in full, for `merge` from elsewhere."""
    plain = asdict(config)
    plain["second_opinion"] = full_paths(config.second_opinion)
    local = Path(config.input)
    plain["input"] = str(local.resolve()) if local.exists() else config.input
    return plain | {"out": str(config.out), "without": sorted(config.without)}


def make_plan(
    config: CleanConfig, source: RecordSource, models: Models, of: int | None = None
) -> Plan:
    """Read the input; the plan of a run in `of` shards (None: as many as there is, or `pieces`)."""
    refuse_folds(config, "shards")
    identity = identity_of(config, source)
    if plan_folder(config.out).is_dir():
        before = read_plan(config.out)
        records, of = before.records, of or before.of
    else:
        spare_folder(config, source, own=(config.out / "run.sqlite").exists())  # refused below
        with take_in(source, intake_folder(config.out, identity)) as intake:
            records = intake.records
    return Plan(config, identity, models, records, of or pieces(records)).agree()


def pieces(records: int) -> int:
    """Shards for workers that take one after the other: it depends on the input alone."""
    return min(-(-records // UNIT_ROWS), 256)


# --- one shard -----------------------------------------------------------------------------


def run_shard(
    config: CleanConfig,
    number: int,
    of: int,
    *,
    wait: float = 600.0,
    engine: Engine | None = None,
    embedder: TextEmbedder | None = None,
    announce: Callable[[Announcement], None] = lambda announcement: None,
) -> list[int]:
    """Detect and relabel shard `number` of `of`; returns the numbers of shards not finished yet.

    Waits up to `wait` seconds, counted anew whenever one gets there, for the other shards'
    detection. Raises UnfinishedError where that does not come.
    """
    source = open_source(config)
    engine, embedder = load(config, engine, embedder)
    models = Models.of(engine, embedder)
    plan = make_plan(config, source, models, of)
    shards = plan.shards()
    shard = shards[number]
    filled = [one for one in shards if one.rows]
    if shard.rows:
        resumed = (shard.folder / "run.sqlite").exists()
        target = conclusion_folder(config.out)
        with ExitStack() as stack:
            store = stack.enter_context(opened(shard, plan))
            intake = stack.enter_context(plan.intake())
            announce(Announcement.of(config, source, intake, models, resumed=resumed))
            _say(
                f"shard {shard.name}: records {shard.start:,} to {shard.stop:,} of {plan.records:,}"
            )
            reopen(shard, store, target, alone=False)
            stack.enter_context(long_lived())
            run = ShardRun(config, shard, intake, engine, embedder, store)
            run.detect()
            wait_for(filled, "detected", shard.name, wait)
            corpus = Corpus(intake, filled, config.threads, config.retriever)
            run.relabel(conclude(config, filled, target, corpus), corpus)
    else:
        _say(
            f"shard {shard.name}: nothing to do; shards are whole units of {UNIT_ROWS} records, "
            f"and there are {plan.records:,}"
        )
    return [one.number for one in filled if not one.phase("relabeled").is_dir()]


@contextlib.contextmanager
def opened(shard: Shard, plan: Plan) -> Iterator[Store]:
    """The store of a shard, its folder locked."""
    path = shard.folder / "run.sqlite"
    with folder_lock(shard.folder), Store(path, exclusive=True) as store:
        store.claim(plan.models.identity(), name="models")
        store.claim(plan.identity)
        yield store


def wait_for(shards: Sequence[Shard], phase: str, name: str, wait: float) -> None:
    """Return once every shard has published `phase`; raise UnfinishedError after `wait` seconds."""
    before: list[int] = []
    deadline = time.monotonic() + wait
    while missing := [one.number for one in shards if not one.phase(phase).is_dir()]:
        said = f"{_DOING[phase]} of {'shard' if len(missing) == 1 else 'shards'} {listed(missing)}"
        if missing != before:
            deadline = time.monotonic() + wait
            if wait > 0:
                _say(f"shard {name}: waiting for the {said}")
        before = missing
        if time.monotonic() >= deadline:
            raise UnfinishedError(
                f"shard {name}: the {said} is not finished; its own is kept: run those with "
                f"--shard N/{shards[0].of}, then the same command again"
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _say(text: str) -> None:
    print(f"robustft: {text}", file=sys.stderr, flush=True)


# --- all shards ----------------------------------------------------------------------------


def merge(
    folders: Sequence[Path],
    out: Path | None = None,
    *,
    data: str | None = None,
    second_opinion: Sequence[str] = (),
    watch: Stopwatch | None = None,
) -> CleanResult:
    """Select over all shards and write the outputs, once every shard has relabeled.

    Parameters
    ----------
    folders: output folders of `clean --shard`, or folders of shards, that hold all shards of a run.
    out: where the outputs go; None: the first of `folders`.
    data: the input, where it is no longer where the shards found it.
    second_opinion: those of the runs that the shards have heard which are no longer there.
    watch: started with the shards, where the same command ran them.

    Raises:
    ------
    UnfinishedError naming the shards that are missing; UserError for anything else.
    """
    watch = watch or Stopwatch()
    roots = list(dict.fromkeys(map(_root, folders)))
    plan = read_plan(roots[0])
    for root in roots[1:]:
        refuse_changes(root, read_plan(root)._shared(), plan._shared())
    heard = plan.identity.get("second_opinion", [])
    config = replace(
        plan.config, out=out or roots[0], input=data or plan.config.input,
        second_opinion=found_again(plan.config.second_opinion, heard, second_opinion),
    )  # fmt: skip
    source = open_source(config)
    if source.content_hash != plan.identity["input"]:
        raise UserError(f"{config.input}: is not the input that the shards were made from")
    elsewhere = config.out.resolve() not in map(Path.resolve, roots)
    if elsewhere:
        refuse_runs(config.out)
        own = made_by(config.out, METHOD, source.content_hash)
        spare_folder(config, source, own=own)
    shards = [_found(shard, roots) for shard in plan.shards() if shard.rows]
    missing = [shard.number for shard in shards if not shard.phase("relabeled").is_dir()]
    if missing:
        raise UnfinishedError(
            f"{roots[0]}: of {plan.of} shards these are not finished: {listed(missing)}; run "
            f"`robustft clean` with --shard N/{plan.of} for each, then merge again"
        )
    target = next(filter(Path.is_dir, map(conclusion_folder, roots)), conclusion_folder(roots[0]))

    def parts() -> Iterator[tuple[Shard, Store]]:
        for shard in shards:
            with opened(shard, plan) as store:
                yield shard, store

    with folder_lock(config.out), plan.intake(roots[0]) as intake, long_lived():
        if elsewhere:
            claim(config.out, identity(config, METHOD, source.content_hash))
        corpus = Corpus(intake, shards, config.threads, config.retriever)
        conclusion = conclude(config, shards, target, corpus)
        return finish(config, source, parts(), corpus, conclusion, plan.models, watch)


def config_of_shards(folder: Path) -> CleanConfig:
    """What the shards in an output folder, or in the one that holds it, were started with."""
    return read_plan(_root(folder)).config


def _root(folder: Path) -> Path:
    """The output folder that holds this one, or this one."""
    for root in (folder, folder.parent.parent):
        if plan_folder(root).is_dir():
            return root
    raise _without_shards(folder)


def _found(shard: Shard, roots: Sequence[Path]) -> Shard:
    """The shard in whichever folder has most of it."""
    found = [replace(shard, folder=root / "shards" / shard.folder.name) for root in roots]
    for one in found:
        if one.phase("relabeled").is_dir():
            return one
    return found[0]
