"""The user's own data: columns, kinds of answers, several rationales, bad rows."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from reftune.datasets import Splits
from reftune.datasets.jsonl import Jsonl
from reftune.errors import DataError
from reftune.grading.formats.nl import Nl
from reftune.types import Answer

SUM = {"question": "2 + 3?", "answer": 5, "rationale": "2 + 3 = 5"}
CHOICE = {"question": "Which is even?", "choices": ["one", "two", "three"], "answer": "B"}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(tmp_path: Path, *rows: dict[str, Any], **keys: Any) -> Splits:
    source = write(tmp_path / "data.jsonl", *rows)
    return Jsonl.model_validate({"kind": "jsonl", "train": source, "dev_size": 0, **keys}).load(
        seed=0
    )


def test_plain_rows_need_no_settings(tmp_path: Path) -> None:
    (problem,) = load(tmp_path, SUM).train
    assert (problem.id, problem.question, problem.rationale) == ("data-1", "2 + 3?", "2 + 3 = 5")
    assert problem.answer == Answer(kind="number", value=Fraction(5))


def test_a_named_column_that_only_test_lacks_is_refused(tmp_path: Path) -> None:
    train = {"question": "Which is even?", "options": ["one", "two"], "answer": "B"}
    test = write(tmp_path / "test.jsonl", {"question": "Which?", "A": "1", "B": "2", "answer": "B"})
    with pytest.raises(DataError, match=r"test\.jsonl:1: no column 'options'"):
        load(tmp_path, train, test=test, columns={"choices": "options"})
    test = write(
        tmp_path / "test.jsonl", {"question": "Which?", "options": ["1", "2"], "answer": "B"}
    )
    columns = {"choices": "options", "rationale": "why", "id": "name"}
    train |= {"why": "because", "name": "a"}
    (problem,) = load(tmp_path, train, test=test, columns=columns).test
    assert problem.answer == Answer(kind="choice", value="b")


def test_a_question_s_further_columns_may_be_absent_from_test(tmp_path: Path) -> None:
    train = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
    test = write(tmp_path / "test.jsonl", {"instruction": "What is 4 + 5?", "output": "9"})
    (problem,) = load(
        tmp_path, train, test=test, columns={"question": ["instruction", "input"]}
    ).test
    assert problem.question == "What is 4 + 5?"


def test_a_column_that_few_rows_have_is_recognised(tmp_path: Path) -> None:
    # more rows than are examined for their values come before the row with an input
    plain = [{"instruction": f"{n} + 1?", "output": str(n + 1)} for n in range(30)]
    problems = load(tmp_path, *plain, {"instruction": "Add.", "input": "2, 3", "output": "5"}).train
    assert [problem.question for problem in problems[-2:]] == ["29 + 1?", "Add.\n2, 3"]


def test_a_column_that_only_late_rows_have_is_recognised(tmp_path: Path) -> None:
    plain = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(30)]
    late = {"question": "Which?", "answer": "B", "rationale": "Two.", "choices": ["1", "2"]}
    assert load(tmp_path, *plain, {**late, "answer": "3", "choices": None}).train[-1].rationale
    problem = load(tmp_path, *plain, late).train[-1]
    assert (problem.choices, problem.answer.value) == (("1", "2"), "b")


GSM8K = {"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}
ALPACA = {"instruction": "Add.", "input": "1, 1", "output": "2"}
WORKED = {"question": "1 + 1?", "answer": "2", "rationale": "Two."}


@pytest.mark.parametrize(
    ("row", "late"), [(GSM8K, "explanation"), (ALPACA, "prompt"), (WORKED, "Rationale")]
)
def test_a_late_column_takes_the_place_of_no_other(
    tmp_path: Path, row: dict[str, Any], late: str
) -> None:
    (expected,) = load(tmp_path, row, dev_size=0).train
    first = load(tmp_path, *[row] * 30, {**row, late: None}, dev_size=0).train[0]
    assert (first.question, first.rationale) == (expected.question, expected.rationale)


def chat(system: str | None, user: str, gold: Any) -> dict[str, Any]:
    systems = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*systems, {"role": "user", "content": user}], "answer": gold}


def test_a_question_about_another_system_message_is_another_question(tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", chat("Ann is 3.", "How old?", 3))
    rows = [chat("Ben is 4.", "How old?", 4), chat("Cat is 5.", "How old?", 5)]
    splits = load(tmp_path, *rows, chat("Ann is  3", "how old?", 3), test=test)
    assert [problem.question for problem in splits.train] == [
        "Ben is 4.\n\nHow old?",
        "Cat is 5.\n\nHow old?",
    ]
    assert splits.counts == {"leak": 1}
    prompt = Nl(kind="nl", style="chat").prompt(splits.train[0])
    assert [turn.content for turn in prompt.turns] == ["Ben is 4.", "How old?"]


@pytest.mark.parametrize("systems", [("Think.", "Think."), ("Be brief.", "Be kind.")])
@pytest.mark.parametrize("golds", [(2, 2), (0.33, 0.3333), ("Two", "two")])
def test_instructions_in_system_messages_do_not_hide_a_leak(
    tmp_path: Path, systems: tuple[str, str], golds: tuple[Any, Any]
) -> None:
    test = write(tmp_path / "test.jsonl", chat(None, "1 + 1?", golds[0]))
    rows = [chat(systems[0], "1 + 1?", golds[1]), chat(systems[1], "1 + 2?", golds[1])]
    splits = load(tmp_path, *rows, test=test)
    assert [problem.question for problem in splits.train] == ["1 + 2?"]
    assert splits.counts == {"leak": 1}


def test_contexts_are_told_from_instructions_by_answers_that_differ(tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", chat("It rains.", "Is it wet?", 1))
    rows = [chat("The sun shines.", "Is it wet?", 0), chat("It pours.", "Is it wet?", 1)]
    splits = load(tmp_path, *rows, test=test)
    assert [problem.question.partition("\n")[0] for problem in splits.train] == [
        "The sun shines.",
        "It pours.",
    ]
    assert splits.counts == {}


def test_columns_may_have_other_names_and_the_rest_is_kept(tmp_path: Path) -> None:
    row = {"prompt": "q", "gold": "1,234", "why": "so", "key": 17, "level": 3, "tags": ["a"]}
    columns = {"question": "prompt", "answer": "gold", "rationale": "why", "id": "key"}
    (problem,) = load(tmp_path, row, columns=columns).train
    assert (problem.id, problem.question, problem.rationale) == ("17", "q", "so")
    assert problem.answer.value == 1234
    assert problem.columns == row


def test_rationales_and_ids_may_be_missing(tmp_path: Path) -> None:
    (problem,) = load(tmp_path, {"question": "q", "answer": 5}).train
    assert problem.rationale is None


@pytest.mark.parametrize("blank", ["", "  \n", float("nan")])
def test_a_blank_rationale_is_a_missing_one(tmp_path: Path, blank: object) -> None:
    # json.dumps writes what pandas shows for a missing text as NaN
    splits = load(tmp_path, {**SUM, "rationale": blank}, {**SUM, "question": "3 + 2?"})
    assert [problem.rationale for problem in splits.train] == [None, "2 + 3 = 5"]


def test_a_question_may_have_several_rationales(tmp_path: Path) -> None:
    splits = load(tmp_path, SUM, {**SUM, "rationale": "count: 3, 4, 5"}, SUM)
    assert [problem.rationale for problem in splits.train] == ["2 + 3 = 5", "count: 3, 4, 5"]
    assert splits.counts == {"duplicate": 1}


def test_the_authors_format_is_recognised(tmp_path: Path) -> None:
    row = {"item_id": "svamp_1", "question": "q", "answer_cot": "so 208", "answer_value": "208.0"}
    test = write(
        tmp_path / "test.jsonl", {"item_id": "svamp_2", "question": "r", "answer_value": "1.0"}
    )
    splits = load(tmp_path, row, test=test)
    assert (splits.train[0].id, splits.train[0].rationale, splits.train[0].answer.value) == (
        "svamp_1",
        "so 208",
        208,
    )
    assert splits.test[0].id == "svamp_2"


@pytest.mark.parametrize("answer", ["B", "b", "(b)", "b.", "two", "Two!"])
def test_a_choice_is_a_letter_or_the_text_of_an_option(tmp_path: Path, answer: str) -> None:
    (problem,) = load(tmp_path, {**CHOICE, "answer": answer}).train
    assert problem.answer == Answer(kind="choice", value="b")
    assert problem.choices == ("one", "two", "three")


def test_options_in_csv_are_a_list_written_as_text(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('question,choices,answer\n"Which?","[""one"", ""two""]",a\n')
    (problem,) = Jsonl(kind="jsonl", train=str(path), dev_size=0).load(seed=0).train
    assert problem.choices == ("one", "two")


def test_numeric_options_are_matched_by_their_text(tmp_path: Path) -> None:
    (problem,) = load(tmp_path, {**CHOICE, "choices": [28, 30], "answer": 30}).train
    assert problem.answer.value == "b"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {**CHOICE, "answer": 1},
            r"answer is 1; expected a letter from a to c or the text of one option",
        ),
        ({**CHOICE, "answer": "d"}, r"answer is 'd'; expected a letter from a to c"),
        (
            {**CHOICE, "choices": ["one", "one"], "answer": "one"},
            r"answer is 'one'; expected a letter from a to b",
        ),
        (
            {**CHOICE, "choices": ["one"]},
            r"choices is \['one'\]; expected a list of 2 to 26 option texts",
        ),
        ({**CHOICE, "choices": "one or two"}, r"choices is 'one or two'; expected a list"),
    ],
)
def test_choices_that_do_not_fit_are_refused_with_their_line(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=r"data.jsonl:1: " + message):
        load(tmp_path, row)


def test_answers_that_are_no_numbers_are_texts(tmp_path: Path) -> None:
    (problem,) = load(tmp_path, {"question": "Capital of France?", "answer": "Paris"}).train
    assert problem.answer == Answer(kind="text", value="Paris")


def test_text_can_be_asked_for(tmp_path: Path) -> None:
    assert (
        load(tmp_path, {"question": "q", "answer": "007"}, answer_kind="text").train[0].answer.value
        == "007"
    )


def test_golds_with_decimal_commas_are_numbers_if_the_recipe_says_so(tmp_path: Path) -> None:
    rows = [{"question": str(i), "answer": gold} for i, gold in enumerate(["3,5", "1.250,75"])]
    values = [problem.answer.value for problem in load(tmp_path, *rows, decimal=",").train]
    assert values == [Fraction("3.5"), Fraction("1250.75")]
    assert [problem.answer.kind for problem in load(tmp_path, *rows).train] == ["text", "text"]


def test_every_row_has_a_kind_of_its_own(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "5"}, {"question": "r", "answer": "Paris"}]
    answers = [problem.answer for problem in load(tmp_path, *rows, CHOICE).train]
    assert answers == [
        Answer(kind="number", value=Fraction(5)),
        Answer(kind="text", value="Paris"),
        Answer(kind="choice", value="b"),
    ]
    with pytest.raises(
        DataError, match=r"data.jsonl:2: answer is 'Paris'; expected a number, with at most"
    ):
        load(tmp_path, *rows, answer_kind="number")


def test_a_type_change_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"data.jsonl:2: answer is '6', text; expected a number, as in the earlier rows",
    ):
        load(tmp_path, SUM, {"question": "r", "answer": "6", "rationale": "so"})


@pytest.mark.parametrize("answer", [None, "", True, float("nan")])
def test_a_missing_gold_is_refused_with_its_line(tmp_path: Path, answer: object) -> None:
    with pytest.raises(DataError, match=r"data.jsonl:1: answer is .*; expected a number"):
        load(tmp_path, {**SUM, "answer": answer}, answer_kind="number")


def test_a_mapped_column_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"data.jsonl:1: no column 'why'; expected one of question, answer, rationale",
    ):
        load(tmp_path, SUM, columns={"rationale": "why"})


def test_a_run_s_own_recipe_names_only_the_columns_that_the_user_named(tmp_path: Path) -> None:
    # the data have no column `id`, so a recipe that named it could not be used again
    source = write(tmp_path / "data.jsonl", {"q": "2 + 3?", "a": "x", "answer": 5})
    given = {"kind": "jsonl", "train": source, "columns": {"question": "q", "choices": None}}
    dumped = Jsonl.model_validate({**given, "dev_size": 0}).model_dump(mode="json")
    assert dumped["columns"] == given["columns"]
    (problem,) = Jsonl.model_validate(dumped).load(seed=0).train
    assert (problem.question, problem.choices) == ("2 + 3?", ())


def test_an_unknown_key_of_columns_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValidationError, match=r"qestion: unknown key; did you mean question\?"):
        Jsonl.model_validate({"kind": "jsonl", "train": "x.jsonl", "columns": {"qestion": "q"}})
