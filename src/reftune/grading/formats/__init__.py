"""A format defines how a problem is put to the model and how the completion is graded. Each format
has its own file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from reftune.types import Conversation, Graded, Problem


class Format(Protocol):
    """The interface of every format. A problem's prompt has the same tokens in every stage. The
    target begins right after these tokens."""

    def prompt(self, problem: Problem) -> str | Conversation:
        """The text that the model continues, or the conversation that it answers. Any text except a
        `BareText` is preceded by the tokenizer's BOS token."""

    def target(self, problem: Problem) -> str:
        """The gold continuation: the text right after the prompt, or the assistant's turn.

        Raises: DataError if the problem has no rationale that fits the format.
        """

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Graded]:
        """One grade per completion, in the same order. No completion may cause an error."""
