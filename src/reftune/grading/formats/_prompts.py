"""Writes prompts in the recipe's `style`, for the built-in formats."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from string import ascii_lowercase
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from reftune.errors import DataError
from reftune.grading.options import unlettered
from reftune.recipe import Component, Table, refusal
from reftune.types import BareText, Conversation, Message, Problem

Style = Literal["compact", "paper", "chat", "plain"]
READ_BY: Mapping[str, tuple[str, ...]] = {
    "chat": ("system", "instruction", "template_args"),
    "plain": ("template", "examples"),
}
"""Style → the keys that only this style reads."""
SLOT = "{question}"
PLAIN = f"{SLOT}\n"


class Shot(Table):
    """A worked example before the question."""

    question: str
    solution: str


class Prompted(Component):
    """Defines how the formats that come with reftune put a question to the model."""

    style: Style = "compact"
    """Form of the prompt. `compact` is the question, followed by `def solution():` if the format is
    `program`. `paper` is the prompt of ReFT's authors, `chat` uses the tokenizer's chat template,
    and `plain` uses your `template`."""
    system: str | None = None
    """For `chat`: the system message, if the data has none."""
    instruction: str | None = None
    """For `chat`: text above the question, in the user's last turn."""
    template_args: dict[str, Any] = Field(default_factory=dict)
    """For `chat`: variables of the chat template, such as `{enable_thinking: false}`."""
    template: str | None = None
    """For `plain`: the prompt, which must contain `{question}` once. Default: the question and a
    line break."""
    examples: list[Shot] = Field(default_factory=list)
    """For `plain`: worked examples before the question. Each consists of the filled-in template,
    the example's solution and an empty line."""
    stop: list[str] = Field(default_factory=list)
    """Stop strings, in addition to the model's end tokens."""

    @model_validator(mode="after")
    def _reads_its_keys(self) -> Self:
        for style, keys in READ_BY.items():
            for key in keys:
                if style != self.style and getattr(self, key):
                    message = f"{key}: not read by style {self.style}; expected style: {style}"
                    raise refusal("style", message)
        if self.template is not None and self.template.count(SLOT) != 1:
            raise refusal("template", f"template: expected text that contains {SLOT} once")
        if not all(self.stop):
            raise refusal("stop", "stop: expected strings of at least one character")
        return self

    @property
    def writes_all(self) -> bool:
        """Whether the model writes the whole solution. In the styles `chat` and `plain`, it does,
        because the prompt contains no part of the solution."""
        return self.style in READ_BY

    def framed(self, problem: Problem) -> str | Conversation:
        """The prompt for the style `chat` or `plain`."""
        return self._conversation(problem) if self.style == "chat" else self._plain(problem)

    def _conversation(self, problem: Problem) -> Conversation:
        turns = [turn for turn in problem.messages if turn.role != "system"]
        systems = [turn.content for turn in problem.messages if turn.role == "system"]
        turns = turns or [Message(role="user", content=problem.question)]
        users = [place for place, turn in enumerate(turns) if turn.role == "user"]
        last = users[-1] if users else -1
        asked = with_options(turns[last].content, problem)
        if self.instruction is not None:
            asked = f"{self.instruction}\n\n{asked}"
        turns[last] = replace(turns[last], content=asked)
        if self.system is not None and not systems:
            systems = [self.system]
        opening = (Message(role="system", content=text) for text in systems)
        return Conversation(turns=(*opening, *turns), template_args=self.template_args)

    def _plain(self, problem: Problem) -> str:
        template = self.template or PLAIN
        shots = [
            f"{template.replace(SLOT, shot.question)}{shot.solution}\n\n" for shot in self.examples
        ]
        return "".join(shots) + template.replace(SLOT, question_text(problem))


def question_text(problem: Problem) -> str:
    """The question with its options, if it has any."""
    return with_options(problem.question, problem)


def with_options(question: str, problem: Problem) -> str:
    """A question, followed by a line with the problem's options unless it already contains them."""
    question = question.strip()
    if not problem.choices:
        return question
    lettered = zip(ascii_lowercase, unlettered(problem.choices), strict=False)
    options = " , ".join(f"{letter} ) {choice}" for letter, choice in lettered)
    return question if _squeezed(options) in _squeezed(question) else f"{question}\n{options}"


def paper_prompt(problem: Problem, header: str = "") -> BareText:
    """The prompt that ReFT's authors use, ending in `header`. Source: their code."""
    return BareText(f"Question:\n{question_text(problem)}\nAnswer reasoning:\n{header}")


def gold_rationale(problem: Problem) -> str:
    """The problem's gold rationale. Raises: DataError if it has none."""
    if problem.rationale is None or not problem.rationale.strip():
        raise DataError(f"problem {problem.id}: no rationale to train on")
    return problem.rationale.strip("\n").rstrip()


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text).casefold()
