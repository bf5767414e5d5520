"""Decides when dev accuracy has levelled off in the supervised warm-up, and how many steps then
follow at a falling learning rate. These steps are the cooldown (docs/handover.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

NEEDED_ACCURACY = 0.2
"""Share of dev problems that a model should solve before RL starts. Below this share, RL gained
little or nothing in our measurements (docs/handover.md)."""
LOOKS = 4
"""Number of dev evaluations over which a rise is measured. docs/experiments/handover.md compares
the values 2 to 5."""
LARGE_MARGIN = 0.1
"""If the margin of a rise is larger, as with fewer than about 100 dev problems, the rise does not
show whether a warm-up is finished."""
Z95 = 1.959963984540054
"""The 97.5% quantile of the standard normal distribution."""
COOLDOWN = 10
"""Ratio of the number of steps before a cooldown to the number of steps in the cooldown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rise:
    """The change in accuracy between two evaluations of the same problems."""

    value: float
    """The change in the share of solved problems."""
    margin: float
    """Half the width of the 95% interval of `value`."""

    @property
    def is_beyond_chance(self) -> bool:
        return self.value > self.margin

    @property
    def is_uncertain(self) -> bool:
        """Whether the interval is so wide that a large change in accuracy could go unnoticed."""
        return self.margin > LARGE_MARGIN


def rise(before: Sequence[bool], after: Sequence[bool]) -> Rise:
    """The change d in accuracy and its 95% Wald interval d ± margin, paired by problem.

        d = (c - b) / n        margin = 1.96 √(b + c - (b - c)² / n) / n

    Of the n problems, b are solved only in `before`, and c only in `after`. Source: Agresti,
    Categorical Data Analysis, §10.1.
    """
    lost = sum(x and not y for x, y in zip(before, after, strict=True))
    won = sum(y and not x for x, y in zip(before, after, strict=True))
    n = len(after)
    variance = lost + won - (lost - won) ** 2 / n
    return Rise(value=(won - lost) / n, margin=Z95 * math.sqrt(variance) / n)


@dataclass(slots=True)
class History:
    """Which dev problems were solved in the first evaluation and in the most recent ones."""

    first: list[bool] = field(default_factory=list)
    recent: list[list[bool]] = field(default_factory=list)
    """The results of the last `LOOKS` + 1 dev evaluations, the newest last."""

    def add(self, correct: Sequence[bool]) -> None:
        self.first = self.first or list(correct)
        self.recent = [*self.recent, list(correct)][-LOOKS - 1 :]

    def latest_rise(self) -> Rise | None:
        """The rise over the last `LOOKS` evaluations, measured from the evaluation before them.
        None if there have been too few evaluations."""
        return rise(self.recent[0], self.recent[-1]) if len(self.recent) > LOOKS else None

    def is_flat(self) -> bool:
        """Whether dev accuracy has risen significantly since the first evaluation, has reached
        `NEEDED_ACCURACY`, and no longer rises. The first two conditions exclude a model that has
        not yet begun to learn; its accuracy is flat too."""
        latest = self.latest_rise()
        if latest is None:
            return False
        newest = self.recent[-1]
        is_enough = sum(newest) >= NEEDED_ACCURACY * len(newest)
        has_risen = rise(self.first, newest).is_beyond_chance
        return is_enough and has_risen and not latest.is_beyond_chance


def end_of_cooldown(step: int) -> int:
    """The last step of a cooldown that follows step `step`."""
    return step + max(1, step // COOLDOWN)


def cooldown_steps(ends_at: int) -> int:
    """Number of steps in a cooldown that ends at step `ends_at`: an eleventh of `ends_at`, but
    at least one."""
    return max(1, ends_at // (COOLDOWN + 1))
