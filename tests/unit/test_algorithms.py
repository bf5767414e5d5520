"""Algorithms against numbers computed by hand: their selection, credit and loss."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from reftune.algorithms.grpo import Grpo, group_stds, kl_terms
from reftune.algorithms.online_st import OnlineSt
from reftune.algorithms.ppo import Ppo
from reftune.algorithms.rloo import Rloo, leave_one_out
from reftune.model.batch import RolloutBatch, token_batch
from reftune.model.encoder import Encoder
from reftune.model.policy import TokenScores
from reftune.recipe.kinds import load_component
from reftune.stages.rl import Rl, rollout_batch, worth_showing
from reftune.types import Answer, Completion, Graded, Problem, Solution, Verdict


def batch(
    rewards: list[float], groups: list[int], *, lengths: list[int] | None = None
) -> RolloutBatch:
    """Samples with one-token prompts; both sampling policy and reference gave every token
    log-probability -1."""
    tokens = token_batch(
        [[5]] * len(rewards), [[6] * length for length in lengths or [1] * len(rewards)]
    )
    logprobs = -tokens.response_mask.float()
    return RolloutBatch(
        tokens=tokens,
        rewards=torch.tensor(rewards),
        groups=torch.tensor(groups),
        gold=torch.zeros(len(tokens), dtype=torch.bool),
        sampling_logprobs=logprobs,
        logprobs=logprobs,
    )


def advantages(found: RolloutBatch) -> list[float]:
    assert found.advantages is not None
    return found.advantages[:, 0].tolist()


def loss_of(
    algorithm: Grpo | Rloo | Ppo | OnlineSt,
    whole: RolloutBatch,
    logprobs: Tensor,
    rows: list[int] | None = None,
) -> float:
    """The loss of all samples, or those at `rows`, if the policy now gives the tokens `logprobs`
    and values of 0."""
    whole = replace(whole, weights=algorithm.weights(whole))
    index = torch.arange(len(whole)) if rows is None else torch.tensor(rows)
    part = whole.rows(index)
    now = logprobs[index, : part.response_mask.shape[1]]
    return float(
        algorithm.loss(TokenScores(logprobs=now, values=torch.zeros_like(now)), part).total
    )


# --- group statistics -----------------------------------------------------------------------------


def test_group_deviations_are_unbiased_and_zero_for_one_sample():
    # group 0: 0, 1, 1, 0: mean ½, squares 4 · ¼, over 3; group 1: one sample
    found = group_stds(torch.tensor([0.0, 1.0, 7.0, 1.0, 0.0]), torch.tensor([0, 0, 1, 0, 0]))
    expected = math.sqrt(1 / 3)
    assert_close(found, torch.tensor([expected, expected, 0.0, expected, expected]))


def test_leaving_one_out_compares_with_the_others_of_the_group():
    # group 0: 1 - (0 + .5)/2 = .75, 0 - (1 + .5)/2 = -.75, .5 - (1 + 0)/2 = 0; group 1: 1 - 0, 0 -
    # 1; group 2: nobody else
    found = leave_one_out(
        torch.tensor([1.0, 1.0, 0.0, 0.0, 0.5, 9.0]), torch.tensor([0, 1, 0, 1, 0, 2])
    )
    assert_close(found, torch.tensor([0.75, 1.0, -0.75, -1.0, 0.0, 0.0]))


def test_the_kl_estimate_is_zero_where_the_policies_agree_and_positive_elsewhere():
    # k3 = e^d - d - 1 with d = log π_ref - log π: d = ln 2 → 2 - ln 2 - 1; d = -ln 2 → ½ + ln 2 - 1
    found = kl_terms(
        torch.tensor([-1.0, -1.0 - math.log(2), -1.0]),
        torch.tensor([-1.0, -1.0, -1.0 - math.log(2)]),
    )
    assert_close(found, torch.tensor([0.0, 1 - math.log(2), math.log(2) - 0.5]))
    assert math.isfinite(float(kl_terms(torch.tensor(-1e4), torch.tensor(0.0))))


@pytest.mark.parametrize(("reward", "size"), [(70.3, 6), (1000.1, 16), (-1e7 / 3, 7), (0.1, 10)])
def test_equal_rewards_give_no_advantage_at_any_scale(reward, size):
    # two groups in turn, the second with one reward that differs
    equal = batch([reward, 2.0] * size + [5.0], [0, 1] * size + [1])
    for algorithm in (Grpo(), Grpo(scale="none"), Rloo(kl_coef=0)):
        found = advantages(algorithm.credit(equal))
        assert found[::2][:-1] == [0] * size and found[-1] > 0


def test_close_rewards_of_a_large_scale_keep_their_deviations():
    # fp32 has no 2^24 + 1, their mean; the deviations are ±1, and with one left out ±2
    rewards, groups = torch.tensor([2.0**24, 2.0**24 + 2]), torch.tensor([0, 0])
    found = advantages(Grpo(scale="none").credit(batch(rewards.tolist(), [0, 0])))
    assert found == [-1, 1]
    assert leave_one_out(rewards, groups).tolist() == [-2, 2]
    assert_close(group_stds(rewards, groups), torch.full((2,), math.sqrt(2)))


# --- GRPO -----------------------------------------------------------------------------------------


def test_grpo_measures_each_sample_by_its_group():
    # group 0: 1, 0 with mean ½ and deviation √½; group 1: .1, .1 has no contrast
    found = advantages(Grpo().credit(batch([1.0, 0.1, 0.0, 0.1], [0, 1, 0, 1])))
    scaled = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert found == pytest.approx([scaled, 0, -scaled, 0], abs=1e-6)


def test_without_scaling_a_partial_reward_teaches_less_than_a_full_one():
    rewards, groups = [1.0, 0.0, 0.1, 0.0], [0, 0, 1, 1]
    assert advantages(Grpo(scale="none").credit(batch(rewards, groups))) == pytest.approx(
        [0.5, -0.5, 0.05, -0.05]
    )
    full, _, partial, _ = advantages(Grpo(scale="std").credit(batch(rewards, groups)))
    assert full == pytest.approx(partial, rel=2e-3)


def test_every_token_of_a_sample_gets_its_advantage_and_padding_none():
    found = Grpo(scale="none").credit(batch([1.0, 0.0], [0, 0], lengths=[1, 3])).advantages
    assert_close(found, torch.tensor([[0.5, 0.0, 0.0], [-0.5, -0.5, -0.5]]))


def test_grpo_adds_the_kl_to_the_loss():
    # the policy has moved to log-probability -1 + ln 1.1 (ratio 1.1, unclipped); the reference is
    # at -1
    sampled = Grpo(scale="none", kl_coef=0.5).credit(batch([1.0, 0.0], [0, 0]))
    sampled = replace(sampled, ref_logprobs=sampled.logprobs)
    now = sampled.logprobs + math.log(1.1)
    # policy: mean of -.5 · 1.1 and .5 · 1.1 is 0
    k3 = 1 / 1.1 + math.log(1.1) - 1
    assert loss_of(Grpo(scale="none", kl_coef=0.5), sampled, now) == pytest.approx(
        0.5 * k3, abs=1e-6
    )
    assert Grpo(kl_coef=0.5).needs_reference and not Grpo(kl_coef=0).needs_reference


def test_grpo_stops_at_its_clip_bounds():
    # ratio 1.5: A = ½ counts up to 1.3 only, A = -½ counts in full
    sampled = Grpo(scale="none").credit(batch([1.0, 0.0], [0, 0]))
    now = sampled.logprobs + math.log(1.5)
    assert loss_of(Grpo(clip_high=0.3), sampled, now) == pytest.approx((-0.5 * 1.3 + 0.5 * 1.5) / 2)


def test_problems_without_contrast_can_be_left_out(solutions, encoder):
    assert len(Grpo().select(solutions, encoder)) == 4
    kept = Grpo(drop_constant_groups=True).select(solutions, encoder)
    assert [r.problem.id for r in kept] == ["a", "a"]


# --- RLOO -----------------------------------------------------------------------------------------


def test_rloo_compares_a_sample_with_the_others():
    # 1 - (0 + 0)/2, 0 - (1 + 0)/2, the same
    assert advantages(Rloo(kl_coef=0).credit(batch([1.0, 0.0, 0.0], [0, 0, 0]))) == pytest.approx(
        [1, -0.5, -0.5]
    )


def test_rloo_subtracts_the_kl_of_the_whole_response():
    # reference at log-probability -1.5: each token costs β · .5 = .05; lengths 1 and 3
    sampled = batch([1.0, 1.0], [0, 0], lengths=[1, 3])
    sampled = replace(sampled, ref_logprobs=sampled.logprobs * 1.5)
    # R = 1 - .05 and 1 - .15
    found = Rloo(kl_coef=0.1).credit(sampled).advantages
    assert_close(found, torch.tensor([[0.1, 0.0, 0.0], [-0.1, -0.1, -0.1]]))


def test_the_first_step_of_rloo_is_reinforce():
    sampled = Rloo(kl_coef=0).credit(batch([1.0, 0.0, 0.0], [0, 0, 0], lengths=[2, 1, 3]))
    algorithm = Rloo(kl_coef=0)
    sampled = replace(sampled, weights=algorithm.weights(sampled))
    now = sampled.logprobs.clone().requires_grad_()
    algorithm.loss(TokenScores(logprobs=now, values=now.detach()), sampled).total.backward()
    # -A of each token, over the 6 tokens
    assert_close(now.grad, torch.tensor([[-1.0, -1, 0], [0.5, 0, 0], [0.5, 0.5, 0.5]]) / 6)


# --- online self-training -------------------------------------------------------------------------


class Spelled:
    """Uses prompt and target as they stand in the problem."""

    def prompt(self, problem: Problem) -> str:
        return problem.question

    def target(self, problem: Problem) -> str:
        assert problem.rationale is not None
        return problem.rationale


@pytest.fixture
def encoder(tokenizer) -> Encoder:
    return Encoder(tokenizer, Spelled())


def solution(id: str, reward: float, *, tokens: int = 1, rationale: str | None = "wa") -> Solution:
    verdict = Verdict.CORRECT if reward == 1 else Verdict.WRONG if reward > 0 else Verdict.ERROR
    return Solution(
        problem=Problem(
            id=id,
            question="wb",
            answer=Answer(kind="number", value=Fraction(3)),
            rationale=rationale,
        ),
        prompt_ids=(5, 6, 7),
        completion=Completion(
            token_ids=(8,) * tokens, text="", logprobs=(-0.5,) * tokens, finish_reason="eos"
        ),
        graded=Graded(verdict=verdict, value="3", reason=""),
        reward=reward,
    )


@pytest.fixture
def solutions() -> list[Solution]:
    """Two samples each of two problems; those of b earned the same."""
    return [solution("a", 1.0), solution("b", 0.1), solution("a", 0.0), solution("b", 0.1)]


def test_correct_samples_and_the_gold_of_every_problem_are_trained_on(encoder):
    # rewards 1, .1, 0, 1, as in a minibatch of the paper
    sampled = [solution("a", 1.0), solution("b", 0.1), solution("c", 0.0), solution("d", 1.0)]
    found = OnlineSt().select(sampled, encoder)
    assert [(r.problem.id, r.source) for r in found] == [
        ("a", "policy"),
        ("d", "policy"),
        *((id, "gold") for id in "abcd"),
    ]
    gold = found[2]
    assert (
        gold.completion.token_ids == tuple(encoder.target(gold.problem))
        and gold.completion.finish_reason == "eos"
    )
    assert (gold.prompt_ids, gold.reward, gold.graded.verdict) == ((5, 6, 7), 1.0, Verdict.CORRECT)


def test_gold_counts_once_a_problem_however_many_samples(encoder, solutions):
    found = OnlineSt().select(solutions, encoder)
    assert [(r.problem.id, r.source) for r in found] == [
        ("a", "policy"),
        ("a", "gold"),
        ("b", "gold"),
    ]


def test_a_problem_without_a_rationale_gives_its_samples_only(encoder):
    assert OnlineSt().select([solution("a", 0.1, rationale=None)], encoder) == []
    assert len(OnlineSt().select([solution("a", 1.0, rationale=None)], encoder)) == 1


def test_the_preset_paper_cuts_gold_and_loses_its_end(encoder):
    # 3 prompt tokens, and a gold solution such as "wa", " ", "wb", eos
    [whole] = OnlineSt().select([solution("a", 0.0, rationale="wa 1 2")], encoder)
    [cut] = OnlineSt(gold_max_tokens=5, dropout=True).select(
        [solution("a", 0.0, rationale="wa 1 2")], encoder
    )
    assert whole.completion.token_ids[-1] == encoder.tokenizer.eos_token_id
    assert (
        cut.completion.token_ids == whole.completion.token_ids[:2]
        and cut.completion.finish_reason == "length"
    )
    assert OnlineSt(gold_max_tokens=3).select([solution("a", 0.0)], encoder) == [], (
        "nothing is left beside the prompt"
    )


def self_training_batch(encoder: Encoder, *samples: tuple[float, int]) -> RolloutBatch:
    """Samples of different problems, each with a reward and a number of tokens; each gold solution
    is 2 tokens, including eos."""
    sampled = [
        solution(str(i), reward, tokens=tokens) for i, (reward, tokens) in enumerate(samples)
    ]
    return rollout_batch(OnlineSt().select(sampled, encoder), device=torch.device("cpu"))


def test_the_loss_is_half_cross_entropy_of_correct_samples_and_half_of_gold(encoder):
    # E24: rewards 1, .1, 0, 1. Samples 1 and 4 have 2 tokens at -1 and 4 at -2.5: (2 + 10)/6 = 2
    # gold of all four: 2 tokens each at -.5, -1, -1.5, -3: mean 1.5. ½ · 2 + ½ · 1.5
    trained = self_training_batch(encoder, (1.0, 2), (0.1, 9), (0.0, 9), (1.0, 4))
    assert trained.gold is not None and trained.gold.tolist() == [
        False,
        False,
        True,
        True,
        True,
        True,
    ]
    now = torch.tensor([-1.0, -2.5, -0.5, -1.0, -1.5, -3.0])[:, None] * trained.response_mask
    assert loss_of(OnlineSt(), trained, now) == pytest.approx(0.5 * 2 + 0.5 * 1.5)
    parts = [loss_of(OnlineSt(), trained, now, rows) for rows in ([0, 2], [5], [1, 3, 4])]
    assert sum(parts) == pytest.approx(1.75), "however it is split into micro-batches"


def test_without_a_correct_sample_half_the_gold_loss_is_left(encoder):
    trained = self_training_batch(encoder, (0.1, 3), (0.0, 3))
    assert loss_of(OnlineSt(), trained, -2.0 * trained.response_mask) == pytest.approx(0.5 * 2)


def test_the_metrics_of_self_training_are_plain_cross_entropies(encoder):
    trained = self_training_batch(encoder, (1.0, 2))
    trained = replace(trained, weights=OnlineSt().weights(trained))
    now = torch.tensor([-1.0, -3.0])[:, None] * trained.response_mask
    metrics = OnlineSt().loss(TokenScores(logprobs=now, values=now), trained).metrics
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {"policy/positive_nll": 1, "policy/gold_nll": 3}
    )


def test_gold_rationales_are_no_samples_of_the_policy(encoder):
    trained = self_training_batch(encoder, (1.0, 2))
    assert trained.response_mask.tolist() == [[True, True], [True, True]]
    assert trained.sampled_mask.tolist() == [[True, True], [False, False]]


# --- in the trainer -------------------------------------------------------------------------------


def test_a_step_of_self_training_learns_from_gold_and_measures_samples(make_trainer):
    trainer = make_trainer({"algorithm": {"kind": "online_st"}})
    before = {name: value.clone() for name, value in trainer.policy.named_parameters()}
    metrics = trainer.step(1)
    assert metrics["policy/gold_nll"] > 0 and metrics["kl/mismatch"] < 1e-4
    assert not trainer.policy.training
    assert metrics["compute/sequence_passes"] > 0
    changed = {
        name
        for name, value in trainer.policy.named_parameters()
        if not torch.equal(value, before[name])
    }
    assert changed and not any(name.startswith("value_head") for name in changed)


@pytest.mark.parametrize(
    "algorithm",
    [{"kind": "grpo", "kl_coef": 0.1}, {"kind": "rloo"}, {"kind": "online_st", "dropout": True}],
)
def test_each_algorithm_takes_a_step(make_trainer, algorithm):
    trainer = make_trainer({"algorithm": algorithm, "prompts": 3, "samples": 2})
    metrics = trainer.step(1)
    assert trainer.policy.training == algorithm.get("dropout", False)
    assert all(math.isfinite(value) for value in metrics.values())


def test_gold_beyond_the_limits_of_the_recipe_is_left_out(make_trainer):
    trainer = make_trainer({"algorithm": {"kind": "online_st"}})
    whole = trainer.context.collector
    collector = replace(whole, lengths=whole.lengths.model_copy(update={"max_new": 4}))
    trainer.context = replace(trainer.context, collector=collector)

    def fits(r: Solution) -> bool:
        return collector.fits(r.prompt_ids, r.completion.token_ids, trainer.policy)

    sampled, _ = trainer.sample(1, "rollout")
    selected = trainer.algorithm.select(sampled, collector.encoder)
    assert any(r.source == "gold" for r in selected)
    assert not any(r.source == "gold" and fits(r) for r in selected), (
        "the shortest program has more than 4 tokens"
    )
    assert all(fits(r) for r in sampled)
    assert trainer.step(1).get("policy/gold_nll", 0) == 0


@pytest.mark.parametrize(
    "algorithm", [{"kind": "grpo"}, {"kind": "rloo"}, {"kind": "ppo", "drop_constant_groups": True}]
)
def test_comparing_the_samples_of_a_problem_needs_two(algorithm):
    settings = {
        "steps": 1,
        "prompts": 1,
        "optimizer": {"learning_rate": 1e-3},
        "algorithm": algorithm,
    }
    with pytest.raises(
        ValidationError,
        match=r"samples: expected at least 2, got 1: \w+ compares the samples of a problem",
    ):
        Rl(**settings)
    assert Rl(**settings, samples=2).samples == 2


# --- what is kept for people to read --------------------------------------------------------------


def test_samples_of_followed_problems_the_longest_and_one_that_took_too_long_are_kept():
    sampled = [solution(id, 1.0) for id in "aabbccddeeff"]
    sampled[7] = solution("d", 0.1, tokens=9)
    sampled[9] = replace(sampled[9], graded=Graded(verdict=Verdict.TIMEOUT, value=None, reason=""))
    kept = worth_showing(sampled, {"c", "f", "z"})
    assert [r.problem.id for r in kept] == ["c", "f", "a", "b", "d", "e"]
    assert kept[4:] == [sampled[7], sampled[9]]
    assert (
        worth_showing(sampled[:2], set()) == sampled[:2]
    )  # fewer problems than places: further tries


def test_an_algorithm_without_credit_is_refused_in_one_line(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from reftune.algorithms.base import Clipped\n\n"
        "class Mine(Clipped):\n    kind: str = 'mine'\n"
    )
    with pytest.raises(ValueError, match=r"mine\.py:Mine lacks credit, which algorithms need"):
        load_component(f"{path}:Mine", group="algorithms")
