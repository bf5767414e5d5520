"""A dataset of your own: sums, with a worked solution each.

In a recipe: `dataset: {kind: examples/dataset.py:Sums, train: 200}`.
"""

from __future__ import annotations

import random
from fractions import Fraction

from pydantic import Field

from reftune.datasets import Splits
from reftune.recipe import Component
from reftune.types import Answer, Problem


class Sums(Component):
    """The fields are the recipe keys, checked and with defaults."""

    train: int = Field(200, gt=0)
    dev: int = Field(50, gt=0)
    test: int = Field(50, gt=0)
    largest: int = Field(9, gt=1)

    def load(self, *, seed: int) -> Splits:
        """No question is in two splits; `seed` is the run's, so that a seed gives the same data
        everywhere."""
        pairs = [
            (a, b, c)
            for a in range(self.largest)
            for b in range(self.largest)
            for c in range(self.largest)
        ]
        random.Random(seed).shuffle(pairs)
        problems = tuple(self._problem(*pair) for pair in pairs)
        first, second = self.train, self.train + self.dev
        return Splits(
            train=problems[:first],
            dev=problems[first:second],
            test=problems[second : second + self.test],
        )

    def _problem(self, a: int, b: int, c: int) -> Problem:
        return Problem(
            id=f"{a}+{b}+{c}",
            question=f"{a} + {b} + {c} = ?",
            answer=Answer(kind="number", value=Fraction(a + b + c)),
            rationale=f"{a} + {b} = {a + b} , {a + b} + {c} = {a + b + c}",
            columns={"num_steps": 2},  # a reward function gets it by this name
        )
