"""Finds the answer in a completion: the text after a marker, such as "the answer is"."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

MAX_BOX_CHARS = 20_000
MAX_STATEMENTS = 20
"""Maximum number of markers that are read, counted back from the end of a completion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How to read completions: settings that depend on the language and the model."""

    stop_at: tuple[str, ...] = ("\nQuestion:", "\nQ:", "\nProblem:")
    """Strings that mark the start of run-on text, in which a model asks itself another question."""
    markers: tuple[str, ...] = ()
    """Phrases that announce an answer, in addition to the built-in markers."""
    decimal: Literal[".", ","] = "."
    """The decimal separator: a point or a comma. The other one separates thousands."""


DEFAULT = Reading()


@dataclass(frozen=True, slots=True)
class Statement:
    """The text that a marker announces."""

    text: str | None
    """None if the marker opens a LaTeX box (`\\boxed{`) that is never closed."""
    is_closed: bool = False
    """Whether the text is the content of a closed box or tag."""
    start: int = 0
    """Index in the completion at which the marker begins."""
    end: int = 0
    """Index in the completion after the statement's closing brace or tag. If there is none, the
    index at which the text that counts ends (see `statements`)."""

    def up_to(self, end: int) -> Statement:
        """The statement, cut off at the index `end`. A statement that is closed or has no text
        stays unchanged."""
        if self.text is None or self.is_closed:
            return self
        return replace(self, text=self.text[: end - self.end], end=end)


TAG = re.compile(r"</?(?:think(?:ing)?|answer)>", re.IGNORECASE)
"""Matches the tags that `statements` handles."""
UP_TO_LAST_TAG = re.compile(r".*(?P<tag><(?P<closes>/?)think(?:ing)?>)", re.IGNORECASE | re.DOTALL)
"""Matches a text up to its last `<think>` or `</think>`."""
_COLON = r"(?:[ *_]{0,9}[:：])?"
_PHRASES = (
    r"(?:the|my|our)\s{1,9}(?:final\s{1,9}|correct\s{1,9})?answer\s{1,9}"
    rf"(?:to\s{{1,9}}(?:the|this)\s{{1,9}}(?:question|problem)\s{{1,9}})?is\b{_COLON}",
    rf"final\s{{1,9}}answer\s{{1,9}}is\b{_COLON}",
    rf"the\s{{1,9}}correct\s{{1,9}}(?:option|choice)\s{{1,9}}is\b{_COLON}",
    r"\|[\s*_]{0,9}(?:final\s{1,9})?answer[\s*_]{0,9}\|",
    r"answer[\s*_\"'`]{0,9}(?:[:：]|=(?![=>]))",
    # a heading before one short line
    r"(?<![^\n])[#*_ ]{0,9}(?:final[ ]{1,9})?answer[*_ ]{0,9}\n"
    r"(?=\s*(?!\. )\S(?:(?!\. )[^\n]){0,59}\s*\Z)",
    r"#{4,}",
    r"\\(?:f?boxed|fbox)(?![a-zA-Z])",
    r"<answer>",
)


def statements(completion: str, reading: Reading = DEFAULT) -> list[Statement]:
    """The statements of a completion, in order. A statement is the text that a marker introduces.
    Only the last `MAX_STATEMENTS` markers count. Markers include "the answer is", "answer:",
    "####", the headings "Answer" and "Final Answer", `\\boxed{…}`, `<answer>…</answer>` and
    `reading.markers`.

    A completion that ends inside `<think>` has no statements. Otherwise, text counts only if it is
    after the last `</think>` and before any new question that the model writes (see
    `Reading.stop_at`). Such a heading is a marker only if there is no other marker and one short
    line follows the heading. A remark on an earlier statement, such as "so our answer is correct",
    is not a statement.
    """
    start, end = _answering_part(completion, reading)
    marker = marker_pattern(reading.markers)
    markers = deque(marker.finditer(completion, start, end), maxlen=MAX_STATEMENTS)
    if len(markers) > 1:
        markers = deque(each for each in markers if not each[0].endswith("\n"))
    found: list[Statement] = []
    for each in _statements(completion, end, markers):
        if found and _is_remark(completion, found[-1], each):
            found[-1] = found[-1].up_to(each.start)
        else:
            found.append(each)
    return found


def _is_remark(completion: str, before: Statement, statement: Statement) -> bool:
    """Whether `statement` only says that the statement `before` is right. Because "right" may
    itself be an answer (a direction), one of three conditions must hold: the marker of `statement`
    begins with "our" or "my", `before` is a closed box or tag, or the text of `before` begins with
    a number. An expression of doubt, as in "check whether the answer is right", does not count."""
    text = statement.text or ""
    phrase = completion[statement.start : statement.end - len(text)]
    if statement.is_closed or not _SAYS_IS.search(phrase) or not _REMARK.match(text):
        return False
    if _NOT_ASSERTED.search(completion[max(0, statement.start - 60) : statement.start]):
        return False
    is_own = phrase[:3].casefold() in ("our", "my ")
    return is_own or before.is_closed or re.match(r"\W{0,9}\d", before.text or "") is not None


_SAYS_IS = re.compile(r"\bis$", re.IGNORECASE)
_NOT_ASSERTED = re.compile(
    r"\b(?:if|whether|unless|not|unsure|doubt|hope|assum\w+|suppos\w+|claim\w*|wait|no)\b"
    r"[^.\n]*\.?\s*$",
    re.IGNORECASE,
)
_REMARK = re.compile(
    r"\s{1,9}(?:(?:also|indeed|therefore|thus)\s)?"
    r"(?:(?:correct|right|reasonable|plausible|sensible|valid|verified|confirmed)"
    r"(?=\s{0,3}(?:[.!:]|$)|\s(?:because|since)\b)|consistent\swith\b"
    r"|(?:rounded|correct|accurate)\sto\s(?:the\snearest|\w{1,9}\s(?:decimal|significant)))",
    re.IGNORECASE,
)


_OR = re.compile(r"(?:\bor|/)[\s$\\(\[]*(?:[^\W\d]\w?\s{0,3}=\s{0,3})?[\s$]*$", re.IGNORECASE)
_SIGNS = r"(?:[\s$\\(){}\[\]*.,;:&/]|\\(?:text|mbox|q?quad)\b)*"
_NOUN = r"(?:(?!(?:then|so|thus|hence)\b)[^\W\d_]+(?=\s*(?:,|\b(?:or|and)\b)))?"
SIDE_BY_SIDE = re.compile(
    rf"{_SIGNS}{_NOUN}{_SIGNS}(?:\b(?:or|and)\b{_SIGNS})?(?:[^\W\d]\w?\s{{0,3}}=)?{_SIGNS}",
    re.IGNORECASE,
)
"""Matches the text between two LaTeX boxes or tags that contain parts of one answer."""


def is_alternative(completion: str, before: Statement, after: Statement) -> bool:
    """Whether two successive statements are parts of one answer, as in "\\boxed{3} or \\boxed{4}"
    and "the answer is 3 or the answer is 4"."""
    if before.text is None or "\n" in completion[before.start : after.start].strip():
        return False
    if before.is_closed and after.is_closed:
        between = completion[before.end : after.start]
        return bool(between.strip()) and SIDE_BY_SIDE.fullmatch(between) is not None
    return _OR.search(completion, before.start, after.start) is not None


def alternative_behind(completion: str, statement: Statement) -> str | None:
    """The alternative that follows a closed box or tag: the rest of the line after "or". In
    "\\boxed{3} or 4", it is "4". Returns None unless "or" and a number directly follow the box or
    tag."""
    found = _OR_NUMBER.match(completion, statement.end) if statement.is_closed else None
    return None if found is None else completion[found.end() :].partition("\n")[0]


_OR_NUMBER = re.compile(rf"{_SIGNS}\bor\b{_SIGNS}(?=-?\d|\\[dt]?frac)", re.IGNORECASE)


def answer_text(completion: str, reading: Reading = DEFAULT) -> str | None:
    """The text that the last marker announces; None if there is no marker, or if it opens a box
    that is never closed."""
    found = statements(completion, reading)
    return found[-1].text if found else None


def open_thought(text: str) -> str:
    """The part of a text from its last `<think>` on. Empty if the text has no `<think>`, or if the
    last thought is closed."""
    last = UP_TO_LAST_TAG.match(text)
    return "" if last is None or last["closes"] else text[last.start("tag") :]


def reasoning_text(completion: str) -> str:
    """The reasoning that leads to the answer: the text before the first built-in marker, if any."""
    return marker_pattern(()).split(completion, maxsplit=1)[0]


def _answering_part(completion: str, reading: Reading) -> tuple[int, int]:
    """The start and end index of the part of a completion that counts (see `statements`)."""
    last = UP_TO_LAST_TAG.match(completion)
    if last is not None and not last["closes"]:
        return len(completion), len(completion)
    start = 0 if last is None else last.end()
    begins = len(completion) - len(completion[start:].lstrip())
    ends = [completion.find(stop, begins) for stop in reading.stop_at if stop]
    return start, min((end for end in ends if end >= 0), default=len(completion))


@lru_cache(maxsize=16)
def marker_pattern(phrases: Sequence[str]) -> re.Pattern[str]:
    """A pattern that matches the built-in markers and `phrases`."""
    own = (re.escape(phrase.strip()) + _COLON for phrase in phrases if phrase.strip())
    return re.compile("|".join([*_PHRASES, *own]), re.IGNORECASE)


def _statements(completion: str, end: int, markers: Iterable[re.Match[str]]) -> Iterator[Statement]:
    for marker in markers:
        start, begin = marker.start(), marker.end()
        if marker[0].startswith("\\"):
            if _OPENS_BOX.match(completion, begin):
                content, stop = _box(completion, begin)
                yield Statement(content, content is not None, start, stop)
            elif _BARE_BOX.match(completion, begin):
                yield Statement(completion[begin:end], start=start, end=end)
        elif marker[0].startswith("<"):
            closing = _CLOSING.search(completion, begin)
            stop, behind = (end, end) if closing is None else closing.span()
            yield Statement(completion[begin:stop], closing is not None, start, behind)
        else:
            yield Statement(completion[begin:end], start=start, end=end)


_CLOSING = re.compile("</answer>", re.IGNORECASE)
_BARE_BOX = re.compile(r" {0,3}(?:-?\d|\\[dt]?frac|[A-H](?!\w))")
_OPENS_BOX = re.compile(r"\s{0,9}\{")


def _box(text: str, start: int) -> tuple[str | None, int]:
    """The content of the braces at `start`, and the index after the braces. A percent sign after
    the braces is treated as if it were inside. If the braces do not close within `MAX_BOX_CHARS`
    characters, the content is None, and the index is the length of the text."""
    opening, depth = text.index("{", start), 0
    for index in range(opening, min(len(text), start + MAX_BOX_CHARS)):
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            percent = re.compile(r"\s{0,3}\\?%").match(text, index + 1, index + 6)
            end = index + 1 if percent is None else percent.end()
            return text[opening + 1 : index] + "%" * (percent is not None), end
    return None, len(text)
