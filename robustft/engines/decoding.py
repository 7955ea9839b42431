"""What is noted, and drawn, as each token is generated: logits processors of one batch.

Each is called with the tokens so far [rows, length] and the next one's scores [rows, vocabulary].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from robustft_kernels import token_stats


class TokenRecorder:
    """A logits processor that notes nll and entropy of every token as it is chosen.

    The token chosen from step t's scores is known at step t + 1, so one step's raw scores are
    held, never more.
    """

    def __init__(self) -> None:
        self.nll: list[torch.Tensor] = []
        self.entropy: list[torch.Tensor] = []
        self._previous: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores as they are."""
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


class Sampler:
    """Sampling as greedy choice: all scores but that of the token drawn become -inf.

    One draw in [0, 1) a token, from the record's own seed: where it falls among the summed
    probabilities. So a sample does not depend on its batch, and no noise of the vocabulary's size
    is drawn, which took longer than the model.
    """

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self._temperature = temperature
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores of which the token drawn in each row is the only finite one."""
        draws = [torch.rand(1, generator=g, dtype=torch.float64) for g in self._generators]
        shares = torch.softmax(scores.float() / self._temperature, dim=-1)
        sums = shares.cumsum(dim=-1, dtype=torch.float64)  # [rows, vocabulary]
        drawn = torch.stack(draws).to(scores.device) * sums[:, -1:]
        # The first sum above the draw: never a token without a probability.
        token = torch.searchsorted(sums, drawn, right=True).clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)
