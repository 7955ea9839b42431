"""Several sampled opinions of one expert made into one: self-consistency (Wang et al. 2022).

arXiv 2203.11171 marginalises the reasoning out: the answer that most sampled paths lead to.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from robustft import crowd
from robustft.answers import Kind
from robustft.opinions import Opinion, first_failure


def consensus(samples: Sequence[Opinion], names: Sequence[str], kind: Kind) -> Opinion:
    """One opinion for the samples of one expert on one record, the tokens of all added up.

    Parameters
    ----------
    samples: at least one; where one has failed, so has the whole.
    names: the options that `Opinion.probabilities` stand for.
    kind: of the answers, which says when two are the same.

    Probabilities are averaged, and the likeliest option is the answer. Answers read from text are
    grouped, and the largest group's surest member speaks for it (ties: the surer group, then the
    earlier). Either way exp(-nll) is a probability over samples: the mean one of the answer, or the
    group's share times its mean likelihood a token.
    """
    if failed := first_failure(samples):
        return Opinion(None, failure=failed)
    read = sum(one.prompt_tokens for one in samples)
    written = sum(one.new_tokens for one in samples)
    shares = [one.probabilities for one in samples if one.probabilities is not None]
    if len(shares) == len(samples):
        mean = np.mean(shares, axis=0)
        best = int(mean.argmax())
        return Opinion(
            names[best], text=samples[0].text, nll=-math.log(max(float(mean[best]), 1e-12)),
            entropy=float(np.mean([one.entropy for one in samples])),
            probabilities=tuple(round(share, 6) for share in mean.tolist()),
            prompt_tokens=read, new_tokens=written,
        )  # fmt: skip
    spoken = [one for one in samples if one.answer is not None]
    if not spoken:
        return samples[0]._replace(prompt_tokens=read, new_tokens=written)
    groups: dict[int, list[Opinion]] = defaultdict(list)
    for one, group in zip(spoken, crowd.partition([o.answer for o in spoken], kind), strict=True):
        groups[group].append(one)
    # Groups stand in the order of their first members, which settles the ties that are left.
    largest = min(groups.values(), key=lambda group: (-len(group), _last_if_nan(_mean_nll(group))))
    speaker = min(largest, key=lambda one: _last_if_nan(one.nll))
    nll = _mean_nll(largest) - math.log(len(largest) / len(samples))
    return speaker._replace(nll=nll, prompt_tokens=read, new_tokens=written)


def _mean_nll(group: Sequence[Opinion]) -> float:
    return float(np.mean([one.nll for one in group]))


def _last_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value
