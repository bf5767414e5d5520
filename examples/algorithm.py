"""An algorithm of your own: REINFORCE with the rollout's mean reward as baseline. The loop around
it does not change.

In a recipe's stage of kind rl: `algorithm: {kind: examples/algorithm.py:Reinforce}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from reftune.algorithms.base import LossTerms
from reftune.algorithms.losses import policy_metrics, token_weights
from reftune.model.batch import RolloutBatch
from reftune.model.encoder import Encoder
from reftune.model.policy import TokenScores
from reftune.recipe import Component
from reftune.types import Rollout


class Reinforce(Component):
    baseline: bool = True
    """Whether the mean reward is taken off."""

    needs_reference: ClassVar[bool] = False
    needs_values: ClassVar[bool] = False
    min_samples: ClassVar[int] = 1
    dropout: ClassVar[bool] = False

    def select(self, rollouts: Sequence[Rollout], encoder: Encoder) -> list[Rollout]:
        return list(rollouts)

    def credit(self, batch: RolloutBatch) -> RolloutBatch:
        """A = r − mean r, the same for every token of a solution."""
        earned = batch.rewards - batch.rewards.mean() if self.baseline else batch.rewards
        return replace(batch, advantages=earned[:, None] * batch.response_mask)

    def weights(self, batch: RolloutBatch) -> Tensor:
        return token_weights(batch.response_mask, "token")

    def loss(self, scores: TokenScores, batch: RolloutBatch) -> LossTerms:
        """L = − Σ A log π, weighted by `batch.weights` so that cutting a rollout into micro-batches
        changes nothing."""
        assert batch.advantages is not None and batch.weights is not None
        loss = -(batch.advantages * scores.logprobs * batch.weights).sum()
        moved = policy_metrics(
            scores.logprobs, batch.logprobs, weights=batch.weights, clip_low=0.2, clip_high=0.2
        )
        return LossTerms(total=loss, metrics={"policy/loss": loss.detach(), **moved})
