"""What an OpenAI-compatible server really does, found out before it is trusted.

A server may ignore a field with HTTP 200, count tokens otherwise than the tokenizer at hand, or
give the log-probabilities of the tokens next door. So a short greedy reply is asked for, checked
token by token, and then scored as given text: both must tell the same log-probabilities.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np

from robustft.config import EngineConfig
from robustft.engines import Engine, Message, Prompt
from robustft.engines.connection import RequestError
from robustft.engines.encoding import PromptEncoder
from robustft.engines.http import JsonClient
from robustft.engines.openai import ChatEngine, CompletionsEngine
from robustft.engines.wire import (
    Models,
    Written,
    parsed,
    read_chat,
    read_echo,
    read_prompt_logprobs,
    without_thoughts,
)
from robustft.errors import UserError

_log = logging.getLogger("robustft")
_PROMPT = Prompt((Message("user", "Count from one to nine."),), "1, 2, 3,")
_TOKENS = 8
_ALIKE = 0.1  # nats: the same model in the same server, prefill against decoding
_VLLM = {"return_token_ids": True, "return_tokens_as_token_ids": True}
# vLLM, SGLang and llama.cpp hand this on to the chat template.
_NOT_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
# Ways to have a begun reply continued: vLLM's and SGLang's fields, then llama.cpp's habit.
_PREFILLS: tuple[dict[str, Any], ...] = (
    {"continue_final_message": True, "add_generation_prompt": False},
    {},
)


def connect(config: EngineConfig, client: JsonClient | None = None) -> Engine:
    """The engine for the server at `config.base_url`, with the abilities that the probe found.

    Raises:
        UserError: nothing answers there, the key is refused, or the model is not served.
    """
    assert config.base_url is not None
    client = client or JsonClient(
        config.base_url,
        key_variable=config.key_variable,
        concurrency=config.concurrency,
        timeout=config.timeout,
        retries=config.retries,
    )
    engine, found = _probed(config, client)
    if client.waited_out:  # It is there now: was it away, or does it say so of every such request?
        engine, found = _probed(config, client)
    engine.abilities = dataclasses.replace(engine.abilities, found=tuple(found))
    for line in found:
        _log.info("server: %s", line)
    return engine


def _probed(
    config: EngineConfig, client: JsonClient
) -> tuple[CompletionsEngine | ChatEngine, list[str]]:
    """The engine with its abilities, and what was found in words."""
    found: list[str] = []
    model, window = _served_model(client, config, found)
    tokenizer, absent = _tokenizer(config, model)
    if tokenizer is None:
        found.append(f"no tokenizer ({absent}): the server templates the prompts")
    else:
        if not window:
            known = getattr(tokenizer, "model_max_length", 0) or 0
            window = known if 0 < known < 10**7 else 1 << 30
            taken = f"{known} tokens, as the tokenizer says"
            found.append(f"no window is told: {taken if window == known else 'nothing is cut'}")
        engine = CompletionsEngine(config, client, model, PromptEncoder(tokenizer, window))
        if _probe_completions(engine, found):
            return engine, found
    chat = ChatEngine(config, client, model)
    _probe_chat(chat, found, config)
    return chat, found


# --- which model -----------------------------------------------------------------------------


def _served_model(client: JsonClient, config: EngineConfig, found: list[str]) -> tuple[str, int]:
    """The model's name at the server and its window in tokens, 0 where it is not told."""
    models, why = Models(data=[]), ""
    try:
        models = client.ask("/models", None, functools.partial(parsed, Models))
    except RequestError as error:
        if error.status in (401, 403):
            raise _refused(error, config) from error
        if error.status == 0 and not str(error).startswith("unusable"):
            raise UserError(f"{client.base_url}: no server answers there ({error})") from error
        why = str(error)
        found.append(f"its models are not listed ({why})")
    if config.model is not None:
        # Some servers load what they are asked for, so that a name not listed may still be served.
        return config.model, models.window(config.model)
    names = [model.id for model in models.data]
    if len(names) != 1:
        listed = ", ".join(names[:10]) or why or "none that it lists"
        raise UserError(f"{client.base_url}: name one of its models with --model: {listed}")
    return names[0], models.window(names[0])


def _tokenizer(config: EngineConfig, model: str) -> tuple[Any | None, str]:
    """The model's tokenizer, or None and why."""
    from robustft.models import find_model, load_tokenizer

    if config.tokenizer is not None:
        return load_tokenizer(find_model(config.tokenizer)), ""
    if not Path(model).is_dir() and model.count("/") != 1:
        return None, f"{model} is neither a folder nor a hub id; name one with --tokenizer"
    try:
        return load_tokenizer(find_model(model)), ""
    except UserError as error:
        return None, str(error)


def _refused(error: RequestError, config: EngineConfig) -> UserError:
    return UserError(
        f"{config.base_url}: {error}; is the right key in ${config.key_variable}? "
        "(--key-variable names another)"
    )


# --- /completions ----------------------------------------------------------------------------


def _probe_completions(engine: CompletionsEngine, found: list[str]) -> bool:
    """Settle how the engine asks; False where /completions cannot be used."""
    first, refusal = _first_completion(engine)
    if first is None:
        found.append(f"/completions cannot be used: {refusal}")
        return False
    what = "token ids" if engine.ids else "text templated here"
    found.append(f"/completions with {what}")
    abilities = engine.abilities
    if first.logprobs is None:
        found.append(_without_logprobs(refusal))
    else:
        abilities = dataclasses.replace(abilities, nll=True)
        found.append("log-probabilities of generated tokens: aligned, at most 0")
        if engine.ids:
            _probe_scoring(engine, first, found)
        abilities = dataclasses.replace(abilities, score=bool(engine.scoring))
        abilities = dataclasses.replace(
            abilities, choose=bool(first.likeliest and first.likeliest[0])
        )
        if abilities.choose:
            exact = "" if engine.scoring else "; other continuations count as the last of them"
            found.append(f"probabilities of the {engine.top} likeliest next tokens{exact}")
    engine.abilities = abilities
    return True


def _without_logprobs(refusal: object) -> str:
    """What is found where none came; `refusal`: of requests for them, if all were refused."""
    return "no log-probabilities" + (f" ({refusal})" if refusal else "")


def _first_completion(engine: CompletionsEngine) -> tuple[Written | None, str]:
    """The probe's reply in the richest form that the server takes, and the last refusal if any."""
    ids = engine.encoder.encode([_PROMPT])[0]
    forms: list[tuple[bool, dict[str, Any], int | None]] = [
        (True, _VLLM, 20), (True, {}, 20), (True, {}, 5), (True, {}, None),
        (False, {}, 20), (False, {}, 5), (False, {}, None),
    ]  # fmt: skip
    refusal = ""
    fallback: tuple[tuple[bool, dict[str, Any], int | None], Written] | None = None
    for form in forms:
        engine.ids, engine.extras, engine.top = form
        more = {} if engine.top is None else {"logprobs": engine.top}
        body = engine.body(_PROMPT, ids, _TOKENS, temperature=0, **more)
        read = functools.partial(engine.written, ids=ids, most=_TOKENS, greedy=True)
        try:
            first = engine.client.ask("/completions", body, read)
        except RequestError as error:
            if error.status in (401, 403):
                raise UserError(f"{engine.client.base_url}: {error}") from error
            refusal = str(error)
            if error.status in (404, 405):
                break
            continue
        if not engine.ids and first.prompt_tokens not in (None, len(ids)):
            refusal = (
                f"the server counts {first.prompt_tokens} tokens where the tokenizer counts "
                f"{len(ids)}: another tokenizer, or one token added"
            )
            continue
        if first.logprobs is not None:
            return first, refusal
        fallback = fallback or (form, first)
        if engine.ids and engine.extras:
            continue  # without the fields it may not know, the others may be heeded
        break
    if fallback is not None:
        engine.ids, engine.extras, engine.top = fallback[0]
        refusal = "" if engine.top is not None else refusal  # those forms were not refused
        engine.extras, engine.top = {}, None
        return fallback[1], refusal
    return None, refusal


def _probe_scoring(engine: CompletionsEngine, first: Written, found: list[str]) -> None:
    """Score the probe's own reply as given text: the same log-probabilities must come back."""
    head = engine.encoder.encode([_PROMPT])[0]
    said = engine.encoder_continuation(first)
    length = len(said.nll)
    tokens = first.tokens
    tail = (
        list(tokens[:length]) if tokens else engine.encoder.continuation(_PROMPT.prefix, said.text)
    )
    if not tail or len(tail) != length:
        found.append("given text cannot be scored: the reply's own tokens are not known")
        return
    why = []
    for way, reader in (("prompt_logprobs", read_prompt_logprobs), ("echo", read_echo)):
        engine.scoring = way
        body = engine.forced_request(head, tail)
        read = functools.partial(reader, head=head, tail=tail)
        try:
            forced = engine.client.ask("/completions", body, read)
        except RequestError as error:
            why.append(f"{way}: {error}")
            continue
        gap = float(np.abs(-forced.logprobs - said.nll).max())
        if gap <= _ALIKE:
            found.append(f"given text is scored ({way}), within {gap:.3f} nats of its generation")
            return
        why.append(f"{way}: off by up to {gap:.1f} nats, as of other tokens")
    engine.scoring = ""
    found.append(f"given text cannot be scored: {'; '.join(why)}")


# --- /chat/completions -----------------------------------------------------------------------


def _probe_chat(engine: ChatEngine, found: list[str], config: EngineConfig) -> None:
    """Settle how the engine asks. Raises UserError where it cannot be asked at all."""
    plain = _PROMPT._replace(prefix="")
    first: Written | None = None
    refusal: RequestError | None = None
    for top in (20, 5, None):
        for limit in ("max_tokens", "max_completion_tokens"):
            if first is None:
                engine.limit, engine.top = limit, top
                try:
                    first = _ask_chat(engine, plain)
                except RequestError as error:
                    refusal = error
                    if error.status in (401, 403):
                        raise _refused(error, config) from error
    if first is None:
        raise UserError(f"{config.base_url}: the server cannot be used: {refusal}") from refusal
    found.append("/chat/completions")
    if first.thinking or without_thoughts(first.text):  # an empty block may be filled next time
        first = _ask_not_to_think(engine, plain, config)
        found.append("the model thinks before it answers, and is told not to (enable_thinking)")
    empty = bool(without_thoughts(first.text))
    if empty:
        found.append("it still writes an empty thinking block, which is read past")
    for prefill in _PREFILLS:
        engine.prefill = prefill
        try:
            text = _ask_chat(engine, _PROMPT).text
        except RequestError:
            text = ""
        if text.strip().startswith("4"):
            found.append('a reply begun with "Answer:" is continued')
            break
    else:
        engine.prefill = None
        found.append("a begun reply is not continued: every reply starts afresh")
    if first.logprobs is None:
        found.append(_without_logprobs(refusal if engine.top is None else None))
        engine.top = None
        return
    # A reply's first token is the block's, unless the reply is begun.
    choose = bool(first.likeliest and first.likeliest[0]) and not (empty and engine.prefill is None)
    engine.abilities = dataclasses.replace(engine.abilities, nll=True, choose=choose)
    likeliest = f" and the {engine.top} likeliest" if choose else ""
    found.append(f"log-probabilities of generated tokens{likeliest}: aligned, at most 0")


def _ask_not_to_think(engine: ChatEngine, prompt: Prompt, config: EngineConfig) -> Written:
    """The probe's reply without thoughts: an answer is expected in the first few tokens."""
    engine.extras = _NOT_THINKING
    why = ""
    try:
        first = _ask_chat(engine, prompt)
        if not first.thinking:
            return first
    except RequestError as error:
        why = f": {error}"
    raise UserError(
        f"{config.base_url}: the server cannot be used: the model thinks before it answers, and "
        f"chat_template_kwargs with enable_thinking false does not stop it{why}"
    )


def _ask_chat(engine: ChatEngine, prompt: Prompt) -> Written:
    body = engine.body(prompt, _TOKENS, engine.top) | {"temperature": 0}
    read = functools.partial(read_chat, most=_TOKENS, greedy=True)
    return engine.client.ask("/chat/completions", body, read)
