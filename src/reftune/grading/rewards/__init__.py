"""A reward turns a rollout's problem, completion and grade into a number. Each reward has its own
file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from reftune.types import Completion, Graded, Problem


class SumOfParts(float):
    """A reward and the named parts that add up to it."""

    parts: Mapping[str, float]

    def __new__(cls, parts: Mapping[str, float]) -> SumOfParts:
        made = super().__new__(cls, sum(parts.values()))
        made.parts = dict(parts)
        return made

    def __reduce__(self) -> tuple[type[SumOfParts], tuple[Mapping[str, float]]]:
        return SumOfParts, (self.parts,)


class Reward(Protocol):
    """The interface of every reward."""

    def __call__(
        self,
        problems: Sequence[Problem],
        completions: Sequence[Completion],
        graded: Sequence[Graded],
    ) -> list[float | None]:
        """One finite reward per completion, in the same order; None excludes the completion from
        training. Raises: RewardError if a reward cannot be computed."""
