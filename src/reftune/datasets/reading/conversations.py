"""Reads conversations in rows. A turn has OpenAI's keys `{role, content}` or ShareGPT's
`{from, value}`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard

from reftune.datasets.reading.options import is_empty
from reftune.datasets.reading.rows import Row
from reftune.errors import DataError
from reftune.grading.golds import literal
from reftune.text import shown
from reftune.types import Message

Role = Literal["system", "user", "assistant"]
ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot"), "assistant"),
}
WRITTEN = re.compile(
    rf"""\s*\[\s*\{{.*?["'](?:role|from)["']\s*:\s*["'](?:{"|".join(ROLES)})["'].*\]\s*""",
    re.DOTALL | re.IGNORECASE,
)
"""Matches a conversation that is written as text."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys under which other tools keep a turn's thoughts."""
NO_TOOLS = "tools are not supported; leave out the rows that use them"


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """The turns of a conversation, divided into the reply and the turns before it."""

    before: tuple[Message, ...]
    """The turns before the reply; all turns if there is no reply."""
    reply: str | None
    """The text of the last turn, if that turn is the assistant's; otherwise None."""

    @property
    def question(self) -> str:
        """The question as one string: the turns before the reply, without the system message."""
        return "\n\n".join(turn.content for turn in self.before if turn.role != "system")

    def joined(self, above: Sequence[str], below: Sequence[str]) -> Conversation:
        """The conversation, with the lines `above` and `below` added before and after the text of
        the first turn that is not a system message. There must be such a turn."""
        place = next(i for i, turn in enumerate(self.before) if turn.role != "system")
        turn = self.before[place]
        turn = replace(turn, content="\n".join([*above, turn.content, *below]))
        return replace(self, before=(*self.before[:place], turn, *self.before[place + 1 :]))


def turns_in(row: Row, column: str) -> Sequence[Mapping[str, Any]] | None:
    """The turns of the conversation in a cell. The cell may contain a list of turns or, as in CSV
    files, the same list written as text. Returns None if the cell contains no conversation. Raises:
    DataError if text that looks like a conversation cannot be read."""
    cell = row.get(column)
    is_written = isinstance(cell, str) and WRITTEN.fullmatch(cell) is not None
    turns = _parsed(cell) if is_written else cell
    if _are_turns(turns):
        return turns
    if is_written:
        raise DataError(
            f"{row.where}: {column} is {shown(cell)}; expected a list of turns, written as JSON"
        )
    return None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return literal(text.strip())


def _are_turns(value: object) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(isinstance(turn, Mapping) and bool({"role", "from"} & set(turn)) for turn in value)
    )


def is_answered(turns: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a conversation ends with the assistant's turn."""
    return _role(turns[-1]) == "assistant"


def read_conversation(row: Row, column: str) -> Conversation | None:
    """The conversation in a cell, without empty system messages; None if the cell contains no
    conversation. Raises: DataError if a turn other than an empty system message has an unknown
    role, no text, content other than text, or thoughts under a key of their own (`THOUGHTS`), or if
    the conversation uses tools."""
    value = turns_in(row, column)
    if value is None:
        return None
    for name in ("tools", "functions"):
        if not is_empty(row.get(name)):
            raise DataError(
                f"{row.where}: {name} is {shown(row.get(name))}; expected none ({NO_TOOLS}, or the"
                " column if the answers do not need it)"
            )
    turns = tuple(_message(turn, row.where) for turn in value if not _is_empty_system(turn))
    return Conversation(
        before=turns[:-1] if is_answered(value) else turns,
        reply=turns[-1].content if is_answered(value) else None,
    )


def _is_empty_system(turn: Mapping[str, Any]) -> bool:
    content = turn.get("content", turn.get("value"))
    return _role(turn) == "system" and (content is None or not str(content).strip())


def _role(turn: Mapping[str, Any]) -> Role | None:
    return ROLES.get(str(turn.get("role", turn.get("from"))).lower())


def _message(turn: Mapping[str, Any], where: str) -> Message:
    speaker, role = turn.get("role", turn.get("from")), _role(turn)
    content = _text(turn.get("content", turn.get("value")))
    if role is None:
        raise DataError(
            f"{where}: a turn has the role {shown(speaker)}; expected one of {', '.join(ROLES)}"
            f" ({NO_TOOLS})"
        )
    has = f"{where}: a turn with role {speaker} has"
    for key in ("tool_calls", "function_call"):
        if not is_empty(turn.get(key)):
            raise DataError(f"{has} {key}: {shown(turn[key])}; expected text only ({NO_TOOLS})")
    for key in THOUGHTS:
        if isinstance(thought := turn.get(key), str) and thought.strip():
            raise DataError(
                f"{has} {key}: {shown(thought)}; expected the thoughts in its text, as"
                " <think>…</think>, or none"
            )
    if content is None:
        raise DataError(f"{has} no text: {shown(turn)}; expected text")
    return Message(role=role, content=content)


def _text(content: object) -> str | None:
    """A turn's text. None if the turn has no text, or if it also contains something else, such as
    an image."""
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        content = "\n".join(map(str, parts)) if None not in parts else None
    return content.strip() or None if isinstance(content, str) else None
