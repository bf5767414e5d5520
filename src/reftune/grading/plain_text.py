"""Texts in plain ASCII: without markdown, LaTeX and HTML decoration."""

from __future__ import annotations

import re
import unicodedata

MAX_SEGMENT_CHARS = 2_000
"""How much of an answer is looked at for a number or a choice."""

_ASCII = str.maketrans(
    {
        "−": "-",
        "‐": "-",
        "‑": "-",
        "‒": "-",
        "–": "-",
        "—": " - ",
        "﹣": "-",
        "⁄": "/",
        "∕": "/",
        "÷": "/",
        "×": "*",
        "⋅": "*",
        "·": "*",
        "∗": "*",
        "≈": "=",
        "≅": "=",
        "≃": "=",
        "→": "=",
        "⇒": "=",
        "“": '"',
        "”": '"',
        "‘": "'",
        "’": "'",
        "«": "(",
        "»": ")",
        "【": "(",
        "】": ")",
    }
)
_DIGIT_GAP = re.compile(r"(?<=\d)[\u00a0\u2007\u2009\u202f](?=\d{3}(?!\d))")
_LATEX = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\[dtc]?frac ?\{ ?(-?[\d.,]{1,200}) ?\} ?\{ ?(-?[\d.,]{1,200}) ?\}", r" \1/\2 "),
        (r"\\[dtc]?frac ?(\d) ?(\d)", r" \1/\2 "),
        (
            (
                r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boldsymbol|boxed)"
                r" ?\{([^{}]{0,200})\}"
            ),
            r"\1",
        ),
        (r"\^ ?(?:\{ ?\\circ ?\}|\\circ)", " degrees "),
        (r"\{,\}", ","),
        (r"\\\\(?![a-zA-Z])", " "),
        (r"\\([$%#&_])", r"\1"),
        (r"\\!", ""),
        (r"\\[,;:> ]|\\q?quad\b|~", " "),
        (r"\\(?:left|right|displaystyle)\b|\\[()\[\]]", ""),
        (r"\\(?:times|cdot)\b", "*"),
        (r"\\div\b", "/"),
        (r"\\(?:approx|implies|Rightarrow)\b", "="),
    ]
]
_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,40}>|<\|[^<>|]{0,40}\|>")
_EMPHASIS = re.compile(
    r"(?<![\w)*`$])[*_`$]{1,3}(?=[^\s*_`$])|(?<=[^\s*_`$])[*_`$]{1,3}(?![\w*`$])"
)
_DOLLARS = re.compile(r"\b[a-z]{1,2} ?\$(?= ?[\d.])", re.IGNORECASE)


def first_line(text: str) -> str:
    """The first line with a letter or digit, plain and with single spaces; a line that is cut ends
    in a backslash."""
    text = text.lstrip()
    segment = text[:MAX_SEGMENT_CHARS] + "\\" * (len(text) > MAX_SEGMENT_CHARS)
    for line in segment.splitlines():
        words = " ".join(plain(line).split())
        if any(map(str.isalnum, words)):
            return words
    return ""


def plain(text: str) -> str:
    """`text` in ASCII digits and signs, without markdown, LaTeX and HTML decoration."""
    if not text.isascii():
        text = "".join(map(_plain_char, _DIGIT_GAP.sub("", text.translate(_ASCII))))
    if "\\" in text or "{" in text or "~" in text:
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
    return _EMPHASIS.sub("", _DOLLARS.sub("$", _TAG.sub(" ", text)))


def _plain_char(char: str) -> str:
    if char.isascii():
        return char
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    if "！" <= char <= "～":  # full-width ASCII
        return chr(ord(char) - 0xFEE0)
    decomposition = unicodedata.decomposition(char)
    if decomposition.startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", char).replace("⁄", "/") + " "
    if decomposition.startswith("<super>") and char.isdigit():
        return f"^{unicodedata.digit(char)}"
    return char


def same_text(first: str, second: str) -> bool:
    """Whether two texts differ in case, spacing, decoration and closing punctuation only."""
    return _bare(first) == _bare(second) != ""


def _bare(text: str) -> str:
    """`text` without case, spaces, quotes, emphasis and closing punctuation."""
    return re.sub(r"[\s\"'`*_]+", "", plain(text[:MAX_SEGMENT_CHARS])).rstrip(".,;:!?").casefold()
