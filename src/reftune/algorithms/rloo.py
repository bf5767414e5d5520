"""REINFORCE leave-one-out: a sample's baseline is the mean reward of the problem's other samples,
so no value head is needed. Clipping allows several updates on the same samples."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from reftune.algorithms.base import Clipped, Reduction, group_deviations, group_sizes, token_rewards
from reftune.model.batch import RolloutBatch


class Rloo(Clipped):
    """The KL penalty is part of the reward."""

    reduction: Reduction = "token"

    @property
    def min_samples(self) -> int:
        return 2

    def credit(self, batch: RolloutBatch) -> RolloutBatch:
        """A copy of `batch` in which every token of a sample has the advantage

            A_i = S_i - mean of the group's other S_j      S = R - β Σ_t log (π / π_ref)

        where R is the sample's reward.
        Source: RLOO (arXiv:2402.14740). Differences: none.
        """
        mask = batch.response_mask
        earned = token_rewards(
            batch.rewards, batch.logprobs, batch.ref_logprobs, mask, kl_coef=self.kl_coef
        ).sum(1)
        return replace(batch, advantages=leave_one_out(earned, batch.groups)[:, None] * mask)


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """Each sample's reward minus the mean reward of its group's other samples, (B,). If the group
    has only one sample (K = 1), the result is 0.

        A_i = r_i - 1/(K-1) Σ_{j≠i} r_j = K/(K-1) · (r_i - m)

    Here, m is the mean reward of the whole group.

    Source: RLOO (arXiv:2402.14740), §2.3. Differences: none.
    """
    sizes = group_sizes(groups)
    return group_deviations(rewards, groups) * sizes / (sizes - 1).clamp(min=1)
