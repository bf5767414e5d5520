"""With one prompt that is too long, the run is rejected or continues without it."""

import csv
import json
from pathlib import Path

import pytest

from checking import UNMEASURED, check_only
from reftune.errors import DataError
from reftune.runs.run import run_recipe
from reftune.stages.stage import Progress

LONG = "The weather was fine. " * 40


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture
def tables(tmp_path: Path):
    """Train, dev and test files, each with one question that is too long."""
    for split, first in (("train", 0), ("dev", 20), ("test", 40)):
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["question", "answer", "rationale"])
            for i in range(first, first + 12):
                told = LONG if i == first + 2 else ""
                writer.writerow([f"{told}{i % 7} + {i} = ?", i % 7 + i, f"{i % 7} + {i}"])
    return {"kind": "jsonl", "train": str(tmp_path)} | {"dev": str(tmp_path / "dev.csv")}


def tiny(make_recipe, tables, **lengths):
    return make_recipe(
        dataset=tables,
        format={"kind": "nl"},
        reward={"kind": "outcome"},
        lengths={"max_new": 17, **lengths},
    )


def test_it_is_refused_by_default_with_the_key_that_drops_it(make_recipe, tables):
    recipe = tiny(make_recipe, tables)
    with pytest.raises(DataError, match=r"problem dev-3: prompt of .*lengths.too_long=drop"):
        run_recipe(recipe, progress=Progress())
    (found,) = check_only(recipe, {"prompt_length"}).findings
    assert found.level == "fail"
    assert "too_long=drop" in found.remedy


def test_dropped_it_is_not_trained_on_and_its_test_question_counts_as_wrong(make_recipe, tables):
    recipe, notes = tiny(make_recipe, tables, too_long="drop"), Notes()
    summary = run_recipe(recipe, progress=notes)
    assert "sft: 1 training prompt left out as too long" in notes.lines
    assert summary["methods"]["reft"]["n"] == 12, "the long one counts too"
    rows = [
        json.loads(line)
        for line in (recipe.folder / "eval" / "reft.jsonl").read_text().splitlines()
    ]
    (long,) = (row for row in rows if row["question"].startswith("The weather"))
    answers = [long["greedy"], *long["samples"]]
    assert {(a["completion"], a["verdict"], a["finish_reason"]) for a in answers} == {
        ("", "no_answer", "length")
    }
    report = check_only(recipe, UNMEASURED)
    (found,) = (each for each in report.findings if each.name == "prompt_length")
    assert found.level == "warn"
    assert found.message.startswith(
        "1 of 12 training prompts are too long and left out; 1 dev and 1 test"
    )
