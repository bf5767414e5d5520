"""Cells that hold a gold answer, alone or at the end of a worked solution or conversation."""

from __future__ import annotations

import re
from typing import Any

from reftune.datasets.reading.conversations import is_conversation, read_conversation
from reftune.datasets.reading.rows import Row
from reftune.errors import DataError
from reftune.grading.markers import reasoning_text, statements


def worked_solution(text: str) -> str | None:
    """The solution in `text`, if `text` marks its answer, for example by `####` or a box; None if
    there is no marker, or nothing but the answer. The solution ends before `####`, but includes
    any other marker and the answer after it."""
    before, hashes, after = text.rpartition("####")
    if hashes and after.strip():
        return before.strip() or None
    is_worked = statements(text) and re.search(r"\w", reasoning_text(text))
    return text if is_worked else None


def marked_text(row: Row, column: str) -> Any:
    """The cell that holds a gold answer; for a conversation, the reply. Raises: DataError if there
    is no such cell or no reply."""
    value = row.value(column)
    if not is_conversation(value):
        return value
    reply = read_conversation(value, row.where).reply
    if reply is None:
        raise DataError(
            f"{row.where}: {column} ends before the assistant's turn; expected its answer, or the"
            " gold answer in another column (dataset.columns.answer)"
        )
    return reply
