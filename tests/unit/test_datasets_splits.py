"""Cleaning, drawing dev, and leaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import pytest

from reftune.datasets import Splits
from reftune.datasets.reading.splits import draw_splits, drop_untrainable, normalised
from reftune.errors import DataError
from reftune.types import Answer, Problem


def problem(
    question: str, gold: int | str = 1, *, rationale: str | None = "because", id: str = "p"
) -> Problem:
    answer = (
        Answer(kind="text", value=gold)
        if isinstance(gold, str)
        else Answer(kind="number", value=Fraction(gold))
    )
    return Problem(id=id, question=question, answer=answer, rationale=rationale)


def questions(problems: Sequence[Problem]) -> list[str]:
    return [problem.question for problem in problems]


def split(train: list[Problem], **options: object) -> Splits:
    settings: dict[str, object] = {"dev": None, "test": [], "dev_size": 0, "seed": 0, **options}
    return draw_splits(train=train, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Tom has 3 apples.", "tom has  3 apples"),
        ("Mrs. Hilt's T-shirt", "mrs . hilt ' s t shirt"),
        ("It costs $1,000.50 !", "it costs $ 1000.50"),
        ("a 3 - digit number", "a 3-digit number"),
        ("Rs 1,00,000", "Rs 100000"),
        ("Tom has 12! How many", "Tom has 12. How many"),
        ("f'(3)", "f’(3)"),
        ("You don't!?", "You don't?"),
        ("1,234,567.5 or 12,34,567", "1234567.5 or 1234567"),
        ("a well-known x-axis", "a well known x axis"),
        ("1,000! / 999!", "1000! / 999!"),
    ],
)
def test_case_space_and_sentence_punctuation_do_not_make_another_question(a: str, b: str) -> None:
    assert normalised(a) == normalised(b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("2 + 3", "2 - 3"),
        ("$ 14.28", "$ 1428"),
        ("is (( balanced", "is () balanced"),
        ("3 - 2", "3 2"),
        ("x^2", "x2"),
        ("f'(3)", "f(3)"),
        ("3! + 2", "3 + 2!"),
        ("(2 + 1)! + 2", "(2 + 1) + 2!"),
        ("What is 5!?", "What is 5?"),
        (r"\frac{5!}{3!}", r"\frac{5}{3}"),
        ("n! + 2", "n + 2!"),
        (".5 + 2", "5 + 2"),
        ("1,23", "12,3"),
        ("2,50 Euro", "250 Euro"),
        ("3,20 Euro", "320 Euro"),
        ("0,125 kg", "0125 kg"),
        ("the points (2,10)", "the points (210)"),
        ("the LCM of 12,15,20", "the LCM of 121520"),
        ("What is $x - y$?", "What is $x y$?"),
        ("9 a - b = 10", "9 a b = 10"),
    ],
)
def test_numbers_operators_and_brackets_do(a: str, b: str) -> None:
    assert normalised(a) != normalised(b)


def test_a_decimal_comma_never_separates_thousands() -> None:
    assert normalised("It costs 1,000 Euro", ",") != normalised("It costs 1000 Euro", ",")
    rows = [problem("Bei 1,250 kg?", 1), problem("Bei 1250 kg?", 2)]
    assert split(rows).counts == {"contradiction": 2}
    assert split([replace(row, decimal=",") for row in rows]).counts == {}


def test_repeated_rows_are_dropped_and_counted() -> None:
    splits = split([problem("a b", 1), problem("a  b ", 1, rationale="other"), problem("c", 2)])
    assert questions(splits.train) == ["a b", "c"]
    assert splits.counts == {"duplicate": 1}


def test_another_rationale_is_kept_where_questions_may_have_several() -> None:
    rows = [problem("a", 1), problem("a", 1, rationale="other"), problem("a", 1)]
    splits = split(rows, several_rationales=True)
    assert [p.rationale for p in splits.train] == ["because", "other"]
    assert splits.counts == {"duplicate": 1}


def test_of_contradicting_rows_none_is_kept() -> None:
    splits = split([problem("How many?", 1), problem("how many", 2), problem("other", 3)])
    assert questions(splits.train) == ["other"]
    assert splits.counts == {"contradiction": 2}


def test_golds_that_the_grader_calls_equal_do_not_contradict() -> None:
    # 3.33 and 3.333 are 0.003 apart, the tolerance is 0.01
    rows = [problem("q"), problem("Q")]
    golds = [Answer(kind="number", value=Fraction(text)) for text in ("3.33", "3.333")]
    rows = [
        Problem(id=row.id, question=row.question, answer=gold)
        for row, gold in zip(rows, golds, strict=True)
    ]
    assert split(rows).counts == {}


def test_one_stem_with_other_options_is_no_contradiction() -> None:
    gold = {letter: Answer(kind="choice", value=letter) for letter in "ab"}
    rows = [
        Problem(id="1", question="Which is true?", answer=gold["a"], choices=("1 > 0", "0 > 1")),
        Problem(id="2", question="Which is true?", answer=gold["b"], choices=("2 > 3", "3 > 2")),
    ]
    assert len(split(rows).train) == 2
    assert split([*rows, replace(rows[0], id="3", answer=gold["b"])]).counts == {"contradiction": 2}


def test_questions_with_text_golds_differ_by_case_and_punctuation() -> None:
    splits = split([problem("Reverse: Ab!", "!bA"), problem("Reverse: ab", "ba")])
    assert len(splits.train) == 2


def test_a_question_with_a_number_and_a_text_as_gold_is_one_question() -> None:
    found = split([problem("Is it?", 5), problem("Is it?", "unknown")])
    assert (found.train, found.counts) == ((), {"contradiction": 2})
    found = split([problem("Is 7 prime?", "yes")], test=[problem("Is  7 prime?", 1)])
    assert (found.train, found.counts) == ((), {"leak": 1})


def test_dev_and_test_questions_leave_train_and_test_questions_leave_dev() -> None:
    splits = split(
        [problem("One?"), problem("two"), problem("three"), problem("four")],
        dev=[problem("TWO"), problem("four.")],
        test=[problem("one"), problem("Four!")],
    )
    assert questions(splits.train) == ["three"]
    assert questions(splits.dev) == ["TWO"]
    assert questions(splits.test) == ["one", "Four!"]
    assert splits.counts == {"leak": 4}  # One, two, four of train; four of dev


def test_test_rows_are_never_dropped() -> None:
    splits = split([problem("x")], test=[problem("a", 1), problem("a", 1), problem("a", 2)])
    assert len(splits.test) == 3


def many(count: int) -> list[Problem]:
    return [problem(f"question {n}", n, id=f"p{n}") for n in range(count)]


def test_the_drawn_dev_split_is_a_function_of_the_seed() -> None:
    first, again, other = (split(many(50), dev_size=10, seed=seed) for seed in (1, 1, 2))
    assert questions(first.dev) == questions(again.dev) != questions(other.dev)
    assert len(first.dev) == 10 and len(first.train) == 40
    assert first.counts == {}
    assert sorted(questions(first.dev) + questions(first.train)) == sorted(questions(many(50)))


def test_the_drawn_dev_split_depends_on_neither_row_order_nor_rationales() -> None:
    rows = many(50)
    shuffled = [problem(p.question, 0, rationale=None, id=p.id) for p in reversed(rows)]
    assert set(questions(split(rows, dev_size=10).dev)) == set(
        questions(split(shuffled, dev_size=10).dev)
    )


def test_near_copies_of_a_drawn_dev_question_leave_train() -> None:
    rows = [problem(f"{word} question {n}", n) for n in range(20) for word in ("the", "The")]
    splits = split(rows, dev_size=5)
    assert len(splits.dev) == 5 and len(splits.train) == 30
    assert splits.counts == {"leak": 5}


def test_by_default_dev_is_a_tenth_and_at_most_500() -> None:
    assert len(split(many(200), dev_size=None).dev) == 20
    assert len(split(many(5100), dev_size=None).dev) == 500
    assert len(split(many(3), dev_size=None).dev) == 1


def test_a_dev_size_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(
        DataError,
        match=r"dev_size 3: only 3 training questions left \(dropped: nothing\); expected a small",
    ):
        split(many(3), dev_size=3)


def test_ids_become_unique_and_test_keeps_its_own() -> None:
    splits = split(
        [problem("a", id="1"), problem("b", id="1"), problem("c", id="1-2")],
        test=[problem("d", id="1"), problem("e", id="2")],
    )
    assert [p.id for p in splits.test] == ["1", "2"]
    assert [p.id for p in splits.train] == ["1-3", "1-4", "1-2"]


def test_untrainable_problems_leave_train_and_lose_their_rationale_in_dev() -> None:
    splits = Splits(
        train=(problem("a"), problem("b", rationale="bad")),
        dev=(problem("c", rationale="bad"),),
        test=(),
    )
    cleaned = drop_untrainable(splits, "bad", lambda p: p.rationale == "bad")
    assert questions(cleaned.train) == ["a"]
    assert [p.rationale for p in cleaned.dev] == [None]
    assert cleaned.counts == {"bad": 1}
    again = drop_untrainable(cleaned, "bad", lambda p: p.question == "a")
    assert again.counts == {"bad": 2}
