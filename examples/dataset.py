"""A dataset of your own defines how a row becomes a problem. Here, each row has three numbers to
add.

To use it, set `dataset: {kind: examples/dataset.py:Sums, train: examples/sums}` in the recipe.
"""

from __future__ import annotations

from fractions import Fraction

from reftune.datasets.reading.file_dataset import FileDataset
from reftune.datasets.reading.rows import Row
from reftune.types import Answer, Problem


class Sums(FileDataset):
    """Reads the columns a, b and c. The base class reads the files, draws the dev split, and drops
    and counts duplicates."""

    def problem(self, row: Row) -> Problem:
        """The row as a problem. An error should name the file and the line, as the errors of
        `number_gold` do: `sums/train.csv:7: a is 'x'; …`."""
        a, b, c = (Fraction(row.number_gold(column).value) for column in ("a", "b", "c"))
        return Problem(
            id=row.id,
            question=f"{a} + {b} + {c} = ?",
            answer=Answer(kind="number", value=a + b + c),
            rationale=f"{a} + {b} = {a + b} , {a + b} + {c} = {a + b + c}",
            columns={"num_steps": 2},  # a reward function receives this column under its name
        )
