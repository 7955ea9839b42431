"""The recorder gathers during generation what teacher forcing gives afterwards."""

from __future__ import annotations

import pytest
import torch

from robustft_kernels import TokenStatsLogitsProcessor, token_stats

pytestmark = pytest.mark.filterwarnings("error")


def test_recorder_matches_teacher_forcing() -> None:
    torch.manual_seed(0)
    steps = torch.randn(4, 2, 50)
    recorder = TokenStatsLogitsProcessor(temperature=0.8)
    for _ in range(2):  # a recorder can be used again
        ids = torch.zeros(2, 3, dtype=torch.long)
        for scores in steps:
            assert recorder(ids, scores) is scores
            ids = torch.cat([ids, torch.multinomial(scores.softmax(-1), 1)], 1)
        nll, entropy = recorder.finish(ids)
        expected = token_stats(steps.transpose(0, 1), ids[:, 3:], temperature=0.8)
        assert torch.equal(nll, -expected.logprob)
        assert torch.equal(entropy, expected.entropy)


def test_a_later_processor_may_write_into_the_scores() -> None:
    torch.manual_seed(0)
    steps, ids = torch.randn(3, 2, 50), torch.zeros(2, 3, dtype=torch.long)
    recorder = TokenStatsLogitsProcessor()
    for scores in steps.clone():
        recorder(ids, scores)[:, 1:] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    nll, _ = recorder.finish(ids)
    assert torch.equal(nll, -token_stats(steps.transpose(0, 1), ids[:, 3:]).logprob)


@pytest.mark.parametrize("prompt", [3, 5, 9])
def test_an_interrupted_generation_is_forgotten(prompt: int) -> None:
    recorder = TokenStatsLogitsProcessor()
    for length in (3, 4):
        recorder(torch.zeros(1, length, dtype=torch.long), torch.randn(1, 10))
    ids, steps = torch.ones(1, prompt, dtype=torch.long), torch.randn(2, 1, 10)
    if prompt == 5:  # as long as the next step would be, with other tokens in it
        with pytest.raises(ValueError, match="a new recorder after an interrupted generation"):
            recorder(ids, steps[0])
        return
    for scores in steps:
        recorder(ids, scores)
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    nll, _ = recorder.finish(ids)
    expected = token_stats(steps.transpose(0, 1), ids[:, prompt:])
    assert torch.equal(nll, -expected.logprob)


def test_nothing_generated() -> None:
    nll, entropy = TokenStatsLogitsProcessor().finish(torch.zeros(2, 3, dtype=torch.long))
    assert nll.shape == entropy.shape == (2, 0)


def test_beams_are_refused() -> None:
    recorder = TokenStatsLogitsProcessor()
    recorder(torch.zeros(2, 3, dtype=torch.long), torch.randn(2, 5))
    with pytest.raises(ValueError, match="no beam search"):
        recorder(torch.zeros(4, 4, dtype=torch.long), torch.randn(4, 5))
    with pytest.raises(ValueError, match="no beam search"):
        recorder.finish(torch.ones(2, 4, dtype=torch.long))


def test_a_wrong_temperature_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="temperature must be in"):
        TokenStatsLogitsProcessor(temperature=0)
    with pytest.raises(TypeError, match="temperature must be a number, got str"):
        TokenStatsLogitsProcessor(temperature="1")  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [4, 6])
def test_several_tokens_a_step_are_refused(length: int) -> None:
    """Assisted generation goes on behind what it tried, or before it."""
    recorder = TokenStatsLogitsProcessor()
    ids = torch.zeros(1, 9, dtype=torch.long)
    for step in (3, 4):
        recorder(ids[:, :step], torch.randn(1, 5))
    with pytest.raises(ValueError, match="no assisted generation"):
        recorder(ids[:, :length], torch.randn(1, 5))


def test_the_same_prompt_again_forgets_an_interrupted_generation() -> None:
    recorder = TokenStatsLogitsProcessor()
    ids = torch.zeros(1, 4, dtype=torch.long)
    for step in (3, 4, 3):
        recorder(ids[:, :step], torch.randn(1, 5))
    assert recorder.finish(ids)[0].shape == (1, 1)
