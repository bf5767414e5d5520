"""Truncated importance sampling, for an engine that differs slightly from the policy."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from reftune.algorithms.base import truncated_importance
from reftune.algorithms.online_st import OnlineSt
from reftune.errors import RecipeError
from reftune.recipe import known_kinds
from reftune.stages.rl import correct_mismatch

WITH_ADVANTAGES = ", ".join(kind for kind in known_kinds("algorithms") if kind != "online_st")


def test_a_weight_is_the_ratio_of_probabilities_up_to_the_cap():
    # .3/.2 = 1.5, .1/.4 = .25, .8/.1 = 8 → 2; the last token was not sampled
    train, sample = (
        torch.tensor([[0.3, 0.1, 0.8, 0.9]]).log(),
        torch.tensor([[0.2, 0.4, 0.1, 0.1]]).log(),
    )
    mask = torch.tensor([[True, True, True, False]])
    assert_close(
        truncated_importance(train, sample, mask, cap=2.0), torch.tensor([[1.5, 0.25, 2.0, 1.0]])
    )


def test_a_sampler_that_reports_more_than_float_can_hold_is_capped():
    train, sample = torch.tensor([[-1.0]]), torch.tensor([[-1000.0]])
    assert truncated_importance(train, sample, torch.tensor([[True]]), cap=3.0).tolist() == [[3.0]]


def scored_batch(trainer):
    solutions, _ = trainer.sample(1, "rollout")
    batch, _ = trainer.score(solutions)
    return trainer.algorithm.credit(batch)


def test_a_token_twice_as_likely_to_the_trainer_counts_twice_in_the_policy_loss_alone(trainer):
    batch = scored_batch(trainer)
    halved = replace(batch, sampling_logprobs=batch.logprobs - torch.tensor(2.0).log())
    weighed, metrics = correct_mismatch(halved, 3.0)
    mask = batch.response_mask
    assert_close(weighed.advantages[mask], 2 * batch.advantages[mask])
    assert metrics["mismatch/weight"] == pytest.approx(2) and metrics["mismatch/capped"] == 0
    assert weighed.returns is batch.returns
    weights = trainer.algorithm.weights(batch)
    scores = trainer.policy(batch.tokens)
    plain, double = (
        trainer.algorithm.loss(scores, replace(b, weights=weights)).metrics
        for b in (batch, weighed)
    )
    assert float(double["policy/loss"]) == pytest.approx(2 * float(plain["policy/loss"]), rel=1e-4)
    assert double["value/loss"] == plain["value/loss"]


def test_gold_rationales_keep_their_weight(trainer):
    batch = scored_batch(trainer)
    gold = torch.zeros(len(batch), dtype=torch.bool).index_fill(0, torch.tensor([0]), True)
    weighed, metrics = correct_mismatch(
        replace(batch, gold=gold, sampling_logprobs=batch.logprobs - 5), 2.0
    )
    assert_close(weighed.advantages[0], batch.advantages[0])
    assert_close(weighed.advantages[1:], 2 * batch.advantages[1:])
    assert metrics["mismatch/capped"] == 1


def test_without_a_cap_nothing_changes(trainer):
    batch = scored_batch(trainer)
    assert correct_mismatch(batch, None) == (batch, {})


def test_a_step_logs_what_the_correction_did(make_trainer):
    metrics = make_trainer({"mismatch_cap": 2.0}).step(1)
    assert (
        metrics["mismatch/weight"] == pytest.approx(1, abs=1e-4) and metrics["mismatch/capped"] == 0
    )
    assert metrics["kl/mismatch"] < 1e-4


def test_the_engines_own_scores_spare_the_policy_a_pass(trainer, monkeypatch):
    trainer.policy.reset_value_head(0)
    solutions, _ = trainer.sample(1, "rollout")
    bare = [
        replace(s, completion=replace(s.completion, values=(), entropies=())) for s in solutions
    ]
    passes = []
    monkeypatch.setattr(
        trainer.policy, "score", lambda *args, **kw: passes.append(1) or score(*args, **kw)
    )
    score = type(trainer.policy).score.__get__(trainer.policy)
    batch, metrics = trainer.score(solutions)
    assert not passes and "kl/mismatch" not in metrics
    # one completion without values: all are scored again
    expected, measured = trainer.score([*solutions[:-1], bare[-1]])
    assert passes == [1] and measured["kl/mismatch"] < 1e-5
    for name in ("logprobs", "values", "ref_logprobs"):
        assert_close(getattr(batch, name), getattr(expected, name), atol=1e-5, rtol=0)
    assert metrics["policy/entropy"] == pytest.approx(measured["policy/entropy"], abs=1e-5)


def test_a_recipe_with_the_cap_and_an_algorithm_without_advantages_is_refused(make_recipe):
    told = rf"expected an algorithm with advantages \({WITH_ADVANTAGES}\), got online_st$"
    with pytest.raises(RecipeError, match=f"mismatch_cap: {told}"):
        make_recipe(stages={"reft": {"mismatch_cap": 2.0, "algorithm": {"kind": "online_st"}}})


def test_an_own_algorithm_without_advantages_refuses_the_cap(trainer):
    rollouts, _ = trainer.sample(1, "rollout")
    batch, _ = trainer.score(rollouts)
    told = rf"^mismatch_cap: expected an algorithm with advantages \({WITH_ADVANTAGES}\); `credit`"
    with pytest.raises(RecipeError, match=told):
        correct_mismatch(batch, 2.0)


def test_a_new_algorithm_with_advantages_is_named(trainer, monkeypatch):
    monkeypatch.setattr(OnlineSt, "sets_advantages", True)
    rollouts, _ = trainer.sample(1, "rollout")
    batch, _ = trainer.score(rollouts)
    with pytest.raises(RecipeError, match=r"\(.*online_st, ppo, "):
        correct_mismatch(batch, 2.0)
