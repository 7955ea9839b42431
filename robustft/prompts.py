"""What each expert is asked. Every template of the package stands here, and nothing else does.

The wording is short on purpose: small models follow short instructions better, and the part that
is the same for every record costs prefill time on each of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from robustft.answers import Kind
from robustft.engines import Message, Prompt
from robustft.records import Record

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTERS = tuple(f" {letter}" for letter in LETTERS)
CHECKER_WORDS = (" Yes", " No")
REVIEW_WORDS = (" 1", " 2")
SELECT_WORDS = (" Y", " N")
_ANSWER = "Answer:"
_NOTHING = "N/A"

_HOW = {
    "choice": "Reply with the letter of the correct option.",
    "number": "Reply with the final number only.",
    "span": "Reply with the answer only, in a few words.",
    "text": "",
}


def letters(options: Sequence[str]) -> tuple[str, ...]:
    """The candidate continuations of "Answer:" for lettered options: " A", " B" and so on."""
    return _LETTERS[: len(options)]


def question_text(question: str, options: Sequence[str] | None) -> str:
    """The question and, below it, its lettered options."""
    lines = [question.strip()]
    lines += [f"{LETTERS[i]}. {option}" for i, option in enumerate(options or ())]
    return "\n".join(lines)


def shown(answer: str | None, options: Sequence[str] | None) -> str:
    """An answer as an expert reads it: the letter together with the option it stands for."""
    if answer is None:
        return "(no answer)"
    if options is not None and len(answer) == 1 and answer in LETTERS[: len(options)]:
        return f"{answer}. {options[LETTERS.index(answer)]}"
    return answer


def _prompt(record: Record, *turns: str, prefix: str = "", examples: Sequence[str] = ()) -> Prompt:
    """Earlier chat turns of the record, then `turns`, user and assistant in alternation.

    `examples`, in alternation too, stand before the conversation, below what the system says.
    """
    messages = [Message(role, content) for role, content in record.context]
    if messages and messages[-1].role == "user":
        messages.append(Message("assistant", ""))
    head = next((n for n, one in enumerate(messages) if one.role != "system"), len(messages))
    messages[head:head] = _alternating(examples)
    return Prompt((*messages, *_alternating(turns)), prefix)


def _alternating(turns: Sequence[str]) -> list[Message]:
    roles = ("user", "assistant")
    return [Message(roles[index % 2], turn) for index, turn in enumerate(turns)]


def _ask(record: Record, how: str | None = None) -> str:
    how = _HOW[record.kind] if how is None else how
    return "\n\n".join(filter(None, (question_text(record.question, record.options), how)))


def opening(kind: Kind) -> str:
    """What a reply of that kind is begun with; nothing for a text."""
    return "" if kind == "text" else _ANSWER


def answer_prompt(record: Record, how: str | None = None) -> Prompt:
    """The base expert: the question as it is (eq. 1); `how` words the instruction otherwise."""
    return _prompt(record, _ask(record, how), prefix=opening(record.kind))


def response(prompt: Prompt, answer: str) -> str:
    """An answer as the model would have to write it after `answer_prompt`."""
    return f" {answer}" if prompt.prefix else answer


def neutral_prompt(record: Record) -> Prompt:
    """The base question with its content taken out: what the options alone make the model say."""
    return _neutral(record.options)


@functools.lru_cache(maxsize=1024)
def _neutral(options: tuple[str, ...] | None) -> Prompt:
    text = question_text(_NOTHING, options)
    return Prompt((Message("user", f"{text}\n\n{_HOW['choice']}"),), _ANSWER)


def reasoning_prompt(record: Record, transcript: Sequence[str]) -> Prompt:
    """The next step of reasoning, reflection on it, reasoning again, … (eq. 2).

    `transcript` holds the steps so far, oldest first: after reasoning comes its criticism, and
    after that, or at first, reasoning in the light of everything before.
    """
    return _prompt(record, *_discussion(record, transcript))


def conclusion_prompt(record: Record, transcript: Sequence[str]) -> Prompt:
    """The reasoning expert's answer after its last round."""
    turns = _discussion(record, transcript)
    turns[-1] = " ".join(filter(None, ("Now give the final answer.", _HOW[record.kind])))
    return _prompt(record, *turns, prefix=opening(record.kind))


def _discussion(record: Record, transcript: Sequence[str]) -> list[str]:
    """User and assistant turns up to the request that the next step answers."""
    question = question_text(record.question, record.options)
    turns = [f"{question}\n\nThink step by step. Be brief."]
    requests = (
        "Reflect on this reasoning: name any mistake or doubt. Be brief.",
        "Reason again with this in mind. Be brief.",
    )
    for index, said in enumerate(transcript):
        turns += [said or "(nothing)", requests[index % 2]]
    return turns


def checker_prompt(record: Record, predictions: Sequence[str | None]) -> Prompt:
    """The checker: is the given answer consistent with the predictions (eq. 3)?"""
    said = "\n".join(
        f"Expert {number}: {shown(answer, record.options)}"
        for number, answer in enumerate(predictions, 1)
    )
    text = (
        f"{question_text(record.question, record.options)}\n\n"
        f"Proposed answer: {shown(record.answer, record.options)}\n{said}\n\n"
        "Is the proposed answer correct and consistent with the experts? Reply Yes or No."
    )
    return _prompt(record, text, prefix=_ANSWER)


@functools.lru_cache(maxsize=16)
def neutral_checker_prompt(experts: int) -> Prompt:
    """The checker's question without content."""
    said = "\n".join(f"Expert {number}: {_NOTHING}" for number in range(1, experts + 1))
    text = (
        f"{_NOTHING}\n\nProposed answer: {_NOTHING}\n{said}\n\n"
        "Is the proposed answer correct and consistent with the experts? Reply Yes or No."
    )
    return Prompt((Message("user", text),), _ANSWER)


_IS_IT_CORRECT = "Is the proposed answer correct? Reply Y or N."


def select_prompt(record: Record) -> Prompt:
    """The baseline self-select: does the model trust this answer, Y or N?"""
    text = (
        f"{question_text(record.question, record.options)}\n\n"
        f"Proposed answer: {shown(record.answer, record.options)}\n\n{_IS_IT_CORRECT}"
    )
    return _prompt(record, text, prefix=_ANSWER)


def neutral_select_prompt() -> Prompt:
    """The question of `select_prompt` without content."""
    text = f"{_NOTHING}\n\nProposed answer: {_NOTHING}\n\n{_IS_IT_CORRECT}"
    return Prompt((Message("user", text),), _ANSWER)


def context_prompt(
    record: Record, neighbours: Sequence[tuple[str, Sequence[str] | None, str]]
) -> Prompt:
    """The question after its nearest clean neighbours and their answers (eq. 4, 5).

    `neighbours`: (question, options, answer), nearest first; the nearest is placed last, beside
    the question, or the conversation that it ends.
    """
    kind = record.kind
    turns: list[str] = []
    for question, options, answer in reversed(neighbours):
        asked = "\n\n".join(filter(None, (question_text(question, options), _HOW[kind])))
        turns += [asked, f"{opening(kind)} {answer}".strip()]
    return _prompt(record, _ask(record), prefix=opening(kind), examples=turns)


def review_prompt(record: Record, context: str | None, reasoned: str | None) -> Prompt:
    """The reviewer settles the label between the two answers (eq. 6)."""
    how = _HOW["choice"] if record.kind == "choice" else "Which answer is better? Reply 1 or 2."
    text = (
        f"{question_text(record.question, record.options)}\n\n"
        f"Answer 1: {shown(context, record.options)}\n"
        f"Answer 2: {shown(reasoned, record.options)}\n\n"
        f"Review both answers. {how}"
    )
    return _prompt(record, text, prefix=_ANSWER)
