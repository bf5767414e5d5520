"""Gold answers as data spell them, read strictly: a gold is a number only if all of it is one.

Completions have a lenient reader of their own (`numbers`): it may take "18" from "18, I think".
Read so, the gold "5 March 2021" would be 5, and training would reward wrong answers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from reftune.errors import DataError
from reftune.grading.kinds import refuse_list, told_gold, worded_gold
from reftune.grading.markers import DEFAULT, Reading, statements
from reftune.grading.numbers import CURRENCY, MONTHS, Number, numeral_at
from reftune.grading.plain_text import plain, same_text, with_decimal_points
from reftune.types import Answer, AnswerKind

GoldKind = Literal["auto", AnswerKind]
MAX_GOLD_CHARS = 2_000
"""Longer texts do not count as numbers."""


def read_gold(
    raw: object, kind: GoldKind = "auto", *, choices: Sequence[str] = (), reading: Reading = DEFAULT
) -> Answer:
    """The gold answer that a cell of the data states; `answer.kind` says what it is.

    `auto` is a choice if there are `choices`, else a number if all of `raw` is one, else an
    expression, a list in brackets or a text. A text with a marker ("#### 78", "\\boxed{78}", "The
    answer is 78") is what the marker says.

    Raises: DataError with the value and the reason, to which the caller adds where it stands.
    """
    told = None if kind == "auto" else told_gold(raw, kind, reading.decimal)
    if told is not None:
        return told
    refuse_list(raw)
    _refuse_other_types(raw)
    stated = stated_gold(raw, reading)
    if kind == "choice" or (kind == "auto" and choices):
        return Answer(kind="choice", value=_letter(str(stated), choices))
    number = None if kind in ("text", "latex") else number_gold(stated, reading)
    if number is not None:
        return number
    if kind == "number":
        raise DataError(
            f"{_shown(raw)} is not a number as a whole; expected one, with at most a currency or"
            " unit, or another answer kind"
        )
    return worded_gold(str(stated)) if kind == "auto" else Answer(kind=kind, value=str(stated))


def number_gold(raw: object, reading: Reading = DEFAULT) -> Answer | None:
    """The gold number that all of a cell says; None if it says more or something else."""
    number = number_in_gold(raw, reading)
    if number is None:
        return None
    return Answer(
        kind="number", value=number.value, decimals=number.decimals, percent=number.percent
    )


def number_in_gold(raw: object, reading: Reading = DEFAULT) -> Number | None:
    """The number that all of a cell says; None if it says more or something else. True is not 1."""
    if isinstance(raw, bool):
        return None
    if isinstance(raw, int):
        return Number(Fraction(raw), 0)
    if isinstance(raw, float):
        return _whole_number(repr(raw)) if math.isfinite(raw) else None
    if not isinstance(raw, str) or len(raw) > MAX_GOLD_CHARS:
        return None
    return _whole_number(with_decimal_points(raw) if reading.decimal == "," else raw)


def stated_gold(raw: object, reading: Reading = DEFAULT) -> object:
    """What the last marker in a text says that says anything; the cell itself without one."""
    if not isinstance(raw, str):
        return raw
    for statement in reversed(statements(raw, reading)):
        said = (statement.text or "").strip()
        if not statement.is_closed:
            said = said.strip(" \t:*_").partition("\n")[0].removesuffix(".").strip(" *_")
            sentence = re.split(r"[.;] ", said, maxsplit=1)[0]
            said = sentence if number_in_gold(sentence, reading) is not None else said
        if said:
            return said
    return raw.strip()


def _refuse_other_types(raw: object) -> None:
    is_answer = isinstance(raw, str | int) or (isinstance(raw, float) and math.isfinite(raw))
    if not is_answer:
        raise DataError(f"{_shown(raw)} is not an answer; expected a number, a text or a letter")
    if not str(raw).strip():
        raise DataError("the answer is empty; expected a number, a text or a letter")


def _shown(raw: object) -> str:
    text = repr(raw)
    return text if len(text) <= 60 else text[:57] + "..."


# --- numbers --------------------------------------------------------------------------------------


_SPACED_MINUS = re.compile(r"^ *– +(?=[\d.])")
_FORMULA = re.compile(r"\$+([^$]*(?<!\\))\$+", re.DOTALL)
_ORDINAL = re.compile(r"\^?[{(]? ?(?:st|nd|rd|th)\b ?[})]?")
_NOT_WHOLE = re.compile(
    r"\d ?- ?\d+ ?/|\band\b|/ ?0\d|\b0\d ?/|_(?!\d{3}\b)|\d ?(?:[kmbt]|[bmt]n)$", re.IGNORECASE
)
"""What the reader of completions takes: 3-1/2 may be 5/2, 05/06 a day, 5_8 and 5k a guess."""
_LETTERS = r"(?-i:[mgshlLJNVWAKCF])"
_SYMBOLS = (
    r"(?-i:[kmcdn]m|[kmµn]g|ft|in|yd|mi|hr|hrs|min|sec|[mµn]s|mph|kph|kmph|kmh|lbs?|oz|gal|[mdc][lL]"
    r"|cc|[kMG]?Hz|[kMG]W|[kM]?Wh|[kM]?J|[kM]?cal|[kM]?Pa|atm|mol|rad|deg|[kMG]?eV|[km][VA]|kN"
    r"|[KMGTk]B|[KMGT]iB|rpm|psi|bpm)"
)
_WORDS = (
    r"(?:kilo|centi|milli)?met(?:er|re)s?|(?:kilo|milli)?grams?|(?:milli)?lit(?:er|re)s?|feet|foot"
    r"|inch(?:es)?|yards?|miles?|pounds?|ounces?|gallons?|seconds?|minutes?|hours?|days?|weeks?"
    r"|months?|years?|degrees?|units?|dollars?|cents?|watts?|volts?|joules?|newtons?|people|items?"
    r"|knots?|tons?|tonnes?|acres?|hectares?|yrs?|mo|wks?|pt|px|hp|amps?"
)
_BASE = rf"(?:{_SYMBOLS}|{_LETTERS}|{_WORDS})(?![^\W\d_])"
_POWER = r"(?: ?\^ ?\{? ?-?[1-4] ?\}?|[23](?!\d))?"
_KNOWN_UNIT = re.compile(
    rf"(?:(?:square|cubic|sq\.?|cu\.?|fluid|fl\.?|nautical) )?{_BASE}{_POWER}"
    rf"(?: ?(?:/|\bper\b) ?{_BASE}{_POWER})?|N ?[-*]? ?m"
    rf"|degrees? ?(?:C|F|K|[Cc]elsius|[Ff]ahrenheit)|(?:/|per) ?(?![A-Za-z]\b){_BASE}{_POWER}"
    rf"|(?i:{CURRENCY})"
)
_NOT_UNITS = frozenset(
    "am pm bn mn tn mln and or to of by at on und oder plus minus mod modulo base choose squared"
    " cubed factorial half halves third thirds quarter quarters fourth fourths fifth fifths sixth"
    " sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths"
    " thousandth thousandths dozen dozens score gross pi tau phi theta alpha beta lambda sqrt log"
    " ln exp sin cos tan inf infinity nan over under above below remainder rem approx ago bc ad bce"
    " ce approximately about roughly nearly almost ish fold one two three four five six seven eight"
    " nine ten eleven twelve twenty thirty forty fifty sixty seventy eighty ninety ones tens"
    " hundreds thousands millions billions is are was then else if because since for with vs"
    " versus not true false none null unknown permille bps noon midnight monday tuesday"
    " wednesday thursday friday"
    " saturday sunday mon tue tues wed thu thurs fri sat utc gmt est uhr heures past januar februar"
    " märz mai juni juli oktober dezember janvier février mars avril juin juillet août septembre"
    " octobre novembre décembre enero febrero marzo abril mayo junio julio agosto septiembre"
    " octubre noviembre diciembre".split()
)
"""Words that make another value, or a time, of the number before them."""
_FRACTION_WORD = re.compile(
    r"(?:(?:thir|four|fif|six|seven|eigh|nine)teen|\w+tie|eleven|twelf|thousand|million|billion)ths?"
)
_VARIABLES = re.compile(r"[a-z]{2}|[b-df-hj-np-tv-z]+|abc|xyz|uvw|(?P<attached>[a-z]{3})")
"""Letters that may be a product, 2ab, and no word: two, or no vowel; three attached to a number."""
_MONTH = re.compile(MONTHS, re.IGNORECASE)


def _whole_number(text: str) -> Number | None:
    formula = _FORMULA.fullmatch(text.strip())
    if text.lstrip(" $").startswith("~"):
        return None
    text = _SPACED_MINUS.sub("-", text)
    line = " ".join(plain(text if formula is None else formula[1]).split())
    bare = line if line.endswith("...") else line.removesuffix(".").rstrip()
    if bare[:1] in ("(", "[") and bare[-1:] == {"(": ")", "[": "]"}[bare[0]] and "," not in bare:
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
    return number if _is_unit(rest) else None


def _is_unit(rest: str) -> bool:
    """Whether what follows a number is at most one unit: a known one, or one lower-case word."""
    unit = rest.strip()
    if unit[:1] == "(" and unit[-1:] == ")":
        unit = unit[1:-1].strip()
    if not unit:
        return True
    if len(unit) == 1 and unit.isalpha():
        return False
    if unit.lower() in _NOT_UNITS or _MONTH.fullmatch(unit.rstrip(".")):
        return False
    if _KNOWN_UNIT.fullmatch(unit) is not None:
        return True
    variables = _VARIABLES.fullmatch(unit)
    if variables is not None and (variables["attached"] is None or rest[0] == unit[0]):
        return False
    return unit.isalpha() and unit.islower() and _FRACTION_WORD.fullmatch(unit) is None


# --- choices --------------------------------------------------------------------------------------


_LETTER = re.compile(r"[(\[]?(?P<letter>[a-z])(?: ?[)\].:]+(?P<text>.*))?", re.IGNORECASE)


def _letter(text: str, choices: Sequence[str]) -> str:
    """The letter that a gold is, alone or before its option's text, or that of the one option it
    spells. Without `choices`, any letter."""
    match = _LETTER.fullmatch(" ".join(plain(text).split()))
    if match is not None:
        letter, said = match["letter"].lower(), (match["text"] or "").strip()
        position = ord(letter) - ord("a")
        if not choices or (
            position < len(choices) and (not said or same_text(said, choices[position]))
        ):
            return letter
    equal = [index for index, choice in enumerate(choices) if _same_option(text, choice)]
    if len(equal) != 1:
        expected = (
            f"a letter from a to {chr(ord('a') + len(choices) - 1)} or the text of one option"
            if choices
            else "a letter"
        )
        raise DataError(f"{_shown(text)} names {len(equal) or 'no'} option; expected {expected}")
    return chr(ord("a") + equal[0])


def _same_option(text: str, choice: str) -> bool:
    if same_text(text, choice):
        return True
    said, number = number_in_gold(text), number_in_gold(choice)
    return said is not None and number is not None and said.value == number.value
