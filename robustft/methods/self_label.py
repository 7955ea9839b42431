"""SelfLabel: the model answers every training question itself, then SFT on its own answers.

The given answers are not looked at, so noise changes nothing but which questions there are. A
question that gets no readable answer is dropped; one that gets no reply at all stays as given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from robustft.methods.base import Method, Setting
from robustft.methods.decisions import Decision, write_decisions
from robustft.predictions import Prediction, ask_plainly, predict
from robustft.records import Record
from robustft.verdicts import CleanResult


def prepare(setting: Setting) -> CleanResult:
    """Write the training set with the model's own answers."""
    limit = setting.config.experts.answer_tokens

    def decide(records: Sequence[Record], progress: Callable[[float], None]) -> list[Decision]:
        said = predict(records, ask_plainly(records), setting.engine, limit, progress=progress)
        return list(map(_decision, said))

    return write_decisions(setting.config, "self-label", decide, engine=setting.engine)


def _decision(said: Prediction) -> Decision:
    if said.failure:
        return Decision.unanswered(said.record, said.failure)
    if said.answer is None:
        return Decision(None, "the model gave no readable answer")
    return Decision(said.answer, "the model's own answer")


METHOD = Method("self-label", "SelfLabel", "SFT on the model's own answers", prepare)
