"""The paper's reward: is the answer right?"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from reftune.recipe import Component
from reftune.types import Completion, Graded, Problem, Verdict


class Outcome(Component):
    """1 for a right answer, 0.1 for a wrong one, 0 for none. A program that crashed has no answer.
    Source: ReFT, §3.1."""

    kind: str = "outcome"
    correct: float = Field(default=1.0, allow_inf_nan=False)
    """Of a right answer."""
    partial: float = Field(default=0.1, allow_inf_nan=False)
    """Of a number or text that was read and is wrong."""
    wrong: float = Field(default=0.0, allow_inf_nan=False)
    """Of anything else."""
    partial_on_choices: bool = False
    """Pay `partial` for a wrong choice too, as the authors' code does; a random letter would earn
    it."""

    def __call__(
        self,
        problems: Sequence[Problem],
        completions: Sequence[Completion],
        graded: Sequence[Graded],
    ) -> list[float | None]:
        """One reward a grade, in order."""
        return [self._of(problem, grade) for problem, grade in zip(problems, graded, strict=True)]

    def _of(self, problem: Problem, grade: Graded) -> float:
        if grade.verdict is Verdict.CORRECT:
            return self.correct
        if grade.verdict is Verdict.WRONG and (
            problem.answer.kind != "choice" or self.partial_on_choices
        ):
            return self.partial
        return self.wrong
