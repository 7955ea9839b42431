"""A causal language model asked about token ids: padding, shared beginnings, states and logits.

Architectures differ in whether they keep the rows of a batch apart, take positions, or do something
to their logits. A list of their names would age: each model is tried once, and that decides.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from robustft.engines import TokenValues
from robustft.engines.cache import as_prefix, growing_cache
from robustft.engines.encoding import PromptEncoder
from robustft.frozen import FrozenTrunk
from robustft.models import has_plain_cache, shared_start
from robustft_kernels import linear_token_stats, token_stats

_T = TypeVar("_T")
_ROUNDING = 0.2  # of the scores' spread; rounding to bfloat16 makes 0.02, padding read as text 0.8
_log = logging.getLogger("robustft")


class ForwardPasses:
    """What an engine over a Hugging Face causal language model asks of the model itself.

    Parameters
    ----------
    model, tokenizer: a loaded pair, the model on `device`.
    encoder: knows the window and the tokens that end a reply.
    model_id: what messages call the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        encoder: PromptEncoder,
        device: torch.device,
        model_id: str,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.device = device
        self.model_id = model_id
        self.trunk: FrozenTrunk | None = None  # layers that another adapter's engine shares
        plain = getattr(model, "get_base_model", lambda: model)()
        self._takes_positions = "position_ids" in inspect.signature(plain.forward).parameters
        # Found out when they are first needed:
        self._takes_batches: bool | None = None
        self._head_is_linear: bool | None = None
        self._plain_cache: bool | None = None
        pad = tokenizer.pad_token_id
        self._pad = int(pad if pad is not None else min(encoder.ends, default=0))

    # --- rows of a batch -------------------------------------------------------------------

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

    # --- generation ------------------------------------------------------------------------

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

    # --- given text ------------------------------------------------------------------------

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
        list of their names. An adapter on the head may add less than rounding hides.
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
                plain = getattr(head, "bias", None) is None and not hasattr(head, "lora_A")
                self._head_is_linear = same and plain
            except (AttributeError, RuntimeError, TypeError):
                self._head_is_linear = False
        return self._head_is_linear
