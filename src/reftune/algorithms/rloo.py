"""REINFORCE leave-one-out: a sample's baseline is the mean of the problem's other samples; no value
head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from reftune.algorithms.advantages import leave_one_out, token_rewards
from reftune.algorithms.base import LossTerms
from reftune.algorithms.losses import Reduction, policy_metrics, ppo_policy_terms, token_weights
from reftune.model.batch import RolloutBatch
from reftune.model.encoder import Encoder
from reftune.model.policy import TokenScores
from reftune.recipe import Component
from reftune.types import Rollout


class Rloo(Component):
    kind: Literal["rloo"] = "rloo"
    kl_coef: float = Field(0.01, ge=0)
    """β of the KL penalty in the reward."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    reduction: Reduction = "token"
    """`token` is the published sum over a sample's tokens up to one factor a rollout; `sequence`
    makes long samples weigh as much as short ones."""

    needs_values: ClassVar[bool] = False
    min_samples: ClassVar[int] = 2
    dropout: ClassVar[bool] = False

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    def select(self, rollouts: Sequence[Rollout], encoder: Encoder) -> list[Rollout]:
        return list(rollouts)

    def credit(self, batch: RolloutBatch) -> RolloutBatch:
        """Every token of a sample gets

            A_i = R_i - mean of the group's other R_j        R = r - β Σ_t (log π(a_t) - log
            π_ref(a_t))

        Source: RLOO (arXiv:2402.14740). Differs: none.
        """
        mask = batch.response_mask
        earned = token_rewards(
            batch.rewards, batch.logprobs, batch.ref_logprobs, mask, kl_coef=self.kl_coef
        ).sum(1)
        return replace(batch, advantages=leave_one_out(earned, batch.groups)[:, None] * mask)

    def weights(self, batch: RolloutBatch) -> Tensor:
        return token_weights(batch.response_mask, self.reduction)

    def loss(self, scores: TokenScores, batch: RolloutBatch) -> LossTerms:
        """The clipped policy loss. Its gradient at the sampling policy is REINFORCE's; clipping
        makes later updates safe."""
        assert batch.advantages is not None and batch.weights is not None
        weights, clip = batch.weights, {"clip_low": self.clip_low, "clip_high": self.clip_high}
        policy = (
            ppo_policy_terms(scores.logprobs, batch.logprobs, batch.advantages, **clip) * weights
        ).sum()
        metrics = policy_metrics(scores.logprobs, batch.logprobs, weights=weights, **clip)
        return LossTerms(total=policy, metrics={"policy/loss": policy.detach(), **metrics})
