"""An OpenAI-compatible server as engine: vLLM, SGLang, llama.cpp, `transformers serve`, hosted.

What such a server does differs from what its interface promises, so `connect` finds out first (see
`robustft.engines.probing`). Where the model's tokenizer can be loaded, prompts go to /completions
as token ids, exactly those of the transformers engine, or as text where ids are not taken;
elsewhere to /chat/completions, templated by the server.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from robustft.config import EngineConfig
from robustft.engines import (
    Abilities,
    Choice,
    Failure,
    Generation,
    Prompt,
    ResponseScore,
    TokenValues,
)
from robustft.engines.encoding import PromptEncoder
from robustft.engines.http import JsonClient
from robustft.engines.tokens import (
    Continuation,
    Likeliest,
    TokenEngine,
    piece_offsets,
    slices,
    unlikely,
)
from robustft.engines.wire import (
    Forced,
    Written,
    read_chat,
    read_completion,
    read_echo,
    read_prompt_logprobs,
)

# Requests stored together by `clean`: what a killed one loses of each of `at_a_time` at most.
BATCH = 256
_TOKEN_ID = re.compile(r"token_id:(\d{1,9})")
# Control tokens of common chat templates, where no tokenizer is at hand to name the model's own.
_CONTROL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^<>\s]{1,40}\uff5c>|</?s>|\[/?INST\]|<</?SYS>>"
    r"|<(?:bos|eos|pad|unk|(?:start|end)_of_turn)>"
)
_NAN = float("nan")
_THINKS = Failure("the model thinks before it answers")


def _batches_for(client: JsonClient) -> int:
    """Batches that fill a client's slots while two of them wait for their slowest replies.

    Only so many: their records are in memory.
    """
    return min(2 + math.ceil(2 * client.concurrency / BATCH), 16)


class CompletionsEngine(TokenEngine):
    """`robustft.engines.Engine` over /completions, for a model whose tokenizer is at hand."""

    name = "openai"
    revision = "served"
    embedded = False
    batch = BATCH

    def __init__(
        self, config: EngineConfig, client: JsonClient, model: str, encoder: PromptEncoder
    ) -> None:
        self.model_id = model
        self.abilities = Abilities(choose=False, score=False, nll=False, entropy=False)
        self.encoder = encoder
        self.client = client
        self.at_a_time = _batches_for(client)
        self.temperature = config.temperature
        # Settled by the probe:
        self.ids = True  # prompts are token ids, else text
        self.extras: dict[str, Any] = {}  # fields that only some servers know
        self.top: int | None = None  # log-probabilities a token, None for none
        self.scoring = ""  # "prompt_logprobs", "echo", or "" for none

    def cancel(self) -> None:
        """Give up what other threads are waiting for."""
        self.client.cancel()

    def body(self, prompt: Prompt, ids: list[int], most: int, **more: Any) -> dict[str, Any]:
        """A request for at most `most` tokens."""
        text = ids if self.ids else self.encoder.render(prompt)
        return {"model": self.model_id, "prompt": text, "max_tokens": most} | self.extras | more

    def written(self, payload: bytes, ids: list[int], most: int, greedy: bool) -> Written:
        """A checked reply; a server that counts other tokens than were sent has cut the prompt."""
        found = read_completion(payload, most=most, greedy=greedy)
        counted = found.prompt_tokens
        if self.ids and counted is not None and counted != len(ids):
            raise ValueError(f"the server read {counted} prompt tokens of the {len(ids)} sent")
        if self.abilities.nll and found.logprobs is None:
            raise ValueError("expected log-probabilities, found none")
        return found

    def _continue(
        self,
        prompts: Sequence[Prompt],
        encoded: Sequence[list[int]],
        max_new_tokens: int,
        seeds: Sequence[int] | None,
    ) -> list[Continuation | Failure]:
        greedy = self.temperature == 0
        bodies, readers = [], []
        for row, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
            more: dict[str, Any] = {"temperature": self.temperature}
            if not greedy and seeds is not None:
                more["seed"] = seeds[row] % 2**31
            if self.abilities.nll:
                more["logprobs"] = 1
            bodies.append(self.body(prompt, ids, max_new_tokens, **more))
            readers.append(
                functools.partial(self._read_text, ids=ids, most=max_new_tokens, greedy=greedy)
            )
        return self.client.ask_all("/completions", bodies, readers)

    def _read_text(
        self, payload: bytes, *, ids: list[int], most: int, greedy: bool
    ) -> Continuation:
        found = self.written(payload, ids, most, greedy)
        return self.encoder_continuation(found)

    def encoder_continuation(self, found: Written) -> Continuation:
        """The text with where its tokens start; the end-of-text token left out."""
        tokens = found.tokens
        if tokens is not None:
            length = next(
                (i for i, token in enumerate(tokens) if token in self.encoder.ends), len(tokens)
            )
            text, offsets = self.encoder.decode(tokens[:length])
            return _continuation(text, offsets, found)
        return piecewise(found)

    def _likeliest(
        self,
        prompts: Sequence[Prompt],
        encoded: Sequence[list[int]],
        wanted: Sequence[Sequence[int]],
    ) -> list[Likeliest | Failure]:
        bodies = [
            self.body(prompt, ids, 1, temperature=0, logprobs=self.top)
            for prompt, ids in zip(prompts, encoded, strict=True)
        ]
        readers = [functools.partial(self._read_top, ids=ids) for ids in encoded]
        return self.client.ask_all("/completions", bodies, readers)

    def _read_top(self, payload: bytes, *, ids: list[int]) -> Likeliest:
        return likeliest(self.written(payload, ids, 1, True))

    def _forced(
        self, encoded: Sequence[list[int]], endings: Sequence[list[int]]
    ) -> list[TokenValues | Failure]:
        asked = [self.forced_request(*pair) for pair in zip(encoded, endings, strict=True)]
        reader = read_prompt_logprobs if self.scoring == "prompt_logprobs" else read_echo
        readers = [
            functools.partial(_read_forced, reader=reader, head=head, tail=tail)
            for head, tail in zip(encoded, endings, strict=True)
        ]
        # An empty response has no statistics and needs no request.
        rows = [row for row, tail in enumerate(endings) if tail]
        found = self.client.ask_all(
            "/completions", [asked[row] for row in rows], [readers[row] for row in rows]
        )
        values: list[TokenValues | Failure] = [TokenValues(*[np.zeros(0)] * 4) for _ in endings]
        for row, one in zip(rows, found, strict=True):
            values[row] = one
        return values

    def forced_request(self, head: list[int], tail: list[int]) -> dict[str, Any]:
        """A request for the log-probabilities of `tail` after `head`."""
        body = {"model": self.model_id, "prompt": [*head, *tail], "temperature": 0, "max_tokens": 1}
        if self.scoring == "prompt_logprobs":
            return body | {"prompt_logprobs": 2}
        return body | {"echo": True, "logprobs": 2}


def _read_forced(payload: bytes, *, reader: Any, head: list[int], tail: list[int]) -> TokenValues:
    found: Forced = reader(payload, head, tail)
    unknown = np.full_like(found.logprobs, _NAN)
    return TokenValues(-found.logprobs, unknown, found.best - found.second, found.rank)


def likeliest(found: Written) -> Likeliest:
    """The first token's likeliest, by id where the server names ids."""
    if not found.likeliest or not found.likeliest[0]:
        raise ValueError("expected the likeliest tokens, found none")
    by_id, by_text = {}, {}
    for piece, logprob in found.likeliest[0].items():
        named = _TOKEN_ID.fullmatch(piece)
        if named:
            by_id[int(named[1])] = logprob
        else:
            by_text[piece] = logprob
    return Likeliest(by_id, by_text)


def piecewise(found: Written) -> Continuation:
    """The text with where its tokens start, told from the tokens' own texts."""
    if found.pieces is None:
        whole = (0, len(found.text)) if found.text else (0,)
        return _continuation(found.text, whole, found)
    return _continuation(found.text, piece_offsets(found.pieces, found.text), found)


def _continuation(text: str, offsets: tuple[int, ...], found: Written) -> Continuation:
    length = len(offsets) - 1
    logprobs = found.logprobs
    nll = np.full(length, _NAN, np.float32) if logprobs is None else -logprobs[:length]
    return Continuation(text, nll.astype(np.float32), offsets, found.finished)


class ChatEngine:
    """`robustft.engines.Engine` over /chat/completions; the server templates and tokenises.

    Spellings of common control tokens in the data are broken by a space, as the server would take
    them for control tokens.
    """

    name = "openai"
    revision = "served"
    embedded = False
    truncated = 0  # the server sees the tokens, and refuses what is too long

    def __init__(self, config: EngineConfig, client: JsonClient, model: str) -> None:
        self.model_id = model
        self.abilities = Abilities(choose=False, score=False, nll=False, entropy=False)
        self.client = client
        self.at_a_time = _batches_for(client)
        self.temperature = config.temperature
        # Settled by the probe:
        self.prefill: dict[str, Any] | None = None  # how a begun reply is continued; None: never
        self.limit = "max_tokens"  # what the server calls it
        self.extras: dict[str, Any] = {}  # fields that only some servers know
        self.top: int | None = None  # log-probabilities a token, None for none

    def plan(self, prompts: Sequence[Prompt], max_new_tokens: int = 0) -> list[list[int]]:
        """`prompts` in their order."""
        return slices(len(prompts), BATCH)

    def cancel(self) -> None:
        """Give up what other threads are waiting for."""
        self.client.cancel()

    def body(self, prompt: Prompt, most: int, top: int | None) -> dict[str, Any]:
        """A request for at most `most` tokens with the `top` likeliest at each."""
        messages = [
            {"role": message.role, "content": _harmless(message.content)}
            for message in prompt.messages
        ]
        body = {"model": self.model_id, "messages": messages, self.limit: most} | self.extras
        if prompt.prefix and self.prefill is not None:
            messages.append({"role": "assistant", "content": prompt.prefix})
            body |= self.prefill
        if top is not None:
            body |= {"logprobs": True, "top_logprobs": top}
        return body

    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, seeds: Sequence[int] | None = None
    ) -> list[Generation | Failure]:
        """Continue every prompt; greedy, or sampled with `seeds` when temperature > 0."""
        greedy = self.temperature == 0
        bodies = []
        for row, prompt in enumerate(prompts):
            body = self.body(prompt, max_new_tokens, 1 if self.abilities.nll else None)
            body["temperature"] = self.temperature
            if not greedy and seeds is not None:
                body["seed"] = seeds[row] % 2**31
            bodies.append(body)
        read = functools.partial(self._read_text, most=max_new_tokens, greedy=greedy)
        return self.client.ask_all("/chat/completions", bodies, [read] * len(bodies))

    def _read_text(self, payload: bytes, *, most: int, greedy: bool) -> Generation | Failure:
        found = read_chat(payload, most=most, greedy=greedy)
        if found.thinking:
            return _THINKS
        if self.abilities.nll and found.logprobs is None and found.text:
            raise ValueError("expected log-probabilities, found none")
        said = piecewise(found)
        return Generation(
            said.text, said.nll, np.full_like(said.nll, _NAN), said.offsets,
            found.prompt_tokens or 0, said.finished,
        )  # fmt: skip

    def choose(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]
    ) -> list[Choice | Failure]:
        """Probabilities of the candidates among the likeliest first tokens.

        Spellings that differ by white space alone count together; a candidate that is not among
        them counts with the probability of the last, an upper bound, unless none of them is.
        """
        bodies = [self.body(prompt, 1, self.top) | {"temperature": 0} for prompt in prompts]
        readers = [functools.partial(_read_choice, candidates=tuple(texts)) for texts in candidates]
        return self.client.ask_all("/chat/completions", bodies, readers)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[ResponseScore]:
        """Not to be had over this interface; `abilities.score` is False."""
        raise NotImplementedError("a chat server cannot score given text")


def _read_choice(payload: bytes, *, candidates: tuple[str, ...]) -> Choice | Failure:
    found = read_chat(payload, most=1, greedy=True)
    if found.thinking:
        return _THINKS
    top = likeliest(found)
    spelt: dict[str, list[float]] = {}
    for piece, logprob in top.by_text.items():
        spelt.setdefault(piece.strip(), []).append(logprob)
    sums = {piece: float(np.logaddexp.reduce(values)) for piece, values in spelt.items()}
    if not any(text.strip() in sums for text in candidates):
        return unlikely(candidates)
    logprobs = [sums.get(text.strip(), top.least) for text in candidates]
    return Choice(np.array(logprobs, dtype=np.float32), _NAN, found.prompt_tokens or 0)


def _harmless(text: str) -> str:
    return _CONTROL.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", text)
