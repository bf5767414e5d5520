"""GSM8K: OpenAI's rows, the authors' rows, and programs from annotations."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from reftune.datasets import Splits
from reftune.datasets.gsm8k import Gsm8k, program_of
from reftune.errors import DataError

CLIPS = {
    "question": (
        "Natalia sold clips to 48 friends in April, and half as many in May. How many altogether?"
    ),
    "answer": (
        "She sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips"
        " altogether.\n#### 72"
    ),
}
CLIPS_PROGRAM = """\
def solution():
    clips_may = 48 / 2
    clips_altogether = 48 + clips_may
    return clips_altogether"""
MISLEADING = {"question": "What is 5 and 5?", "answer": "It is <<5+5=10>>10, less one.\n#### 9"}
PLAIN = {"question": "What is 3 and 3?", "answer": "It is 6.\n#### 6"}


def write_lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(train: str, seed: int = 0, **keys: Any) -> Splits:
    return Gsm8k.model_validate({"kind": "gsm8k", "train": train, "dev_size": 0, **keys}).load(
        seed=seed
    )


def test_the_program_has_a_variable_a_step_and_reuses_earlier_results() -> None:
    assert program_of(CLIPS["answer"]) == CLIPS_PROGRAM


@pytest.mark.parametrize(
    ("solution", "lines"),
    [
        (
            "<<0.5*50=25.0>>25.0 then <<25+.5=25.5>>",
            ["step_1 = 0.5 * 50", "step_2 = step_1 + 0.5", "return step_2"],
        ),
        (
            "<<(2+3)*4=20>>20 feet. <<20*20=400>>400 feet.",
            ["feet = (2 + 3) * 4", "feet_2 = feet * feet", "return feet_2"],
        ),
        ("<<05-007=-2>>-2", ["step_1 = 5 - 7", "return step_1"]),
        ("<<7=7>>7 for sure, <<7*2=14>>14", ["sure = 7", "step_1 = sure * 2", "return step_1"]),
        (
            "<<7+1=8>>$8 max. <<8+1=9>>9 in",
            ["step_1 = 7 + 1", "step_2 = step_1 + 1", "return step_2"],
        ),
    ],
)
def test_steps_are_called_after_the_words_behind_their_result(
    solution: str, lines: list[str]
) -> None:
    assert program_of(solution) == "\n".join(
        ["def solution():", *(f"    {line}" for line in lines)]
    )


@pytest.mark.parametrize(
    "solution",
    [
        "no step",
        "<<2(3)=6>>",
        "<<20=20>>20",
        "<<2x=6>>",
        "<<__import__('os')=6>>",
        "<<()=6>>",
        "<<7//2=3>>",
        "<<=6>>",
        "<<1_000+2=1002>>",
        f"<<{'+'.join('1' * 5000)}=5000>>",
    ],
)
def test_solutions_without_plain_arithmetic_have_no_program(solution: str) -> None:
    assert program_of(solution) is None


def test_programs_that_miss_the_gold_leave_train(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "train.jsonl", CLIPS, MISLEADING, PLAIN)
    splits = load(source)
    assert [problem.rationale for problem in splits.train] == [CLIPS_PROGRAM]
    assert splits.counts == {"no_program": 1, "program_disagrees": 1}
    assert splits.train[0].id == "train-1"
    assert splits.train[0].answer.value == 72


def test_a_dev_question_without_a_right_program_stays_in_dev(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "train.jsonl", CLIPS)
    dev = write_lines(tmp_path / "dev.jsonl", MISLEADING, PLAIN)
    splits = load(source, dev=dev)
    assert [problem.rationale for problem in splits.dev] == [None, None]
    assert splits.counts == {}


def test_nl_rationales_are_as_published_without_the_answer_line(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "train.jsonl", CLIPS, MISLEADING)
    kept, dropped = load(source, rationale="nl"), load(source, rationale="nl", annotations="drop")
    assert kept.train[0].rationale == CLIPS["answer"].removesuffix("\n#### 72")
    assert (
        dropped.train[0].rationale
        == "She sold 48/2 = 24 clips in May.\nShe sold 48+24 = 72 clips altogether."
    )
    assert len(kept.train) == 2


@pytest.mark.parametrize(
    ("gold", "value"),
    [("70,000", 70_000), ("1,234,567", 1_234_567), ("-3", -3), ("0.5", Fraction(1, 2))],
)
def test_golds_may_have_commas_and_signs(tmp_path: Path, gold: str, value: Fraction) -> None:
    source = write_lines(tmp_path / "train.jsonl", {"question": "q", "answer": f"so\n#### {gold}"})
    assert load(source, rationale="nl").train[0].answer.value == value


def test_a_folder_gives_train_and_test(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", CLIPS)
    write_lines(tmp_path / "test.jsonl", MISLEADING)
    splits = load(str(tmp_path))
    assert len(splits.train) == 1
    assert splits.test[0].answer.value == 9


def test_the_authors_files_are_recognised(tmp_path: Path) -> None:
    row = {
        "item_id": "gsm8k_0",
        "question": CLIPS["question"],
        "answer_cot": CLIPS_PROGRAM,
        "answer_value": "72",
    }
    (tmp_path / "gsm8k_python_sdp.json").write_text(json.dumps([row]))
    (tmp_path / "gsm8k_test_set.json").write_text(
        json.dumps([{"item_id": "t", "question": "q", "answer_value": "1,000"}])
    )
    splits = load(str(tmp_path))
    assert splits.train[0].id == "gsm8k_0"
    assert splits.train[0].rationale == CLIPS_PROGRAM
    assert splits.test[0].answer.value == 1000


def test_an_authors_file_of_the_other_rationale_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps([{"item_id": "a", "question": "q", "answer_cot": "so 3", "answer_value": "3"}])
    )
    with pytest.raises(
        DataError,
        match=r"a.json:1: answer_cot is not a program; expected a rationale of kind program",
    ):
        load(str(tmp_path / "a.json"))


@pytest.mark.parametrize("answer", ["72", "so\n#### many", "so\n####"])
def test_a_row_without_a_gold_is_refused_with_its_line(tmp_path: Path, answer: str) -> None:
    source = write_lines(tmp_path / "train.jsonl", CLIPS, {"question": "q", "answer": answer})
    with pytest.raises(
        DataError, match=r"train.jsonl:2: answer ends in .*; expected a last line like '#### 72'"
    ):
        load(source)


def test_a_row_without_a_question_is_refused_with_its_line(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "train.jsonl", CLIPS, {"question": None, "answer": "#### 3"})
    with pytest.raises(DataError, match=r"train.jsonl:2: question is None; expected text"):
        load(source)
