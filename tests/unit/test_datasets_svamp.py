"""SVAMP: the authors' files with their flaws, and the original file with equations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reftune.datasets import Splits
from reftune.datasets.svamp import Svamp
from reftune.errors import DataError

QUESTION = (
    "Iesha has 344 books. 136 are about school and the rest about sports. How many about sports?"
)
PROGRAM = f'def solution():\n    """{QUESTION}"""\n    result = 344 - 136\n    return result'


def authors(id: str, question: str, cot: str, value: str) -> dict[str, str]:
    return {"item_id": id, "question": question, "answer_cot": cot, "answer_value": value}


def solved(stated: str) -> str:
    return f"We subtract.\n\nTherefore, the answer is <{stated}>."


def load(tmp_path: Path, rows: list[dict[str, Any]], **keys: Any) -> Splits:
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return Svamp.model_validate(
        {"kind": "svamp", "train": str(tmp_path / "data.json"), "dev_size": 0, **keys}
    ).load(seed=0)


def test_the_authors_rationales_end_in_an_answer_that_must_be_the_gold(tmp_path: Path) -> None:
    rows = [
        authors("svamp_1", QUESTION, solved("208"), "208.0"),
        authors("svamp_2", "percent", solved("6%"), "6.0"),
        authors("svamp_3", "contradiction", solved("9"), "8.9333333333"),
        authors("svamp_4", "rounded", solved("3.33"), "3.333"),
        authors(
            "svamp_5", "unmarked", "This question was already answered. The answer is <4>.", "4.0"
        ),
    ]
    splits = load(tmp_path, rows, rationale="nl")
    assert [problem.id for problem in splits.train] == ["svamp_1", "svamp_2", "svamp_4"]
    assert splits.train[0].rationale == solved("208")
    assert splits.train[0].answer.value == 208
    assert splits.counts == {"no_final_answer": 1, "rationale_disagrees": 1}


def test_the_authors_programs_must_give_the_gold(tmp_path: Path) -> None:
    # 10 / 3 is 3.3333…, 0.0003 from 3.333: within the tolerance of 0.01; 9 is not
    rows = [
        authors("svamp_1", QUESTION, PROGRAM, "208.0"),
        authors("svamp_2", "rounded", "def solution():\n    return 10 / 3", "3.333"),
        authors("svamp_3", "wrong", "def solution():\n    return 9", "3.333"),
        authors("svamp_4", "broken", "def solution():\n    return 9 +", "9"),
    ]
    splits = load(tmp_path, rows)
    assert [problem.id for problem in splits.train] == ["svamp_1", "svamp_2"]
    assert splits.train[0].rationale == PROGRAM
    assert splits.counts == {"program_disagrees": 2}


def test_repeated_questions_are_dropped_whatever_their_rationale(tmp_path: Path) -> None:
    rows = [
        authors("svamp_1", QUESTION, solved("208"), "208.0"),
        authors("svamp_2", QUESTION, solved("208.0"), "208.0"),
    ]
    assert load(tmp_path, rows, rationale="nl").counts == {"duplicate": 1}


def test_the_folder_of_the_authors_is_read_by_rationale(tmp_path: Path) -> None:
    (tmp_path / "svamp_nl.json").write_text(
        json.dumps([authors("svamp_1", QUESTION, solved("208"), "208.0")])
    )
    (tmp_path / "svamp_python_sdp.json").write_text(
        json.dumps([authors("svamp_1", QUESTION, PROGRAM, "208.0")])
    )
    test_row = {"item_id": "svamp_9", "question": "q", "answer_value": "14.0"}
    (tmp_path / "svamp_test_set.json").write_text(json.dumps([test_row]))
    for rationale, expected in (("nl", solved("208")), ("program", PROGRAM)):
        dataset = Svamp(kind="svamp", train=str(tmp_path), rationale=rationale, dev_size=0)  # type: ignore[arg-type]
        splits = dataset.load(seed=0)
        assert splits.train[0].rationale == expected
        assert splits.test[0].answer.value == 14


ORIGINAL = {
    "ID": "chal-1",
    "Body": "Each pack costs 76 dollars. If there is a discount of 25 dollars on each pack",
    "Question": "How much is a pack?",
    "Equation": "( 76.0 - 25.0 )",
    "Answer": 51.0,
    "Type": "Subtraction",
}


def test_the_original_file_gives_programs_from_equations(tmp_path: Path) -> None:
    wrong = {**ORIGINAL, "ID": "chal-2", "Body": "Other.", "Answer": 1.0}
    splits = load(tmp_path, [ORIGINAL, wrong])
    assert len(splits.train) == 1
    problem = splits.train[0]
    assert problem.id == "chal-1"
    assert problem.question == ORIGINAL["Body"] + ". " + ORIGINAL["Question"]
    assert problem.rationale == "def solution():\n    result = 76 - 25\n    return result"
    assert problem.columns == {"Equation": "( 76.0 - 25.0 )", "Type": "Subtraction"}
    assert splits.counts == {"program_disagrees": 1}


def test_the_original_file_has_no_nl_rationales(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"data.json: no answer_cot; expected .* dataset.rationale=program"
    ):
        load(tmp_path, [ORIGINAL], rationale="nl")


def test_if_every_training_row_is_a_leak_no_rationale_is_missed(tmp_path: Path) -> None:
    rows = [authors("svamp_1", QUESTION, solved("208"), "208.0")]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    splits = load(tmp_path, rows, rationale="nl", test=str(tmp_path / "test.json"))
    assert (splits.train, splits.counts) == ((), {"leak": 1})


def test_a_row_without_a_numeric_gold_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.json:1: Answer is 'many'; expected a number"):
        load(tmp_path, [{**ORIGINAL, "Answer": "many"}])
