"""Formats: how a problem is put to the model and how its completion is graded. One file a
format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from reftune.types import Graded, Problem


class Format(Protocol):
    """What every format offers. Prompt and target meet at one token boundary in every stage: they
    are tokenised apart."""

    def prompt(self, problem: Problem) -> str:
        """The text the model continues."""

    def target(self, problem: Problem) -> str:
        """The gold continuation, starting right after the prompt. Raises: DataError where the
        problem has no rationale."""

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Graded]:
        """One grade a completion, in order. Never raises for what a completion says."""
