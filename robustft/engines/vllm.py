"""vLLM in this process: prefix caching, prompt log-probabilities, adapters, several GPUs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robustft.config import EngineConfig
from robustft.engines import Abilities, Prompt, TokenValues
from robustft.engines.encoding import PromptEncoder
from robustft.engines.tokens import Continuation, Likeliest, TokenEngine
from robustft.errors import UserError
from robustft.models import content_digest, find_model, load_tokenizer

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as max_lora_rank
_NAN = float("nan")


class VllmEngine(TokenEngine):
    """`robustft.engines.Engine` over `vllm.LLM`.

    Args:
        config: which model, dtype, temperature and how many GPUs share it.
        adapter: a LoRA adapter folder (safetensors) to answer with.

    Raises:
        UserError: the model or the adapter cannot be used.
    """

    name = "vllm"
    abilities = Abilities(entropy=False)
    at_a_time = 1
    batch = 1024  # vLLM forms its own batches; this is what a killed run loses at most

    def __init__(self, config: EngineConfig, adapter: Path | None = None) -> None:
        source = find_model(config.model)
        if source.gguf:
            raise UserError(f"{config.model}: --engine vllm reads safetensors, not GGUF")
        adapted = _adapter_options(adapter) if adapter is not None else {}
        # Nothing is reported to anybody unless the user has said so himself.
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm

        self.model_id = source.name
        self.embedded = source.embedded
        self.revision = content_digest(source)
        tokenizer = load_tokenizer(source)
        try:
            self._llm: Any = vllm.LLM(
                model=source.path,
                dtype=config.dtype,
                tensor_parallel_size=config.tensor_parallel,
                enable_prefix_caching=True,
                trust_remote_code=False,
                load_format="safetensors",
                generation_config="vllm",  # a model folder's own must not change the method
                **adapted,
            )
        except (ValueError, RuntimeError, OSError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{source.path}: vLLM cannot load the model: {first}") from error
        settings = self._llm.llm_engine.model_config
        self.encoder = PromptEncoder(tokenizer, int(settings.max_model_len))
        self._sampling: Any = vllm.SamplingParams
        self._temperature = config.temperature
        self._lora: Any = None
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            self._lora = LoRARequest(adapter.name or "adapter", 1, str(adapter.resolve()))

    def cancel(self) -> None:
        """Nothing: no server is asked."""

    def _ask(self, encoded: Sequence[Sequence[int]], settings: Sequence[Any]) -> list[Any]:
        if not encoded:
            return []
        prompts = [{"prompt_token_ids": list(ids)} for ids in encoded]
        return list(
            self._llm.generate(prompts, list(settings), use_tqdm=False, lora_request=self._lora)
        )

    def _continue(
        self,
        prompts: Sequence[Prompt],
        encoded: Sequence[list[int]],
        max_new_tokens: int,
        seeds: Sequence[int] | None,
    ) -> list[Continuation]:
        settings = [
            self._sampling(
                temperature=self._temperature,
                max_tokens=max_new_tokens,
                logprobs=0,
                seed=None if seeds is None or self._temperature == 0 else seeds[row] % 2**31,
                stop_token_ids=sorted(self.encoder.ends),
                detokenize=False,
            )
            for row in range(len(encoded))
        ]
        found = []
        for output in self._ask(encoded, settings):
            reply = output.outputs[0]
            tokens = list(reply.token_ids)
            length = next(
                (i for i, token in enumerate(tokens) if token in self.encoder.ends), len(tokens)
            )
            nll = [-reply.logprobs[i][tokens[i]].logprob for i in range(length)]
            text, offsets = self.encoder.decode(tokens[:length])
            finished = length < len(tokens) or reply.finish_reason != "length"
            found.append(Continuation(text, np.array(nll, dtype=np.float32), offsets, finished))
        return found

    def _likeliest(
        self,
        prompts: Sequence[Prompt],
        encoded: Sequence[list[int]],
        wanted: Sequence[Sequence[int]],
    ) -> list[Likeliest]:
        settings = [
            self._sampling(
                temperature=0, max_tokens=1, logprob_token_ids=list(ids) or None, detokenize=False
            )
            for ids in wanted
        ]
        found = []
        for output in self._ask(encoded, settings):
            first = (output.outputs[0].logprobs or [{}])[0]
            found.append(Likeliest({token: one.logprob for token, one in first.items()}, {}))
        return found

    def _forced(
        self, encoded: Sequence[list[int]], endings: Sequence[list[int]]
    ) -> list[TokenValues]:
        settings = self._sampling(temperature=0, max_tokens=1, prompt_logprobs=2, detokenize=False)
        asked = [[*head, *tail] for head, tail in zip(encoded, endings, strict=True)]
        found = []
        for output, head, tail in zip(
            self._ask(asked, [settings] * len(asked)), encoded, endings, strict=True
        ):
            rows = []
            for place, token in zip(output.prompt_logprobs[len(head) :], tail, strict=True):
                own = place[token]
                best, second = sorted((one.logprob for one in place.values()), reverse=True)[:2]
                rows.append((-own.logprob, _NAN, best - second, own.rank - 1))
            values = np.array(rows, dtype=np.float32).reshape(-1, 4)
            found.append(TokenValues(*values.T))
        return found


def _adapter_options(adapter: Path) -> dict[str, Any]:
    """What vLLM must know of an adapter; raises UserError where it is none or a pickled one."""
    from robustft.training.adapter import read_settings

    rank = int(read_settings(adapter).r)
    fitting = next((allowed for allowed in _LORA_RANKS if allowed >= rank), None)
    if fitting is None:
        raise UserError(f"{adapter}: its rank is {rank}, vLLM takes up to {_LORA_RANKS[-1]}")
    return {"enable_lora": True, "max_lora_rank": fitting}
