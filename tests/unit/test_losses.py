"""Losses against numbers computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from reftune.algorithms.base import masked_mean, policy_metrics, ppo_policy_terms, token_weights
from reftune.algorithms.ppo import value_terms

MASK = torch.tensor([[True, False, False], [True, True, True]])


def ratios(*values: float) -> torch.Tensor:
    """Log-probabilities with the given ratios to old log-probabilities of 0."""
    return torch.tensor([values]).log()


def test_sequence_weights_share_between_responses_then_tokens():
    assert_close(
        token_weights(MASK, "sequence"), torch.tensor([[1 / 2, 0, 0], [1 / 6, 1 / 6, 1 / 6]])
    )


def test_token_weights_share_between_all_tokens():
    assert_close(token_weights(MASK, "token"), torch.tensor([[1 / 4, 0, 0], [1 / 4, 1 / 4, 1 / 4]]))


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_weights_sum_to_one_and_are_zero_outside_the_response(reduction):
    mask = torch.arange(9) < torch.tensor([3, 9, 1, 5])[:, None]
    weights = token_weights(mask, reduction)
    assert float(weights.sum()) == pytest.approx(1)
    assert not weights[~mask].any()


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_weights_of_nothing_are_zero(reduction):
    assert token_weights(torch.zeros(2, 3, dtype=torch.bool), reduction).tolist() == [[0] * 3] * 2


def test_masked_mean_divides_by_the_true_entries():
    assert (
        float(
            masked_mean(
                torch.tensor([[4.0, 99.0], [1.0, 1.0]]), torch.tensor([[True, False], [True, True]])
            )
        )
        == 2
    )
    assert float(masked_mean(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool))) == 0


def test_policy_terms_are_clipped_where_the_step_would_go_too_far():
    # A > 0: the gain stops at ratio 1 + ε; A < 0: it stops at 1 - ε; in the other direction it
    # continues
    terms = ppo_policy_terms(
        ratios(2.0, 0.25, 2.0, 0.25),
        torch.zeros(1, 4),
        torch.tensor([[1.0, 1, -1, -1]]),
        clip_low=0.2,
        clip_high=0.3,
    )
    assert_close(terms, torch.tensor([[-1.3, -0.25, 2.0, 0.8]]))


def test_a_clipped_token_has_no_gradient_and_others_have_that_of_the_ratio():
    logprobs = ratios(2.0, 1.1).requires_grad_()
    ppo_policy_terms(
        logprobs, torch.zeros(1, 2), torch.tensor([[1.0, 1.0]]), clip_low=0.2, clip_high=0.2
    ).sum().backward()
    assert logprobs.grad is not None
    assert_close(logprobs.grad, torch.tensor([[0.0, -1.1]]))  # d(-A e^x)/dx = -A ρ


def test_a_token_that_became_impossible_does_not_overflow():
    terms = ppo_policy_terms(
        torch.tensor([[500.0, -500.0]]),
        torch.zeros(1, 2),
        torch.tensor([[-1.0, -1.0]]),
        clip_low=0.2,
        clip_high=0.2,
    )
    assert torch.isfinite(terms).all()
    assert float(terms[0, 0]) == pytest.approx(math.exp(20), rel=1e-5)


def test_value_terms_take_the_worse_of_the_clipped_and_the_free_error():
    # V_old = 0, ε = .2: V = .1 is inside (½·.9² = .405); V = .5 clipped to .2: ½·max(.5², .8²) =
    # .32; V = .5, G = 0: ½·max(.5², .2²) = .125
    terms = value_terms(
        torch.tensor([0.1, 0.5, 0.5]), torch.zeros(3), torch.tensor([1.0, 1.0, 0.0]), clip=0.2
    )
    assert_close(terms, torch.tensor([0.405, 0.32, 0.125]))


def test_a_policy_that_has_not_moved_shows_no_movement():
    logprobs = torch.randn(2, 3)
    metrics = policy_metrics(
        logprobs, logprobs, clip_low=0.2, clip_high=0.2, weights=token_weights(MASK, "token")
    )
    assert {name: float(value) for name, value in metrics.items()} == {
        "policy/approx_kl": 0.0,
        "policy/clip_fraction": 0.0,
        "policy/ratio_max": 1.0,
    }


def test_policy_metrics_match_hand_computation():
    # ratios 1.5 (weight ½, clipped), 1 (½), and 9 outside the response; approx. KL = ½(1.5 - 1 - ln
    # 1.5) = .0473
    weights = torch.tensor([[0.5, 0.5, 0.0]])
    metrics = policy_metrics(
        ratios(1.5, 1.0, 9.0), torch.zeros(1, 3), clip_low=0.2, clip_high=0.2, weights=weights
    )
    assert float(metrics["policy/approx_kl"]) == pytest.approx(
        0.5 * (0.5 - math.log(1.5)), abs=1e-6
    )
    assert float(metrics["policy/clip_fraction"]) == 0.5
    assert float(metrics["policy/ratio_max"]) == pytest.approx(1.5)


def test_metrics_carry_no_gradient():
    logprobs = torch.zeros(1, 2, requires_grad=True)
    metrics = policy_metrics(
        logprobs, torch.zeros(1, 2), clip_low=0.2, clip_high=0.2, weights=torch.full((1, 2), 0.5)
    )
    assert not any(value.requires_grad for value in metrics.values())
