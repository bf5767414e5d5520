"""Texts and values → answers → verdicts. Pure, exact, and bounded: any text gives a verdict
quickly, none raises.

Two sets of rules. The robust ones read numbers as people write them and compare exactly; the
paper's repeat the authors' code, oddities included. Everything here takes what a model wrote, so
every cost is capped.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import isfinite
from typing import Any, Literal

from reftune.types import Answer, Graded, Problem, Verdict

MAX_SEGMENT_CHARS = 2_000
"""How much of an answer is looked at for a number or a choice."""
MAX_BOX_CHARS = 20_000
MAX_DIGITS = 1_000
MAX_EXPONENT = 400
"""Numbers with more digits or larger powers of ten are no answer: no gold answer has them, and
arithmetic stays cheap."""
MAX_VALUE_CHARS = 200
"""Of `Graded.value`, and of what a reason quotes."""


# --- numbers --------------------------------------------------------------------------------------


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
    return _leading_number(_after_equals(_first_line(text)))


def numbers_equal(predicted: Fraction, gold: Fraction) -> bool:
    """|p − g| ≤ max(min(0.01, 0.01·|g|), 1e-6·|g|, 1e-9), in exact arithmetic."""
    size = abs(gold)
    tolerance = max(min(Fraction(1, 100), size / 100), size / 10**6, Fraction(1, 10**9))
    return abs(predicted - gold) <= tolerance


def _same_number(predicted: Number, gold: Number) -> bool:
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


def _leading_number(line: str) -> Number | None:
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


def _after_equals(line: str) -> str:
    """What follows the last `=` of the first sentence; the line itself without one, or where a
    number stands before an aside that holds it ("18, because 2 + 2 = 4")."""
    end = _SENTENCE_END.search(line)
    sentence = line if end is None else line[: end.start()]
    equals = list(_EQUALS.finditer(sentence))
    if not equals:
        return line
    aside = _ASIDE.search(sentence, 0, equals[0].start())
    if aside is not None and _leading_number(sentence[: aside.start()]) is not None:
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


# --- texts ----------------------------------------------------------------------------------------


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


def _first_line(text: str) -> str:
    """The first line with a letter or digit, plain and with single spaces; a line that is cut ends
    in a backslash."""
    text = text.lstrip()
    segment = text[:MAX_SEGMENT_CHARS] + "\\" * (len(text) > MAX_SEGMENT_CHARS)
    for line in segment.splitlines():
        plain = " ".join(_plain(line).split())
        if any(map(str.isalnum, plain)):
            return plain
    return ""


def _plain(text: str) -> str:
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


_MARKER = re.compile(
    r"the\s{1,9}(?:final\s{1,9}|correct\s{1,9})?answer\s{1,9}is\b|answer[\s*_\"'`]{0,9}[:：]|#{4,}|\\boxed\b",
    re.IGNORECASE,
)


def answer_text(completion: str) -> str | None:
    """What follows the last marker of `completion`: "the answer is", "answer:", "####" in any case,
    or a box's content.

    None without a marker, or where the last one is a box that is never closed.
    """
    markers = deque(_MARKER.finditer(completion), maxlen=1)
    if not markers:
        return None
    last = markers.pop()
    if last.group().startswith("\\"):
        return _box_content(completion, last.end())
    return completion[last.end() :]


def reasoning_text(completion: str) -> str:
    """What stands before the first marker: the reasoning that leads to the answer."""
    marker = _MARKER.search(completion)
    return completion if marker is None else completion[: marker.start()]


def last_number(text: str) -> str | None:
    """The last number in a text, in canonical spelling."""
    values = [_value(match) for match in _NUMBER.finditer(_plain(text[-MAX_SEGMENT_CHARS:]))]
    return next((spell(value) for value in reversed(values) if value is not None), None)


def _box_content(text: str, start: int) -> str | None:
    """The content of the braces at `start`; a percent sign right behind them belongs to it."""
    depth = 0
    for index, char in enumerate(text[start : start + MAX_BOX_CHARS], start):
        depth += (char == "{") - (char == "}")
        if depth == 0 and not char.isspace():
            if char != "}":
                return None
            percent = re.match(r"\s{0,3}\\?%", text[index + 1 : index + 6])
            return text[start:index].lstrip()[1:] + "%" * (percent is not None)
    return None


def _clip(text: str) -> str:
    """One bounded line that can be encoded: a lone surrogate is not printable."""
    line = " ".join(text[: 2 * MAX_VALUE_CHARS].split())[:MAX_VALUE_CHARS]
    return "".join(char if char.isprintable() else "�" for char in line)


# --- choices --------------------------------------------------------------------------------------


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
    line = _first_line(text)
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
        return bool(choices) and _same_text(rest, choices[0])
    return re.match(r" ?[-=+*/^<]", rest) is None


def _option_with_value(line: str, choices: Sequence[str]) -> str | None:
    equal = [index for index, choice in enumerate(choices) if _same_text(line, choice)]
    number = _leading_number(_after_equals(line))
    if not equal and number is not None:
        options = [parse_number(choice) for choice in choices]
        equal = [
            index
            for index, option in enumerate(options)
            if option is not None and _same_number(number, option)
        ]
    return chr(ord("a") + equal[0]) if len(equal) == 1 else None


def _same_text(first: str, second: str) -> bool:
    return _bare(first) == _bare(second) != ""


def _bare(text: str) -> str:
    """`text` without case, spaces, quotes, emphasis and closing punctuation."""
    return re.sub(r"[\s\"'`*_]+", "", _plain(text[:MAX_SEGMENT_CHARS])).rstrip(".,;:!?").casefold()


# --- verdicts, robust -----------------------------------------------------------------------------


_PLAIN_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:/\d+)?")
NO_MARKER = 'no marker: expected "the answer is", "answer:", "####" or \\boxed{…}'


def grade_completion(completion: str, problem: Problem) -> Graded:
    """Grade a worked solution by the answer after its last marker."""
    text = answer_text(completion)
    return _no_answer(NO_MARKER) if text is None else grade_answer(text, problem)


def grade_value(value: Any, problem: Problem) -> Graded:
    """Grade what a program returned. Booleans, None, containers, nan and inf are no answer."""
    text = _value_text(value)
    if text is None:
        return _no_answer(f"solution() returned {_describe(value)}, not an answer")
    return grade_answer(text, problem)


def grade_answer(text: str, problem: Problem) -> Graded:
    """Grade a text that is the answer, with units and prose as people add them."""
    if problem.scorer is not None:
        return _grade_by_scorer(text, problem, problem.scorer)
    gold = problem.answer
    if gold.kind == "number":
        return _grade_number(text, gold)
    if gold.kind == "choice":
        return _grade_choice(text, problem)
    return _grade_words(text, gold)


def _grade_number(text: str, gold: Answer) -> Graded:
    assert isinstance(gold.value, Fraction)
    number = parse_number(text)
    if number is None:
        return _no_answer(f"no single number in {_quote(text)}")
    return _judge(_same_number(number, Number(gold.value)), str(number), spell(gold.value))


def _grade_choice(text: str, problem: Problem) -> Graded:
    letter = read_choice(text, problem.choices)
    if letter is None:
        return _no_answer(f"no single option in {_quote(text)}")
    return _judge(letter == problem.answer.value, letter, str(problem.answer.value))


def _grade_words(text: str, gold: Answer) -> Graded:
    words = text.strip()
    if not words:
        return _no_answer("nothing after the marker")
    candidates = (words, words.splitlines()[0], _first_line(words))
    return _judge(
        any(_same_text(each, str(gold.value)) for each in candidates), words, str(gold.value)
    )


def _grade_by_scorer(text: str, problem: Problem, scorer: Callable[[str], float]) -> Graded:
    """By the best of several spellings: scorers expect the bare answer."""
    words = text.strip()
    if not words:
        return _no_answer("nothing after the marker")
    candidates = [
        words,
        words.rstrip(".!"),
        words.splitlines()[0].strip(),
        _first_line(words).rstrip(".!"),
    ]
    value, number = words, parse_number(words)
    if number is not None and _PLAIN_NUMBER.fullmatch(str(problem.answer)):
        value = str(number)
        candidates.append(spell(number.value))
    scores, error = [], ""
    for candidate in dict.fromkeys(candidates):
        try:
            scores.append(float(scorer(candidate)))
        except Exception as failure:  # noqa: BLE001  scorers parse what a model wrote, and few expect everything
            error = f"the task's scorer failed: {type(failure).__name__}: {_clip(str(failure))}"
    if not scores:
        return Graded(verdict=Verdict.ERROR, value=None, reason=error)
    return _judge(any(score >= 1 for score in scores), value, str(problem.answer))


def _judge(right: bool, value: str, gold: str) -> Graded:
    gold = _clip(gold)
    value = (
        _clip(value) if len(value) <= MAX_VALUE_CHARS else f"{_clip(value[:180])}… {_digest(value)}"
    )
    if right:
        return Graded(
            verdict=Verdict.CORRECT, value=value, reason=f"{value} is the gold answer {gold}"
        )
    return Graded(
        verdict=Verdict.WRONG, value=value, reason=f"{value} is not the gold answer {gold}"
    )


def _digest(text: str) -> str:
    """Tells long values apart that begin alike."""
    return f"{zlib.crc32(text.encode('utf-8', 'replace')):08x}"


def _no_answer(reason: str) -> Graded:
    return Graded(verdict=Verdict.NO_ANSWER, value=None, reason=reason)


def _quote(text: str) -> str:
    words = _clip(text.lstrip()[:80])
    return f'"{words}"' if words else "the empty text"


def _value_text(value: Any) -> str | None:
    """A program's value as an answer text; None where it is no answer."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        return str(value) if value.bit_length() < 3 * MAX_DIGITS else None
    if isinstance(value, float | Decimal):
        return str(value) if isfinite(value) else None
    return value if isinstance(value, str) else None


def _describe(value: Any) -> str:
    if isinstance(value, bool | float | None):
        return str(value)
    if isinstance(value, int):
        return "an integer too long to be an answer"
    return f"a value of type {type(value).__name__}"


# --- verdicts, the paper's ------------------------------------------------------------------------


PAPER_TRIGGER = "\nTherefore, the answer is: "
PAPER_HEADER = "\nAnswer reasoning:\n"


def grade_completion_paper(completion: str, problem: Problem) -> Graded:
    """The authors' rule for worked solutions: `float()` of what follows the last trigger, or of all
    where there is none.

    nan and inf are wrong answers. A choice is compared as a string, and so is never missing.
    """
    text = paper_response(completion).split(PAPER_TRIGGER)[-1].strip()
    return grade_value_paper(text, problem)


def grade_value_paper(value: Any, problem: Problem) -> Graded:
    """The authors' rule for a program's value: `float(value)` within 0.01, or `str(value)` against
    the gold letter."""
    gold = problem.answer
    if gold.kind != "number":
        return _grade_string_paper(value, str(gold.value))
    assert isinstance(gold.value, Fraction)
    try:
        predicted, expected = float(value), float(gold.value)
    except (TypeError, ValueError, OverflowError):
        shown = _quote(value) if isinstance(value, str) else _describe(value)
        return _no_answer(f"float() cannot read {shown}")
    return _judge(abs(predicted - expected) <= 0.01, repr(predicted), repr(expected))


def _grade_string_paper(value: Any, gold: str) -> Graded:
    text = value if isinstance(value, str) else _value_text(value) or _describe(value)
    words = text.lower().replace('"', "").replace("'", "").strip()
    return _judge(words == gold.lower().replace('"', "").replace("'", "").strip(), words, gold)


def paper_response(completion: str) -> str:
    """What the authors' code grades of a completion: what follows the last prompt header, which a
    model may repeat."""
    return (PAPER_HEADER + completion).split(PAPER_HEADER)[-1].strip()


# --- gold answers ---------------------------------------------------------------------------------


def parse_gold(text: str, kind: Literal["number", "choice", "text"]) -> Answer | None:
    """A gold answer as data spell it, by the reader that grades completions; None where it cannot
    be read."""
    if kind == "number":
        number = read_number(text)
        return None if number is None else Answer(kind="number", value=number)
    if kind == "choice":
        letter = read_choice(text, ())
        return None if letter is None else Answer(kind="choice", value=letter)
    return Answer(kind="text", value=text.strip()) if text.strip() else None
