"""Fits the value head before PPO, by closed-form ridge regression of returns on hidden states."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from reftune.errors import NonFiniteError
from reftune.processes.sharding import assign
from reftune.processes.world import from_main

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridge penalties to try. Their unit is the number of tokens times the mean variance of the
features."""


@torch.no_grad()
def fit_value_head(head: nn.Linear, rollouts: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Fit `head` to the returns of all rollouts by ridge regression.

        w = (Xᵀ X + α I)⁻¹ Xᵀ y        X, y: features and returns, centred; no penalty on the bias

    To choose α, each of the `PENALTIES` is tried: a head is fitted to all rollouts but the last,
    and its explained variance on the last rollout is computed. The penalty with the largest
    explained variance is used. If there is only one rollout, the middle penalty is used. If there
    are no rollouts, the head stays as it is.
    `rollouts` yields the features (N, H) and returns (N,) of one rollout at a time, so memory does
    not grow with the number of rollouts.

    Returns: the explained variance with the chosen penalty; NaN if there is at most one rollout, or
    if the variance of the last rollout's returns is at most 1e-8.
    Raises: NonFiniteError if a feature or return is not finite.
    """
    sums, last = _Moments(head.in_features), None
    for features, returns in rollouts:
        if not (features.isfinite().all() and returns.isfinite().all()):
            raise NonFiniteError(
                "value head pre-fit: hidden states or returns are not finite; the weights were not"
                " changed"
            )
        if last is not None:
            sums.add(*last)
        last = (features.double().cpu(), returns.double().cpu())
    if last is None:
        return math.nan
    penalty, explained = PENALTIES[2], math.nan
    if sums.count > 0:
        explained, penalty = max((_explained(sums.solve(p), *last), p) for p in PENALTIES)
    sums.add(*last)
    weight, bias = from_main(lambda: sums.solve(penalty))
    assign(head.weight, weight[None])
    assign(head.bias, bias[None])
    return explained if last[1].var(correction=0) > 1e-8 else math.nan


class _Moments:
    """The sums from which a linear regression is computed, in fp64."""

    def __init__(self, num_features: int) -> None:
        self.count = 0
        self.x = torch.zeros(num_features, dtype=torch.float64, device="cpu")
        self.y = torch.zeros((), dtype=torch.float64, device="cpu")
        self.xx = torch.zeros(num_features, num_features, dtype=torch.float64, device="cpu")
        self.xy = torch.zeros(num_features, dtype=torch.float64, device="cpu")

    def add(self, features: Tensor, returns: Tensor) -> None:
        self.count += len(returns)
        self.x += features.sum(0)
        self.y += returns.sum()
        self.xx += features.T @ features
        self.xy += features.T @ returns

    def solve(self, penalty: float) -> tuple[Tensor, Tensor]:
        """The fitted weight (H,) and bias ()."""
        mean_x, mean_y = self.x / self.count, self.y / self.count
        covariance = self.xx - self.count * torch.outer(mean_x, mean_x)
        ridge = penalty * covariance.diagonal().mean().clamp(min=1e-12)
        weight = torch.linalg.solve(
            covariance + ridge * torch.eye(len(mean_x), device=mean_x.device),
            self.xy - self.count * mean_x * mean_y,
        )
        return weight, mean_y - weight @ mean_x


def _explained(solution: tuple[Tensor, Tensor], features: Tensor, returns: Tensor) -> float:
    weight, bias = solution
    errors = returns - (features @ weight + bias)
    return float(1 - errors.var(correction=0) / returns.var(correction=0).clamp(min=1e-8))
