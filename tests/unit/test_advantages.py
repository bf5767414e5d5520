"""Advantages against numbers computed by hand, the definition, and identities."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from reftune.algorithms.base import (
    explained_variance,
    gae,
    group_means,
    group_sizes,
    token_rewards,
    whiten,
)


def test_gae_matches_hand_computation():
    # the last token earns 1; V = .5 everywhere; γ = 1, λ = .5
    # δ = [0, 0, 1 - .5] = [0, 0, .5], so A_2 = .5, A_1 = .5·.5 = .25, A_0 = .125; G = A + .5
    advantages, returns = gae(
        torch.tensor([[0, 0, 1.0]]),
        torch.full((1, 3), 0.5),
        torch.ones(1, 3, dtype=torch.bool),
        lam=0.5,
    )
    assert_close(advantages, torch.tensor([[0.125, 0.25, 0.5]]))
    assert_close(returns, torch.tensor([[0.625, 0.75, 1.0]]))


def test_gae_with_discount_matches_hand_computation():
    # γ = .5, λ = 1: δ_1 = 1 - .4 = .6; δ_0 = .2 + .5·.4 - .6 = -.2; A_0 = -.2 + .5·.6 = .1; G_0 =
    # .7 = .2 + .5·1
    advantages, returns = gae(
        torch.tensor([[0.2, 1.0]]),
        torch.tensor([[0.6, 0.4]]),
        torch.ones(1, 2, dtype=torch.bool),
        gamma=0.5,
        lam=1.0,
    )
    assert_close(advantages, torch.tensor([[0.1, 0.6]]))
    assert_close(returns, torch.tensor([[0.7, 1.0]]))


def test_gae_is_the_discounted_sum_of_its_definition():
    # A_t = Σ_l (γλ)^l δ_{t+l}, response by response
    torch.manual_seed(0)
    lengths, gamma, lam = [5, 1, 3], 0.9, 0.8
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    rewards, values = torch.randn(3, 5) * mask, torch.randn(3, 5)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(lengths):
        v = [*values[row, :length].tolist(), 0.0]
        deltas = [float(rewards[row, t]) + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
            assert float(advantages[row, t]) == pytest.approx(expected, abs=1e-6)
            assert float(returns[row, t]) == pytest.approx(expected + v[t], abs=1e-6)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_without_discount_every_return_is_the_reward_to_come():
    # λ = γ = 1 telescopes: A_t = Σ r - V_t, whatever the values are
    torch.manual_seed(1)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    rewards, values = torch.randn(2, 4) * mask, torch.randn(2, 4)
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_come = rewards.flip(1).cumsum(1).flip(1) * mask
    assert_close(returns, to_come)


def test_lambda_zero_is_the_one_step_error():
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, _ = gae(
        torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.2, 0.7]]), mask, lam=0.0
    )
    assert_close(advantages, torch.tensor([[0.2 - 0.5, 0.7 - 0.2, 1 - 0.7]]))


def test_what_follows_a_response_does_not_matter():
    mask = torch.tensor([[True, True, False]])
    rewards = torch.tensor([[0.0, 1.0, 0.0]])
    with_junk = gae(rewards + torch.tensor([[0, 0, 9.0]]), torch.tensor([[0.5, 0.5, 99.0]]), mask)
    alone = gae(rewards[:, :2], torch.tensor([[0.5, 0.5]]), mask[:, :2])
    for long, short in zip(with_junk, alone, strict=True):
        assert_close(long[:, :2], short)
        assert float(long[0, 2]) == 0


def test_the_reward_falls_on_the_last_token_and_kl_on_each():
    # β = .1; log ratios .5 and -1 in row 0 (two tokens), 2 in row 1 (one token, junk behind it)
    mask = torch.tensor([[True, True], [True, False]])
    logprobs, reference = (
        torch.tensor([[-1.0, -3.0], [-1.0, 9.0]]),
        torch.tensor([[-1.5, -2.0], [-3.0, 5.0]]),
    )
    found = token_rewards(torch.tensor([1.0, 0.1]), logprobs, reference, mask, kl_coef=0.1)
    assert_close(found, torch.tensor([[-0.05, 1.1], [-0.2 + 0.1, 0.0]]))


def test_without_a_reference_only_the_task_is_rewarded():
    mask = torch.tensor([[True, True, False]])
    found = token_rewards(torch.tensor([0.7]), torch.full((1, 3), -2.0), None, mask, kl_coef=5.0)
    assert_close(found, torch.tensor([[0.0, 0.7, 0.0]]))


def test_a_response_without_tokens_earns_nothing():
    mask = torch.tensor([[False, False], [True, True]])
    found = token_rewards(torch.tensor([5.0, 1.0]), torch.zeros(2, 2), None, mask, kl_coef=0.0)
    assert found.tolist() == [[0, 0], [0, 1]]


def test_whitened_entries_have_zero_mean_and_unit_variance():
    torch.manual_seed(2)
    values = torch.randn(4, 6) * 3 + 5
    mask = torch.rand(4, 6) < 0.7
    white = whiten(values, mask)
    assert float(white[mask].mean()) == pytest.approx(0, abs=1e-6)
    assert float(white[mask].var()) == pytest.approx(1, abs=1e-5)
    assert not white[~mask].any()


def test_whitening_survives_what_cannot_be_whitened():
    one = torch.tensor([[True, False]])
    assert whiten(torch.tensor([[3.0, 8.0]]), one).tolist() == [[0, 0]]
    assert (
        whiten(torch.full((2, 3), 0.5), torch.ones(2, 3, dtype=torch.bool)).tolist()
        == [[0] * 3] * 2
    )
    assert whiten(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool)).tolist() == [[0, 0]]


def test_group_means_and_sizes():
    groups = torch.tensor([2, 0, 2, 1])
    # group 0: .5; group 1: 1; group 2: (0 + .4)/2 = .2
    assert_close(
        group_means(torch.tensor([0.0, 0.5, 0.4, 1.0]), groups), torch.tensor([0.2, 0.5, 0.2, 1.0])
    )
    assert group_sizes(groups).tolist() == [2, 1, 2, 1]


def test_explained_variance_is_one_for_the_truth_zero_for_a_constant_and_negative_for_worse():
    returns, mask = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[True, True, False]])
    assert float(explained_variance(returns, returns, mask)) == 1
    assert float(explained_variance(torch.full((1, 3), 0.3), returns, mask)) == 0
    assert float(explained_variance(returns + 7, returns, mask)) == 1  # a shift is no variance
    assert math.isnan(explained_variance(returns, torch.full((1, 3), 0.3), mask))
    # errors 0 - 1 and 1 - 0: variance 1 against ¼
    assert float(explained_variance(torch.tensor([[1.0, 0.0, 0.0]]), returns, mask)) == -3


def test_explained_variance_of_a_single_token_is_not_a_number():
    mask = torch.tensor([[True]])
    assert math.isnan(explained_variance(torch.tensor([[0.2]]), torch.tensor([[0.7]]), mask))
