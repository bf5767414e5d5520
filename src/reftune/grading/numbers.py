"""Texts → numbers: as people write them, compared exactly."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from reftune.grading.plain_text import MAX_SEGMENT_CHARS, first_line, plain

MAX_DIGITS = 1_000
MAX_EXPONENT = 400
"""Numbers with more digits or larger powers of ten are no answer: no gold answer has them, and
arithmetic stays cheap."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number as it was written."""

    value: Fraction
    percent: bool = False
    """Written with a percent sign or word: it also stands for a hundredth of `value`."""

    def __str__(self) -> str:
        return spell(self.value) + "%" * self.percent


def read_number(text: str) -> Fraction | None:
    """The number that `text` states, or None; "50%" is 50. The reader of gold answers and
    completions alike."""
    number = parse_number(text)
    return None if number is None else number.value


def parse_number(text: str) -> Number | None:
    """The number at the start of the first line of `text`, or after the last `=` there.

    Reads signs, thousands separators, decimals, exponents, `a/b`, `3 1/2`, `\\frac{a}{b}`, powers
    of ten, "2.5 million" and percent. Ignores currency, units, decoration in markdown, LaTeX and
    HTML, words like "about", closing punctuation, and prose after the number. None for an
    unevaluated expression ("3 + 4", "2π"), an inequality, a range or alternative ("5 or 6"), a
    compound quantity ("5 feet 6 inches"), a list, a ratio, nan and inf.
    """
    return leading_number(after_equals(first_line(text)))


def numbers_equal(predicted: Fraction, gold: Fraction) -> bool:
    """|p − g| ≤ max(min(0.01, 0.01·|g|), 1e-6·|g|, 1e-9), in exact arithmetic."""
    size = abs(gold)
    tolerance = max(min(Fraction(1, 100), size / 100), size / 10**6, Fraction(1, 10**9))
    return abs(predicted - gold) <= tolerance


def same_number(predicted: Number, gold: Number) -> bool:
    """Equal as written, or with the percent sign of just one of them read as a hundredth."""
    if numbers_equal(predicted.value, gold.value):
        return True
    if predicted.percent and not gold.percent:
        return numbers_equal(predicted.value / 100, gold.value)
    return (
        gold.percent and not predicted.percent and numbers_equal(predicted.value, gold.value / 100)
    )


def spell(value: Fraction) -> str:
    """Canonical spelling, the same for equal numbers: `18`, `0.5`, `1/3`."""
    if value.denominator == 1:
        return str(value.numerator)
    try:
        decimal = repr(float(value))
    except OverflowError:
        return f"{value.numerator}/{value.denominator}"
    return decimal if Fraction(decimal) == value else f"{value.numerator}/{value.denominator}"


_CURRENCY = r"(?:rs ?\.?|inr|usd|eur|gbp|[$€£¥₹₩₽])"
_INTEGER = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?![\d,]*\d)|\d+(?:_\d+)*)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d+)?|\.\d+)"
_POWER_OF_TEN = r"10 ?(?:\^|\*\*) ?[{(]?"
_NUMBER = re.compile(
    rf"(?P<sign>- ?|\+ ?|minus |negative )?(?:{_CURRENCY} ?(?P<inner_sign>- ?)?)?"
    r"(?:(?P<whole>\d+)(?: | ?- ?| and )(?P<top>\d+) ?/ ?(?P<bottom>\d+)"
    rf"|(?P<over>{_DECIMAL}) ?/ ?(?P<under>{_DECIMAL})"
    rf"|(?P<mantissa>{_DECIMAL}) ?[*x] ?{_POWER_OF_TEN}(?P<power>[-+]?\d+)[}})]?"
    rf"|{_POWER_OF_TEN}(?P<ten>[-+]?\d+)[}})]?"
    rf"|(?P<plain>{_DECIMAL})(?:e(?P<exponent>[-+]?\d+))?)",
    re.IGNORECASE,
)
_LEAD_IN = re.compile(
    r"(?:[ *_`\"'(\[{:,=#]|\b(?:about|approximately|approx|around|roughly|nearly|exactly|equal"
    r" to|equals?|is|a total of|only|"
    r"just|simply|now|then|thus|therefore|hence|so|also|again|indeed|actually)\b\.?)*",
    re.IGNORECASE,
)
_MAGNITUDES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "k": 10**3,
    "lakh": 10**5,
    "million": 10**6,
    "crore": 10**7,
    "billion": 10**9,
    "trillion": 10**12,
}
_MAGNITUDE = re.compile(
    r" ?(hundred|thousand|lakh|million|crore|billion|trillion)s?\b|(k)\b", re.IGNORECASE
)
_PERCENT = re.compile(r" ?(?:%|per ?cent(?:age(?: points?)?)?\b|pct\b)", re.IGNORECASE)


def leading_number(line: str) -> Number | None:
    """The number at the start of a plain line that nothing behind it makes part of more."""
    lead = _LEAD_IN.match(line)
    assert lead is not None  # it matches the empty text
    bracketed = line.startswith("<", lead.end())
    match = _NUMBER.match(line, lead.end() + bracketed)
    value = None if match is None else _value(match)
    if match is None or value is None:
        return None
    rest = line[match.end() :]
    if bracketed:  # "<203>" is an answer, "< 203" is not
        inside, closing, rest = rest.partition(">")
        if not closing or not re.fullmatch(r"[^<\d]*", inside):
            return None
    magnitude = _MAGNITUDE.match(rest)
    if magnitude is not None:
        value *= _MAGNITUDES[(magnitude[1] or magnitude[2]).lower()]
        rest = rest[magnitude.end() :]
    percent = _PERCENT.match(rest)
    if percent is not None:
        rest = rest[percent.end() :]
    return None if _goes_on(rest) else Number(value, percent is not None)


def _value(match: re.Match[str]) -> Fraction | None:
    """The value of a `_NUMBER`; None where it is too long or divided by zero."""
    parts = {
        name: text.replace(",", "").replace("_", "")
        for name, text in match.groupdict().items()
        if text is not None
    }
    if any(len(text) > MAX_DIGITS for text in parts.values()):
        return None
    exponent = int(parts.get("power") or parts.get("ten") or parts.get("exponent") or 0)
    if abs(exponent) > MAX_EXPONENT:
        return None
    numerator = Fraction(
        parts.get("over") or parts.get("mantissa") or parts.get("plain") or parts.get("whole") or 1
    )
    if "top" in parts or "under" in parts:
        bottom = Fraction(parts.get("bottom") or parts["under"])
        if bottom == 0:
            return None
        numerator = numerator + int(parts["top"]) / bottom if "top" in parts else numerator / bottom
    negative = parts.get("sign", "").strip().lower() in ("-", "minus", "negative")
    negative ^= "inner_sign" in parts
    return (-numerator if negative else numerator) * Fraction(10) ** exponent


_EQUALS = re.compile(r"(?<![<>!=])=+>?(?!=)")
_ASIDE = re.compile(r", |[(:;]|\b(?:because|since|as|where|which)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<!\brs)(?<!\brs )[.!?;](?= |$)", re.IGNORECASE)


def after_equals(line: str) -> str:
    """What follows the last `=` of the first sentence; the line itself without one, or where a
    number stands before an aside that holds it ("18, because 2 + 2 = 4")."""
    end = _SENTENCE_END.search(line)
    sentence = line if end is None else line[: end.start()]
    equals = list(_EQUALS.finditer(sentence))
    if not equals:
        return line
    aside = _ASIDE.search(sentence, 0, equals[0].start())
    if aside is not None and leading_number(sentence[: aside.start()]) is not None:
        return line
    return line[equals[-1].end() :]


_UNITS = (
    r"dollars?|cents?|hours?|hrs?|minutes?|mins?|seconds?|feet|foot|ft|inch(?:es)?|yards?|pounds?|lbs?|ounces?|years?|months?|"
    r"weeks?|days?|(?:kilo|centi|milli)?met(?:er|re)s?|[kcdm]?m(?:[23]|"
    r" [23](?=\W*$))?|(?:ft|in|yd|mi)[23]|(?:kilo)?grams?|k?g|"
    r"gallons?|degrees?"
)
_SHAPE = re.compile(
    r"(?P<number>\d+)|\b(?:"
    r"(?P<function>pi|sqrt|log|ln|squared|cubed|to the power|(?:and )?(?:a |one"
    r" )?(?:half|quarter)|and a third)|"
    r"(?P<operation>plus|minus|times|multiplied by|divided"
    r" by|mod|modulo)|(?P<or>or)|(?P<to>to|through|and|versus|vs)|"
    rf"(?P<unit>{_UNITS})|(?P<variable>(?-i:[xyzn])))\b|"
    r"(?P<symbol>[π√∞±\\]|\+/-)|(?P<operator>[-+*/|])|(?P<order>[<>≤≥≠])|(?P<open>[\[({$€£])|(?P<word>[^\W\d_]+)",
    re.IGNORECASE,
)
_LETTER_OF = {
    "number": "9",
    "or": "o",
    "to": "t",
    "unit": "u",
    "variable": "x",
    "function": "π",
    "symbol": "π",
    "operation": "+",
    "operator": "+",
    "order": "<",
    "open": "(",
    "word": "w",
}
_CONTINUES = re.compile(
    r"[)\]}'\"]*(?:"
    r"[.,:]9| ?: ?9| ?9|w9|\(9"  # 1.2.3, 1,0000, 5:30, 3 : 4, 5 6, 0x10, 5(6)
    # 3 + 4, 2**3, 5 - x, 3 apples + 4 apples
    r"| ?[+^]+ ?[(+]* ?[9xπ]|(?: ?[uw]){1,2} ?\+ ?[(+]* ?9"
    r"| ?π| ?x| ?<"  # 2π, 5x, 5 < x
    r"|(?: ?[uw.,(]){0,3} ?o ?[(+]*9| ?t ?[(+]*9"  # 5 or 6, 5 apples or 6, 5 to 6
    r"| ?, ?[(+]*9[.9]* ?(?:$|[,.)ot\]])| ?u[., t]*9)"  # the list 5, 6; 5 feet 6 inches
)


def _goes_on(rest: str) -> bool:
    """Whether what follows a number makes it a part of something else. Looks at the kinds of the
    next words and signs."""
    shape = _SHAPE.sub(lambda match: _LETTER_OF[match.lastgroup or "word"], rest[:120])
    return _CONTINUES.match(shape) is not None


def last_number(text: str) -> str | None:
    """The last number in a text, in canonical spelling."""
    values = [_value(match) for match in _NUMBER.finditer(plain(text[-MAX_SEGMENT_CHARS:]))]
    return next((spell(value) for value in reversed(values) if value is not None), None)
