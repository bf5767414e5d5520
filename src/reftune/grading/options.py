"""Finds the option that an answer to a multiple-choice question chooses."""

from __future__ import annotations

import re
from collections.abc import Sequence

from reftune.grading.decimals import with_points
from reftune.grading.golds import is_opposite, number_in_gold, same_option
from reftune.grading.numbers import same_number
from reftune.grading.plain_text import first_line, plain, same_text
from reftune.grading.sentences import parse_number, stated_number
from reftune.grading.words import SORRY, TAKEN_BACK
from reftune.types import Problem

_CHOICE = re.compile(
    r"[ *_`\"'(\[{<:=,.-]*(?:(?:therefore|thus|hence|so|likely|probably|clearly)\b,? ?\(?"
    r"(?!\(?[a-z] (?:is|=) ?[-\d]))?"
    r"(?:(?:the )?(?:correct )?(?:option|choice|letter|answer)\b["
    r" :.(\[\"'*]*(?:is )?[ (\[\"'*]*)?"
    r"(?P<letter>(?-i:[a-zA-Z]))(?![^\W_])(?P<rest>.*)",
    re.IGNORECASE,
)
_SECOND_CHOICE = re.compile(
    r"[)\].]? ?(?:[/,.;(]? ?(?:(?:or|and|&|maybe|perhaps|possibly) ){1,2}\(?[a-z]"
    r"(?: ?[)\]]| ?$|[.,;])"
    r"|[/,;|+] ?\(?[a-z] ?\)?(?:$|[.,;]| (?:and|or)\b)|.* or \(?[a-z] ?\))",
    re.IGNORECASE,
)
_NEGATED = re.compile(
    r"^[ :]*(?:it is )?(?:neither|not) [^.;]{0,200}?\b(?:but|rather) ", re.IGNORECASE
)
"""Matches words that reject options, such as "neither A nor B but" in "neither A nor B but C"."""
_LETTERED = re.compile(
    r"\s*[(\[]?(?P<letter>[a-z])(?:\s*[)\]]\s*|\s*[.:]\s+|\s+[-–—]\s+)(?P<text>\S.*)", re.I | re.S
)


def unlettered(choices: Sequence[str]) -> tuple[str, ...]:
    """The options without their letters: "a ) 38" becomes "38", "(B) 12" becomes "12", "C. 30"
    becomes "30", and "D - 5" becomes "5". The options are returned unchanged unless each has a
    letter and the letters run in order from A."""
    found = [_LETTERED.fullmatch(choice) for choice in choices]
    texts = [
        match["text"]
        for index, match in enumerate(found)
        if match is not None and ord(match["letter"].lower()) - ord("a") == index
    ]
    return tuple(texts if len(texts) == len(choices) else choices)


def option_values(problem: Problem) -> list[str]:
    """The problem's options, with decimal points instead of decimal commas."""
    return [with_points(choice, problem.decimal) for choice in problem.choices]


def read_choice(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that `text` chooses. The text may state this letter, or a value or
    words that match only one of the `choices`. Without `choices`, any letter is accepted. Returns
    None if `text` does not choose a single option, for example if it names two letters."""
    line, choices = _NEGATED.sub("", first_line(text)), unlettered(choices)
    line = re.sub(r"\b(?:i\. ?e|e\. ?g)\b\.?", "that is", line, flags=re.IGNORECASE)
    match = _CHOICE.match(line)
    if match is not None and _is_choice(match["letter"], match["rest"], choices):
        letter, said = match["letter"].lower(), match["rest"]
        position = ord(letter) - ord("a")
        rest = _behind(choices[position], said) if choices else said  # "B) No" retracts nothing
        is_taken_back = TAKEN_BACK.match(said) and TAKEN_BACK.match(rest)
        is_retracted = is_taken_back or _has_second_letter(said, rest, choices)
        return None if is_retracted or _names_another(said, choices, position) else letter
    return _option_with_value(line, choices)


def _has_second_letter(said: str, rest: str, choices: Sequence[str]) -> bool:
    """Whether a second letter follows the chosen one, as in "B or C". If the text of the chosen
    option stands between the two letters, the second letter counts only if it is the letter of an
    option. For example, suppose that there are four options and that the text of B is "20". Then
    neither the h in "B) 20/h" nor the x in "B) 20, x and y are even" counts. But a letter between
    "or" and a closing bracket always counts, as in "B) 20 or (x)"."""
    second = _SECOND_CHOICE.match(rest)
    if second is None or rest == said or _SECOND_CHOICE.match(said):
        return second is not None
    letters = re.findall(r"(?<![^\W_])[a-z](?![^\W_])", second[0], re.IGNORECASE)
    return ord(letters[-1].lower()) - ord("a") < len(choices)


def _is_choice(letter: str, rest: str, choices: Sequence[str]) -> bool:
    """Whether the letter at the start of a line, before `rest`, is a choice and not a variable
    ("c = 5") or an article ("a 5% rise")."""
    position = ord(letter.lower()) - ord("a")
    if choices and position >= len(choices):
        return False
    if not rest or re.match(r" ?[)\].,:;>}!?\"'\\]| -", rest):
        return True
    if letter == "a" or (letter == "A" and _NOT_AN_ARTICLE.match(rest) is None):
        texts = (rest, rest.strip(" (–—)."))  # "A (12,000)" chooses "12 000"
        return bool(choices) and any(_begins_with(text, choices[0]) for text in texts)
    return re.match(r" ?[-=+*/^<]|[^\s(—]", rest) is None  # C# and a² are not choices


_NOT_AN_ARTICLE = re.compile(r" (?:because|since)\b")
"""Matches words which show that an "A" before them is an option, as in "A because …"."""


def names_option(line: str, choices: Sequence[str]) -> bool:
    """Whether a line of plain text contains an option's letter as a word, or begins with an
    option's text."""
    last = chr(ord("a") + len(choices) - 1) if choices else "z"
    letter = re.search(rf"(?<![^\W_])[a-{last}](?![^\W_])", line, re.IGNORECASE)
    return letter is not None or any(_begins_with(line, choice) for choice in choices)


_REASON = re.compile(r"[,.;:] | \(|[.!]$| - | because\b")
"""Matches the punctuation or the word after which a reason for the choice may follow."""


def _begins_with(line: str, choice: str) -> bool:
    """Whether a line is an option's text, alone or before punctuation or a reason."""
    if same_text(line, choice) or same_text(_REASON.split(line, maxsplit=1)[0], choice):
        return True
    rest = _behind(choice, line)
    return rest != line and (not rest.strip(" ).") or _REASON.match(rest) is not None)


def _behind(choice: str, line: str) -> str:
    """The part of a line after an option's text, if the line begins with this text; otherwise the
    whole line. The option's text may be in brackets, and punctuation may precede it."""
    text, words = " ".join(plain(choice).split()).rstrip(".,;:!"), _BEFORE.sub("", line)
    for begin in (text, f"({text})", f"({text}.)"):
        rest = words[len(begin) :]
        if text and words.lower().startswith(begin.lower()) and _IS_MORE.match(rest) is None:
            return rest
    return line


_BEFORE = re.compile(r"^(?:[)\]]? [-–—] |(?:(?!\. ?\d)[ )\].:,])*)")  # not the point of .5
_MARKS = re.compile(r"^(?:(?!\. ?\d)[ ().:,])*")
_IS_MORE = re.compile(r"\.?\w| [a-z]\b", re.IGNORECASE)
"""Matches what follows the text of an option if it continues that text, so that the option 5 is not
found in "5.2" or "5 C"."""


def _names_another(said: str, choices: Sequence[str], chosen: int) -> bool:
    """Whether `said` names another option in addition to the chosen one, as in "Paris, Rome" and
    "Paris? No, Rome". If Paris is option B, "Paris (C)" and "C) Paris" also name two options."""
    if not choices:
        return False
    if named := _named(said, choices):
        return chosen not in named
    rest = _behind(choices[chosen], said)  # "B) Rome (Italy)" does not name the option "Italy"
    added = _ADDED.sub("", rest)
    repeated = _behind(choices[chosen], added)
    if repeated != added:  # "B. It is Rome (Italy)"
        rest = repeated
    parts = (added, *_SEPARATOR.split(rest[:500]))
    return any(named and chosen not in named for named in (_named(part, choices) for part in parts))


_LINK = (
    rf"(?:{SORRY}|i think|or|maybe|perhaps|possibly|so|option|choice"
    r"|(?:which|that|it|the(?: correct)? answer) (?:is|should be)|it's)\b[, ]*"
)
_ADDED = re.compile(rf"^[ );,:.]*(?:{_LINK}|and\b[, ]*)*", re.IGNORECASE)
"""Matches what may stand between an option and another one that is added to it or corrects it."""
_SEPARATOR = re.compile(
    rf"(?:[;&?!()]|[,:.](?!(?<=\d.)\d)) ?(?:{_LINK})*"
    r"| - |\b(?:or|and)\b(?= \(?[a-z]\b)",
    re.IGNORECASE,
)


def _named(part: str, choices: Sequence[str]) -> list[int]:
    """The positions of the options that `part` of a line names by letter, by text, or by both."""
    bare = _BEFORE.sub("", part).lstrip("(").rstrip(" ).:,(")
    signed = _MARKS.sub("", part).rstrip(" ).:,(").replace("—", "-")
    spellings = {part, bare, signed}  # "- 5" in "A) - 5" may be 5, after a dash, or -5
    lettered = re.fullmatch(r"([a-z])(?:[ ).:]+(.*))?", bare, re.IGNORECASE)
    letter, text = ("", "") if lettered is None else (lettered[1].lower(), lettered[2] or "")
    return [
        index
        for index, choice in enumerate(choices)
        if any(same_option(spelling, choice) for spelling in spellings)
        or (letter == _letter(index) and (not text or same_option(text, choice)))
    ]


def _option_with_value(line: str, choices: Sequence[str]) -> str | None:
    equal = [index for index, choice in enumerate(choices) if same_text(line, choice)]
    if len(equal) == 1:
        return _letter(equal[0])
    if not equal and not re.search(r"\bor\b", line):
        equal = [index for index, choice in enumerate(choices) if _begins_with(line, choice)]
        equal = _longest(equal, choices)
    if len(equal) == 1 and _names_another(line, choices, equal[0]):
        return None
    number = None if equal else stated_number(line)
    if number is not None:
        options = [number_in_gold(choice) or parse_number(choice) for choice in choices]
        equal = [
            i
            for i, option in enumerate(options)
            if option and same_number(number, option) and not is_opposite(line, choices[i])
        ]
    last = _LAST_LETTER.search(line)
    named = -1 if last is None else ord(last[1].lower()) - ord("a")
    names_another = 0 <= named < len(choices) and [named] != equal
    return _letter(equal[0]) if len(equal) == 1 and not names_another else None


def _longest(found: list[int], choices: Sequence[str]) -> list[int]:
    """Narrows `found`, a list of positions of options. If exactly one of these options has a text
    that begins with the texts of all the others, as "Up, then down" begins with "Up", only the
    position of this option is returned. If not, `found` is returned unchanged."""
    texts = {index: first_line(choices[index]) for index in found}
    longest = [
        i for i in found if all(i == j or _behind(texts[j], texts[i]) != texts[i] for j in found)
    ]
    return longest if len(longest) == 1 else found


_LAST_LETTER = re.compile(
    r"(?<=\d)%? ?(?:\( ?(?:(?:option|choice) )?|(?:,|;|=>?) ?"
    r"(?:(?:(?:which|that|it) (?:is|corresponds to|matches)|corresponding to|matching|so) )?"
    r"(?:(?:option|choice) |(?=(?-i:[A-Z])))\(?)((?-i:[a-zA-Z]))\W*$",
    re.IGNORECASE,
)
"""Matches the letter of an option after a number, as in "12, which is option C" and "12 (C)"."""


def _letter(position: int) -> str:
    return chr(ord("a") + position)
