"""benchmarks/critic.py: what a perfect critic explains is the variance of the true values, without
the noise of their estimates."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks import critic
from benchmarks.critic import SAMPLES, SHARES, explained, fitted, measure

from crash import run_all


@pytest.mark.parametrize(
    ("low", "high", "perfect"),
    [
        (0.5, 0.5, 0.0),  # every question is a coin toss
        (0.0, 1.0, 1.0),  # every question is decided
        (0.25, 0.75, 0.25),  # variance of the values 1/16, of the rewards 1/4
    ],
)
def test_a_perfect_critic_explains_the_variance_of_the_true_values(low, high, perfect):
    rng = np.random.default_rng(0)
    values = np.where(np.arange(40_000) % 2, high, low)[None]
    estimates = rng.binomial(SAMPLES, values) / SAMPLES
    rewards = rng.binomial(1, values[0]).astype(float)
    found = explained(estimates, values, np.full_like(values, 0.5), rewards)
    assert found["perfect"] == pytest.approx([perfect], abs=0.02)
    assert found["head"] == pytest.approx([perfect], abs=0.02)
    assert found["linear"] == pytest.approx([0.0], abs=0.02)


def test_the_linear_fit_is_judged_on_questions_that_it_has_not_seen():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2, 400, 8))
    seen = inputs @ rng.normal(size=8)
    assert np.corrcoef(fitted(inputs, seen).ravel(), seen.ravel())[0, 1] > 0.99
    noise = rng.normal(size=(2, 400))
    assert np.corrcoef(fitted(inputs, noise).ravel(), noise.ravel())[0, 1] < 0.1


def test_a_run_has_one_number_per_share(make_recipe, monkeypatch):
    monkeypatch.setattr(critic, "QUESTIONS", 4)
    monkeypatch.setattr(critic, "SAMPLES", 2)
    recipe = make_recipe(evaluate={"samples": 0, "stages": ["reft"]})
    run_all(recipe)
    row = measure(recipe.folder, "reft")
    assert {key: len(numbers) for key, numbers in row.items()} == dict.fromkeys(row, len(SHARES))
