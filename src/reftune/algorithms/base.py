"""Algorithms: which rollouts to train on, how they earn credit, and the loss. One file an
algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

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


class Algorithm(Protocol):
    """Four hooks and what they need. The loop that calls them does not know which algorithm it
    runs."""

    @property
    def needs_reference(self) -> bool:
        """Whether `credit` or `loss` reads `ref_logprobs`."""

    @property
    def needs_values(self) -> bool:
        """Whether `credit` reads `values`, and the value head is trained."""

    @property
    def min_samples(self) -> int:
        """Samples a problem below which nothing would be learned."""

    @property
    def dropout(self) -> bool:
        """Whether dropout is active in the update."""

    def select(self, rollouts: Sequence[Rollout], encoder: Encoder) -> list[Rollout]:
        """The rollouts to train on; may drop some or add others (gold rationales, say)."""

    def credit(self, batch: RolloutBatch) -> RolloutBatch:
        """The whole rollout with what `weights` and `loss` read filled in: advantages, say, and
        returns. Pure."""

    def weights(self, batch: RolloutBatch) -> Tensor:
        """(B, R) share of each token in the loss of a minibatch. Pure."""

    def loss(self, scores: TokenScores, batch: RolloutBatch) -> LossTerms:
        """A micro-batch's loss, weighted by `batch.weights`. Pure."""


def with_contrast(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Those of problems whose samples did not all earn the same."""
    rewards: dict[str, set[float]] = {}
    for rollout in rollouts:
        rewards.setdefault(rollout.problem.id, set()).add(rollout.reward)
    return [rollout for rollout in rollouts if len(rewards[rollout.problem.id]) > 1]
