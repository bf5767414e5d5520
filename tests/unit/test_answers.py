"""The reader of answers and its verdicts. Numbers E… refer to the parity checks in
docs/deviations.md."""

from __future__ import annotations

import time
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from reftune.grading.golds import read_gold
from reftune.grading.markers import answer_text
from reftune.grading.numbers import Number, num_decimals, numbers_equal
from reftune.grading.options import read_choice
from reftune.grading.paper_rules import grade_completion_paper, grade_value_paper
from reftune.grading.sentences import parse_number
from reftune.grading.verdicts import MAX_VALUE_CHARS, grade_answer, grade_completion, grade_value
from reftune.types import Answer, Graded, Problem, Verdict, spell

UNHURRIED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TRIGGER = "\nTherefore, the answer is: "


def number(value: str, **fields: Any) -> Problem:
    return Problem(
        id="p", question="q", answer=Answer(kind="number", value=Fraction(value)), **fields
    )


def choice(letter: str, *choices: str) -> Problem:
    return Problem(
        id="p", question="q", answer=Answer(kind="choice", value=letter), choices=choices
    )


def words(text: str, **fields: Any) -> Problem:
    return Problem(id="p", question="q", answer=Answer(kind="text", value=text), **fields)


def outcome(graded: Graded) -> tuple[Verdict, str | None]:
    return graded.verdict, graded.value


# --- numbers --------------------------------------------------------------------------------------


def read_number(text: str) -> Fraction | None:
    number = parse_number(text)
    return None if number is None else number.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", "18"),
        ("−5", "-5"),
        ("-$1,234.50 in total", "-1234.5"),
        ("3 1/2", "7/2"),
        ("\\frac{1}{2}", "1/2"),
        ("½", "1/2"),
        ("1.5 × 10^3", "1500"),
        ("2.5 million", "2500000"),
        ("3 + 4 = 7", "7"),
        ("**18** apples", "18"),
        ("<203>.", "203"),
        ("rs . 500", "500"),
        ("297 cm 2", "297"),
        ("18, because 2 + 2 = 4", "18"),
        ("18 is it\n19", "18"),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, value: str) -> None:
    assert read_number(text) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nan",
        "inf",
        "five",
        "3 + 4",
        "2π",
        "5x",
        "> 5",
        "5 or 6",
        "5 to 6",
        "5, 6",
        "5 feet 6 inches",
        "3 : 4",
        "1/0",
        "0x10",
    ],
)
def test_text_that_is_not_one_number_is_none(text: str) -> None:
    assert read_number(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "5 (x + 1)",
        "5(x^2+1)",
        "5[x+1]",
        "5/(a+1)",
        "5 + C",
        "5 - sin(x)",
        "5 sin(x)",
        r"5 \cos 2x",
        "5cos x",
        "5 exp(2)",
        "5 tan (x)",
        "5e^2",
        "5e^{x}",
        "5! + 3",
    ],
)
def test_an_expression_that_begins_with_a_number_is_not_this_number(text: str) -> None:
    assert read_number(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "5, and 6",
        "5; and 6",
        "5 (and 6)",
        "5 apples, and 6 oranges.",
        "5 apples (and 6 oranges)",
        "5 if even, 6 if odd",
        "5 if n is even, and 6 if n is odd",
        "5 when x>0, else 6",
        "5 unless n = 2, then 6",
    ],
)
def test_several_numbers_are_not_the_first_or_last_of_them(text: str) -> None:
    assert read_number(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "5, and that is the answer",
        "5, and the other gets the rest",
        "5 (and not 6)",
        "5 if we round",
        "5, if we round 4.8",
        "5 when n = 3, since 3 + 2 = 5",
        "5 unless stated otherwise",
        "5 for each of the 3 boys",
        "5 for a coat, for a total of 20",
        "x = 5, and that is the answer",
        "5!",
        "5!! That is it.",
        "5 (x-axis units)",
        "5 (a + b = 5)",
        "5 (m/s)",
        "5 (m^2)",
        "5 exp points",
        "5 tan shoes",
        "5 + tax",
        "5% of the 60 pupils",
        "5% of 80.",
        "5 when you add 1, 2, and 2.",
        "5 if the sides are 3, 4, and 5.",
        "5 in all; 2 in each bag",
        "5 for all; 4 for each child",
        "5 for each child, for the 4 children.",
        "5 - i.e. 3 + 2",
        "5 sin contar a Tom",
        "5, and 5.",
        "Area = 5, where l = 4, and w = 1.",
        "The answer is P = 5 for l = 4, and w = 1.",
    ],
)
def test_words_after_a_number_do_not_hide_it(text: str) -> None:
    assert read_number(text) == 5


def test_a_spaced_dash_after_an_equals_sign_is_a_minus_sign() -> None:
    assert read_number("x = – 5") == -5
    assert read_number("x = 3 - 8 = – 5.") == -5
    assert read_number("– 5") == 5  # "the answer is – 5"


@pytest.mark.parametrize("word", ["dozen", "doz", "gross", "score"])
def test_a_number_of_groups_is_right_or_no_answer(word: str) -> None:
    # the question may ask how many dozens, or how many eggs
    assert grade_answer(f"12 {word}", number("12")).verdict is Verdict.CORRECT
    assert grade_answer(f"12 {word}", number("144")).verdict is Verdict.NO_ANSWER
    assert read_gold(f"12 {word}").kind == "text"


def test_a_percentage_keeps_its_sign() -> None:
    fifty = parse_number("50 percent")
    assert fifty is not None
    assert (fifty.value, fifty.percent, str(fifty)) == (50, True, "50%")


def test_a_percentage_is_right_for_the_number_and_for_its_hundredth() -> None:
    assert grade_answer("50%", number("50")).verdict is Verdict.CORRECT
    assert grade_answer("50%", number("0.5")).verdict is Verdict.CORRECT
    assert grade_answer("50", number("0.5")).verdict is Verdict.WRONG


def test_a_number_past_the_digit_limit_is_none_and_one_at_it_is_read() -> None:
    assert read_number("9" * 1000) == 10**1000 - 1
    assert read_number("9" * 1001) is None
    assert read_number("1e400") == 10**400
    assert read_number("1e401") is None


def test_a_number_cut_by_the_segment_limit_is_not_read() -> None:
    # 1,999 brackets leave room for one digit of 12
    assert read_number("(" * 1999 + "12") is None
    assert read_number("(" * 1990 + "12") == 12


@pytest.mark.parametrize(
    ("predicted", "gold", "equal"),
    [
        ("3.00", "3", True),
        ("3.01", "3", False),  # whole: exactly
        ("1000000006", "1000000007", False),
        ("3.14159", "3.14", True),  # .00159 < 10^-2, and 1% of 3.14
        ("3.15", "3.14", False),  # .01 is not below 10^-2
        ("8.93", "8.9333333333", True),
        ("9", "8.9333333333", False),
        ("0.17", "0.165", False),  # .005 > 1% of .165
        ("0.00202", "0.002", True),  # .00002 = 1% of .002
        ("0.002021", "0.002", False),
        ("0", "0.002", False),
        ("1.602e-19", "1.6e-19", True),  # 2e-22 < 10^-20
        ("1.7e-19", "1.6e-19", False),
        ("-3e-10", "3e-10", False),
        ("0.000000001", "0", False),  # no absolute floor
        ("0.333", "1/3", True),  # a fraction has three decimals here
        ("0.335", "1/3", False),  # .0017 > 10^-3
        ("332/1000", "1/3", False),  # two fractions: exactly
        ("0.8333333333333333", "0.8333333333333334", True),  # prints of floats
        ("2.9999999999999996", "3", True),
    ],
)
def test_numbers_are_equal_as_written(predicted: str, gold: str, equal: bool) -> None:
    first, second = parse_number(predicted), parse_number(gold)
    assert first is not None and second is not None
    assert numbers_equal(first, second) is equal
    minus = [replace(number, value=-number.value) for number in (first, second)]
    assert numbers_equal(*minus) is equal


@pytest.mark.parametrize(
    ("predicted", "gold", "equal"),
    [
        ("25%", "25", True),
        ("2500%", "25", False),
        ("25%", "0.25", True),
        ("0.25%", "0.25", True),  # as written
        ("150%", "1.5", True),
        ("100%", "1", True),
        ("-2500%", "-25", False),
        ("25", "25%", True),
        ("0.25", "25%", True),
        ("1/4", "25%", True),
        ("0.2501", "25%", False),  # a whole gold
        ("2500", "25%", False),
        ("0.25%", "25%", False),
        ("1/3", "33.33%", True),
    ],
)
def test_a_percent_sign_on_one_side_only(predicted: str, gold: str, equal: bool) -> None:
    problem = Problem(id="p", question="q", answer=read_gold(gold))
    assert (grade_answer(predicted, problem).verdict is Verdict.CORRECT) is equal


@UNHURRIED
@given(st.fractions())
def test_equal_numbers_are_spelled_alike_and_read_back(value: Fraction) -> None:
    assert read_number(spell(value)) == value


def test_spelling_survives_numbers_beyond_floats() -> None:
    assert spell(Fraction(10**400 + 1, 3)).endswith("/3")
    assert spell(Fraction(1, 10**400)).startswith("1/1000")


SPELLINGS = {
    "thousands commas": lambda text: text,
    "thin spaces": lambda text: text.replace(",", "\u2009"),
    "apostrophes": lambda text: text.replace(",", "'"),
    "LaTeX commas": lambda text: text.replace(",", "{,}"),
    "LaTeX thin spaces": lambda text: text.replace(",", "\\,"),
    "full width": lambda text: text.translate(
        str.maketrans("0123456789.,", "０１２３４５６７８９．，")
    ),
    "Arabic": lambda text: text.translate(str.maketrans("0123456789.,", "٠١٢٣٤٥٦٧٨٩٫٬")),
    "Devanagari": lambda text: text.translate(str.maketrans("0123456789", "०१२३४५६७८९")),
    "a formula": lambda text: f"${text}$",
    "bold": lambda text: f"**{text}**",
    "a currency": lambda text: f"€ {text}",
    "a unit": lambda text: f"{text} apples",
    "a sentence": lambda text: f"she has {text} apples",
    "zero-width spaces": lambda text: f"\u200b{text}\u200b",
    "a condition": lambda text: f"{text} when n = 3",
    "a dash": lambda text: f"— {text}",
    "twice": lambda text: f"{text} or {text}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@UNHURRIED
@given(number=st.integers(0, 10**9), decimals=st.integers(0, 4))
def test_every_spelling_of_a_number_is_that_number(
    spelling: str, number: int, decimals: int
) -> None:
    value = Fraction(number, 10**decimals)
    written = parse_number(SPELLINGS[spelling](f"{float(value):,.{decimals}f}"))
    assert written is not None and written.value == value


@pytest.mark.parametrize(
    "frame",
    ["{} or {}", "{} and {}", "{} apples and {} pears", "{}, {}", "{} to {}", "({}, {})", "{}; {}",
     "{} remainder {}", "x = {} or x = {}", "{} or maybe {}", "{}..{}", "{} in {}", "{} : {}"],
)  # fmt: skip
@UNHURRIED
@given(first=st.integers(2, 99), second=st.integers(2, 99))
def test_two_different_numbers_are_no_answer(frame: str, first: int, second: int) -> None:
    text = frame.format(first, first + second)
    assert parse_number(text) is None, text


@UNHURRIED
@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6), st.booleans())
def test_equality_does_not_depend_on_the_sign(
    first: Fraction, second: Fraction, near: bool
) -> None:
    second = first + second / 10**6 if near else second
    numbers = [Number(value, num_decimals(value)) for value in (first, second)]
    opposite = [replace(number, value=-number.value) for number in numbers]
    assert numbers_equal(*numbers) is numbers_equal(*opposite)


# --- markers --------------------------------------------------------------------------------------


def test_the_answer_follows_the_last_marker_in_any_case() -> None:
    assert answer_text("The answer is 5. #### 6") == " 6"
    assert answer_text("#### 6 THE ANSWER IS 5") == " 5"
    assert answer_text("The answer is \\boxed{ {7} }") == " {7} "


def test_without_a_marker_a_bare_number_earns_nothing() -> None:
    graded = grade_completion("42", number("42"))
    assert outcome(graded) == (Verdict.NO_ANSWER, None)
    assert "no marker" in graded.reason


def test_a_box_that_is_never_closed_holds_no_answer() -> None:
    assert answer_text("The answer is 7 \\boxed{7") is None
    assert answer_text("\\boxed{" + "{" * 20_000 + "}" * 20_000) is None


def test_a_percent_sign_behind_a_box_belongs_to_it() -> None:
    assert grade_completion("\\boxed{50}\\%", number("0.5")).verdict is Verdict.CORRECT


# --- choices and texts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "C",
        "(c)",
        "c )",
        "C.",
        "option C",
        "C) 30",
        "30",
        "$30",
        "**C**",
        "the answer is c",
        "C because",
    ],
)
def test_a_choice_is_its_letter_or_its_value(text: str) -> None:
    assert read_choice(text, ("10", "20", "30")) == "c"


@pytest.mark.parametrize("text", ["d", "Z", "35", "", "A or B", "a, b", "c/d", "a dog", "c = 7"])
def test_a_choice_outside_the_options_or_two_of_them_is_none(text: str) -> None:
    assert read_choice(text, ("10", "20", "30")) is None


def test_a_value_must_equal_exactly_one_option() -> None:
    assert read_choice("13", ("13", "12", "13")) is None
    assert read_choice("12", ("13", "12", "13")) == "b"
    assert read_choice("data inadequate", ("38", "Data  inadequate.", "30")) == "b"


def test_without_options_any_letter_is_a_choice() -> None:
    assert read_choice("(k)", ()) == "k"


def test_digits_apart_are_not_digits_together() -> None:
    assert read_choice("3 1/2", ("31/2", "3 1/2")) == "b"
    assert read_choice("31/2", ("31/2", "3 1/2")) == "a"
    assert read_choice("1000 kg", ("1 00 kg", "1 000 kg")) == "b"


def test_texts_are_compared_without_case_space_and_closing_punctuation() -> None:
    assert (
        grade_completion("The answer is New  york.", words("New York")).verdict is Verdict.CORRECT
    )
    assert outcome(grade_completion("The answer is Boston", words("New York"))) == (
        Verdict.WRONG,
        "Boston",
    )


def test_a_task_with_a_scorer_is_graded_by_it() -> None:
    problem = words(
        "3 1 2", scorer=lambda text: 1.0 if sorted(text.split()) == ["1", "2", "3"] else 0.5
    )
    assert grade_completion("The answer is 2 3 1.", problem).verdict is Verdict.CORRECT
    assert grade_completion("The answer is 2 3", problem).verdict is Verdict.WRONG
    assert grade_completion("The answer is ", problem).verdict is Verdict.NO_ANSWER


def test_a_scorer_sees_numbers_in_canonical_spelling() -> None:
    for problem in (number("18", scorer=is_18), words("18", scorer=is_18)):
        assert outcome(grade_completion("The answer is **$18.00**.", problem)) == (
            Verdict.CORRECT,
            "18",
        )


def is_18(text: str) -> float:
    assert "*" not in text, "a scorer may fail on some spellings of an answer"
    return float(text == "18")


def test_a_scorer_that_fails_gives_an_error_with_its_reason() -> None:
    graded = grade_completion("The answer is x", number("18", scorer=lambda text: float(text)))
    assert graded.verdict is Verdict.ERROR
    assert "ValueError" in graded.reason


def test_long_values_that_begin_alike_stay_apart() -> None:
    first = grade_answer("a" * 500, words("b"))
    second = grade_answer("a" * 500 + "b", words("b"))
    assert first.value is not None
    assert len(first.value) <= MAX_VALUE_CHARS
    assert first.value != second.value


# --- values of programs ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [18, 18.0, "18", "$18.00", Decimal("18.0"), 17.999999999999996])
def test_a_programs_value_is_read_like_a_text(value: object) -> None:
    assert grade_value(value, number("18")).verdict is Verdict.CORRECT


@pytest.mark.parametrize(
    "value", [None, True, [18], (18,), {18}, {"a": 18}, float("nan"), float("inf"), b"18", 18j, ""]
)
def test_values_that_a_program_may_not_return_are_no_answer(value: object) -> None:
    assert outcome(grade_value(value, number("18"))) == (Verdict.NO_ANSWER, None)


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        ("1E+28", "10000000000000000000000000000"),
        ("-3E+30", "-3000000000000000000000000000000"),
        ("1E+400", f"1{'0' * 400}"),
        ("12345678901234567890123456789012.5", "12345678901200000000000000000000"),
    ],
)
def test_a_large_decimal_is_read_like_a_text(value: str, gold: str) -> None:
    assert grade_value(Decimal(value), number(gold)).verdict is Verdict.CORRECT
    assert grade_value(Decimal(value), number("18")).verdict is Verdict.WRONG


def test_a_signaling_nan_is_no_answer_even_in_a_list() -> None:
    for value in (Decimal("sNaN"), Decimal("-sNaN7"), [1, Decimal("sNaN")]):
        for problem in (number("18"), words("Paris")):
            assert outcome(grade_value(value, problem)) == (Verdict.NO_ANSWER, None)
            assert grade_value_paper(value, problem).verdict is not Verdict.CORRECT


def test_a_truth_value_is_an_answer_only_if_the_gold_answer_is_one() -> None:
    for gold in ("True", "yes"):
        assert grade_value(gold, words(gold)).verdict is Verdict.CORRECT
        assert grade_value(True, words(gold)).verdict is Verdict.CORRECT
        assert grade_value(False, words(gold)).verdict is Verdict.WRONG
    assert grade_value(True, words("Paris")).verdict is Verdict.NO_ANSWER
    pattern = replace(words("yes"), answer=Answer(kind="regex", value="yes"))
    assert grade_value(True, pattern).verdict is Verdict.CORRECT


def test_an_integer_too_long_to_print_is_no_answer() -> None:
    assert outcome(grade_value(10**5000, number("18"))) == (Verdict.NO_ANSWER, None)


# --- the paper's rules ----------------------------------------------------------------------------


def test_e2_paper_reads_the_text_after_the_trigger() -> None:
    assert grade_completion_paper(f"so{TRIGGER}3.0", number("3")).verdict is Verdict.CORRECT
    assert outcome(grade_completion_paper(f"so{TRIGGER}3.0", number("4"))) == (Verdict.WRONG, "3.0")
    assert grade_completion_paper("so 3", number("3")).verdict is Verdict.NO_ANSWER


@pytest.mark.parametrize("text", ["1,000", "$5", "5%", "5 apples", "1/2", ""])
def test_e3_paper_cannot_read_ordinary_spellings(text: str) -> None:
    assert outcome(grade_completion_paper(f"so{TRIGGER}{text}", number("5"))) == (
        Verdict.NO_ANSWER,
        None,
    )


@pytest.mark.parametrize(
    ("text", "value"), [("5.", "5.0"), ("1e3", "1000.0"), ("1_000", "1000.0"), ("-7 ", "-7.0")]
)
def test_e3_paper_reads_what_float_reads(text: str, value: str) -> None:
    assert outcome(grade_completion_paper(f"so{TRIGGER}{text}", number(value))) == (
        Verdict.CORRECT,
        value,
    )


def test_e3_paper_takes_nan_for_a_wrong_answer() -> None:
    assert outcome(grade_completion_paper(f"so{TRIGGER}nan", number("5"))) == (Verdict.WRONG, "nan")


def test_e4_paper_takes_the_last_answer_line_and_only_lines() -> None:
    assert outcome(grade_completion_paper(f"a{TRIGGER}5\nb{TRIGGER}6", number("6"))) == (
        Verdict.CORRECT,
        "6.0",
    )
    assert (
        grade_completion_paper("Therefore, the answer is: 5", number("5")).verdict
        is Verdict.NO_ANSWER
    )
    assert outcome(grade_completion_paper("42", number("42"))) == (Verdict.CORRECT, "42.0")


def test_e4_paper_starts_again_at_a_second_prompt_header() -> None:
    repeated = f"a{TRIGGER}5\nAnswer reasoning:\nb{TRIGGER}6"
    assert outcome(grade_completion_paper(repeated, number("6"))) == (Verdict.CORRECT, "6.0")
    assert outcome(grade_completion_paper("a\nAnswer reasoning:\n7", number("7"))) == (
        Verdict.CORRECT,
        "7.0",
    )


@pytest.mark.parametrize(
    ("predicted", "gold", "right"),
    [
        (18.009, "18", True),
        (5.01, "5", True),
        (18.01, "18", False),  # 18.01 - 18 is .010000000000001563 in floats
        (100.01, "100", False),
        (0.01, "0", True),
        (0, "0.002", True),
        (1e9 + 0.02, "1e9", False),
    ],
)
def test_e5_paper_tolerance_is_absolute_in_floats(predicted: float, gold: str, right: bool) -> None:
    assert (grade_value_paper(predicted, number(gold)).verdict is Verdict.CORRECT) is right


@pytest.mark.parametrize(
    ("text", "verdict"), [("C", Verdict.CORRECT), ('"c"', Verdict.CORRECT), ("c )", Verdict.WRONG)]
)
def test_e6_paper_compares_choices_as_strings(text: str, verdict: Verdict) -> None:
    assert grade_completion_paper(f"so{TRIGGER}{text}", choice("c")).verdict is verdict


def test_e6_paper_takes_any_text_for_a_choice() -> None:
    assert outcome(grade_completion_paper("I do not know", choice("c"))) == (
        Verdict.WRONG,
        "i do not know",
    )


def test_e7_paper_takes_what_float_takes_from_a_program() -> None:
    assert outcome(grade_value_paper(True, number("1"))) == (Verdict.CORRECT, "1.0")
    assert outcome(grade_value_paper("7", number("7"))) == (Verdict.CORRECT, "7.0")
    assert outcome(grade_value_paper(float("nan"), number("7"))) == (Verdict.WRONG, "nan")
    for value in ([1], (3,), None, 10**400):
        assert outcome(grade_value_paper(value, number("1"))) == (Verdict.NO_ANSWER, None)


# --- any text -------------------------------------------------------------------------------------


PROBLEMS = [number("18"), number("0.5"), choice("c", "10", "20", "30"), choice("b"), words("Paris")]
SNIPPETS = st.sampled_from(
    (
        "the answer is |answer:|#### |\\boxed{|}|\\frac{1}{2}|18|1,000| or | = |$|%|e9|**|<|>|\n|3"
        " 1/2|-|(c)|½|٣|\ud800|\x00| million| x 10^|/|π|\\|1e999999999|9999999999|(|,|;"
    ).split("|")
)


@UNHURRIED
@given(
    st.lists(st.one_of(SNIPPETS, st.text(st.characters(), max_size=8)), max_size=12).map("".join)
)
@example("The answer is " + "9" * 5000)
@example("The answer is 1/" + "0" * 900)
@example("\\boxed{\\frac{" + "9" * 200 + "}{" + "9" * 200 + "}}")
def test_any_text_gets_a_verdict_with_a_reason_on_one_line(text: str) -> None:
    for problem in PROBLEMS:
        for grade in (
            grade_completion,
            grade_answer,
            grade_value,
            grade_completion_paper,
            grade_value_paper,
        ):
            graded = grade(text, problem)
            assert isinstance(graded.verdict, Verdict)
            assert graded.reason.isprintable()
            graded.reason.encode()
            assert graded.value is None or len(graded.value.encode()) <= 4 * MAX_VALUE_CHARS


@UNHURRIED
@given(st.fractions(), st.fractions(max_denominator=1000))
@example(Fraction(2251799813685249, 4), Fraction(2251799813685249, 4))  # 562949953421312.25
@example(Fraction(2251799813685247, 2), Fraction(2251799813685249, 2))
def test_no_wrong_number_is_called_correct(written: Fraction, gold: Fraction) -> None:
    graded = grade_completion(f"The answer is {spell(written)}", number(str(gold)))
    right, gap = graded.verdict is Verdict.CORRECT, abs(written - gold)
    assert right or gap > 0
    if right and gap > abs(gold) / 10**11:  # more than the noise of a printed float
        assert gold.denominator > 1
        assert gap < Fraction(1, 100) and gap <= abs(gold) / 100


@pytest.mark.parametrize(
    "piece",
    [
        "9",
        "1,",
        "(",
        "the ",
        "answer ",
        "#",
        "\\boxed{",
        "\\frac{1}{",
        " ",
        "=",
        "<a",
        "\ud800",
        "½",
        "1/",
        "*",
        "or 5 ",
        "x = 3 or ",
        "<think>",
        "<answer>",
        "\\boxed 7 ",
        "π",
        "•",
        "$",
        "1'",
        "²",
        "3\u0305",
    ],
)
def test_a_very_long_text_is_graded_quickly(piece: str) -> None:
    text = piece * (300_000 // len(piece))
    started = time.perf_counter()
    for problem in (PROBLEMS[0], PROBLEMS[2]):
        grade_completion("The answer is " + text, problem)
        grade_completion_paper(text, problem)
        grade_completion(text + "#### 18", problem)
    assert time.perf_counter() - started < 10  # 0.2 s on a free core


def test_intervals_headings_and_bold_text_without_end_are_read_at_once() -> None:
    started = time.perf_counter()
    problem = words("x^2")
    expression = replace(problem, answer=Answer(kind="latex", value="x^2"))
    grade_completion("Answer\n" + " " * 100_000 + "x" * 61, problem)
    grade_completion("The answer is x" + "** " * 30_000 + "a", expression)
    assert parse_number("[0, " + "\\sqrt{2}, " * 10_000) is None
    assert time.perf_counter() - started < 1
