"""When a warm-up is finished: dev does not rise any more than chance allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LOOKS = 4
"""Looks at dev over which a rise is measured; docs/handover.md compares 2 to 5."""
Z95 = 1.959964


@dataclass(frozen=True, kw_only=True, slots=True)
class Rise:
    """How accuracy changed between two looks at the same problems."""

    value: float
    """Share of problems."""
    margin: float
    """Half the width of the 95 % interval of `value`."""

    @property
    def is_beyond_chance(self) -> bool:
        return self.value > self.margin


def rise(before: Sequence[bool], after: Sequence[bool]) -> Rise:
    """The change in accuracy and its Wald interval, paired by problem.

        d = (c - b) / n        margin = 1.96 √(b + c - (b - c)² / n) / n

    b problems were solved only before, c only after. Source: Agresti, Categorical Data Analysis,
    §10.1.
    """
    lost = sum(x and not y for x, y in zip(before, after, strict=True))
    won = sum(y and not x for x, y in zip(before, after, strict=True))
    n = len(after)
    variance = lost + won - (lost - won) ** 2 / n
    return Rise(value=(won - lost) / n, margin=Z95 * math.sqrt(variance) / n)


@dataclass(slots=True)
class History:
    """Which dev problems were solved at the first look and at the last few."""

    first: list[bool] | None = None
    recent: list[list[bool]] | None = None
    """The last `LOOKS` + 1 looks, the newest last."""

    def add(self, correct: Sequence[bool]) -> None:
        self.first = self.first or list(correct)
        self.recent = [*(self.recent or []), list(correct)][-LOOKS - 1 :]

    def latest_rise(self) -> Rise | None:
        """The rise over the last `LOOKS` looks; None if there are fewer."""
        if self.recent is None or len(self.recent) <= LOOKS:
            return None
        return rise(self.recent[0], self.recent[-1])

    def is_flat(self) -> bool:
        """Whether dev rose at first, beyond chance, and has stopped rising.

        A model that has not begun to learn is flat too, at the bottom; it is not finished.
        """
        latest = self.latest_rise()
        if latest is None or self.first is None or self.recent is None:
            return False
        has_risen = rise(self.first, self.recent[-1]).is_beyond_chance
        return has_risen and not latest.is_beyond_chance
