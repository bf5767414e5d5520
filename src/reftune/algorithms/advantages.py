"""Turns rewards and values into advantages and returns. A mask is True at the response tokens to
include, and False at all other positions, such as padding."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
    (B, R). The result is 0 where the mask is False. Source: ReFT (arXiv:2401.08967), §3.1. Differs:
    none.
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
    (arXiv:2401.08967), §3.1. Differs: γ and λ are named as in ReFT's code; the ReFT paper swaps the
    two symbols.
    """
    values = values * response_mask
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = (rewards + gamma * next_values - values) * response_mask
    advantages = torch.zeros_like(deltas)
    running = (
        torch.zeros_like(deltas[:, 0]) if deltas.shape[1] else deltas.new_zeros(deltas.shape[0])
    )
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, (advantages + values) * response_mask


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """`values`, standardised to zero mean and unit variance where the mask is True. The result is 0
    elsewhere.

        (x - mean) / sqrt(unbiased variance + 1e-8)

    Both tensors have the same shape. Source: ReFT's code, which whitens over the whole rollout.
    Differs: none.
    """
    count = mask.sum()
    mean = (values * mask).sum() / count.clamp(min=1)
    variance = ((values - mean) ** 2 * mask).sum() / (count - 1).clamp(min=1)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def truncated_importance(
    logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor, *, cap: float
) -> Tensor:
    """Importance weights (B, R) that correct for differences between the sampler and the policy.
    They are 1 where the mask is False.

        w = min(π_train / π_sample, cap)

    Source: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training"
    (2025). Differs: none.
    """
    ratio = (logprobs - sampling_logprobs).exp().clamp(max=cap)
    return torch.where(mask, ratio, torch.ones_like(ratio))


def group_means(rewards: Tensor, groups: Tensor) -> Tensor:
    """Mean reward of each sample's group, (B,). `groups` (B,) assigns the same integer to all
    samples of a problem."""
    num_groups = int(groups.max()) + 1 if groups.numel() else 0
    totals = rewards.new_zeros(num_groups).index_add(0, groups, rewards)
    counts = rewards.new_zeros(num_groups).index_add(0, groups, torch.ones_like(rewards))
    return (totals / counts.clamp(min=1))[groups]


def group_sizes(groups: Tensor) -> Tensor:
    """Size of each sample's group, (B,)."""
    return torch.bincount(groups)[groups]


def group_stds(rewards: Tensor, groups: Tensor) -> Tensor:
    """Standard deviation of the rewards in each sample's group, (B,). It is the square root of the
    unbiased variance. For a group of one sample, it is 0."""
    squares = group_means((rewards - group_means(rewards, groups)) ** 2, groups)
    sizes = group_sizes(groups)
    return (squares * sizes / (sizes - 1).clamp(min=1)).sqrt()


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """Each sample's reward minus the mean reward of its group's other samples, (B,). If the group
    has only one sample (K = 1), the result is 0.

        A_i = r_i - 1/(K-1) Σ_{j≠i} r_j = K/(K-1) · (r_i - mean)

    Source: RLOO (arXiv:2402.14740), §2.3. Differs: none.
    """
    sizes = group_sizes(groups)
    return (rewards - group_means(rewards, groups)) * sizes / (sizes - 1).clamp(min=1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the returns' variance that the values explain: 1 for perfect values, 0 for constant
    values, and below 0 if the errors vary more than the returns. NaN if all returns are equal.

        1 - Var(G - V) / Var(G)

    Inputs are (B, R).
    """
    returns, errors = returns[mask], (returns - values)[mask]
    variance = returns.var(correction=0)
    return torch.where(variance > 1e-8, 1 - errors.var(correction=0) / variance, math.nan)
