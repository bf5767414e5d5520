"""Unused columns that may belong to the question are named with the setting that includes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reftune.datasets import Splits
from reftune.datasets.jsonl import Jsonl
from reftune.datasets.mixture import Mixture
from reftune.errors import DataError
from reftune.recipe import load_recipe
from reftune.terminal.cli import main

Rows = list[dict[str, Any]]
PEOPLE = ["Ann", "Ben", "Cat", "Dan"]
PENS: Rows = [
    {"passage": f"{name} has {n} pens.", "question": "How many?", "answer": n}
    for n, name in enumerate(PEOPLE)
]
SUMS: Rows = [{"question": f"What is {n} + 1?", "answer": n + 1} for n in range(4)]
CHATS: Rows = [
    {"conversations": [{"from": "human", "value": f"{n} + 1?"}], "answer": n + 1} for n in range(4)
]


def each(rows: Rows, **columns: Any) -> Rows:
    """The rows with further columns, each with a value for all rows or a list of values."""
    return [
        row | {name: x[n] if isinstance(x, list) else x for name, x in columns.items()}
        for n, row in enumerate(rows)
    ]


def write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(tmp_path: Path, rows: Rows, **keys: Any) -> Splits:
    source = write(tmp_path / "data.jsonl", rows)
    recipe = {"kind": "jsonl", "train": source, "dev_size": 0, **keys}
    return Jsonl.model_validate(recipe).load(seed=0)


@pytest.mark.parametrize(
    ("rows", "found", "setting"),
    [
        (PENS, "text in column passage is", "[passage,question]"),
        (each(SUMS, context="It is a sum."), "text in column context is", "[context,question]"),
        (each(SUMS, hint=["", *["Count on your fingers."] * 3]), "hint", "[question,hint]"),
        (
            each(SUMS, **{"a b": "Add one to it.", "c": "It is easy."}),
            "columns a b, c",
            "[a b,c,question]",
        ),
        (each(CHATS, system="You are Ann."), "column system", "[system,conversations]"),
        (
            [{"system": "Be very kind.", "instruction": "1 + 1?", "input": "", "output": "2"}],
            "column system",
            "[system,instruction,input]",
        ),
    ],
)
def test_a_column_that_may_belong_to_the_question_is_named_with_a_setting_that_works(
    tmp_path: Path, rows: Rows, found: str, setting: str | None
) -> None:
    (note,) = load(tmp_path, rows).notes
    assert (
        found in note
        and f"; if it belongs to the question, set dataset.columns.question={setting} (" in note
    )
    parts = setting.strip("[]").split(",")
    included = load(tmp_path, rows, columns={"question": parts})
    assert (included.counts, included.notes, len(included.train)) == ({}, (), len(rows))
    texts = [row[name] for row in rows for name in parts if isinstance(row.get(name), str)]
    asked = "\n".join(problem.question for problem in included.train)
    assert all(text in asked for text in texts)


@pytest.mark.parametrize(
    "columns",
    [
        {"level": "Level 5", "type": ["Counting & Probability", "Algebra"] * 2},
        {"explanation_2": "We count to it.", "modelAnswer": "It is three pens."},
        {"url": "https://example.org/a_b", "formula": "( 1.0 + 2.0 )", "license": "CC BY 4.0"},
        {"text": [f"Question: {row['question']} Answer: so and so" for row in SUMS]},
        {"numbers": [1, 2, 3, 4], "tags": ["a b c"], "extra": {"passage": "It is a sum."}, "e": ""},
    ],
)
def test_other_columns_are_not_named(tmp_path: Path, columns: dict[str, Any]) -> None:
    rows = [row | columns for row in SUMS] if "tags" in columns else each(SUMS, **columns)
    assert load(tmp_path, rows).notes == ()


@pytest.mark.parametrize(
    "column",
    [
        {"history": [[["What is 6 + 6?", "12"]], [], [], []]},
        {"context": ["This is the first of two long passages on sums."]},
        {"images": ["x.png"], "question": [f"<image>What is x + {n}?" for n in range(4)]},
    ],
    ids=str,
)
def test_lists_on_which_the_question_may_depend_are_named(
    tmp_path: Path, column: dict[str, Any]
) -> None:
    name = next(iter(column))
    rows = [row | {name: column[name]} for row in SUMS]
    if name != "context":
        rows = each(rows, **{key: x for key, x in column.items() if key == "question"})
    (note,) = load(tmp_path, rows).notes
    assert f"the lists in column {name} are not used; if they belong to the question, " in note


@pytest.mark.parametrize(
    "column",
    [
        {"history": []},
        {"tags": ["number theory", "a b c"]},
        {"images": ["x.png"]},
        {"numbers": [1, 2, 3, 4, 5, 6, 7, 8, 9]},
    ],
    ids=str,
)
def test_other_lists_are_not_named(tmp_path: Path, column: dict[str, Any]) -> None:
    assert load(tmp_path, [row | column for row in SUMS]).notes == ()


def test_text_beside_a_conversation_becomes_part_of_its_first_question(tmp_path: Path) -> None:
    turns = [("system", "Think."), ("user", "1 + 1?"), ("assistant", "2"), ("user", "And 1?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    row = {"above": "A sum.", "messages": messages, "below": None, "answer": 3}
    asked = ["above", "messages", "below"]
    (problem,) = load(tmp_path, [row], columns={"question": asked}).train
    assert problem.question == "A sum.\n1 + 1?\n\n2\n\nAnd 1?"
    assert [turn.content for turn in problem.messages] == [
        "Think.",
        "A sum.\n1 + 1?",
        "2",
        "And 1?",
    ]


def test_a_mixture_names_the_keys_of_its_parts(tmp_path: Path) -> None:
    parts = {
        name: {"dataset": {"kind": "jsonl", "train": write(tmp_path / f"{name}.jsonl", rows)}}
        for name, rows in (("a", SUMS), ("b", PENS))
    }
    (note,) = Mixture.model_validate({"kind": "mixture", "parts": parts}).load(seed=0).notes
    assert "set dataset.parts.b.dataset.columns.question=[passage,question]" in note


def test_errors_about_rows_that_are_all_dropped_name_the_reason_and_the_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write(Path("data.jsonl"), PENS)
    why = r".*\(dropped: 4 contradiction\).*; the text in column passage is not used; if it"
    with pytest.raises(DataError, match=f"dev_size 1: only 0 training questions left{why}"):
        load(tmp_path, PENS, dev_size=1)
    init = ("init", "--data", data, "--model", "smollm2-135m", "--format", "nl")

    def status(*arguments: str) -> int:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        return int(str(caught.value.code))

    assert status(*init) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "0 questions cannot be split (dropped: 4 contradiction); expected" in error
    assert "set dataset.columns.question=[passage,question]" in error
    assert status(*init, "--question", "passage", "--question", "question") == 0
    assert load_recipe("data.yaml").dataset.columns.question == ["passage", "question"]
    assert status("check", "data.yaml", "--offline", "dataset.columns.question=question") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dataset: no training row is left (dropped: 4 contradiction); the text")


def test_init_and_check_name_unused_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write(Path("data.jsonl"), each(SUMS, context="It is a sum."))
    setting = "set dataset.columns.question=[context,question]"
    arguments = ("init", "--data", data, "--model", "smollm2-135m", "--format", "nl")
    for command in (arguments, ("check", "--offline", "data.yaml")):
        with pytest.raises(SystemExit, match="0"):
            main(command)
        assert setting in "".join(capsys.readouterr())
