"""A reward turns a problem, a completion and the completion's grade into a number. Each reward has
its own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from reftune.errors import RewardError
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


Sample = tuple[Problem, Completion, Graded]


def blame(
    kind: str,
    reward: Callable[[Sequence[Sample]], object],
    samples: Sequence[Sample],
    error: BaseException,
) -> RewardError:
    """An error that names the first sample for which `reward` fails when called with that sample
    alone. If there is no such sample, the error names the whole batch."""
    for sample in samples if len(samples) > 1 else ():
        try:
            reward([sample])
        except (Exception, SystemExit) as alone:  # noqa: BLE001  the user's code may raise anything
            return blame(kind, reward, [sample], alone)
    where = f"sample {samples[0][0].id}" if len(samples) == 1 else f"the batch {ids(samples)}"
    reason = str(error).partition("\n")[0][:200]
    return RewardError(f"reward {kind}: {where}: {type(error).__name__}: {reason}")


def ids(samples: Sequence[Sample]) -> str:
    """The ids of a batch's first and last problem, which name the batch in error messages."""
    return f"{samples[0][0].id} … {samples[-1][0].id}" if samples else "without samples"
