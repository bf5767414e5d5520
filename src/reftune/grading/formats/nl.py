"""Rationales in natural language."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from reftune.errors import DataError
from reftune.grading.formats._prompts import Prompted, gold_rationale, paper_prompt, question_text
from reftune.grading.paper_rules import PAPER_TRIGGER, grade_completion_paper
from reftune.grading.verdicts import grade_completion
from reftune.types import Answer, Conversation, Graded, Problem, Verdict

DEFINITION = re.compile(r"^def solution\(", re.MULTILINE)


class Nl(Prompted):
    """A worked solution in words that ends by naming its answer."""

    kind: str = "nl"
    grading: Literal["robust", "paper"] = "robust"
    """`robust` reads answers as people write them; `paper` repeats the authors' `float()` rules."""

    def prompt(self, problem: Problem) -> str | Conversation:
        """The question, in the style's frame."""
        if self.writes_all:
            return self.framed(problem)
        return paper_prompt(problem) if self.style == "paper" else f"{question_text(problem)}\n"

    def target(self, problem: Problem) -> str:
        """The gold rationale and a line with the answer that the grading reads, unless a compact
        rationale ends in one.

        Raises: DataError where there is no rationale, or one that is a program.
        """
        rationale = gold_rationale(problem)
        if DEFINITION.search(rationale):
            raise DataError(
                f"problem {problem.id}: its rationale is a program; expected words, or"
                " format.kind=program"
            )
        if "paper" in (self.style, self.grading):
            return f"{rationale}{PAPER_TRIGGER}{_decimal(problem.answer)}"
        last_line = rationale.rpartition("\n")[2]
        if grade_completion(last_line, problem).verdict is Verdict.CORRECT:
            return rationale
        return f"{rationale}\nThe answer is {problem.answer}"

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Graded]:
        """One grade a completion, in order."""
        grade = grade_completion if self.grading == "robust" else grade_completion_paper
        return [
            grade(completion, problem)
            for problem, completion in zip(problems, completions, strict=True)
        ]


def _decimal(answer: Answer) -> str:
    """The answer as `float()` reads it: the authors' files have no fractions."""
    text = str(answer)
    return repr(float(answer.value)) if isinstance(answer.value, Fraction) and "/" in text else text
