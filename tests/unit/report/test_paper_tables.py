"""The paper's layout: one column per task, one row per model and method, and its numbers beside
ours if the experiment is the same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from reftune.errors import DataError
from reftune.results import table_command

WriteRun = Callable[..., Path]


@pytest.fixture
def write_task(write_run: WriteRun) -> WriteRun:
    """A run of CodeLLAMA-7B on a task; `test` is its number of test problems."""

    def write(
        kind: str = "gsm8k",
        rationale: str = "program",
        *,
        test: int = 24,
        path: str = "codellama/CodeLlama-7b-hf",
        dataset: dict[str, Any] | None = None,
        name: str | None = None,
        **options: Any,
    ) -> Path:
        folder = write_run(name or f"{kind}-{rationale}", num_problems=test, **options)
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        recipe |= {
            "model": {"path": path},
            "dataset": {"kind": kind, **(dataset or {})},
            "format": {"kind": rationale},
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        (folder / "data.json").write_text(
            json.dumps({"problems": {"train": 6931, "dev": 500, "test": test}})
        )
        return folder

    return write


def test_runs_of_several_tasks_get_a_column_each(write_task: WriteRun) -> None:
    text = table_command(
        [
            write_task(rationale="program"),
            write_task(rationale="nl"),
            write_task("svamp", num_samples=3),
        ]
    )
    assert text.count("GSM8K N-CoT") == 3 and text.count("SVAMP P-CoT") == 3, (
        "sizes, accuracy and votes"
    )
    head = next(line for line in text.splitlines() if line.startswith("Model"))
    assert (
        head.index("GSM8K N-CoT")
        < head.index("GSM8K P-CoT")
        < head.index("SVAMP P-CoT")
        < head.index("Average P-CoT")
    )
    reft = next(line for line in text.splitlines() if "ReFT  " in line)
    assert reft.startswith("CodeLLAMA-7B") and reft.count("±") == 3
    assert "Average N-CoT" not in text, "one task needs no average"
    votes = next(line for line in text.splitlines() if "ReFT + voting@3" in line)
    assert votes.count("±") == 1 and votes.count("–") == 3, "only SVAMP was sampled"


def test_the_papers_number_is_shown_only_if_the_experiment_is_the_same(
    write_task: WriteRun,
) -> None:
    same, part = write_task(test=1319), write_task("svamp", test=24)
    other = write_task("mathqa", test=1605, path="x/y", dataset={"answer": "choice"})
    document = json.loads(table_command([same, part, other], "json"))
    paper = {
        (cell["model"], cell["task"]): cell["methods"]["reft"]["greedy"]["paper"]
        for cell in document
    }
    assert paper == {
        ("CodeLLAMA-7B", "GSM8K"): 75.28,
        ("CodeLLAMA-7B", "SVAMP"): None,
        ("x/y", "MathQA-MCQ"): None,
    }
    text = table_command([same, part, other])
    assert text.count("[75.28]") == 1 and "[63.68]" in text, "the paper's SFT and ReFT"
    assert "6,931 [7,356]" in text


def test_brackets_and_kinds_are_explained_only_if_they_occur(write_task: WriteRun) -> None:
    own, second = write_task("jsonl", "nl", path="x/y"), write_task("word_problems", path="x/y")
    text = table_command([own, second])
    assert "[" not in text and "rackets" not in text
    assert text.count("N-CoT: solutions in words, P-CoT: programs.") == 1
    text = table_command([second], layout="paper")
    assert "P-CoT: programs." in text and "N-CoT" not in text
    text = table_command([own, write_task(test=1319)])
    sizes, _, accuracies = text.partition("Accuracy, greedy")
    assert "In brackets: the paper's numbers." in sizes and "In brackets" in accuracies
    text = table_command([own, write_task(test=24, name="part")])
    sizes, _, accuracies = text.partition("Accuracy, greedy")
    assert "In brackets" in sizes, "the paper's numbers of questions"
    assert "In brackets" not in accuracies


def test_a_table_without_a_note_ends_with_its_last_row(write_task: WriteRun) -> None:
    folder = write_task("jsonl", "own.py:Own", path="x/y")
    for fmt, last in (("text", r"test questions +24"), ("markdown", r"\| test questions \| 24 \|")):
        text = table_command([folder], fmt, layout="paper")
        assert re.search(rf"\n{last}\n\n[^\n]*Accuracy", text)
    latex = table_command([folder], "latex", layout="paper")
    assert r"\caption{Questions.}" in latex


def test_differences_that_are_not_significant_are_marked(write_task: WriteRun) -> None:
    folder = write_task()
    (folder / "eval" / "reft.jsonl").write_text((folder / "eval" / "sft.jsonl").read_text())
    text = table_command([folder], layout="paper")
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith("CodeLLAMA")}
    assert "n.s." in lines["ReFT"] and "n.s." not in lines["SFT"]


def test_a_score_that_was_not_compared_is_not_called_significant(write_task: WriteRun) -> None:
    (cell,) = json.loads(table_command([write_task(num_samples=2)], "json", layout="paper"))
    assert cell["baseline"] == "sft"
    found = {
        rule: score["significant_against_baseline"]
        for rule, score in cell["methods"]["reft"].items()
    }
    assert found["pass@2"] is None and isinstance(found["maj@2"], bool)


def test_markdown_and_latex_hold_the_same_tables(write_task: WriteRun) -> None:
    folders = [write_task(test=1319), write_task(rationale="nl")]
    assert table_command(folders, "markdown").count("| CodeLLAMA-7B | ReFT |") == 1
    latex = table_command(folders, "latex")
    assert latex.count(r"\begin{table}") == 2 and r"$\pm$" in latex


def test_votes_may_be_over_fewer_samples_and_never_over_more(write_task: WriteRun) -> None:
    folder = write_task(num_samples=4)
    assert "maj@2" in table_command([folder], k=2)
    assert "voting@2" in table_command([folder], layout="paper", k=2)
    for layout in ("methods", "paper"):
        with pytest.raises(
            DataError, match=r"^k = 5: only 4 samples drawn per problem; expected 1 to 4"
        ):
            table_command([folder], layout=layout, k=5)


def test_votes_that_have_no_counterpart_are_marked_as_not_compared(write_task: WriteRun) -> None:
    folder = write_task(num_samples=4)
    path = folder / "eval" / "sft.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "samples": []}) + "\n" for row in rows))
    text = table_command([folder], layout="paper")
    greedy, _, votes = text.partition("Votes")
    assert "n.c." not in greedy.partition("Percent")[0]
    marked = [line for line in votes.splitlines() if "voting@4" in line]
    assert len(marked) == 2 and all("n.c." in line for line in marked)


def test_methods_without_samples_have_no_votes(write_task: WriteRun) -> None:
    folder = write_task(num_samples=4)
    rows = [
        json.loads(line) for line in (folder / "eval" / "warmup.jsonl").read_text().splitlines()
    ]
    for row in rows:
        del row["samples"]
    (folder / "eval" / "warmup.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    votes = table_command([folder], layout="paper", k=3).rpartition("Votes")[2]
    assert "SFT + voting@3" in votes and "Warm-up" not in votes
    (folder / "recipe.yaml").write_text(
        (folder / "recipe.yaml").read_text().replace("samples: 4", "samples: 0")
    )
    for method in ("sft", "reft"):
        (folder / "eval" / f"{method}.jsonl").write_text(
            (folder / "eval" / "warmup.jsonl").read_text()
        )
    with pytest.raises(DataError, match="k = 3: only 0 samples"):
        table_command([folder], k=3)


def test_two_recipes_for_one_cell_are_rejected(write_task: WriteRun) -> None:
    folders = [write_task(), write_task(name="other", dataset={"annotations": "drop"})]
    with pytest.raises(
        DataError,
        match=(
            "two recipes for CodeLLAMA-7B, GSM8K, P-CoT; expected runs that differ only in the seed"
        ),
    ):
        table_command(folders, layout="paper")


def test_a_run_that_never_finished_is_refused(write_task: WriteRun) -> None:
    with pytest.raises(DataError, match="the run has not finished: no evaluation of reft"):
        table_command([write_task(evaluated=["warmup", "sft"]), write_task(rationale="nl")])
