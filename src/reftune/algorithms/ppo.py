"""Proximal policy optimization with a value head: ReFT's own algorithm.

The defaults are taken from ReFT's code. docs/deviations.md lists where the paper and the code
disagree.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from reftune.algorithms.advantages import gae, token_rewards, whiten
from reftune.algorithms.base import Clipped, LossTerms, value_terms
from reftune.model.batch import RolloutBatch
from reftune.model.policy import TokenScores


class Ppo(Clipped):
    """The KL penalty is part of the reward. The paper sets the penalty's weight β to 0.01 for
    programs and 0.05 for solutions in words."""

    kind: str = "ppo"
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount factor for future rewards."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE's λ."""
    value_clip: float = Field(0.2, gt=0)
    """In the value loss, a token's value is clipped so that it differs by at most this much from
    its value before the updates."""
    value_coef: float = Field(5.0, ge=0)
    """Weight of the value loss."""

    needs_values: ClassVar[bool] = True

    @property
    def discount(self) -> float:
        return self.gamma

    def credit(self, batch: RolloutBatch) -> RolloutBatch:
        """`batch` with whitened advantages for the policy and returns for the value head. Both come
        from GAE over the tokens' rewards, which include the KL penalty. Source: ReFT
        (arXiv:2401.08967), §3.1."""
        assert batch.values is not None
        mask = batch.response_mask
        rewards = token_rewards(
            batch.rewards, batch.logprobs, batch.ref_logprobs, mask, kl_coef=self.kl_coef
        )
        advantages, returns = gae(rewards, batch.values, mask, gamma=self.gamma, lam=self.lam)
        return replace(batch, advantages=whiten(advantages, mask), returns=returns)

    def loss(self, scores: TokenScores, batch: RolloutBatch) -> LossTerms:
        """policy loss + value_coef · value loss."""
        assert batch.values is not None and batch.returns is not None
        assert batch.weights is not None
        policy = super().loss(scores, batch)
        terms = value_terms(scores.values, batch.values, batch.returns, clip=self.value_clip)
        value = (terms * batch.weights).sum()
        return LossTerms(
            total=policy.total + self.value_coef * value,
            metrics={**policy.metrics, "value/loss": value.detach()},
        )
