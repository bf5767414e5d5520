"""Proximal policy optimization with a value head: ReFT's own algorithm.

The defaults are taken from ReFT's code. docs/deviations.md lists where the paper and the code
disagree.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from reftune.algorithms.base import Clipped, LossTerms, gae, token_rewards, whiten
from reftune.model.batch import RolloutBatch
from reftune.model.policy import TokenScores


class Ppo(Clipped):
    """The KL penalty is part of the reward. The ReFT paper sets the penalty's weight β to
    0.01 for programs and 0.05 for natural-language solutions."""

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
        """A copy of `batch` with advantages (for the policy loss) and returns (for the value loss).
        Both are computed by GAE from the tokens' rewards, which include the KL penalty. The
        advantages are then whitened. Source: ReFT (arXiv:2401.08967), §3.1."""
        assert batch.values is not None
        mask = batch.response_mask
        rewards = token_rewards(
            batch.rewards, batch.logprobs, batch.ref_logprobs, mask, kl_coef=self.kl_coef
        )
        advantages, returns = gae(rewards, batch.values, mask, gamma=self.gamma, lam=self.lam)
        return replace(batch, advantages=whiten(advantages, mask), returns=returns)

    def loss(self, scores: TokenScores, batch: RolloutBatch) -> LossTerms:
        """The clipped policy loss plus `value_coef` times the value loss."""
        assert batch.values is not None and batch.returns is not None
        assert batch.weights is not None
        policy = super().loss(scores, batch)
        terms = value_terms(scores.values, batch.values, batch.returns, clip=self.value_clip)
        value = (terms * batch.weights).sum()
        return LossTerms(
            total=policy.total + self.value_coef * value,
            metrics={**policy.metrics, "value/loss": value.detach()},
        )


def value_terms(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """Clipped value loss of each token, (B, R). G is the return, and ε is `clip`.

        L = ½ max((V - G)², (clip(V, V_old ± ε) - G)²)

    Source: ReFT (arXiv:2401.08967), §3.1, as implemented in ReFT's code. Differences: none.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
