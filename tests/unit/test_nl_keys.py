"""The keys of `format: nl` for other languages and for models with run-on text, and the cases that
need them."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from reftune.datasets.jsonl import Jsonl
from reftune.grading.formats import Format
from reftune.grading.formats.nl import Nl
from reftune.grading.rewards.outcome import Outcome
from reftune.grading.verdicts import grade_value
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


def from_data(folder: Path, row: dict[str, Any], **keys: Any) -> Problem:
    """The problem that a dataset with decimal commas reads from a row."""
    (folder / "data.jsonl").write_text(json.dumps({"question": "q", "rationale": "r", **row}))
    train = str(folder / "data.jsonl")
    dataset = Jsonl(kind="jsonl", train=train, dev_size=0, decimal=",", **keys)
    return dataset.load(seed=0).train[0]


def verdicts(format: Format, problem: Problem, *answers: str) -> list[Verdict]:
    completions = [f"The answer is {answer}" for answer in answers]
    return [graded.verdict for graded in format.grade([problem] * len(answers), completions)]


@pytest.mark.parametrize(
    ("choices", "gold", "right", "wrong"),
    [
        (["3,5", "4,5"], "A", ["3,5", "3,5 kg", "A) 3,5", "3,50"], ["4,5", "4,5 kg"]),
        (["1,250", "1250"], "A", ["1,250", "1,25"], ["1.250", "1250"]),
        (["1.250 kg", "7 kg"], "1250", ["1.250", "1 250 kg", "a"], ["7", "b"]),
        ([1.234, 1234], 1.234, ["1,234"], ["1.234", "1234"]),
        ({"text": ["0,5", "1,5"], "label": ["1", "2"]}, "2", ["1,5"], ["0,5"]),
        (["(1,2)", "(2,1)"], "A", ["(1,2)", "(1, 2)"], ["(2,1)"]),
        (["1.250", "7"], "A", ["1.250", "1250"], ["7", "b"]),
    ],
)
def test_options_have_decimal_commas(
    tmp_path: Path, choices: object, gold: object, right: list[str], wrong: list[str]
) -> None:
    problem = from_data(tmp_path, {"choices": choices, "answer": gold})
    assert set(verdicts(Nl(decimal=","), problem, *right)) == {Verdict.CORRECT}
    assert set(verdicts(Nl(decimal=","), problem, *wrong)) == {Verdict.WRONG}


def test_the_prompt_shows_options_with_their_commas_and_programs_return_points(
    tmp_path: Path,
) -> None:
    problem = from_data(tmp_path, {"choices": ["3,5", "4,5"], "answer": "3,50"})
    assert Nl().prompt(problem) == "q\na ) 3,5 , b ) 4,5\n"
    assert grade_value(3.5, problem).verdict is Verdict.CORRECT
    assert grade_value("3,5", problem).verdict is Verdict.CORRECT
    grouped = from_data(tmp_path, {"choices": ["1,250", "1250"], "answer": "A"})
    assert grade_value("1,250", grouped).verdict is Verdict.CORRECT
    assert grade_value(1250, grouped).verdict is Verdict.WRONG
    assert grade_value(4.5, problem).verdict is Verdict.WRONG
    numbers = from_data(tmp_path, {"choices": [1.234, 2], "answer": "a"})
    assert Nl().prompt(numbers) == "q\na ) 1,234 , b ) 2\n"


@pytest.mark.parametrize(
    ("kind", "gold", "target", "right", "wrong"),
    [
        ("list", "1,250; 2,5", "1,250; 2,5", ["1,25, 2,5"], ["1250; 2,5", "1.250; 2,5"]),
        ("list", [1.234, 2.5], "1,234; 2,5", ["1,234 and 2,5"], ["1234; 2,5"]),
        ("set", ["1,234", "2,5"], "1,234; 2,5", ["2,5; 1,234"], ["1.234; 2,5"]),
        ("list", "[1.234, 2.5]", "1,234; 2,5", [], ["1.234; 2,5"]),
        ("list", "[1,5, 2,5]", "1,5; 2,5", ["[1,5; 2,5]"], ["1; 5; 2; 5"]),
        ("list", "[1,2]", "1; 2", ["1, 2", "1 and 2"], ["1,2"]),
        ("any_of", "1,250", "1,250", ["1,25", "1,250 kg"], ["1.250"]),
        ("any_of", ["1,5 m²", "Raum 1,250"], "1,5 m²", ["1,50 m²", "Raum 1,250"], ["Raum 1.250"]),
        ("any_of", "Raum 1,250", "Raum 1,250", [], ["Raum 1.250", "1,25"]),
        ("auto", "[1,5; 2,5; 3]", "1,5; 2,5; 3", ["[1,5, 2,5, 3]"], ["1; 5; 2; 5; 3"]),
        ("auto", "[1,2]", "[1,2]", ["[1,2]"], ["1.2"]),
        ("auto", "(B) 1,250", "B", ["1,25"], ["1.250"]),
        ("auto", "[1,2,3]", "1; 2; 3", ["[1,2,3]", "1, 2, 3"], ["1,2; 3"]),
        ("auto", "[1.234, 2.5, 3]", "1,234; 2,5; 3", ["1,234, 2,5, 3"], ["1234; 2,5; 3"]),
        ("any_of", "[1,5, 2,5]", "1,5", ["2,5", "1,50"], ["1", "15"]),
        ("list", "[1.250,75, 2,5]", "1.250,75; 2,5", ["1250,75 and 2,5"], []),
        ("list", ["(1,2)", "(3,4)"], "(1,2); (3,4)", ["(1,2), (3,4)"], ["(1,2), (4,3)"]),
        ("any_of", "(1,2)", "(1,2)", ["(1, 2)"], ["(2,1)", "(12)"]),
        ("auto", "3,5", "3,5", ["(3,5)", "$(3,5)$", "[3,5]"], ["(35)"]),
        ("auto", "(3,5 kg)", "3,5", ["3,5 kg", "(3,5 kg)"], ["35 kg"]),
        ("auto", "(1,2)", "(1,2)", ["(1, 2)"], ["1.2"]),
        ("auto", "x = 3,5", "x = 3,5", ["x=3,5"], ["x = 35"]),
        ("auto", "(0,5]", "(0,5]", ["(0,5]"], []),
        ("auto", "\\boxed{2,50} or \\boxed{2,5}", "2,5", ["2,50"], ["25"]),
    ],
)
def test_decimal_commas_in_every_kind_of_gold_and_its_target(
    tmp_path: Path, kind: str, gold: object, target: str, right: list[str], wrong: list[str]
) -> None:
    problem, format = from_data(tmp_path, {"answer": gold}, answer_kind=kind), Nl(decimal=",")
    assert format.target(problem) == f"r\nThe answer is {target}"
    assert set(verdicts(format, problem, target, *right)) == {Verdict.CORRECT}
    assert Verdict.CORRECT not in verdicts(format, problem, *wrong)


def test_a_target_in_the_papers_style_has_the_decimals_of_its_grader() -> None:
    problem = number("1.125", rationale="r")
    ours, paper = Nl(decimal=",", style="paper"), Nl(decimal=",", grading="paper")
    assert ours.target(problem) == "r\nTherefore, the answer is: 1,125"
    assert paper.target(problem) == "r\nTherefore, the answer is: 1.125"  # read by float()
    for format in ours, paper:
        assert format.grade([problem], [format.target(problem)])[0].verdict is Verdict.CORRECT


def test_an_english_gold_becomes_a_target_with_decimal_commas() -> None:
    answer = Answer(kind="any_of", value="1,250.5", items=("1,250.5",))
    problem = Problem(id="p", question="q", answer=answer, rationale="r")
    assert Nl(decimal=",").target(problem) == "r\nThe answer is 1.250,5"
    assert Nl().target(problem) == "r\nThe answer is 1,250.5"


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
    lines = score_lines([json.dumps(fields)], Nl(**keys).grade, Outcome(), where="cases")
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
