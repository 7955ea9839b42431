"""How far K answers to a question agree, for N questions at once: C++ on the CPU, Triton on a GPU.

`answer_consistency_reference` says the same in plain Python.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from robustft_kernels.answer_inputs import Library, Runs, is_tensor, runs_of, unit_rows
from robustft_kernels.answer_text import Unit

Metric = Literal["exact", "token_f1", "lcs", "edit", "cosine"]
Clustering = Literal["components", "greedy"]
Backend = Literal["auto", "cpu", "triton"]

DEFAULT_THRESHOLD = {"exact": 1.0, "token_f1": 0.5, "lcs": 0.5, "edit": 0.5, "cosine": 0.8}
_UNIT: dict[str, Unit] = {"exact": "answer", "token_f1": "word", "lcs": "word", "edit": "character"}


@dataclass(frozen=True, slots=True)
class Consistency:
    """Agreement among K answers to each of N questions.

    NumPy arrays, or torch tensors on the device of the answers where those are torch tensors.

    agreement: [N, K, K] float32, symmetric, 1 on the diagonal, 0 wherever an answer is absent.
    mean_agreement: [N, K] float32, with the other answers present; 0 where there is none.
    cluster: [N, K] int64, numbered from 0 by first member; -1 where an answer is absent.
    majority: [N] int64, the cluster with most votes, the first of equals; -1 without votes.
    majority_fraction: [N] float32, its share of the votes; 0 without votes.
    semantic_entropy: [N] float32, entropy of the clusters' shares of the votes, in nats.
    given_agreement: [N, K] float32 or None, of each answer with the given one.
    given_support: [N] float32 or None, the share of votes that agree with the given answer at the
        threshold or above.
    """

    agreement: Any
    mean_agreement: Any
    cluster: Any
    majority: Any
    majority_fraction: Any
    semantic_entropy: Any
    given_agreement: Any = None
    given_support: Any = None


def answer_consistency(
    answers: Any,
    *,
    metric: Metric = "exact",
    threshold: float | None = None,
    given: Any = None,
    present: Any = None,
    log_weights: Any = None,
    cu_seqlens: Any = None,
    counts: int | ArrayLike | None = None,
    clustering: Clustering = "components",
    normaliser: Callable[[str], str] | None = None,
    threads: int | None = None,
    backend: Backend = "auto",
) -> Consistency:
    """Agreement, clusters, majority and semantic entropy of N questions' answers.

    answers, one of
      - a list of N lists of up to 64 strings, ragged; None is no answer. Compared after Unicode
        normalisation (`answer_text.normalise`, or `normaliser`): whole (exact), by words
        (token_f1, lcs) or by characters (edit);
      - token ids [N, K, L], any integer dtype within int32, each answer followed by negative
        padding;
      - token ids [T], none negative, with `cu_seqlens` [M + 1] (answer m is
        ids[cu_seqlens[m]:cu_seqlens[m + 1]]) and `counts`, the number of answers of each question
        (one int, or [N] with sum M);
      - embeddings [N, K, D] floating, for metric="cosine".
    metric (a and b are token sequences, |a| their length):
      exact 1 if equal; token_f1 2|a ∩ b|/(|a|+|b|) over multisets; lcs 2·LCS/(|a|+|b|), ROUGE-L's
      F; edit 1 - Levenshtein/max(|a|, |b|); cosine of the embeddings in fp32, [-1, 1]. Two empty
      answers agree; all but cosine are the same to the bit on every backend.
    threshold: agreement from which two answers are linked, in (0, 1]; by default 1 for exact, 0.8
      for cosine, 0.5 otherwise.
    given: one more answer per question, compared with all others but without a vote: N strings (or
      None), ids [N, L'] with negative padding, or embeddings [N, D].
    present: [N, K] bool, which slots hold an answer (default: all but None and beyond `counts`).
    log_weights: [N, K], log-probabilities of the answers; a vote weighs exp(log_weight). Default:
      one vote each.
    clustering: "components" (connected components of the links) or "greedy" (the published
      semantic-entropy code's rule, which depends on the order of the answers).
    threads: CPU threads; default: all cores, at most 16.
    backend: "auto" takes Triton for tensors on a GPU, C++ otherwise.

    Returns Consistency. Raises TypeError or ValueError naming the argument, the requirement and
    the value received.
    """
    limit, workers = _check_arguments(metric, clustering, backend, threshold, threads)
    on_device = is_tensor(answers) and answers.device.type != "cpu"
    xp = Library(answers, triton=backend == "triton" or (backend == "auto" and on_device))
    if xp.triton:
        _check_triton(backend)
    if metric == "cosine":
        others = {"cu_seqlens": cu_seqlens, "counts": counts, "normaliser": normaliser}
        for name, value in others.items():
            if value is not None:
                raise TypeError(f"{name} must be None for metric='cosine', got {value!r}")
        agreement, here = _cosine(xp, *unit_rows(xp, answers, given, present))
    else:
        runs = runs_of(xp, answers, given, present, cu_seqlens, counts, _UNIT[metric], normaliser)
        agreement, here = _pairwise(xp, runs, metric, workers), runs.length >= 0

    slots = here.shape[1] - (given is not None)
    voters = xp.contiguous(here[:, :slots])
    weights = _weights(xp, log_weights, voters)
    among = xp.contiguous(agreement[:, :slots, :slots])
    fields = [among, *_summarise(xp, among, voters, weights, limit, clustering, workers)]
    if given is not None:
        with_given = xp.contiguous(agreement[:, :slots, slots])
        linked = (with_given >= limit) & here[:, slots:]
        fields += [with_given, _support(xp, linked, voters, weights)]
    return Consistency(*map(xp.result, fields))


def _check_arguments(
    metric: str, clustering: str, backend: str, threshold: float | None, threads: int | None
) -> tuple[float, int]:
    for name, value, allowed in (
        ("metric", metric, get_args(Metric)),
        ("clustering", clustering, get_args(Clustering)),
        ("backend", backend, get_args(Backend)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    limit = DEFAULT_THRESHOLD[metric] if threshold is None else float(threshold)
    if not 0.0 < limit <= 1.0:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    workers = min(cores(), 16) if threads is None else _checked_threads(threads)
    # Agreement is float32: compare like with like, but no threshold becomes 0.
    least = np.finfo(np.float32).smallest_subnormal
    return float(max(np.float32(limit), least)), workers


def _checked_threads(threads: int) -> int:
    try:
        workers = operator.index(None if isinstance(threads, bool) else threads)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"threads must be a whole number, got {threads!r}") from None
    if not 1 <= workers < 2**31:
        raise ValueError(f"threads must be in [1, {2**31 - 1}], got {threads}")
    return workers


def _check_triton(backend: str) -> None:
    import torch

    try:
        from triton import knobs
    except ImportError:
        raise ValueError(
            f"backend must be 'cpu' where Triton is not installed, got {backend!r}"
        ) from None
    if not torch.cuda.is_available() and not knobs.runtime.interpret:
        raise ValueError(f"backend must be 'cpu' where there is no GPU, got {backend!r}")


def cores() -> int:
    """CPU cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # not everywhere
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _pairwise(xp: Library, runs: Runs, metric: str, workers: int) -> Any:
    if xp.triton:
        from robustft_kernels import answer_consistency_triton

        return answer_consistency_triton.pairwise(runs.tokens, runs.start, runs.length, metric)
    from robustft import _core

    return _core.consistency_pairwise(runs.tokens, runs.start, runs.length, metric, workers)


def _summarise(
    xp: Library, among: Any, voters: Any, weights: Any, limit: float, rule: str, workers: int
) -> Any:
    if xp.triton:
        from robustft_kernels import answer_consistency_triton

        return answer_consistency_triton.summarise(among, voters, weights, limit, rule)
    from robustft import _core

    return _core.consistency_summarise(among, voters, weights, limit, rule, workers)


def _cosine(xp: Library, unit: Any, here: Any) -> tuple[Any, Any]:
    """Cosines [N, K, K] of unit rows [N, K, D]; the diagonal is exactly 1 where present."""
    agreement = xp.module.matmul(unit, unit.swapaxes(1, 2)).clip(-1.0, 1.0)
    agreement = xp.module.where(here[:, :, None] & here[:, None, :], agreement, xp.real(0.0))
    slots = xp.counting(here.shape[1])
    agreement[:, slots, slots] = xp.module.where(here, xp.real(1.0), xp.real(0.0))
    return agreement, here


def _weights(xp: Library, log_weights: Any, voters: Any) -> Any:
    """Votes [N, K] float64, the heaviest of a question 1, 0 where absent; None for equal votes."""
    if log_weights is None or not voters.shape[1]:
        return None
    logs = xp.native(log_weights)
    if tuple(logs.shape) != tuple(voters.shape):
        raise ValueError(
            f"log_weights must be [N, K] = {tuple(voters.shape)}, got {tuple(logs.shape)}"
        )
    nothing = xp.native(-np.inf)
    logs = xp.module.where(voters, xp.cast(logs, "float64"), nothing)
    if bool((logs != logs).any()) or bool((logs == np.inf).any()):
        raise ValueError("log_weights must be below +inf and not NaN where an answer is present")
    top = xp.module.amax(logs, axis=1)[:, None]
    return xp.contiguous(xp.module.exp(logs - top.clip(-1e300)))


def _support(xp: Library, linked: Any, voters: Any, weights: Any) -> Any:
    """Share of the votes [N] that lies on linked answers; 0 without votes."""
    votes = xp.cast(voters, "float64") if weights is None else weights
    return xp.cast((votes * linked).sum(axis=1) / votes.sum(axis=1).clip(1e-300), "float32")
