"""What answer_consistency means, one question at a time, as plainly as it can be said."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

Tokens = Sequence[int]


def common_subsequence(a: Tokens, b: Tokens) -> int:
    """Length of a longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b):
            above = row[j + 1]
            row[j + 1] = diagonal + 1 if x == y else max(above, row[j])
            diagonal = above
    return row[-1]


def edit_distance(a: Tokens, b: Tokens) -> int:
    """Levenshtein distance: insertions, deletions and substitutions cost one each."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b):
            above = row[j + 1]
            row[j + 1] = min(above + 1, row[j] + 1, diagonal + (x != y))
            diagonal = above
    return row[-1]


def pair_agreement(a: Tokens, b: Tokens, metric: str) -> float:
    """Agreement of two token sequences in [0, 1]; two empty ones agree."""
    if not a and not b:
        return 1.0
    if metric == "exact":
        return float(list(a) == list(b))
    if metric == "token_f1":
        return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b))
    if metric == "lcs":
        return 2 * common_subsequence(a, b) / (len(a) + len(b))
    if metric == "edit":
        return 1 - edit_distance(a, b) / max(len(a), len(b))
    raise ValueError(f"metric must be exact, token_f1, lcs or edit, got {metric!r}")


def connected_components(linked: Sequence[Sequence[bool]], present: Sequence[bool]) -> list[int]:
    """Clusters numbered by their first member; -1 for an absent answer."""
    cluster = [-1] * len(present)
    count = 0
    for first, here in enumerate(present):
        if not here or cluster[first] >= 0:
            continue
        frontier = [first]
        while frontier:
            a = frontier.pop()
            cluster[a] = count
            frontier += [
                b for b in range(len(present)) if present[b] and linked[a][b] and cluster[b] < 0
            ]
        count += 1
    return cluster


def greedy_clusters(linked: Sequence[Sequence[bool]], present: Sequence[bool]) -> list[int]:
    """Cluster by the rule of the published semantic-entropy code (Kuhn et al., ICLR 2023).

    An answer without a cluster opens one and takes every later answer linked to it, even out of an
    earlier cluster.
    """
    cluster = [-1] * len(present)
    count = 0
    for a, here in enumerate(present):
        if not here or cluster[a] >= 0:
            continue
        cluster[a] = count
        for b in range(a + 1, len(present)):
            if present[b] and linked[a][b]:
                cluster[b] = count
        count += 1
    return cluster


def vote(cluster: Sequence[int], weights: Sequence[float]) -> tuple[int, float, float]:
    """(heaviest cluster, its share, entropy of the shares in nats); (-1, 0, 0) without votes."""
    total = math.fsum(w for w, c in zip(weights, cluster, strict=True) if c >= 0)
    if total == 0:
        return -1, 0.0, 0.0
    shares = [
        math.fsum(w for w, c in zip(weights, cluster, strict=True) if c == i) / total
        for i in range(max(cluster) + 1)
    ]
    entropy = -math.fsum(p * math.log(p) for p in shares if p > 0)
    return shares.index(max(shares)), max(shares), entropy
