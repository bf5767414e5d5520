"""Gold answers as data spell them."""

from __future__ import annotations

from typing import Literal

from reftune.grading.numbers import read_number
from reftune.grading.options import read_choice
from reftune.types import Answer


def parse_gold(text: str, kind: Literal["number", "choice", "text"]) -> Answer | None:
    """A gold answer as data spell it, by the reader that grades completions; None where it cannot
    be read."""
    if kind == "number":
        number = read_number(text)
        return None if number is None else Answer(kind="number", value=number)
    if kind == "choice":
        letter = read_choice(text, ())
        return None if letter is None else Answer(kind="choice", value=letter)
    return Answer(kind="text", value=text.strip()) if text.strip() else None
