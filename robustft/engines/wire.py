"""The replies of an OpenAI-compatible server, typed and checked: nothing in them is trusted.

Every reader raises ValueError (pydantic's ValidationError is one) on a reply that is not what was
asked for, log-probabilities that cannot be ones included, and `NoAnswer` on one that was filtered.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from robustft.engines.connection import NoAnswer

_SLACK = 0.02  # nats: greedy choices are the likeliest up to what a server rounds to
_LONGEST_NAME = 512
_ENDS = {"stop", "length", "eos", "eos_token", "stop_sequence", None}


_T = TypeVar("_T", bound=BaseModel)


class _Reply(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


class Usage(_Reply):
    """Tokens, as the server counts them."""

    prompt_tokens: int = Field(ge=0, lt=2**31)
    completion_tokens: int | None = Field(default=None, ge=0, lt=2**31)


class _TokenLogprobs(_Reply):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None


class _PromptLogprob(_Reply):
    logprob: float
    rank: int | None = None


class _CompletionChoice(_Reply):
    text: str
    finish_reason: str | None = None
    logprobs: _TokenLogprobs | None = None
    token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = None
    prompt_logprobs: list[dict[str, _PromptLogprob] | None] | None = None


class Completion(_Reply):
    """A reply of /completions."""

    choices: list[_CompletionChoice] = Field(min_length=1, max_length=1)
    usage: Usage | None = None


class _Top(_Reply):
    token: str
    logprob: float


class _ChatToken(_Top):
    top_logprobs: list[_Top] | None = None


class _ChatLogprobs(_Reply):
    content: list[_ChatToken] | None = None


class _ChatMessage(_Reply):
    content: str | None = None
    reasoning: Any = None  # thoughts that the server keeps apart, by two names
    reasoning_content: Any = None


class _ChatChoice(_Reply):
    message: _ChatMessage
    finish_reason: str | None = None
    logprobs: _ChatLogprobs | None = None


class Chat(_Reply):
    """A reply of /chat/completions."""

    choices: list[_ChatChoice] = Field(min_length=1, max_length=1)
    usage: Usage | None = None


def _readable(name: str) -> str:
    _require(name.isprintable() and 0 < len(name) <= _LONGEST_NAME, "a short printable name")
    return name


class _Model(_Reply):
    id: Annotated[str, AfterValidator(_readable)]  # stands in what is printed
    parent: str | None = None  # the model that an adapter is on
    max_model_len: int | None = None


class Models(_Reply):
    """A reply of /models."""

    data: list[_Model]

    def window(self, name: str) -> int:
        """Tokens that a model takes, prompt and reply; 0 where it is not told.

        vLLM tells an adapter's with the model that it is on.
        """
        named = {model.id: model for model in self.data}
        own = named.get(name)
        base = named.get(own.parent or "") if own is not None else None
        told = (model.max_model_len for model in (own, base) if model is not None)
        return next((window for window in told if window is not None and window > 0), 0)


def parsed(kind: type[_T], payload: bytes) -> _T:
    """`payload` as that kind of reply, or ValueError with one line."""
    try:
        return kind.model_validate_json(payload)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise ValueError(f"{where}: {first['msg']}") from None


# Fewer marks than `answers` reads past: who writes these is sent enable_thinking.
_NO_THOUGHTS = re.compile(r"\s*(?:<think>\s*</think>\s*)+")


@dataclass(frozen=True, slots=True)
class Written:
    """What a server wrote, token by token where it tells the tokens."""

    text: str
    finished: bool
    prompt_tokens: int | None
    pieces: tuple[str, ...] | None  # text of each token; None where the server does not tell
    tokens: tuple[int, ...] | None  # their ids
    logprobs: NDArray[np.float32] | None  # [tokens]
    likeliest: tuple[dict[str, float], ...]  # the top few at each token
    thinking: bool = False  # thoughts come before the answer, or in its place


def read_completion(payload: bytes, *, most: int, greedy: bool) -> Written:
    """A reply of /completions with at most `most` tokens."""
    reply = parsed(Completion, payload)
    choice = reply.choices[0]
    _require_unfiltered(choice.finish_reason)
    pieces, logprobs = None, None
    tops: tuple[dict[str, float], ...] = ()
    if choice.logprobs is not None:
        given = choice.logprobs
        pieces = tuple(given.tokens)
        tops = tuple(top or {} for top in given.top_logprobs or ())
        logprobs = _checked(given.token_logprobs, pieces, tops, greedy=greedy)
    if choice.token_ids is not None and pieces is not None:
        _require(len(choice.token_ids) == len(pieces), "as many log-probabilities as tokens")
    return _written(
        reply.usage,
        choice.finish_reason,
        most,
        choice.text,
        pieces,
        choice.token_ids,
        logprobs,
        tops,
    )


def read_chat(payload: bytes, *, most: int, greedy: bool) -> Written:
    """A reply of /chat/completions with at most `most` tokens."""
    reply = parsed(Chat, payload)
    choice = reply.choices[0]
    _require_unfiltered(choice.finish_reason)
    message = choice.message
    text = message.content or ""
    kept_apart = bool(message.reasoning or message.reasoning_content)
    thinking = _thinks(text) if text else kept_apart
    _require(message.content is not None or thinking, "a message with content")
    pieces, logprobs = None, None
    tops: tuple[dict[str, float], ...] = ()
    if choice.logprobs is not None and choice.logprobs.content is not None:
        tokens = choice.logprobs.content
        pieces = tuple(token.token for token in tokens)
        tops = tuple(_by_spelling(token.top_logprobs or ()) for token in tokens)
        logprobs = _checked([token.logprob for token in tokens], pieces, tops, greedy=greedy)
    end = choice.finish_reason
    found = _written(reply.usage, end, most, text, pieces, None, logprobs, tops)
    return dataclasses.replace(found, thinking=thinking)


def _thinks(text: str) -> bool:
    """Whether a server that keeps no thoughts apart has left some at the head of a text.

    A block without any is none: so some models write that they do not think.
    """
    text = text[without_thoughts(text) :]
    before, ended, _ = text.partition("</think>")
    # The chat template may have opened them, in the prompt.
    return text.lstrip().startswith("<think>") or (bool(ended) and "<think>" not in before)


def without_thoughts(text: str) -> int:
    """Where a text goes on behind the empty thinking blocks at its head; 0 without them."""
    found = _NO_THOUGHTS.match(text)
    return found.end() if found else 0


def _by_spelling(tops: Sequence[_Top]) -> dict[str, float]:
    """Log-probability of each spelling: that of the likeliest token where several share one."""
    return {top.token: top.logprob for top in sorted(tops, key=lambda top: top.logprob)}


def _written(
    usage: Usage | None,
    finish: str | None,
    most: int,
    text: str,
    pieces: tuple[str, ...] | None,
    tokens: Sequence[int] | None,
    logprobs: NDArray[np.float32] | None,
    tops: tuple[dict[str, float], ...],
) -> Written:
    _require(finish in _ENDS, "a reply that ended by itself or at its limit", finish)
    count = len(pieces) if pieces is not None else len(tokens) if tokens is not None else None
    if count is not None:
        _require(count <= most, f"at most {most} tokens", count)
        told = usage.completion_tokens if usage is not None else None
        # Some servers count the end-of-text token and some do not list it.
        _require(told is None or 0 <= told - count <= 1, "log-probabilities of every token", count)
    return Written(
        text=text,
        finished=finish != "length",
        prompt_tokens=usage.prompt_tokens if usage is not None else None,
        pieces=pieces,
        tokens=None if tokens is None else tuple(tokens),
        logprobs=logprobs,
        likeliest=tops,
    )


def _checked(
    logprobs: Sequence[float | None],
    pieces: Sequence[str],
    tops: Sequence[dict[str, float]],
    *,
    greedy: bool,
) -> NDArray[np.float32]:
    """Log-probabilities of generated tokens: one each, at most 0, and of those very tokens."""
    _require(len(logprobs) == len(pieces), "as many log-probabilities as tokens", len(logprobs))
    _require(not tops or len(tops) == len(pieces), "the likeliest tokens at every token", len(tops))
    values = [value for value in logprobs if value is not None]
    _require(len(values) == len(logprobs), "a log-probability of every token", None)
    _require(all(value <= _SLACK for value in values), "log-probabilities of at most 0")
    for value, piece, top in zip(values, pieces, tops, strict=False):
        _require(all(other <= _SLACK for other in top.values()), "log-probabilities of at most 0")
        if top and _tells(piece):
            # One that was sampled need not be among the likeliest, nor the likeliest spelt so.
            stated = top.get(piece, -math.inf if greedy else value)
            _require(value <= stated + _SLACK, "log-probabilities that belong to their tokens")
            _require(
                not greedy or value >= max(top.values()) - _SLACK,
                "the likeliest token at temperature 0",
            )
    return np.minimum(np.array(values, dtype=np.float32), 0.0)


def _tells(piece: str) -> bool:
    """Whether a spelling tells the token; what is no text of its own is spelt "" or U+FFFD."""
    return bool(piece) and "\ufffd" not in piece


@dataclass(frozen=True, slots=True)
class Forced:
    """A given text's tokens: [tokens] log-probability, and best and second best of each place."""

    logprobs: NDArray[np.float32]
    best: NDArray[np.float32]
    second: NDArray[np.float32]
    rank: NDArray[np.float32]  # 0 = the likeliest


def read_prompt_logprobs(payload: bytes, head: Sequence[int], tail: Sequence[int]) -> Forced:
    """Statistics of `tail` after `head` where a reply has vLLM's `prompt_logprobs`."""
    reply = parsed(Completion, payload)
    given = reply.choices[0].prompt_logprobs
    if given is None:
        raise ValueError("expected prompt_logprobs, found none")
    total = len(head) + len(tail)
    _require(len(given) == total, f"prompt_logprobs of {total} tokens", len(given))
    # A shifted row may hold the token by accident: then its neighbours in the head betray it.
    named = all(
        place is None or str(token) in place for place, token in zip(given, head, strict=False)
    )
    _require(named, "log-probabilities of the tokens that were sent")
    rows = []
    for place, token in zip(given[len(head) :], tail, strict=True):
        own = (place or {}).get(str(token))
        if own is None or place is None:
            raise ValueError("expected log-probabilities of the tokens that were sent")
        ordered = sorted((entry.logprob for entry in place.values()), reverse=True)
        _require(ordered[0] <= _SLACK, "log-probabilities of at most 0")
        second = ordered[1] if len(ordered) > 1 else float("nan")
        rank = float("nan") if own.rank is None else own.rank - 1
        rows.append((min(own.logprob, 0.0), ordered[0], second, rank))
    return Forced(*np.array(rows, dtype=np.float32).reshape(-1, 4).T)


def read_echo(payload: bytes, head: Sequence[int], tail: Sequence[int]) -> Forced:
    """Statistics of `tail` after `head` where a reply echoes the prompt with log-probabilities."""
    reply = parsed(Completion, payload)
    given = reply.choices[0].logprobs
    if given is None:
        raise ValueError("expected log-probabilities of the echoed prompt, found none")
    total = len(head) + len(tail)
    count = min(len(given.token_logprobs), len(given.tokens))
    _require(total <= count <= total + 1, f"log-probabilities of {total} tokens", count)
    rows = []
    for place in range(len(head), total):
        value = given.token_logprobs[place]
        if value is None:
            raise ValueError("expected a log-probability of every token")
        _require(value <= _SLACK, "log-probabilities of at most 0")
        top = (given.top_logprobs or [None] * count)[place] or {}
        piece = given.tokens[place]
        stated = top.get(piece, value) if _tells(piece) else value
        _require(abs(stated - value) <= _SLACK, "log-probabilities that belong to their tokens")
        # Others may be exactly as likely: only its own entry is left out.
        own = piece in top if _tells(piece) else value in top.values()
        ordered = sorted([*top.values(), *([] if own else [value])], reverse=True)
        second = ordered[1] if len(ordered) > 1 else float("nan")
        rank = 0.0 if top and value >= ordered[0] else float("nan")
        rows.append((min(value, 0.0), ordered[0], second, rank))
    return Forced(*np.array(rows, dtype=np.float32).reshape(-1, 4).T)


def _require_unfiltered(finish: str | None) -> None:
    if finish == "content_filter":
        raise NoAnswer("the server's content filter held the reply back")


def _require(condition: bool, expected: str, found: object = "something else") -> None:
    if not condition:
        raise ValueError(f"expected {expected}, found {found}")
