"""Tokens drawn block by block equal those of the inverse cumulative distribution."""

import math

import pytest
import torch
from torch import Tensor

from reftune.engines.kv import draw_tokens
from reftune.types import SamplingParams


def cumulative(logits: Tensor) -> Tensor:
    return logits.double().softmax(1).cumsum(1)


@pytest.mark.parametrize("vocabulary", [3, 256, 1000])
def test_a_token_is_where_the_running_probability_passes_its_number(vocabulary):
    draw = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(2000, vocabulary, generator=draw)
    uniforms = torch.rand(2000, generator=draw, dtype=torch.float64)
    tokens, logprobs, entropies = draw_tokens(logits, uniforms, SamplingParams(max_new_tokens=1))
    above = cumulative(logits).gather(1, tokens[:, None]).squeeze(1)
    below = above - logits.double().softmax(1).gather(1, tokens[:, None]).squeeze(1)
    assert (below - 1e-6 <= uniforms).all() and (uniforms <= above + 1e-6).all()
    expected = logits.log_softmax(1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropies, expected, atol=1e-5, rtol=0)


def test_the_entropy_is_of_the_tokens_that_can_be_drawn():
    # top-k leaves two equal ones: ln 2
    logits = torch.tensor([[3.0, 3.0, 1.0, -torch.inf]])
    drawn = draw_tokens(logits, torch.zeros(1).double(), SamplingParams(max_new_tokens=1, top_k=2))
    assert drawn.entropies.tolist() == pytest.approx([math.log(2)])


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_no_number_draws_an_impossible_token(uniform):
    logits = torch.full((3, 1000), -torch.inf)
    for row, possible in enumerate((0, 500, 999)):
        logits[row, possible] = 2.0
    tokens, logprobs, entropies = draw_tokens(
        logits, torch.full((3,), uniform, dtype=torch.float64), SamplingParams(max_new_tokens=1)
    )
    assert tokens.tolist() == [0, 500, 999]
    assert logprobs.tolist() == entropies.tolist() == [0, 0, 0]


def test_rounding_at_the_end_of_the_distribution_draws_no_impossible_token():
    logits = torch.full((2000, 1000), -torch.inf)
    logits[:, :300] = torch.randn(2000, 300, generator=torch.Generator().manual_seed(0))
    nearly_one = torch.full((2000,), 1 - 2**-53, dtype=torch.float64)
    tokens, *_ = draw_tokens(logits, nearly_one, SamplingParams(max_new_tokens=1))
    assert int(tokens.max()) < 300
