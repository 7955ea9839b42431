"""From the opinions on every record to the split of the corpus.

A detector turns opinions into evidence unit by unit, then concludes on all of it.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from robustft import answers, crowd
from robustft.crowd import Estimate, Judgement
from robustft.detection.conclusion import PANEL, Conclusion
from robustft.detection.rule import Asked, paper_rule, unjudged
from robustft.opinions import Opinion
from robustft.prompts import LETTERS
from robustft.records import Record
from robustft.terminal import counted, plural_of

_CHANCE = (
    "agreement with the given answers is no more than chance would give: nothing was changed. "
)
_REGARDLESS = "; --detector paper trusts the model's word regardless"
NO_BETTER_THAN_CHANCE = (
    f"{_CHANCE}More records or a stronger model (--model) may help (with four options and 30 % of "
    "the answers wrong, a model right in 90 % stands out from 24 records on, one right in 50 % "
    f"from 150 on){_REGARDLESS}"
)
OPEN_ANSWERS_DIFFER = (
    f"{_CHANCE}More records, a stronger model (--model) or the finished runs of other models "
    f"(--second-opinion) may help{_REGARDLESS}"
)
TEXTS_DIFFER = (
    "free texts are compared by their words, and two good answers may share few: "
    "--detector paper asks the checker instead"
)
RULES_PASS = (
    "almost no wrong answers were found. Errors that depend on the question (a weaker model's "
    "mistakes, a whole topic) look right to the learners and are not counted in this noise rate: "
    "with a strong model, --detector panel leaves the judgement to it"
)

_ENOUGH = 30  # a set of options that so many records share is judged by itself, with learners
_MOST_SETS = 32  # the largest so many
_LETTER = 0.9  # the probability an expert is taken to give the letter it names without one
_FREE_TEXT = 1  # instead of a set of options
_WIDE = 0.3  # a noise rate whose interval is wider says little
_HARDLY_ANY = 0.02  # a noise rate that stays below it says that next to nothing was found
TUNED = "tuned"  # the model fine-tuned out of fold: [n, options] probabilities, where it was asked
Evidence = dict[str, NDArray[Any]]  # name -> [n] or [n, width], one row a record


class Detector(Protocol):
    """Gathers evidence unit by unit, anywhere and in any order; concludes once, on all of it."""

    def evidence(self, asked: Sequence[Asked]) -> Evidence:
        """What `conclude` needs to know of the records of one unit."""
        ...

    def conclude(
        self, evidence: Evidence, corpus: crowd.Corpus, progress: crowd.Progress | None = None
    ) -> Conclusion:
        """Decide on all records: the evidence of every unit, `stacked`, in input order."""
        ...


def stacked(parts: Sequence[Evidence]) -> Evidence:
    """The evidence of several units as one; narrower columns are filled up with zeros."""
    found = {}
    for name in parts[0]:
        arrays = [part[name] for part in parts]
        if arrays[0].ndim == 2:
            width = max(array.shape[1] for array in arrays)
            arrays = [
                array
                if array.shape[1] == width
                else np.pad(array, ((0, 0), (0, width - array.shape[1])))
                for array in arrays
            ]
        found[name] = np.concatenate(arrays)
    return found


class PaperDetector:
    """The paper's rule to the letter; see `paper_rule`."""

    def evidence(self, asked: Sequence[Asked]) -> Evidence:
        """noisy, unjudged: [n] bool."""
        skipped = _unjudged(asked)
        noisy = np.array([paper_rule(one).noisy for one in asked], np.bool_)
        return {"noisy": noisy & ~skipped, "unjudged": skipped}

    def conclude(
        self, evidence: Evidence, corpus: crowd.Corpus, progress: crowd.Progress | None = None
    ) -> Conclusion:
        """The rule looks at one record at a time: nothing is left to decide."""
        total = len(evidence["noisy"])
        silent = np.full(total, np.nan)
        nobody = np.full(total, -1, np.int8)
        return Conclusion(
            evidence["noisy"], evidence["unjudged"], np.zeros((total, 0)), silent, nobody
        )


class CrowdDetector:
    """Experts as a crowd, each trusted as far as the corpus shows (`robustft.crowd`).

    Multiple-choice records that offer the same options are a crowd of their own, where learners on
    the corpus join the panel; letters that mean something else in every question teach nothing,
    and there the panel judges alone. Open answers are compared as answers. The checker has no
    vote: it sees the given answer, so agreeing with it proves nothing. Other models (`others`
    names them) are one voter each. Without `learners` models alone have a vote.
    """

    def __init__(self, others: Sequence[str] = (), *, learners: bool = True) -> None:
        self.others = tuple(others)
        self._learners = learners

    def evidence(self, asked: Sequence[Asked]) -> Evidence:
        """What the crowd needs of each record.

        unjudged [n] bool; question [n] int64, equal where the same is asked; given [n] int8, -1
        without options; options [n] int64, which set of options, or that the answer is free text;
        width [n] int8, how many; base, reasoned and those of every other model [n, options]
        probabilities; clusters [n, 2 + others] int8, which answers are the same: the given one,
        the model's, the others' (without options; -1: no answer); answered [n] bool, whether any
        of these models gave one.
        """
        width = max((len(a.record.options or ()) for a in asked), default=0)
        given = np.full(len(asked), -1, np.int8)
        kinds = np.zeros(len(asked), np.int64)
        widths = np.zeros(len(asked), np.int8)
        clusters = np.zeros((len(asked), 2 + len(self.others)), np.int8)
        answered = np.ones(len(asked), np.bool_)
        heard = [name for name in PANEL if asked and getattr(asked[0], name) is not None]
        panel = {
            name: np.zeros((len(asked), width), np.float32)
            for name in (*heard, *map(_other, range(len(self.others))))
        }
        for position, one in enumerate(asked):
            options = one.record.options
            if options is None:
                # One model, one witness: what it says twice is not confirmed twice.
                own = (one.reasoned or one.base).answer or one.base.answer
                said = [own, *(other.answer for other in one.others)]
                kinds[position] = _FREE_TEXT if is_free_text(one.record) else 0
                clusters[position] = crowd.partition([one.record.answer, *said], one.record.kind)
                answered[position] = any(answer is not None for answer in said)
                continue
            letter = LETTERS.index(one.record.answer)
            given[position], widths[position] = letter, len(options)
            kinds[position] = _kind_of(options)
            opinions: list[Opinion] = [*(getattr(one, name) for name in heard), *one.others]
            for values, opinion in zip(panel.values(), opinions, strict=True):
                found = option_probabilities(opinion, len(options))
                values[position, : len(options)] = _as_one(found, options, letter)
        skipped = _unjudged(asked)
        keys = [one.record.question_key[:8] for one in asked]
        return {
            "unjudged": skipped, "question": np.frombuffer(b"".join(keys), "<i8"), "given": given,
            "options": kinds, "width": widths, "clusters": clusters, "answered": answered, **panel,
        }  # fmt: skip

    def conclude(
        self, evidence: Evidence, corpus: crowd.Corpus, progress: crowd.Progress | None = None
    ) -> Conclusion:
        """Judge the records with options, set by set, then those without."""
        skipped, given = evidence["unjudged"], evidence["given"]
        total = len(given)
        wrong, jury = np.full(total, np.nan), np.full(total, -1, np.int8)
        pooled = np.zeros((total, evidence["base"].shape[1] if "base" in evidence else 0))
        learned: dict[str, NDArray[np.float16]] = {}
        found: list[Judgement] = []

        def hear(judgement: Judgement, positions: NDArray[np.int64]) -> None:
            jury[positions] = len(found)
            found.append(judgement)
            if not judgement.powerless:
                wrong[positions] = judgement.wrong

        for positions, alike in _option_sets(evidence, np.flatnonzero((given >= 0) & ~skipped)):
            judgement = self._judge_choices(evidence, corpus, positions, alike, progress)
            hear(judgement, positions)
            if judgement.labels is not None:
                pooled[positions, : judgement.labels.shape[1]] = judgement.labels
            for name, values in judgement.learned.items():
                whole = learned.setdefault(name, np.zeros(pooled.shape, np.float16))
                whole[positions, : values.shape[1]] = values
        told: list[str] = []
        opened = np.flatnonzero((given < 0) & ~skipped)
        # Models write alike, people do not: among free texts agreement tells whose style it is.
        apart = (evidence["options"][opened] == _FREE_TEXT) & bool(self.others)
        for positions, columns in ((opened[~apart], None), (opened[apart], 2)):
            if len(positions):
                clusters = evidence["clusters"][positions, :columns].astype(np.int64)
                # In runs of before this alone tells who was silent.
                clusters[~evidence["answered"][positions], 1:] = -1
                judgement, answered, copied = self._judge_open(clusters)
                hear(judgement, positions[answered])
                jury[positions] = len(found) - 1
                told += copied
        if apart.any():
            texts = counted(int(apart.sum()), "free text is", "free texts are")
            told.append(f"{texts} compared with this model's alone")
        noisy = np.nan_to_num(wrong) > 0.5
        sizes = np.bincount(jury[jury >= 0], minlength=len(found)).tolist()
        rate = _whole_rate([one.noise_rate for one in found], sizes)
        return Conclusion(
            noisy, skipped, pooled, wrong, jury, [one.weights for one in found],
            bool(found) and all(one.powerless for one in found), rate,
            float(wrong[noisy].mean()) if noisy.any() else math.nan, learned,
            (*told, *_warnings(found, sizes, rate, evidence)),
        )  # fmt: skip

    def _judge_choices(
        self,
        evidence: Evidence,
        corpus: crowd.Corpus,
        chosen: NDArray[np.int64],
        alike: bool,
        progress: crowd.Progress | None,
    ) -> Judgement:
        given, widths = (evidence[name][chosen].astype(np.int64) for name in ("given", "width"))
        classes = int(widths.max())
        others = {_other(number): name for number, name in enumerate(self.others)}
        panel, tuned = (
            {
                name: evidence[column][chosen, :classes].astype(np.float64)
                for column, name in names.items()
                if column in evidence
            }
            for names in (dict(zip(PANEL, PANEL, strict=True)) | others, {TUNED: TUNED})
        )
        learners = None
        if alike and self._learners and len(chosen) > 1:
            questions = evidence["question"][chosen]
            learners = crowd.Learners.of(corpus, chosen, given, classes, questions, progress)
        return crowd.judge_labels(
            panel, given, classes, learners, tuned, options=widths, alike=alike, progress=progress
        )

    def _judge_open(
        self, clusters: NDArray[np.int64]
    ) -> tuple[Judgement, NDArray[np.bool_], list[str]]:
        """Judge partitions [n, 2 or more] where a model that is heard gave an answer.

        With it [n] where that is, and what the user should know of copies.
        """
        names = ["model", *self.others]
        copied = crowd.copies(clusters)
        whose = ["", "this model's", *(f"{name}'s" for name in self.others)]
        told = [
            f"{names[column - 1]} gives {whose[before]} answers where both contradict the given "
            "one, as a copy would: on open answers it is left out"
            for column, before in copied.items()
        ]
        heard = [column for column in range(clusters.shape[1]) if column not in copied]
        clusters = crowd.renumbered(clusters[:, heard])
        answered = np.asarray((clusters[:, 1:] >= 0).any(1))
        judgement = crowd.judge_partitions(clusters[answered], [names[n - 1] for n in heard[1:]])
        return judgement, answered, told


def _other(number: int) -> str:
    """The column of another model's probabilities in the evidence."""
    return f"other {number}"


def _option_sets(
    evidence: Evidence, chosen: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], bool]]:
    """The records at `chosen` in parts to be judged together, and whether all options are alike.

    Large sets of options one by one, whatever is left at the end.
    """
    if not len(chosen):
        return
    names, inverse, counts = np.unique(
        evidence["options"][chosen], return_inverse=True, return_counts=True
    )
    enough = 1 if len(names) == 1 else _ENOUGH
    largest = [n for n in np.argsort(-counts, kind="stable")[:_MOST_SETS] if counts[n] >= enough]
    for number in largest:
        yield chosen[inverse == number], True
    rest = chosen[~np.isin(inverse, largest)]
    if len(rest):
        yield rest, False


def models_contradict(rate: Estimate) -> str:
    """The warning where models find much more wrong than the learners let stand."""
    return (
        f"the models alone would call {rate} of the given answers wrong; the learners, taught by "
        "these answers, side with them. Either the models are wrong there, or the answers are, in "
        "a way that depends on the question (a weaker model's mistakes, a whole topic). If the "
        "models are strong, --detector panel goes by them; without shards and --folds the same "
        "command with it asks nothing twice"
    )


def _warnings(
    found: Sequence[Judgement],
    sizes: Sequence[int],
    rate: Estimate | None,
    evidence: Evidence,
) -> Iterator[str]:
    """What the user should know of juries that could not tell, or hardly."""
    judged = ~evidence["unjudged"]
    if found and all(one.powerless for one in found):
        if (evidence["options"][judged] == _FREE_TEXT).mean() > 0.5:
            yield TEXTS_DIFFER
        yield OPEN_ANSWERS_DIFFER if _mostly_open(evidence) else NO_BETTER_THAN_CHANCE
        return
    lost = sum(size for one, size in zip(found, sizes, strict=True) if one.powerless)
    if lost:
        yield (
            f"on {counted(lost, 'record')} no expert is better than chance: "
            f"{plural_of(lost, 'it is', 'these are')} kept as given"
        )
    taught = sum(size for one, size in zip(found, sizes, strict=True) if one.learned)
    by_models = _whole_rate([one.rate_by_panel or one.noise_rate for one in found], sizes)
    if rate is not None and by_models is not None and by_models.low > rate.high + _HARDLY_ANY:
        yield models_contradict(by_models)
    elif rate is not None and rate.high < _HARDLY_ANY and taught > sum(sizes) / 2:
        yield RULES_PASS
    if rate is None or rate.high - rate.low <= _WIDE:
        return
    span = f"{rate.low:.0%} to {rate.high:.0%} of the given answers may be wrong"
    if _mostly_open(evidence):
        heard = {name for one in found if "model" in one.weights for name in one.weights}
        witnesses = "one model alone" if len(heard) == 1 else f"{len(heard)} models"
        yield (
            f"with {witnesses} the noise rate stays open, {span}: another model's run as "
            "--second-opinion tells more, and --detector paper trusts this model's word"
        )
    else:
        yield (
            f"with these experts the noise rate stays open, {span}: a stronger model, or one that "
            "gives probabilities, tells more; --detector paper trusts the model's word"
        )


def _mostly_open(evidence: Evidence) -> bool:
    """Whether most records that can be judged offer no options."""
    return bool((evidence["given"][~evidence["unjudged"]] < 0).mean() > 0.5)


def _whole_rate(rates: Sequence[Estimate | None], sizes: Sequence[int]) -> Estimate | None:
    """The noise rate over all records of juries that know one."""
    pairs = zip(rates, sizes, strict=True)
    known = [((r.value, r.low, r.high), size) for r, size in pairs if r is not None]
    if not known:
        return None
    parts, weights = zip(*known, strict=True)
    return Estimate(*np.average(parts, axis=0, weights=weights).tolist())


def _unjudged(asked: Sequence[Asked]) -> NDArray[np.bool_]:
    """[n] records that an expert could not be reached about."""
    return np.array([unjudged(one) is not None for one in asked], np.bool_)


@functools.lru_cache(maxsize=4096)
def _kind_of(options: tuple[str, ...]) -> int:
    """A number for a set of options; sets that differ in spelling alone share it."""
    text = "\0".join(answers.option_names(options))
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def is_free_text(record: Record) -> bool:
    """Whether an answer has no options, no few words and no final number to be compared by."""
    return record.kind == "text" and not answers.parse_final_number(record.answer).answer


def option_probabilities(said: Opinion, options: int) -> NDArray[np.float32]:
    """[options] an expert's probabilities; most on its letter where only that is known."""
    if said.probabilities is not None:
        return np.array(said.probabilities, dtype=np.float32)
    values = np.full(options, 1.0 / options, dtype=np.float32)
    if said.answer is not None and said.answer in LETTERS[:options] and options > 1:
        values[:] = (1.0 - _LETTER) / (options - 1)
        values[LETTERS.index(said.answer)] = _LETTER
    return values


def _as_one(
    values: NDArray[np.float32], options: tuple[str, ...], given: int
) -> NDArray[np.float32]:
    """Probabilities where options that read like the given one count as it."""
    same = [n for n, option in enumerate(options) if n != given and option == options[given]]
    if same:
        values = values.copy()
        values[given] += values[same].sum()
        values[same] = 0.0
    return values
