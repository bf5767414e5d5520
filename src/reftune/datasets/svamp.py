"""SVAMP: one-step word problems with small traps (Patel et al. 2021, arXiv:2103.07191)."""

from __future__ import annotations

import re
from fractions import Fraction

from pydantic import Field

from reftune.datasets import Splits
from reftune.datasets.reading.authors import COLUMNS, Rationale, authors_rationale, is_authors
from reftune.datasets.reading.programs import arithmetic, drop_wrong_programs, program
from reftune.datasets.reading.rows import Row, read_value, refuse_type_changes
from reftune.datasets.reading.splits import draw_splits, drop_untrainable, read_splits
from reftune.errors import DataError
from reftune.recipe import Component
from reftune.types import Answer, Problem

AUTHORS_FILES = {"nl": "svamp_nl.json", "program": "svamp_python_sdp.json"}
FINAL_ANSWER = re.compile(r"Therefore, the answer is <([^<>]*)>\.?$")
"""How the worked solutions of ReFT's authors end."""


class Svamp(Component):
    """SVAMP from the Hub, from its authors' SVAMP.json, or from the JSON files of ReFT's
    authors."""

    train: str = "ChilleD/SVAMP"
    """A file, a folder, or a Hub id `owner/name[:config[:split]]`."""
    test: str | None = None
    """Default: the test split beside `train`, if that is a folder or a Hub id."""
    dev: str | None = None
    """Default: drawn from train."""
    dev_size: int | None = Field(None, ge=0)
    """How many questions to draw for dev. Default: a tenth of train, at most 500."""
    rationale: Rationale = "program"
    """`nl` needs the files of ReFT's authors. `program`: theirs, or derived from Equation; kept if
    it gives the gold."""

    def load(self, *, seed: int) -> Splits:
        """Raises: DataError with file and line."""
        names = {"train": [AUTHORS_FILES[self.rationale]], "test": ["svamp_test_set.json"]}
        rows = read_splits(self.train, self.dev, self.test, names=names)
        splits = draw_splits(
            train=self._problems(rows.train),
            dev=None if rows.dev is None else self._problems(rows.dev),
            test=self._problems(rows.test),
            dev_size=self.dev_size,
            seed=seed,
        )
        if self.rationale == "program":
            return drop_wrong_programs(splits)
        if all(problem.rationale is None for problem in splits.train):
            where = rows.train[0].where
            raise DataError(
                f"{where}: no answer_cot; expected the authors' nl file, or"
                " dataset.rationale=program"
            )
        splits = drop_untrainable(
            splits, "no_final_answer", lambda problem: _stated_answer(problem) is None
        )
        return drop_untrainable(splits, "rationale_disagrees", _contradicts_gold)

    def _problems(self, rows: list[Row]) -> list[Problem]:
        refuse_type_changes(
            rows,
            ("question", "answer_value", "answer_cot", "Body", "Question", "Equation", "Answer"),
        )
        return [
            self._authors_problem(row) if is_authors(row) else self._problem(row) for row in rows
        ]

    def _authors_problem(self, row: Row) -> Problem:
        return Problem(
            id=row.text("item_id"),
            question=row.text("question"),
            answer=Answer(kind="number", value=row.number("answer_value")),
            rationale=authors_rationale(row, self.rationale),
            columns=row.others(*COLUMNS),
        )

    def _problem(self, row: Row) -> Problem:
        return Problem(
            id=row.text("ID"),
            question=_sentences(row.text("Body"), row.text("Question")),
            answer=Answer(kind="number", value=row.number("Answer")),
            rationale=program_of(row.text("Equation")) if self.rationale == "program" else None,
            columns=row.others("ID", "Body", "Question", "Answer"),
        )


def program_of(equation: str) -> str | None:
    """`( 76.0 - 25.0 )` as a program; None where it is not plain arithmetic."""
    expression = arithmetic(equation, {})
    return None if expression is None else program([("result", expression)])


def _sentences(body: str, question: str) -> str:
    """A third of the bodies ends without punctuation."""
    return f"{body} {question}" if body[-1] in ".?!,;:" else f"{body}. {question}"


def _stated_answer(problem: Problem) -> str | None:
    match = FINAL_ANSWER.search(problem.rationale or "")
    return None if match is None else match[1]


def _contradicts_gold(problem: Problem) -> bool:
    from reftune.grading.numbers import numbers_equal

    stated, gold = read_value(_stated_answer(problem)), problem.answer.value
    if problem.rationale is None or not isinstance(gold, Fraction):
        return False
    return stated is None or not numbers_equal(stated, gold)
