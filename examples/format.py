"""A format of your own defines how a problem is put to the model and how the completion is graded.
Here, the answer stands between two tags: `<answer> 5 </answer>`.

To use it, set `format: examples/format.py:Tagged` in the recipe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from reftune.errors import DataError
from reftune.grading.verdicts import grade_answer
from reftune.recipe import Component
from reftune.types import Graded, Problem, Verdict


class Tagged(Component):
    tag: str = "answer"

    def prompt(self, problem: Problem) -> str:
        return f"{problem.question}\n"

    def target(self, problem: Problem) -> str:
        """The text that follows the prompt. The prompt and this text are tokenised separately."""
        if problem.rationale is None:
            raise DataError(f"problem {problem.id}: no rationale to train on")
        return f"{problem.rationale} <{self.tag}> {problem.answer} </{self.tag}>"

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Graded]:
        """One grade per completion, in the same order. No completion may cause an error."""
        return [
            self._grade(problem, text) for problem, text in zip(problems, completions, strict=True)
        ]

    def _grade(self, problem: Problem, text: str) -> Graded:
        found = re.findall(rf"<{self.tag}>(.*?)</{self.tag}>", text, re.DOTALL)
        if not found:
            return Graded(
                verdict=Verdict.NO_ANSWER, value=None, reason=f"no <{self.tag}> … </{self.tag}>"
            )
        # reads numbers, letters and words as the built-in formats do
        return grade_answer(found[-1].strip(), problem)
