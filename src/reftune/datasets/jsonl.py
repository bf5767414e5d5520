"""Your own questions and answers, from local files or the Hub, in the most common layouts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from reftune.datasets import FileDataset, Splits
from reftune.datasets.reading.conversations import is_conversation, read_conversation
from reftune.datasets.reading.file_dataset import Split
from reftune.datasets.reading.golds import marked_text, worked_solution
from reftune.datasets.reading.options import Options, has_options, read_options
from reftune.datasets.reading.rationales import drop_contradictions
from reftune.datasets.reading.rows import Row, refuse_type_changes
from reftune.datasets.reading.shapes import Columns, recognise
from reftune.errors import DataError
from reftune.grading.golds import read_gold, stated_gold
from reftune.grading.markers import Reading
from reftune.text import shown
from reftune.types import Answer, AnswerKind, Message, Problem

_MISSING = re.compile(r"nan|#(?:div/0!|n/a|name\?|null!|num!|ref!|value!)", re.IGNORECASE)
"""Matches what pandas shows for a missing cell, and what Excel shows for a failed formula."""
MOST_WORDS = 30
"""Maximum number of words in a gold text if `answer_kind` is `auto`. A longer text is rejected,
because it is probably a solution rather than an answer."""


class Jsonl(FileDataset):
    """Reads [your own data](datasets.md#jsonl-your-own-data)."""

    columns: Columns | None = None
    """Names of your columns, unless they are the default names below or [other common
    names](datasets.md#row-shapes)."""
    answer_kind: Literal["auto", AnswerKind] = "auto"
    """How answers are compared; see [answer kinds](datasets.md#answer-kinds)."""
    positions_from: Literal[0, 1] | None = None
    """The first option's number, if gold answers are positions among the options."""

    decimal: Literal[".", ","] = "."
    """Decimal separator of the gold answers."""

    several_rationales: ClassVar[bool] = True

    def problems(self, rows: Sequence[Row], split: Split, counts: Counter[str]) -> list[Problem]:
        """The rows of a split as problems. Raises: DataError if a column is missing or a row
        invalid."""
        if not rows:
            return []
        columns = self._columns(rows, is_train=split == "train")
        refuse_type_changes(rows, columns.names)
        options = [self._options(row, columns) for row in rows]
        are_texts = self._golds_are_texts(rows, options, columns.answer)
        return [
            self._problem(row, columns, of_row, golds_are_texts=are_texts)
            for row, of_row in zip(rows, options, strict=True)
        ]

    def trainable(self, splits: Splits) -> Splits:
        """`splits` without training rows whose rationale contradicts the gold answer. Numbers in
        rationales are read with the gold answers' decimal separator."""
        return drop_contradictions(splits, Reading(decimal=self.decimal))

    def problem(self, row: Row) -> Problem:
        columns = self._columns([row], is_train=False)
        return self._problem(row, columns, self._options(row, columns))

    @classmethod
    def sample_row(cls, n: int) -> dict[str, Any]:
        return {"question": f"What is {n}?", "answer": n}

    def _columns(self, rows: Sequence[Row], *, is_train: bool) -> Columns:
        """The columns that the user named and, for the other fields, the recognised ones. Raises:
        DataError if the training rows lack a named column, or if no column is recognised for the
        question or the answer."""
        named = {} if self.columns is None else self.columns.model_dump(exclude_unset=True)
        for value in named.values() if is_train else ():
            for name in [value] if isinstance(value, str) else value or ():
                if all(row.get(name) is None for row in rows):
                    rows[0].value(name)
        return recognise(rows, named).columns

    def _options(self, row: Row, columns: Columns) -> Options | None:
        """The row's options; None if it has none, or if the answer kind needs none. Raises:
        DataError if the answer kind needs options, or if they cannot be read."""
        if self.answer_kind in ("choice", "auto") and has_options(row, columns.choices):
            return read_options(row, columns.choices or "")
        if self.answer_kind == "choice":
            raise DataError(
                f"{row.where}: no options; answer_kind: choice expects a column of options"
                " (dataset.columns.choices)"
            )
        return None

    def _golds_are_texts(
        self, rows: Sequence[Row], options: Sequence[Options | None], column: str
    ) -> bool:
        """Whether more gold answers are only the text of an option than only its label. False if
        the gold answers are positions. Raises: DataError if a cell contains no gold answer."""
        if self.positions_from is not None:
            return False
        surplus = 0
        for row, of_row in zip(rows, options, strict=True):
            if of_row is not None and of_row.labels:
                gold = _spelled(self._stated(row, column))
                surplus += of_row.has_text(gold) - of_row.has_label(gold)
        return surplus > 0

    def _stated(self, row: Row, column: str) -> object:
        """The answer that a cell states. Raises: DataError if it states none."""
        cell = marked_text(row, column)
        try:
            return stated_gold(cell, Reading(decimal=self.decimal))
        except DataError as error:
            raise DataError(f"{row.where}: {column} is {error}") from None

    def _problem(
        self, row: Row, columns: Columns, options: Options | None, *, golds_are_texts: bool = False
    ) -> Problem:
        question, messages = _question(row, columns.question)
        cell = marked_text(row, columns.answer)
        try:
            answer, text = self._gold(cell, options, are_texts=golds_are_texts)
        except DataError as error:
            raise DataError(f"{row.where}: {columns.answer} is {error}") from None
        if columns.rationale == columns.answer:
            rationale = worked_solution(cell) if isinstance(cell, str) else None
        else:
            rationale = _rationale(row, columns.rationale)
        return Problem(
            id=_id(row, columns.id),
            question=question,
            messages=messages,
            answer=answer,
            gold_text=text,
            rationale=rationale,
            choices=() if options is None else options.texts,
            columns=row.others(*columns.names),
        )

    def _gold(
        self, cell: object, options: Options | None, *, are_texts: bool
    ) -> tuple[Answer, str]:
        """The answer in a cell, and the text that states it. `are_texts` is passed to `_choice`.
        Raises: DataError if the cell contains no answer of the expected kind."""
        kind, reading = self.answer_kind, Reading(decimal=self.decimal)
        if kind in ("any_of", "list", "set", "regex"):
            return read_gold(cell, kind, reading=reading), str(cell)
        stated = stated_gold(cell, reading)
        if options is not None:
            return self._choice(stated, options, are_texts=are_texts), str(stated)
        answer = read_gold(stated, kind, reading=reading)
        if kind == "auto" and _MISSING.fullmatch(str(answer)):
            raise DataError(
                f"{shown(cell)}; expected an answer (if this is one, set dataset.answer_kind=text)"
            )
        is_long = len(str(answer).split()) > MOST_WORDS
        if kind == "auto" and answer.kind in ("text", "latex") and is_long:
            raise DataError(
                f"{shown(cell)}; expected an answer, or a solution that marks it: #### 72,"
                " \\boxed{72} or 'The answer is 72' (if this is the answer,"
                " set dataset.answer_kind=text)"
            )
        return answer, str(stated)

    def _choice(self, stated: object, options: Options, *, are_texts: bool) -> Answer:
        """The option that a gold answer names. If the gold answers `are_texts` of options, one that
        is both a text and a label is read as the text. Raises: DataError if it names no option."""
        spelled, first = _spelled(stated), self.positions_from
        is_text = are_texts and options.has_text(spelled)
        letter = None if is_text else options.letter(spelled, first)
        is_digits = spelled.strip().isdecimal()
        if letter is None and is_digits and first is not None:
            last = first + len(options.texts) - 1
            raise DataError(f"{shown(stated)}; expected a position from {first} to {last}")
        try:
            return read_gold(letter or stated, "choice", choices=options.texts)
        except DataError as error:
            hint = " (if this is a position, set dataset.positions_from)" * is_digits
            raise DataError(f"{error}{hint}") from None


def _spelled(gold: object) -> str:
    """A gold answer as a label or position is spelled; a whole float, such as 2.0, as `2`."""
    is_whole = isinstance(gold, float) and gold.is_integer()
    return f"{gold:.0f}" if is_whole else str(gold)


def _question(row: Row, column: str | list[str]) -> tuple[str, tuple[Message, ...]]:
    """The question as one string and, if the cell is a conversation, the turns before the
    answer."""
    if isinstance(column, list):
        parts = [row.text(column[0]), *(row.optional_text(name) for name in column[1:])]
        return "\n".join(part for part in parts if part is not None), ()
    if not is_conversation(row.get(column)):
        return row.text(column), ()
    conversation = read_conversation(row.value(column), row.where)
    if not conversation.question:
        raise DataError(f"{row.where}: {column} has no question; expected a user's turn")
    return conversation.question, conversation.before


def _rationale(row: Row, column: str | None) -> str | None:
    if column is None:
        return None
    if is_conversation(row.get(column)):
        return read_conversation(row.value(column), row.where).reply
    return row.optional_text(column)


def _id(row: Row, column: str | None) -> str:
    value = None if column is None else row.get(column)
    if column is None or value is None:
        return row.id
    return str(value) if isinstance(value, int | float) else row.text(column)
