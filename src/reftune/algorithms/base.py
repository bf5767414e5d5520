"""What algorithms share: the hooks that the RL loop calls, and the clipped policy loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from reftune.algorithms.losses import Reduction, policy_metrics, ppo_policy_terms, token_weights
from reftune.recipe import Component

if TYPE_CHECKING:
    from torch import Tensor

    from reftune.model.batch import RolloutBatch
    from reftune.model.encoder import Encoder
    from reftune.model.policy import TokenScores
    from reftune.types import Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerms:
    """The part of the loss that a micro-batch adds, and metrics to be summed over micro-batches
    (`…_max`: maximised)."""

    total: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Algorithm(Component, ABC):
    """Two hooks to write, `credit` and `loss`, and two to change; the loop that calls them does not
    know which algorithm it runs."""

    needs_values: ClassVar[bool] = False
    """Whether `credit` reads `values`, and the value head is trained."""

    @property
    def needs_reference(self) -> bool:
        """Whether `credit` or `loss` reads `ref_logprobs`."""
        return False

    @property
    def min_samples(self) -> int:
        """Samples a problem below which nothing would be learned."""
        return 1

    @property
    def discount(self) -> float:
        """γ of the returns that the value head is fitted to before training."""
        return 1.0

    @property
    def trains_with_dropout(self) -> bool:
        """Whether dropout is active in the update."""
        return False

    def select(self, rollouts: Sequence[Rollout], encoder: Encoder) -> list[Rollout]:
        """The rollouts to train on; may drop some or add others (gold rationales, say)."""
        return list(rollouts)

    @abstractmethod
    def credit(self, batch: RolloutBatch) -> RolloutBatch:
        """The whole rollout with what `weights` and `loss` read filled in: advantages, say, and
        returns. Pure."""

    def weights(self, batch: RolloutBatch) -> Tensor:
        """(B, R) share of each token in the loss of a minibatch. Pure."""
        return token_weights(batch.response_mask, "token")

    @abstractmethod
    def loss(self, scores: TokenScores, batch: RolloutBatch) -> LossTerms:
        """A micro-batch's loss, weighted by `batch.weights`. Pure."""


class Clipped(Algorithm, ABC):
    """An algorithm with advantages and PPO's clipped policy loss; `credit` is left to write."""

    kl_coef: float = Field(0.01, ge=0)
    """β, weight of the KL penalty; 0 needs no reference model."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    reduction: Reduction = "sequence"
    """`sequence`: mean over each response, then over responses; `token`: mean over all tokens."""
    drop_constant_groups: bool = False
    """Leave out problems whose samples all earned the same reward; needs several samples per
    problem."""

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def min_samples(self) -> int:
        return 2 if self.drop_constant_groups else 1

    def select(self, rollouts: Sequence[Rollout], encoder: Encoder) -> list[Rollout]:
        return with_contrast(rollouts) if self.drop_constant_groups else list(rollouts)

    def weights(self, batch: RolloutBatch) -> Tensor:
        return token_weights(batch.response_mask, self.reduction)

    def loss(self, scores: TokenScores, batch: RolloutBatch) -> LossTerms:
        """The clipped policy loss."""
        assert batch.advantages is not None and batch.weights is not None
        clip = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        terms = ppo_policy_terms(scores.logprobs, batch.logprobs, batch.advantages, **clip)
        policy = (terms * batch.weights).sum()
        moved = policy_metrics(scores.logprobs, batch.logprobs, weights=batch.weights, **clip)
        return LossTerms(total=policy, metrics={"policy/loss": policy.detach(), **moved})


def with_contrast(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Those of problems whose samples did not all earn the same."""
    rewards: dict[str, set[float]] = {}
    for rollout in rollouts:
        rewards.setdefault(rollout.problem.id, set()).add(rollout.reward)
    return [rollout for rollout in rollouts if len(rewards[rollout.problem.id]) > 1]
