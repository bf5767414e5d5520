"""The contract of every format, in every style and grading."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reftune.errors import DataError
from reftune.grading.formats import Format
from reftune.recipe import known_kinds, load_component
from reftune.types import Answer, Problem, Verdict

SPECS = [
    {"kind": kind, "style": style, "grading": grading}
    for kind in known_kinds("formats")
    for style in ("paper", "compact")
    for grading in ("robust", "paper")
]
RATIONALES = {"nl": "2 and 3 make 5.", "program": "def solution():\n    a = 2\n    return a + 3"}
CHOICE_RATIONALES = {"nl": "2 and 3 make 5.", "program": "def solution():\n    return 'b'"}

each_format = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: " ".join(spec.values()))


def loaded(spec: dict[str, str]) -> Format:
    format: Format = load_component(spec, group="formats")
    return format


def problems(kind: str) -> list[Problem]:
    rationale, choice = RATIONALES[kind], CHOICE_RATIONALES[kind]
    number = Answer(kind="number", value=Fraction(5))
    return [
        Problem(id="number", question="How many?", answer=number, rationale=rationale),
        Problem(
            id="choice",
            question="Which?",
            answer=Answer(kind="choice", value="b"),
            choices=("4", "5"),
            rationale=choice,
        ),
    ]


@each_format
def test_a_gold_target_is_graded_correct(spec: dict[str, str]) -> None:
    format, golds = loaded(spec), problems(spec["kind"])
    graded = format.grade(golds, [format.target(problem) for problem in golds])
    assert [grade.verdict for grade in graded] == [Verdict.CORRECT] * len(golds)


@each_format
def test_prompt_and_target_meet_at_a_line_break(spec: dict[str, str]) -> None:
    format = loaded(spec)
    for problem in problems(spec["kind"]):
        assert format.prompt(problem).endswith("\n") != format.target(problem).startswith("\n")
        assert format.target(problem) == format.target(problem).rstrip()


@each_format
def test_the_prompt_holds_the_question_and_not_the_answer(spec: dict[str, str]) -> None:
    number, choice = problems(spec["kind"])
    assert "How many?" in loaded(spec).prompt(number)
    assert "5" not in loaded(spec).prompt(number)
    assert "a ) 4 , b ) 5" in loaded(spec).prompt(choice)


@each_format
def test_a_missing_rationale_is_named(spec: dict[str, str]) -> None:
    problem = Problem(id="p7", question="q", answer=Answer(kind="number", value=Fraction(5)))
    with pytest.raises(DataError, match="p7"):
        loaded(spec).target(problem)


@each_format
def test_grading_does_not_depend_on_the_batch(spec: dict[str, str]) -> None:
    format, golds = loaded(spec), problems(spec["kind"])
    texts = [
        format.target(golds[0]),
        "",
        "The answer is 5",
        "    return 5",
        "def solution():\n    return 'a'",
    ]
    pairs = [(problem, text) for problem in golds for text in texts]
    together = format.grade([problem for problem, _ in pairs], [text for _, text in pairs])
    assert together == [format.grade([problem], [text])[0] for problem, text in pairs]


@each_format
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(st.text(st.characters(), max_size=60), max_size=3))
def test_any_text_gets_one_grade_with_a_reason_on_one_line(
    spec: dict[str, str], texts: list[str]
) -> None:
    format: Any = FORMATS.setdefault(str(spec), loaded(spec))
    for problem in problems(spec["kind"]):
        graded = format.grade([problem] * len(texts), texts)
        assert len(graded) == len(texts)
        assert all(grade.reason and "\n" not in grade.reason for grade in graded)
        assert all(
            (grade.value is None) or grade.verdict in (Verdict.CORRECT, Verdict.WRONG)
            for grade in graded
        )


FORMATS: dict[str, Format] = {}
