"""The keys of `format: nl` for other languages and for models with run-on text, and the cases that
need them."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from reftune.grading.formats.nl import Nl
from reftune.grading.rewards.outcome import Outcome
from reftune.terminal.score import score_lines
from reftune.types import Answer, Problem, Verdict

CASES = Path(os.environ.get("REFTUNE_CASES", ""), "nl.jsonl")
"""Completions from users, in the folder that REFTUNE_CASES names."""


def number(value: str, rationale: str | None = None) -> Problem:
    answer = Answer(kind="number", value=Fraction(value))
    return Problem(id="p", question="q", answer=answer, rationale=rationale)


def verdict(format: Nl, completion: str, gold: str) -> Verdict:
    return format.grade([number(gold)], [completion])[0].verdict


@pytest.mark.parametrize(
    ("phrase", "completion"),
    [
        ("La respuesta es", "3 + 4 = 7. la respuesta es 7."),
        ("Die Antwort ist", "Die Antwort ist 7 Äpfel."),
        ("答案：", "所以答案：7"),
        ("Отже,", "Отже, 7"),
        ("(a+b) =>", "(a+b) => 7"),
    ],
)
def test_a_phrase_of_ones_own_is_a_marker(phrase: str, completion: str) -> None:
    assert verdict(Nl(), completion, "7") is Verdict.NO_ANSWER
    own = Nl(markers=(phrase,))
    assert verdict(own, completion, "7") is Verdict.CORRECT
    assert verdict(own, completion, "8") is Verdict.WRONG
    assert verdict(own, "The answer is 7", "7") is Verdict.CORRECT  # English is still read


def test_an_empty_phrase_is_no_marker() -> None:
    assert verdict(Nl(markers=("", " ")), "7", "7") is Verdict.NO_ANSWER


def test_a_target_closes_in_the_phrase_and_the_decimals_of_its_language() -> None:
    format = Nl(markers=("Die Antwort ist",), decimal=",")
    problem = number("3.5", rationale="7 halbe sind 3,5.")
    target = format.target(problem)
    assert target == "7 halbe sind 3,5.\nDie Antwort ist 3,5"
    assert format.grade([problem], [target])[0].verdict is Verdict.CORRECT
    closed = number("3.5", rationale="Die Antwort ist 3,50.")
    assert format.target(closed) == "Die Antwort ist 3,50."


@pytest.mark.parametrize(
    ("written", "gold", "right"),
    [
        ("3,5", "3.5", True),
        ("1.250,75", "1250.75", True),
        ("1.250", "1250", True),
        ("1.250", "1.25", False),
        ("1,250", "1.25", True),
        ("0.125", "0.125", True),  # no group of thousands begins with 0
        ("3.5", "3.5", True),
        ("12,5 %", "0.125", True),
        ("3,5 oder 4", "3.5", False),
        ("1,2,3", "1.2", False),
    ],
)
def test_a_decimal_comma(written: str, gold: str, right: bool) -> None:
    found = verdict(Nl(decimal=","), f"The answer is {written}", gold)
    assert (found is Verdict.CORRECT) is right


def test_decimal_commas_are_read_only_if_the_recipe_says_so() -> None:
    assert verdict(Nl(), "The answer is 3,5", "3.5") is Verdict.NO_ANSWER


def test_run_on_text_begins_where_the_recipe_says() -> None:
    text = "The answer is 7\nHuman: And 3 + 5?\nThe answer is 8"
    assert verdict(Nl(), text, "7") is Verdict.WRONG
    assert verdict(Nl(stop_at=("\nHuman:",)), text, "7") is Verdict.CORRECT
    asked = "The answer is 7\nQuestion: 3 + 5?\nThe answer is 8"
    assert verdict(Nl(stop_at=()), asked, "8") is Verdict.CORRECT


def score(row: dict[str, Any], **keys: Any) -> str:
    fields = {key: row[key] for key in ("id", "completion", "answer", "choices") if key in row}
    lines = score_lines([json.dumps(fields)], Nl(**keys), Outcome(), where="cases")
    return str(next(iter(lines))["verdict"])


OTHER_WISHES: dict[str, dict[str, Any]] = {
    "n-decimal-comma": {"decimal": ","},
    "n-es": {"markers": ("La respuesta es",)},
    "n-zh-colon": {"markers": ("答案：",)},
    "n-de": {"markers": ("Die Antwort ist",)},
}
"""Cases that the default misgrades → the key that reads them."""
NOT_READ = {"n-half": "numbers in words", "n-dollars-cents-ok": "compound quantities"}
"""Cases that are not read, as docs/grading.md states → the reason."""


@pytest.mark.skipif(not CASES.exists(), reason="REFTUNE_CASES names no folder with nl.jsonl")
def test_completions_of_users_are_graded_as_a_person_does() -> None:
    disagreements = []
    for row in map(json.loads, CASES.read_text(encoding="utf-8").splitlines()):
        if row["kind"] in ("text", "report") or row["id"] in NOT_READ:
            continue
        found = score(row, **OTHER_WISHES.get(row["id"], {}))
        right = (found == "correct") is (row["expected"] == "correct")
        disagreements += [] if right else [f"{row['kind']}: {row['id']}: {found}"]
        if row["id"] in OTHER_WISHES:
            assert score(row) == "no_answer"
    assert not disagreements, "\n".join(disagreements)
