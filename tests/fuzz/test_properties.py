"""Advantages, micro-batches and votes of random shapes against plain references: loops over
lists."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from reftune.algorithms.base import gae, group_means, token_rewards, whiten
from reftune.algorithms.grpo import group_stds
from reftune.algorithms.rloo import leave_one_out
from reftune.grading.voting import majority_curve, pass_at_k, rerank_curve
from reftune.model.batch import micro_batches, token_batch
from reftune.types import Graded, Verdict

pytestmark = pytest.mark.fuzz
QUICK = settings(
    deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
NUMBERS = st.floats(-8, 8, width=32)
UNIT = st.floats(0, 1)
TOLERANCE = 1e-9


def padded(rows: list[list[float]], width: int) -> torch.Tensor:
    """Rows padded on the right with numbers that must not matter."""
    return torch.tensor([row + [1e3] * (width - len(row)) for row in rows], dtype=torch.float64)


def lengths_mask(lengths: list[int], width: int) -> torch.Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


@st.composite
def responses(draw: st.DrawFn, channels: int) -> tuple[list[list[list[float]]], int]:
    """Channels of rows of numbers, one row per response, and the padded width."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    width = max(1, max(lengths) + draw(st.integers(0, 2)))
    rows = [
        [draw(st.lists(NUMBERS, min_size=n, max_size=n)) for n in lengths] for _ in range(channels)
    ]
    return rows, width


@QUICK
@given(responses(2), UNIT, UNIT)
def test_gae_is_the_sum_of_discounted_deltas(drawn, gamma: float, lam: float) -> None:
    (rewards, values), width = drawn
    mask = lengths_mask([len(row) for row in rewards], width)
    found, returns = gae(
        padded(rewards, width) * mask, padded(values, width), mask, gamma=gamma, lam=lam
    )
    for b, (r, v) in enumerate(zip(rewards, values, strict=True)):
        after = [*v[1:], 0.0]
        deltas = [r[t] + gamma * after[t] - v[t] for t in range(len(r))]
        for t in range(width):
            expected = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(r)))
            assert math.isclose(found[b, t].item(), expected, abs_tol=TOLERANCE)
            assert math.isclose(
                returns[b, t].item(), expected + v[t] if t < len(r) else 0.0, abs_tol=TOLERANCE
            )


@QUICK
@given(responses(2), st.data(), UNIT)
def test_token_rewards_are_the_penalty_and_the_reward_at_the_end(
    drawn, data: st.DataObject, kl_coef: float
) -> None:
    (logprobs, references), width = drawn
    rewards = data.draw(st.lists(NUMBERS, min_size=len(logprobs), max_size=len(logprobs)))
    mask = lengths_mask([len(row) for row in logprobs], width)
    paid = torch.tensor(rewards, dtype=torch.float64)
    found = token_rewards(
        paid, padded(logprobs, width), padded(references, width), mask, kl_coef=kl_coef
    )
    for b, (policy, reference) in enumerate(zip(logprobs, references, strict=True)):
        for t in range(width):
            expected = (
                -kl_coef * (policy[t] - reference[t]) + rewards[b] * (t == len(policy) - 1)
                if t < len(policy)
                else 0.0
            )
            assert math.isclose(found[b, t].item(), expected, abs_tol=TOLERANCE)


@QUICK
@given(responses(1))
def test_whitening_gives_mean_0_and_variance_1(drawn) -> None:
    (rows,), width = drawn
    mask = lengths_mask([len(row) for row in rows], width)
    flat = [value for row in rows for value in row]
    found = whiten(padded(rows, width), mask)
    assert (found[~mask] == 0).all()
    mean = sum(flat) / max(1, len(flat))
    variance = sum((value - mean) ** 2 for value in flat) / max(1, len(flat) - 1)
    for value, white in zip(flat, found[mask].tolist(), strict=True):
        assert math.isclose(
            white, (value - mean) / math.sqrt(variance + 1e-8), rel_tol=1e-6, abs_tol=1e-6
        )


@QUICK
@given(st.lists(st.tuples(NUMBERS, st.integers(0, 4)), min_size=1, max_size=12))
def test_group_statistics_are_those_of_each_group_alone(samples: list[tuple[float, int]]) -> None:
    rewards = torch.tensor([reward for reward, _ in samples], dtype=torch.float64)
    groups = torch.tensor([group for _, group in samples])
    means, stds, others = (
        group_means(rewards, groups),
        group_stds(rewards, groups),
        leave_one_out(rewards, groups),
    )
    for i, (reward, group) in enumerate(samples):
        members = [r for r, g in samples if g == group]
        rest = [r for j, (r, g) in enumerate(samples) if g == group and j != i]
        mean = sum(members) / len(members)
        std = math.sqrt(sum((r - mean) ** 2 for r in members) / max(1, len(members) - 1))
        assert math.isclose(means[i].item(), mean, abs_tol=TOLERANCE)
        assert math.isclose(stds[i].item(), std, abs_tol=1e-6)
        assert math.isclose(
            others[i].item(), reward - sum(rest) / len(rest) if rest else 0.0, abs_tol=TOLERANCE
        )


@QUICK
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 200))
def test_micro_batches_hold_every_row_once_within_their_size(
    lengths: list[int], max_tokens: int
) -> None:
    batches = [
        rows.tolist() for rows in micro_batches(torch.tensor(lengths), max_tokens=max_tokens)
    ]
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    padded_sizes = [len(rows) * max(lengths[row] for row in rows) for rows in batches]
    assert all(
        size <= max_tokens or len(rows) == 1
        for size, rows in zip(padded_sizes, batches, strict=True)
    )
    in_order = [lengths[row] for rows in batches for row in rows]
    assert in_order == sorted(lengths)
    for rows, following in pairwise(batches):
        assert (len(rows) + 1) * lengths[
            following[0]
        ] > max_tokens  # else the next row would have fitted


TOKENS = st.integers(3, 99)
PAIR = st.tuples(st.lists(TOKENS, min_size=1, max_size=5), st.lists(TOKENS, max_size=5))


@QUICK
@given(st.lists(PAIR, min_size=1, max_size=5), st.data())
def test_a_batch_knows_which_position_predicts_which_token(pairs, data: st.DataObject) -> None:
    assume(any(response for _, response in pairs))
    batch = token_batch([prompt for prompt, _ in pairs], [response for _, response in pairs])
    assert batch.response_tokens().tolist() == [
        token for _, response in pairs for token in response
    ]
    expected = [
        (b, len(prompt) + t - 1)
        for b, (prompt, response) in enumerate(pairs)
        for t in range(len(response))
    ]
    assert (
        list(zip(*(index.tolist() for index in batch.predictor_index()), strict=True)) == expected
    )
    chosen = data.draw(st.lists(st.sampled_from(range(len(pairs))), min_size=1, max_size=4))
    part = batch.rows(torch.tensor(chosen))
    assert part.tokens.shape[1] == max(len(pairs[row][0]) + len(pairs[row][1]) for row in chosen)
    for row, tokens in zip(chosen, part.tokens.tolist(), strict=True):
        whole = [*pairs[row][0], *pairs[row][1]]
        assert tokens == whole + [0] * (len(tokens) - len(whole))


@st.composite
def graded(draw: st.DrawFn) -> Graded:
    value = draw(st.sampled_from(["3", "4", "5", "a", None]))
    verdict = (
        Verdict.NO_ANSWER if value is None else Verdict.CORRECT if value == "3" else Verdict.WRONG
    )
    return Graded(verdict=verdict, value=value, reason="")


SAMPLES = st.lists(
    st.tuples(graded(), st.integers(0, 3), st.sampled_from("xyz")), min_size=1, max_size=12
)


@QUICK
@given(SAMPLES)
def test_votes_are_counts_and_ties_go_to_the_value_seen_first(samples) -> None:
    grades = [grade for grade, _, _ in samples]
    for k, winner in enumerate(majority_curve(grades), 1):
        totals = Counter(grade.value for grade in grades[:k] if grade.value is not None)
        if not totals:
            assert winner is None
            continue
        first = next(
            grade
            for grade in grades
            if grade.value is not None and totals[grade.value] == max(totals.values())
        )
        assert winner is first


@QUICK
@given(SAMPLES)
def test_reranking_takes_the_best_score_among_texts_seen_first(samples) -> None:
    grades, scores, texts = ([each[i] for each in samples] for i in range(3))
    for k, winner in enumerate(rerank_curve(grades, texts, scores), 1):
        fresh = [i for i in range(k) if texts[i] not in texts[:i] and grades[i].value is not None]
        assert winner is (grades[max(fresh, key=lambda i: (scores[i], -i))] if fresh else None)


@QUICK
@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int, data: st.DataObject) -> None:
    correct, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = [bits for bits in range(2**n) if bits.bit_count() == k]
    hit = sum(bits & (2**correct - 1) != 0 for bits in subsets)
    assert math.isclose(pass_at_k(n, correct, k), Fraction(hit, len(subsets)), abs_tol=TOLERANCE)
