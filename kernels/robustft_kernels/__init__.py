"""Token statistics and answer consistency for any pipeline: torch and numpy are all they need."""

from __future__ import annotations

from robustft_kernels.answer_consistency import Consistency, answer_consistency
from robustft_kernels.generation import TokenStatsLogitsProcessor
from robustft_kernels.linear_token_stats import linear_token_stats
from robustft_kernels.results import PartialTokenStats, SequenceStats, TokenStats
from robustft_kernels.sharding import partial_token_stats, shard_target_logits
from robustft_kernels.token_stats import token_stats

__all__ = [
    "Consistency",
    "PartialTokenStats",
    "SequenceStats",
    "TokenStats",
    "TokenStatsLogitsProcessor",
    "answer_consistency",
    "linear_token_stats",
    "partial_token_stats",
    "shard_target_logits",
    "token_stats",
]
