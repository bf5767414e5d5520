"""SVAMP with solutions to only some of the training questions."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from reftune.datasets import Splits
from reftune.datasets.svamp import Svamp


class FewRationales(Svamp):
    """Only the first training questions keep their rationales. The others have only answers."""

    rationales: int = Field(ge=1)
    """Number of training questions with a rationale."""

    def load(self, *, seed: int) -> Splits:
        splits = super().load(seed=seed)
        rest = [replace(each, rationale=None) for each in splits.train[self.rationales :]]
        return replace(splits, train=(*splits.train[: self.rationales], *rest))
