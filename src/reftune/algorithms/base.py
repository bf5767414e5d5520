"""Code shared by the algorithms: the hooks that the RL loop calls, the clipped policy loss, and
pure functions that compute loss terms from per-token tensors.

Every loss is a weighted sum over tokens. The weights are computed once for a whole minibatch, so
splitting the minibatch into micro-batches, or dividing it among processes, does not change the
gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from reftune.recipe import Component

if TYPE_CHECKING:
    from reftune.model.batch import RolloutBatch
    from reftune.model.encoder import Encoder
    from reftune.model.policy import TokenScores
    from reftune.types import Solution

Reduction = Literal["sequence", "token"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerms:
    """A micro-batch's part of the loss, and the micro-batch's metrics. Both are summed over
    micro-batches. For metrics named `…_max`, the largest value is kept instead."""

    total: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Algorithm(Component, ABC):
    """The base class of algorithms. A subclass defines the hooks `credit` and `loss`, and may
    override the other hooks."""

    sets_advantages: ClassVar[bool] = True
    """Whether `credit` sets the batch's `advantages`, which the stage's `mismatch_cap` needs."""
    needs_values: ClassVar[bool] = False
    """Whether `credit` reads the batch's `values` and `loss` trains the value head."""

    @property
    def needs_reference(self) -> bool:
        """Whether `credit` or `loss` reads the batch's `ref_logprobs`."""
        return False

    @property
    def min_samples(self) -> int:
        """Smallest number of samples per problem from which the algorithm can learn."""
        return 1

    @property
    def discount(self) -> float:
        """The discount factor γ of the returns that the value head learns before the stage's first
        step (`value_prefit`)."""
        return 1.0

    @property
    def trains_with_dropout(self) -> bool:
        """Whether dropout is active during updates."""
        return False

    def select(self, solutions: Sequence[Solution], encoder: Encoder) -> list[Solution]:
        """The solutions to train on. A subclass may drop some or add others, such as gold
        solutions."""
        return list(solutions)

    @abstractmethod
    def credit(self, batch: RolloutBatch) -> RolloutBatch:
        """A copy of `batch` to which fields such as advantages and returns are added, for `weights`
        and `loss` to read. `batch` contains all selected samples of a step. This method must be
        pure."""

    def weights(self, batch: RolloutBatch) -> Tensor:
        """The weights (B, R) of the tokens in the loss of a minibatch. This method must be pure."""
        return token_weights(batch.response_mask, "token")

    @abstractmethod
    def loss(self, scores: TokenScores, batch: RolloutBatch) -> LossTerms:
        """A micro-batch's part of the loss, weighted by `batch.weights`. This method must be
        pure."""


class Clipped(Algorithm, ABC):
    """The base class of algorithms with PPO's clipped policy loss. Subclasses define `credit`."""

    kl_coef: float = Field(0.01, ge=0)
    """Weight β of the KL penalty. With 0, no reference model is needed."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """Ratios π / π_old below 1 − `clip_low` are clipped."""
    clip_high: float = Field(0.2, gt=0)
    """Ratios π / π_old above 1 + `clip_high` are clipped."""
    reduction: Reduction = "sequence"
    """`sequence` averages the loss over the tokens of each response, then over responses. `token`
    averages it over all tokens."""
    drop_constant_groups: bool = False
    """Skip problems whose samples all earned the same reward."""

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def min_samples(self) -> int:
        return 2 if self.drop_constant_groups else 1

    def select(self, solutions: Sequence[Solution], encoder: Encoder) -> list[Solution]:
        return with_contrast(solutions) if self.drop_constant_groups else list(solutions)

    def weights(self, batch: RolloutBatch) -> Tensor:
        return token_weights(batch.response_mask, self.reduction)

    def loss(self, scores: TokenScores, batch: RolloutBatch) -> LossTerms:
        assert batch.advantages is not None, f"{type(self).__name__}.credit set no advantages"
        assert batch.weights is not None
        clip = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        terms = ppo_policy_terms(scores.logprobs, batch.logprobs, batch.advantages, **clip)
        policy = (terms * batch.weights).sum()
        moved = policy_metrics(scores.logprobs, batch.logprobs, weights=batch.weights, **clip)
        return LossTerms(total=policy, metrics={"policy/loss": policy.detach(), **moved})


def with_contrast(solutions: Sequence[Solution]) -> list[Solution]:
    """The samples of those problems whose samples did not all earn the same reward."""
    rewards: dict[str, set[float]] = {}
    for solution in solutions:
        rewards.setdefault(solution.problem.id, set()).add(solution.reward)
    return [solution for solution in solutions if len(rewards[solution.problem.id]) > 1]


# --- per-token tensors ----------------------------------------------------------------------------


def token_weights(response_mask: Tensor, reduction: Reduction) -> Tensor:
    """Weights (B, R) that turn a sum over tokens into the mean that `reduction` names. They are 0
    where the mask is False.

    `sequence` averages over the tokens of each response, then over responses, as in ReFT's code.
    `token` averages over all tokens.
    """
    mask = response_mask.float()
    if reduction == "token":
        return mask / mask.sum().clamp(min=1)
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / max(len(mask), 1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values where the mask is True; 0 if the mask is False everywhere."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def ppo_policy_terms(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Clipped policy loss of each token, (B, R).

        ρ = π / π_old        L = max(-A ρ, -A clip(ρ, 1 - ε_low, 1 + ε_high))

    Source: PPO (arXiv:1707.06347), eq. 7; asymmetric bounds: DAPO (arXiv:2503.14476), eq. 10.
    Differs: log ρ is clamped to ±20, so that ρ cannot overflow.
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    return torch.maximum(
        -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    )


def kl_terms(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(π ‖ π_ref) from each sampled token, (B, R). The estimate is never negative,
    and it is unbiased if the tokens were sampled from π.

        k3 = π_ref/π - log(π_ref/π) - 1

    Source: GRPO (arXiv:2402.03300), eq. 4. Differs: the log-ratio is clamped to ±20, as in
    `ppo_policy_terms`.
    """
    log_ratio = (ref_logprobs - logprobs).clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1


def value_terms(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """Clipped value loss of each token, (B, R).

        L = ½ max((V - G)², (clip(V, V_old ± ε) - G)²)

    Source: ReFT (arXiv:2401.08967), §3.1, as implemented in ReFT's code. Differs: none.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def policy_metrics(
    logprobs: Tensor, old_logprobs: Tensor, *, clip_low: float, clip_high: float, weights: Tensor
) -> dict[str, Tensor]:
    """Metrics that measure how far the policy has moved from the policy that drew the samples.
    `policy/ratio_max` is the maximum over tokens. The other metrics are means over tokens, weighted
    by `weights`."""
    log_ratio = (logprobs - old_logprobs).detach().clamp(-20, 20)
    ratio = log_ratio.exp()
    clipped = ((ratio < 1 - clip_low) | (ratio > 1 + clip_high)).float()
    return {
        "policy/approx_kl": ((ratio - 1 - log_ratio) * weights).sum(),
        "policy/clip_fraction": (clipped * weights).sum(),
        "policy/ratio_max": torch.where(weights > 0, ratio, 0).max()
        if ratio.numel()
        else ratio.sum(),
    }
