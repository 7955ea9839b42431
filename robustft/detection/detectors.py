"""From the opinions on every record to the split of the corpus.

A detector turns opinions into evidence unit by unit, then concludes on all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from robustft import crowd
from robustft.crowd import Estimate, Judgement
from robustft.detection.conclusion import PANEL, Conclusion
from robustft.detection.evidence import (
    FREE_TEXT,
    TUNED,
    Evidence,
    as_one,
    is_free_text,
    option_probabilities,
    option_set,
)
from robustft.detection.rule import Asked, paper_rule, unjudged
from robustft.detection.warnings import doubts
from robustft.opinions import Opinion
from robustft.prompts import LETTERS
from robustft.terminal import counted

_ENOUGH = 30  # a set of options that so many records share is judged by itself, with learners
_MOST_SETS = 32  # the largest so many


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
                kinds[position] = FREE_TEXT if is_free_text(one.record) else 0
                clusters[position] = crowd.partition([one.record.answer, *said], one.record.kind)
                answered[position] = any(answer is not None for answer in said)
                continue
            letter = LETTERS.index(one.record.answer)
            given[position], widths[position] = letter, len(options)
            kinds[position] = option_set(options)
            opinions: list[Opinion] = [*(getattr(one, name) for name in heard), *one.others]
            for values, opinion in zip(panel.values(), opinions, strict=True):
                found = option_probabilities(opinion, len(options))
                values[position, : len(options)] = as_one(found, options, letter)
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
        apart = (evidence["options"][opened] == FREE_TEXT) & bool(self.others)
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
        by_models = _whole_rate([one.rate_by_panel or one.noise_rate for one in found], sizes)
        return Conclusion(
            noisy, skipped, pooled, wrong, jury, [one.weights for one in found],
            bool(found) and all(one.powerless for one in found), rate,
            float(wrong[noisy].mean()) if noisy.any() else math.nan, learned,
            (*told, *doubts(found, sizes, rate, by_models, evidence)),
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
