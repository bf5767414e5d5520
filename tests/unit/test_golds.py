"""Gold answers as spelled in data, with a person's reading of them. To add one, add a line to
gold_table.jsonl."""

from __future__ import annotations

import json
import os
from collections import Counter
from fractions import Fraction
from math import inf
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reftune.errors import DataError
from reftune.grading.decimals import with_points
from reftune.grading.golds import literal, number_in_gold, read_gold
from reftune.grading.markers import Reading
from reftune.grading.numbers import Number
from reftune.grading.sentences import parse_number
from reftune.types import Answer

TABLE = Path(__file__).with_name("gold_table.jsonl")
ROWS = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]
CASES = Path(os.environ.get("REFTUNE_CASES", ""), "golds.jsonl")
"""Gold answers of public datasets, in the folder that REFTUNE_CASES names."""


def expected(row: dict[str, str]) -> Answer:
    if row["kind"] != "number":
        return Answer(kind="text", value=row["value"])
    value = row["value"].removesuffix("%")
    return Answer(kind="number", value=Fraction(value), percent=row["value"].endswith("%"))


def agrees(read: Answer, row: dict[str, str]) -> bool:
    """Whether a reading agrees with a row. A non-number may be an expression or a list
    (test_answer_kinds.py)."""
    if row["kind"] == "number":
        return read == expected(row)
    value = row["value"].strip("[]") if read.kind == "list" else row["value"]
    return read.kind != "number" and str(read) == value


def test_every_gold_is_read_as_a_person_reads_it() -> None:
    disagreements = [
        f"line {number}: {row['gold']!r}: expected {expected(row)!s}, got {read!r}"
        for number, row in enumerate(ROWS, 1)
        if not agrees(read := read_gold(row["gold"]), row)
    ]
    assert not disagreements, "\n".join(disagreements)


def test_a_gold_that_is_no_number_is_rejected_if_a_number_is_asked_for() -> None:
    for row in ROWS:
        if row["kind"] == "text":
            with pytest.raises(DataError, match="expected a number, with at most"):
                read_gold(row["gold"], "number")


def test_the_table_is_large_varied_and_without_repetitions() -> None:
    assert len(ROWS) >= 200
    assert all(count >= 3 for count in Counter(row["group"] for row in ROWS).values())
    assert max(Counter(row["gold"] for row in ROWS).values()) == 1


@pytest.mark.skipif(
    not CASES.exists(), reason="REFTUNE_CASES does not name a folder with golds.jsonl"
)
def test_no_public_gold_is_read_as_another_number() -> None:
    rows = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    read = [number_in_gold(row["gold"]) for row in rows]
    for row, number in zip(rows, read, strict=True):
        if row["right"] == "not this number":
            assert number is None or number.value != Fraction(row["read_today"]), row["gold"]
        else:
            assert number is None or number.value == Fraction(row["right"]), row["gold"]
    # "$-9.8 t$" and 1/35 times a matrix are labelled -9.8 and 1/35, which are other answers
    readable = [row["right"] != "not this number" for row in rows]
    unread = [number is None for number, right in zip(read, readable, strict=True) if right]
    assert sum(unread) == 2


@pytest.mark.parametrize(
    ("raw", "value", "decimals"),
    [(5, "5", 0), (5.5, "11/2", 1), (0.1, "1/10", 1), (1e-7, "1/10000000", 7), ("0.50", "1/2", 2),
     ("1/4", "1/4", inf), ("1.6e-3", "1.6e-3", 4), ("2.5 million", "2500000", 0)],
)  # fmt: skip
def test_a_gold_number_keeps_its_decimals(raw: object, value: str, decimals: float) -> None:
    answer = read_gold(raw)
    assert (answer.value, answer.decimals) == (Fraction(value), decimals)


def test_a_gold_fraction_beyond_floats_is_shown_as_a_fraction() -> None:
    assert str(read_gold(f"{10**400}/3")) == f"{10**400}/3"


@pytest.mark.parametrize("raw", [None, float("nan"), float("inf"), [], [1], {"a": 1}, "", "  "])
def test_a_gold_that_is_no_answer_is_rejected(raw: object) -> None:
    with pytest.raises(DataError, match="expected a number, text or a letter"):
        read_gold(raw)


def test_a_truth_value_is_a_text_and_no_number() -> None:
    assert read_gold(True) == Answer(kind="text", value="True")
    with pytest.raises(DataError):
        read_gold(True, "number")


OPTIONS = ("10", "20 dollars", "Paris", "none of these")


@pytest.mark.parametrize(
    ("gold", "letter"),
    [("b", "b"), ("B", "b"), ("(c)", "c"), ("C.", "c"), ("b )", "b"), ("c) Paris", "c"),
     ("paris", "c"), ("20", "b"), ("$20.00", "b"), ("None of these.", "d"),
     ("The answer is C", "c"), ("\\boxed{A}", "a"), ("option B", "b"), ("Choice (b): 20", "b"),
     ("B - $20", "b"), ("C – Paris", "c"), ("B (20)", "b"), ('"D"', "d"), ("B,", "b")],
)  # fmt: skip
def test_a_choice_is_its_letter_or_its_option(gold: str, letter: str) -> None:
    assert read_gold(gold, choices=OPTIONS) == Answer(kind="choice", value=letter)


@pytest.mark.parametrize("gold", ["B) {}", "(B) {}", "B. {}", "b : {}", "B - {}", "B {}", "{}"])
@pytest.mark.parametrize("option", ["Rome (Italy)", "(2, 3)", "(0.1)^30", "f(x)", "[1, 2)"])
def test_a_gold_may_be_the_letter_and_text_of_an_option_with_brackets(gold: str, option: str):
    choices = ("2", option, "Italy", "x")
    assert read_gold(gold.format(option), choices=choices) == Answer(kind="choice", value="b")


@pytest.mark.parametrize(
    "gold", ["e", "b) Paris", "London", "30", "a or b", "10 or 20", "a dog", "b (10)", "B - -20"]
)
def test_a_choice_that_is_no_option_is_refused(gold: str) -> None:
    with pytest.raises(DataError, match="expected a letter from a to d"):
        read_gold(gold, choices=OPTIONS)


def test_an_option_with_the_same_text_comes_before_options_with_the_same_number() -> None:
    assert read_gold("5 minutes", choices=("5 hours", "5 minutes")).value == "b"
    assert read_gold("10% loss", choices=("10% profit", "10% loss")).value == "b"
    with pytest.raises(DataError, match="expected a letter from a to b"):
        read_gold("10% loss", choices=("10% profit", "20% loss"))


def test_decimal_commas_are_read_if_the_data_have_them() -> None:
    german = Reading(decimal=",", markers=("Die Antwort ist",))
    golds = ["3,5", "1.250,75", "1.250", "0.125", "Die Antwort ist 12,5.", "1 000,5", "12 345 678"]
    values = [read_gold(gold, reading=german).value for gold in golds]
    right = ("3.5", "1250.75", "1250", "0.125", "12.5", "1000.5", "12345678")
    assert values == [Fraction(n) for n in right]
    assert parse_number(with_points("1 000,5 km", ",")) == Number(Fraction("1000.5"), 1)


@pytest.mark.parametrize(
    "gold", ["1,125; 2,5", ["1,125", "2,5"], [1.125, 2.5], "[1,125; 2,5]", "[1.125, 2.5]"]
)
def test_parts_with_decimal_commas_are_converted_once(gold: object) -> None:
    for kind in ("list", "set"):
        answer = read_gold(gold, kind, reading=Reading(decimal=","))
        assert [Fraction(item) for item in answer.items] == [Fraction("1.125"), Fraction("2.5")]


@pytest.mark.parametrize("gold", ["1 000", "1 000,5", "1,23,456", "36,36,108"])
def test_groups_that_may_be_a_list_are_refused_if_a_number_is_asked_for(gold: str) -> None:
    assert read_gold(gold).kind == "text"
    with pytest.raises(DataError, match="expected a number, with at most"):
        read_gold(gold, "number")


SEVERAL = [
    (r"\boxed{3} or \boxed{4}", ("3", "4")),
    (r"$x = \boxed{3}$, $y = \boxed{4}$", ("3", "4")),
    (r"So \boxed{3} \text{ and } \boxed{4}.", ("3", "4")),
    ("2 + 1 = 3\n#### 3\n#### 4", ("3", "4")),
    ("#### \\boxed{3}\n#### \\boxed{4}", ("3", "4")),
    ("The answer is 3. The answer is 4.", ("3", "4")),
    ("So \\boxed{7}. The answer is 8.", ("7", "8")),
    ("<answer>3</answer><answer>4</answer>", ("3", "4")),
    ("Answer: Paris\nAnswer: London", ("Paris", "London")),
    ("#### 3 or #### 4", ("3", "4")),
    ("#### 3 OR #### 4", ("3", "4")),
    ("#### 3, and\n#### 4", ("3", "4")),
    ("#### 3; #### 4", ("3", "4")),
    ("The answer is Paris or the answer is London", ("Paris", "London")),
]


@pytest.mark.parametrize(("gold", "parts"), SEVERAL)
def test_two_answers_side_by_side_are_refused_unless_a_kind_takes_both(
    gold: str, parts: tuple[str, ...]
) -> None:
    for kind in ("auto", "number", "text"):
        with pytest.raises(DataError, match=rf"marks {parts[0]} and {parts[1]}; expected one"):
            read_gold(gold, kind)  # type: ignore[arg-type]
    for kind in ("any_of", "list", "set"):
        assert read_gold(gold, kind).items == parts  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gold", "value"),
    [
        (r"First we get \boxed{3}. Doubled, that is \boxed{6}.", 6),
        ("So the answer is 3 + 4 = 7.\n#### 7", 7),
        ("#### Step 1: the cost\n3 * 4 = 12\n#### 12", 12),
        ("#### Solution\n#### 12", 12),
        (r"\boxed{0.5} or \boxed{1/2}", Fraction(1, 2)),
        (r"The answer is \boxed{7}. #### 7", 7),
        ("The answer is 72.\n\nI hope it is correct.", 72),
    ],
)
def test_of_an_intermediate_and_a_final_result_the_last_counts(gold: str, value: int) -> None:
    assert read_gold(gold).value == value


@pytest.mark.parametrize("gold", ["The answer is 6 apples\n2 pears", "#### 6 apples\n2 pears"])
def test_an_answer_of_two_lines_is_not_its_first(gold: str) -> None:
    assert read_gold(gold) == Answer(kind="text", value="6 apples\n2 pears")


@pytest.mark.parametrize(
    "gold", ["5 + 5 = 10\n####", r"\boxed{}", r"\boxed{7", "The answer is", "<think>7</think>"]
)
def test_a_marker_without_an_answer_is_refused(gold: str) -> None:
    with pytest.raises(DataError, match="has no answer after its marker"):
        read_gold(gold)


@given(st.text(max_size=60))
def test_any_text_is_a_gold_or_refused(text: str) -> None:
    try:
        answer = read_gold(text)
    except DataError:
        return
    assert answer.kind in ("number", "text", "latex", "list")


@given(st.from_regex(r"-?[0-9]{1,9}(\.[0-9]{1,6})?( ?(%|apples|km/h|€))?", fullmatch=True))
def test_a_gold_number_is_also_a_completions(text: str) -> None:
    gold, completion = number_in_gold(text), parse_number(text)
    assert gold is not None and gold == completion


@given(st.from_regex(r"[-+$(]?[0-9]{1,4}[ ,.;:/x^_a-zA-Z0-9)%-]{0,12}", fullmatch=True))
def test_a_gold_is_never_another_number_than_a_completion(text: str) -> None:
    gold, completion = number_in_gold(text), parse_number(text)
    assert gold is None or completion is None or gold == completion


@pytest.mark.parametrize(
    "text", ["{[1]: 2}", "[{{}: 1}]", "{{1}, 2}", "[1, ", "a + b", "1e999 + j"]
)
def test_text_that_is_no_literal_has_no_value(text: str):
    assert literal(text) is None


@given(st.text(alphabet="[]{}(),:'1a ", max_size=12))
def test_no_text_makes_a_literal_fail(text: str):
    literal(text)
