"""Your own questions and answers: files of most shapes that people have, or any Hub dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, Literal

from reftune.datasets import FileDataset
from reftune.datasets.reading.conversations import is_conversation, read_conversation
from reftune.datasets.reading.file_dataset import Split
from reftune.datasets.reading.golds import GoldReader
from reftune.datasets.reading.options import read_options
from reftune.datasets.reading.rows import Row, refuse_type_changes
from reftune.datasets.reading.shapes import Columns, recognise
from reftune.errors import DataError
from reftune.types import AnswerKind, Message, Problem


class Jsonl(FileDataset):
    """Your own data. Several rows may ask one question, each with its own rationale."""

    columns: Columns | None = None
    """Which column is what. Columns left out are recognised by common names (docs/datasets.md)."""
    answer_kind: Literal["auto", AnswerKind] = "auto"
    """`auto`: each row is a choice if it has options, else a number, an expression (`latex`), a
    list in brackets or a text. Golds that are lists need `any_of` (accepted spellings), `list`
    (all, in order) or `set`; `regex` must be named."""
    positions_from: Literal[0, 1] | None = None
    """Where options are counted from if the gold is a position; by default such golds are refused.
    """

    decimal: Literal[".", ","] = "."
    """Decimal separator of the golds; `format.decimal` is that of the model's answers."""

    several_rationales: ClassVar[bool] = True

    def problems(self, rows: Sequence[Row], split: Split, counts: Counter[str]) -> list[Problem]:
        """Raises: DataError with file and line."""
        if not rows:
            return []
        columns = self._columns(rows, is_train=split == "train")
        refuse_type_changes(rows, columns.names)
        return [self._problem(row, columns) for row in rows]

    def problem(self, row: Row) -> Problem:
        """As `problems`, of one row alone. Raises: DataError."""
        return self._problem(row, self._columns([row], is_train=False))

    def _columns(self, rows: Sequence[Row], *, is_train: bool) -> Columns:
        """As given and recognised. Raises: DataError if training rows lack a given column."""
        told = {} if self.columns is None else self.columns.model_dump(exclude_unset=True)
        for value in told.values() if is_train else ():
            for name in [value] if isinstance(value, str) else value or ():
                rows[0].value(name)
        return recognise(rows, told).columns

    def _problem(self, row: Row, columns: Columns) -> Problem:
        question, messages = _question(row, columns.question)
        options = None
        if self.answer_kind in ("choice", "auto") and _has_options(row, columns.choices):
            options = read_options(row, columns.choices or "")
        elif self.answer_kind == "choice":
            raise DataError(
                f"{row.where}: no options; expected dataset.columns.choices beside answer_kind:"
                " choice"
            )
        reader = GoldReader(
            column=columns.answer,
            kind=self.answer_kind,
            positions_from=self.positions_from,
            decimal=self.decimal,
        )
        gold = reader.read(row, options)
        is_worked = columns.rationale == columns.answer
        return Problem(
            id=_id(row, columns.id),
            question=question,
            messages=messages,
            answer=gold.answer,
            gold_text=gold.text,
            rationale=gold.rationale if is_worked else _rationale(row, columns.rationale),
            choices=() if options is None else options.texts,
            columns=row.others(*columns.names),
        )


def _question(row: Row, column: str | list[str]) -> tuple[str, tuple[Message, ...]]:
    """The question as one text, and the turns before the answer if it is a conversation."""
    if isinstance(column, list):
        parts = [row.text(column[0]), *(row.optional_text(name) for name in column[1:])]
        return "\n".join(part for part in parts if part is not None), ()
    if not is_conversation(row.get(column)):
        return row.text(column), ()
    conversation = read_conversation(row.value(column), row.where)
    if not conversation.question:
        raise DataError(f"{row.where}: {column} asks nothing; expected a turn of the user")
    return conversation.question, conversation.before


def _rationale(row: Row, column: str | None) -> str | None:
    """A solution; of a conversation the reply."""
    if column is None:
        return None
    if is_conversation(row.get(column)):
        return read_conversation(row.value(column), row.where).reply
    return row.optional_text(column)


def _has_options(row: Row, columns: str | list[str] | None) -> bool:
    names = [columns] if isinstance(columns, str) else columns or ()
    return any(row.get(name) is not None for name in names)


def _id(row: Row, column: str | None) -> str:
    value = None if column is None else row.get(column)
    if column is None or value is None:
        return row.id
    return str(value) if isinstance(value, int) else row.text(column)
