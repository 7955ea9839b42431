"""`clean --ray`: the shards of `robustft.distributed` as work of actors on a Ray cluster.

The driver hands out one shard after the other and takes the steps over all shards itself. Ray
starts a dead actor again and gives it its shard back; a dead driver's command, run again, finds
what was published and asks nothing twice. Every node must see --out.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from robustft.cleaning import Announcement, load, open_source
from robustft.config import CleanConfig
from robustft.corpus import Corpus
from robustft.decisions import conclude, reopen
from robustft.distributed import Plan, make_plan, merge, opened
from robustft.embedding import TextEmbedder
from robustft.engines import Engine
from robustft.errors import UserError
from robustft.files import BusyError
from robustft.finishing import Models
from robustft.intake import Intake
from robustft.pipeline import Effort, ShardRun, long_lived
from robustft.progress import Progress
from robustft.second_opinions import full_paths
from robustft.shards import Shard, conclusion_folder, plan_folder
from robustft.store import Stopwatch, Store
from robustft.verdicts import CleanResult

_STARTS = 25  # of one phase of a shard, killed drivers included, before it is given up
_LOCK_SECONDS = 120.0  # how long a worker that was replaced may take to let go of a shard
_REACH_SECONDS = 10.0  # how long a cluster's port may take to answer

Loader = Callable[[CleanConfig], tuple[Engine, TextEmbedder]]


class Worker:
    """An actor: models loaded once, then shards, one phase at a time."""

    def __init__(self, config: CleanConfig, loader: Loader) -> None:
        self.config = config
        self._loader = loader

    @cached_property
    def _loaded(self) -> tuple[Engine, TextEmbedder]:
        """Not of the constructor: what fails there reaches the driver as a dead actor."""
        return self._loader(self.config)

    def models(self) -> Models:
        """Who answers here."""
        return Models.of(*self._loaded)

    def sees(self, path: str) -> bool:
        """Whether a file of the driver's is there."""
        return Path(path).exists()

    @cached_property
    def _shards(self) -> list[Shard]:
        return [shard for shard in self._plan.shards() if shard.rows]

    @cached_property
    def _corpus(self) -> Corpus:
        return Corpus(self._intake, self._shards, self.config.threads, self.config.retriever)

    @cached_property
    def _intake(self) -> Intake:
        return self._plan.intake()

    def detect(self, plan: Plan, number: int) -> int:
        """Detect one shard; returns its records."""
        return self._work(plan, number, lambda run: run.detect())

    def relabel(self, plan: Plan, number: int) -> int:
        """Relabel one shard; returns its records."""
        self._plan = plan
        target = conclusion_folder(plan.config.out)
        found = conclude(plan.config, self._shards, target, self._corpus)
        return self._work(plan, number, lambda run: run.relabel(found, self._corpus))

    def _work(self, plan: Plan, number: int, step: Callable[[ShardRun], None]) -> int:
        self._plan = plan
        shard = plan.shards()[number]
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                with opened(shard, plan) as store, long_lived():
                    _note_start(shard, store)
                    reopen(shard, store, conclusion_folder(plan.config.out), alone=False)
                    step(
                        ShardRun(plan.config, shard, self._intake, *self._loaded, store, quiet=True)
                    )
                    store.set_meta("starts", 0)
                return shard.rows
            except BusyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)


def _note_start(shard: Shard, store: Store) -> None:
    """Count a start before the work, so that what kills its worker does not do so for ever."""
    starts = (store.get_meta("starts") or 0) + 1
    if starts > _STARTS:
        store.set_meta("starts", 0)
        raise UserError(
            f"shard {shard.name}: its worker died {_STARTS} times (out of memory?); what is "
            "finished is kept, the same command resumes"
        )
    store.set_meta("starts", starts)


def run_ray(
    config: CleanConfig,
    address: str | None,
    actors: int | None = None,
    loader: Loader = load,
    announce: Callable[[Announcement], None] = lambda announcement: None,
) -> CleanResult:
    """Clean on a Ray cluster (None: one that is started here) with so many actors.

    By default there is an actor for every GPU of the cluster, or, without any, for every two
    cores. Raises UserError where Ray is not there or a shard kills its worker again and again.
    """
    watch = Stopwatch()
    ray = _connected(address)
    asked, config = (
        config.out,
        replace(config, out=config.out.resolve(), second_opinion=full_paths(config.second_opinion)),
    )
    source = open_source(config)
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    cores = int(resources.get("CPU", 1))
    count = actors or gpus or max(1, cores // 2)
    share = {"num_gpus": 1} if gpus >= count else {}
    remote: Any = ray.remote(Worker).options(
        num_cpus=_cores_each(_cores_of_nodes(ray), count) if not share else 1,
        max_restarts=-1,
        max_task_retries=-1,  # Ray counts a try whenever it finds the actor still restarting
        **share,
    )
    try:
        pool = [remote.remote(config, loader) for _ in range(count)]
        models: Models = ray.get([actor.models.remote() for actor in pool])[0]
        resumed = plan_folder(config.out).is_dir()
        plan = make_plan(config, source, models)
        _check_seen(ray, pool, config.out)
        shards = [shard for shard in plan.shards() if shard.rows]
        with plan.intake() as intake:
            announce(Announcement.of(config, source, intake, models, resumed=resumed))
        effort = Effort(config)
        _through(ray, pool, plan, shards, "detect", effort.detect)
        with plan.intake() as intake:
            corpus = Corpus(intake, shards, config.threads, config.retriever)
            found = conclude(config, shards, conclusion_folder(config.out), corpus)
            share_noisy = float(found.noisy.mean())
        _through(ray, pool, plan, shards, "relabel", effort.relabel * share_noisy)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, UserError) else RuntimeError(str(cause)) from None
    except ray.exceptions.RayError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"Ray: {first}; what is finished is kept, the same command resumes"
        ) from None
    finally:
        ray.shutdown()
    return merge([asked], second_opinion=config.second_opinion, watch=watch)


def _cores_of_nodes(ray: Any) -> list[int]:
    return [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]


def _cores_each(nodes: Sequence[int], count: int) -> float:
    """As many cores for each of `count` actors as let all of them find a node.

    Ray waits for ever with an actor that fits nowhere: three of two cores on nodes of three, or
    more actors than cores, which then share them.
    """
    cores = sum(nodes)
    for each in range(cores // count, 0, -1):
        if sum(node // each for node in nodes) >= count:
            return each
    return 1 / -(-count // max(1, cores))


def _connected(address: str | None) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # they do the work; 15 starves on a busy host
    try:
        import ray
    except ImportError:
        raise UserError("--ray: Ray is not installed; install robustft[ray]") from None
    _reach(address)
    settings: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "error",
        "configure_logging": True,
    }
    try:
        if address is None:
            ray.init(include_dashboard=False, **settings)
        else:
            ray.init(address, **settings)
    except (ConnectionError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or ["no answer"])[0]
        raise UserError(f"--ray {address or ''}: cannot connect: {first}") from None
    return ray


def _reach(address: str | None) -> None:
    """Raise UserError where nothing listens at HOST:PORT, which Ray itself tries for minutes."""
    found = re.fullmatch(r"(?:ray://)?(?P<host>[^/]+):(?P<port>\d+)/?", address or "")
    if found:
        try:
            place = found["host"].strip("[]"), int(found["port"])
            socket.create_connection(place, timeout=_REACH_SECONDS).close()
        except OSError as error:
            raise UserError(f"--ray {address}: cannot connect: {error.strerror or error}") from None


def _check_seen(ray: Any, pool: Sequence[Any], out: Path) -> None:
    """Refuse workers that work on another disk."""
    probe = out / f".seen-{secrets.token_hex(6)}"
    probe.touch()
    try:
        seen = ray.get([actor.sees.remote(str(probe)) for actor in pool])
    finally:
        probe.unlink()
    if not all(seen):
        raise UserError(
            f"{out}: {seen.count(False)} of {len(seen)} Ray workers do not see this folder; choose "
            "an --out on a file system that all nodes share"
        )


def _through(
    ray: Any, pool: Sequence[Any], plan: Plan, shards: Sequence[Shard], phase: str, effort: float
) -> None:
    """Bring every shard through a phase."""
    done = {"detect": "detected", "relabel": "relabeled"}[phase]
    left = [shard.number for shard in shards if not shard.phase(done).is_dir()]
    kept = ray.put(plan)
    workers = ray.util.ActorPool(list(pool))
    with Progress(phase, plan.records * effort) as progress:
        progress.skip((plan.records - sum(plan.shards()[n].rows for n in left)) * effort)
        for rows in workers.map_unordered(
            lambda actor, number: getattr(actor, phase).remote(kept, number), left
        ):
            progress.update(rows * effort)
