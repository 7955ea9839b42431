"""`clean`: one call from an input file to an output folder."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robustft.config import CleanConfig, EngineConfig, ExpertConfig, TunedConfig, experts_for
from robustft.corpus import Corpus
from robustft.decisions import conclude, judge_again, reopen
from robustft.detection import Conclusion, is_free_text
from robustft.embedding import Embedder, TextEmbedder
from robustft.engines import Engine
from robustft.engines.factory import load_engine
from robustft.errors import UserError
from robustft.files import drafted, rename_synced, spare_input_folder, spare_others
from robustft.finishing import Models, finish, seconds_before
from robustft.intake import Intake, intake_folder, remove_intake, remove_others, take_in
from robustft.models import DEFAULT_EMBEDDER, find_embedder, find_model, is_small
from robustft.outputs import EXCHANGE, OUTPUTS, read_manifest
from robustft.pipeline import ShardRun, long_lived
from robustft.records import RecordSource, open_records, output_name
from robustft.records.formats import dump_json
from robustft.remote import local_path, output_folder
from robustft.retrieval.approximate import require_retriever
from robustft.second_opinions import SecondOpinions
from robustft.shards import Shard, conclusion_folder, first_conclusion, plan_folder
from robustft.store import Stopwatch, Store, folder_lock
from robustft.tuned import ask_tuned, require_choices
from robustft.verdicts import CleanResult

# Settings that no expert's answer depends on: a run is resumed with others, too.
_FREE = ("detector",)


def clean(
    data: str | Path | Iterable[Mapping[str, Any]],
    *,
    out: str | Path,
    model: str | Path | None = None,
    engine: Engine | EngineConfig | None = None,
    embedder: TextEmbedder | str | Path | None = None,
    experts: ExpertConfig | None = None,
    **settings: Any,
) -> CleanResult:
    """Clean a noisy SFT corpus: detect, relabel, select (RobustFT, arXiv 2412.14922).

    Parameters
    ----------
    data: a file (JSONL, JSON, CSV, TSV, Parquet, .gz, .zst; here, or s3:// and the like), a hub
        dataset id, or rows as mappings.
    out: the output folder (see `robustft.remote` for s3:// and the like); an unfinished run in it
        is resumed.
    model: hub id, folder or .gguf file; None is the embedded small model.
    engine: a `robustft.EngineConfig` (a server, a device, …) or a ready `robustft.engines.Engine`,
        instead of `model`.
    embedder: a sentence-embedding model by name, or a ready one; None is the embedded MiniLM.
    experts, settings: by the names of the command line, the other fields of `robustft.CleanConfig`,
        those of `robustft.ExpertConfig` (rounds, samples, …), of `robustft.config.TunedConfig`
        (folds, …) and, without `engine`, of `robustft.EngineConfig` (device, temperature, …).

    Raises:
    ------
    UserError (a ValueError) with one clear line where the input or an argument is wrong.
    """
    if not (engine is None or isinstance(engine, EngineConfig) or hasattr(engine, "plan")):
        raise TypeError(f"engine must be an EngineConfig or an Engine, got {engine!r:.80}")
    if engine is not None and model is not None:
        raise UserError("give model or engine, not both; EngineConfig has a model of its own")
    known: set[str] = set()

    def fields_of(kind: type[Any], *but: str) -> dict[str, Any]:
        names = {one.name for one in dataclasses.fields(kind)}.difference(but)
        known.update(names)
        return {name: settings.pop(name) for name in sorted(names & settings.keys())}

    asked, folds = fields_of(ExpertConfig), fields_of(TunedConfig)
    run_by = fields_of(EngineConfig, "engine", "model")
    rest = fields_of(CleanConfig, "input", "out", "engine", "embedder", "experts", "tuned")
    for name in settings:
        near = difflib.get_close_matches(name, known, 1)
        meant = (
            f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"
        )
        raise UserError(f"clean has no setting {name!r}{meant}")
    if engine is not None and run_by:
        raise UserError(f"give {', '.join(run_by)} or engine, not both: an engine has its own")
    if "without" in rest:
        rest["without"] = frozenset(_several("without", rest["without"], "a name", str))
    if "second_opinion" in rest:
        runs = _several("second_opinion", rest["second_opinion"], "a path", str | Path)
        rest["second_opinion"] = tuple(map(str, runs))
    model = str(model) if isinstance(model, Path) else model
    embedder = str(embedder) if isinstance(embedder, Path) else embedder
    if not (embedder is None or isinstance(embedder, str) or hasattr(embedder, "encode")):
        raise UserError(f"embedder must be a model's name or a TextEmbedder, got {embedder!r:.80}")
    if not (experts is None or isinstance(experts, ExpertConfig)):
        raise UserError(f"experts must be an ExpertConfig, got {experts!r:.80}")
    if not isinstance(out, str | Path):
        raise UserError(f"out must be a path, got {out!r:.80}")
    described = engine if isinstance(engine, EngineConfig) else EngineConfig(model, **run_by)
    tuned = TunedConfig(**folds)
    ready = None if isinstance(embedder, str) else embedder
    loaded = None if isinstance(engine, EngineConfig) else engine
    small = is_small(described) if loaded is None else loaded.embedded
    exchange = bool(rest.get("dataset_info"))
    with output_folder(out, data, exchange=exchange) as folder, _as_file(data, folder) as path:
        config = CleanConfig(
            input=str(path),
            out=folder,
            engine=described,
            embedder=embedder if isinstance(embedder, str) else None,
            experts=dataclasses.replace(experts, **asked)
            if experts
            else experts_for(small, **asked),
            tuned=tuned,
            **rest,
        )
        return run_clean(config, engine=loaded, embedder=ready)


def _several(name: str, value: Any, what: str, kind: Any) -> list[Any]:
    """One value or several, as a list; raises UserError where one is not of `kind`."""
    if isinstance(value, kind):
        return [value]
    iterable = isinstance(value, Iterable) and not isinstance(value, bytes | Mapping)
    several = list(value) if iterable else [value]
    if not iterable or not all(isinstance(one, kind) for one in several):
        raise UserError(f"{name} must be {what} or several, got {value!r:.80}")
    return several


@contextmanager
def _as_file(data: Any, folder: Path) -> Iterator[str | Path]:
    """`data`, or rows as a file in `folder`, which goes again where no run has begun there."""
    if isinstance(data, str | Path):
        yield data
        return
    new, before = not folder.exists(), set(folder.glob("input-*.jsonl"))
    path = None
    try:
        path = _rows_file(data, folder)
        yield path
    except BaseException:
        if path is not None and path not in before and not (folder / "run.sqlite").exists():
            path.unlink(missing_ok=True)
        if new:
            with suppress(OSError):  # it holds something
                folder.rmdir()
        raise


def _rows_file(rows: Any, folder: Path) -> Path:
    """A file of rows, named by its content: no other call's, nor anybody else's, is replaced."""
    if isinstance(rows, Mapping):  # datasets.DatasetDict too
        raise UserError(
            f"data: expected a path or rows, found a mapping with keys {list(rows)!r:.80}; give "
            "one of its values, such as a split"
        )
    if not isinstance(rows, Iterable):
        raise UserError(f"data: expected a path or rows, found {rows!r:.80}")
    digest = hashlib.blake2b(digest_size=8)
    with drafted(folder / "input.jsonl") as draft:
        with draft.open("wb") as handle:
            for number, row in enumerate(rows):
                try:
                    line = dump_json(dict(row)) + b"\n"
                except (TypeError, ValueError) as error:
                    raise UserError(
                        f"data: row {number} must be a mapping of values that JSON has, got "
                        f"{row!r:.200} ({error})"
                    ) from None
                digest.update(line)
                handle.write(line)
        path = folder / f"input-{digest.hexdigest()}.jsonl"
        rename_synced(draft, path)
    return path


@dataclass(frozen=True, slots=True)
class Announcement:
    """What is known before the first question is asked."""

    records: int
    rejects: int
    schema: str  # and the fields it reads, and what answers are called that are no letters
    models: Models
    resumed: bool
    limit: int | None = None  # at most so many records are read
    judged_by: str = ""  # a detector that judges anew what was said
    free_texts: bool = False  # most of the first answers are: of these a detector can tell little

    @classmethod
    def of(
        cls,
        config: CleanConfig,
        source: RecordSource,
        intake: Intake,
        models: Models,
        *,
        resumed: bool,
        judged_by: str = "",
    ) -> Announcement:
        """What is known of an input that was read."""
        schema = f"{source.schema} ({', '.join(source.layout.fields)})"
        schema += f"; answers {source.called}" * bool(source.called)
        some = intake.unit(0)
        free = config.votes and 2 * sum(map(is_free_text, some)) > len(some)
        return cls(
            intake.records, intake.rejects, schema, models, resumed, source.limit, judged_by, free
        )


def run_clean(
    config: CleanConfig,
    *,
    engine: Engine | None = None,
    embedder: TextEmbedder | None = None,
    announce: Callable[[Announcement], None] = lambda announcement: None,
) -> CleanResult:
    """Run `config` from the input file to the report; see `clean` for errors."""
    watch = Stopwatch()
    if engine is not None and config.tuned.folds:
        raise UserError("folds are fine-tuned from a model by name: give model, not an engine")
    source = open_source(config)
    if plan_folder(config.out).is_dir():
        raise UserError(
            f"{config.out}: holds the shards of a run; go on with --shard, --processes or --ray as "
            "before, finish with `robustft merge`, or choose another --out"
        )
    require_models(config, engine, embedder)
    with ExitStack() as stack:
        stack.enter_context(folder_lock(config.out))
        path = config.out / "run.sqlite"
        new = not path.exists()
        spare_folder(config, source, own=not new)
        identity = identity_of(config, source)
        taken = intake_folder(config.out, identity)
        failing = stack.enter_context(ExitStack())
        if new:
            failing.callback(remove_traces, path, taken)
        store = stack.enter_context(Store(path))
        resumed = store.holds(identity, free=_FREE)
        intake = stack.enter_context(take_in(source, taken))
        if 2 * config.tuned.folds > intake.records:
            raise UserError(
                f"--folds: expected at most half the number of records, {intake.records}, found "
                f"{config.tuned.folds}"
            )
        engine, embedder = load(config, engine, embedder)
        models = Models.of(engine, embedder)
        # Only now: a run that failed for a wrong --model or --device leaves the folder free.
        store.claim(models.identity(), name="models")
        shard = Shard(0, 1, 0, intake.records, config.out)
        target = conclusion_folder(config.out)
        judged_by = ""
        if resumed and store.get_meta("fingerprint")["detector"] != config.detector:
            judged_by = config.detector
            judge_again(shard, store, target)
        store.claim(identity, free=_FREE)
        failing.pop_all()  # the run has begun: what it leaves is for the next session
        remove_others(intake.folder)
        stack.enter_context(long_lived())
        announce(
            Announcement.of(config, source, intake, models, resumed=resumed, judged_by=judged_by)
        )
        reopen(shard, store, target, alone=True)
        before = seconds_before(store, target)
        store.keep_seconds("load", before["load"] + watch.seconds())
        run = ShardRun(config, shard, intake, engine, embedder, store)
        run.detect()
        corpus = Corpus(intake, [shard], config.threads, config.retriever)
        conclusion = _conclude(config, shard, store, corpus, target)
        run.relabel(conclusion, corpus)
        alone = iter([(shard, store)])
        return finish(config, source, alone, corpus, conclusion, models, watch, before)


def _conclude(
    config: CleanConfig, shard: Shard, store: Store, corpus: Corpus, target: Path
) -> Conclusion:
    """The split of the corpus; where folds are fine-tuned, the second one, which has heard them."""
    if not config.tuned.folds or target.is_dir():
        return conclude(config, [shard], target, corpus)
    watch = Stopwatch()
    first = conclude(config, [shard], first_conclusion(target), corpus)
    tuned = None if first.powerless else ask_tuned(config, shard, corpus.intake, store, first)
    return conclude(config, [shard], target, corpus, tuned, {"folds": watch.seconds()})


def open_source(config: CleanConfig) -> RecordSource:
    """The input of a configuration, once it is certain that no output will land on it."""
    for name in (config.input, str(config.out), *config.second_opinion):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{name}: the name is not UTF-8, as a manifest is; rename it") from None
    source = open_records(
        config.input, schema=config.schema, limit=config.limit, split=config.split
    )
    require_choices(config, source)
    require_retriever(config.retriever)
    SecondOpinions(config.second_opinion).require_input(source, config.fingerprint())
    refuse_overwriting(config, source)
    return source


def require_models(
    config: CleanConfig, engine: Engine | None, embedder: TextEmbedder | None
) -> None:
    """Raise UserError for models that cannot be any, before anything is written."""
    if engine is None and config.engine.engine != "openai" and not is_small(config.engine):
        find_model(config.engine.model)
    if embedder is None and config.embedder not in (None, DEFAULT_EMBEDDER):
        find_embedder(config.embedder)


def load(
    config: CleanConfig, engine: Engine | None = None, embedder: TextEmbedder | None = None
) -> tuple[Engine, TextEmbedder]:
    """The models of a configuration, but for those that are ready.

    Raises UserError where the engine cannot give what the method needs, or its model has given the
    second opinions too.
    """
    if config.threads:
        torch.set_num_threads(min(config.threads, os.cpu_count() or 1))
    engine = engine or load_engine(config.engine)
    SecondOpinions(config.second_opinion).require_other(engine.model_id, engine.revision)
    if not engine.abilities.nll and "selection" not in config.without:
        raise UserError(
            f"{config.engine.base_url}: the server gives no log-probabilities, by which new labels "
            "are selected (eq. 7): add --without selection to keep all of them, or use a server "
            "that gives them (vLLM, SGLang, llama.cpp)"
        )
    return engine, embedder or Embedder(config.embedder)


def remove_traces(store: Path, intake: Path) -> None:
    """Remove the closed store and the intake of a run that did not begin.

    Only for who holds the output folder.
    """
    for name in ("", "-wal", "-shm"):
        Path(f"{store}{name}").unlink(missing_ok=True)
    remove_intake(intake)


def identity_of(config: CleanConfig, source: RecordSource) -> dict[str, Any]:
    """What a resumed run must share with the run it resumes."""
    identity = config.fingerprint() | {"input": source.content_hash}
    if config.second_opinion:  # whose they are, wherever they lie
        identity["second_opinion"] = SecondOpinions(config.second_opinion).identity
    del identity["engine.batch_tokens"]  # a run that died for memory may go on with fewer
    del identity["beta"]  # nobody is asked for it: another share is selected from what was said
    return identity


def spare_folder(config: CleanConfig, source: RecordSource, *, own: bool) -> None:
    """Raise UserError where a run's outputs would land on files of somebody else's.

    `own`: those that are there are an earlier session's of this run, which need not have been asked
    for `--dataset-info`.
    """
    names = [] if own else [output_name(source), *OUTPUTS]
    if config.dataset_info and not read_manifest(config.out).get("dataset_info"):
        names += EXCHANGE
    spare_others(config.out / name for name in names)


def refuse_runs(out: Path) -> None:
    """Raise UserError where a folder holds a run that would write its outputs there again."""
    if (out / "run.sqlite").exists() or plan_folder(out).is_dir():
        raise UserError(f"{out}: holds a run of robustft; choose another --out")


def refuse_overwriting(config: CleanConfig, source: RecordSource) -> None:
    """No output may land on the input, nor among the files of an input folder."""
    given, out = local_path(config.input).resolve(), config.out.resolve()
    spare_input_folder(config.out, given)
    exchange = EXCHANGE if config.dataset_info else ()
    if given in {out / name for name in (output_name(source), *OUTPUTS, *exchange)}:
        raise UserError(f"{config.input}: would be overwritten; choose another --out")
