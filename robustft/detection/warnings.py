"""What the user should know of how far a split can be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from robustft.crowd import Estimate, Judgement
from robustft.detection.evidence import FREE_TEXT, Evidence
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

_WIDE = 0.3  # a noise rate whose interval is wider says little
_HARDLY_ANY = 0.02  # a noise rate that stays below it says that next to nothing was found


def models_contradict(rate: Estimate) -> str:
    """The warning where models find much more wrong than the learners let stand."""
    return (
        f"the models alone would call {rate} of the given answers wrong; the learners, taught by "
        "these answers, side with them. Either the models are wrong there, or the answers are, in "
        "a way that depends on the question (a weaker model's mistakes, a whole topic). If the "
        "models are strong, --detector panel goes by them; without shards and --folds the same "
        "command with it asks nothing twice"
    )


def doubts(
    found: Sequence[Judgement],
    sizes: Sequence[int],
    rate: Estimate | None,
    by_models: Estimate | None,
    evidence: Evidence,
) -> Iterator[str]:
    """What the user should know of juries that could not tell, or hardly.

    `by_models`: the noise rate by them alone.
    """
    judged = ~evidence["unjudged"]
    if found and all(one.powerless for one in found):
        if (evidence["options"][judged] == FREE_TEXT).mean() > 0.5:
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
