"""Your own questions and answers: jsonl, json, csv, tsv or parquet files, or any Hub dataset."""

from __future__ import annotations

import ast
import string
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, Literal

from reftune.datasets import FileDataset
from reftune.datasets.reading.authors import is_authors
from reftune.datasets.reading.file_dataset import Split
from reftune.datasets.reading.files import shown
from reftune.datasets.reading.rows import Row, read_value, refuse_type_changes
from reftune.errors import DataError
from reftune.recipe import Table
from reftune.types import Answer, Problem

Kind = Literal["number", "choice", "text"]


class Columns(Table):
    """What the data's columns are called. All others are handed to a reward function by their own
    names."""

    question: str = "question"
    answer: str = "answer"
    """The gold: a number, a text, or for a choice its letter or the option itself."""
    rationale: str | None = "rationale"
    """A worked solution or a program. Not needed where no stage learns from rationales."""
    id: str | None = "id"
    """Default where there is none: file name and number of the row."""
    choices: str | None = "choices"
    """A list of option texts, or in csv a Python or JSON list as text."""


AUTHORS_COLUMNS = Columns(
    question="question", answer="answer_value", rationale="answer_cot", id="item_id"
)


class Jsonl(FileDataset):
    """Your own data. Rows that ask the same question may each bring another rationale."""

    columns: Columns = Columns()
    """Which column is what. The JSON format of ReFT's authors is recognised without it."""
    answer_kind: Literal["number", "choice", "text", "auto"] = "auto"
    """`auto`: `choice` where a row has choices, else as the first row's answer, `number` if it can
    be read as one."""

    several_rationales: ClassVar[bool] = True

    def problems(self, rows: Sequence[Row], split: Split, counts: Counter[str]) -> list[Problem]:
        """Raises: DataError with file and line."""
        if not rows:
            return []
        columns = (
            AUTHORS_COLUMNS if self.columns == Columns() and is_authors(rows[0]) else self.columns
        )
        kind = _kind_of(rows[0], columns) if self.answer_kind == "auto" else self.answer_kind
        if split == "train":
            _refuse_missing(rows[0], columns)
        refuse_type_changes(rows, [name for name in columns.model_dump().values() if name])
        return [_problem(row, columns, kind) for row in rows]

    def problem(self, row: Row) -> Problem:
        """As `problems`, of one row."""
        return self.problems([row], "test", Counter())[0]


def _problem(row: Row, columns: Columns, kind: Kind) -> Problem:
    choices = _choices(row, columns.choices) if kind == "choice" else ()
    return Problem(
        id=_id(row, columns.id),
        question=row.text(columns.question),
        answer=_answer(row, columns.answer, kind, choices),
        rationale=None if columns.rationale is None else row.optional_text(columns.rationale),
        choices=choices,
        columns=row.others(*(name for name in columns.model_dump().values() if name is not None)),
    )


def _kind_of(row: Row, columns: Columns) -> Kind:
    if columns.choices is not None and row.columns.get(columns.choices) is not None:
        return "choice"
    return "text" if read_value(row.value(columns.answer)) is None else "number"


def _refuse_missing(row: Row, columns: Columns) -> None:
    """Raises: DataError where the recipe names a column that training rows do not have."""
    for field in columns.model_fields_set:
        name = getattr(columns, field)
        if name is not None:
            row.value(name)


def _id(row: Row, column: str | None) -> str:
    value = None if column is None else row.columns.get(column)
    if column is None or value is None:
        return row.id
    return str(value) if isinstance(value, int) else row.text(column)


def _answer(row: Row, column: str, kind: Kind, choices: Sequence[str]) -> Answer:
    value = row.value(column)
    if kind == "number":
        number = read_value(value)
        if number is None:
            raise DataError(
                f"{row.where}: {column} is {shown(value)}; expected a number (or"
                " dataset.answer_kind=text)"
            )
        return Answer(kind="number", value=number)
    text = row.text(column) if isinstance(value, str) or value is None else str(value)
    return (
        Answer(kind="text", value=text)
        if kind == "text"
        else Answer(kind="choice", value=_letter(row, text, choices))
    )


def _letter(row: Row, text: str, choices: Sequence[str]) -> str:
    """As the grader reads it. A number is not taken for a position: some count from 0, some from
    1."""
    from reftune.grading.options import read_choice

    letter = read_choice(text, choices)
    if letter is None:
        last = string.ascii_lowercase[len(choices) - 1]
        raise DataError(
            f"{row.where}: answer {shown(text)}; expected a letter from a to {last} or the text of"
            " one option"
        )
    return letter


def _choices(row: Row, column: str | None) -> tuple[str, ...]:
    if column is None:
        raise DataError(
            f"{row.where}: no column for choices; expected dataset.columns.choices beside"
            " answer_kind: choice"
        )
    value = row.value(column)
    options = _parsed_list(value) if isinstance(value, str) else value
    if (
        not isinstance(options, Sequence)
        or not 2 <= len(options) <= 26
        or not all(isinstance(o, (str, int, float)) for o in options)
    ):
        raise DataError(
            f"{row.where}: {column} is {shown(value)}; expected a list of 2 to 26 option texts"
        )
    return tuple(str(option).strip() for option in options)


def _parsed_list(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
