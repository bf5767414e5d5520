"""The recipe key `grading`, which names either a set of built-in rules or a user's own grader."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import numpy as np
from pydantic import AfterValidator

from reftune.grading.formats import is_grade, named
from reftune.grading.verdicts import clip, judge
from reftune.recipe import component_class, refusal
from reftune.text import brief
from reftune.types import Graded, Problem, Verdict

RULES = ("robust", "paper")
Grader = Callable[[str, Problem], object]
"""A user's own grader: a function of a text and a problem. The text is the completion or, in the
format `program`, the program's answer. The function returns a `Graded`, or a bool that says whether
the answer is right."""


def _known(grading: str) -> str:
    if grading in RULES:
        return grading
    if ":" not in grading:
        expected = "robust, paper or your own grader as file.py:Name"
        raise refusal("grading", f"{grading}: unknown rules; expected {expected}")
    if not callable(own_grader(grading)):
        raise refusal("grader", f"{grading}: cannot be called; expected a function")
    return grading


Grading = Annotated[str, AfterValidator(_known)]


@functools.cache
def own_grader(grading: str) -> Grader:
    """The function that `grading` names; `grading` has the form `file.py:Name`. If `Name` is a
    class, the result is an instance of it.
    Raises: PydanticCustomError if there is no such object, or if the instance cannot be created."""
    found = component_class(grading, group="formats")
    try:
        grader: Grader = found() if isinstance(found, type) else found
    # the user's code may raise anything, and may call sys.exit
    except (Exception, SystemExit) as error:  # noqa: BLE001
        reason = f"{type(error).__name__}: {brief(error)}".removesuffix(": ")
        raise refusal("grader", f"{grading}: cannot be created: {reason}") from None
    return grader


def graded_by(grader: Grader, text: str, problem: Problem) -> Graded:
    """The grade that a user's own grader gives. If the grader raises an error, or returns neither a
    valid `Graded` (see `is_grade`) nor a bool, the verdict is ERROR, so that such failures can
    be counted."""
    try:
        verdict = grader(text, problem)
    except Exception as failure:  # noqa: BLE001  a model's text may break a grader
        reason = f"the grader failed: {type(failure).__name__}: {clip(str(failure))}"
        return Graded.without_answer(Verdict.ERROR, reason)
    if isinstance(verdict, Graded) and verdict.value is not None:
        verdict = replace(verdict, value=str(verdict.value))
    if is_grade(verdict):
        return verdict
    if not isinstance(verdict, bool | np.bool_):
        reason = f"the grader returned {named(verdict)}, not a Graded or a bool"
        return Graded.without_answer(Verdict.ERROR, reason)
    return judge(bool(verdict), text.strip().rpartition("\n")[2], str(problem.answer))
