"""The gold of a row: a number, an option or a text."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from reftune.datasets.reading.conversations import is_conversation, read_conversation
from reftune.datasets.reading.files import shown
from reftune.datasets.reading.options import Options
from reftune.datasets.reading.rows import Row
from reftune.errors import DataError
from reftune.types import Answer, AnswerKind

Kind = AnswerKind
MOST_WORDS = 30
"""Of a text gold that nobody said is one: more words are a solution, not an answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Worked:
    """A worked solution, parted."""

    rationale: str | None
    """None if there is nothing but the answer."""
    gold: str


def split_worked(text: str) -> Worked | None:
    """A solution and the answer that it marks by `####`, "The answer is …" or a box; None if it
    marks none. `####` is no part of the rationale, the others are."""
    from reftune.grading.golds import stated_gold
    from reftune.grading.markers import answer_text, reasoning_text

    before, hashes, after = text.rpartition("####")
    if hashes and after.strip():
        return Worked(rationale=before.strip() or None, gold=after.strip())
    if not (answer_text(text) or "").strip():
        return None
    has_reasoning = re.search(r"\w", reasoning_text(text)) is not None
    return Worked(rationale=text if has_reasoning else None, gold=str(stated_gold(text)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Gold:
    """A gold answer, as read and as it was spelled."""

    answer: Answer
    text: str
    rationale: str | None
    """The worked solution that the gold stood in, if any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldReader:
    """How the golds of a data set are read."""

    column: str
    kind: Kind | Literal["auto"]
    """`auto`: a choice if there are options, else a number if it can be read as one, else an
    expression (`latex`), a list in brackets or a text."""
    positions_from: int | None
    """What a choice's gold counts from if it is a position."""
    decimal: Literal[".", ","]
    """The decimal separator."""

    def read(self, row: Row, options: Options | None) -> Gold:
        """Raises: DataError."""
        value = (
            self._reply(row) if is_conversation(row.get(self.column)) else row.value(self.column)
        )
        is_text = isinstance(value, str) and self.kind != "regex"
        worked = split_worked(value) if is_text else None
        spelled = value if worked is None else worked.gold
        return Gold(
            answer=self._answer(row, spelled, options),
            text=str(spelled),
            rationale=None if worked is None else worked.rationale,
        )

    def _reply(self, row: Row) -> str:
        reply = read_conversation(row.value(self.column), row.where).reply
        if reply is None:
            raise DataError(
                f"{row.where}: {self.column} ends before the assistant's turn; expected its answer,"
                " or the gold in another column (dataset.columns.answer)"
            )
        return reply

    def _answer(self, row: Row, value: Any, options: Options | None) -> Answer:
        from reftune.grading.golds import number_gold
        from reftune.grading.kinds import told_gold, worded_gold
        from reftune.grading.markers import Reading

        if isinstance(value, Mapping):
            raise self._refused(row, value, "one answer")
        try:
            told = (
                None
                if self.kind == "auto" and options
                else told_gold(value, self._told, self.decimal)
            )
        except DataError as error:
            raise DataError(f"{row.where}: {self.column}: {error}") from None
        if told is not None:
            return told
        if options is not None:
            return Answer(kind="choice", value=self._letter(row, value, options))
        if self.kind not in ("text", "latex"):
            number = number_gold(value, Reading(decimal=self.decimal))
            if number is not None:
                return number
            if self.kind == "number":
                raise self._refused(row, value, "a number (or dataset.answer_kind=text)")
        text = "" if value is None else str(value).strip()
        if not text:
            raise self._refused(row, value, "an answer")
        if self.kind == "auto" and len(text.split()) > MOST_WORDS:
            raise self._refused(
                row,
                value,
                "an answer, or a solution that marks it: #### 72, \\boxed{72} or 'The answer is 72'"
                " (if this is the answer: dataset.answer_kind=text)",
            )
        return worded_gold(text) if self.kind == "auto" else Answer(kind=self.kind, value=text)

    @property
    def _told(self) -> AnswerKind:
        return "text" if self.kind == "auto" else self.kind

    def _letter(self, row: Row, value: Any, options: Options) -> str:
        """A number is not taken for a position unless the recipe says so: some count from 0, some
        from 1."""
        from reftune.grading.golds import read_gold

        text = row.text(self.column) if value is None else str(value)
        letter = options.letter(text)
        if letter is None and self.positions_from is not None and text.strip().isdecimal():
            position = int(text) - self.positions_from
            if 0 <= position < len(options.texts):
                letter = string.ascii_lowercase[position]
        if letter is not None:
            return letter
        try:
            return str(read_gold(text, "choice", choices=options.texts))
        except DataError:
            last = string.ascii_lowercase[len(options.texts) - 1]
            hint = " (of a position: dataset.positions_from)" if text.strip().isdecimal() else ""
            raise DataError(
                f"{row.where}: answer {shown(text)}; expected a letter from a to {last} or the text"
                f" of one option{hint}"
            ) from None

    def _refused(self, row: Row, value: Any, expected: str) -> DataError:
        return DataError(f"{row.where}: {self.column} is {shown(value)}; expected {expected}")
