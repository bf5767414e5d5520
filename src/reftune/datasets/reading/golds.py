"""Reads cells that contain a gold answer, either alone or at the end of a worked solution or a
conversation."""

from __future__ import annotations

import re
from typing import Any

from reftune.datasets.reading.conversations import read_conversation
from reftune.datasets.reading.rows import Row
from reftune.errors import DataError
from reftune.grading.markers import reasoning_text, statements


def worked_solution(text: str) -> str | None:
    """The worked solution in `text`. None if `text` contains no marker of an answer (such as `####`
    or a box) or contains nothing but the answer. The marker `####` and the answer after it are cut
    off. Any other marker and its answer are kept."""
    before, hashes, after = text.rpartition("####")
    if hashes and after.strip():
        return before.strip() or None
    is_worked = statements(text) and re.search(r"\w", reasoning_text(text))
    return text if is_worked else None


def marked_text(row: Row, column: str) -> Any:
    """The value of a cell that contains a gold answer. If the cell is a conversation, this is the
    assistant's reply. Raises: DataError if the row has no such column, or if the conversation has
    no reply."""
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
