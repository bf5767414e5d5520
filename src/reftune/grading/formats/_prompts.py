"""What the formats share: the question as a model reads it."""

from __future__ import annotations

import re
from typing import Literal

from reftune.errors import DataError
from reftune.types import Problem

Style = Literal["paper", "compact"]


def question_text(problem: Problem) -> str:
    """The question, its options on a line of their own unless it already holds them."""
    question = problem.question.strip()
    options = " , ".join(
        f"{chr(ord('a') + index)} ) {choice}" for index, choice in enumerate(problem.choices)
    )
    return question if _squeezed(options) in _squeezed(question) else f"{question}\n{options}"


def paper_prompt(problem: Problem) -> str:
    """Source: the authors' code; the header that every prompt of theirs has."""
    return f"Question:\n{question_text(problem)}\nAnswer reasoning:\n"


def gold_rationale(problem: Problem) -> str:
    """Raises: DataError where the problem has none."""
    if problem.rationale is None or not problem.rationale.strip():
        raise DataError(f"problem {problem.id}: no rationale to train on")
    return problem.rationale.strip("\n").rstrip()


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text).casefold()
