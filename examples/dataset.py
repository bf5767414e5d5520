"""A dataset of your own: it defines how a row becomes a problem. Here: three numbers to add.

In a recipe: `dataset: {kind: examples/dataset.py:Sums, train: examples/sums}`.
"""

from __future__ import annotations

from fractions import Fraction

from reftune.datasets.reading.file_dataset import FileDataset
from reftune.datasets.reading.rows import Row
from reftune.types import Answer, Problem


class Sums(FileDataset):
    """Columns a, b and c. Files of any kind, dev, duplicates and counts are the base class's."""

    def problem(self, row: Row) -> Problem:
        """Errors name file and line, as `number_gold` does: `sums/train.csv:7: a is 'x'; …`."""
        a, b, c = (Fraction(row.number_gold(column).value) for column in ("a", "b", "c"))
        return Problem(
            id=row.id,
            question=f"{a} + {b} + {c} = ?",
            answer=Answer(kind="number", value=a + b + c),
            rationale=f"{a} + {b} = {a + b} , {a + b} + {c} = {a + b + c}",
            columns={"num_steps": 2},  # a reward function gets it by this name
        )
