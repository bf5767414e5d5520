"""Texts and values → verdicts. Pure and bounded: any text gives a verdict quickly, none raises."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from math import isfinite
from typing import Any

from reftune.grading.markers import DEFAULT, Reading, Statement, answer_text, statements
from reftune.grading.numbers import (
    FLOAT_DIGITS,
    MAX_DIGITS,
    number_of,
    parse_number,
    same_number,
    spell,
)
from reftune.grading.options import names_option, read_choice
from reftune.grading.plain_text import (
    MAX_SEGMENT_CHARS,
    first_line,
    plain,
    same_text,
    with_decimal_points,
)
from reftune.types import Answer, Graded, Problem, Verdict

MAX_VALUE_CHARS = 200
"""Of `Graded.value`, and of what a reason quotes."""

_PLAIN_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:/\d+)?")
_ANY_NUMBER = re.compile(r"(?<![\w.])-?[$€£]?\d[\d,]*(?:\.\d+)?%?")
NO_MARKER = 'no marker: expected "the answer is", "answer:", "####" or \\boxed{…}'


def grade_completion(completion: str, problem: Problem, reading: Reading = DEFAULT) -> Graded:
    """Grade a worked solution by what its last marker announces. One that only mentions the answer
    ("Note on the answer: …") does not count."""
    found = statements(completion, reading)
    if not found:
        return no_answer(NO_MARKER)
    last = next((each for each in reversed(found) if _says_something(each, problem)), found[-1])
    if last.text is None:
        return no_answer("the last box is never closed")
    return grade_answer(last.text, problem, reading)


_NO_VALUE = re.compile(
    r"\b(?:not?|none|nothing|neither|never|cannot|unknown|unclear|undefined|undetermined|ambiguous"
    r"|indeterminate|impossible|infinit\w*|inf|nan|zero|one|two|three|four|five|six|seven|eight|nine"
    r"|ten|eleven|twelve|hundred|thousand)\b|n't\b|∞",
    re.IGNORECASE,
)
"""Words that answer in place of a number, or take back the answer before."""


def _says_something(statement: Statement, problem: Problem) -> bool:
    """Whether a statement answers, readably or not, and does not only mention the answer."""
    if statement.text is None or (problem.answer.kind == "text" or problem.scorer is not None):
        return statement.text is None or bool(statement.text.strip())
    line = first_line(statement.text)
    if any(map(str.isdigit, line)) or _NO_VALUE.search(line):
        return True
    return problem.answer.kind == "choice" and names_option(line, problem.choices)


def grade_value(value: Any, problem: Problem) -> Graded:
    """Grade what a program returned, a float that is not whole by the digits that arithmetic keeps.
    Booleans, None, containers, nan and inf are no answer."""
    text = value_text(value)
    if isinstance(value, float | Decimal) and text is not None and value != value // 1:
        text = f"{value:.{FLOAT_DIGITS}g}"
    if text is None:
        return no_answer(f"solution() returned {describe(value)}, not an answer")
    return grade_answer(text, problem)


def grade_sentence(text: str, problem: Problem) -> Graded:
    """Grade one line that a program prints: the answer, alone or in a sentence ("Total: 5")."""
    stated = answer_text(text)
    graded = grade_answer(text if stated is None else stated, problem)
    if graded.verdict is Verdict.NO_ANSWER and problem.answer.kind == "number":
        numbers = _ANY_NUMBER.findall(plain(text[:MAX_SEGMENT_CHARS]))
        if len(numbers) == 1:
            return grade_answer(numbers[0], problem)
    return graded


def grade_answer(text: str, problem: Problem, reading: Reading = DEFAULT) -> Graded:
    """Grade a text that is the answer, with units and prose as people add them."""
    if reading.decimal == "," and problem.answer.kind != "text":
        text = with_decimal_points(text)
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
        return no_answer(f"no single number in {quote(text)}")
    return judge(same_number(number, number_of(gold)), str(number), str(gold))


def _grade_choice(text: str, problem: Problem) -> Graded:
    letter = read_choice(text, problem.choices)
    if letter is None:
        return no_answer(f"no single option in {quote(text)}")
    return judge(letter == problem.answer.value, letter, str(problem.answer.value))


def _grade_words(text: str, gold: Answer) -> Graded:
    words = text.strip()
    if not words:
        return no_answer("nothing after the marker")
    candidates = (words, words.splitlines()[0], first_line(words))
    return judge(
        any(same_text(each, str(gold.value)) for each in candidates), words, str(gold.value)
    )


def _grade_by_scorer(text: str, problem: Problem, scorer: Callable[[str], float]) -> Graded:
    """By the best of several spellings: scorers expect the bare answer."""
    words = text.strip()
    if not words:
        return no_answer("nothing after the marker")
    candidates = [
        words,
        words.rstrip(".!"),
        words.splitlines()[0].strip(),
        first_line(words).rstrip(".!"),
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
            error = f"the task's scorer failed: {type(failure).__name__}: {clip(str(failure))}"
    if not scores:
        return Graded(verdict=Verdict.ERROR, value=None, reason=error)
    return judge(any(score >= 1 for score in scores), value, str(problem.answer))


def judge(right: bool, value: str, gold: str) -> Graded:
    """CORRECT or WRONG, with a reason that quotes both."""
    gold = clip(gold)
    value = (
        clip(value) if len(value) <= MAX_VALUE_CHARS else f"{clip(value[:180])}… {_digest(value)}"
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


def no_answer(reason: str) -> Graded:
    """The verdict on a completion from which no answer can be read."""
    return Graded(verdict=Verdict.NO_ANSWER, value=None, reason=reason)


def quote(text: str) -> str:
    """The start of a text, in quotation marks, for a reason."""
    words = clip(text.lstrip()[:80])
    return f'"{words}"' if words else "the empty text"


def clip(text: str) -> str:
    """One bounded line that can be encoded: a lone surrogate is not printable."""
    line = " ".join(text[: 2 * MAX_VALUE_CHARS].split())[:MAX_VALUE_CHARS]
    return "".join(char if char.isprintable() else "�" for char in line)


def value_text(value: Any) -> str | None:
    """A program's value as an answer text; None if it is not an answer."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        return str(value) if value.bit_length() < 3 * MAX_DIGITS else None
    if isinstance(value, float | Decimal):
        return str(value) if isfinite(value) else None
    return value if isinstance(value, str) else None


def describe(value: Any) -> str:
    """A value that is not an answer, for a reason."""
    if isinstance(value, bool | float | None):
        return str(value)
    if isinstance(value, int):
        return "an integer too long to be an answer"
    return f"a value of type {type(value).__name__}"
