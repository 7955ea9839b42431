"""The Hugging Face engine: batched generation, option likelihoods, teacher-forced scores.

Statistics are gathered while decoding, one [batch, vocabulary] step at a time, and scores go
from hidden states at response positions only; no [batch, steps, vocabulary] tensor ever exists.

A record's result depends on its batch only through floating-point summation order: under padding,
log-probabilities move by about 1e-5 nats in float32 and 0.05 in bfloat16.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from robustft.config import EngineConfig
from robustft.devices import pick_device, pick_dtype
from robustft.engines import (
    Abilities,
    Choice,
    Failure,
    Generation,
    Prompt,
    ResponseScore,
    TokenValues,
)
from robustft.engines.cache import as_prefix, growing_cache
from robustft.engines.encoding import PromptEncoder
from robustft.frozen import FrozenTrunk
from robustft.models import (
    content_digest,
    context_window,
    find_model,
    has_plain_cache,
    load_causal_lm,
    load_tokenizer,
    shared_start,
)
from robustft_kernels import linear_token_stats, token_stats

_T = TypeVar("_T")
_CPU_BATCH_TOKENS = 12288
_CUDA_BATCH_TOKENS = 131072
_MAX_ROWS = {"cpu": 96, "cuda": 512}
_ROUNDING = 0.2  # of the scores' spread; rounding to bfloat16 makes 0.02, padding read as text 0.8
_NOT_FINITE = Failure("the model's log-probabilities are not finite; another --dtype may help")
_log = logging.getLogger("robustft")


def _if_finite(result: _T, values: Any) -> _T | Failure:
    """`result`, but a failure where the log-probabilities it comes from overflowed."""
    return result if np.isfinite(values).all() else _NOT_FINITE


class _TokenRecorder:
    """A logits processor that notes nll and entropy of every token as it is chosen.

    The token chosen from step t's scores is known at step t + 1, so one step's raw scores are
    held, never more.
    """

    def __init__(self) -> None:
        self.nll: list[torch.Tensor] = []
        self.entropy: list[torch.Tensor] = []
        self._previous: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.note(input_ids[:, -1])
        self._previous = scores
        return scores

    def note(self, chosen: torch.Tensor) -> None:
        """Record the statistics of the tokens chosen [batch] from the last scores."""
        if self._previous is None:
            return
        stats = token_stats(self._previous, chosen)
        assert stats.logprob is not None
        self.nll.append(-stats.logprob)
        self.entropy.append(stats.entropy)
        self._previous = None


class _Sampler:
    """Sampling as greedy choice: all scores but that of the token drawn become -inf.

    One draw in [0, 1) a token, from the record's own seed: where it falls among the summed
    probabilities. So a sample does not depend on its batch, and no noise of the vocabulary's size
    is drawn, which took longer than the model.
    """

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self._temperature = temperature
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        draws = [torch.rand(1, generator=g, dtype=torch.float64) for g in self._generators]
        shares = torch.softmax(scores.float() / self._temperature, dim=-1)
        sums = shares.cumsum(dim=-1, dtype=torch.float64)  # [rows, vocabulary]
        drawn = torch.stack(draws).to(scores.device) * sums[:, -1:]
        # The first sum above the draw: never a token without a probability.
        token = torch.searchsorted(sums, drawn, right=True).clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class TransformersEngine:
    """`robustft.engines.Engine` over a Hugging Face causal language model.

    Parameters
    ----------
    config: which model, device, dtype and batch size.
    model, tokenizer: an already loaded pair instead of `config.model` (an adapter on top, say).
    """

    name = "transformers"
    abilities = Abilities()

    def __init__(
        self, config: EngineConfig, *, model: Any | None = None, tokenizer: Any | None = None
    ) -> None:
        self.device = pick_device(config.device)
        if model is None:
            source = find_model(config.model)
            self.model_id = source.name
            self.embedded = source.embedded
            self.revision = content_digest(source)
            loaded = load_tokenizer(source)
            dtype = pick_dtype(config.dtype, self.device)
            model = load_causal_lm(source, dtype=dtype, attention=config.attention)
        else:
            loaded = tokenizer
            self.model_id = str(config.model or getattr(model.config, "_name_or_path", "model"))
            self.embedded = False
            self.revision = "local"
        self.revision = str(getattr(model.config, "_commit_hash", None) or self.revision)
        self.model: Any = model.to(self.device).eval()
        self.tokenizer: Any = loaded
        self.trunk: FrozenTrunk | None = None  # layers that another adapter's engine shares
        self.temperature = config.temperature
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        self.encoder = PromptEncoder(loaded, context_window(model), ends)
        default = _CPU_BATCH_TOKENS if self.device.type == "cpu" else _CUDA_BATCH_TOKENS
        self._batch_tokens = config.batch_tokens or default
        self._max_rows = _MAX_ROWS.get(self.device.type, 64)
        self._head_is_linear: bool | None = None
        plain = getattr(self.model, "get_base_model", lambda: self.model)()
        self._takes_batches: bool | None = None
        self._takes_positions = "position_ids" in inspect.signature(plain.forward).parameters
        self._plain_cache: bool | None = None
        pad = self.tokenizer.pad_token_id
        self._pad = int(pad if pad is not None else min(self.encoder.ends, default=0))

    @property
    def truncated(self) -> int:
        """Prompts cut to the model's window so far."""
        return self.encoder.truncated

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

    def _with_back_off(
        self, rows: Sequence[int], ask: Callable[[Sequence[int]], list[_T]]
    ) -> list[_T]:
        """Ask for `rows`; on out-of-memory, for each half in turn."""
        try:
            return ask(rows)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        torch.cuda.empty_cache()
        middle = len(rows) // 2
        return self._with_back_off(rows[:middle], ask) + self._with_back_off(rows[middle:], ask)

    def _together(self, count: int, ask: Callable[[Sequence[int]], list[_T]]) -> list[_T]:
        """Ask for `count` rows at once, or one by one where the model does not keep them apart."""
        rows = range(count)
        if count > 1 and not self._keeps_apart():
            return [found for row in rows for found in ask([row])]
        return self._with_back_off(rows, ask) if count else []

    def _keeps_apart(self) -> bool:
        """Whether a short row comes out alike alone and in a batch, padded, once seen.

        Some models with a state read the padding as text (RWKV-4, Recurrent Gemma, xLSTM), or mix
        up what follows a batch (RWKV-4, MiniMax).
        """
        if self._takes_batches is None:
            room = self.encoder.window - 2
            texts = ["The cat sat on the", "Which of these is the longer text, by far? " * 4]
            encoded = [ids[:room] for ids in self.tokenizer(texts, verbose=False)["input_ids"]]
            alone, padded = self._two_steps(encoded[:1]), self._two_steps(encoded)
            gap = (alone - padded).std(dim=-1) / alone.std(dim=-1)
            self._takes_batches = not bool((gap > _ROUNDING).any())
            if not self._takes_batches:
                _log.warning(
                    "%s reads padding as text, or mixes up a batch: it is asked one text at a "
                    "time, which is slow",
                    self.model_id,
                )
        return self._takes_batches

    def _two_steps(self, encoded: Sequence[Sequence[int]]) -> torch.Tensor:
        """Scores [2, vocabulary] after the first row and after one more token, always the same."""
        seen: list[torch.Tensor] = []
        token = next(i for i in itertools.count() if i not in self.encoder.ends)

        def note(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(scores[0].float())
            forced = torch.full_like(scores, -torch.inf)
            forced[:, token] = 0.0
            return forced

        self._decode(encoded, 2, [note])
        return torch.stack(seen)

    def _left_padded(
        self, encoded: Sequence[Sequence[int]], shared: int = 0
    ) -> dict[str, torch.Tensor]:
        """Model inputs [rows, width]; padding stands after the first `shared` tokens of a row."""
        width = max(map(len, encoded))
        ids = torch.full((len(encoded), width), self._pad, dtype=torch.long)
        mask = torch.zeros((len(encoded), width), dtype=torch.long)
        for row, tokens in enumerate(encoded):
            tail = width - len(tokens) + shared
            ids[row, :shared] = torch.tensor(tokens[:shared], dtype=torch.long)
            ids[row, tail:] = torch.tensor(tokens[shared:], dtype=torch.long)
            mask[row, :shared] = mask[row, tail:] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._takes_positions:
            # Positions that are learnt or absolute must not count the padding.
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

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
        recorder = _TokenRecorder()
        processors: list[Any] = [recorder]
        if self.temperature > 0:
            processors.append(_Sampler(self.temperature, seeds))
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

    def _decode(
        self, encoded: Sequence[Sequence[int]], most: int, processors: list[Any]
    ) -> torch.Tensor:
        """Up to `most` tokens after each sequence [rows, tokens], the likeliest as processed."""
        import transformers

        # A model that is not told positions may count them in keys, padding among them (MPT).
        before = min(map(len, encoded)) - 1 if self._takes_positions else 0
        shared = self._shared(encoded, before)
        inputs = self._left_padded(encoded, shared)
        cache = growing_cache(self.model, most)
        if shared and cache is not None:
            start = inputs["input_ids"][:1, :shared]
            self.model(input_ids=start, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(len(encoded))
        make: Any = transformers.GenerationConfig
        settings = make(
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=sorted(self.encoder.ends) or None,
            pad_token_id=self._pad,
        )
        inputs.pop("position_ids", None)  # `generate` counts for itself
        # A model folder's own must not change the method: `generate` takes from it (a repetition
        # penalty, say) whatever the one that it is given leaves open.
        own, self.model.generation_config = self.model.generation_config, make()
        try:
            output = self.model.generate(
                **inputs,
                past_key_values=cache,
                generation_config=settings,
                logits_processor=transformers.LogitsProcessorList(processors),
            )
        finally:
            self.model.generation_config = own
        tokens: torch.Tensor = output[:, inputs["input_ids"].shape[1] :]
        return tokens

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

    def _last_logits(self, encoded: Sequence[list[int]]) -> torch.Tensor:
        """[rows, vocabulary] after the last token of each sequence."""
        ends = [len(ids) - 1 for ids in encoded]
        rows = list(range(len(encoded)))
        if self.trunk is not None:
            states = self.trunk.states([np.array(ids, np.int32) for ids in encoded])
            every, last = (torch.tensor(at, device=self.device) for at in (rows, ends))
            return self.trunk.logits(states, every, last)
        if self._use_linear_head():
            at = self._states_at(encoded, rows, ends, before=min(ends))
            head: torch.Tensor = self.model.get_output_embeddings().weight
            return at @ head.T
        inputs = self._left_padded(encoded)
        logits: torch.Tensor = self.model(**inputs, logits_to_keep=1, use_cache=False).logits
        return logits[:, -1, :]

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

    def _nll(self, encoded: Sequence[list[int]], endings: Sequence[list[int]]) -> list[TokenValues]:
        """Per-token statistics of `endings` after `encoded`, both lists of token ids."""

        def ask(rows: Sequence[int]) -> list[TokenValues]:
            return self._nll_at_once([encoded[row] for row in rows], [endings[row] for row in rows])

        return self._together(len(encoded), ask)

    def _nll_at_once(
        self, encoded: Sequence[list[int]], endings: Sequence[list[int]]
    ) -> list[TokenValues]:
        rows = [row for row, tail in enumerate(endings) for _ in tail]
        # The state before a token predicts it: columns from the end of each head, less one.
        columns = [len(head) - 1 + i for head, tail in zip(encoded, endings, strict=True)
                   for i in range(len(tail))]  # fmt: skip
        targets = torch.tensor([i for tail in endings for i in tail], device=self.device)
        if len(rows) == 0:
            return [TokenValues(*[np.zeros(0)] * 4) for _ in endings]
        whole = [[*head, *tail] for head, tail in zip(encoded, endings, strict=True)]
        if self._use_linear_head():
            states = self._states_at(whole, rows, columns, before=min(map(len, encoded)) - 1)
            head = self.model.get_output_embeddings()
            stats = linear_token_stats(states, head.weight, targets)
        else:
            inputs = self._left_padded(whole)
            keep = max(map(len, endings)) + 1
            logits = self.model(**inputs, logits_to_keep=keep, use_cache=False).logits
            shift = [logits.shape[1] - len(whole[row]) for row in rows]
            kept = [column + by for column, by in zip(columns, shift, strict=True)]
            stats = token_stats(logits[rows, kept], targets)
        assert stats.logprob is not None
        assert stats.rank is not None
        fields = (-stats.logprob, stats.entropy, stats.margin, stats.rank)
        arrays = [value.detach().cpu().numpy() for value in fields]
        ends = list(itertools.accumulate(len(tail) for tail in endings))
        return [
            TokenValues(*[values[end - len(tail) : end] for values in arrays])
            for tail, end in zip(endings, ends, strict=True)
        ]

    def _states_at(
        self, whole: Sequence[list[int]], rows: list[int], columns: list[int], before: int
    ) -> torch.Tensor:
        """Hidden states [len(rows), D] at the given places of the given token ids.

        What all rows begin with, up to `before` tokens, is computed once where the model's cache
        allows. Then rows are padded on the right: under causal attention no token sees padding.
        """
        decoder = self.model.get_decoder()
        shared = self._shared(whole, before)
        if not shared:
            inputs = self._left_padded(whole)
            width = inputs["input_ids"].shape[1]
            places = [width - len(whole[row]) + c for row, c in zip(rows, columns, strict=True)]
            left: torch.Tensor = decoder(**inputs, use_cache=False).last_hidden_state
            return left[rows, places]
        start = torch.tensor([whole[0][:shared]], device=self.device)
        cache = as_prefix(decoder(input_ids=start, use_cache=True).past_key_values)
        ids = torch.full((len(whole), max(map(len, whole)) - shared), self._pad, dtype=torch.long)
        for row, tokens in enumerate(whole):
            ids[row, : len(tokens) - shared] = torch.tensor(tokens[shared:])
        states: torch.Tensor = decoder(
            input_ids=ids.to(self.device), past_key_values=cache, use_cache=True
        ).last_hidden_state
        return states[rows, [column - shared for column in columns]]

    def _shared(self, encoded: Sequence[Sequence[int]], before: int) -> int:
        """How many first tokens, up to `before`, all rows share and are worth computing once."""
        shared = shared_start(encoded, before)
        if shared and self._plain_cache is None:
            self._plain_cache = has_plain_cache(self.model)
        return shared if self._plain_cache else 0

    def _use_linear_head(self) -> bool:
        """Whether logits are exactly `lm_head(hidden)` (no soft cap, scale or bias), once seen.

        Architectures differ in what they do to logits; asking the model itself is safer than a
        list of their names.
        """
        if self._head_is_linear is None:
            vocabulary = self.model.config.get_text_config().vocab_size
            ids = torch.tensor([[self._pad, 5 % vocabulary]], device=self.device)
            try:
                state = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
                head = self.model.get_output_embeddings()
                own = self.model(input_ids=ids, use_cache=False).logits.float()
                again = (state @ head.weight.T).float()
                # Of small logits a soft cap takes little: no more than rounding may differ.
                limit = max(1e-4, torch.finfo(state.dtype).eps) * float(own.abs().max())
                same = float((own - again).abs().max()) <= limit
                self._head_is_linear = same and getattr(head, "bias", None) is None
            except (AttributeError, RuntimeError, TypeError):
                self._head_is_linear = False
        return self._head_is_linear
