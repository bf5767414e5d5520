"""The paper's reward, which depends on whether the answer is right."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from reftune.grading.verdicts import part_answer
from reftune.recipe import Component
from reftune.types import Answer, Completion, Graded, Problem, Verdict


class Outcome(Component):
    """The reward of the ReFT paper (§3.1), with rules for answers that are not numbers."""

    correct: float = Field(default=1.0, allow_inf_nan=False)
    partial: float = Field(default=0.1, allow_inf_nan=False)
    """Reward for a wrong answer if the gold answer consists only of numbers and expressions."""
    wrong: float = Field(default=0.0, allow_inf_nan=False)
    """Reward for any other wrong answer, and for no answer."""
    partial_on_choices: bool = False
    """Give `partial` for a wrong choice too, as the authors' code does."""

    def __call__(
        self,
        problems: Sequence[Problem],
        completions: Sequence[Completion],
        graded: Sequence[Graded],
    ) -> list[float | None]:
        """One reward per grade, in the same order."""
        return [self._of(problem, grade) for problem, grade in zip(problems, graded, strict=True)]

    def _of(self, problem: Problem, grade: Graded) -> float:
        if grade.verdict is Verdict.CORRECT:
            return self.correct
        is_partial = grade.verdict is Verdict.WRONG and self._tells_kind(problem.answer)
        return self.partial if is_partial else self.wrong

    def _tells_kind(self, gold: Answer) -> bool:
        """Whether a wrong answer earns the reward `partial` instead of `wrong`. If `gold` is a
        choice, this depends on `partial_on_choices`. Otherwise, a wrong answer earns `partial` if
        `gold` consists only of numbers and expressions."""
        if gold.kind == "choice":
            return self.partial_on_choices
        parts = map(part_answer, gold.items) if gold.items else [gold]
        return all(part.kind in ("number", "latex") for part in parts)
