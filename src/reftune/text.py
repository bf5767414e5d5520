"""Formats numbers and text for the user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def printable(text: str) -> str:
    """`text` with `�` in place of unprintable characters, which could control a terminal. Line
    breaks and tabs are kept."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else "�" for character in text
    )


def shown(value: object) -> str:
    """The `repr` of a value, cut to 60 characters for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def brief(error: object) -> str:
    """An error's message as one line of at most 200 characters. A longer message is cut at a space,
    if there is one after its first 100 characters."""
    line = " ".join(str(error).split())
    if len(line) <= 200:
        return line
    cut = line.rfind(" ", 100, 200)
    return line[: cut if cut > 0 else 199] + "…"


def counted(number: int, noun: str) -> str:
    """A number and what it counts: `1 prompt` or `1,200 prompts`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A hint such as `did you mean partial?`; empty if no known name is similar."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {near[0]}?" if near else ""


def clock(seconds: float) -> str:
    """A duration, such as `0:31` (minutes and seconds) or `1:02:03` (with hours)."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
