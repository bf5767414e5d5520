"""Tasks of the reasoning-gym package."""

from __future__ import annotations

import random
from typing import Any

import pytest

pytest.importorskip("reasoning_gym", reason="the extra reasoning-gym is not installed")

from reftune.datasets import Splits
from reftune.datasets.reasoning_gym import ReasoningGym
from reftune.errors import DataError, RecipeError
from reftune.types import ANY_ANSWER


def load(task: str, seed: int = 0, **keys: Any) -> Splits:
    sizes = {"train_size": 20, "dev_size": 5, "test_size": 10}
    return ReasoningGym.model_validate(
        {"kind": "reasoning_gym", "task": task, **sizes, **keys}
    ).load(seed=seed)


def test_sizes_are_as_asked_and_no_question_repeats() -> None:
    splits = load("chain_sum", config={"max_terms": 2, "max_digits": 1})
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (20, 5, 10)
    questions = [p.question for p in (*splits.train, *splits.dev, *splits.test)]
    assert len(set(questions)) == 35


def test_tasks_that_draw_from_the_global_generator_are_reproducible() -> None:
    found = []
    for state in (1, 2):
        random.seed(state)
        found.append([problem.question for problem in load("list_functions").train])
        assert random.random() == random.Random(state).random(), "the caller's generator is kept"
    assert found[0] == found[1]


def test_the_tasks_own_scorer_grades_the_answer_text() -> None:
    problem = load("chain_sum").train[0]
    assert problem.scorer is not None
    assert problem.scorer(str(problem.answer)) == 1.0
    assert problem.scorer("no number") < 1.0


def test_gsm_symbolic_brings_rationales_without_the_answer_line() -> None:
    problem = load("gsm_symbolic").train[0]
    assert problem.rationale and "####" not in problem.rationale
    assert problem.answer.value == str(problem.columns["metadata"]["answer_value"])


def test_other_tasks_have_no_rationale() -> None:
    assert load("chain_sum").train[0].rationale is None


def test_the_test_questions_depend_on_neither_seed_nor_the_other_sizes() -> None:
    first, other = load("chain_sum", seed=1), load("chain_sum", seed=2, train_size=7)
    assert [p.question for p in first.test] == [p.question for p in other.test]


def test_another_data_seed_gives_other_questions() -> None:
    first, other = load("chain_sum"), load("chain_sum", data_seed=1)
    assert not {p.question for p in first.train} & {p.question for p in other.train}


def test_a_task_whose_gold_is_open_says_so() -> None:
    assert load("graph_color", train_size=2, dev_size=0, test_size=0).train[0].answer == ANY_ANSWER


def test_a_task_with_too_few_questions_is_refused() -> None:
    # one-digit sums of two terms: fewer than 100 · 2 questions
    with pytest.raises(
        DataError,
        match=r"reasoning_gym chain_sum: \d+ different train questions in \d+ draws, expected 305",
    ):
        load("chain_sum", train_size=300, config={"min_terms": 2, "max_terms": 2, "max_digits": 1})


@pytest.mark.parametrize(
    ("task", "config", "message"),
    [
        ("chain_sums", {}, r"dataset.task: chain_sums: unknown task; did you mean chain_sum\?"),
        (
            "chain_sum",
            {"max_term": 3},
            r"dataset.config.max_term: unknown key; did you mean max_terms\?",
        ),
        ("chain_sum", {"seed": 3}, r"dataset.config.seed: unknown key"),
        (
            "chain_sum",
            {"min_terms": 9, "max_terms": 2},
            r"dataset.config: chain_sum rejects .*: max_terms must be >= min_terms",
        ),
        # the rest fails only when questions are generated, or with an unusual error
        (
            "countdown",
            {"min_numbers": 2, "max_numbers": 3, "min_target": 10**7, "max_target": 10**7 + 1},
            r"countdown rejects .*: Failed to generate valid expression",
        ),
        ("spell_backward", {"min_word_len": 50, "max_word_len": 60}, "from an empty sequence"),
        ("spell_backward", {"data_file": "nope"}, r"spell_backward rejects .*: .*No such file"),
        ("chain_sum", {"min_digits": 1.5, "max_digits": 2}, r"chain_sum rejects .*: non-integer"),
        ("calendar_arithmetic", {"tasks": [1]}, "calendar_arithmetic rejects .*: 'int' object"),
    ],
)
def test_what_the_package_does_not_know_is_refused(
    task: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        load(task, config=config)
    assert "\n" not in str(error.value)
