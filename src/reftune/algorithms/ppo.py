"""Proximal policy optimization with a value head: ReFT's own algorithm.

The defaults are the authors' code (preset `paper`); docs/deviations.md tells where paper and code
disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from reftune.algorithms.advantages import gae, token_rewards, whiten
from reftune.algorithms.base import LossTerms, with_contrast
from reftune.algorithms.losses import (
    Reduction,
    policy_metrics,
    ppo_policy_terms,
    token_weights,
    value_terms,
)
from reftune.model.batch import RolloutBatch
from reftune.model.encoder import Encoder
from reftune.model.policy import TokenScores
from reftune.recipe import Component
from reftune.types import Rollout


class Ppo(Component):
    kind: str = "ppo"
    kl_coef: float = Field(0.01, ge=0)
    """β of the KL penalty in the reward. The paper: 0.01 for programs, 0.05 for natural language.
    """
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount of later rewards."""
    lam: float = Field(0.95, ge=0, le=1)
    """λ of the policy's advantages."""
    value_lam: float | None = Field(None, ge=0, le=1)
    """λ of the value targets; None: the same as `lam`. 1 makes them plain returns (VC-PPO,
    arXiv:2503.01491)."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    value_clip: float = Field(0.2, gt=0)
    value_coef: float = Field(5.0, ge=0)
    """Weight of the value loss."""
    reduction: Reduction = "sequence"
    """`sequence`: mean over each response, then over responses; `token`: mean over all tokens."""
    drop_constant_groups: bool = False
    """Leave out problems whose samples all earned the same reward; needs several samples a problem.
    """
    positive_nll_coef: float = Field(0.0, ge=0)
    """Weight of the negative log-likelihood of correct samples, a mean over their tokens (VAPO,
    arXiv:2504.05118)."""

    needs_values: ClassVar[bool] = True
    dropout: ClassVar[bool] = False

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def min_samples(self) -> int:
        return 2 if self.drop_constant_groups else 1

    def select(self, rollouts: Sequence[Rollout], encoder: Encoder) -> list[Rollout]:
        return with_contrast(rollouts) if self.drop_constant_groups else list(rollouts)

    def credit(self, batch: RolloutBatch) -> RolloutBatch:
        assert batch.values is not None
        mask = batch.response_mask
        rewards = token_rewards(
            batch.rewards, batch.logprobs, batch.ref_logprobs, mask, kl_coef=self.kl_coef
        )
        advantages, returns = gae(rewards, batch.values, mask, gamma=self.gamma, lam=self.lam)
        if self.value_lam is not None:
            _, returns = gae(rewards, batch.values, mask, gamma=self.gamma, lam=self.value_lam)
        positives = token_weights(mask & (batch.correct > 0)[:, None], "token")
        return replace(
            batch, advantages=whiten(advantages, mask), returns=returns, nll_weights=positives
        )

    def weights(self, batch: RolloutBatch) -> Tensor:
        return token_weights(batch.response_mask, self.reduction)

    def loss(self, scores: TokenScores, batch: RolloutBatch) -> LossTerms:
        """policy + value_coef · value (+ positive_nll_coef · NLL of correct samples)."""
        assert (
            batch.advantages is not None and batch.returns is not None and batch.values is not None
        )
        assert batch.weights is not None
        weights = batch.weights
        clip = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        policy = (
            ppo_policy_terms(scores.logprobs, batch.logprobs, batch.advantages, **clip) * weights
        ).sum()
        value = (
            value_terms(scores.values, batch.values, batch.returns, clip=self.value_clip) * weights
        ).sum()
        total = policy + self.value_coef * value
        metrics = {"policy/loss": policy.detach(), "value/loss": value.detach()}
        if self.positive_nll_coef > 0:
            assert batch.nll_weights is not None
            nll = -(scores.logprobs * batch.nll_weights).sum()
            total = total + self.positive_nll_coef * nll
            metrics["policy/positive_nll"] = nll.detach()
        metrics |= policy_metrics(scores.logprobs, batch.logprobs, weights=weights, **clip)
        return LossTerms(total=total, metrics=metrics)
