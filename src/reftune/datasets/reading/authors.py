"""The JSON files of ReFT's authors: {item_id, question, answer_cot, answer_value}, without
answer_cot in test files."""

from __future__ import annotations

from typing import Literal

from reftune.datasets.reading.rows import Row
from reftune.errors import DataError

Rationale = Literal["nl", "program"]
COLUMNS = ("item_id", "question", "answer_cot", "answer_value")


def is_authors(row: Row) -> bool:
    """Whether `row` is of the authors' files."""
    return "answer_value" in row.columns


def authors_rationale(row: Row, kind: Rationale) -> str | None:
    """`answer_cot`, None where there is none. Raises: DataError where it is the other kind of
    rationale."""
    text = row.optional_text("answer_cot")
    if text is None or ("def solution" in text) == (kind == "program"):
        return text
    found, other = ("no program", "nl") if kind == "program" else ("a program", "program")
    raise DataError(
        f"{row.where}: answer_cot is {found}; expected a {kind} rationale (or"
        f" dataset.rationale={other})"
    )
