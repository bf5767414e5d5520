"""Reads numbers as people write them, and decides whether two numbers are equal. The module
`sentences` finds numbers in sentences."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import gcd, inf

from reftune.grading.plain_text import MAX_SEGMENT_CHARS, plain
from reftune.grading.words import ONE_TO_TWELVE
from reftune.types import Answer, spell

MAX_DIGITS = 1_000
MAX_EXPONENT = 400
"""Numbers with more than `MAX_DIGITS` digits or a power of ten above `MAX_EXPONENT` do not count as
answers, so that arithmetic stays cheap."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number as it was written."""

    value: Fraction
    decimals: float = inf
    """Number of digits after the decimal point, as written; inf for a fraction, which is exact."""
    percent: bool = False
    """Whether "%" or a word such as "percent" follows the number. If so, the number may stand for a
    hundredth of `value`."""

    def __str__(self) -> str:
        return spell(self.value) + "%" * self.percent

    def times_ten_to(self, power: int) -> Number:
        """The number times 10^power, without a percent sign."""
        return Number(self.value * Fraction(10) ** power, max(0, self.decimals - power))


# --- numerals -------------------------------------------------------------------------------------


def numeral_at(line: str, start: int) -> tuple[Number, int] | None:
    """The number at index `start` of a line of plain text, and the index after it. A sign, a
    currency, a percent sign and a word such as "million" are part of the number. The caller must
    check whether the number is itself only a part of something larger, such as a range. Returns
    None if there is no number, if the number is too long or invalid (1/0), or if it is unclear
    whether a letter after the number is a magnitude ("5 M")."""
    match = _NUMBER.match(line, start)
    number = None if match is None else _number(match)
    if match is None or number is None:
        return None
    end = match.end()
    magnitudes = _MAGNITUDE if match["currency"] is None else _MONEY_MAGNITUDE
    for _ in range(2):  # "2 hundred million"
        magnitude = magnitudes.match(line, end)
        if magnitude is not None:
            name = magnitude[0].strip().lower()
            number, end = number.times_ten_to(_POWERS[name.removesuffix("s")]), magnitude.end()
    if end == match.end() and _SPACED_LETTER.match(line, end):
        return None
    percent = _PERCENT.match(line, end)
    if percent is None:
        return number, end
    return Number(number.value, number.decimals, percent=True), percent.end()


def last_number(text: str) -> str | None:
    """The last number in `text`, in its canonical spelling; None if `text` contains no number."""
    numbers = [_number(match) for match in _NUMBER.finditer(plain(text[-MAX_SEGMENT_CHARS:]))]
    return next((spell(number.value) for number in reversed(numbers) if number is not None), None)


def _number(match: re.Match[str]) -> Number | None:
    """The number in a match of `_NUMBER`; None if the number is too long or invalid, like 1/0."""
    written = match.groups()[match.lastindex :]  # the groups inside the matching form's group
    parts = [part.replace(",", "") for part in written if part is not None]
    if any(len(part) > MAX_DIGITS for part in parts):
        return None
    _, read = _FORMS[match.lastgroup or ""]
    size: Number | None = read(*parts)
    is_negative = (match["sign"] or "+")[0] != "+"
    if size is None or is_negative is (match["inner_sign"] is not None):
        return size
    return Number(-size.value, size.decimals)


def _mixed(whole: str, top: str, bottom: str) -> Number | None:
    fraction = _ratio(top, bottom)
    return fraction and Number(int(whole) + fraction.value)


def _ratio(top: str, bottom: str) -> Number | None:
    return Number(Fraction(top) / Fraction(bottom)) if Fraction(bottom) else None


def _decimal(digits: str, power: str = "0") -> Number | None:
    if abs(int(power)) > MAX_EXPONENT:
        return None
    return Number(Fraction(digits), len(digits.partition(".")[2])).times_ten_to(int(power))


def _repeating(head: str, period: str) -> Number:
    """The value of a repeating decimal: 1/6 for 0.1(6), with `head` 0.1 and `period` 6. It equals
    head + period / ((10^n − 1)·10^d). Here, n is the number of digits in `period`, and d is the
    number of decimals in `head`."""
    decimals = len(head.partition(".")[2])
    tail = Fraction(int(period), (10 ** len(period) - 1) * 10**decimals)
    return Number(tail + Fraction(head + "0"))


def _endless(decimal: str) -> Number | None:
    """A decimal that ends in dots: 0.333... is 1/3, and 0.1212... is 4/33. If no digits repeat, as
    in 3.14159..., the dots are ignored."""
    found = _PERIOD.fullmatch(decimal[:200])
    if found is None:
        return _decimal(decimal)
    return _repeating(found["head"], found["digit"] or found["block"])


def _in_base(digits: str, word: str) -> Number | None:
    """A number with a stated base, such as 52_8. Graders of the MATH benchmark drop the base and
    read 52_8 as 52, and so does this function. Returns None if `word` names no base from 2 to 36,
    or if a digit does not exist in the stated base."""
    base = int(word) if word.isdigit() else _BASES.get(word.lower(), 0)
    is_in_base = 2 <= base <= 36 and all(int(digit) < base for digit in digits)
    return Number(Fraction(digits), 0) if is_in_base else None


CURRENCY = (
    r"(?:rs ?\.?|(?:inr|usd|eur|gbp|chf|jpy|cny|rmb|aud|cad|nzd|sgd|hkd|krw|rub|brl|mxn|zar|ngn|thb"
    r"|vnd|idr|php|myr|sek|nok|dkk|pln|czk|huf|ils|aed|sar|egp|pkr|bdt|kes)(?![^\W\d_])|[$¢£¤¥฿₠-₿])"
)
_GROUPS = r"[1-9]\d{0,2}(?:,\d{3})+(?![\d,]*\d)|[1-9]\d{0,2}(?:_\d{3})+(?!\d)"
_INDIAN = r"[1-9]\d?,(?=[\d,]*\b0\d)(?:\d\d,)*\d{3}(?![\d,]*\d)"
"""Digits in Indian groups of two, as in 1,05,000, are read as one number only if a group begins
with 0 or if a sign for rupees precedes the number. Otherwise, text such as "36,36,108" is a
list."""
_LAKHS = r"[1-9]\d?(?:,\d\d)+,\d{3}(?:\.\d+)?(?![\d,]*\d)"
_DECIMAL = rf"(?:(?:{_GROUPS}|{_INDIAN}|\d+)(?:\.\d+)?|\.\d+)"
_TEN_TO = r"10 ?(?:\^|\*\*) ?[{(]?([-+]?\d+)[})]?"
_FORMS: dict[str, tuple[str, Callable[..., Number | None]]] = {
    "mixed": (r"(\d+)(?: | ?- ?| and )(\d+) ?/ ?(\d+)", _mixed),  # 3 1/2
    "ratio": (rf"({_DECIMAL}) ?/ ?(-?{_DECIMAL})", _ratio),  # 1/2
    "scaled": (rf"({_DECIMAL}) ?[*x] ?{_TEN_TO}", _decimal),  # 1.5 * 10^3
    "power": (_TEN_TO, partial(_decimal, "1")),  # 10^3
    "repeating": (r"(\d*\.\d*)\((\d+)\)", _repeating),  # 0.1(6)
    "endless": (r"(\d*\.\d+)\.\.\.(?!\d)", _endless),  # 0.333...
    "in_base": (r"(\d+)_(\d{1,2}(?!\d)|[a-z]+)", _in_base),  # 52_8
    "decimal": (rf"((?(rupees){_LAKHS}|(?!))|{_DECIMAL})(?:e([-+]?\d+))?", _decimal),  # 1,250; 2e-3
}
"""A way to write a number → its pattern, and the function that reads the pattern's groups. The
patterns are tried in this order."""
_NUMBER = re.compile(
    r"(?P<sign>- ?|\+ ?|minus |negative )?"
    rf"(?:(?P<currency>(?P<rupees>rs ?\.?|inr\b|₹)|{CURRENCY}) ?(?P<inner_sign>- ?)?)?"
    rf"(?:{'|'.join(f'(?P<{name}>{pattern})' for name, (pattern, _) in _FORMS.items())})",
    re.IGNORECASE,
)
_POWERS = {"hundred": 2, "thousand": 3, "lakh": 5, "lac": 5, "million": 6, "crore": 7}
_POWERS |= {"billion": 9, "trillion": 12, "quadrillion": 15, "mn": 6, "bn": 9, "tn": 12}
_MAGNITUDE_WORD = rf" ?(?:{'|'.join(_POWERS)})s?\b| ?(?-i:k)\b| ?[万萬亿億만억]"
_MAGNITUDE_WORD += r"| ?[千천](?![克米瓦卡升帕赫])| ?[百백](?![分帕])"
_POWERS |= {"k": 3, "m": 6, "b": 9, "t": 12, "百": 2, "백": 2, "千": 3, "천": 3}
_POWERS |= {"万": 4, "萬": 4, "만": 4, "亿": 8, "億": 8, "억": 8}
_MAGNITUDE = re.compile(rf"{_MAGNITUDE_WORD}|(?-i:[KMB])\b", re.IGNORECASE)
"""Without a currency, "5m" is read as a length, and "5 M" and "300 K" do not count as
numbers."""
_MONEY_MAGNITUDE = re.compile(rf"{_MAGNITUDE_WORD}|(?-i: ?[KMBT]|[mbt])\b", re.IGNORECASE)
_SPACED_LETTER = re.compile(r" [KMB]\b(?! ?[-.&])")
_PERCENT = re.compile(r" ?(?:%|per ?cent(?:age(?: points?)?)?\b|pct\b)", re.IGNORECASE)
_PERIOD = re.compile(
    r"(?P<head>\d*\.\d*?)(?:(?P<digit>[1-9])(?P=digit){2,}|(?P<block>\d{2,20}?)(?P=block)+)"
)
_BASES = dict(zip(ONE_TO_TWELVE.split("|"), range(1, 13), strict=True)) | {"sixteen": 16}


# --- equality -------------------------------------------------------------------------------------


def same_number(predicted: Number, gold: Number) -> bool:
    """Whether two numbers are equal according to `numbers_equal`. If only one of them has a percent
    sign, the number without the sign may equal the percentage either as written or divided by 100:
    25% equals both 25 and 0.25. The percentage is not divided by 100 if the number without the
    percent sign is an integer above 1 or below −1: 2500% does not equal 25."""
    if numbers_equal(predicted, gold):
        return True
    if predicted.percent == gold.percent:
        return False
    plain_side = gold if predicted.percent else predicted
    if plain_side.value.denominator == 1 and abs(plain_side.value) > 1:
        return False
    if predicted.percent:
        return numbers_equal(predicted.times_ten_to(-2), gold)
    if gold.value.denominator == 1:
        return predicted.value * 100 == gold.value
    return numbers_equal(predicted, gold.times_ten_to(-2))


MIN_DECIMALS = 2
"""Numbers are compared with a precision of at least this many decimals, even if they are written
with fewer."""
FLOAT_DIGITS, PRINTED_FLOAT_DIGITS = 12, 15
"""A decimal with at least `PRINTED_FLOAT_DIGITS` digits is read as a printed float and rounded to
`FLOAT_DIGITS` significant digits, so that 0.8333333333333334 equals 5/6."""


def numbers_equal(predicted: Number, gold: Number) -> bool:
    """Whether `predicted` (p) equals `gold` (g), at the precision to which they are written. If
    `gold` is whole, the two must be exactly equal. Otherwise, two conditions must hold in exact
    arithmetic:

        |p − g| < 10^−d   and   |p − g| ≤ 0.01·|g|

    Here, d is the number of decimals of the less precise number, but at least 2. If only one number
    is written as a fraction, the other number determines d. Two fractions must be exactly equal. A
    number that is written to full float precision is rounded first (see `FLOAT_DIGITS`).
    """
    if predicted.value == gold.value:
        return True
    predicted, gold = _without_float_noise(predicted), _without_float_noise(gold)
    gap = abs(predicted.value - gold.value)
    if gap == 0 or gold.value.denominator == 1:
        return gap == 0
    decimals = max(MIN_DECIMALS, min(predicted.decimals, gold.decimals))
    return decimals < inf and gap * 10 ** int(decimals) < 1 and gap * 100 <= abs(gold.value)


def _without_float_noise(number: Number) -> Number:
    if number.decimals == inf or number.value.denominator == 1:
        return number
    decimals = int(number.decimals)
    num_digits = len(str(int(abs(number.value) * 10**decimals)))
    if num_digits < PRINTED_FLOAT_DIGITS:
        return number
    kept = max(0, decimals - num_digits + FLOAT_DIGITS)
    return Number(round(number.value, kept), kept, number.percent)


def number_of(answer: Answer) -> Number:
    """The number in a gold answer, with `answer.decimals` decimals or, if that is None, as many as
    its value needs."""
    assert isinstance(answer.value, Fraction)
    decimals = num_decimals(answer.value) if answer.decimals is None else answer.decimals
    return Number(answer.value, decimals, answer.percent)


def num_decimals(value: Fraction) -> float:
    """Number of decimals that `value` needs; inf if they never end."""
    rest, count = value.denominator, 0
    while rest > 1 and count < MAX_EXPONENT + MAX_DIGITS:
        shared = gcd(rest, 10)
        if shared == 1:
            return inf
        rest, count = rest // shared, count + 1
    return count
