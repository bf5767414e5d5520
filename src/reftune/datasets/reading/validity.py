"""Checks what a user's own dataset returns, so that a wrong value does not cause errors later."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from string import ascii_lowercase
from typing import Any, get_args

import regex

from reftune.datasets.reading.splits import Splits
from reftune.errors import DataError
from reftune.text import shown
from reftune.types import Answer, AnswerKind, Message, Problem

KINDS = get_args(AnswerKind)
TYPES = (
    ("id", str | int | float, "text or a number"),
    ("question", str, "text"),
    ("rationale", str | None, "text or None"),
    ("choices", tuple | list, "a tuple of texts"),
    ("messages", tuple | list, "a tuple of Messages"),
    ("answer", Answer, "an Answer"),
)
"""The fields of `Problem` that are checked, with their types and with words for these types."""


def checked_splits(splits: object, kind: str) -> Splits:
    """Check and return `splits`, which a dataset of this `kind` has loaded. Raises: DataError if
    they are not splits of problems, or if a problem has a value of the wrong type."""
    if not isinstance(splits, Splits):
        raise DataError(f"dataset {kind}: load returned {shown(splits)}; expected Splits")
    found: dict[str, Any] = {}
    for name in ("train", "dev", "test"):
        problems = getattr(splits, name)
        if not isinstance(problems, Iterable):
            raise DataError(f"dataset {kind}: {name} is {shown(problems)}; expected Problems")
        found[name] = tuple(problems)
        for number, problem in enumerate(found[name], 1):
            fault = fault_of(problem)
            if fault is not None:
                raise DataError(f"dataset {kind}: {name}, problem {number}: {fault}")
    return replace(splits, **found)


def fault_of(problem: object) -> str | None:
    """What is wrong with a problem, such as `answer.value: expected a Fraction, got 5`. None if
    nothing is wrong."""
    if not isinstance(problem, Problem):
        return f"expected a Problem, got {shown(problem)}"
    for name, expected, words in TYPES:
        if not isinstance(getattr(problem, name), expected):
            return f"{name}: expected {words}, got {shown(getattr(problem, name))}"
    if not _are_texts(problem.choices):
        return f"choices: expected a tuple of texts, got {shown(problem.choices)}"
    turns: Iterable[object] = problem.messages
    for turn in turns:
        if not (isinstance(turn, Message) and isinstance(turn.content, str)):
            return f"messages: expected Messages whose content is text, got {shown(turn)}"
    return _fault_of_answer(problem.answer, num_choices=len(problem.choices))


def _fault_of_answer(answer: Answer, *, num_choices: int) -> str | None:
    value = f"got {shown(answer.value)}"
    if answer.kind not in KINDS:
        return f"answer.kind: expected {', '.join(KINDS)}, got {shown(answer.kind)}"
    expected, words = (Fraction, "a Fraction") if answer.kind == "number" else (str, "text")
    if not isinstance(answer.value, expected):
        return f"answer.value: expected {words}, {value}"
    letters = ascii_lowercase[: num_choices or None]
    if answer.kind == "choice" and answer.value not in tuple(letters):
        return f"answer.value: expected a letter from a to {letters[-1]}, {value}"
    if answer.kind == "regex":
        try:
            regex.compile(answer.value)
        except regex.error as error:
            return f"answer.value: expected a regular expression, {value} ({error})"
    if answer.kind in ("any_of", "list", "set"):
        if not answer.items:
            return f"answer.items: expected the items of kind {answer.kind}, got none"
        if not _are_texts(answer.items):
            return f"answer.items: expected a tuple of texts, got {shown(answer.items)}"
    return None


def _are_texts(values: object) -> bool:
    return isinstance(values, tuple | list) and all(isinstance(each, str) for each in values)
