"""The value head's closed-form fit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from reftune.model.value_head import PENALTIES, fit_value_head


def linear_rollouts(
    count: int, *, noise: float, size: int = 200, features: int = 6
) -> list[tuple[Tensor, Tensor]]:
    """Returns that are 2 + w · x + noise with w = (1, -2, 0, 0, 0, 3)."""
    torch.manual_seed(0)
    weight = torch.tensor([1.0, -2.0, 0.0, 0.0, 0.0, 3.0])[:features]
    x = [torch.randn(size, features) * 2 + 1 for _ in range(count)]
    return [(rows, 2 + rows @ weight + noise * torch.randn(size)) for rows in x]


def test_a_linear_value_is_found():
    head = nn.Linear(6, 1)
    explained = fit_value_head(head, linear_rollouts(3, noise=0.0))
    assert explained == pytest.approx(1, abs=1e-4)
    assert_close(head.weight[0], torch.tensor([1.0, -2.0, 0.0, 0.0, 0.0, 3.0]), atol=5e-3, rtol=0)
    assert float(head.bias) == pytest.approx(2, abs=0.01)


def test_the_fit_is_the_ridge_solution_of_all_rollouts_at_once():
    rollouts = linear_rollouts(3, noise=4.0, size=20)
    head = nn.Linear(6, 1)
    fit_value_head(head, iter(rollouts))
    x, y = (torch.cat(parts).double() for parts in zip(*rollouts, strict=True))
    centred = x - x.mean(0)
    solutions = []
    for penalty in PENALTIES:
        # α in units of the features' mean variance times the number of tokens = mean of diag(Xᵀ X)
        alpha = penalty * (centred**2).sum(0).mean()
        solutions.append(
            torch.linalg.solve(
                centred.T @ centred + alpha * torch.eye(6), centred.T @ (y - y.mean())
            )
        )
    found = head.weight[0].double()
    closest = min(solutions, key=lambda w: float((w - found).abs().max()))
    assert_close(found, closest, atol=1e-6, rtol=1e-5)
    assert float(head.bias) == pytest.approx(float(y.mean() - closest @ x.mean(0)), abs=1e-5)


def test_pure_noise_is_shrunk_with_the_strongest_penalty_and_explains_nothing():
    torch.manual_seed(1)
    rollouts = [(torch.randn(8, 6), torch.randn(8)) for _ in range(2)]
    head = nn.Linear(6, 1)
    explained = fit_value_head(head, rollouts)
    x, y = (torch.cat(parts) for parts in zip(*rollouts, strict=True))
    unpenalised = torch.linalg.lstsq(x - x.mean(0), (y - y.mean())[:, None]).solution
    assert float(head.weight.norm()) < 0.75 * float(unpenalised.norm())
    assert explained < 0.3


def test_equal_returns_give_a_head_that_predicts_them():
    head = nn.Linear(4, 1)
    torch.manual_seed(2)
    fit_value_head(head, [(torch.randn(9, 4), torch.full((9,), 0.25)) for _ in range(2)])
    assert_close(head.weight, torch.zeros(1, 4), atol=1e-6, rtol=0)
    assert float(head.bias) == pytest.approx(0.25)


def test_one_rollout_is_fitted_but_explains_nothing_it_has_not_seen():
    head = nn.Linear(6, 1)
    assert math.isnan(fit_value_head(head, linear_rollouts(1, noise=0.0)))
    assert_close(head.weight[0], torch.tensor([1.0, -2.0, 0.0, 0.0, 0.0, 3.0]), atol=0.1, rtol=0)


def test_features_that_never_vary_do_no_harm():
    head = nn.Linear(3, 1)
    fit_value_head(head, [(torch.ones(5, 3), torch.arange(5.0)) for _ in range(2)])
    assert torch.isfinite(head.weight).all()
    assert float(head(torch.ones(1, 3))) == pytest.approx(2, abs=1e-4)  # the mean of 0 … 4


def test_without_any_rollout_the_head_stays_as_it_is():
    # a reward function may return None for every sample of the pre-fit
    head = nn.Linear(3, 1)
    before = head.weight.clone()
    assert math.isnan(fit_value_head(head, []))
    assert torch.equal(head.weight, before)


def test_the_rollouts_of_the_prefit_count_towards_the_cost(trainer):
    trainer.prefit()
    sampled = [trainer.sample(n, "prefit")[1]["compute/sampled_tokens"] for n in (1, 2)]
    assert trainer.loop.state.totals == {"compute/sampled_tokens": sum(sampled)}


def test_a_last_rollout_of_equal_returns_has_no_explained_variance():
    head = nn.Linear(6, 1)
    features, returns = linear_rollouts(2, noise=1.0)
    last = (returns[0], torch.full((200,), 0.25))
    assert math.isnan(fit_value_head(head, [features, last]))


def test_the_note_states_no_explained_variance_if_there_is_none(trainer, monkeypatch):
    notes = []
    monkeypatch.setattr(trainer.context.progress, "note", notes.append)
    monkeypatch.setattr("reftune.stages.rl.fit_value_head", lambda *_: math.nan)
    trainer.prefit()
    monkeypatch.setattr("reftune.stages.rl.fit_value_head", lambda *_: 0.5)
    trainer.prefit()
    assert ["explains" in note for note in notes] == [False, True]
    assert "it explains 50%" in notes[1]
