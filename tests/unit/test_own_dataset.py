"""A dataset of one's own that is not read from files."""

from __future__ import annotations

from fractions import Fraction

from reftune.datasets import Splits, load_dataset
from reftune.recipe import Component
from reftune.types import Answer, Problem


def problem(number: int, *, gold: int, returns: int) -> Problem:
    return Problem(
        id=str(number),
        question=f"What is {gold}?",
        answer=Answer(kind="number", value=Fraction(gold)),
        rationale=f"def solution():\n    return {returns}",
    )


class Own(Component):
    def load(self, *, seed: int) -> Splits:
        return Splits(
            train=(problem(0, gold=5, returns=6), problem(1, gold=2, returns=2)),
            dev=(problem(0, gold=7, returns=7), problem(1, gold=8, returns=9)),
            test=(problem(0, gold=3, returns=3),),
        )


def test_problems_of_an_own_dataset_get_unique_ids_so_that_each_keeps_its_own_grade() -> None:
    splits = load_dataset(Own(kind="own"), seed=0)
    assert [each.question for each in splits.train] == ["What is 2?"]
    assert [each.rationale is None for each in splits.dev] == [False, True]
    ids = [each.id for split in (splits.test, splits.dev, splits.train) for each in split]
    assert ids == ["0", "0-2", "1", "1-2"]
