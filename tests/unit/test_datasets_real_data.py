"""The published files, if present: set REFTUNE_DATA to a folder with gsm8k/, svamp/ and mathqa/."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from reftune.datasets import Splits
from reftune.datasets.reading.rows import read_rows
from reftune.recipe import load_component

DATA = os.environ.get("REFTUNE_DATA", "")
pytestmark = [
    pytest.mark.skipif(
        not DATA, reason="REFTUNE_DATA does not name a folder with the published files"
    ),
    pytest.mark.timeout(600),
]


def load(kind: str, train: str, test: str | None = None, seed: int = 0, **keys: Any) -> Splits:
    if not (Path(DATA) / train).exists():
        pytest.skip(f"REFTUNE_DATA has no {train}")
    sources = {"train": f"{DATA}/{train}", "test": None if test is None else f"{DATA}/{test}"}
    return load_component({"kind": kind, **sources, **keys}, group="datasets").load(seed=seed)


def test_gsm8k_solutions_are_all_kept() -> None:
    splits = load("gsm8k", "gsm8k", rationale="nl", dev_size=0)
    assert (len(splits.train), len(splits.test), splits.counts) == (7473, 1319, {})
    assert all(problem.answer.value.denominator == 1 for problem in splits.test)  # type: ignore[union-attr]


def test_gsm8k_golds_with_commas_are_read() -> None:
    for split, with_comma in (("train", 79), ("test", 14)):
        rows = read_rows(f"{DATA}/gsm8k", split)
        assert sum("," in row.text("answer").rpartition("####")[2] for row in rows) == with_comma


def test_gsm8k_annotations_give_a_right_program_for_nine_of_ten_questions() -> None:
    splits = load("gsm8k", "gsm8k", dev_size=0)
    assert len(splits.train) == 6931
    assert splits.counts == {"no_program": 186, "program_disagrees": 356}


def test_the_authors_gsm8k_test_file_has_the_same_golds() -> None:
    ours = load("gsm8k", "gsm8k/train.jsonl", "gsm8k/test.jsonl", rationale="nl").test
    theirs = load("gsm8k", "gsm8k/train.jsonl", "gsm8k/reft_test_set.json", rationale="nl").test
    assert [problem.answer for problem in ours] == [problem.answer for problem in theirs]
    assert theirs[0].id == "gsm8k_0"


def test_svamp_solutions_without_answer_or_with_another_one_are_dropped() -> None:
    # 3076 rows; svamp_1085, one of the 9 that state no answer, is also one of the 11 duplicates
    splits = load("svamp", "svamp", rationale="nl", dev_size=0)
    assert splits.counts == {"duplicate": 11, "no_final_answer": 8, "rationale_disagrees": 3}
    assert (len(splits.train), len(splits.test)) == (3054, 1000)


def test_svamp_programs_are_right_but_for_repeated_questions() -> None:
    splits = load("svamp", "svamp", dev_size=0)
    # svamp_640 returns 8.9996 for 9 and svamp_1418 0.16665 for 0.165
    assert splits.counts == {"duplicate": 9, "program_disagrees": 2}
    assert len(splits.train) == 3032


def test_no_svamp_question_is_in_dev_and_train_in_another_spelling() -> None:
    splits = load("svamp", "svamp", dev_size=300)
    # 3032 rows ask fewer questions: those of dev that are asked twice leave train
    assert len(splits.dev) == 300
    assert len(splits.train) == 3032 - 300 - splits.counts["leak"]


def test_the_original_svamp_has_one_wrong_gold() -> None:
    splits = load("svamp", "svamp/SVAMP.json", dev_size=0)
    assert len(splits.train) == 999
    assert splits.counts == {"program_disagrees": 1}  # chal-680: 4 - 2 + 3 is not 1


MCQ, NUMERIC = "mathqa/mathqa_test_set.json", "mathqa/mathqa-numeric_test_set.json"


def test_mathqa_choice_solutions() -> None:
    splits = load("mathqa", "mathqa/dev.json", MCQ, rationale="nl", dev_size=0)
    assert (len(splits.train), len(splits.test)) == (4466, 1605)
    assert splits.counts == {"leak": 8, "rationale_disagrees": 1}
    assert all(len(problem.choices) == 5 for problem in (*splits.train, *splits.test))


def test_mathqa_formulas_confirm_more_than_half_of_the_golds() -> None:
    choice = load("mathqa", "mathqa/dev.json", MCQ, dev_size=0)
    assert len(choice.train) == 2912
    numeric = load("mathqa", "mathqa/dev.json", NUMERIC, answer="numeric", dev_size=0)
    # 196 results differ from their golds by at most 1%, and 4 golds are not numbers ("1200 bc")
    assert len(numeric.train) == 2627
    assert numeric.counts["program_disagrees"] == 196
    assert len(numeric.test) == 1605


def test_train_questions_that_a_test_file_asks_in_another_spelling_are_found() -> None:
    # no question is in both word for word; eight of MathQA differ only in a comma, a final mark or
    # the options (a ninth has the points ( 2,0 ) in one file and ( 20 ) in the other)
    sources = [
        ("gsm8k", "gsm8k", None, 0),
        ("svamp", "svamp", None, 0),
        ("mathqa", "mathqa/dev.json", MCQ, 8),
    ]
    for kind, train, test, leaks in sources:
        assert load(kind, train, test, rationale="nl", dev_size=0).counts.get("leak", 0) == leaks
