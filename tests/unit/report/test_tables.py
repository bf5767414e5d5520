"""One table in four formats."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from reftune.errors import DataError
from reftune.results import table_command
from reftune.results.tables import p_text

WriteRun = Callable[..., Path]
ROOT = Path(__file__).parents[3]


def test_text_columns_line_up(write_run: WriteRun) -> None:
    lines = table_command([write_run(num_samples=2)]).splitlines()
    assert lines[0].split() == [
        "Method",
        "Greedy",
        "maj@2",
        "pass@2",
        "vs",
        "SFT",
        *("Paired", "test", "Dev", "Dev", "evals"),
    ]
    assert [line.split()[0] for line in lines[2:5]] == ["Warm-up", "SFT", "ReFT"]
    ends = {
        line.rindex("]", 0, line.index("]") + 1) for line in lines[2:5]
    }  # the first interval ends in one column
    assert len(ends) == 1


def test_differences_that_are_not_significant_are_marked(write_run: WriteRun) -> None:
    folder = write_run()
    (folder / "eval" / "reft.jsonl").write_text((folder / "eval" / "sft.jsonl").read_text())
    text = table_command([folder])
    reft = next(line for line in text.splitlines() if line.startswith("ReFT"))
    assert "+0.0 [−10.7, +10.7]" in reft
    assert "p = 1.000 n.s." in reft
    assert "n.s.: the interval contains 0" in text


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (0.0004, "p < 0.001"),
        (0.0312, "p = 0.031"),
        (0.0497, "p = 0.04970"),
        (0.0503, "p = 0.05030"),
        (1.0, "p = 1.000"),
    ],
)
def test_a_rounded_p_value_stays_on_its_side_of_the_limit(p: float, text: str) -> None:
    assert p_text(p) == text


def test_markdown_is_a_pipe_table(write_run: WriteRun) -> None:
    lines = table_command([write_run()], "markdown").splitlines()
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: |"
    assert {line.count("|") for line in lines[:5]} == {7}


def test_latex_escapes_what_latex_reads(write_run: WriteRun) -> None:
    folder = write_run()
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace("  reft:\n", "  50%_off&:\n"))
    (folder / "eval" / "reft.jsonl").rename(folder / "eval" / "50%_off&.jsonl")
    text = table_command([folder], "latex")
    assert r"50\% off\& & " in text
    assert r"95\% interval" in text
    assert text.count(r"\\") == 4


def test_json_is_one_document_with_unrounded_numbers(write_run: WriteRun) -> None:
    folders = [write_run(f"demo-s{seed}", seed=seed) for seed in range(2)]
    table = json.loads(table_command(folders, "json"))
    assert table["seeds"] == 2
    score = table["methods"]["reft"]["scores"]["greedy"]
    assert score["accuracy"] == pytest.approx(sum(score["by_seed"]) / 2)
    assert {"a", "b", "difference", "ci95", "by_seed", "significant"} <= set(
        table["comparisons"][0]
    )


def test_an_unknown_format_names_the_known_ones(write_run: WriteRun) -> None:
    with pytest.raises(
        DataError,
        match=r"^html: unknown table format; expected one of text, markdown, latex, json$",
    ):
        table_command([write_run()], "html")


def test_an_unfinished_run_has_no_table(write_run: WriteRun) -> None:
    with pytest.raises(DataError, match="has not finished"):
        table_command([write_run(evaluated=["warmup"])])


def test_the_reproduction_stores_the_json_table_of_each_recipe(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reproduce = runpy.run_path(str(ROOT / "benchmarks" / "reproduce.py"))
    for seed in (0, 1):
        write_run(f"runs/comparison-seed{seed}", seed=seed)
    monkeypatch.chdir(tmp_path)
    reproduce["write_tables"](["comparison"], ["0", "1"], tmp_path / "tables")
    table = json.loads((tmp_path / "tables" / "reproduce-comparison.json").read_text())
    assert table["seeds"] == 2
    assert table["methods"].keys() == {"warmup", "sft", "reft"}
    assert table["commit"]
