"""Algorithms: which rollouts to train on, how they earn credit, and the loss. One file an algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from reftune.batch import RolloutBatch
    from reftune.policy import TokenScores
    from reftune.types import Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerms:
    """The part of the loss that a micro-batch adds, and metrics to be summed over micro-batches (`…_max`: maximised)."""

    total: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Algorithm(Protocol):
    """Three hooks. The loop that calls them does not know which algorithm it runs."""

    @property
    def needs_reference(self) -> bool:
        """Whether `credit` reads `ref_logprobs`."""

    @property
    def needs_values(self) -> bool:
        """Whether `credit` reads `values`, and the value head is trained."""

    def select(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts to train on; may drop some or add others (gold rationales, say)."""

    def credit(self, batch: RolloutBatch) -> RolloutBatch:
        """The whole rollout with advantages (and returns) filled in. Pure."""

    def weights(self, batch: RolloutBatch) -> Tensor:
        """(B, R) share of each token in the loss of a minibatch. Pure."""

    def loss(self, scores: TokenScores, batch: RolloutBatch) -> LossTerms:
        """A micro-batch's loss, weighted by `batch.weights`. Pure."""
