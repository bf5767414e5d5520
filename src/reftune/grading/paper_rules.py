"""Grades answers as the authors of the ReFT paper did, including the oddities of their code."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from reftune.grading.verdicts import describe, judge, no_answer, quote, value_text
from reftune.types import Graded, Problem

PAPER_TRIGGER = "\nTherefore, the answer is: "
PAPER_HEADER = "\nAnswer reasoning:\n"


def grade_completion_paper(completion: str, problem: Problem) -> Graded:
    """The authors' rule for worked solutions: `grade_value_paper` grades the text after the last
    `PAPER_TRIGGER`, or the whole text if there is none."""
    text = paper_response(completion).split(PAPER_TRIGGER)[-1].strip()
    return grade_value_paper(text, problem)


def grade_value_paper(value: Any, problem: Problem) -> Graded:
    """Grade a program's value as the authors of the ReFT paper do. If the gold answer is a number,
    `float(value)` may differ from this number by at most 0.01; nan and inf are wrong, and a value
    that `float()` cannot read, such as "1,000", counts as no answer. If the gold answer is not a
    number, it is compared with the value's text, ignoring case and quotation marks."""
    gold = problem.answer.value
    if not isinstance(gold, Fraction):
        text = value if isinstance(value, str) else value_text(value) or describe(value)
        words, expected_words = (re.sub("[\"']", "", each.lower()).strip() for each in (text, gold))
        return judge(words == expected_words, words, gold)
    try:
        predicted, expected = float(value), float(gold)
    except (TypeError, ValueError, OverflowError):
        shown = quote(value) if isinstance(value, str) else describe(value)
        return no_answer(f"float() cannot read {shown}")
    return judge(abs(predicted - expected) <= 0.01, repr(predicted), repr(expected))


def paper_response(completion: str) -> str:
    """The part of a completion that the ReFT authors' code grades: the text after the last
    `PAPER_HEADER`. The prompt already ends with this header, so a completion that does not repeat
    it is graded in full."""
    return (PAPER_HEADER + completion).split(PAPER_HEADER)[-1].strip()
