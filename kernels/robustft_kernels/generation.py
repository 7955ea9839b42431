"""Statistics of sampled tokens, gathered while Hugging Face `generate` runs."""

from __future__ import annotations

import torch
from torch import Tensor

from robustft_kernels.token_stats import check_factor, token_stats


class TokenStatsLogitsProcessor:
    """Records nll and entropy of every generated token without keeping the logits.

    Pass it to `model.generate(logits_processor=LogitsProcessorList([recorder]))` and call
    `finish` with the sequences that come back. It returns the scores untouched. Placed first it
    sees the model's own distribution, placed last the one that is sampled from. Only one step's
    scores [B, V] are held at a time, to look up the token chosen from them. Greedy search and
    sampling only, one token a step: beams reorder the rows, assisted generation (an assistant
    model, prompt lookup) tries several tokens a step; both raise ValueError. What a generation left
    that was interrupted before `finish` is forgotten when the next one begins; one whose prompt is
    a token longer than that had come to is taken for its next step, and refused where rows differ.

    Raises TypeError or ValueError for a temperature that is no number in [1e-30, 1e30].
    """

    def __init__(self, temperature: float = 1.0) -> None:
        check_factor(temperature, "temperature")
        self.temperature = temperature
        self._step: tuple[Tensor, Tensor] | None = None  # the last one's input_ids and scores
        self._prompt: Tensor | None = None  # the first one's input_ids
        self._nll: list[Tensor] = []
        self._entropy: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Record the token chosen at the previous step; scores [B, V] pass through."""
        if self._step is not None and input_ids.shape[1] == self._step[0].shape[1] + 1:
            self._record(input_ids, *self._step)
        else:
            self._refuse_several_tokens(input_ids)
            self._prompt, self._nll, self._entropy = input_ids, [], []
        self._step = input_ids, scores.clone()  # those after this one may write into it
        return scores

    def finish(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """(nll, entropy) of the generated tokens, each [B, T] float32, nats; forgets them.

        `sequences` [B, prompt + T] is what `generate` returned. Positions after a row's end of
        text describe the padding that was written there.
        """
        if self._step is not None:
            self._record(sequences, *self._step)
        self._step = None
        if not self._nll:
            empty = torch.empty(sequences.shape[0], 0, device=sequences.device)
            return empty, empty.clone()
        nll, entropy = torch.stack(self._nll, 1), torch.stack(self._entropy, 1)
        self._nll, self._entropy = [], []
        return nll, entropy

    def _refuse_several_tokens(self, input_ids: Tensor) -> None:
        """Raise ValueError where the generation under way goes on elsewhere than a token later."""
        if self._step is None or self._prompt is None:
            return
        given = self._prompt.shape[1]
        if input_ids.shape[1] > given and torch.equal(input_ids[:, :given], self._prompt):
            raise ValueError(
                "input_ids must grow by one token a step: no assisted generation or prompt lookup, "
                "and a new recorder after an interrupted generation"
            )

    def _record(self, input_ids: Tensor, before: Tensor, scores: Tensor) -> None:
        position = before.shape[1]
        if input_ids.shape[1] <= position:
            raise ValueError(f"sequences must have more than {position} tokens, as generated")
        if not torch.equal(input_ids[:, :position].to(before.device), before):
            raise ValueError(
                "input_ids must keep their rows from step to step: no beam search, "
                "and a new recorder after an interrupted generation"
            )
        chosen = input_ids[:, position].to(scores.device)
        stats = token_stats(scores, chosen, temperature=self.temperature)
        if stats.logprob is not None:
            self._nll.append(-stats.logprob)
        self._entropy.append(stats.entropy)
