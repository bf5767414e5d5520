"""The contract of every algorithm. A new file in src/reftune/algorithms joins automatically; those
of recipes/demo/critics.py are listed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from reftune.algorithms.base import Algorithm
from reftune.model.batch import RolloutBatch
from reftune.model.policy import TokenScores
from reftune.recipe import known_kinds, load_component

KINDS = [
    *known_kinds("algorithms"),
    *(f"demo/critics.py:{name}" for name in ("LambdaByLength", "Evpo", "Bpco")),
]
each_algorithm = pytest.mark.parametrize("kind", KINDS)


def trained_batch(trainer: Any) -> RolloutBatch:
    """A rollout of the trainer, credited and weighted."""
    solutions, _ = trainer.sample(1, "rollout")
    selected = trainer.algorithm.select(solutions, trainer.context.collector.encoder)
    batch, _ = trainer.score(selected)
    batch = trainer.algorithm.credit(batch)
    return replace(batch, weights=trainer.algorithm.weights(batch))


def total(algorithm: Algorithm, policy: Any, batch: RolloutBatch) -> float:
    with torch.no_grad():
        scores: TokenScores = policy(batch.tokens)
        return float(algorithm.loss(scores, batch).total)


@pytest.fixture
def trainer_of(make_trainer):
    return lambda kind: make_trainer({"algorithm": {"kind": kind}, "prompts": 4, "samples": 4})


def test_the_suite_finds_the_algorithms_by_their_files() -> None:
    assert {"ppo", "grpo", "rloo", "online_st"} <= set(KINDS)
    assert all(isinstance(load_component(k, group="algorithms"), Algorithm) for k in KINDS)


@each_algorithm
def test_a_step_changes_weights_and_its_numbers_are_finite(kind: str, trainer_of) -> None:
    trainer = trainer_of(kind)
    before = {name: value.clone() for name, value in trainer.policy.named_parameters()}
    metrics = trainer.step(1)
    assert metrics["compute/sequence_passes"] > 0
    assert all(math.isfinite(value) for value in metrics.values())
    changed = {n for n, v in trainer.policy.named_parameters() if not torch.equal(v, before[n])}
    assert changed
    has_moved_head = any(name.startswith("value_head.") for name in changed)
    assert has_moved_head == trainer.algorithm.needs_values


@each_algorithm
def test_the_loss_of_a_batch_is_the_sum_over_its_parts(kind: str, trainer_of) -> None:
    trainer = trainer_of(kind)
    batch = trained_batch(trainer)
    trainer.policy.eval()
    rows = torch.arange(len(batch))
    parts = sum(
        total(trainer.algorithm, trainer.policy, batch.rows(part)) for part in rows.split(3)
    )
    whole = total(trainer.algorithm, trainer.policy, batch)
    assert parts == pytest.approx(whole, abs=1e-5)


@each_algorithm
def test_the_order_of_the_samples_does_not_matter(kind: str, trainer_of) -> None:
    trainer = trainer_of(kind)
    solutions, _ = trainer.sample(1, "rollout")
    selected = trainer.algorithm.select(solutions, trainer.context.collector.encoder)
    trainer.policy.eval()

    def loss(order: list[int]) -> float:
        batch, _ = trainer.score([selected[i] for i in order])
        batch = trainer.algorithm.credit(batch)
        batch = replace(batch, weights=trainer.algorithm.weights(batch))
        with torch.no_grad():  # a policy that has moved a little, so that ratios are not all 1
            scores = trainer.policy(batch.tokens)
            moved = scores._replace(logprobs=scores.logprobs * 1.01)
            return float(trainer.algorithm.loss(moved, batch).total)

    order = list(range(len(selected)))
    assert loss(order[::-1]) == pytest.approx(loss(order), abs=1e-5)


@each_algorithm
def test_the_algorithm_states_which_scores_it_needs(kind: str, trainer_of) -> None:
    """Scores that an algorithm claims not to need may be missing."""
    trainer = trainer_of(kind)
    solutions, _ = trainer.sample(1, "rollout")
    selected = trainer.algorithm.select(solutions, trainer.context.collector.encoder)
    batch, _ = trainer.score(selected)
    assert (batch.ref_logprobs is not None) == trainer.algorithm.needs_reference
    if not trainer.algorithm.needs_values:
        batch = replace(batch, values=None)
    batch = trainer.algorithm.credit(batch)
    batch = replace(batch, weights=trainer.algorithm.weights(batch))
    assert math.isfinite(total(trainer.algorithm, trainer.policy, batch))
