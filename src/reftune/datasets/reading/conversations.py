"""Reads conversations in rows. A turn has OpenAI's keys `{role, content}` or ShareGPT's
`{from, value}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from reftune.errors import DataError
from reftune.text import shown
from reftune.types import Message

ROLES: Mapping[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}


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


def is_conversation(value: object) -> bool:
    """Whether a value is a list of turns."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(isinstance(turn, Mapping) and bool({"role", "from"} & set(turn)) for turn in value)
    )


def is_answered(turns: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a conversation ends with a turn of the assistant."""
    return _role(turns[-1]) == "assistant"


def read_conversation(value: Sequence[Mapping[str, Any]], where: str) -> Conversation:
    """Read the turns in a cell, leaving out empty system messages. Raises: DataError if any other
    turn has an unknown role, no text, or content other than text."""
    turns = tuple(_message(turn, where) for turn in value if not _is_empty_system(turn))
    return Conversation(
        before=turns[:-1] if is_answered(value) else turns,
        reply=turns[-1].content if is_answered(value) else None,
    )


def _is_empty_system(turn: Mapping[str, Any]) -> bool:
    content = turn.get("content", turn.get("value"))
    return _role(turn) == "system" and (content is None or not str(content).strip())


def _role(turn: Mapping[str, Any]) -> Literal["system", "user", "assistant"] | None:
    return ROLES.get(str(turn.get("role", turn.get("from"))).lower())


def _message(turn: Mapping[str, Any], where: str) -> Message:
    speaker, role = turn.get("role", turn.get("from")), _role(turn)
    content = _text(turn.get("content", turn.get("value")))
    if role is None:
        raise DataError(
            f"{where}: a turn has the role {shown(speaker)}; expected one of {', '.join(ROLES)}"
            " (tools are not supported)"
        )
    if content is None:
        raise DataError(f"{where}: a turn of {speaker} has no text: {shown(turn)}; expected text")
    return Message(role=role, content=content)


def _text(content: object) -> str | None:
    """A turn's text; None if the turn has no text, or if it also contains something else, such as
    an image."""
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        content = "\n".join(map(str, parts)) if None not in parts else None
    return content.strip() or None if isinstance(content, str) else None
