"""Spells digits and common symbols in ASCII, and removes Markdown, LaTeX and HTML formatting."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

MAX_SEGMENT_CHARS = 2_000
"""Only this many characters at the start of an answer are searched for a number or choice, or
compared as text."""

_ASCII = str.maketrans(
    {
        **dict.fromkeys("−‐‑‒–﹣", "-"),
        **dict.fromkeys("⁄∕÷", "/"),
        **dict.fromkeys("×⋅·∗", "*"),
        **dict.fromkeys("≈≅≃→⇒", "="),
        **dict.fromkeys("“”", '"'),
        **dict.fromkeys("‘’", "'"),
        **dict.fromkeys("«【", "("),
        **dict.fromkeys("»】", ")"),
        **dict.fromkeys("。．٫", "."),
        "٬": ",",
        **dict.fromkeys("،、", ", "),
        "٪": "%",
        "…": "...",
        "°": " degrees ",
        "￥": "¥",
        "￡": "£",
    }
)
_DIGIT_GAP = re.compile(r"(?<=\d)[\u00a0\u2007\u2009\u202f](?=\d{3}(?!\d))")
_SWISS_GAP = re.compile(r"(?<=\d)['’](?=\d{3}(?!\d))")
_SPACED_DASH = re.compile(r"(?:(?<=\s)(?<!=\s)|^)[–—](?=\s)|—")  # not in "x = – 5"
_OVERLINED = re.compile(r"(?<=[\d.])((?:\d[\u0304\u0305])+)")
RAISED = re.compile(r"[⁺⁻]?[⁰¹²³⁴-⁹]+")
LOWERED = re.compile(r"[₀-₉]+")
_FRAC, _PART = r"\\(?:[dtc]|nice|s)?frac", r"(?:\{ ?(-? ?[\d.,]{1,200}) ?\}|(\d))"
_FONT = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boldsymbol|boxed|fbox)"
_LATEX = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<=\d)(?:\\[,;: ]|\\thinspace\b ?|~)(?=\d{3}(?!\d))", ","),
        (r"(?<=[\d.])\\(?:overline|bar|dot) ?\{ ?(\d{1,40}) ?\}", r"(\1)"),
        (rf"{_FRAC} ?{_PART} ?{_PART}", r" \1\2/\3\4 "),
        (rf"{_FONT} ?\{{([^{{}}]{{0,200}})\}}", r"\1"),
        (r"\{ ?\\(?:bf|rm|it|bfseries|sf|tt)\b ?([^{}]{0,200})\}", r"\1"),
        (r"(?<=[\w)])_ ?\{ ?(\w{1,10}) ?\}", r"_\1"),
        (r"\^ ?(?:\{ ?\\circ ?\}|\\circ)", " degrees "),
        (r"\{,\}", ","),
        (r"\\\\(?![a-zA-Z])", " "),
        (r"\\([$%#&_])", r"\1"),
        (r"\\!", ""),
        (r"\\[,;:> ]|\\q?quad\b|~", " "),
        (r"\\(?:left|right|displaystyle)\b|\\[()\[\]]", ""),
        (r"\\(?:times|cdot)(?![a-zA-Z])", "*"),
        (r"\\div(?![a-zA-Z])", "/"),
        (r"\\(?:approx|implies|Rightarrow)(?![a-zA-Z])", "="),
        (r"\\(?:l?dots)\b", "..."),
    ]
]
_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,40}>|<\|[^<>|]{0,40}\|>")
_FORMULA = re.compile(r"(?<!\\)\$\$?((?:[^$]|(?<=\\)\$){1,400}?)(?<!\\)\$\$?")
_EMPHASIS = re.compile(
    r"(?<![\w)*`$])(?:[*_`]{1,3}(?=[^\s*_`])|\$(?=[^\s$\d.+-]))"
    r"|(?<=[^\s*_`$])[*_`$]{1,3}(?![\w*`$])"
)
_DOLLARS = re.compile(r"\b(?:US ?|[A-Z]{1,2})\$(?= ?[\d.])")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of an answer in plain text, with single spaces."""

    words: str
    is_item: bool
    """Whether the line is an item of a list. The item's bullet or number is not part of `words`."""


def first_line(text: str) -> str:
    """The first line that `plain_lines` yields; empty if it yields none."""
    return next((line.words for line in plain_lines(text)), "")


def plain_lines(text: str) -> Iterator[Line]:
    """The lines of `text` that contain a letter or digit, as plain text. Everything in `text` after
    the first `MAX_SEGMENT_CHARS` characters is replaced by a backslash. If this cuts a number in
    two, the number is not read, because a backslash follows it. The bullet or number of a list item
    is removed. The first line of `text` never counts as a list item, because a dash at its start
    may be a minus sign."""
    start, count = text.lstrip(), 0
    is_first = "\n" not in text[: len(text) - len(start)]
    segment = start[:MAX_SEGMENT_CHARS] + "\\" * (len(start) > MAX_SEGMENT_CHARS)
    for line in segment.splitlines():
        bullet = None if is_first else re.match(rf"\s*(?:[-*+•–—]|{count + 1}[.)](?=.*\d)) +", line)
        words = " ".join(plain(line if bullet is None else line[bullet.end() :]).split())
        is_first = False
        if any(map(str.isalnum, words)):
            count += 1
            yield Line(words, bullet is not None)


def plain(text: str) -> str:
    """`text` with digits and common symbols in ASCII, and without most Markdown, LaTeX and HTML
    formatting."""
    text = _SWISS_GAP.sub(",", _FORMULA.sub(r"\1", text) if "$" in text else text)
    if not text.isascii():
        text = _SPACED_DASH.sub("—", _DIGIT_GAP.sub("", text))
        text = _OVERLINED.sub(lambda match: f"({match[1][::2]})", text)
        text = RAISED.sub(lambda match: "^" + upright(match[0]), text)
        text = LOWERED.sub(lambda match: "_" + upright(match[0]), text)
        text = "".join(map(_plain_char, text.translate(_ASCII)))
    if "\\" in text or "{" in text or "~" in text:
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
    return _EMPHASIS.sub("", _DOLLARS.sub("$", _TAG.sub(" ", text)))


def upright(digits: str) -> str:
    """Raised or lowered digits and signs as ordinary ones: `-12` for `⁻¹²`."""
    return unicodedata.normalize("NFKC", digits).replace("−", "-")


def _plain_char(char: str) -> str:
    if char.isascii():
        return char
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    if "！" <= char <= "～":  # full-width ASCII
        return chr(ord(char) - 0xFEE0)
    if unicodedata.category(char) == "Cf":  # zero-width spaces and joiners, direction marks
        return ""
    if unicodedata.decomposition(char).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", char).replace("⁄", "/") + " "
    return char


_GROUPED_BY_SPACES = re.compile(r"(?<![\d.,])(?<!\d )[1-9]\d{0,2}(?: \d{3})+(?! ?\d)")


def without_grouping_spaces(text: str) -> str:
    """`text` without the spaces that group thousands in numbers."""
    return _GROUPED_BY_SPACES.sub(lambda match: match[0].replace(" ", ""), text)


def same_text(first: str, second: str) -> bool:
    """Whether two strings are the same apart from case, spacing, quotation marks, formatting and
    final punctuation. If a string consists only of spacing, quotation marks, formatting and final
    punctuation, such as "…" or " * ", the result is False, even if the two strings are identical.
    Only the first `MAX_SEGMENT_CHARS` characters of each string are compared."""
    return _bare(first) == _bare(second) != ""


@functools.lru_cache(maxsize=1024)
def _bare(text: str) -> str:
    """`text`, case-folded and without gaps (see `without_gaps`) or final punctuation."""
    words = without_gaps(plain(text[:MAX_SEGMENT_CHARS]), underscores=r"(?<!\w)_+|_+(?!\w)")
    return words.rstrip(".,;:!?").casefold()


def without_gaps(text: str, *, underscores: str = "_+") -> str:
    """`text` without spaces, quotation marks, emphasis marks or matches of the pattern
    `underscores`. Between digits, such characters are kept, because "1 2" is not 12. However,
    spaces that group thousands are removed."""
    text = without_grouping_spaces(text)
    return re.sub(rf"{_BETWEEN_DIGITS}|[\s\"'`*]+|{underscores}", _kept_gap, text)


_BETWEEN_DIGITS = r"(?<=\d)(?P<gap>[\s\"'`*_]+)(?=\d)"


def _kept_gap(match: re.Match[str]) -> str:
    return "" if match["gap"] is None else match["gap"].strip() or " "
