"""MathQA: options, formulas, mojibake, both kinds of answers."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from reftune.datasets import Splits
from reftune.datasets.mathqa import Mathqa, option_answer, option_value, read_options, repaired
from reftune.datasets.reading.mathqa_formula import OPERATIONS, formula_steps
from reftune.datasets.reading.programs import program
from reftune.errors import DataError
from reftune.grading.sandbox import Sandbox

ROW = {
    "Problem": "what is 5 % of 640 ?",
    "Rationale": '"5 ã — 640 / 100 = 32 . answer : c ."',
    "options": "a ) 30 , b ) 31 , c ) 32 , d ) rs . 3,200 , e ) none of these",
    "correct": "c",
    "annotated_formula": "multiply(640, divide(5, const_100))",
    "linear_formula": "divide(n0,const_100)|multiply(n1,#0)|",
    "category": "gain",
}
VALUE_PROGRAM = (
    "def solution():\n    step_1 = 5 / 100\n    step_2 = 640 * step_1\n    return step_2"
)
CHOICE_PROGRAM = """\
def solution():
    step_1 = 5 / 100
    step_2 = 640 * step_1
    options = {"a": 30, "b": 31, "c": 32, "d": 3200}
    return min(options, key=lambda letter: abs(options[letter] - step_2))"""


def row(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {**ROW, "Problem": f"what is 5 % of 640 ? ( {number} )", **changes}


def load(tmp_path: Path, *rows: dict[str, Any], **keys: Any) -> Splits:
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return Mathqa.model_validate(
        {"kind": "mathqa", "train": str(tmp_path / "data.json"), "dev_size": 0, **keys}
    ).load(seed=0)


# --- choice ---------------------------------------------------------------------------------------


def test_a_choice_question_ends_in_its_options_and_its_program_returns_a_letter(
    tmp_path: Path,
) -> None:
    (problem,) = load(tmp_path, ROW).train
    assert (
        problem.question
        == "what is 5 % of 640 ?\na ) 30 , b ) 31 , c ) 32 , d ) rs . 3,200 , e ) none of these"
    )
    assert problem.choices == ("30", "31", "32", "rs . 3,200", "none of these")
    assert (problem.answer.kind, problem.answer.value) == ("choice", "c")
    assert problem.rationale == CHOICE_PROGRAM
    assert problem.columns["category"] == "gain"


def test_a_choice_program_is_dropped_where_the_formula_is_not_near_the_gold(tmp_path: Path) -> None:
    # 32 is nearest to option e, 100, by chance only
    far = row(1, options="a ) 0 , b ) 1 , c ) 2 , d ) 3 , e ) 40", correct="e")
    wordy = row(2, correct="e")
    splits = load(tmp_path, ROW, far, wordy)
    assert len(splits.train) == 1
    assert splits.counts == {"no_program": 2}


def test_nl_choice_rationales_must_not_name_another_letter(tmp_path: Path) -> None:
    splits = load(
        tmp_path,
        ROW,
        row(1, Rationale="so the answer is b ."),
        row(2, Rationale="32 , so c"),
        rationale="nl",
    )
    assert [problem.rationale for problem in splits.train] == [
        "5 × 640 / 100 = 32 . answer : c .",
        "32 , so c",
    ]
    assert splits.counts == {"rationale_disagrees": 1}


def test_options_may_be_a_python_list_in_a_string(tmp_path: Path) -> None:
    spelled = "['a ) 30', 'b ) 31', 'c ) 32', 'd ) 33', 'e ) 34']"
    (problem,) = load(tmp_path, {**ROW, "options": spelled}).train
    assert problem.choices == ("30", "31", "32", "33", "34")
    assert problem.question.endswith("\na ) 30 , b ) 31 , c ) 32 , d ) 33 , e ) 34")


def test_the_same_stem_with_other_options_is_the_same_question(tmp_path: Path) -> None:
    other = {**ROW, "options": "a ) 32 , b ) 1 , c ) 2 , d ) 3 , e ) 4", "correct": "a"}
    (tmp_path / "test.json").write_text(json.dumps([other]))
    splits = load(tmp_path, ROW, row(1), test=str(tmp_path / "test.json"))
    assert len(splits.train) == 1
    assert splits.counts == {"leak": 1}
    assert load(tmp_path, ROW, other).counts == {}


def test_the_authors_choice_file_is_read_with_either_spelling_of_options(tmp_path: Path) -> None:
    rows = [
        {"item_id": "mathqa_0", "question": "q 1\na ) 1 , b ) 2 , c ) 3", "answer_value": "B"},
        {
            "item_id": "mathqa_1",
            "question": "q 2\n['a ) 1', 'b ) 2', 'c ) 3']",
            "answer_value": "a",
        },
    ]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    test = load(tmp_path, ROW, test=str(tmp_path / "test.json")).test
    assert [problem.question for problem in test] == [
        "q 1\na ) 1 , b ) 2 , c ) 3",
        "q 2\na ) 1 , b ) 2 , c ) 3",
    ]
    assert [problem.answer.value for problem in test] == ["b", "a"]


# --- numeric --------------------------------------------------------------------------------------


def test_a_numeric_question_has_no_options_and_its_program_returns_the_value(
    tmp_path: Path,
) -> None:
    (problem,) = load(tmp_path, ROW, answer="numeric").train
    assert problem.question == "what is 5 % of 640 ?"
    assert problem.choices == ()
    assert (problem.answer.kind, problem.answer.value) == ("number", 32)
    assert problem.rationale == VALUE_PROGRAM


def test_a_numeric_nl_rationale_does_not_end_in_a_letter(tmp_path: Path) -> None:
    bare = row(1, Rationale="answer : c .")
    splits = load(tmp_path, ROW, bare, answer="numeric", rationale="nl")
    assert [problem.rationale for problem in splits.train] == ["5 × 640 / 100 = 32"]
    assert splits.counts == {"no_rationale": 1}


def test_numeric_rows_need_a_number_that_the_formula_confirms(tmp_path: Path) -> None:
    rows = [
        ROW,
        row(1, correct="e"),  # none of these
        row(2, correct="b"),  # 31 is 3% off 32
        row(
            3, options="a ) 1 , b ) 2 , c ) 32.3 , d ) 4 , e ) 5"
        ),  # within 1%, off by more than the grader's 0.01
    ]
    splits = load(tmp_path, *rows, answer="numeric")
    assert len(splits.train) == 1
    assert splits.counts == {"no_number": 1, "formula_disagrees": 1, "program_disagrees": 1}
    # as nl, the third is fine: its gold answer is confirmed, and no program has to return it
    assert len(load(tmp_path, *rows, answer="numeric", rationale="nl").train) == 2


def test_numeric_test_rows_without_a_number_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text(json.dumps([row(1, correct="e"), row(2, correct="b")]))
    splits = load(tmp_path, ROW, answer="numeric", test=str(tmp_path / "test.json"))
    assert [problem.answer.value for problem in splits.test] == [31]
    assert splits.counts == {"test_without_number": 1}


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("38", 38),
        ("27.675", Fraction("27.675")),
        (".5", Fraction(1, 2)),
        ("- 6", -6),
        ("− 120", -120),
        ("13,400", 13_400),
        ("$ 1,354", 1354),
        ("rs . 600", 600),
        ("s . 180", 180),
        ("17.4 %", Fraction("17.4")),
        ("7 / 8", Fraction(7, 8)),
        ("2 6 / 7 %", Fraction(20, 7)),
        ("500 cm 2", 500),
        ("1200 m ^ 2", 1200),
        ("36 km / hr", 36),
        ("x = 7", 7),
        ("a ) 350", 350),
        ("d . 3.6", Fraction("3.6")),
        ("10 .", 10),
        ("24 days .", 24),
        ("450 sq . m", 450),
    ],
)
def test_options_that_state_one_number_are_read(text: str, value: Fraction) -> None:
    answer = option_answer(text)
    assert answer is not None
    assert answer.value == value


@pytest.mark.parametrize(
    "text",
    [
        "none of these",
        "3 : 4",
        "30 , 10",
        "4 and 5",
        "8 π",
        "2 ^ 5",
        "5 hr 20 min",
        "3 √ 2",
        "1 / 0",
        "four",
        "2 x",
        "9 pi feet",
    ],
)
def test_options_that_state_no_or_several_numbers_are_not(text: str) -> None:
    assert option_answer(text) is None


def test_a_ratio_is_a_value_but_no_number() -> None:
    assert option_value("3 : 4") == Fraction(3, 4)
    assert option_value("38") == 38


@pytest.mark.parametrize(
    "text",
    [
        "",
        "38",
        "a ) 1",
        "a ) 1 , c ) 2",
        "b ) 1 , c ) 2",
        "['a ) 1', 2]",
        "['a ) 1'",
        "a ) , b ) 2",
    ],
)
def test_text_that_is_no_list_of_options_is_not_read(text: str) -> None:
    assert read_options(text) is None


@pytest.mark.parametrize(
    ("broken", "mended"),
    [
        ("100 ã — ( 100 â ˆ ’ 5 )", "100 × ( 100 − 5 )"),
        ("60 ã · 5", "60 ÷ 5"),
        ("a â € “ b", "a – b"),
        ("â ˆ š 2", "√ 2"),
        ("3 â \x81 „ 4", "3 ⁄ 4"),
        ("wait ã ¢ â ‚ ¬ â ¦", "wait …"),
        ("ça va , 3 × 4", "ça va , 3 × 4"),
        ("â", "â"),
        ("ã", "ã"),
    ],
)
def test_mojibake_is_undone_and_other_text_left_alone(broken: str, mended: str) -> None:
    assert repaired(broken) == mended


def value_of(formula: str, problem: str) -> Any:
    steps = formula_steps(formula, problem)
    assert steps is not None
    with Sandbox() as sandbox:
        (result,) = sandbox.run([program(steps)])
    return result.value


@pytest.mark.parametrize(
    ("formula", "problem", "value"),
    [
        ("divide(n0,const_100)|multiply(n1,#0)|", "5 % of 640", 32),
        ("multiply(n0,const_0_2778)", "54 km / hr", 15),  # 54 km/h = 15 m/s
        ("subtract(n0,n1)", "1,200 less .5", 1199.5),
        ("reminder(n0,n1)", "17 by 5", 2),
        ("choose(n0,n1)", "5 choose 2", 10),
        ("add(const_1,const_2)|choose(#0,n0)", "2 of them", 3),
        ("permutation(n0,n1)", "5 and 2", 20),
        ("speed(n0,n1)", "100 m in 8 s", 12.5),
        ("p_after_gain(n0,n1)", "25 % on 80", 100),
        ("original_price_before_loss(n0,n1)", "20 % , sold at 80", 100),
        ("triangle_area_three_edges(n0,n1,n2)", "3 , 4 , 5", 6),
        ("quadrilateral_area(n0,n1,n2)", "diagonal 10 , offsets 3 and 5", 40),
        ("add(n0,const_1)|negate(n0)|floor(#1)", "2.5", -3),  # the first step is not needed
    ],
)
def test_formulas_mean_what_mathqa_means(formula: str, problem: str, value: float) -> None:
    assert value_of(formula, problem) == pytest.approx(value, abs=1e-9)


def test_the_circumference_of_a_unit_circle() -> None:
    assert value_of("circumface(n0)", "radius 1") == pytest.approx(6.283185307)


def test_every_operation_runs() -> None:
    with Sandbox() as sandbox:
        for operation, template in OPERATIONS.items():
            places = [f"n{n}" for n in range(3)][
                : template.count("{}") or max(map(int, filter(str.isdigit, _places(template)))) + 1
            ]
            steps = formula_steps(f"{operation}({','.join(places)})", "4 , 5 and 6")
            assert steps is not None, operation
            (result,) = sandbox.run([program(steps)])
            assert result.reason == "", operation


def _places(template: str) -> str:
    return "".join(template[i + 1] for i, character in enumerate(template) if character == "{")


@pytest.mark.parametrize(
    "formula",
    [
        "",
        "add(n0)",
        "add(n0,n9)",
        "sine(n0)",
        "add(n0,#0)",
        "add(n0,n1)|add(#1,n0)",
        "add(n0,const_x)",
        "add(n0,n1",
        "3",
    ],
)
def test_a_formula_that_cannot_be_read_gives_no_program(formula: str) -> None:
    assert formula_steps(formula, "5 and 6") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"options": "30 or 31"},
            r"data.json:1: options '30 or 31' cannot be read; expected a form like 'a \) 38",
        ),
        ({"correct": "f"}, "data.json:1: correct is 'f'; expected a letter from a to e"),
        ({"Problem": ""}, "data.json:1: Problem is ''; expected text"),
    ],
)
def test_bad_rows_are_refused_with_their_line(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, {**ROW, **changes})
