"""SVAMP: one-step word problems with small traps (Patel et al. 2021, arXiv:2103.07191)."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from reftune.datasets import Splits
from reftune.datasets.reading.authors import PaperDataset
from reftune.datasets.reading.programs import arithmetic, program
from reftune.datasets.reading.rows import Row
from reftune.datasets.reading.splits import drop_untrainable
from reftune.errors import DataError
from reftune.types import Problem

FINAL_ANSWER = re.compile(r"Therefore, the answer is <[^<>]*>\.?$")
"""Matches the sentence that ends the worked solutions of ReFT's authors."""


class Svamp(PaperDataset):
    """Reads [SVAMP](datasets.md#the-papers-benchmarks)."""

    train: str = "ChilleD/SVAMP"

    authors_name: ClassVar[str] = "svamp"

    def trainable(self, splits: Splits) -> Splits:
        """Like `PaperDataset.trainable`, but also removes problems whose `nl` rationale does not
        end by stating an answer. Raises: DataError if `nl` rationales are requested but no problem
        has one."""
        if self.rationale == "nl":
            if splits.train and all(problem.rationale is None for problem in splits.train):
                raise DataError(
                    f"{self.train}: no answer_cot; expected the authors' nl file, or"
                    " dataset.rationale=program"
                )
            splits = drop_untrainable(
                splits,
                "no_final_answer",
                lambda problem: FINAL_ANSWER.search(problem.rationale or "") is None,
            )
        return super().trainable(splits)

    def published_problem(self, row: Row) -> Problem:
        """The problem in a row of the published files. A program comes from the row's equation."""
        body = row.text("Body")  # a third of the bodies lack a final period
        worked = arithmetic(row.text("Equation"), {}) if self.rationale == "program" else None
        return Problem(
            id=row.text("ID"),
            question=f"{body}{'' if body[-1] in '.?!,;:' else '.'} {row.text('Question')}",
            answer=row.number_gold("Answer"),
            gold_text=str(row.value("Answer")),
            rationale=None if worked is None else program([("result", worked)]),
            columns=row.others("ID", "Body", "Question", "Answer"),
        )

    @classmethod
    def sample_row(cls, n: int) -> dict[str, Any]:
        return {
            "ID": f"s-{n}",
            "Body": f"Tom has {n} apples.",
            "Question": "And 1?",
            "Equation": f"( {n}.0 + 1.0 )",
            "Answer": n + 1,
        }
