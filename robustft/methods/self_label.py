"""SelfLabel: the model answers every training question itself, then SFT on its own answers.

The given answers are not looked at, so noise changes nothing but which questions there are. A
question that gets no readable answer is dropped; one that gets no reply at all stays as given.
"""

from __future__ import annotations

from collections.abc import Sequence

from robustft.cleaning import open_source
from robustft.evaluation import Prediction, ask_plainly, predict
from robustft.methods.base import Method, Setting
from robustft.methods.decisions import Decision, write_decisions
from robustft.progress import Progress
from robustft.records import Record, count_records
from robustft.verdicts import CleanResult


def prepare(setting: Setting) -> CleanResult:
    """Write the training set with the model's own answers."""
    limit = setting.config.experts.answer_tokens
    total = count_records(open_source(setting.config))
    with Progress("self-label", total, unit="records") as shown:

        def decide(records: Sequence[Record]) -> list[Decision]:
            asked = ask_plainly(records)
            said = predict(records, asked, setting.engine, limit, progress=shown.update)
            return list(map(_decision, said))

        return write_decisions(setting.config, "self-label", decide)


def _decision(said: Prediction) -> Decision:
    if said.failure:
        return Decision.unanswered(said.record, said.failure)
    if said.answer is None:
        return Decision(None, "the model gave no readable answer")
    return Decision(said.answer, "the model's own answer")


METHOD = Method("self-label", "SelfLabel", "SFT on the model's own answers", prepare)
