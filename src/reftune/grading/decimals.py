"""Converts between decimal points and decimal commas. The rest of the code reads and writes numbers
with decimal points."""

from __future__ import annotations

import re

from reftune.grading.plain_text import without_grouping_spaces
from reftune.types import AnswerKind

_DIGITS = re.compile(r"\d[\d.,]*\d")
_GROUPED_BY_POINTS = re.compile(r"[1-9]\d{0,2}(?:\.\d{3})+(?:,\d+)?")
_ENGLISH = re.compile(r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d+)?")
_SWAPPED = str.maketrans(".,", ",.")
_PAIR = re.compile(r"([(\[] ?-?\d+ ?, ?-?\d+ ?(?:\\right)?[)\]])")
"""Matches two whole numbers in brackets (a point, an interval or a list). The comma between them
is not a decimal comma."""
COMMA_LIST = re.compile(r"\[(?=.*\d,\d)(?=.*,\s)[-\d\s,.]+\]", re.DOTALL)
"""Matches a list of numbers with decimal commas, such as "[1,5, 2,5]"."""
_KEPT: tuple[AnswerKind, ...] = ("text", "latex", "regex")
"""Kinds of answers in which decimal separators stay as they are."""


def with_points(cell: object, decimal: str, kind: AnswerKind | None = None) -> str:
    """The text of `cell`, with decimal points in its numbers instead of the separator `decimal`. If
    `decimal` is a comma, "3,5" becomes "3.5", and "1.250,75" becomes "1,250.75". Spaces that
    group thousands are removed: "1 250,75" becomes "1250.75". A point that cannot separate
    thousands, as in "2.5", stays a decimal point. `kind` is the kind of the answer
    in `cell`. A pair such as "(1,2)" stays unchanged unless `kind` is `number`. No separators
    change if `kind` is text, latex or regex, or if `cell` is not a string."""
    if not isinstance(cell, str) or decimal == "." or kind in _KEPT:
        return str(cell)
    parts = [cell] if kind == "number" else _PAIR.split(cell)
    for n in range(0, len(parts), 2):  # the others are pairs
        text = without_grouping_spaces(parts[n]).replace("{,}", ",")
        parts[n] = _DIGITS.sub(_with_point, text)
    return "".join(parts)


def _with_point(match: re.Match[str]) -> str:
    digits = match[0]
    if _GROUPED_BY_POINTS.fullmatch(digits):
        return digits.translate(_SWAPPED)
    return digits.replace(",", ".") if digits.count(",") == 1 and "." not in digits else digits


def with_separator(text: str, decimal: str, kind: AnswerKind | None = None) -> str:
    """`text`, with its numbers written with the decimal separator `decimal`. If this is a comma,
    thousands are separated by points: "1,250.75" becomes "1.250,75". If `kind` is text, latex or
    regex, the string is returned unchanged."""
    if decimal == "." or kind in _KEPT:
        return text
    return _DIGITS.sub(
        lambda match: match[0].translate(_SWAPPED) if _ENGLISH.fullmatch(match[0]) else match[0],
        text,
    )
