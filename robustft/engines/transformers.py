"""The Hugging Face engine: batched generation, option likelihoods, teacher-forced scores.

Statistics are gathered while decoding, one [batch, vocabulary] step at a time, and scores go
from hidden states at response positions only; no [batch, steps, vocabulary] tensor ever exists.

A record's result depends on its batch only through floating-point summation order: under padding,
log-probabilities move by about 1e-5 nats in float32 and 0.05 in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from robustft.config import EngineConfig
from robustft.devices import pick_device, pick_dtype
from robustft.engines import Abilities, Choice, Failure, Generation, Prompt, ResponseScore
from robustft.engines.decoding import Sampler, TokenRecorder
from robustft.engines.encoding import PromptEncoder
from robustft.engines.forward import ForwardPasses
from robustft.models import (
    content_digest,
    context_window,
    find_model,
    load_causal_lm,
    load_tokenizer,
)
from robustft_kernels import token_stats

_T = TypeVar("_T")
_CPU_BATCH_TOKENS = 12288
_CUDA_BATCH_TOKENS = 131072
_MAX_ROWS = {"cpu": 96, "cuda": 512}
_NOT_FINITE = Failure("the model's log-probabilities are not finite; another --dtype may help")


def _if_finite(result: _T, values: Any) -> _T | Failure:
    """`result`, but a failure where the log-probabilities it comes from overflowed."""
    return result if np.isfinite(values).all() else _NOT_FINITE


class TransformersEngine(ForwardPasses):
    """`robustft.engines.Engine` over a Hugging Face causal language model.

    Parameters
    ----------
    config: which model, device, dtype and batch size.
    model, tokenizer: an already loaded pair instead of `config.model` (an adapter on top, say).
    """

    name = "transformers"
    abilities = Abilities()
    at_a_time = 1

    def __init__(
        self, config: EngineConfig, *, model: Any | None = None, tokenizer: Any | None = None
    ) -> None:
        device = pick_device(config.device)
        if model is None:
            source = find_model(config.model)
            model_id = source.name
            self.embedded = source.embedded
            self.revision = content_digest(source)
            tokenizer = load_tokenizer(source)
            dtype = pick_dtype(config.dtype, device)
            model = load_causal_lm(source, dtype=dtype, attention=config.attention)
        else:
            model_id = str(config.model or getattr(model.config, "_name_or_path", "model"))
            self.embedded = False
            self.revision = "local"
        self.revision = str(getattr(model.config, "_commit_hash", None) or self.revision)
        model = model.to(device).eval()
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        encoder = PromptEncoder(tokenizer, context_window(model), ends)
        super().__init__(model, tokenizer, encoder, device, model_id)
        self.temperature = config.temperature
        default = _CPU_BATCH_TOKENS if device.type == "cpu" else _CUDA_BATCH_TOKENS
        self._batch_tokens = config.batch_tokens or default
        self._max_rows = _MAX_ROWS.get(device.type, 64)

    @property
    def truncated(self) -> int:
        """Prompts cut to the model's window so far."""
        return self.encoder.truncated

    def cancel(self) -> None:
        """Nothing: no server is asked."""

    # --- batches ---------------------------------------------------------------------------

    def plan(self, prompts: Sequence[Prompt], max_new_tokens: int = 0) -> list[list[int]]:
        """Group similar lengths into batches of at most `batch_tokens` padded tokens."""
        return self._batches([len(ids) + max_new_tokens for ids in self.encoder.encode(prompts)])

    def _batches(self, widths: Sequence[int]) -> list[list[int]]:
        """Rows of these tokens in batches that are within the budget, similar ones together."""
        batches: list[list[int]] = []
        for index in sorted(range(len(widths)), key=lambda i: (widths[i], i)):
            width = widths[index]  # ascending, so the newest row is the widest
            current = batches[-1] if batches else None
            if (
                current is None
                or len(current) >= self._max_rows
                or (len(current) + 1) * width > self._batch_tokens
            ):
                batches.append([index])
            else:
                current.append(index)
        return batches

    # --- the protocol ----------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, seeds: Sequence[int] | None = None
    ) -> list[Generation | Failure]:
        """Continue every prompt; greedy, or sampled with `seeds` when temperature > 0."""
        encoded = self.encoder.fit(prompts, max_new_tokens)

        def ask(rows: Sequence[int]) -> list[Generation | Failure]:
            chosen = [0 if seeds is None else seeds[row] for row in rows]
            return self._generate([encoded[row] for row in rows], max_new_tokens, chosen)

        return self._together(len(prompts), ask)

    def _generate(
        self, encoded: Sequence[Sequence[int]], max_new_tokens: int, seeds: Sequence[int]
    ) -> list[Generation | Failure]:
        recorder = TokenRecorder()
        processors: list[Any] = [recorder]
        if self.temperature > 0:
            processors.append(Sampler(self.temperature, seeds))
        tokens = self._decode(encoded, max_new_tokens, processors)
        recorder.note(tokens[:, -1])
        nll = torch.stack(recorder.nll, dim=1).cpu().numpy()
        entropy = torch.stack(recorder.entropy, dim=1).cpu().numpy()
        results: list[Generation | Failure] = []
        for row, reply in enumerate(tokens.tolist()):
            length = next(
                (i for i, token in enumerate(reply) if token in self.encoder.ends), len(reply)
            )
            text, offsets = self.encoder.decode(reply[:length])
            generation = Generation(
                text=text,
                nll=nll[row, :length].astype(np.float32),
                entropy=entropy[row, :length].astype(np.float32),
                offsets=offsets,
                prompt_tokens=len(encoded[row]),
                finished=length < len(reply),
            )
            results.append(_if_finite(generation, nll[row, : length + 1]))
        return results

    @torch.inference_mode()
    def choose(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]
    ) -> list[Choice | Failure]:
        """Log-probability of each candidate continuation.

        Read from a single prefill where a candidate is one token, else from a teacher-forced pass.
        """
        encoded = self.encoder.fit(prompts, 8)
        endings = [
            [self.encoder.continuation(prompt.prefix, text) for text in texts]
            for prompt, texts in zip(prompts, candidates, strict=True)
        ]

        def ask(rows: Sequence[int]) -> list[Choice | Failure]:
            return self._choose([encoded[row] for row in rows], [endings[row] for row in rows])

        return self._together(len(prompts), ask)

    def _choose(
        self, encoded: Sequence[list[int]], endings: Sequence[Sequence[list[int]]]
    ) -> list[Choice | Failure]:
        logits = self._last_logits(encoded)
        stats = token_stats(logits)
        results: list[Choice | Failure] = []
        for row, texts in enumerate(endings):
            first = torch.tensor([ids[0] for ids in texts], device=self.device)
            logprobs = (logits[row, first].float() - stats.logsumexp[row]).cpu().numpy()
            long = [index for index, ids in enumerate(texts) if len(ids) > 1]
            if long:
                nll = self._nll([encoded[row]] * len(long), [texts[index] for index in long])
                for index, values in zip(long, nll, strict=True):
                    logprobs[index] = -values.nll.sum()
            choice = Choice(
                logprobs=logprobs.astype(np.float32),
                entropy=float(stats.entropy[row]),
                prompt_tokens=len(encoded[row]),
            )
            results.append(_if_finite(choice, logprobs.max()))
        return results

    @torch.inference_mode()
    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> list[ResponseScore | Failure]:
        """Teacher-forced statistics of the given responses, response positions only."""
        encoded, endings, cut = self.encoder.fit_with(prompts, responses)

        # The batch was planned by its prompts; responses may be far longer.
        widths = [len(head) + len(tail) for head, tail in zip(encoded, endings, strict=True)]
        scores: dict[int, ResponseScore | Failure] = {}
        for rows in self._batches(widths):
            found = self._nll([encoded[row] for row in rows], [endings[row] for row in rows])
            for row, one in zip(rows, found, strict=True):
                scores[row] = _if_finite(ResponseScore.of(one, cut[row]), one.nll)
        return [scores[row] for row in range(len(prompts))]
