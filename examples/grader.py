"""A grader of your own decides which answers are right. Here, answers are lengths in km, m or cm.

To use it, set `format: {kind: nl, grading: examples/grader.py:same_length}` in the recipe. Also set
`answer_kind: text` in `dataset`, so that "2.5 km" is not read as a number. The default reward,
model selection on dev, voting and the evaluation all use the grader.
"""

from __future__ import annotations

import re

from reftune.grading.markers import answer_text
from reftune.types import Graded, Problem, Verdict

METRES = {"km": 1000.0, "m": 1.0, "cm": 0.01}
LENGTH = re.compile(r"\s*([\d.]+) ?(km|cm|m)\b")


def same_length(completion: str, problem: Problem) -> Graded:
    """A verdict with a reason for any text. Voting compares the `value` of samples, so equal
    answers must have the same spelling."""
    answer, gold = metres(answer_text(completion) or ""), metres(str(problem.answer))
    if answer is None or gold is None:
        return Graded(verdict=Verdict.NO_ANSWER, value=None, reason="no length like 2.5 km")
    is_right = abs(answer - gold) < 1e-6 * gold
    verdict = Verdict.CORRECT if is_right else Verdict.WRONG
    return Graded(verdict=verdict, value=f"{answer:g} m", reason=f"{answer:g} m, gold {gold:g} m")


def metres(text: str) -> float | None:
    """The length at the start of `text`, in metres; None if the text does not begin with a
    length."""
    found = LENGTH.match(text)
    return None if found is None else float(found[1]) * METRES[found[2]]
