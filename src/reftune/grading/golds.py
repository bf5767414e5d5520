"""Reads the gold answers of the data, strictly: a gold answer is a number only if its whole text is
one number, with or without a currency or unit. The module `sentences` reads completions more
leniently. It would read the gold answer "5 pm" as 5, and training would then reward wrong
answers."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from string import ascii_lowercase
from typing import Any, Literal

import regex

from reftune.errors import DataError
from reftune.grading.decimals import COMMA_LIST, with_points
from reftune.grading.markers import (
    DEFAULT,
    SIDE_BY_SIDE,
    UP_TO_LAST_TAG,
    Reading,
    Statement,
    alternative_behind,
    marker_pattern,
    statements,
)
from reftune.grading.mathematics import looks_like_math
from reftune.grading.numbers import Number, numeral_at, same_number
from reftune.grading.plain_text import plain, same_text
from reftune.grading.units import is_unit
from reftune.text import shown
from reftune.types import Answer, AnswerKind

GoldKind = Literal["auto", AnswerKind]
MAX_GOLD_CHARS = 2_000
"""Text with more characters than this does not count as a number."""
MOST_BETWEEN = 100
"""Two answers count as side by side (see `_stated`) only if neither the earlier answer nor the text
between the two answers has more characters than this."""
SEVERAL = "any_of (accepted spellings), list (all, in order) or set (all, in any order)"


def read_gold(
    raw: object, kind: GoldKind = "auto", *, choices: Sequence[str] = (), reading: Reading = DEFAULT
) -> Answer:
    """The gold answer in a cell of the data, with its kind.

    If the cell marks its answer ("#### 78", "\\boxed{78}", "The answer is 78"), only the marked
    part is read, except for the kind `regex`. For the kind `auto`, the answer is a choice if there
    are `choices`. Otherwise, it is a number if the part that is read is one number, with or without
    a currency or unit. If it is neither a choice nor a number, it is an expression, a list in
    brackets, or text. For the kind `auto` without `choices`, a cell such as "(B) 12" yields two
    accepted spellings: the letter and the text after it (kind `any_of`).

    Raises: DataError if the cell has no answer of the requested kind. The caller adds the cell's
    location to the message.
    """
    if kind == "regex":
        return _pattern(raw)
    if kind in ("any_of", "list", "set"):
        return _several(raw, kind, reading)
    _refuse_other_types(raw)
    stated = stated_gold(raw, reading)
    if kind == "choice" or (kind == "auto" and choices):
        return Answer(kind="choice", value=_letter(stated, choices, reading))
    if kind in ("text", "latex"):
        return Answer(kind=kind, value=str(stated))
    number = number_gold(stated, reading)
    if number is None and kind == "number":
        raise DataError(
            f"{shown(raw)}; expected a number, with at most a currency or one unit, or another"
            " answer_kind"
        )
    option = _option_gold(f"({stated}", reading)  # "B) 12" is "(B) 12" without the first bracket
    return number or option or worded_gold(str(stated), reading)


def number_gold(raw: object, reading: Reading = DEFAULT) -> Answer | None:
    """The gold answer in a cell that is one number, with or without a currency or unit; None for
    any other cell."""
    found = number_in_gold(raw, reading)
    if found is None:
        return None
    return Answer(kind="number", value=found.value, decimals=found.decimals, percent=found.percent)


def number_in_gold(raw: object, reading: Reading = DEFAULT) -> Number | None:
    """The number in a cell, read as in `number_gold`. A boolean does not count as a number."""
    if isinstance(raw, int):
        return None if isinstance(raw, bool) else Number(Fraction(raw), 0)
    if not isinstance(raw, str | float) or len(str(raw)) > MAX_GOLD_CHARS:
        return None
    text = with_points(raw, reading.decimal)
    formula = _FORMULA.fullmatch(text.strip())
    if text.lstrip(" $").startswith("~"):
        return None
    text = _SPACED_MINUS.sub("-", text)
    line = " ".join(plain(text if formula is None else formula[1]).split())
    bare = line if line.endswith("...") else line.removesuffix(".").rstrip()
    if bare[:1] + bare[-1:] in ("()", "[]", '""', "''") and "," not in bare:
        bare = bare[1:-1].strip()
    found = numeral_at(bare, 0)
    if found is None:
        return None
    number, end = found
    written, rest = bare[:end], bare[end:]
    if _NOT_WHOLE.search(written):
        return None
    ordinal = _ORDINAL.match(rest)
    if ordinal is not None and number.value.denominator == 1:
        rest = rest[ordinal.end() :]
    return number if is_unit(rest) else None


_SPACED_MINUS = re.compile(r"^ *– +(?=[\d.])")
_FORMULA = re.compile(r"\$+((?:[^$\\]|\\.)*)\$+", re.DOTALL)
_ORDINAL = re.compile(r"\^?[{(]? ?(?:st|nd|rd|th)\b ?[})]?")
_NOT_WHOLE = re.compile(
    r"\d ?- ?\d+ ?/|\band\b|/ ?0\d|\b0\d ?/|_(?!\d{3}(?!\d))|\d ?(?:[kmbt]|[bmt]n)$", re.IGNORECASE
)
"""Matches spellings that are accepted in completions, but not in gold answers: 3-1/2 may be 5/2,
05/06 may be a date, and reading 5_8 or 5k would be a guess."""


def stated_gold(raw: object, reading: Reading = DEFAULT) -> object:
    """The last answer that a marker ("The answer is") announces in a cell. Without a marker, the
    answer is the text after the last `</think>` or, if there is none, the whole cell.

    Raises: DataError if different answers stand side by side (as in "\\boxed{3} or \\boxed{4}"); if
    there are markers but none announces an answer; or if nothing follows the last `</think>`.
    """
    if not isinstance(raw, str):
        return raw
    said = _stated(raw, reading)
    if any(not _same(each, said[-1], reading) for each in said):
        marked = " and ".join(dict.fromkeys(said))
        raise DataError(
            f"{shown(raw)}, which marks {marked}; expected one answer, or answer_kind: {SEVERAL}"
        )
    thought = UP_TO_LAST_TAG.match(raw)
    answer = raw[thought.end() :] if thought is not None and thought["closes"] else raw
    if not said and (statements(raw, reading) or (thought is not None and not answer.strip())):
        raise DataError(f"{shown(raw)}, which has no answer after its marker; expected one there")
    return said[-1] if said else answer.strip()


def listed_item(stated: object, reading: Reading = DEFAULT) -> object:
    """Returns `stated` unchanged, unless `stated` is a string that spells a list of one quoted
    item: for '["3"]', returns `3`. Raises: DataError if the string spells a list of several quoted
    items, unless `worded_gold` reads exactly these items from the string."""
    text = stated.strip() if isinstance(stated, str) else ""
    if not (text.startswith("[") and re.search("[\"']", text)):
        return stated
    items = literal(_LONE_BACKSLASH.sub(lambda match: match[0] if match[1] else r"\\", text))
    if not isinstance(items, list):
        return stated
    written = tuple(str(item).strip() for item in items)
    if len(items) > 1 and worded_gold(text, reading).items != written:
        _refuse_other_types(items)
    return items[0] if len(items) == 1 and isinstance(items[0], str) else stated


_LONE_BACKSLASH = re.compile(r"\\([\\\"']|u[0-9a-fA-F]{4})?")
"""Matches an escape sequence (then group 1 is set), or a lone backslash, as in "\\frac". Python
would read the lone backslash and the letter f as a form feed."""


def _stated(text: str, reading: Reading) -> list[str]:
    """The last answer that a marker ("the answer is") announces, and any answers beside it, in text
    order. Two marked answers are beside each other if they are separated by little more than a
    marker, symbols, or a word such as "or". If the last marked answer is in a complete box or tag,
    a number after "or" is included even if it has no marker: in "\\boxed{3} or 4", 4 is
    included."""
    found = [each for each in statements(text, reading) if each.text is not None]
    following = [each.start for each in found[1:]] + [len(text)] * bool(found)
    pairs = zip(found, following, strict=True)
    answers = [(each, _said(each, text, end, reading)) for each, end in pairs]
    answers = [(each, said) for each, said in answers if re.search(r"\w", said)]
    first = len(answers) - 1
    while first > 0 and _is_beside(text, *answers[first - 1], *answers[first], reading):
        first -= 1
    another = alternative_behind(text, answers[-1][0]) if answers else None
    return [said for _, said in answers[max(0, first) :]] + ([another] if another else [])


def _said(statement: Statement, text: str, end: int, reading: Reading) -> str:
    """The answer that a marker announces, without any text from the index `end` on."""
    said = (statement.text or "").strip()
    if statement.is_closed:
        return said
    begin = statement.end - len(statement.text or "")
    said, marker = text[begin : min(end, statement.end)], text[statement.start : begin]
    said = _BULLET.sub("", said)
    if end < len(text):  # another marker follows
        said = _JOINT.sub("", said)
    if marker[0] == "|":  # a row of a table
        return said.partition("|")[0].strip(" *_")
    if '"' in marker:  # "answer": "12", as in JSON
        return re.split(r"\s*(?:,\s*\"|\}\s*$)", said, maxsplit=1)[0].strip(' "')
    first, _, rest = said.strip(" \t\n:*_").partition("\n")
    is_apart = first.rstrip(" *_").endswith(".") or _EXPLANATION.match(rest) is not None
    has_more = any(map(str.isdigit, rest)) and not is_apart
    first = first.removesuffix(".").strip(" *_")
    sentence = re.split(r"\. |; (?!\W*\d)", first, maxsplit=1)[0]
    if number_in_gold(sentence, reading) is not None and not has_more:
        return sentence
    return said.strip() if has_more or text[statement.start] == "#" else first


_JOINT = re.compile(r"(?<![\s,;])[\s,;]*(?:\b(?:or|and)\W*)?$", re.IGNORECASE)
_BULLET = re.compile(r"^[ \t:*_]*\n\s*[-*+•] +")
_EXPLANATION = re.compile(r"\W*(?:explanation|reason(?:ing)?|check|verification|note)\b", re.I)


def _is_beside(
    text: str, before: Statement, earlier: str, after: Statement, said: str, reading: Reading
) -> bool:
    if len(between := text[before.end : after.start]) > MOST_BETWEEN or len(earlier) > MOST_BETWEEN:
        return False
    if before.is_closed:
        between = marker_pattern(reading.markers).sub("", between)
        return SIDE_BY_SIDE.fullmatch(between) is not None
    earlier = re.sub(r"\W*$", "", earlier)
    numbers = [number_in_gold(each, reading) is not None for each in (earlier, said)]
    return all(numbers) or (not any(numbers) and len(earlier.split()) <= 2)


def _same(first: str, second: str, reading: Reading) -> bool:
    a, b = number_in_gold(first, reading), number_in_gold(second, reading)
    return same_text(first, second) or (a is not None and b is not None and same_number(a, b))


def _refuse_other_types(raw: object) -> None:
    if isinstance(raw, Sequence) and not isinstance(raw, str):
        raise DataError(
            f"{shown(raw)}, a list; expected a number, text or a letter, or answer_kind: {SEVERAL}"
        )
    is_answer = isinstance(raw, str | int) or (isinstance(raw, float) and math.isfinite(raw))
    if not is_answer or not str(raw).strip():
        raise DataError(f"{shown(raw)}; expected a number, text or a letter")


# --- words, lists and patterns --------------------------------------------------------------------


_OPTION = re.compile(
    r"\((?P<letter>[A-H])\)"
    r"(?: (?!and\b|or\b)(?!.*[\s,;/]\(?[A-Z]\)\s*[\w\\$-])(?P<text>[\w\\$-].*))?"
)
"""Matches a single option, but not several, as in "(A) 5, (B) 3"."""
_LISTED = re.compile(r"\[\s*(.+?)\s*\]", re.DOTALL)


def _option_gold(text: str, reading: Reading) -> Answer | None:
    """The gold answer in a text such as "(B)" or "\\textbf{(B)}\\ 12". The answer is the letter B;
    if the option's text follows, it is accepted too. Returns None if `text` does not have this
    form."""
    found = _OPTION.fullmatch(" ".join(plain(text).split()))
    if found is None:
        return None
    letter, said = found["letter"], found["text"]
    if said is None:
        return Answer(kind="text", value=letter)
    return Answer(kind="any_of", value=letter, items=(letter, with_points(said, reading.decimal)))


def worded_gold(text: str, reading: Reading = DEFAULT) -> Answer:
    """The non-numeric gold answer in `text`: an option's letter (see `_option_gold`), an expression
    (kind `latex`), words (kind `text`), or a list in square brackets. Text in brackets is read as a
    list only if it has at least three items, or two items that are single words."""
    text = text.strip()
    if option := _option_gold(text, reading):
        return option
    parts: tuple[str, ...] = ()
    if _LISTED.fullmatch(text):
        is_decimal = COMMA_LIST.fullmatch(text) or not literal(text)
        parts = split_items(with_points(text, reading.decimal) if is_decimal else text)
    if len(parts) > 2 or (len(parts) == 2 and all(part.isalpha() for part in parts)):
        return Answer(kind="list", value=", ".join(parts), items=parts)
    return Answer(kind="latex" if looks_like_math(text) else "text", value=text)


def _several(raw: object, kind: Literal["any_of", "list", "set"], reading: Reading) -> Answer:
    """A gold answer that is a `list`, a `set` or several accepted spellings (`any_of`). `raw` may
    be a list, a list written as text ("[1, 2]"), or text that marks each item ("\\boxed{1} and
    \\boxed{2}"). For a `list` or `set`, it may also be text such as "1, 2", which `split_items`
    splits."""
    values = list(_values(raw, kind, reading))
    parts = tuple(dict.fromkeys(values) if kind in ("any_of", "set") else values)
    if not parts or not all(part.strip() for part in parts):
        raise DataError(f"{shown(raw)}; expected a list of strings or numbers")
    return Answer(kind=kind, value=parts[0] if kind == "any_of" else ", ".join(parts), items=parts)


def _values(raw: Any, kind: str, reading: Reading) -> Iterator[str]:
    if isinstance(raw, str):
        said = _stated(raw, reading)
        raw = said[0] if len(said) == 1 else said or raw
    if isinstance(raw, str) and raw.lstrip()[:1] == "[":
        if reading.decimal == "," and COMMA_LIST.fullmatch(raw.strip()):
            raw = re.split(r",\s+", raw.strip()[1:-1].strip())
        elif _GROUPED.match(raw) and re.search(r", |,0", raw):  # [1,000, 2], [10,000]
            raw = split_items(raw)
        else:
            raw = literal(raw.strip()) or raw
    if isinstance(raw, str) and kind != "any_of":
        yield from split_items(with_points(raw, reading.decimal))
        return
    for each in raw if isinstance(raw, Sequence) and not isinstance(raw, str) else [raw]:
        if not isinstance(each, str | int | float) or isinstance(each, bool):
            raise DataError(f"{shown(raw)}; expected a list of strings or numbers")
        yield with_points(each, reading.decimal).strip()


_GROUPED = re.compile(r"\s*\[[^\"']*\d,\d{3}(?!\d)[^\"']*$")


def literal(text: str) -> object:
    """The value of a Python literal, such as a list; None if `text` is not a literal."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _pattern(raw: object) -> Answer:
    if not isinstance(raw, str | int | float) or not str(raw).strip():
        raise DataError(f"{shown(raw)}; expected a regular expression")
    try:
        regex.compile(str(raw))
    except regex.error as error:
        raise DataError(f"{shown(raw)}, which is not a regular expression: {error}") from None
    return Answer(kind="regex", value=str(raw))


def split_items(text: str, words: str = "and") -> tuple[str, ...]:
    """The items of a written list, with or without brackets. Commas, semicolons, line breaks and
    matches of the pattern `words` separate items, except inside inner brackets. Commas that may
    belong to a number do not separate items:

    - If any comma has a space after it, commas with no space after them do not separate items:
      "1,000, 2".
    - Otherwise, if there are separators other than commas, commas before exactly three digits do
      not separate items: "1,000; 2".
    - Otherwise, a comma before exactly three digits with a leading 0 does not separate items:
      "1,050". The exception is a list that begins with 0 and another digit: "010,050" has two
      items.
    """
    bare = text.strip().strip("$")
    if "$" in bare.replace("\\$", ""):
        bare = text  # not without the outer signs of "$x$, $y$"
    text = re.sub(r"\\(?:left|right)\b|\\(?=[{}])", "", bare).strip()
    if _BRACKETED.fullmatch(text):
        text = text.rstrip(".")[1:-1]
    outside = _INNER.sub(lambda match: "x" * len(match[0]), text)
    comma = "," if re.match(r"-?0\d", outside) else r",(?!0\d\d(?!\d))"
    if re.search(r",\s", outside):
        comma = r",\s+|,$"
    elif re.search(rf";|\n|\b(?:{words})\b", outside):
        comma = r",(?!\d{3}(?!\d))"
    separators = re.finditer(rf"\s*(?:{comma}|;|\n+|(?:,\s*)?\b(?:{words})\b)\s*", outside)
    edges = [0, *(edge for match in separators for edge in match.span()), len(text)]
    parts = [text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]
    cleaned = (re.sub(r"^(?:[-*•]|\d+[.)])\s+", "", part).strip(" \t'\"") for part in parts)
    return tuple(part for part in cleaned if part)


_INNER = re.compile(r"\([^()\n]*\)|\[[^\[\]\n]*\]|\{[^{}\n]*\}")
_BRACKETED = re.compile(
    r"(?s:\((?:[^()]|\([^()]*\))*\)|\[(?:[^\[\]]|\[[^\[\]]*\])*\]|\{[^{}]*\})\.*"
)


# --- choices --------------------------------------------------------------------------------------


_LETTER = re.compile(
    r"(?:(?:option|choice|answer)\b[ :]*)?[(\[{\"']?(?P<letter>[a-z])(?P<rest>(?![a-z]).*)",
    re.IGNORECASE,
)


def _letter(stated: object, choices: Sequence[str], reading: Reading) -> str:
    """The letter of the option that a gold answer names. The gold answer may be the letter alone,
    the letter followed by the option's text, or a text or numeric value that matches exactly one
    option. Without `choices`, any letter is accepted. Raises: DataError if the gold answer names no
    option, or several."""
    text = with_points(stated, reading.decimal)
    choices = [with_points(choice, reading.decimal) for choice in choices]
    match = _LETTER.fullmatch(" ".join(plain(text).split()))
    if match is not None:
        letter, rest = match["letter"].lower(), match["rest"].lstrip()
        said = rest.strip(" ()[]{}.:,;\"'")
        if not choices and (not said or rest[0] in ")].:"):
            return letter
        option = dict(zip(ascii_lowercase, choices, strict=False)).get(letter)
        bracketed = rest.lstrip(" )]}.:,;")  # if the option's text ends in a bracket
        undashed = (re.sub(r"^[-—] *", "", spelling) for spelling in (said, bracketed))
        spellings = {said, bracketed, *undashed}
        if option is not None and (not said or any(same_option(s, option) for s in spellings)):
            return letter
    texts = [index for index, choice in enumerate(choices) if same_text(text, choice)]
    equal = texts or [index for index, each in enumerate(choices) if same_option(text, each)]
    if len(equal) != 1:
        last = chr(ord("a") + len(choices) - 1)
        expected = f" from a to {last} or the text of one option" if choices else ""
        raise DataError(f"{shown(stated)}; expected a letter{expected}")
    return chr(ord("a") + equal[0])


def same_option(text: str, choice: str) -> bool:
    """Whether a gold answer equals an option, either as text or as a number."""
    if same_text(text, choice):
        return True
    if is_opposite(text, choice):
        return False
    said = number_in_gold(text)
    number = None if said is None else number_in_gold(choice)
    return said is not None and number is not None and said.value == number.value


_OPPOSITES = (
    ({"profit", "gain"}, {"loss"}),
    ({"increase", "rise", "more"}, {"decrease", "fall", "less"}),
)


def is_opposite(first: str, second: str) -> bool:
    """Whether two texts contain opposite words, such as "5% profit" and "5% loss"."""
    a, b = (set(re.findall(r"[a-z]+", text.casefold())) for text in (first, second))
    return any((a & up and b & down) or (a & down and b & up) for up, down in _OPPOSITES)
