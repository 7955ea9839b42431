"""SelfSelect: one Y/N question to the model about each example; SFT on those it trusts.

The answer is read from the probabilities of "Y" and "N", each divided by its probability after an
empty question, as RobustFT's checker is: small models say one of the two to everything.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence

from robustft.engines import Choice, Failure
from robustft.errors import UserError
from robustft.methods.base import Method, Setting
from robustft.methods.decisions import Decision, write_decisions
from robustft.prompts import SELECT_WORDS, neutral_select_prompt, select_prompt
from robustft.records import Record
from robustft.verdicts import CleanResult


def prepare(setting: Setting) -> CleanResult:
    """Write the examples the model trusts, as given."""
    engine = setting.engine
    asking = threading.Lock()  # one reply for all chunks: two may differ

    @functools.cache
    def by_itself() -> Choice:
        said = engine.choose([neutral_select_prompt()], [SELECT_WORDS])[0]
        if isinstance(said, Failure):
            raise UserError(f"the engine gave no reply: {said.reason}")
        return said

    def decide(records: Sequence[Record], progress: Callable[[float], None]) -> list[Decision]:
        with asking:
            neutral = by_itself()
        prompts = [select_prompt(record) for record in records]
        decisions: dict[int, Decision] = {}
        for rows in engine.plan(prompts):
            said = engine.choose([prompts[row] for row in rows], [SELECT_WORDS] * len(rows))
            for row, choice in zip(rows, said, strict=True):
                if isinstance(choice, Failure):
                    decisions[row] = Decision.unanswered(records[row], choice.reason)
                    continue
                yes, no = choice.logprobs - neutral.logprobs
                trusted = bool(yes > no)
                answer = records[row].answer if trusted else None
                decisions[row] = Decision(answer, "trusted" if trusted else "not trusted")
            progress(len(rows))
        return [decisions[row] for row in range(len(records))]

    return write_decisions(setting.config, "self-select", decide, engine=engine)


METHOD = Method("self-select", "SelfSelect", "SFT on the examples the model trusts", prepare)
