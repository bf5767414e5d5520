"""GSM8K: grade-school word problems with whole-number answers (Cobbe et al. 2021,
arXiv:2110.14168)."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from reftune.datasets import Splits
from reftune.datasets.reading.authors import COLUMNS, Rationale, authors_rationale, is_authors
from reftune.datasets.reading.programs import arithmetic, drop_wrong_programs, program
from reftune.datasets.reading.rows import Row, read_value, refuse_type_changes, shown
from reftune.datasets.reading.splits import draw_splits, read_splits
from reftune.errors import DataError
from reftune.recipe import Component
from reftune.types import Answer, Problem

ANNOTATION = re.compile(r"<<(?P<expression>[^<>=]*)=(?P<result>[^<>=]*)>>(?P<after>[^<\n]*)")
PLAIN_NUMBER = re.compile(r"[0-9]*\.?[0-9]+")
AUTHORS_FILES = {"nl": "gsm8k_nl.json", "program": "gsm8k_python_sdp.json"}
NOT_NAMES = frozenset(
    "a all an and are as at because but by each every for from has have he her his if in is it more"
    " of on or per she so than that the their then there they this to was we were when which while"
    " will with".split()
)
MAX_NAME_WORDS = 2


class Gsm8k(Component):
    """GSM8K from the Hub, from OpenAI's jsonl files or from the JSON files of ReFT's authors."""

    train: str = "openai/gsm8k:main"
    """A file, a folder, or a Hub id `owner/name[:config[:split]]`."""
    test: str | None = None
    """Default: the test split beside `train`, if that is a folder or a Hub id."""
    dev: str | None = None
    """Default: drawn from train."""
    dev_size: int | None = Field(None, ge=0)
    """How many questions to draw for dev. Default: a tenth of train, at most 500."""
    rationale: Rationale = "program"
    """`nl`: the solution as published. `program`: derived from its <<48/2=24>> annotations, kept if
    it gives the gold."""
    annotations: Literal["keep", "drop"] = "keep"
    """What becomes of <<48/2=24>> in an `nl` rationale."""

    def load(self, *, seed: int) -> Splits:
        """Raises: DataError with file and line."""
        names = {"train": [AUTHORS_FILES[self.rationale]], "test": ["gsm8k_test_set.json"]}
        rows = read_splits(self.train, self.dev, self.test, names=names)
        splits = draw_splits(
            train=self._problems(rows.train),
            dev=None if rows.dev is None else self._problems(rows.dev),
            test=self._problems(rows.test),
            dev_size=self.dev_size,
            seed=seed,
        )
        return drop_wrong_programs(splits) if self.rationale == "program" else splits

    def _problems(self, rows: list[Row]) -> Iterable[Problem]:
        refuse_type_changes(rows, ("question", "answer", "answer_value", "answer_cot"))
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
        solution, marker, gold_text = row.text("answer").rpartition("####")
        gold = read_value(gold_text.strip())
        if not marker or gold is None:
            raise DataError(
                f"{row.where}: answer ends in {shown(gold_text[-30:])}; expected a last line like"
                " '#### 72'"
            )
        return Problem(
            id=row.id,
            question=row.text("question"),
            answer=Answer(kind="number", value=gold),
            rationale=self._rationale(solution.strip()),
            columns=row.others("question", "answer"),
        )

    def _rationale(self, solution: str) -> str | None:
        if self.rationale == "program":
            return program_of(solution)
        return solution if self.annotations == "keep" else re.sub(r"<<[^<>\n]*>>", "", solution)


def program_of(solution: str) -> str | None:
    """The annotated steps of a solution as a program; None where they compute nothing or one is not
    plain arithmetic.

    A variable a step, called after the words that follow the result. A number that equals an
    earlier result becomes its name, the latest one's if several do.
    """
    steps: dict[str, str] = {}
    names: dict[float, str] = {}
    for match in ANNOTATION.finditer(solution):
        expression = arithmetic(match["expression"], names)
        if expression is None:
            return None
        name = _unused(_name(match["after"]), steps)
        steps[name] = expression
        if PLAIN_NUMBER.fullmatch(match["result"].strip()):
            names[float(match["result"])] = name
    return (
        program(list(steps.items()))
        if any(set(step) & set("+-*/") for step in steps.values())
        else None
    )


def _name(after: str) -> str:
    """`24 clips in May.` → `clips_may`; `step` where no word follows the number."""
    words = re.match(r"\s*[-$]?[\d.,/]*\s*((?:[A-Za-z]+\b\s*)*)", after)
    assert words is not None
    telling = [word for word in words[1].lower().split() if word not in NOT_NAMES][:MAX_NAME_WORDS]
    name = "_".join(telling)
    return "step" if not name or keyword.iskeyword(name) or hasattr(builtins, name) else name


def _unused(name: str, taken: Iterable[str]) -> str:
    number = 1
    numbered = name if name != "step" else "step_1"
    while numbered in taken:
        number += 1
        numbered = f"{name}_{number}"
    return numbered
