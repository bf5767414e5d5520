"""The reference checks E1 (its token part) and E10 to E22 on the training core: the rules of the
authors' code, computed by hand.

A response is the masked part of their sequences: their mask entry t stands for the prediction of
token t + 1, so a prompt of 3 tokens and an eos at index 5 is a response of 3 tokens, predicted from
positions 2, 3 and 4.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from reftune.algorithms.base import gae, ppo_policy_terms, token_rewards, whiten
from reftune.algorithms.ppo import Ppo, value_terms
from reftune.model.batch import RolloutBatch, TokenBatch, token_batch
from reftune.model.encoder import Encoder
from reftune.model.policy import TokenScores
from reftune.model.weights import word_tokenizer
from reftune.stages.optimizer import OptimizerTable, rate
from reftune.stages.rl import Rl
from reftune.stages.sft import accumulate_nll
from reftune.types import Answer, Problem

AUTHORS = {"gamma": 1.0, "lam": 0.95}


def sampled(prompt: int, *responses: int) -> TokenBatch:
    """Prompts of `prompt` tokens, with responses of the given lengths."""
    return token_batch([[5] * prompt] * len(responses), [[6] * length for length in responses])


def credit(
    batch: TokenBatch,
    values: list[list[float]],
    rewards: list[float],
    log_ratios: list[list[float]] | None = None,
    *,
    kl_coef: float = 0.0,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token rewards, advantages before whitening, and returns."""
    mask = batch.response_mask
    old = torch.zeros(mask.shape)
    reference = None if log_ratios is None else old - torch.tensor(log_ratios)
    paid = token_rewards(torch.tensor(rewards), old, reference, mask, kl_coef=kl_coef)
    return paid, *gae(paid, torch.tensor(values), mask, gamma=gamma, lam=lam)


# --- E1 -------------------------------------------------------------------------------------------


class Program:
    def prompt(self, problem: Problem) -> str:
        return "def solution():\n"

    def target(self, problem: Problem) -> str:
        return "    return 3"


PROBLEM = Problem(id="1", question="", answer=Answer(kind="text", value="3"), rationale="")


def test_e1_prompt_and_target_are_tokenised_apart_and_one_eos_ends_the_target():
    tokenizer = word_tokenizer(
        ["def solution():\n", "    return 3", "def solution():\n    return 3"]
    )
    encoder = Encoder(tokenizer, Program())
    prompt, target = encoder.prompt(PROBLEM), encoder.target(PROBLEM)
    assert [tokenizer.decode([t]) for t in prompt] == ["def", " solution", "():", "\n"]
    assert [tokenizer.decode([t]) for t in target] == [" ", " ", " ", " return ", "3", "<eos>"]
    # as one text, the line break would merge with the indent: not the boundary that sampling sees
    joined = tokenizer.encode("def solution():\n    return 3")
    assert joined != prompt + target[:-1]
    assert prompt.count(tokenizer.eos_token_id) == 0 and target.count(tokenizer.eos_token_id) == 1


def test_e1_the_loss_is_on_target_and_eos_only(make_policy):
    policy = make_policy("llama")
    prompt, target = [3, 4, 5], [6, 7, 1]
    labels = torch.tensor([[-100, -100, -100, 6, 7, 1]])
    expected = policy.model(input_ids=torch.tensor([prompt + target]), labels=labels).loss
    assert accumulate_nll(policy, token_batch([prompt], [target])) == pytest.approx(
        expected.item(), rel=1e-5
    )


# --- E10 to E16: masks and advantages -------------------------------------------------------------


def test_e10_mask_reward_and_advantages():
    batch = sampled(3, 3)
    assert batch.predictor_index()[1].tolist() == [2, 3, 4]
    paid, advantages, returns = credit(batch, [[0.5, 0.6, 0.7]], [1.0], **AUTHORS)
    assert_close(paid, torch.tensor([[0.0, 0.0, 1.0]]))
    assert_close(advantages, torch.tensor([[0.46575, 0.385, 0.3]]))
    assert_close(returns, torch.tensor([[0.96575, 0.985, 1.0]]))


def test_e11_the_symbols_as_printed_in_the_paper_give_numbers_other_than_ours():
    _, advantages, _ = credit(sampled(3, 3), [[0.5, 0.6, 0.7]], [1.0], gamma=0.95, lam=1.0)
    assert_close(advantages, torch.tensor([[0.4025, 0.35, 0.3]]))
    ours = Ppo()
    assert (ours.gamma, ours.lam) == (1.0, 0.95)


def test_e12_the_kl_penalty_is_in_the_reward_of_every_token():
    paid, advantages, returns = credit(
        sampled(3, 3), [[0.5, 0.6, 0.7]], [1.0], [[0.2, -0.1, 0.4]], kl_coef=0.05, **AUTHORS
    )
    assert_close(paid, torch.tensor([[-0.01, 0.005, 0.98]]))
    assert_close(advantages, torch.tensor([[0.44245, 0.371, 0.28]]))
    assert_close(returns, torch.tensor([[0.94245, 0.971, 0.98]]))


@pytest.mark.parametrize(
    ("reward", "expected"), [(0.1, [0.09025, 0.095, 0.1]), (1.0, [0.9025, 0.95, 1.0])]
)
def test_e13_with_zero_values_advantages_and_returns_are_the_decayed_reward(reward, expected):
    _, advantages, returns = credit(sampled(3, 3), [[0.0, 0.0, 0.0]], [reward], **AUTHORS)
    assert_close(advantages, torch.tensor([expected]))
    assert_close(returns, torch.tensor([expected]))


def test_e14_an_early_eos_leaves_zeros_behind_it():
    # beside a response of 5 tokens (length 8 less the prompt's 3) one that ends at index 4
    batch = sampled(3, 2, 5)
    assert batch.rows(torch.tensor([0])).predictor_index()[1].tolist() == [2, 3]
    assert batch.response_mask[0].tolist() == [True, True, False, False, False]
    paid, advantages, returns = credit(
        batch, [[0.2, 0.4, 9, 9, 9], [0.0] * 5], [1.0, 0.0], **AUTHORS
    )
    assert_close(paid[0], torch.tensor([0.0, 1, 0, 0, 0]))
    assert_close(advantages[0], torch.tensor([0.77, 0.6, 0, 0, 0]))
    assert_close(returns[0], torch.tensor([0.97, 1.0, 0, 0, 0]))


def test_e15_truncation_is_termination():
    # no eos, length 6: index 5 is the last sampled token, predicted from the second-last position 4
    batch = sampled(3, 3)
    assert batch.predictor_index()[1].tolist() == [2, 3, 4]
    paid, advantages, _ = credit(batch, [[0.5, 0.6, 0.7]], [0.1], **AUTHORS)
    assert_close(paid, torch.tensor([[0.0, 0.0, 0.1]]))
    assert_close(
        advantages[0, -1], torch.tensor(0.1 - 0.7)
    )  # nothing is bootstrapped after the cut


def test_e16_eos_as_the_first_token_is_a_response_of_one():
    batch = sampled(3, 1)
    assert batch.predictor_index()[1].tolist() == [2]
    paid, advantages, returns = credit(batch, [[0.5]], [1.0], **AUTHORS)
    assert (paid.tolist(), advantages.tolist(), returns.tolist()) == ([[1.0]], [[0.5]], [[1.0]])


# --- E17 to E20: whitening and losses -------------------------------------------------------------


def test_e17_whitening_divides_by_the_unbiased_deviation():
    values, mask = (
        torch.tensor([[0.46575, 0.385, 0.3, 7.0]]),
        torch.tensor([[True, True, True, False]]),
    )
    assert float(values[mask].mean()) == pytest.approx(0.3835833, abs=1e-6)
    assert float(values[mask].var()) == pytest.approx(0.00686977, abs=1e-7)
    white = whiten(values, mask)
    assert_close(white, torch.tensor([[0.991344, 0.017092, -1.008436, 0.0]]), atol=2e-6, rtol=0)
    assert float(white.sum()) == pytest.approx(0, abs=1e-5)


def test_e17_the_algorithm_whitens_advantages_over_the_whole_rollout_and_returns_not_at_all():
    tokens = sampled(3, 3, 1)
    zeros = torch.zeros(2, 3)
    batch = RolloutBatch(
        tokens=tokens,
        rewards=torch.tensor([1.0, 0.0]),
        groups=torch.tensor([0, 1]),
        gold=torch.zeros(len(tokens), dtype=torch.bool),
        sampling_logprobs=zeros,
        logprobs=zeros,
        ref_logprobs=zeros,
        values=torch.tensor([[0.5, 0.6, 0.7], [0.2, 0, 0]]),
    )
    credited = Ppo(kl_coef=0.01).credit(batch)
    raw = torch.tensor([0.46575, 0.385, 0.3, -0.2])
    expected = (raw - raw.mean()) / raw.std()
    assert_close(credited.advantages[tokens.response_mask], expected, atol=1e-5, rtol=0)
    assert_close(credited.returns, torch.tensor([[0.96575, 0.985, 1.0], [0.0, 0, 0]]))


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected"),
    [(1, 1.5, -1.2), (1, 0.5, -0.5), (-1, 1.5, 1.5), (-1, 0.5, 0.8)],
)
def test_e18_policy_term(advantage, ratio, expected):
    term = ppo_policy_terms(
        torch.tensor([math.log(ratio)]),
        torch.zeros(1),
        torch.tensor([float(advantage)]),
        clip_low=0.2,
        clip_high=0.2,
    )
    assert float(term) == pytest.approx(expected)


VALUE_TERMS = [
    (0.8, 0.5, 1.0, 0.045),
    (0.9, 0.5, 0.6, 0.045),
    (0.3, 0.5, 1.0, 0.245),
    (0.65, 0.5, 0.6, 0.00125),
]


@pytest.mark.parametrize(("new", "old", "target", "expected"), VALUE_TERMS)
def test_e19_value_term(new, old, target, expected):
    term = value_terms(torch.tensor([new]), torch.tensor([old]), torch.tensor([target]), clip=0.2)
    assert float(term) == pytest.approx(expected, rel=1e-4)


def minibatch(tokens: TokenBatch, **per_token: list[list[float]]) -> RolloutBatch:
    zeros = torch.zeros(tokens.response_mask.shape)
    given = {name: torch.tensor(values) for name, values in per_token.items()}
    per_sample = torch.zeros(len(tokens))
    batch = RolloutBatch(
        tokens=tokens,
        rewards=per_sample,
        groups=per_sample.long(),
        gold=torch.zeros(len(tokens), dtype=torch.bool),
        sampling_logprobs=zeros,
        logprobs=zeros,
        **{"values": zeros, "advantages": zeros, "returns": zeros, **given},
    )
    return replace(batch, weights=Ppo().weights(batch))


def test_e19_the_value_loss_counts_five_times():
    tokens = sampled(3, 1)
    batch = minibatch(tokens, values=[[0.5]], returns=[[1.0]], advantages=[[1.0]])
    terms = Ppo().loss(TokenScores(logprobs=torch.zeros(1, 1), values=torch.tensor([[0.8]])), batch)
    assert float(terms.total) == pytest.approx(-1 + 5 * 0.045)
    assert float(terms.metrics["value/loss"]) == pytest.approx(0.045)


def test_e20_means_are_over_tokens_then_over_samples():
    # ratio 1: terms -1 for the one token of sample 1, -.2 for the three of sample 2; (-1 - .2)/2 =
    # -.6
    batch = minibatch(sampled(3, 1, 3), advantages=[[1.0, 0, 0], [0.2, 0.2, 0.2]])
    terms = Ppo(value_coef=0).loss(
        TokenScores(logprobs=torch.zeros(2, 3), values=torch.zeros(2, 3)), batch
    )
    assert float(terms.total) == pytest.approx(-0.6)


# --- E21 ------------------------------------------------------------------------------------------


def test_e21_the_first_update_starts_from_ratios_of_one_and_no_kl(trainer):
    solutions, _ = trainer.sample(1, "rollout")
    batch, metrics = trainer.score(solutions)
    # the reference is the initial policy, whose scores come from decoding
    assert metrics["kl/reference"] == pytest.approx(0, abs=1e-4)
    batch = trainer.algorithm.credit(batch)
    trainer.policy.eval()
    found = trainer.accumulate(replace(batch, weights=trainer.algorithm.weights(batch)))
    assert found["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert found["policy/clip_fraction"] == 0
    mask = batch.response_mask
    per_sample = [float(a[m].mean()) for a, m in zip(batch.advantages, mask, strict=True)]
    assert found["policy/loss"] == pytest.approx(-sum(per_sample) / len(per_sample), abs=1e-6)


# --- E22 ------------------------------------------------------------------------------------------


def test_e22_the_learning_rate_of_the_warm_up_snapshot():
    # N = 7356, 8 GPUs × 3 × 2 = 48 a step: 154 steps an epoch; the authors' scheduler counts 6120
    # steps and 612 of warm-up
    assert math.ceil(7356 / 48) == 154
    table = OptimizerTable(learning_rate=1e-5, schedule="linear", warmup=0.1)
    assert 1e-5 * rate(table, step=308, total_steps=6120) == pytest.approx(5.033e-6, abs=1e-9)
    # Difference: ours counts the steps there are, 154 · 40 = 6160, so it is .7% lower and ends at 0
    # instead of running at 0
    assert 1e-5 * rate(table, step=308, total_steps=6160) == pytest.approx(5.0e-6, abs=1e-9)


def test_e22_the_rl_rate_is_constant_from_the_first_step():
    table = OptimizerTable(learning_rate=3e-7)
    assert [rate(table, step=step, total_steps=1000) for step in (1, 2, 500, 1000)] == [1, 1, 1, 1]


def test_e22_a_rollout_is_two_optimizer_steps_on_the_whole_of_it(make_trainer):
    assert Rl(steps=1, prompts=1, optimizer={"learning_rate": 1.0}).updates == 2
    trainer = make_trainer()
    metrics = trainer.step(1)
    state = trainer.loop.optimizer.state[trainer.policy.value_head.weight]
    assert float(state["step"]) == 2
    assert metrics["compute/sequence_passes"] == 2 * 8
    rates = [group["lr"] for group in trainer.loop.optimizer.param_groups]
    assert set(rates) == {trainer.stage.optimizer.learning_rate}
