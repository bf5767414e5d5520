"""Group-relative policy optimization: the samples of one problem are each other's baseline; no
value head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from reftune.algorithms.advantages import group_means, group_stds
from reftune.algorithms.base import LossTerms, with_contrast
from reftune.algorithms.losses import (
    Reduction,
    kl_terms,
    policy_metrics,
    ppo_policy_terms,
    token_weights,
)
from reftune.model.batch import RolloutBatch
from reftune.model.encoder import Encoder
from reftune.model.policy import TokenScores
from reftune.recipe import Component
from reftune.types import Rollout

STD_FLOOR = 1e-4
"""Added to a group's standard deviation, so that equal rewards divide by something."""


class Grpo(Component):
    kind: Literal["grpo"] = "grpo"
    scale: Literal["std", "none"] = "std"
    """Advantages are divided by their group's standard deviation, or not (Dr. GRPO,
    arXiv:2503.20783). With `std` a partial reward is worth as much as a full one: a group that
    earned 0 and 0.1 teaches the same as one that earned 0 and 1."""
    kl_coef: float = Field(0.01, ge=0)
    """β of the KL penalty, which is part of the loss."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    reduction: Reduction = "sequence"
    """`sequence` as published. `token` (DAPO, arXiv:2503.14476) does not favour short right
    answers; Dr. GRPO's constant divisor differs from it by one factor a rollout."""
    drop_constant_groups: bool = False
    """Leave out problems whose samples all earned the same reward: they have no advantage, and only
    the KL acts on them."""

    needs_values: ClassVar[bool] = False
    min_samples: ClassVar[int] = 2
    dropout: ClassVar[bool] = False

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    def select(self, rollouts: Sequence[Rollout], encoder: Encoder) -> list[Rollout]:
        return with_contrast(rollouts) if self.drop_constant_groups else list(rollouts)

    def credit(self, batch: RolloutBatch) -> RolloutBatch:
        """Every token of a sample gets

            A = (r - mean of the group) / (standard deviation of the group + 1e-4)

        or the numerator alone. Source: GRPO (arXiv:2402.03300), §4.1.2. Differs: the floor, and the
        deviation is unbiased.
        """
        advantages = batch.rewards - group_means(batch.rewards, batch.groups)
        if self.scale == "std":
            advantages = advantages / (group_stds(batch.rewards, batch.groups) + STD_FLOOR)
        return replace(batch, advantages=advantages[:, None] * batch.response_mask)

    def weights(self, batch: RolloutBatch) -> Tensor:
        return token_weights(batch.response_mask, self.reduction)

    def loss(self, scores: TokenScores, batch: RolloutBatch) -> LossTerms:
        """clipped policy loss + kl_coef · KL to the reference"""
        assert batch.advantages is not None and batch.weights is not None
        weights, clip = batch.weights, {"clip_low": self.clip_low, "clip_high": self.clip_high}
        policy = (
            ppo_policy_terms(scores.logprobs, batch.logprobs, batch.advantages, **clip) * weights
        ).sum()
        metrics = {
            "policy/loss": policy.detach(),
            **policy_metrics(scores.logprobs, batch.logprobs, weights=weights, **clip),
        }
        if batch.ref_logprobs is None:
            return LossTerms(total=policy, metrics=metrics)
        kl = (kl_terms(scores.logprobs, batch.ref_logprobs) * weights).sum()
        return LossTerms(
            total=policy + self.kl_coef * kl, metrics={**metrics, "kl/penalty": kl.detach()}
        )
