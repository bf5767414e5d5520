"""Run folders are read whole, or rejected in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from reftune.errors import DataError
from reftune.results.records import read_run, read_runs
from reftune.results.tables import same_models
from reftune.types import Verdict

WriteRun = Callable[..., Path]


def refused(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_run(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_run_is_read_in_the_recipes_order(write_run: WriteRun) -> None:
    run = read_run(write_run(num_problems=7, num_samples=3))
    assert list(run.stages) == list(run.evals) == ["warmup", "sft", "reft"]
    assert (run.name, run.seed, run.split, run.missing) == ("demo", 0, "test", ())
    assert len(run.evals["reft"]) == 7
    assert len(run.evals["reft"][0].samples) == 3
    assert isinstance(run.evals["reft"][0].greedy.graded.verdict, Verdict)
    assert run.stages["reft"].init == "warmup"
    assert next(iter(run.stages["reft"].samples)).tokens[-1] == "<eos>"


def test_training_and_evaluation_lines_of_a_step_are_one_row(write_run: WriteRun) -> None:
    row = next(row for row in read_run(write_run()).stages["reft"].metrics if row.step == 5)
    assert {"reward/mean", "dev/accuracy"} <= set(row.values)


def test_the_last_metrics_of_a_repeated_step_count(write_run: WriteRun) -> None:
    folder = write_run()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "reft", "step": 5, "time": 0, "reward/mean": 0.125}) + "\n")
    rows = [row for row in read_run(folder).stages["reft"].metrics if row.step == 5]
    assert [row.values["reward/mean"] for row in rows] == [0.125]


def test_a_line_still_being_written_is_left_for_later(write_run: WriteRun) -> None:
    folder = write_run()
    before = read_run(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "reft", "st')
    assert read_run(folder).stages == before.stages


@pytest.mark.parametrize("file", ["metrics.jsonl", "eval/sft.jsonl", "stages/reft/samples.jsonl"])
def test_a_line_cut_inside_a_character_is_left_for_later(write_run: WriteRun, file: str) -> None:
    folder = write_run()

    def lines() -> Any:
        run = read_run(folder)
        return run.stages["reft"].metrics, run.evals["sft"], list(run.stages["reft"].samples)

    before = lines()
    for cut in (b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98"):  # of "é", "€" and "😀"
        with (folder / file).open("ab") as whole:
            whole.write(b'{"stage": "' + cut)
        assert lines() == before


@pytest.mark.parametrize("file", ["data.json", "env.json", "stages/sft/stage.json"])
@pytest.mark.parametrize("content", [b'{"a": "\xc3', b'{"a": "\xff"}', b"[" * 100_000, b"9" * 5000])
def test_a_damaged_json_file_is_named(write_run: WriteRun, file: str, content: bytes) -> None:
    folder = write_run()
    (folder / file).write_bytes(content)
    assert f"{file}: not JSON: " in refused(folder)


def test_methods_not_evaluated_yet_are_missing(write_run: WriteRun) -> None:
    run = read_run(write_run(evaluated=["warmup", "sft"]))
    assert run.missing == ("reft",)
    with pytest.raises(
        DataError,
        match=r"^.*demo: the run has not finished: no evaluation of reft; `reftune run`[^\n]*$",
    ):
        read_runs([run.folder])


def test_a_snapshot_is_a_method_before_its_stage(write_run: WriteRun) -> None:
    folder = write_run()
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    del recipe["stages"]["warmup"]
    recipe["stages"]["sft"] |= {"init": "base", "snapshots": {"warmup": 27}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    run = read_run(folder)
    assert list(run.evals) == ["warmup", "sft", "reft"]
    assert not run.missing


def test_an_evaluation_being_written_counts_as_missing(write_run: WriteRun) -> None:
    folder = write_run()
    path = folder / "eval" / "reft.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:10]))
    run = read_run(folder)
    assert (list(run.evals), run.missing) == (["warmup", "sft"], ("reft",))


def test_the_only_evaluation_counts_as_missing_while_it_is_written(write_run: WriteRun) -> None:
    folder = write_run(methods=["warmup"], num_problems=24)
    data = {"problems": {"train": 1000, "dev": 300, "test": 40}}
    (folder / "data.json").write_text(json.dumps(data))
    assert read_run(folder).missing == ("warmup",)
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace("evaluate:\n", "evaluate:\n  limit: 24\n"))
    assert not read_run(folder).missing


def test_a_reward_model_is_not_evaluated(write_run: WriteRun) -> None:
    folder = write_run()
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["stages"]["judge"] = {"kind": "reward_model", "init": "sft"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert not read_run(folder).missing


def test_a_stage_says_itself_that_it_is_no_method_and_which_snapshots_it_saved(
    write_run: WriteRun,
) -> None:
    folder = write_run()
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["stages"]["sft"]["kind"] = "own.py:Stage"
    del recipe["stages"]["warmup"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    for name, facts in {"sft": {"is_method": False}, "warmup": {"snapshot_of": "sft"}}.items():
        path = folder / "stages" / name / "stage.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
    run = read_run(folder)
    assert list(run.stages) == ["warmup", "sft", "reft"]
    assert (list(run.evals), run.missing) == (["warmup", "reft"], ())


def test_only_chosen_stages_must_be_evaluated(write_run: WriteRun) -> None:
    folder = write_run(evaluated=["reft"])
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(
        recipe.replace("evaluate:\n", "evaluate:\n  stages: [reft]\n")
    )
    assert not read_run(folder).missing


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere").endswith("nowhere: no such run folder")


def test_a_folder_without_recipe_is_no_run(tmp_path: Path) -> None:
    assert refused(tmp_path).endswith("not a run folder: it has no recipe.yaml")


@pytest.mark.parametrize(
    ("recipe", "complaint"),
    [
        ("just text", ": not the recipe of a run: it has no stages"),
        ("stages: 3", ": not the recipe of a run: it has no stages"),
        ("name: x", ": not the recipe of a run: it has no stages"),
        ("a: [", ": not valid YAML"),
        ("begun: 2026-13-01", ": cannot be read: month must be in"),
        ("[" * 2000, ": cannot be read: "),
    ],
)
def test_a_foreign_recipe_is_refused(tmp_path: Path, recipe: str, complaint: str) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert f"recipe.yaml{complaint}" in refused(tmp_path)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{oops}", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"id": "x"}', "question is missing"),
        (
            (
                '{"id": "x", "question": "q", "gold": "1", "greedy": {"verdict": "maybe",'
                ' "completion": ""}}'
            ),
            "'maybe'",
        ),
        ('{"id": "x", "question": "q", "gold": "1", "greedy": null}', "expected a line"),
        ('{"id": "x", "question": "q", "gold": "1", "greedy": [1]}', "expected a line"),
        ('{"id": "x", "question": "\udcff"}', "not JSON: 'utf-8' codec"),
    ],
)
def test_a_damaged_line_is_named_with_its_number(
    write_run: WriteRun, line: str, complaint: str
) -> None:
    folder = write_run(num_problems=3)
    with (folder / "eval" / "sft.jsonl").open("a", errors="surrogateescape") as file:
        file.write(line + "\n")
    message = refused(folder)
    assert "sft.jsonl:4" in message
    assert complaint in message


@pytest.mark.parametrize("step", ["null", '"abc"', "[]", "NaN", "Infinity"])
def test_a_step_that_is_no_number_is_a_damaged_line(write_run: WriteRun, step: str) -> None:
    folder = write_run()
    samples = folder / "stages" / "reft" / "samples.jsonl"
    for path in (samples, folder / "metrics.jsonl"):
        line = json.loads(path.read_text().partition("\n")[0])
        del line["step"]
        path.write_text(json.dumps(line)[:-1] + f', "step": {step}}}\n')
    assert "metrics.jsonl:1: " in (message := refused(folder)) and "correct, wrong" not in message
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match=r"samples\.jsonl:1: .*; expected a line as reftune writes"):
        list(read_run(folder).stages["reft"].samples)


@pytest.mark.parametrize("damage", [{"greedy": 7}, {"samples": 3}, {"samples": [None]}])
def test_damaged_attempts_are_named_with_their_line(
    write_run: WriteRun, damage: dict[str, Any]
) -> None:
    folder = write_run()
    path = folder / "eval" / "sft.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | damage), *others, ""]))
    assert "sft.jsonl:1: " in refused(folder)


def test_an_empty_evaluation_is_refused(write_run: WriteRun) -> None:
    folder = write_run()
    (folder / "eval" / "sft.jsonl").write_text("")
    assert "sft.jsonl: no evaluated problem" in refused(folder)


def test_methods_that_are_one_model_are_named(write_run: WriteRun) -> None:
    folder = write_run()

    def lines(**chosen: dict[str, Any]) -> list[str]:
        for method, changed in chosen.items():
            path = folder / "stages" / method / "stage.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
        return same_models(read_run(folder))

    assert lines() == []
    assert lines(warmup={"snapshot_of": "sft", "chosen_step": 30}, sft={"chosen_step": 40}) == []
    assert lines(sft={"chosen_step": 30}) == [
        "sft was best on dev when warmup was saved: they are the same model"
    ]
    assert lines(sft={"chosen_step": 40}, reft={"chosen_step": 0}) == [
        "reft never beat warmup on dev, so they are the same model"
    ]
