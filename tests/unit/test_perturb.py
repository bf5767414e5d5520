"""The robust grader rejects gold solutions changed to be wrong, and accepts those changed to stay
right."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest

from reftune.grading.formats.nl import Nl
from reftune.grading.formats.program import Program
from reftune.grading.perturbed import right_solutions, wrong_solutions
from reftune.types import Answer, Problem, Verdict

NUMBER = Problem(
    id="n",
    question="How many?",
    answer=Answer(kind="number", value=Fraction(1500)),
    rationale="def solution():\n    boxes = 30\n    return boxes * 50",
)
CHOICE = Problem(
    id="c",
    question="Which?",
    answer=Answer(kind="choice", value="d"),
    choices=("1", "2", "3", "4"),
    rationale='def solution():\n    value = 4\n    return "d"',
)
TEXT = Problem(
    id="t",
    question="Who?",
    answer=Answer(kind="text", value="Ada"),
    rationale="She was first.\nThe answer is Ada",
)


def words(problem: Problem) -> str:
    return f"30 boxes of 50 are counted.\nThe answer is {problem.answer}"


@pytest.mark.parametrize("problem", [NUMBER, CHOICE], ids=["number", "choice"])
@pytest.mark.parametrize("kind", ["program", "nl"])
def test_every_change_has_its_stated_effect_on_the_answer(problem, kind):
    format = Program() if kind == "program" else Nl()
    target = format.target(problem) if kind == "program" else words(problem)
    wrong, right = list(wrong_solutions(problem, target)), list(right_solutions(problem, target))
    assert len({p.kind for p in wrong}) >= 4 and len({p.kind for p in right}) >= 4
    assert len({p.text for p in (*wrong, *right)} | {target}) == len(wrong) + len(right) + 1
    for expected, cases in ((True, right), (False, wrong)):
        graded = format.grade([problem] * len(cases), [case.text for case in cases])
        for case, grade in zip(cases, graded, strict=True):
            assert (grade.verdict is Verdict.CORRECT) is expected, (case, grade)


@pytest.mark.parametrize(
    "end",
    [
        "return 30 * 50  # boxes",
        "return 30 * 50;",
        "return 30 * 50 ;  ",
        "return (30 * 50)  # boxes (of 50;",
        "if True:\n        return 30 * 50  # boxes",
    ],
)
def test_variants_of_a_program_are_programs(end):
    target = f"def solution():\n    {end}"
    assert "a float" in {p.kind for p in right_solutions(NUMBER, target)}
    for solutions, expected in ((right_solutions, True), (wrong_solutions, False)):
        cases = list(solutions(NUMBER, target))
        for case, grade in zip(
            cases, Program().grade([NUMBER] * len(cases), [x.text for x in cases]), strict=True
        ):
            assert (grade.verdict is Verdict.CORRECT) is expected, (case, grade)
            assert "SyntaxError" not in grade.reason, case


@pytest.mark.parametrize(
    "end", ["if True: return 30 * 50", "x = 30; return x * 50", "# return 1500"]
)
def test_a_return_that_does_not_begin_the_last_line_gives_nothing(end):
    target = f"def solution():\n    {end}"
    assert [*right_solutions(NUMBER, target), *wrong_solutions(NUMBER, target)] == []


def test_words_that_end_in_a_return_are_no_program():
    target = "The answer is 1500 that they will return 1500"
    kinds = {p.kind for x in (right_solutions, wrong_solutions) for p in x(NUMBER, target)}
    assert "an import" not in kinds and "printed and not returned" not in kinds


def test_a_solution_without_its_answer_keeps_no_box_of_it():
    target = "So the total is $\\boxed{1500}$.\nThat is 30 * 50.\nThe answer is 1500"
    texts = {p.kind: p.text for p in wrong_solutions(NUMBER, target)}
    assert "1500" not in texts["no answer"]
    graded = Nl().grade([NUMBER] * len(texts), list(texts.values()))
    assert Verdict.CORRECT not in [grade.verdict for grade in graded]


def test_the_papers_closing_line_keeps_its_colon():
    target = "It is 30 * 50.\nTherefore, the answer is: 1500"
    texts = {p.kind: p.text for p in right_solutions(NUMBER, target)}
    assert texts["a decimal"] == "It is 30 * 50.\nTherefore, the answer is: 1500.0"
    assert texts["a thousands separator"].endswith("is: 1,500")


@pytest.mark.parametrize(
    ("gold", "kinds"),
    [(0, {"off by one", "printed and not returned"}), (10**9, {"an error before the answer"})],
)
def test_a_change_that_might_not_matter_is_not_made(gold, kinds):
    problem = Problem(id="z", question="?", answer=Answer(kind="number", value=Fraction(gold)))
    found = {p.kind for p in wrong_solutions(problem, f"    return {gold}")}
    assert kinds <= found
    assert not found & {
        "opposite sign",
        "ten times",
    }  # 0 is its own negative; 10^9 is too large to be changed by 1


def test_a_text_without_an_answer_gives_nothing():
    assert (
        list(wrong_solutions(NUMBER, "no marker here"))
        == list(right_solutions(NUMBER, "no marker here"))
        == []
    )
    assert list(right_solutions(TEXT, str(TEXT.rationale))) == []
    expression = replace(TEXT, answer=Answer(kind="latex", value="x + 1"))
    assert list(right_solutions(expression, "So.\nThe answer is x + 1")) == []
