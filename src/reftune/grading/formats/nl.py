"""Rationales in natural language."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Literal

from reftune.errors import DataError
from reftune.grading.decimals import with_separator
from reftune.grading.formats._grading import Grading, graded_by, own_grader
from reftune.grading.formats._prompts import Prompted, gold_rationale, paper_prompt, question_text
from reftune.grading.markers import DEFAULT, Reading
from reftune.grading.mathematics import NUM_WORKERS
from reftune.grading.paper_rules import PAPER_TRIGGER, grade_completion_paper
from reftune.grading.verdicts import grade_completion, needs_worker
from reftune.types import Answer, Conversation, Graded, Problem, Verdict, spell_decimal

DEFINITION = re.compile(r"^def solution\(", re.MULTILINE)


class Nl(Prompted):
    """A worked solution in natural language. It ends by stating the answer."""

    grading: Grading = "robust"
    """`robust` ([our rules](grading.md)), `paper` (the authors' rules), or [your own
    grader](grading.md#your-own-grader), named as `file.py:Name`."""

    stop_at: tuple[str, ...] = DEFAULT.stop_at
    """Strings that mark the start of [run-on text](grading.md#completions), which the grader
    ignores."""
    markers: tuple[str, ...] = ()
    """Phrases that announce the answer, in addition to the built-in English ones. If a gold
    solution does not state its answer at the end, a final line is added: the first phrase listed
    here (default: `The answer is`) and the answer."""
    decimal: Literal[".", ","] = "."
    """Decimal separator of the model's answers."""

    @property
    def gold_decimal(self) -> Literal[".", ","]:
        """Decimal separator in targets: `decimal`, but a point under the authors' rules, which
        cannot read a decimal comma."""
        return "." if self.grading == "paper" else self.decimal

    def prompt(self, problem: Problem) -> str | Conversation:
        """The prompt in the chosen `style`."""
        if self.writes_all:
            return self.framed(problem)
        return paper_prompt(problem) if self.style == "paper" else f"{question_text(problem)}\n"

    def target(self, problem: Problem) -> str:
        """The gold rationale, followed by a line such as "The answer is 7". A rationale whose last
        line already states the answer does not get this line, unless the style or the grading is
        `paper`.

        Raises: DataError if there is no rationale, if it is a program, or if no line can be added
        because the gold answer is a `regex`.
        """
        rationale = gold_rationale(problem)
        if DEFINITION.search(rationale):
            raise DataError(
                f"problem {problem.id}: its rationale is a program; expected natural language, or"
                " format.kind=program"
            )
        is_paper = "paper" in (self.style, self.grading)
        last_line = rationale.rpartition("\n")[2]
        if not is_paper and self._grade(last_line, problem).verdict is Verdict.CORRECT:
            return rationale
        if problem.answer.kind == "regex":
            raise DataError(
                f"problem {problem.id}: paper targets cannot state the answer, which is the pattern"
                f" {problem.answer}; expected another style and grading, or another answer_kind"
                if is_paper
                else f"problem {problem.id}: its rationale ends without an answer that matches"
                f" {problem.answer}; expected a last line that states one"
            )
        if is_paper:
            return f"{rationale}{PAPER_TRIGGER}{self._spelled(problem.answer, _decimal)}"
        phrase = next(iter(self.markers), "The answer is").strip()
        return f"{rationale}\n{phrase} {self._spelled(problem.answer)}"

    def _spelled(self, gold: Answer, spell: Callable[[Answer], str] = str) -> str:
        """The gold answer as `spell` writes it, with the decimal separator of targets."""
        is_comma_list = self.gold_decimal == "," and gold.kind in ("list", "set")
        text = "; ".join(gold.items) if is_comma_list else spell(gold)
        return with_separator(text, self.gold_decimal, gold.kind)

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Graded]:
        """One grade per completion, in the same order. Expressions are compared in parallel."""
        if len(completions) != len(problems):
            raise ValueError(f"{len(problems)} problems and {len(completions)} completions")
        if self.grading == "robust" and any(needs_worker(problem.answer) for problem in problems):
            with ThreadPoolExecutor(NUM_WORKERS) as threads:
                return list(threads.map(self._grade, completions, problems))
        return list(map(self._grade, completions, problems))

    def _grade(self, completion: str, problem: Problem) -> Graded:
        if self.grading == "robust":
            reading = Reading(stop_at=self.stop_at, markers=self.markers, decimal=self.decimal)
            return grade_completion(completion, problem, reading)
        if self.grading == "paper":
            return grade_completion_paper(completion, problem)
        return graded_by(own_grader(self.grading), completion, problem)


def _decimal(answer: Answer) -> str:
    """The answer as text. A number is written as a decimal without a percent sign, so that
    `float()` can read it."""
    return spell_decimal(answer.value) if isinstance(answer.value, Fraction) else answer.value
