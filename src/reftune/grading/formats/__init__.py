"""A format defines how a problem is put to the model and how the completion is graded. Each format
has its own file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeGuard

from reftune.errors import RecipeError
from reftune.text import counted
from reftune.types import Conversation, Graded, Problem, Verdict


class Format(Protocol):
    """The interface of every format. A problem's prompt has the same tokens in every stage. The
    target begins right after these tokens."""

    def prompt(self, problem: Problem) -> str | Conversation:
        """The text that the model continues, or the conversation that it answers. Any text except a
        `BareText` is preceded by the tokenizer's BOS token."""

    def target(self, problem: Problem) -> str:
        """The gold completion: either text that continues the prompt or, in a chat, the assistant's
        turn.

        Raises: DataError if the problem has no rationale that fits the format.
        """

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Graded]:
        """One grade per completion, in the same order. No completion may cause an error."""


def grades_of(
    format: Format, problems: Sequence[Problem], completions: Sequence[str]
) -> list[Graded]:
    """One grade per completion. Raises: RecipeError if the format returns something else."""
    found: object = format.grade(problems, completions)
    kind = getattr(format, "kind", type(format).__name__)
    grades = list(found) if isinstance(found, Iterable) else found
    if not isinstance(grades, list) or len(grades) != len(problems):
        count = counted(len(grades), "item") if isinstance(grades, list) else type(grades).__name__
        expected = counted(len(problems), "Graded object")
        raise RecipeError(f"format {kind}: grade returned {count}; expected a list of {expected}")
    for problem, grade in zip(problems, grades, strict=True):
        if not is_grade(grade):
            raise RecipeError(
                f"format {kind}: problem {problem.id}: grade returned {named(grade)}; expected a"
                " Graded, with a Verdict and a value that is text or None"
            )
    return grades


def is_grade(grade: object) -> TypeGuard[Graded]:
    """Whether `grade`, from a user's code, is a `Graded` with a verdict and value of the right
    types."""
    return (
        isinstance(grade, Graded)
        and isinstance(grade.verdict, Verdict)
        and isinstance(grade.value, str | None)
    )


def named(grade: object) -> str:
    """The type of `grade` as text. It goes into the error message when a user's code returns a
    grade of the wrong type. For a `Graded`, the types of its verdict and value are named too."""
    if not isinstance(grade, Graded):
        return type(grade).__name__
    types = f"verdict={type(grade.verdict).__name__}, value={type(grade.value).__name__}"
    return f"Graded({types})"
