"""Where a completion states its answer."""

from __future__ import annotations

import re
from collections import deque

MAX_BOX_CHARS = 20_000

_MARKER = re.compile(
    r"the\s{1,9}(?:final\s{1,9}|correct\s{1,9})?answer\s{1,9}is\b|answer[\s*_\"'`]{0,9}[:：]|#{4,}|\\boxed\b",
    re.IGNORECASE,
)


def answer_text(completion: str) -> str | None:
    """What follows the last marker of `completion`: "the answer is", "answer:", "####" in any case,
    or a box's content.

    None without a marker, or where the last one is a box that is never closed.
    """
    markers = deque(_MARKER.finditer(completion), maxlen=1)
    if not markers:
        return None
    last = markers.pop()
    if last.group().startswith("\\"):
        return _box_content(completion, last.end())
    return completion[last.end() :]


def reasoning_text(completion: str) -> str:
    """What stands before the first marker: the reasoning that leads to the answer."""
    marker = _MARKER.search(completion)
    return completion if marker is None else completion[: marker.start()]


def _box_content(text: str, start: int) -> str | None:
    """The content of the braces at `start`; a percent sign right behind them belongs to it."""
    depth = 0
    for index, char in enumerate(text[start : start + MAX_BOX_CHARS], start):
        depth += (char == "{") - (char == "}")
        if depth == 0 and not char.isspace():
            if char != "}":
                return None
            percent = re.match(r"\s{0,3}\\?%", text[index + 1 : index + 6])
            return text[start:index].lstrip()[1:] + "%" * (percent is not None)
    return None
