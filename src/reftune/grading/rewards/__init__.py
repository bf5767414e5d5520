"""Rewards: a rollout's problem, completion and grade → a number. One file a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from reftune.types import Completion, Graded, Problem


class Reward(Protocol):
    """What every reward offers."""

    def __call__(
        self,
        problems: Sequence[Problem],
        completions: Sequence[Completion],
        graded: Sequence[Graded],
    ) -> list[float | None]:
        """One finite reward a completion, in order; None leaves the rollout out. Raises:
        RewardError naming the sample."""
