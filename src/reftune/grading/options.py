"""Texts → the option of a multiple-choice question that they choose."""

from __future__ import annotations

import re
from collections.abc import Sequence

from reftune.grading.numbers import after_equals, leading_number, parse_number, same_number
from reftune.grading.plain_text import first_line, same_text

_CHOICE = re.compile(
    r"[ *_`\"'(\[{<:=,.-]*(?:(?:the )?(?:correct )?(?:option|choice|letter|answer)\b["
    r" :.(\[\"'*]*(?:is )?[ (\[\"'*]*)?"
    r"(?P<letter>[a-z])(?![^\W_])(?P<rest>.*)",
    re.IGNORECASE,
)
_SECOND_CHOICE = re.compile(
    r"[)\].]? ?(?:(?:or|and|&) \(?[a-z](?: ?[)\]]| ?$|[.,;])|[/,] ?\(?[a-z] ?\)?(?:$|[.,;])|.* or"
    r" \(?[a-z] ?\))",
    re.IGNORECASE,
)


def read_choice(text: str, choices: Sequence[str]) -> str | None:
    """The letter that `text` chooses among `choices`: by the letter, or by a value or text equal to
    exactly one option.

    Without `choices` any letter will do. None for two letters, and for a letter or value outside
    the options.
    """
    line = first_line(text)
    match = _CHOICE.match(line)
    if match is not None and _SECOND_CHOICE.match(match["rest"]):
        return None
    if match is not None and _is_choice(match["letter"].lower(), match["rest"], choices):
        return match["letter"].lower()
    return _option_with_value(line, choices)


def _is_choice(letter: str, rest: str, choices: Sequence[str]) -> bool:
    """Whether a leading letter is a choice: not a variable ("c = 5"), nor the article in "a 5 %
    rise"."""
    position = ord(letter) - ord("a")
    if choices and position >= len(choices):
        return False
    if not rest or re.match(r" ?[)\].,:;>}!?\"'\\]| -", rest):
        return True
    if letter == "a":
        return bool(choices) and same_text(rest, choices[0])
    return re.match(r" ?[-=+*/^<]", rest) is None


def _option_with_value(line: str, choices: Sequence[str]) -> str | None:
    equal = [index for index, choice in enumerate(choices) if same_text(line, choice)]
    number = leading_number(after_equals(line))
    if not equal and number is not None:
        options = [parse_number(choice) for choice in choices]
        equal = [
            index
            for index, option in enumerate(options)
            if option is not None and same_number(number, option)
        ]
    return chr(ord("a") + equal[0]) if len(equal) == 1 else None
