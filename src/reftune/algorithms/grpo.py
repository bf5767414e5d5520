"""Group-relative policy optimization: a sample's baseline is the mean reward of all samples for the
same problem."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from reftune.algorithms.base import Clipped, LossTerms, group_deviations, group_means, group_sizes
from reftune.model.batch import RolloutBatch
from reftune.model.policy import TokenScores

STD_FLOOR = 1e-4
"""Added to a group's standard deviation, which is 0 if all rewards in the group are equal."""


class Grpo(Clipped):
    """The KL penalty is part of the loss. `reduction: sequence` favours correct answers that are
    short; `reduction: token` does not (DAPO, arXiv:2503.14476)."""

    scale: Literal["std", "none"] = "std"
    """`std` divides a sample's advantage by the standard deviation of its problem's rewards. `none`
    does not (Dr. GRPO)."""

    @property
    def min_samples(self) -> int:
        return 2

    def credit(self, batch: RolloutBatch) -> RolloutBatch:
        """A copy of `batch` in which every token of a sample has the advantage

            A = (r - mean of the group's r) / (standard deviation of the group's r + 1e-4)

        where r is a sample's reward. With `scale: none`, only the numerator is used. Source: GRPO
        (arXiv:2402.03300), §4.1.2. Differences: 1e-4 is added, and the standard deviation uses the
        unbiased variance.
        """
        advantages = group_deviations(batch.rewards, batch.groups)
        if self.scale == "std":
            advantages = advantages / (group_stds(batch.rewards, batch.groups) + STD_FLOOR)
        return replace(batch, advantages=advantages[:, None] * batch.response_mask)

    def loss(self, scores: TokenScores, batch: RolloutBatch) -> LossTerms:
        """The clipped policy loss plus `kl_coef` times the KL penalty."""
        policy = super().loss(scores, batch)
        if batch.ref_logprobs is None:
            return policy
        assert batch.weights is not None
        kl = (kl_terms(scores.logprobs, batch.ref_logprobs) * batch.weights).sum()
        return LossTerms(
            total=policy.total + self.kl_coef * kl,
            metrics={**policy.metrics, "kl/penalty": kl.detach()},
        )


def group_stds(rewards: Tensor, groups: Tensor) -> Tensor:
    """Standard deviation of the rewards in each sample's group, (B,). It is the square root of the
    unbiased variance. For a group of one sample, it is 0."""
    squares = group_means(group_deviations(rewards, groups) ** 2, groups)
    sizes = group_sizes(groups)
    return (squares * sizes / (sizes - 1).clamp(min=1)).sqrt()


def kl_terms(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(π ‖ π_ref) from each sampled token, (B, R). The estimate is never negative,
    and it is unbiased if the tokens were sampled from π.

        k3 = π_ref/π - log(π_ref/π) - 1

    Source: GRPO (arXiv:2402.03300), eq. 4. Differences: the log-ratio is clamped to ±20, as in
    `ppo_policy_terms`.
    """
    log_ratio = (ref_logprobs - logprobs).clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1
