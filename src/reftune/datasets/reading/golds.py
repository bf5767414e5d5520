"""Reads gold answers, alone in a cell or at the end of a worked solution or a conversation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from reftune.datasets.reading.conversations import read_conversation
from reftune.datasets.reading.options import Options, read_options
from reftune.datasets.reading.rows import Row
from reftune.errors import DataError
from reftune.grading.decimals import with_points
from reftune.grading.golds import GoldKind, listed_item, read_gold, stated_gold
from reftune.grading.markers import Reading, reasoning_text, statements
from reftune.text import shown
from reftune.types import Answer

_MISSING = re.compile(r"|nan|#(?:div/0!|n/a|name\?|null!|num!|ref!|value!)", re.IGNORECASE)
"""Matches empty text, what pandas writes for a missing cell, and what Excel writes for a failed
formula."""
MOST_WORDS = 30
"""Maximum number of words in a gold text if the answer kind is `auto`. A longer text is rejected,
because it is probably a solution rather than an answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldReader:
    """Reads the options and the gold answer of a row."""

    kind: GoldKind = "auto"
    positions_from: Literal[0, 1] | None = None
    """Position of the first option, if gold answers are positions in the list of options."""
    decimal: Literal[".", ","] = "."
    """Decimal separator of the options and gold answers."""

    @property
    def reading(self) -> Reading:
        return Reading(decimal=self.decimal)

    def options(self, row: Row, columns: str | Sequence[str] | None) -> Options | None:
        """The row's options; None if the row has no options, or if the answer kind does not use
        them. Raises: DataError if the options cannot be read."""
        if columns is None or self.kind not in ("choice", "auto"):
            return None
        return read_options(row, columns, self.reading)

    def gold(self, cell: object, options: Options | None) -> tuple[Answer, object]:
        """The gold answer in a cell, and the part of the cell that states it. Raises: DataError if
        the cell contains no answer of the expected kind, or names none of the options."""
        kind = self.kind
        if kind in ("any_of", "list", "set", "regex"):
            answer = read_gold(cell, kind, reading=self.reading)
            is_worked = kind != "regex" and statements(str(cell), self.reading)
            return answer, ", ".join(answer.items) if is_worked else cell
        stated = stated_gold(cell, self.reading)
        if options is not None:
            return self._choice(stated, options), stated
        if kind in ("auto", "number"):
            stated = listed_item(stated, self.reading)
        answer = read_gold(stated, kind, reading=self.reading)
        if kind == "auto" and is_missing(str(answer)):
            raise DataError(
                f"{shown(cell)}; expected an answer (if this is one, set answer_kind: text)"
            )
        is_long = len(str(answer).split()) > MOST_WORDS
        if kind == "auto" and answer.kind in ("text", "latex") and is_long:
            raise DataError(
                f"{shown(cell)}; expected an answer, or a solution that marks it: #### 72,"
                " \\boxed{72} or 'The answer is 72' (if this is the answer,"
                " set answer_kind: text)"
            )
        return answer, stated

    def spelled(self, stated: object) -> str:
        """A gold answer as text to compare with labels, positions and options: `2` for 2.0."""
        is_whole = isinstance(stated, float) and stated.is_integer()
        return f"{stated:.0f}" if is_whole else with_points(stated, self.decimal)

    def _choice(self, stated: object, options: Options) -> Answer:
        """The option that a gold answer names by its label, position or text. Raises: DataError if
        it names no option."""
        spelled, first = self.spelled(stated), self.positions_from
        letter = options.letter(spelled, first)
        is_digits = spelled.strip().isdecimal()
        if letter is None and is_digits and first is not None:
            known = ", ".join(str(first + place) for place in options.places)
            raise DataError(f"{shown(stated)}; expected one of the positions {known}")
        try:
            return read_gold(
                letter or stated, "choice", choices=options.texts, reading=self.reading
            )
        except DataError as error:
            position = " (if this is a position, set dataset.positions_from)" * is_digits
            raise DataError(f"{error}{position}") from None


def is_missing(cell: object) -> bool:
    """Whether a cell is null, blank, or text that a program writes for a missing cell."""
    return cell is None or (isinstance(cell, str) and bool(_MISSING.fullmatch(cell.strip())))


def worked_solution(text: str) -> str | None:
    """The worked solution in `text`. The last `####` and everything after it are cut off. However,
    if another answer marker (such as a LaTeX box) follows and gives a different answer, the `####`
    is taken for a heading, and nothing is cut off. Other markers before the `####` are kept, with
    their answers. A text without `####` is not changed. Returns None if `text` has no answer marker
    (such as `####` or a LaTeX box), or if it consists of the answer alone."""
    before, hashes, after = text.rpartition("####")
    if hashes and after.strip():
        line, _, below = after.strip().partition("\n")
        later = statements(below)
        is_heading = later and line.strip() not in (later[-1].text or "")
        return text if is_heading else before.strip() or None
    is_worked = statements(text) and re.search(r"\w", reasoning_text(text))
    return text if is_worked else None


def marked_text(row: Row, column: str) -> Any:
    """The row's value in `column` or, if that is a conversation, the assistant's reply. Raises:
    DataError if the row lacks the column, or if the conversation has no reply."""
    value = row.value(column)
    conversation = read_conversation(row, column)
    if conversation is None:
        return value
    if conversation.reply is None:
        raise DataError(
            f"{row.where}: {column} ends before the assistant's turn; expected the assistant's"
            " answer, or a gold answer in another column (dataset.columns.answer)"
        )
    return conversation.reply
