"""Code shared by the algorithms: the hooks that the RL loop calls, the clipped policy loss, and
pure functions of per-token tensors. A mask is True at the response tokens to include, and False at
all other positions, such as padding.

Every loss is a weighted sum over tokens. The weights are computed once for a whole minibatch, so
splitting the minibatch into micro-batches, or dividing it among processes, does not change the
gradient.
"""

from __future__ import annotations

import math
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
        """A copy of `batch` with added fields, such as advantages and returns, which `weights` and
        `loss` read. `batch` contains the solutions that `select` returned for a step, except those
        that are too long. This method must be pure."""

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
        if not self.drop_constant_groups:
            return list(solutions)
        rewards: dict[str, set[float]] = {}
        for solution in solutions:
            rewards.setdefault(solution.problem.id, set()).add(solution.reward)
        return [solution for solution in solutions if len(rewards[solution.problem.id]) > 1]

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


# --- rewards and advantages -----------------------------------------------------------------------


def token_rewards(
    rewards: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    response_mask: Tensor,
    *,
    kl_coef: float,
) -> Tensor:
    """Reward of each token. A KL penalty is subtracted at every token, and the task's reward is
    added at the last token.

        r_t = -β (log π(a_t) - log π_ref(a_t)) + [t is last] · reward

    β is `kl_coef`. Without `ref_logprobs`, there is no penalty. Shapes: rewards (B,), all others
    (B, R). The result is 0 where the mask is False. Source: ReFT (arXiv:2401.08967), §3.1.
    Differences: none.
    """
    last = response_mask.sum(1) - 1
    per_token = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        per_token = -kl_coef * (logprobs - ref_logprobs) * response_mask
    return per_token.scatter_add(
        1, last.clamp(min=0).unsqueeze(1), (rewards * (last >= 0)).unsqueeze(1)
    )


def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates and value targets for right-padded responses.

        δ_t = r_t + γ V_{t+1} - V_t        A_t = δ_t + γλ A_{t+1}        G_t = A_t + V_t

    V is 0 after the last sampled token, whether the response ended there or was cut off at the
    length limit. Both results are 0 where the mask is False. Shapes (B, R). λ is a number, or a
    tensor (B,) with one number per response. Source: PPO (arXiv:1707.06347), §5; ReFT
    (arXiv:2401.08967), §3.1. Differences: γ and λ are named as in ReFT's code; the ReFT paper swaps
    the two symbols.
    """
    values = values * response_mask
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = (rewards + gamma * next_values - values) * response_mask
    advantages = torch.zeros_like(deltas)
    running = deltas.new_zeros(len(deltas))
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, (advantages + values) * response_mask


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """`values`, standardised to zero mean and unit variance where the mask is True. The result is 0
    elsewhere.

        (x - mean) / sqrt(unbiased variance + 1e-8)

    Both tensors have the same shape. Source: ReFT's code, which whitens over the whole rollout.
    Differences: none.
    """
    count = mask.sum()
    mean = (values * mask).sum() / count.clamp(min=1)
    variance = ((values - mean) ** 2 * mask).sum() / (count - 1).clamp(min=1)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def group_means(rewards: Tensor, groups: Tensor) -> Tensor:
    """Mean reward of each sample's group, (B,). `groups` (B,) assigns the same integer to all
    samples of a problem."""
    sizes = torch.bincount(groups)
    totals = rewards.new_zeros(len(sizes)).index_add(0, groups, rewards)
    return totals[groups] / sizes[groups]


def group_deviations(rewards: Tensor, groups: Tensor) -> Tensor:
    """Each sample's reward minus the mean reward of its group, (B,). If all rewards in the group
    are equal, this is exactly 0."""
    lowest = rewards.new_zeros(len(torch.bincount(groups)))
    lowest = lowest.scatter_reduce(0, groups, rewards, "amin", include_self=False)
    above = rewards - lowest[groups]  # sums of the rewards themselves would be rounded
    return above - group_means(above, groups)


def group_sizes(groups: Tensor) -> Tensor:
    """Size of each sample's group, (B,)."""
    return torch.bincount(groups)[groups]


def truncated_importance(
    logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor, *, cap: float
) -> Tensor:
    """Importance weights (B, R) that correct for differences between the probabilities that the
    engine used when it drew the tokens (π_sample) and those that the trainer computes (π_train).
    The weights are 1 where the mask is False.

        w = min(π_train / π_sample, cap)

    Source: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training"
    (2025). Differences: none.
    """
    ratio = (logprobs - sampling_logprobs).exp().clamp(max=cap)
    return torch.where(mask, ratio, torch.ones_like(ratio))


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the variance of the returns G that the values V explain: 1 for perfect values, 0 for
    constant values, and below 0 if the errors vary more than the returns. Returns NaN if the
    variance of the returns is at most 1e-8, for example because all returns are equal.

        1 - Var(G - V) / Var(G)

    Inputs are (B, R).
    """
    returns, errors = returns[mask], (returns - values)[mask]
    variance = returns.var(correction=0)
    return torch.where(variance > 1e-8, 1 - errors.var(correction=0) / variance, math.nan)


# --- loss terms -----------------------------------------------------------------------------------


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
    """Clipped policy loss of each token, (B, R). A is the token's advantage.

        ρ = π / π_old        L = max(-A ρ, -A clip(ρ, 1 - ε_low, 1 + ε_high))

    Source: PPO (arXiv:1707.06347), eq. 7; asymmetric bounds: DAPO (arXiv:2503.14476), eq. 10.
    Differences: log ρ is clamped to ±20, so that ρ cannot overflow.
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    return torch.maximum(
        -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    )


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
