"""Losses: pure functions of per-token tensors.

Every loss is a weighted sum over tokens. The weights come from `token_weights`, made once for a
whole minibatch, so splitting it into micro-batches or over processes leaves the gradient as it was.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["sequence", "token"]


def token_weights(response_mask: Tensor, reduction: Reduction) -> Tensor:
    """Weights (B, R) that sum to 1 and turn a weighted sum into the named mean; 0 where the mask is
    False.

    `sequence`: mean over each response, then over responses (the paper's code). `token`: mean over
    all tokens.
    """
    mask = response_mask.float()
    if reduction == "token":
        return mask / mask.sum().clamp(min=1)
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / max(len(mask), 1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the True entries; 0 if there is none."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def ppo_policy_terms(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Clipped policy loss of each token, (B, R).

        ρ = π / π_old        L = max(-A ρ, -A clip(ρ, 1 - ε_low, 1 + ε_high))

    Source: PPO (arXiv:1707.06347), eq. 7; asymmetric bounds: DAPO (arXiv:2503.14476), eq. 10.
    Differs: log ρ is clamped to ±20 so that a token that became impossible cannot overflow.
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    return torch.maximum(
        -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    )


def kl_terms(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(π ‖ π_ref) from each sampled token, (B, R); never negative, and unbiased under
    π.

        k3 = π_ref/π - log(π_ref/π) - 1

    Source: GRPO (arXiv:2402.03300), eq. 4. Differs: the log-ratio is clamped to ±20, as in
    `ppo_policy_terms`.
    """
    log_ratio = (ref_logprobs - logprobs).clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1


def value_terms(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """Clipped value loss of each token, (B, R).

        L = ½ max((V - G)², (clip(V, V_old ± ε) - G)²)

    Source: ReFT (arXiv:2401.08967), §3.1 as its code has it. Differs: none.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def policy_metrics(
    logprobs: Tensor, old_logprobs: Tensor, *, clip_low: float, clip_high: float, weights: Tensor
) -> dict[str, Tensor]:
    """How far the policy has moved from the one that sampled. Weighted means, but for
    `policy/ratio_max`."""
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
