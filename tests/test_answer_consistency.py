"""Agreement, clusters and votes: against other people's code, plain Python, and by their laws."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Indel, LCSseq, Levenshtein

from robustft import _core
from robustft_kernels import answer_consistency
from robustft_kernels.answer_consistency_reference import (
    common_subsequence,
    connected_components,
    edit_distance,
    greedy_clusters,
    pair_agreement,
    vote,
)
from robustft_kernels.answer_inputs import Library, _integers
from robustft_kernels.answer_text import normalise

METRICS = ("exact", "token_f1", "lcs", "edit")


@pytest.fixture(params=["portable", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        _core.consistency_force_instruction_set(request.param)
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    _core.consistency_force_instruction_set("")


def random_ids(
    rng: np.random.Generator, questions: int, slots: int, width: int, vocabulary: int
) -> tuple[np.ndarray, np.ndarray]:
    """Answers that are partly copies of each other with edits, ragged, some of them empty."""
    ids = rng.integers(0, vocabulary, (questions, slots, width))
    copies = rng.random((questions, slots, 1)) < 0.5
    ids = np.where(copies & (rng.random(ids.shape) < 0.8), ids[:, :1], ids)
    length = rng.integers(0, width + 1, (questions, slots))
    length[rng.random(length.shape) < 0.1] = width
    return np.where(np.arange(width) < length[..., None], ids, -1), length


def plain_agreement(ids: np.ndarray, length: np.ndarray, metric: str) -> np.ndarray:
    questions, slots = length.shape
    out = np.empty((questions, slots, slots))
    for n, i, j in itertools.product(range(questions), range(slots), range(slots)):
        a, b = ids[n, i, : length[n, i]].tolist(), ids[n, j, : length[n, j]].tolist()
        out[n, i, j] = pair_agreement(a, b, metric)
    return out


def test_reference_matches_rapidfuzz() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (rng.integers(0, 5, rng.integers(0, 20)).tolist() for _ in range(2))
        assert common_subsequence(a, b) == LCSseq.similarity(a, b)
        assert edit_distance(a, b) == Levenshtein.distance(a, b)
        assert pair_agreement(a, b, "lcs") == pytest.approx(Indel.normalized_similarity(a, b))
        assert pair_agreement(a, b, "edit") == pytest.approx(
            Levenshtein.normalized_similarity(a, b)
        )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("width", [0, 1, 63, 64, 65, 150])
def test_equals_plain_python(metric: str, width: int, instruction_set: str) -> None:
    rng = np.random.default_rng(width)
    slots = 9 if width < 100 else 5
    ids, length = random_ids(rng, 2, slots, width, 7)
    result = answer_consistency(ids, metric=metric, threads=1)
    expected = plain_agreement(ids, length, metric)
    np.testing.assert_allclose(result.agreement, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("slots", [1, 2, 8, 17, 64])
def test_any_number_of_answers(slots: int, instruction_set: str) -> None:
    rng = np.random.default_rng(slots)
    ids, length = random_ids(rng, 1, slots, 12, 4)
    for metric in METRICS:
        result = answer_consistency(ids, metric=metric)
        np.testing.assert_allclose(
            result.agreement, plain_agreement(ids, length, metric), rtol=0, atol=1e-7
        )


def rapidfuzz_pairs(total: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    slots, done = 16, 0
    while done < total:
        questions = min(200, -(-(total - done) // 120))
        vocabulary = int(rng.choice([3, 12, 60, 2_000]))
        ids, length = random_ids(rng, questions, slots, width, vocabulary)
        lcs = answer_consistency(ids, metric="lcs").agreement
        edit = answer_consistency(ids, metric="edit").agreement
        f1 = answer_consistency(ids, metric="token_f1").agreement
        for n in range(questions):
            rows = [ids[n, k, : length[n, k]].tolist() for k in range(slots)]
            for i, j in itertools.combinations(range(slots), 2):
                a, b = rows[i], rows[j]
                assert abs(lcs[n, i, j] - Indel.normalized_similarity(a, b)) < 1e-6
                assert abs(edit[n, i, j] - Levenshtein.normalized_similarity(a, b)) < 1e-6
                assert abs(f1[n, i, j] - pair_agreement(a, b, "token_f1")) < 1e-6
                done += 1


def test_twenty_thousand_random_pairs_equal_rapidfuzz_and_counter() -> None:
    rapidfuzz_pairs(10_000, 64, 1)
    rapidfuzz_pairs(10_000, 90, 2)


@pytest.mark.slow
def test_a_million_random_pairs_equal_rapidfuzz_and_counter() -> None:
    rapidfuzz_pairs(700_000, 64, 3)
    rapidfuzz_pairs(300_000, 150, 4)


def test_long_answers_with_many_different_words(instruction_set: str) -> None:
    # More masks than are kept at once: one word of positions at a time.
    rng = np.random.default_rng(5)
    ids = rng.permutation(3_000)[None, None].repeat(8, axis=1)
    ids = np.where(rng.random(ids.shape) < 0.2, 5_000 + rng.integers(0, 50, ids.shape), ids)
    result = answer_consistency(ids, metric="lcs")
    edits = answer_consistency(ids, metric="edit")
    rows = ids[0].tolist()
    for i, j in ((0, 1), (2, 7), (5, 6)):
        assert result.agreement[0, i, j] == pytest.approx(
            Indel.normalized_similarity(rows[i], rows[j])
        )
        assert edits.agreement[0, i, j] == pytest.approx(
            Levenshtein.normalized_similarity(rows[i], rows[j])
        )


def test_unicode_strings_equal_rapidfuzz_on_characters() -> None:
    rng = np.random.default_rng(6)
    alphabet = list("abc éß日本語한국🙂👩‍👩‍👧ﬁم")
    answers = [
        ["".join(rng.choice(alphabet, rng.integers(0, 30))) for _ in range(8)] for _ in range(20)
    ]
    result = answer_consistency(answers, metric="edit", normaliser=str)
    for n, row in enumerate(answers):
        for i, j in itertools.product(range(8), repeat=2):
            expected = Levenshtein.normalized_similarity(row[i], row[j])
            assert result.agreement[n, i, j] == pytest.approx(expected, abs=1e-6)


def test_normalisation() -> None:
    texts = [
        "The  U.S. Army!",
        "ＦＵＬＬ",
        "Straße",
        "-5.0 °C",
        "1,000",
        "a",
        "A.",
        "?!",
        "",
        "東京",
    ]
    assert normalise(texts) == [
        "us army", "full", "strasse", "-5.0 °c", "1000", "a", "a", "?!", "", "東 京",
    ]  # fmt: skip
    assert normalise(["1½ cups", "1 1/2 cups", "½", "10²"]) == ["1 1 2 cups"] * 2 + ["1 2", "10 2"]
    assert normalise(["C#", "F♯ minor", "#5"]) == ["c♯", "f♯ minor", "5"]
    assert normalise(["co\u00adoperate", "co-operate"]) == ["cooperate", "co operate"]
    assert normalise([]) == []
    assert normalise(["x\ue002y", "z"]) == ["x y", "z"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=6))
def test_law_normalising_together_is_normalising_alone(texts: list[str]) -> None:
    together = normalise(texts)
    assert together == [normalise([text])[0] for text in texts]


def test_strings_meet_as_a_reader_would_have_them() -> None:
    result = answer_consistency([["New York", "the new york.", "Boston", None], ["B", "(b)", "A"]])
    assert result.cluster.tolist() == [[0, 0, 1, -1], [0, 0, 1, -1]]
    assert result.majority.tolist() == [0, 0]
    np.testing.assert_allclose(result.majority_fraction, [2 / 3, 2 / 3], rtol=1e-6)
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    np.testing.assert_allclose(result.semantic_entropy, [entropy, entropy], rtol=1e-6)
    np.testing.assert_allclose(result.mean_agreement, [[0.5, 0.5, 0, 0]] * 2)
    words = answer_consistency([["the cat sat", "cat sat on"]], metric="lcs")
    assert words.agreement[0, 0, 1] == pytest.approx(0.8)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_law_clusters_and_votes_equal_plain_python(data: st.DataObject) -> None:
    slots = data.draw(st.integers(1, 8))
    ids = np.array(data.draw(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2),
                                      min_size=slots, max_size=slots)))[None]  # fmt: skip
    present = np.array([data.draw(st.lists(st.booleans(), min_size=slots, max_size=slots))])
    weights = data.draw(
        st.none() | st.lists(st.floats(-50, 0) | st.just(-math.inf), min_size=slots, max_size=slots)
    )
    rule = data.draw(st.sampled_from(["components", "greedy"]))
    result = answer_consistency(
        ids,
        metric="token_f1",
        present=present,
        clustering=rule,
        log_weights=None if weights is None else [weights],
    )
    linked = (result.agreement[0] >= 0.5).tolist()
    cluster = (connected_components if rule == "components" else greedy_clusters)(
        linked, present[0].tolist()
    )
    assert result.cluster[0].tolist() == cluster
    votes = [1.0] * slots if weights is None else [math.exp(w) for w in weights]
    _, fraction, entropy = vote(cluster, votes)
    assert result.majority_fraction[0] == pytest.approx(fraction, abs=1e-6)
    assert result.semantic_entropy[0] == pytest.approx(entropy, abs=1e-5)
    if result.majority[0] >= 0:
        share = math.fsum(v for v, c in zip(votes, cluster, strict=True) if c == result.majority[0])
        total = math.fsum(v for v, c in zip(votes, cluster, strict=True) if c >= 0)
        assert share / total == pytest.approx(fraction, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(METRICS))
def test_law_order_of_answers_does_not_matter(seed: int, metric: str) -> None:
    rng = np.random.default_rng(seed)
    ids, _ = random_ids(rng, 3, 6, 10, 4)
    order = rng.permutation(6)
    one, two = (
        answer_consistency(ids, metric=metric),
        answer_consistency(ids[:, order], metric=metric),
    )
    assert (one.agreement[:, order][:, :, order] == two.agreement).all()
    assert (one.agreement == one.agreement.transpose(0, 2, 1)).all()
    assert (np.diagonal(one.agreement, axis1=1, axis2=2) == 1).all()
    np.testing.assert_allclose(one.semantic_entropy, two.semantic_entropy, atol=1e-6)
    same = one.cluster[:, order, None] == one.cluster[:, None, order]
    assert (same == (two.cluster[:, :, None] == two.cluster[:, None, :])).all()


def test_greedy_is_the_published_rule_and_depends_on_order() -> None:
    # 0 ~ 2, 1 ~ 2, not 0 ~ 1: the published code moves answer 2 from the first cluster.
    ids = np.array([[[1, 1, 2, 2], [3, 3, 4, 4], [1, 1, 3, 3]]])
    published = answer_consistency(ids, metric="token_f1", clustering="greedy")
    assert published.cluster.tolist() == [[0, 1, 1]]
    assert answer_consistency(ids, metric="token_f1").cluster.tolist() == [[0, 0, 0]]


def test_log_weights_decide_the_vote() -> None:
    answers = [["a", "a", "b"]]
    plain = answer_consistency(answers)
    weighted = answer_consistency(answers, log_weights=[[-5.0, -5.0, -1.0]])
    assert (plain.majority[0], weighted.majority[0]) == (0, 1)
    expected = math.exp(-1) / (math.exp(-1) + 2 * math.exp(-5))
    assert weighted.majority_fraction[0] == pytest.approx(expected, rel=1e-6)
    far = answer_consistency(answers, log_weights=[[-1e6, -1e6, -1e6 - 1]])
    assert far.majority[0] == 0
    none = answer_consistency(answers, log_weights=[[-math.inf] * 3])
    assert (none.majority[0], none.majority_fraction[0], none.semantic_entropy[0]) == (-1, 0, 0)


def test_given_answer_is_compared_but_does_not_vote() -> None:
    answers = [["a", "a", "b", None], ["x"], ["y"]]
    result = answer_consistency(answers, given=["A", None, "z"])
    assert result.given_agreement.tolist() == [[1, 1, 0, 0], [0] * 4, [0] * 4]
    np.testing.assert_allclose(result.given_support, [2 / 3, 0, 0], rtol=1e-6)
    without = answer_consistency(answers)
    for field in ("agreement", "cluster", "majority_fraction", "semantic_entropy"):
        assert (getattr(result, field) == getattr(without, field)).all()
    weighted = answer_consistency(answers, given=["b", "x", "y"],
                                  log_weights=np.log([[1, 1, 6, 1]] * 3))  # fmt: skip
    np.testing.assert_allclose(weighted.given_support, [0.75, 1, 1], rtol=1e-6)
    ids = np.array([[[1, 2], [3, -1]]])
    padded = answer_consistency(ids, given=np.array([[3, -1, -1]]))
    assert padded.given_agreement.tolist() == [[0, 1]]


def test_packed_ids_equal_padded_ids() -> None:
    rng = np.random.default_rng(7)
    ids, length = random_ids(rng, 5, 4, 9, 5)
    flat = ids[ids >= 0]
    bounds = np.concatenate([[0], length.ravel().cumsum()])
    for metric in METRICS:
        padded = answer_consistency(ids, metric=metric)
        for counts in (4, np.int64(4)):
            packed = answer_consistency(flat, cu_seqlens=bounds, counts=counts, metric=metric)
            assert (padded.agreement == packed.agreement).all()
    counts = [2, 0, 6, 8, 4]
    ragged = answer_consistency(flat, cu_seqlens=bounds, counts=counts)
    assert (ragged.cluster >= 0).sum(axis=1).tolist() == counts
    assert ragged.majority.tolist()[1] == -1


def test_cosine() -> None:
    rng = np.random.default_rng(8)
    rows = rng.standard_normal((3, 5, 16)).astype(np.float32)
    rows[0, 0] = rows[0, 1] * 7
    rows[1, 2] = 0
    rows[2, 3] = rows[2, 4] * 1e30
    result = answer_consistency(rows, metric="cosine", given=rows[:, 1] * 2)
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=2, keepdims=True)
    unit = wide / np.where(norms > 0, norms, 1)
    expected = unit @ unit.transpose(0, 2, 1)
    expected[:, np.arange(5), np.arange(5)] = 1
    np.testing.assert_allclose(result.agreement, expected, atol=2e-6)
    assert result.cluster[0, 0] == result.cluster[0, 1]
    np.testing.assert_allclose(result.given_agreement[:, 1], 1, atol=1e-6)
    here = np.ones((3, 5), dtype=bool)
    here[:, 1] = False
    masked = answer_consistency(rows, metric="cosine", present=here)
    assert (masked.agreement[:, 1] == 0).all()
    assert (masked.cluster[:, 1] == -1).all()
    rows[:, 1] = np.nan  # nobody reads what is absent
    unread = answer_consistency(rows, metric="cosine", present=here)
    assert (unread.agreement == masked.agreement).all()


def test_no_threshold_is_too_small_to_tell_answers_apart() -> None:
    assert answer_consistency([["a", "b"]], threshold=1e-50).cluster.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
)
def test_token_ids_of_any_integer_dtype(dtype: str) -> None:
    ids = np.array([[[1, 2], [1, 3]]], dtype)
    assert answer_consistency(ids, metric="token_f1").agreement[0, 0, 1] == 0.5
    tensor = torch.from_numpy(ids.astype(np.int64)).to(getattr(torch, dtype))
    found = _integers(Library(tensor, triton=True), "answers", tensor)
    assert found.dtype == torch.int32
    assert found.tolist() == ids.tolist()


def test_tensors_in_tensors_out() -> None:
    ids = torch.tensor([[[1, 2], [1, 2], [3, -1]]], dtype=torch.int16)
    result = answer_consistency(ids, log_weights=torch.zeros(1, 3))
    assert isinstance(result.agreement, torch.Tensor)
    assert result.cluster.tolist() == [[0, 0, 1]]
    rows = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]], dtype=torch.bfloat16)
    assert answer_consistency(rows, metric="cosine").agreement.tolist() == [[[1, 1], [1, 1]]]


def test_empty_inputs() -> None:
    for answers in ([], [[]], [[], []], [[None]]):
        result = answer_consistency(answers)
        assert result.agreement.shape[0] == len(answers)
        assert (result.majority == -1).all()
        assert (result.semantic_entropy == 0).all()
    assert answer_consistency(np.zeros((0, 3, 4), np.int32)).agreement.shape == (0, 3, 3)
    assert answer_consistency(np.zeros((2, 0, 4), np.int32)).majority.tolist() == [-1, -1]
    assert answer_consistency([["", "", "x"]], metric="edit").cluster.tolist() == [[0, 0, 1]]
    nobody = answer_consistency(np.zeros((2, 0, 4), np.float32), metric="cosine")
    assert nobody.agreement.shape == (2, 0, 0)


def test_threads_give_the_same_bits() -> None:
    ids, _ = random_ids(np.random.default_rng(9), 300, 7, 20, 6)
    one, many = (answer_consistency(ids, metric="lcs", threads=t) for t in (1, 5))
    for field in ("agreement", "mean_agreement", "cluster", "semantic_entropy"):
        assert (getattr(one, field) == getattr(many, field)).all()


@pytest.mark.parametrize(
    ("answers", "options", "error", "message"),
    [
        ([["a"]], {"metric": "rouge"}, ValueError, "metric must be one of"),
        ([["a"]], {"threshold": 0}, ValueError, r"threshold must be in \(0, 1\], got 0"),
        ([["a"]], {"threads": 0}, ValueError, r"threads must be in \[1, 2147483647\], got 0"),
        (
            [["a"]],
            {"threads": 2**64},
            ValueError,
            "threads must be in .*, got 18446744073709551616",
        ),
        ([["a"]], {"threads": 1.5}, TypeError, "threads must be a whole number, got 1.5"),
        ([["a"]], {"threads": True}, TypeError, "threads must be a whole number, got True"),
        ([["a"]], {"clustering": "x"}, ValueError, "clustering must be one of"),
        ([["a"]], {"given": "b"}, ValueError, "given must be one string per question"),
        ([["a"]], {"given": ["b", "c"]}, ValueError, r"question \(1\), got 2$"),
        ([["a"]], {"given": 3}, ValueError, "given must be one string per question .* got int"),
        ([["a"], []], {"given": ["b", 3]}, TypeError, r"given\[1\] must be str or None, got int"),
        ([["a"]], {"log_weights": [[math.nan]]}, ValueError, "log_weights must be"),
        ([["a"]], {"log_weights": [[math.inf]]}, ValueError, "log_weights must be"),
        ([["a"]], {"log_weights": [0.0]}, ValueError, r"log_weights must be \[N, K\]"),
        ([["a"]], {"present": [[1]]}, ValueError, "present must be bool"),
        ([["a"]], {"cu_seqlens": [0]}, TypeError, "cu_seqlens and counts go with token ids"),
        (["a"], {}, TypeError, r"answers\[0\] must be a list of strings, got str"),
        ([["a", 3]], {}, TypeError, r"answers\[0\]\[1\] must be str or None, got int"),
        ([["a"] * 65], {}, ValueError, "answers must be at most 64 per question, got 65"),
        (np.zeros((1, 2)), {}, TypeError, "answers must be strings or integer token ids"),
        (np.zeros((1, 2), int), {}, ValueError, "must have 3 dimensions"),
        (np.array([[[-1, 4]]]), {}, ValueError, "negative ids only as padding"),
        (np.array([[[2**31]]]), {}, ValueError, "must hold ids within int32, got 2147483648"),
        (np.arange(3), {"cu_seqlens": [0, 2], "counts": 1}, ValueError, "cu_seqlens must rise"),
        (np.arange(3), {"cu_seqlens": [0, 3]}, TypeError, "counts .* must be given"),
        (np.arange(3), {"cu_seqlens": [0, 1, 3], "counts": [3]}, ValueError, "counts must be"),
        (np.arange(3), {"cu_seqlens": [0, 1, 3], "counts": 3}, ValueError, "counts must divide"),
        (
            np.arange(3),
            {"cu_seqlens": [0, 1.7, 3], "counts": 2},
            TypeError,
            "cu_seqlens must be integers, got float64",
        ),
        (
            np.arange(3),
            {"cu_seqlens": [0, 1, 3], "counts": [1.9, 0.1]},
            TypeError,
            "counts must be integers, got float64",
        ),
        (
            np.array([5, -1, 7]),
            {"cu_seqlens": [0, 1, 3], "counts": 2},
            ValueError,
            "answers must be ids >= 0 with cu_seqlens, got -1",
        ),
        (np.zeros((1, 1, 1), int), {"normaliser": str}, TypeError, "normaliser goes with strings"),
        (np.arange(3), {"counts": 3}, TypeError, "counts goes with cu_seqlens"),
        ([["a"]], {"metric": "cosine"}, TypeError, "answers must be floating embeddings"),
        (np.full((1, 1, 2), np.nan), {"metric": "cosine"}, ValueError, "answers must be finite"),
        *(
            (np.ones((1, 1, 2)), {"metric": "cosine", name: value}, TypeError, f"{name} must be No")
            for name, value in [("counts", 1), ("cu_seqlens", [0, 1]), ("normaliser", str)]
        ),
        (np.ones((1, 1, 2)), {"metric": "cosine", "given": np.ones((1, 3))}, ValueError, "given"),
    ],
)
def test_mistakes_are_named(
    answers: object, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        answer_consistency(answers, **options)


def test_native_module_refuses_answers_outside_the_tokens() -> None:
    with pytest.raises(ValueError, match="outside the tokens"):
        _core.consistency_pairwise(
            np.zeros(3, np.int32), np.array([[2]]), np.array([[2]]), "lcs", 1
        )
    with pytest.raises(ValueError, match="at most 64"):
        _core.consistency_summarise(
            np.zeros((1, 65, 65), np.float32), np.ones((1, 65), bool), None, 0.5, "components", 1
        )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e-45, 1e-30, 1e30, 1e200, 1e307])
def test_cosine_of_rows_however_long(scale: float, tensor: bool) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 4, 16))
    expected = answer_consistency(rows, metric="cosine", given=rows[:, 0])
    scaled = torch.from_numpy(rows * scale) if tensor else rows * scale
    found = answer_consistency(scaled, metric="cosine", given=rows[:, 0].astype(np.float32))
    np.testing.assert_allclose(found.agreement, expected.agreement, atol=1e-6)
    np.testing.assert_allclose(found.given_agreement, expected.given_agreement, atol=1e-6)


@pytest.mark.parametrize(
    ("hidden", "missing"), [("True", "Triton is not installed"), ("False", "there is no GPU")]
)
def test_triton_that_cannot_run_is_said(hidden: str, missing: str) -> None:
    code = (
        f"import sys, torch; sys.modules.update({{'triton': None}} if {hidden} else {{}})\n"
        "torch.cuda.is_available = lambda: False\n"
        "from robustft_kernels import answer_consistency\n"
        "try: answer_consistency([['a']], backend='triton')\n"
        "except ValueError as error: print(error)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    told = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    assert told.stdout == f"backend must be 'cpu' where {missing}, got 'triton'\n"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_other_processors_need_no_file_of_x86(tmp_path: Path) -> None:
    csrc, command = Path(__file__).parent.parent / "csrc", ["g++", "-std=c++20", "-pthread"]
    for name in ("answer_consistency.cpp", "isa/answer_consistency_portable.cpp"):
        copy = tmp_path / Path(name).name
        text = (csrc / name).read_text(encoding="utf-8")
        copy.write_text(text.replace("__x86_64__", "__other__"), encoding="utf-8")
        command.append(str(copy))
    program, main = tmp_path / "program", tmp_path / "main.cpp"
    main.write_text(
        '#include <cstdio>\n#include "answer_consistency.hpp"\n'
        "int main() { std::puts(robustft::consistency::instruction_set().c_str()); }",
        encoding="utf-8",
    )
    subprocess.run([*command, f"-I{csrc}", str(main), "-o", str(program)], check=True, timeout=120)
    done = subprocess.run([program], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "portable\n"


def test_threads_take_no_memory_where_there_is_nothing_for_them_to_do() -> None:
    code = (
        "import resource; from robustft_kernels import answer_consistency as call;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "call([['a', 'b']]); before = peak();"
        "call([['a', 'b']], threads=1_000_000); print((peak() - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 50  # MiB


def test_strings_need_neither_triton_nor_a_gpu() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from robustft_kernels import answer_consistency\n"
        "assert answer_consistency([['a', 'b']]).majority.tolist() == [0]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ctrl_c_stops_within_a_question_of_long_answers() -> None:
    code = """
        import _thread, threading
        import numpy as np
        from robustft_kernels import answer_consistency
        ids = np.zeros((1, 2, 3_000_000), np.int32)  # as they are, minutes
        threading.Timer(0.3, _thread.interrupt_main).start()
        try:
            answer_consistency(ids, metric="edit", threads=2)
        except KeyboardInterrupt:
            print("stopped")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "stopped\n"
