"""Rows as other tools write them are recognised, read, and rejected if they state no answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
from openpyxl import Workbook
from pyarrow import parquet

from reftune.datasets.jsonl import Jsonl
from reftune.errors import DataError
from reftune.recipe import parse_recipe
from reftune.runs.run import open_run
from reftune.stages.stage import Progress
from reftune.types import Answer, Message, Problem

Rows = Sequence[dict[str, Any]]
SYSTEM = {"role": "system", "content": "Think."}
USER = {"role": "user", "content": "3 + 10?"}
REPLY = {"role": "assistant", "content": "3 + 10 = 13. The answer is 13."}
TURNS = (Message(role="system", content="Think."), Message(role="user", content="3 + 10?"))
HUMAN, GPT = {"from": "human", "value": "3 + 10?"}, {"from": "gpt", "value": REPLY["content"]}
OPTIONS = ["12", "13", "14"]
LABELLED = {"text": OPTIONS, "label": ["A", "B", "C"]}

SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name → a row, and the values read from it
    "Alpaca rows": (
        {"instruction": "Add.", "input": "3 + 10", "output": "So 13. The answer is 13."},
        {"question": "Add.\n3 + 10", "rationale": "So 13. The answer is 13."},
    ),
    "GSM8K rows with annotations": (
        {"question": "3 + 10?", "answer": "It is <<3+10=13>>13.\n#### 13"},
        {"rationale": "It is <<3+10=13>>13."},
    ),
    "GSM8K rows without annotations": (
        {"question": "3 + 10?", "answer": "It is 13.\n#### 13"},
        {"rationale": "It is 13."},
    ),
    "MATH rows": (
        {"problem": "3 + 10?", "level": "Level 1", "solution": "So $\\boxed{13}$."},
        {"rationale": "So $\\boxed{13}$."},
    ),
    "chat messages": (
        {"messages": [SYSTEM, USER, REPLY]},
        {"rationale": REPLY["content"], "messages": TURNS},
    ),
    "chat messages with a gold column": (
        {"messages": [SYSTEM, USER], "answer": 13},
        {"messages": TURNS},
    ),
    "ShareGPT conversations": (
        {"conversations": [HUMAN, GPT]},
        {"rationale": REPLY["content"], "messages": TURNS[1:]},
    ),
    "TRL rows": ({"prompt": [SYSTEM, USER], "solution": "13"}, {"messages": TURNS}),
    "verl rows": (
        {
            "data_source": "mine",
            "prompt": [SYSTEM, USER],
            "reward_model": {"style": "rule", "ground_truth": "13"},
        },
        {"messages": TURNS},
    ),
    "ARC rows": (
        {"id": "x", "question": "3 + 10?", "choices": LABELLED, "answerKey": "B"},
        {"answer": Answer(kind="choice", value="b"), "choices": tuple(OPTIONS)},
    ),
    "rows with one column per option": (
        {"question": "3 + 10?", "A": "12", "B": "13", "C": "14", "answer": "B"},
        {"answer": Answer(kind="choice", value="b"), "choices": tuple(OPTIONS)},
    ),
    "rows of ReFT's authors": (
        {"item_id": "x", "question": "3 + 10?", "answer_cot": "so 13", "answer_value": "13.0"},
        {"rationale": "so 13"},
    ),
    "plain rows": ({"Problem": "3 + 10?", "Label": "13", "CoT": "count"}, {"rationale": "count"}),
}
MORE = [
    {"prompt": [USER], "completion": [REPLY]},  # TRL's prompt and completion
    {"context_messages": [USER], "label": "13"},  # OpenRLHF
    {"input": "3 + 10?", "label": 13},  # OpenRLHF
    {"instruction": "3 + 10?", "output": "#### 13"},  # Alpaca without inputs
    {"problem": "3 + 10?", "solution": "So $\\boxed{13}$.", "answer": "13"},  # MATH-500
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "3 + 10?"}]}, REPLY]},
]


def load(tmp_path: Path, *rows: dict[str, Any], **keys: Any) -> tuple[Problem, ...]:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = Jsonl.model_validate({"kind": "jsonl", "train": str(path), "dev_size": 0, **keys})
    return dataset.load(seed=0).train


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_recognised_and_read(tmp_path: Path, name: str) -> None:
    row, expected = SHAPES[name]
    (problem,) = load(tmp_path, row)
    assert problem.question == expected.get("question", "3 + 10?")
    assert problem.answer == expected.get("answer", Answer(kind="number", value=Fraction(13)))
    assert problem.rationale == expected.get("rationale")
    assert problem.messages == expected.get("messages", ())
    assert problem.choices == expected.get("choices", ())


@pytest.mark.parametrize("row", MORE, ids=str)
def test_other_spellings_of_the_shapes(tmp_path: Path, row: dict[str, Any]) -> None:
    (problem,) = load(tmp_path, row)
    assert (problem.question, problem.answer.value) == ("3 + 10?", 13)


def test_a_longer_conversation_is_asked_as_a_whole(tmp_path: Path) -> None:
    turns = [USER, {"role": "assistant", "content": "13"}, {"role": "user", "content": "And 1?"}]
    (problem,) = load(tmp_path, {"messages": [*turns, {"role": "assistant", "content": "#### 14"}]})
    assert problem.question == "3 + 10?\n\n13\n\nAnd 1?"
    assert [turn.role for turn in problem.messages] == ["user", "assistant", "user"]
    assert problem.answer.value == 14


@pytest.mark.parametrize("write", [json.dumps, str], ids=["JSON", "Python"])
@pytest.mark.parametrize("turns", [[SYSTEM, USER, REPLY], [HUMAN, GPT], [SYSTEM, USER]])
def test_a_conversation_written_as_text_is_read_as_one(
    tmp_path: Path, write: Callable[[object], str], turns: Rows
) -> None:
    gold = {"answer": "13"} if turns[-1] == USER else {}
    (problem,) = load(tmp_path, {"messages": write(turns), **gold})
    assert (problem.question, problem.answer.value) == ("3 + 10?", 13)
    assert problem.messages == (TURNS if SYSTEM in turns else TURNS[1:])


@pytest.mark.parametrize(
    "text",
    ['[{"from": "A", "to": "B"}]', "[{role: what?", "[1, 2]", f"{json.dumps([USER])} How long?"],
)
def test_other_text_in_brackets_is_no_conversation(tmp_path: Path, text: str) -> None:
    (problem,) = load(tmp_path, {"question": text, "answer": 13})
    assert (problem.question, problem.messages) == (text, ())


@pytest.mark.parametrize("empty", [None, [], "", "[]"], ids=str)
def test_empty_lists_of_tools_are_ignored(tmp_path: Path, empty: object) -> None:
    reply = {**REPLY, "tool_calls": empty, "function_call": {"name": None, "arguments": None}}
    (problem,) = load(tmp_path, {"messages": [USER, reply], "tools": empty})
    assert problem.answer.value == 13


@pytest.mark.parametrize(
    ("choices", "gold"),
    [
        (LABELLED, "B"),
        ({"text": OPTIONS, "label": ["1", "2", "3"]}, "2"),
        ([{"label": "A", "text": "12"}, {"label": "B", "text": "13"}], "B"),
        ({"A": "12", "B": "13", "C": "14"}, "(b)"),
        (OPTIONS, "b"),
        (OPTIONS, 13),
        (str(OPTIONS), "13"),
    ],
)
def test_options_however_they_are_laid_out(tmp_path: Path, choices: object, gold: object) -> None:
    (problem,) = load(tmp_path, {"question": "q", "choices": choices, "answer": gold})
    assert problem.choices[:2] == ("12", "13")
    assert problem.answer == Answer(kind="choice", value="b")


@pytest.mark.parametrize(("first", "letter"), [(0, "b"), (1, "a")])
def test_a_position_counts_from_what_the_recipe_says(
    tmp_path: Path, first: int, letter: str
) -> None:
    row = {"question": "q", "choices": ["x", "y", "z"], "answer": 1}
    (problem,) = load(tmp_path, row, positions_from=first)
    assert problem.answer.value == letter
    with pytest.raises(DataError, match=r":1: answer is 1; .*dataset.positions_from"):
        load(tmp_path, row)
    # 9 is also a text, which must not hide that positions count from another number
    outside = {**row, "choices": ["x", "y", "9"], "answer": 9}
    known = f"{first}, {first + 1}, {first + 2}"
    with pytest.raises(
        DataError, match=rf":1: answer is 9; expected one of the positions {known}$"
    ):
        load(tmp_path, outside, positions_from=first)


@pytest.mark.parametrize(
    ("row", "golds", "letters"),
    [
        ({"sol1": "x", "sol2": "y"}, [0, 1], "ab"),  # 1 is also the label of sol1
        ({"choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}}, [0, 1, 2], "abc"),
        ({"a": "", "b": "x", "c": "y"}, [1, 2], "ab"),  # blank options have positions too
        ({"a": "x", "b": "y", "c": ""}, [0, 1], "ab"),
        ({"choices": {"A": None, "1": "x", "2": "y"}}, [0, 1], "ab"),  # null: no such label
        ({"choices": {"A": "x", "B": "y"}}, ["A", "(B)"], "ab"),
    ],
)
def test_a_whole_number_is_a_position_if_the_recipe_says_so(
    tmp_path: Path, row: dict[str, Any], golds: list[object], letters: str
) -> None:
    names = {} if "choices" in row else {"columns": {"choices": list(row)}}
    rows = ({"question": f"{gold}?", **row, "answer": gold} for gold in golds)
    found = load(tmp_path, *rows, positions_from=0, **names)
    assert "".join(str(problem.answer.value) for problem in found) == letters


@pytest.mark.parametrize(
    ("choices", "gold"),
    [
        ({"text": ["x", "y"], "label": ["(1)", "(2)"]}, "(2)"),
        ({"text": ["x", "y"], "label": ["1.", "2."]}, 2),
        ({"(B)": "x", "(A)": "y"}, "(A)"),
        ({"text": ["x", "y"], "label": 1}, "y"),
        ({"text": ["x", None, "y"], "label": ["A", "B", "C"]}, "C"),
    ],
)
def test_labels_however_they_are_written(tmp_path: Path, choices: object, gold: object) -> None:
    (problem,) = load(tmp_path, {"question": "q", "choices": choices, "answer": gold})
    assert (problem.choices, problem.answer.value) == (("x", "y"), "b")


@pytest.mark.parametrize(
    ("answer", "rationale"),
    [
        ("#### Step 1\n6 by 7.\n\n#### Step 2\n6*7 is 42.\n\nThe answer is \\boxed{42}.", None),
        ("###### Step\n6*7=42. The answer is 42", None),
        ("6*7=42\n#### 42", "6*7=42"),
        ("6*7=42\n#### 42\nThe answer is: 42", "6*7=42"),
        ("6*7=42\n#### 42\n<answer>42</answer>", "6*7=42"),
        ("#### Step 1\n6*7=42\n#### 42\n", "#### Step 1\n6*7=42"),
    ],
)
def test_a_heading_is_no_answer_and_stays_in_the_rationale(
    tmp_path: Path, answer: str, rationale: str | None
) -> None:
    (problem,) = load(tmp_path, {"question": "6 * 7?", "answer": answer})
    assert problem.answer == Answer(kind="number", value=Fraction(42))
    assert problem.rationale == (rationale or answer)


@pytest.mark.parametrize("kind", ["any_of", "list", "set"])
def test_the_solution_is_no_part_of_a_gold_answer_with_several_parts(
    tmp_path: Path, kind: str
) -> None:
    row = {"question": "q", "answer": "Factor it.\n#### 1, 2"}
    (problem,) = load(tmp_path, row, answer_kind=kind)
    assert problem.written_answer == "1, 2"
    (bare,) = load(tmp_path, {"question": "q", "answer": ["1", "2"]}, answer_kind=kind)
    assert bare.answer.items == ("1", "2")


def test_a_question_of_no_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1 item"):
        load(tmp_path, {"question": "q", "answer": 1}, columns={"question": []})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER]}, "messages ends before the assistant's turn"),
        (
            {"messages": [{"role": "tool", "content": "5"}, REPLY]},
            "a turn has the role 'tool'; expected one of system",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, REPLY]},
            "a turn with role user has no text",
        ),
        ({"messages": [SYSTEM, REPLY]}, "messages has no question"),
        (
            {"messages": [USER, {**REPLY, "tool_calls": [{"id": "1"}]}]},
            r"a turn with role assistant has tool_calls: .*; expected text only \(tools are",
        ),
        (
            {
                "messages": [
                    {"from": "human", "value": "q"},
                    {**GPT, "function_call": {"name": "f"}},
                ]
            },
            "a turn with role gpt has function_call: .*; expected text only",
        ),
        (
            {"messages": [USER, REPLY], "tools": [{"type": "function"}]},
            r"tools is \[.*; expected none \(tools are not supported; leave out",
        ),
        (
            {"messages": "[{'role': 'user', 'content': 'q'}\n {'role': 'assistant'}]", "answer": 1},
            "messages is .*; expected a list of turns, written as JSON",
        ),
        (
            {"question": "q", "answer": ["13"]},
            r"answer is \['13'\], a list; expected .* answer_kind: any_of",
        ),
        ({"question": "q", "answer": {"value": 13}}, "answer is {'value': 13}; expected a number"),
        (
            {"instruction": "q", "output": "We think about it for long. " * 9},
            "output is .*; expected an answer, or a solution that marks it",
        ),
        ({"question": "q", "answer": "  "}, "answer is ''; expected a number"),
    ],
)
def test_rows_without_an_answer_are_rejected_with_their_line(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=rf"data.jsonl:1: {message}"):
        load(tmp_path, row)


def test_columns_that_are_named_come_before_recognised_ones(tmp_path: Path) -> None:
    row = {"instruction": "q", "input": "", "output": "positive", "score": 7}
    (problem,) = load(tmp_path, row, columns={"answer": "score", "rationale": None})
    assert (problem.answer.value, problem.rationale) == (7, None)
    assert problem.columns == row, "for a reward function"


STATED = ["3 + 10 = 13. The answer is 13.", "3 + 10 = 13.", "3 + 10 = 13. The answer is 20."]
PROGRAMS = [f"def solution():\n    return {value}" for value in ("13", "nothing_known", "20")]


@pytest.mark.parametrize(
    ("rationales", "reason"), [(STATED, "rationale_disagrees"), (PROGRAMS, "program_disagrees")]
)
def test_a_rationale_that_contradicts_its_gold_is_dropped_and_counted(
    tmp_path: Path, rationales: Sequence[str], reason: str
) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"question": f"q{i}", "answer": 13, "rationale": r} for i, r in enumerate(rationales)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = Jsonl(kind="jsonl", train=str(path), dev_size=0).load(seed=0)
    assert [problem.rationale for problem in splits.train] == rationales[:2]
    assert splits.counts == {reason: 1}


def test_rationales_that_contradict_are_dropped_from_mixed_files_too(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    mixed = [*STATED, *PROGRAMS]
    rows = [{"question": f"q{i}", "answer": 13, "rationale": r} for i, r in enumerate(mixed)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = Jsonl(kind="jsonl", train=str(path), dev_size=0).load(seed=0)
    assert [problem.rationale for problem in splits.train] == [*STATED[:2], *PROGRAMS[:2]]
    assert splits.counts == {"program_disagrees": 1, "rationale_disagrees": 1}


def test_options_may_have_ten_columns(tmp_path: Path) -> None:
    row = {"question": "q", **{letter: str(n) for n, letter in enumerate("ABCDEFGHIJ")}}
    (problem,) = load(tmp_path, {**row, "answer": "J"})
    assert (len(problem.choices), problem.answer.value) == (10, "j")


def test_options_in_numbered_columns_are_no_numbers(tmp_path: Path) -> None:
    row = {"question": "q", "option1": "w", "option2": "x", "option3": "y"}
    (problem,) = load(tmp_path, {**row, "answer": "2"})
    assert (problem.choices, problem.answer) == (("w", "x", "y"), Answer(kind="choice", value="b"))


@pytest.mark.parametrize(
    "names",
    [
        ("first", "second", "third"),  # two names end in the same letter
        ("distractor1", "distractor2", "correct_answer"),
        ("A", "C", "B"),
    ],
)
def test_every_named_column_of_options_is_one_option(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    row = {"question": "q", **dict(zip(names, OPTIONS, strict=True)), "gold": "14"}
    (problem,) = load(tmp_path, row, columns={"choices": list(names), "answer": "gold"})
    assert problem.choices == tuple(OPTIONS)
    assert problem.answer == Answer(kind="choice", value="c")


@pytest.mark.parametrize(
    "options",
    [
        {"A": "x", "B": "", "C": "y"},
        {"A": "x", "B": " ", "C": "y"},
        {"choices": {"A": "x", "B": None, "C": "y"}},
    ],
)
def test_an_empty_option_is_no_option(tmp_path: Path, options: dict[str, object]) -> None:
    (problem,) = load(tmp_path, {"question": "q", **options, "answer": "C"})
    assert (problem.choices, problem.answer.value) == (("x", "y"), "b")


def test_a_gold_that_is_a_label_and_a_text_is_read_as_the_other_golds_are(tmp_path: Path) -> None:
    # 4 is the text of the second option and the label of the fourth
    options = {"option1": "3", "option2": "4", "option3": "5", "option4": "6"}
    first = {"question": "2 + 2?", **options, "answer": "4"}
    five = {"question": "2 + 3?", **options, "answer": "5"}
    texts = load(tmp_path, first, five)
    assert [problem.answer.value for problem in texts] == ["b", "c"], "5 is not a label"
    labels = load(tmp_path, first, {"question": "1 + 3?", **options, "answer": "2"})
    assert [problem.answer.value for problem in labels] == ["d", "b"], "both are labels"
    worked = [{**row, "answer": f"We count. #### {row['answer']}"} for row in (first, five)]
    assert [problem.answer.value for problem in load(tmp_path, *worked)] == ["b", "c"]
    decimals = {name: float(text) for name, text in options.items()}
    numbers = load(tmp_path, {**first, **decimals, "answer": 4}, {**five, **decimals, "answer": 5})
    assert [problem.answer.value for problem in numbers] == ["b", "c"], "5 equals the text 5.0"


def test_all_splits_read_a_gold_that_is_a_label_and_a_text_alike(tmp_path: Path) -> None:
    # 4 is the text of the second option and the label of the fourth; only train has golds that
    # are texts but not labels
    options = {"option1": "3", "option2": "4", "option3": "5", "option4": "6"}
    train = [{"question": f"2 + {n}?", **options, "answer": str(2 + n)} for n in (3, 4)]
    test = {"question": "2 + 2?", **options, "answer": "4"}
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, train)))
    (tmp_path / "test.jsonl").write_text(json.dumps(test))
    recipe = {"kind": "jsonl", "train": str(tmp_path), "dev_size": 0}
    splits = Jsonl.model_validate(recipe).load(seed=0)
    assert [problem.answer.value for problem in splits.train] == ["c", "d"]
    assert [problem.answer.value for problem in splits.test] == ["b"]


def test_a_gold_that_is_a_letter_and_a_text_is_read_as_the_other_golds_are(tmp_path: Path) -> None:
    options = {"option_a": "x", "option_b": "a", "option_c": "b"}
    golds = load(tmp_path, *({"question": g, **options, "answer": g} for g in ("a", "x")))
    assert [problem.answer.value for problem in golds] == ["b", "a"]


def test_two_options_with_the_text_that_is_the_gold_are_refused(tmp_path: Path) -> None:
    options = {"option1": "3", "option2": "3.0", "option3": "7"}
    rows = [{"question": g, **options, "answer": g} for g in ("3", "7")]
    with pytest.raises(DataError, match="several options are '3'; expected one"):
        load(tmp_path, *rows)


def test_the_tenth_column_of_options_follows_the_ninth(tmp_path: Path) -> None:
    options = {f"option{n}": f"word{n}" for n in (1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)}
    golds = [{"question": str(n), **options, "answer": n} for n in (10, 2, 11)]
    found = load(tmp_path, *golds)
    assert [problem.answer.value for problem in found] == ["j", "b", "k"]
    assert found[0].choices == tuple(f"word{n}" for n in range(1, 12))


def test_options_without_labels_have_none(tmp_path: Path) -> None:
    options = [{"text": "x"}, {"text": "y"}, {"text": "None"}]
    (problem,) = load(tmp_path, {"question": "q", "choices": options, "answer": "None"})
    assert problem.answer == Answer(kind="choice", value="c")


def test_one_gold_that_is_a_text_does_not_outweigh_many_labels(tmp_path: Path) -> None:
    options = {"option1": "3", "option2": "4", "option3": "50", "option4": "60"}
    golds = ["4", "1", "2", "50"]  # a label and a text; labels only; a text only
    found = load(tmp_path, *({"question": g, **options, "answer": g} for g in golds))
    assert [problem.answer.value for problem in found] == ["d", "a", "b", "c"]


@pytest.mark.parametrize("answer", [1, 1.0, "1"])
def test_golds_that_are_positions_are_not_read_as_texts(tmp_path: Path, answer: object) -> None:
    # 1 is the first option's position, and the text of the second
    row = {"question": "q", "choices": ["2", "1", "3"], "answer": answer}
    (problem,) = load(tmp_path, row, positions_from=1)
    assert problem.answer.value == "a"


@pytest.mark.parametrize(
    ("row", "where"),
    [
        ({"a": 3, "b": 4, "c": 0}, "columns a to c"),
        ({"options": "puts and calls"}, "column options"),
    ],
)
def test_columns_that_are_no_options_are_named_with_the_remedy(
    tmp_path: Path, row: dict[str, object], where: str
) -> None:
    row = {"question": "What is 3 + 4?", **row, "answer": 7}
    remedy = f"{where}: read as options .*set dataset.columns.choices=null"
    with pytest.raises(DataError, match=remedy):
        load(tmp_path, row)
    (problem,) = load(tmp_path, row, columns={"choices": None})
    assert (problem.answer, problem.choices) == (Answer(kind="number", value=Fraction(7)), ())
    named = [name for name in row if name not in ("question", "answer")]
    with pytest.raises(DataError) as error:
        load(tmp_path, row, columns={"choices": named[0] if len(named) == 1 else named})
    assert "read as options" not in str(error.value)


@pytest.mark.parametrize("answer", [7, 4, "3 + 4 = 7\n#### 7"])
def test_two_columns_of_numbers_with_numbers_as_golds_are_operands(
    tmp_path: Path, answer: object
) -> None:
    (problem,) = load(tmp_path, {"question": "3 + 4?", "a": 3, "b": "4", "answer": answer})
    assert (problem.answer.kind, problem.choices) == ("number", ())
    assert {name: problem.columns[name] for name in "ab"} == {"a": 3, "b": "4"}


@pytest.mark.parametrize("row", [{"a": 3, "b": 4, "answer": "B"}, {"A": "x", "B": 4, "answer": 4}])
def test_other_two_columns_are_options(tmp_path: Path, row: dict[str, object]) -> None:
    (problem,) = load(tmp_path, {"question": "q", **row})
    assert problem.answer == Answer(kind="choice", value="b")


@pytest.mark.parametrize("keys", [{"positions_from": 1}, {"answer_kind": "choice"}], ids=str)
def test_two_columns_of_numbers_are_options_if_the_settings_say_so(
    tmp_path: Path, keys: dict[str, Any]
) -> None:
    (problem,) = load(tmp_path, {"question": "Which is odd?", "a": 1, "b": 4, "answer": 1}, **keys)
    assert (problem.choices, problem.answer.value) == (("1", "4"), "a")


@pytest.mark.parametrize(
    ("row", "keys"),
    [({}, {}), ({"choices": []}, {}), ({"a": 1, "b": 4}, {"answer_kind": "number"})],
    ids=str,
)
def test_positions_without_options_are_refused(
    tmp_path: Path, row: dict[str, Any], keys: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match=r":1: no options; positions_from expects a column of opt"):
        load(tmp_path, {"question": "q", **row, "answer": 1}, positions_from=0, **keys)


@pytest.mark.parametrize(
    "empty", ["", " ", "[]", [], {}, {"text": [], "label": []}, {"A": None, "B": None}], ids=str
)
def test_a_row_without_options_is_no_multiple_choice(tmp_path: Path, empty: object) -> None:
    (problem,) = load(tmp_path, {"question": "q", "choices": empty, "answer": "5"})
    assert (problem.choices, problem.answer.kind) == ((), "number")


def test_a_reply_is_the_rationale_if_the_gold_has_its_own_column(tmp_path: Path) -> None:
    (problem,) = load(tmp_path, {"messages": [USER, REPLY], "answer": 13})
    assert (problem.answer.value, problem.rationale) == (13, REPLY["content"])


@pytest.mark.parametrize("content", ["", " ", None])
def test_an_empty_system_message_is_left_out(tmp_path: Path, content: str | None) -> None:
    empty = {"role": "system", "content": content}
    (problem,) = load(tmp_path, {"messages": [empty, USER, REPLY]})
    assert [turn.role for turn in problem.messages] == ["user"]
    with pytest.raises(DataError, match="messages has no question"):
        load(tmp_path, {"messages": [empty], "answer": 1})


def test_a_question_that_holds_its_options_is_recognised(tmp_path: Path) -> None:
    options = [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]
    row = {"question": {"stem": "q", "choices": options}, "answerKey": "B"}
    (problem,) = load(tmp_path, row)
    assert (problem.question, problem.choices) == ("q", ("x", "y"))
    assert problem.answer == Answer(kind="choice", value="b")


def test_a_named_column_may_be_missing_from_some_rows(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [
        {"question": "1 + 1?", "answer": "2"},
        {"question": "q", "of": ["x", "y"], "answer": "B"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = Jsonl.model_validate(
        {"kind": "jsonl", "train": str(path), "dev_size": 0, "columns": {"choices": "of"}}
    )
    kinds = [problem.answer.kind for problem in dataset.load(seed=0).train]
    assert kinds == ["number", "choice"]


def test_an_id_may_be_a_float(tmp_path: Path) -> None:
    (problem,) = load(tmp_path, {"id": 7.0, "question": "q", "answer": 1})
    assert problem.id == "7.0"


def test_rationales_are_read_with_the_decimal_separator_of_the_golds(tmp_path: Path) -> None:
    # read as English, 1.250 is another number than the gold 1250
    row = {"question": "q", "answer": "1.250", "rationale": "So it is. The answer is 1.250."}
    (problem,) = load(tmp_path, row, decimal=",")
    assert problem.rationale == row["rationale"]


@pytest.mark.parametrize(
    ("written", "kind", "value"),
    [
        ('["3"]', "number", 3),
        ("['3']", "number", 3),
        ('[ "1,250" ]', "number", 1250),
        ('So it is.\n#### ["3"]', "number", 3),
        (r'["\\frac{1}{2}"]', "number", Fraction(1, 2)),
        (r'["\frac{1}{2}"]', "number", Fraction(1, 2)),
        (r'["\nu + \theta"]', "latex", r"\nu + \theta"),
        ('["(1, 2)"]', "latex", "(1, 2)"),
        ('["Paris"]', "text", "Paris"),
        (r'["caf\u00e9"]', "text", "café"),
        ('["red", "blue"]', "list", "red, blue"),
        ('["1", "2", "3"]', "list", "1, 2, 3"),
        ("[1, 2]", "latex", "[1, 2]"),
        ("[12]", "number", 12),
        ("[5'6\"]", "text", "[5'6\"]"),
        ("[red]", "text", "[red]"),
    ],
)
def test_a_written_list_of_one_quoted_item_is_that_item(
    tmp_path: Path, written: str, kind: str, value: object
) -> None:
    (problem,) = load(tmp_path, {"question": "q", "answer": written})
    assert (problem.answer.kind, problem.answer.value) == (kind, value)
    if kind not in ("list", "number"):
        assert problem.gold_text == value, "rewards and checks see the item, too"


@pytest.mark.parametrize("written", ['["3", "7"]', "['3', 7]", r'["\\sqrt{2}", "\\pi", "1"]'])
def test_a_written_list_of_several_items_is_refused_as_a_list_is(
    tmp_path: Path, written: str
) -> None:
    with pytest.raises(DataError, match=r":1: answer is \[.*\], a list; .* answer_kind: any_of"):
        load(tmp_path, {"question": "q", "answer": written})
    (problem,) = load(tmp_path, {"question": "q", "answer": written}, answer_kind="set")
    assert problem.answer.kind == "set"


def test_a_written_list_stays_as_it_is_if_options_or_the_answer_kind_say_so(tmp_path: Path) -> None:
    (option,) = load(tmp_path, {"question": "q", "choices": ['["3"]', "4"], "answer": '["3"]'})
    assert option.answer == Answer(kind="choice", value="a")
    (text,) = load(tmp_path, {"question": "q", "answer": '["3"]'}, answer_kind="text")
    assert text.answer == Answer(kind="text", value='["3"]')


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": "q", "completion": "So 13. The answer is 13.", "label": True}, 13),  # TRL's KTO
        ({"problem": "q", "response": "So $\\boxed{13}$.", "correct": True}, 13),
        ({"problem": "q", "output": "#### 13", "Correct": "true"}, 13),
        ({"question": "q", "answer": "13", "correct": False}, 13),
        ({"question": "Is 4 prime?", "label": False, "solution": "2 divides it."}, "False"),
        ({"question": "q", "correct": False, "target": "math"}, "False"),
        ({"question": "q", "label": True}, "True"),
        ({"question": "q", "answer": False, "solution": "It is odd."}, "False"),
        ({"messages": [USER], "label": True}, "True"),
        ({"question": "q", "label": True, "response": None}, "True"),
        ({"question": "q", "label": "13", "response": "It is 13."}, 13),
    ],
    ids=str,
)
def test_truth_values_that_may_judge_a_completion_come_after_other_answers(
    tmp_path: Path, row: dict[str, Any], answer: object
) -> None:
    (problem,) = load(tmp_path, row)
    assert problem.answer.value == answer


@pytest.mark.parametrize(
    ("name", "truths"), [("label", [True, False]), ("correct", ["True", "false"])]
)
def test_a_completion_that_is_judged_to_be_wrong_is_no_gold_answer(
    tmp_path: Path, name: str, truths: list[object]
) -> None:
    rows = [
        {"prompt": f"q{n}", "completion": f"#### {n}", name: truth}
        for n, truth in enumerate(truths)
    ]
    with pytest.raises(DataError, match=rf":2: {name} is .*, which may mean that completion is w"):
        load(tmp_path, *rows)
    named = load(tmp_path, *rows, columns={"answer": "completion"})
    assert [problem.answer.value for problem in named] == [0, 1]


@pytest.mark.parametrize(
    "empty", [{"cot": None}, {"explanation": ""}, {"reasoning": " ", "id": ""}, {"CoT": "nan"}]
)
def test_an_empty_column_does_not_hide_the_solutions_in_another(
    tmp_path: Path, empty: dict[str, object]
) -> None:
    row = {"question": "3 + 10?", "answer": "It is 13.\n#### 13", **empty}
    (problem,) = load(tmp_path, row)
    assert (problem.rationale, problem.id) == ("It is 13.", "data-1")


def test_solutions_may_begin_after_many_bare_answers(tmp_path: Path) -> None:
    bare = [{"question": f"q{n}", "answer": str(n)} for n in range(30)]
    worked = {"question": "q", "answer": "It is 13.\n#### 13"}
    assert [problem.rationale for problem in load(tmp_path, *bare, worked)[-2:]] == [
        None,
        "It is 13.",
    ]


@pytest.mark.parametrize("missing", ["nan", "NaN", "#N/A", " "])
def test_what_programs_write_for_a_missing_rationale_is_none(tmp_path: Path, missing: str) -> None:
    rows = [{"question": f"q{n}", "answer": n, "rationale": missing} for n in range(2)]
    worked = {"question": "q", "answer": 13, "rationale": "nan is no number."}
    rationales = [problem.rationale for problem in load(tmp_path, *rows, worked)]
    assert rationales == [None, None, "nan is no number."]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_outside_the_text_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match=rf"assistant has {key}: 'Hm.'; expected .* <think>…</th"):
        load(tmp_path, {"messages": [USER, {**REPLY, key: "Hm."}]})
    for empty in (None, "", " ", False):
        (problem,) = load(tmp_path, {"messages": [USER, {**REPLY, key: empty}]})
        assert problem.rationale == REPLY["content"]


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": [{"role": "user", "content": "q \ud83d"}], "answer": 1}, "prompt"),
        ({"messages": [USER, {"role": "assistant", "content": "\udc00 #### 13"}]}, "messages"),
        ({"question": "q", "answer": "cat \ud83d"}, "answer"),
        ({"question": "q", "options": ["cat \ud83d", "dog"], "answer": "A"}, "options"),
        (
            {
                "question": "q",
                "choices": {"text": ["\udfff", "d"], "label": ["A", "B"]},
                "answer": "A",
            },
            "choices",
        ),
        ({"question": "q", "a": "x", "b": "\ud83d", "answer": "A"}, "b"),
        (
            {"question": "q", "reward_model": {"ground_truth": "\ud83d"}},
            "reward_model.ground_truth",
        ),
    ],
    ids=ascii,
)
def test_half_a_surrogate_pair_is_refused_wherever_it_is(
    tmp_path: Path, row: dict[str, Any], column: str
) -> None:
    with pytest.raises(DataError, match=rf":1: {column} is .*half a surrogate pair; expected text"):
        load(tmp_path, row)


def test_whole_surrogate_pairs_and_halves_in_unused_columns_are_accepted(tmp_path: Path) -> None:
    rows = [{"question": "q 😀", "answer": 1, "note": "\ud83d"}]
    assert load(tmp_path, *rows)[0].question == "q 😀"


@pytest.mark.parametrize("prompt", ["prompt", "Prompt", "context_messages"])
def test_a_prompt_that_ends_with_a_prefill_is_refused(tmp_path: Path, prompt: str) -> None:
    row = {prompt: [USER, {"role": "assistant", "content": "Let me see."}], "answer": 13}
    with pytest.raises(
        DataError,
        match=rf":1: {prompt} ends with the assistant's turn 'Let me see.'; .*rationale={prompt}",
    ):
        load(tmp_path, row)
    with pytest.raises(DataError, match="ends with the assistant's turn"):
        load(tmp_path, {**row, "rationale": "So it is 13."})
    (problem,) = load(tmp_path, row, columns={"rationale": prompt})
    assert problem.rationale == "Let me see."
    (whole,) = load(tmp_path, {prompt: [USER, REPLY]})
    assert (whole.answer.value, whole.rationale) == (13, REPLY["content"])


def test_three_columns_of_numbers_are_options(tmp_path: Path) -> None:
    row = {"question": "3 · 3? (A) 1 (B) 9 (C) 40", "A": 1, "B": 9, "C": 40, "answer": 9}
    assert load(tmp_path, row)[0].answer == Answer(kind="choice", value="b")


def test_columns_of_numbers_are_options_if_a_gold_is_a_letter(tmp_path: Path) -> None:
    row = {"question": "Which of 1, 9, 40 is even?", "a": 1, "b": 9, "c": 40, "answer": "C"}
    assert load(tmp_path, row)[0].answer == Answer(kind="choice", value="c")


@pytest.mark.parametrize("key", ["", " ", {"$oid": "5"}, [1], None], ids=str)
def test_ids_that_nobody_named_are_ignored_if_they_are_no_ids(tmp_path: Path, key: object) -> None:
    rows = [{"id": id_, "question": f"q{n}", "answer": n} for n, id_ in enumerate(["x", 7, key])]
    assert [problem.id for problem in load(tmp_path, *rows)] == ["x", "7", "data-3"]
    if key is not None:
        with pytest.raises(DataError, match=r":3: id is .*; expected text"):
            load(tmp_path, *rows, columns={"id": "id"})


@pytest.mark.parametrize("name", ["expected_answer", "correct_answer", "ground_truth_answer"])
@pytest.mark.parametrize("key", ["uuid", "unique_id", "problem_id", "question_id"])
def test_more_names_of_answers_and_ids_are_recognised(tmp_path: Path, name: str, key: str) -> None:
    row = {"problem": "q", "generated_solution": "So $\\boxed{13}$.", name: "13", key: "x"}
    (problem,) = load(tmp_path, row)
    assert (problem.answer.value, problem.rationale, problem.id) == (
        13,
        row["generated_solution"],
        "x",
    )


def test_options_written_as_text_are_named_with_both_remedies(tmp_path: Path) -> None:
    row = {"question": "Which is odd?", "options": "A) 1\nB) 2", "answer": "A"}
    remedy = r"choices=null; to show this text, set dataset.columns.question=\[question,options\]\)"
    with pytest.raises(DataError, match=remedy):
        load(tmp_path, row)
    (problem,) = load(tmp_path, row, columns={"question": ["question", "options"]})
    assert problem.question == "Which is odd?\nA) 1\nB) 2"
    assert problem.answer == Answer(kind="text", value="A")
    with pytest.raises(DataError) as error:
        load(tmp_path, {**row, "options": {"text": "1"}})
    assert "to show" not in str(error.value)


@pytest.mark.parametrize("empty", [[], None], ids=str)
def test_an_empty_first_conversation_is_named(tmp_path: Path, empty: object) -> None:
    with pytest.raises(DataError, match=rf":1: messages is {re.escape(repr(empty))}; expected t"):
        load(tmp_path, {"messages": empty}, {"messages": [USER, REPLY]})


def test_columns_as_pandas_writes_them_are_named_with_the_remedy(tmp_path: Path) -> None:
    columns = {"question": {"0": "1 + 1?", "1": "1 + 2?"}, "answer": {"0": 2, "1": 3}}
    with pytest.raises(DataError, match=r"expected text .*to_json with orient='records'"):
        load(tmp_path, columns)
    (problem,) = load(tmp_path, {"messages": [USER, REPLY], "tools": "null"})
    assert problem.answer.value == 13


@pytest.mark.parametrize(
    ("name", "data", "found"),
    [
        (
            "data.jsonl",
            '{"question": "q", "answer": 5}\n{"question": "r", "answer": NaN}\n',
            "None",
        ),
        (
            "data.jsonl",
            '{"question": "q", "answer": 5}\n{"question": "r", "answer": null}\n',
            "None",
        ),
        ("data.jsonl", '{"question": "q", "answer": 5}\n{"question": "r"}\n', "None"),
        ("data.csv", "question,answer\nq,5\nr,\n", "None"),
        ("data.csv", "question,answer\nq,5\nr,nan\n", "'nan'"),
        ("data.csv", "question,answer\nq,5\nr,NaN\n", "'NaN'"),
        ("data.csv", 'question,answer\nq,5\nr,"  "\n', "''"),
        ("data.csv", "question,answer\nq,5\nr,#DIV/0!\n", "'#DIV/0!'"),
        ("data.csv", "question,answer\nq,5\nr,#N/A\n", "'#N/A'"),
    ],
)
def test_a_missing_gold_is_named_with_its_line(
    tmp_path: Path, name: str, data: str, found: str
) -> None:
    path = tmp_path / name
    path.write_text(data)
    line = 2 if name.endswith("jsonl") else 3
    with pytest.raises(
        DataError,
        match=rf"{name}:{line}: .*answer.* is {found}; expected|{name}:{line}: no column 'answer'",
    ):
        Jsonl(kind="jsonl", train=str(path), dev_size=0).load(seed=0)


# --- the manual -----------------------------------------------------------------------------------


MANUAL = Path(__file__).parents[2] / "docs" / "datasets.md"
USER_AND_REPLY = [
    {"role": "user", "content": "A + 1?"},
    {"role": "assistant", "content": "It is B.\n#### B"},
]
ROWS_OF: dict[str, tuple[str, dict[str, Any]]] = {
    # first word of a row in the manual's table → an ending, and a row with A for a number and B for
    # the next
    "plain": ("csv", {"Question": "A + 1?", "Answer": "B", "Solution": "So it is B."}),
    "Alpaca": ("json", {"instruction": "Sum up.", "input": "A + 1", "output": "So B. #### B"}),
    "GSM8K": ("jsonl", {"question": "A + 1?", "answer": "So it is B.\n#### B"}),
    "MATH": ("ndjson", {"problem": "A + 1?", "solution": "So it is $\\boxed{B}$."}),
    "OpenAI's": ("jsonl", {"messages": USER_AND_REPLY}),
    "TRL": ("jsonl", {"prompt": USER_AND_REPLY[:1], "solution": "B"}),
    "verl": ("parquet", {"prompt": USER_AND_REPLY[:1], "reward_model": {"ground_truth": "B"}}),
    "ARC": (
        "jsonl",
        {
            "question": "A + 1?",
            "choices": {"text": ["A", "B"], "label": ["X", "Y"]},
            "answerKey": "Y",
        },
    ),
    "tables": (
        "xlsx",
        {"question": "A + 1?", "A": "A", "B": "B", "C": "9A", "D": "9B", "answer": "B"},
    ),
}


def manual_columns() -> dict[str, Any]:
    """First word of a row of the manual's table → the `columns` in it."""
    text = MANUAL.read_text(encoding="utf-8").partition("### Row shapes")[2]
    rows = re.findall(r"^\| (.*) \| `(\{.*\})` \|$", text.partition("\n## ")[0], re.MULTILINE)
    return {re.split(r"[ :,]", name)[0]: yaml.safe_load(columns) for name, columns in rows}


def write_rows(path: Path, row: dict[str, Any], count: int = 12) -> str:
    """Write the row `count` times with different numbers, to a file in the format of its ending."""

    def numbered(value: object, n: int) -> Any:
        return json.loads(json.dumps(value).replace("A", str(n)).replace("B", str(n + 1)))

    rows = [{key: numbered(value, n) for key, value in row.items()} for n in range(10, 10 + count)]
    rows = [{**each, **({"answer": "B"} if "D" in row else {})} for each in rows]
    if path.suffix == ".xlsx":
        book = Workbook()
        for cells in (list(row), *(list(each.values()) for each in rows)):
            book.worksheets[0].append(cells)
        book.save(path)
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = [list(row), *(list(each.values()) for each in rows)]
        path.write_text("".join(";".join(line) + "\n" for line in lines))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


def test_the_manual_shows_every_shape_that_is_tried_here() -> None:
    assert manual_columns().keys() == ROWS_OF.keys()


@pytest.mark.parametrize("name", ROWS_OF)
def test_the_four_lines_of_the_manual_train_on_each_shape(tmp_path: Path, name: str) -> None:
    ending, row = ROWS_OF[name]
    bare = {"kind": "jsonl", "train": write_rows(tmp_path / f"data.{ending}", row)}
    told = {**bare, "columns": manual_columns()[name]}
    problems = [
        Jsonl.model_validate({**dataset, "dev_size": 0}).load(seed=0).train
        for dataset in (told, bare)
    ]
    assert problems[0] == problems[1], "the columns are recognised"
    assert [str(problem.answer) for problem in problems[0]] in (
        [str(n) for n in range(11, 23)],
        ["b"] * 12,
    )
    is_worked = problems[0][0].rationale is not None
    optimizer = {"learning_rate": 0.01}
    sft = {"kind": "sft", "epochs": 1, "batch_size": 12, "optimizer": optimizer}
    rl = {
        "kind": "rl",
        "init": "base",
        "steps": 1,
        "prompts": 2,
        "samples": 2,
        "optimizer": optimizer,
    }
    recipe = parse_recipe(
        {
            "name": "manual",
            "run_dir": str(tmp_path / "run"),
            "model": {"scratch": {"hidden_size": 8, "layers": 1, "heads": 1, "context": 96}},
            "dataset": told,
            "format": "nl",
            "lengths": {"max_new": 24},
            "evaluate": {"split": "dev"},
            "stages": {"stage": sft if is_worked else rl},
        }
    )
    with open_run(recipe, Progress()) as run:
        run.train("stage")
        assert run.is_trained("stage")
