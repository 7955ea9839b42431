"""What training says about its data as it goes: entropy, nll and noise score of each step."""

from __future__ import annotations

from robustft_kernels import TokenStats

__all__ = ["StepSignals"]


class StepSignals:
    """Means over the responses seen since the last `take`.

    token_entropy: Shannon entropy of the next-token distribution, mean over response tokens, nats.
    response_nll: negative log-likelihood of the response tokens, mean over tokens, nats.
    noise_score: 1 - exp(-nll) of each response (its nll a mean over its tokens, eq. 7 of arXiv
        2412.14922), mean over responses: one minus the geometric mean probability the model gives
        the answer's tokens. In [0, 1]; what stays high while other answers are learnt is suspect.
    """

    def __init__(self) -> None:
        self._tokens = self._responses = 0
        self._entropy = self._nll = self._noise = 0.0

    def add(self, stats: TokenStats) -> None:
        """Count the responses of one forward pass: stats of targets, with `cu_seqlens`."""
        found = stats.sequences
        if found is None or found.nll is None:
            raise ValueError("stats must have targets and sequences, got none")
        here = found.tokens > 0
        tokens, nll, entropy = (t[here].double() for t in (found.tokens, found.nll, found.entropy))
        self._tokens += int(tokens.sum())
        self._responses += len(tokens)
        self._entropy += float((entropy * tokens).sum())
        self._nll += float((nll * tokens).sum())
        self._noise += float(-(-nll).expm1().sum())

    def take(self) -> dict[str, float]:
        """The means, and a fresh start; nothing where no response was seen."""
        tokens, responses = self._tokens, self._responses
        means = {
            "token_entropy": self._entropy / max(tokens, 1),
            "response_nll": self._nll / max(tokens, 1),
            "noise_score": self._noise / max(responses, 1),
        }
        StepSignals.__init__(self)
        return means if responses else {}
