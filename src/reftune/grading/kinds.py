"""Gold answers that are not one number: texts, expressions, lists, sets, spellings, patterns."""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Sequence

from reftune.errors import DataError
from reftune.grading.mathematics import looks_like_math
from reftune.grading.plain_text import with_decimal_points
from reftune.types import Answer, AnswerKind

_LISTED = re.compile(r"\[\s*(.+?)\s*\]", re.DOTALL)
_EDGES = {"[": "]", "(": ")", "{": "}"}


def told_gold(raw: object, kind: AnswerKind, decimal: str = ".") -> Answer | None:
    """A gold of an explicit kind that takes the cell as it is: several parts or a pattern. None
    for the other kinds.

    Raises: DataError with the value; the caller adds where it stands.
    """
    if kind in ("any_of", "list", "set"):
        return collected_gold(_with_points(raw) if decimal == "," else raw, kind)
    if kind == "regex":
        return pattern_gold(raw)
    refuse_list(raw)
    return None


def _with_points(raw: object) -> object:
    """A cell of numbers with decimal commas, alone or as the parts of a list, in points."""
    if isinstance(raw, list | tuple):
        return [_with_points(each) for each in raw]
    return with_decimal_points(raw) if isinstance(raw, str) else raw


def worded_gold(text: str) -> Answer:
    """The kind of a gold that is neither an option nor a number: an expression (`latex`), a list in
    brackets, of three or of words, else a text."""
    text = text.strip()
    listed = _LISTED.fullmatch(text)
    parts = split_items(text) if listed is not None else ()
    if len(parts) > 2 or (len(parts) == 2 and all(part.isalpha() for part in parts)):
        return Answer(kind="list", value=", ".join(parts), items=parts)
    return Answer(kind="latex" if looks_like_math(text) else "text", value=text)


def collected_gold(raw: object, kind: AnswerKind) -> Answer:
    """A gold of several parts: `any_of` the accepted spellings, a `list` in its order, or a `set`.

    `raw` is a list, a list written as text ("[1, 2]"), or parts with commas or semicolons between
    them. Raises: DataError with the value; the caller adds where it stands.
    """
    values = _values(raw, kind)
    parts = tuple(dict.fromkeys(values) if kind in ("any_of", "set") else values)
    if not parts or not all(part.strip() for part in parts):
        raise DataError(f"{_shown(raw)} has no parts; expected a list of texts or numbers")
    if kind == "any_of":
        return Answer(kind="any_of", value=parts[0], items=parts)
    if kind == "set":
        return Answer(kind="set", value=", ".join(parts), items=parts)
    return Answer(kind="list", value=", ".join(parts), items=parts)


def pattern_gold(raw: object) -> Answer:
    """A gold that is a regular expression. Raises: DataError if it is not one."""
    try:
        re.compile(str(raw))
    except re.error as error:
        raise DataError(f"{_shown(raw)} is not a regular expression: {error}") from None
    return Answer(kind="regex", value=str(raw))


def refuse_list(raw: object) -> None:
    """Raises: DataError if `raw` is a list and nobody said how it is to be read."""
    if isinstance(raw, Sequence) and not isinstance(raw, str):
        raise DataError(
            f"expected a number, a text or a letter, got the list {_shown(raw)}; answer_kind:"
            " any_of (accepted spellings), list (all, in order) or set (all, in any order) reads it"
        )


def split_items(text: str) -> tuple[str, ...]:
    """The parts of a list as people write it: in brackets or not, with commas, semicolons, line
    breaks or "and" between them. A comma inside a number parts nothing if others have a space."""
    text = re.sub(r"\\(?:left|right)\b|\\(?=[{}])", "", text.strip().strip("$")).strip()
    if text[:1] in _EDGES and text.rstrip(".")[-1:] == _EDGES[text[0]]:
        text = text.rstrip(".")[1:-1]
    comma = r",\s+|,$" if re.search(r",\s", text) else ","
    parts = re.split(rf"\s*(?:{comma}|;|\n+|(?:,\s*)?\band\b)\s*", text)
    cleaned = (re.sub(r"^(?:[-*•]|\d+[.)])\s+", "", part).strip(" \t'\"") for part in parts)
    return tuple(part for part in cleaned if part)


def _values(raw: object, kind: AnswerKind) -> list[str]:
    if isinstance(raw, str) and raw.lstrip()[:1] == "[":
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            raw = ast.literal_eval(raw.strip())
    if isinstance(raw, str):
        return [raw.strip()] if kind == "any_of" else list(split_items(raw))
    values = list(raw) if isinstance(raw, Sequence) else [raw]
    if not all(isinstance(each, str | int | float) and each is not True for each in values):
        raise DataError(f"{_shown(raw)}: expected a list of texts or numbers")
    return [str(each).strip() for each in values]


def _shown(raw: object) -> str:
    text = repr(raw)
    return text if len(text) <= 60 else text[:57] + "..."
