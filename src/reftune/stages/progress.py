"""What stages report while they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reftune.types import Rollout


class Progress:
    """What stages report. A view shows some of it; the methods of this class show nothing."""

    def stage(self, name: str, total_steps: int, done_steps: int = 0) -> None:
        """A stage begins, or continues after `done_steps`."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Where the stage is, and the numbers known there (`group/name`)."""

    def rollouts(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """All solutions that a step sampled, one at least."""

    def note(self, message: str) -> None:
        """A line that stays."""

    def close(self) -> None:
        """Nothing more will come."""


class SilentProgress(Progress):
    """Shows nothing."""
