"""GSM8K: grade-school word problems with whole-number answers (Cobbe et al. 2021,
arXiv:2110.14168)."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Container
from itertools import chain, count
from typing import Any, ClassVar, Literal

from reftune.datasets.reading.authors import PaperDataset
from reftune.datasets.reading.programs import arithmetic, program
from reftune.datasets.reading.rows import Row
from reftune.errors import DataError
from reftune.grading.golds import number_gold
from reftune.text import shown
from reftune.types import Problem

ANNOTATION = re.compile(r"<<(?P<expression>[^<>=]*)=(?P<result>[^<>=]*)>>(?P<after>[^<\n]*)")
PLAIN_NUMBER = re.compile(r"[0-9]*\.?[0-9]+")
NOT_NAMES = frozenset(
    "a all an and are as at because but by each every for from has have he her his if in is it more"
    " of on or per she so than that the their then there they this to was we were when which while"
    " will with".split()
)
MAX_NAME_WORDS = 2


class Gsm8k(PaperDataset):
    """Reads [GSM8K](datasets.md#the-papers-benchmarks)."""

    train: str = "openai/gsm8k:main"
    annotations: Literal["keep", "drop"] = "keep"
    """Whether to keep annotations such as `<<48/2=24>>` in `nl` rationales."""

    authors_name: ClassVar[str] = "gsm8k"

    def published_problem(self, row: Row) -> Problem:
        """The problem in a row of the published files. The row's `answer` is an annotated solution
        that ends with a line like `#### 72`."""
        solution, marker, gold_text = row.text("answer").rpartition("####")
        gold = number_gold(gold_text.strip())
        if not marker or gold is None:
            raise DataError(
                f"{row.where}: answer ends in {shown(gold_text[-30:])}; expected a last line like"
                " '#### 72'"
            )
        return Problem(
            id=row.id,
            question=row.text("question"),
            answer=gold,
            gold_text=gold_text.strip(),
            rationale=self._rationale(solution.strip()),
            columns=row.others("question", "answer"),
        )

    @classmethod
    def sample_row(cls, n: int) -> dict[str, Any]:
        solution = f"It is <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"
        return {"question": f"What is {n} and 1?", "answer": solution}

    def _rationale(self, solution: str) -> str | None:
        if self.rationale == "program":
            return program_of(solution)
        return solution if self.annotations == "keep" else re.sub(r"<<[^<>\n]*>>", "", solution)


def program_of(solution: str) -> str | None:
    """A program that computes a solution's annotated steps, such as `<<48/2=24>>`. Returns None if
    no step contains an operator, or if any step is not plain arithmetic.

    Each step assigns its result to a variable, which is named after the words that follow the
    step's annotation. In later steps, the variable replaces numbers that equal the result. If
    several earlier steps have the same result, the variable of the last one is used.
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
    has_operator = any(set(step) & set("+-*/") for step in steps.values())
    return program(list(steps.items())) if has_operator else None


def _name(after: str) -> str:
    """A variable name from the text after a step's annotation. For example, `24 clips in May.`
    gives `clips_may`. If the text has no usable word, the name is `step`."""
    words = re.match(r"\s*[-$]?[\d.,/]*\s*((?:[A-Za-z]+\b\s*)*)", after)
    assert words is not None
    telling = [word for word in words[1].lower().split() if word not in NOT_NAMES][:MAX_NAME_WORDS]
    name = "_".join(telling)
    return "step" if not name or keyword.iskeyword(name) or hasattr(builtins, name) else name


def _unused(name: str, taken: Container[str]) -> str:
    first = "step_1" if name == "step" else name
    names = chain([first], (f"{name}_{number}" for number in count(2)))
    return next(each for each in names if each not in taken)
