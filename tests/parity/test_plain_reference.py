"""Compares the PPO step and the supervised loss with a plain, slow implementation: one sequence at
a time, full logits, Python loops.

Below the line "plain", only the policy's weights come from our code.
"""

from __future__ import annotations

import copy
import math
import os
import random
import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from reftune.algorithms.base import token_weights
from reftune.algorithms.ppo import Ppo
from reftune.engines.kv import Kv
from reftune.model.batch import RolloutBatch, TokenBatch, micro_batches, token_batch
from reftune.model.policy import Policy
from reftune.model.speed import attention
from reftune.recipe import LoraTable
from reftune.stages.optimizer import OptimizerTable, make_optimizer, optimizer_step
from reftune.stages.sft import accumulate_nll
from reftune.types import SamplingParams

FAMILIES = [
    "llama",
    "llama, tied",
    "phi3",
    "mistral, window of 5",
    "qwen2, untied",
    "qwen2, tied",
    "qwen3, tied",
    "gpt2",
    "opt",
    "opt, narrow embeddings",
    "codegen",
    "gptneox",
    "gemma",
]
PPO = Ppo(kl_coef=0.05)
TEMPERATURE = 0.8

# --- plain ----------------------------------------------------------------------------------------


def plain_tokens(
    policy: Policy, prompt: list[int], response: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probability and value of each response token, from one unpadded forward pass with an
    attention mask."""
    tokens = torch.tensor([prompt + response])
    mask = torch.ones_like(tokens)
    logits = policy.model(input_ids=tokens, attention_mask=mask).logits[0].float() / TEMPERATURE
    states = policy.model.base_model(input_ids=tokens, attention_mask=mask).last_hidden_state[0]
    logprobs, values = [], []
    for t, token in enumerate(response):
        position = len(prompt) - 1 + t
        logprobs.append(logits[position].log_softmax(-1)[token])
        values.append(states[position] @ policy.value_head.weight[0] + policy.value_head.bias[0])
    return logprobs, values


def plain_credit(
    old: list[list[float]], ref: list[list[float]], values: list[list[float]], rewards: list[float]
):
    """Whitened advantages and returns, by loops over Python floats."""
    advantages, returns = [], []
    for i, reward in enumerate(rewards):
        length = len(old[i])
        row = [0.0] * length
        running = 0.0
        for t in reversed(range(length)):
            paid = -0.05 * (old[i][t] - ref[i][t]) + (reward if t == length - 1 else 0.0)
            after = values[i][t + 1] if t + 1 < length else 0.0
            running = paid + after - values[i][t] + 0.95 * running
            row[t] = running
        advantages.append(row)
        returns.append([a + v for a, v in zip(row, values[i], strict=True)])
    flat = [a for row in advantages for a in row]
    mean = sum(flat) / len(flat)
    variance = sum((a - mean) ** 2 for a in flat) / (len(flat) - 1)
    return [[(a - mean) / math.sqrt(variance + 1e-8) for a in row] for row in advantages], returns


def plain_loss(policy: Policy, samples, old, values, advantages, returns) -> Tensor:
    """policy loss + 5 · value loss, each a mean over tokens, then over samples."""
    policy_means, value_means = [], []
    for i, (prompt, response) in enumerate(samples):
        logprobs, new_values = plain_tokens(policy, prompt, response)
        policy_terms, value_terms = [], []
        for t in range(len(response)):
            ratio = torch.exp(logprobs[t] - old[i][t])
            a = advantages[i][t]
            policy_terms.append(torch.maximum(-a * ratio, -a * torch.clamp(ratio, 0.8, 1.2)))
            clipped = min(max(float(new_values[t]) - values[i][t], -0.2), 0.2) + values[i][t]
            free_error, clipped_error = (
                (new_values[t] - returns[i][t]) ** 2,
                (clipped - returns[i][t]) ** 2,
            )
            moves = (
                abs(float(new_values[t]) - values[i][t]) <= 0.2
            )  # the clipped error has no gradient beyond
            worse = (
                free_error
                if moves or float(free_error) > clipped_error
                else torch.tensor(clipped_error)
            )
            value_terms.append(0.5 * worse)
        policy_means.append(sum(policy_terms) / len(policy_terms))
        value_means.append(sum(value_terms) / len(value_terms))
    return sum(policy_means) / len(samples) + 5 * sum(value_means) / len(samples)


def plain_floats(policy: Policy, samples) -> tuple[list[list[float]], list[list[float]]]:
    with torch.no_grad():
        scored = [plain_tokens(policy, prompt, response) for prompt, response in samples]
    return [[float(x) for x in logprobs] for logprobs, _ in scored], [
        [float(x) for x in values] for _, values in scored
    ]


# --- ours -----------------------------------------------------------------------------------------


def some_samples(count: int = 5) -> list[tuple[list[int], list[int]]]:
    """Prompts and responses of many lengths, one response of a single token."""
    rng = random.Random(0)
    draw = lambda low, high: [rng.randrange(3, 30) for _ in range(rng.randint(low, high))]  # noqa: E731
    return [([3, 4], [1]), *((draw(1, 7), [*draw(0, 9), 1]) for _ in range(count - 1))]


def rewards_of(samples) -> list[float]:
    return [[1.0, 0.1, 0.0][i % 3] for i in range(len(samples))]


def token_batch_of(samples) -> TokenBatch:
    return token_batch([prompt for prompt, _ in samples], [response for _, response in samples])


def credited(policy: Policy, reference: Policy, samples) -> RolloutBatch:
    """Our rollout batch, scored and credited."""
    tokens = token_batch_of(samples)
    scores = policy.score(tokens, temperature=TEMPERATURE)
    rewards = torch.tensor(rewards_of(samples))
    batch = RolloutBatch(
        tokens=tokens,
        rewards=rewards,
        groups=torch.arange(len(samples)),
        gold=torch.zeros(len(tokens), dtype=torch.bool),
        sampling_logprobs=scores.logprobs,
        logprobs=scores.logprobs,
        values=scores.values,
        ref_logprobs=reference.score(tokens, temperature=TEMPERATURE).logprobs,
    )
    batch = PPO.credit(batch)
    return replace(batch, weights=PPO.weights(batch))


def accumulate(policy: Policy, batch: RolloutBatch, *, max_tokens: int = 10_000) -> float:
    """Our loss; its gradient stays in the policy."""
    policy.zero_grad()
    total = 0.0
    for index in micro_batches(batch.tokens.lengths, max_tokens=max_tokens):
        rows = batch.rows(index)
        terms = PPO.loss(policy(rows.tokens, temperature=TEMPERATURE), rows)
        terms.total.backward()
        total += float(terms.total.detach())
    return total


def gradients(policy: Policy) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check that gradients agree within fp32 rounding, relative to the largest entry of each
    tensor, and that none is missing."""
    assert set(found) == set(expected)
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        assert_close(
            found[name] / scale,
            gradient / scale,
            atol=2e-4,
            rtol=0,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def moved(policy: Policy) -> Policy:
    """A copy with every weight changed a little, so that ratios, clipping and KL all matter."""
    other = copy.deepcopy(policy)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(
                torch.randn_like(parameter) * 0.1 * parameter.abs().mean().clamp(min=0.02)
            )
    return other


def masked(batch: RolloutBatch, rows: list[list[float]]) -> Tensor:
    return batch.tokens.unflatten(torch.tensor([x for row in rows for x in row]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ppo_step_is_the_plain_one(make_policy, family):
    old_policy = make_policy(family)
    policy, reference = moved(old_policy), moved(make_policy(family, seed=1))
    samples = some_samples()
    batch = credited(old_policy, reference, samples)

    old, values = plain_floats(old_policy, samples)
    advantages, returns = plain_credit(
        old, plain_floats(reference, samples)[0], values, rewards_of(samples)
    )
    assert_close(batch.logprobs, masked(batch, old), atol=2e-5, rtol=1e-5)
    assert_close(batch.values, masked(batch, values), atol=2e-5, rtol=1e-5)
    assert_close(batch.advantages, masked(batch, advantages), atol=1e-4, rtol=1e-4)
    assert_close(batch.returns, masked(batch, returns), atol=2e-5, rtol=1e-5)

    loss = accumulate(policy, batch)
    found = gradients(policy)
    policy.zero_grad()
    expected = plain_loss(policy, samples, old, values, advantages, returns)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    assert_same_gradients(found, gradients(policy))


def test_the_comparison_has_clipped_and_free_tokens_in_both_losses(make_policy):
    # otherwise the test above would show less than it claims
    old_policy = make_policy("llama")
    policy, reference = moved(old_policy), moved(make_policy("llama", seed=1))
    batch = credited(old_policy, reference, some_samples())
    with torch.no_grad():
        scores = policy(batch.tokens, temperature=TEMPERATURE)
    mask = batch.response_mask
    ratio = (scores.logprobs - batch.logprobs).exp()[mask]
    shift = (scores.values - batch.values)[mask].abs()
    assert 0.1 < float(((ratio - 1).abs() > 0.2).float().mean()) < 0.9
    assert 0.1 < float((shift > 0.2).float().mean()) < 0.95
    assert float((batch.logprobs - batch.ref_logprobs)[mask].abs().mean()) > 0.1


def test_two_updates_leave_the_weights_of_two_plain_ones(make_policy):
    # the same AdamW on the same clipped gradients; only the second update has ratios other than 1
    ours, plain = make_policy("llama"), make_policy("llama")
    reference, samples = moved(make_policy("llama", seed=1)), some_samples()
    batch = credited(ours, reference, samples)
    optimizer = make_optimizer(ours, OptimizerTable(learning_rate=1e-2))
    for _ in range(2):
        accumulate(ours, batch, max_tokens=20)
        optimizer_step(ours, optimizer, share=1.0, max_grad_norm=1.0)

    old, values = plain_floats(plain, samples)
    advantages, returns = plain_credit(
        old, plain_floats(reference, samples)[0], values, rewards_of(samples)
    )
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0, foreach=False)
    for _ in range(2):
        adam.zero_grad()
        plain_loss(plain, samples, old, values, advantages, returns).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adam.step()
    start = make_policy("llama")
    for (name, found), expected, before in zip(
        ours.named_parameters(), plain.parameters(), start.parameters(), strict=True
    ):
        # Adam divides by a gradient's size, so an entry near 0 may go either way: compare the
        # overall movement
        difference = float((found - expected).norm()) / float((expected - before).norm())
        assert difference < 0.02, name


# --- invariances ----------------------------------------------------------------------------------


@pytest.fixture
def step(make_policy, request):
    """A policy in mid-step, its batch, and the loss and gradients of the whole batch in one
    pass."""
    family = getattr(request, "param", "phi3")
    old_policy = make_policy(family)
    policy, reference = moved(old_policy), make_policy(family, seed=1)
    batch = credited(old_policy, reference, some_samples(9))
    return policy, batch, accumulate(policy, batch), gradients(policy)


@pytest.mark.parametrize("max_tokens", [1, 12, 30])
def test_splitting_a_minibatch_changes_nothing(step, max_tokens):
    policy, batch, loss, whole = step
    assert len(list(micro_batches(batch.tokens.lengths, max_tokens=max_tokens))) > 1
    assert accumulate(policy, batch, max_tokens=max_tokens) == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(gradients(policy), whole)


def test_the_order_of_a_batch_changes_nothing(step):
    policy, batch, loss, whole = step
    assert accumulate(
        policy, batch.rows(torch.tensor([4, 1, 8, 6, 0, 7, 3, 5, 2]))
    ) == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(gradients(policy), whole)


WRITTEN_OUT = ["llama", "phi3", "qwen2, tied", "qwen3, tied"]
BY_TRANSFORMERS = ["codegen", "gemma", "gpt2", "gptneox", "opt", "opt, narrow embeddings"]


@pytest.mark.parametrize("count", [1, 11])
@pytest.mark.parametrize("family", [*WRITTEN_OUT, *BY_TRANSFORMERS])
def test_leaving_padding_out_changes_nothing(make_policy, family, count):
    old_policy = make_policy(family)
    policy, reference = moved(old_policy), make_policy(family, seed=1)
    batch = credited(old_policy, reference, some_samples(count))
    assert policy.packs and policy.is_written_out == (family in WRITTEN_OUT)
    results = []
    for packs, is_written_out in ((False, False), (True, False), (True, policy.is_written_out)):
        policy.packs, policy.is_written_out = packs, is_written_out
        scores = policy.score(batch.tokens)
        results.append((scores, accumulate(policy, batch), gradients(policy)))
    (padded, loss, whole), *packed = results
    for scores, packed_loss, packed_gradients in packed:
        assert_close(scores.logprobs, padded.logprobs, atol=1e-5, rtol=0)
        assert_close(scores.values, padded.values, atol=1e-5, rtol=0)
        assert packed_loss == pytest.approx(loss, rel=1e-5)
        assert_same_gradients(packed_gradients, whole)


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "codegen", "gemma"])
def test_leaving_padding_out_changes_little_in_bfloat16(make_policy, family):
    old_policy = make_policy(family, dtype=torch.bfloat16)
    policy, reference = moved(old_policy), make_policy(family, dtype=torch.bfloat16, seed=1)
    batch = credited(old_policy, reference, some_samples(11))
    assert policy.packs and not policy.is_written_out
    scores = policy.score(batch.tokens)
    loss, packed = accumulate(policy, batch), gradients(policy)
    policy.packs = False
    padded = policy.score(batch.tokens)
    assert_close(padded.logprobs, scores.logprobs, atol=0.1, rtol=0)
    assert accumulate(policy, batch) == pytest.approx(loss, rel=0.02)
    for name, gradient in gradients(policy).items():
        scale = float(gradient.abs().max())
        assert_close(packed[name] / scale, gradient / scale, atol=0.1, rtol=0)


def test_every_family_that_is_read_without_padding_is_tested(make_model):
    tested = {type(make_model(family)).__name__ for family in (*WRITTEN_OUT, *BY_TRANSFORMERS)}
    assert tested | {"MistralForCausalLM"} == set(attention.FAMILIES)


@pytest.mark.parametrize("family", ["mistral, window of 5", "granite"])
def test_other_models_are_read_with_padding(make_policy, family):
    assert not make_policy(family).packs


def test_a_model_with_adapters_is_read_without_padding_by_transformers(make_policy):
    policy = make_policy("phi3", lora=LoraTable(rank=2, alpha=2.0, target_modules="all-linear"))
    assert policy.packs and not policy.is_written_out


@pytest.mark.parametrize("family", ["phi3", "gpt2", "opt"])
def test_the_content_of_padding_changes_nothing(make_policy, family):
    old_policy = make_policy(family)
    policy, reference = moved(old_policy), make_policy(family, seed=1)
    batch = credited(old_policy, reference, some_samples())
    loss, whole = accumulate(policy, batch), gradients(policy)
    tokens = torch.cat([batch.tokens.tokens, torch.zeros(len(batch), 6, dtype=torch.long)], dim=1)
    padding = torch.arange(tokens.shape[1]) >= batch.tokens.lengths[:, None]
    junk = replace(batch.tokens, tokens=tokens.masked_fill(padding, 17))
    assert accumulate(policy, replace(batch, tokens=junk)) == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(gradients(policy), whole)


@pytest.mark.parametrize(
    ("tokens_at_once", "elements"), [(2048, 1), (2048, 300), (1, 1), (3, 20), (3, 10_000)]
)
@pytest.mark.parametrize("kept", [0, 60, 2**26])
def test_log_probabilities_made_in_pieces_change_nothing(
    step, monkeypatch, tokens_at_once, elements, kept
):
    policy, batch, loss, whole = step
    scores = policy.score(batch.tokens)
    monkeypatch.setattr("reftune.model.logprobs.TOKENS_AT_ONCE", tokens_at_once)
    monkeypatch.setattr("reftune.model.logprobs.LOGIT_ELEMENTS", elements)
    monkeypatch.setattr("reftune.model.logprobs.LOGITS_KEPT", kept)
    assert accumulate(policy, batch) == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(gradients(policy), whole)
    in_pieces = policy.score(batch.tokens)
    assert_close(in_pieces.logprobs, scores.logprobs, atol=1e-6, rtol=0)
    assert_close(in_pieces.entropy, scores.entropy, atol=1e-5, rtol=0)


def test_pieces_under_bfloat16_have_the_gradient_of_the_whole(make_policy, monkeypatch):
    # pieces are recomputed in the backward pass, which needs the same arithmetic for the same
    # gradient
    policy = make_policy("phi3", dtype=torch.bfloat16)
    tokens = token_batch_of(some_samples())
    found = []
    for tokens_at_once, elements in ((2048, 2**25), (3, 20)):
        monkeypatch.setattr("reftune.model.logprobs.TOKENS_AT_ONCE", tokens_at_once)
        monkeypatch.setattr("reftune.model.logprobs.LOGIT_ELEMENTS", elements)
        policy.zero_grad()
        policy(tokens).logprobs.sum().backward()
        found.append(gradients(policy))
    for name, gradient in found[0].items():
        scale = float(gradient.abs().max())
        assert_close(found[1][name] / scale, gradient / scale, atol=2e-2, rtol=0)


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no compiler for C++"
)
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("step", ["llama"], indirect=True)
def test_compiled_blocks_change_nothing_and_decoding_does_not_use_them(step):
    policy, batch, loss, whole = step
    params = SamplingParams(max_new_tokens=4, temperature=1.0, seed=0)
    before = Kv(kind="kv").generate(policy, [[3, 4, 5], [6]], params)
    policy.compile_blocks()
    compiled = torch._dynamo.utils.counters["stats"]
    assert accumulate(policy, batch) == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(gradients(policy), whole)
    graphs = compiled["unique_graphs"]
    assert graphs > 0
    assert Kv(kind="kv").generate(policy, [[3, 4, 5], [6]], params) == before
    assert compiled["unique_graphs"] == graphs


# --- the supervised loss --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2, tied"])
@pytest.mark.parametrize("max_tokens", [10_000, 12])
def test_the_supervised_loss_is_the_token_mean_over_the_whole_batch(
    make_policy, family, max_tokens
):
    policy, samples = make_policy(family), some_samples()
    policy.max_tokens = max_tokens
    loss = accumulate_nll(policy, token_batch_of(samples))
    found = gradients(policy)
    policy.zero_grad()
    terms = []
    for prompt, response in samples:
        tokens = torch.tensor([prompt + response])
        logprobs = (
            policy.model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
            .logits[0]
            .float()
            .log_softmax(-1)
        )
        terms += [-logprobs[len(prompt) - 1 + t, token] for t, token in enumerate(response)]
    expected = sum(terms) / len(terms)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_same_gradients(found, gradients(policy))
    assert not any(name.startswith("value_head") for name in found)


def test_weights_of_a_piece_are_its_share_of_the_whole():
    # a loss that averaged each micro-batch by itself would count short pieces too much
    mask = token_batch_of(some_samples()).response_mask
    weights = token_weights(mask, "token")
    assert_close(weights[mask], torch.full((int(mask.sum()),), 1 / int(mask.sum())))
