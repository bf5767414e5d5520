"""The events that stages report while they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reftune.types import Rollout


class Progress:
    """Receives the events that a stage reports. The methods of this class do nothing; subclasses
    override them."""

    def stage(self, name: str, total_steps: int, done_steps: int = 0) -> None:
        """A stage begins, or resumes after `done_steps` steps."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done; its metrics are named `group/name`."""

    def rollouts(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """A step has sampled these solutions. There is at least one."""

    def note(self, message: str) -> None:
        """A message for the user, which stays on the screen."""

    def close(self) -> None:
        """No more events follow."""
