"""The Python interface: as short as the command line, and the same results."""

import json
import shutil
import subprocess
import sys
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import reftune
from reftune.datasets.jsonl import Jsonl
from reftune.errors import DataError, RecipeError, ReftuneError
from reftune.grading.formats.nl import Nl
from reftune.recipe import dump_recipe
from reftune.runs.export import export_model
from reftune.types import Answer


def test_grade_judges_as_the_reward_does():
    right = reftune.grade("7 · 3 = 21, so the answer is 21.0", 21)
    assert (right.verdict, right.value) == (reftune.Verdict.CORRECT, "21")
    assert (
        reftune.grade("The answer is (b)", "4", choices=["3", "4"]).verdict
        is reftune.Verdict.CORRECT
    )
    assert (
        reftune.grade("def solution():\n    return 6 * 7", 42, format="program").verdict
        is reftune.Verdict.CORRECT
    )
    wrong = reftune.grade("The answer is 20", 21)
    assert wrong.verdict is reftune.Verdict.WRONG
    assert "21" in wrong.reason


def test_grade_reads_gold_and_completion_with_the_decimal_separator_of_the_format():
    comma = {"kind": "nl", "decimal": ","}
    for gold in "3,5", "3,50", "1.003,5":
        assert (
            reftune.grade(f"The answer is {gold}", gold, format=comma).verdict
            is reftune.Verdict.CORRECT
        )
    assert (
        reftune.grade("The answer is 1.500", "1.5", format=comma).verdict is reftune.Verdict.WRONG
    )


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        *[("n", "n log n"), ("I", "I, Robot"), ("x", "(x)"), ("b", "(B)"), ("B", "B) 12")],
        *[("π", "π"), ("五", "五"), ("Ω", "Ω"), ("ß", "ß"), (True, "True"), ("B)", "B")],
    ],
)
def test_grade_reads_a_gold_as_the_dataset_does(tmp_path: Path, gold: object, answer: str):
    (tmp_path / "data.jsonl").write_text(json.dumps({"question": "q", "answer": gold}))
    dataset = Jsonl(kind="jsonl", train=str(tmp_path / "data.jsonl"), dev_size=0)
    (problem,) = dataset.load(seed=0).train
    completion = f"The answer is {answer}"
    assert reftune.grade(completion, gold) == Nl().grade([problem], [completion])[0]


ARRAYS = {"text": np.array(["red", "blue"], dtype=object), "label": np.array(["A", "B"])}


@pytest.mark.parametrize(
    ("choices", "value"),
    [
        *[({"text": ["red", "blue"], "label": ["A", "B"]}, "a"), ({"A": "red", "B": "blue"}, "a")],
        *[({"B": "blue", "A": "red"}, "b"), (ARRAYS, "a"), ('["red", "blue"]', "a")],
        ([{"text": "red", "label": "A"}, {"text": "blue", "label": "B"}], "a"),
        *[(iter(["red", "blue"]), "a"), (np.array(["red", "blue"]), "a")],
    ],
)
def test_grade_reads_options_in_every_layout_of_the_data(choices: Any, value: str):
    graded = reftune.grade("The answer is red", "A", choices=choices)
    assert (graded.verdict, graded.value) == (reftune.Verdict.CORRECT, value)


@pytest.mark.parametrize("choices", [None, (), [], {}, ""])
def test_grade_without_options_reads_the_answer_as_text(choices: Any):
    assert reftune.grade("The answer is red", "red", choices=choices).value == "red"


@pytest.mark.parametrize("choices", ["red or blue", 5, {"A": "red"}, ["red", None], object()])
def test_grade_refuses_options_that_it_cannot_read(choices: Any):
    with pytest.raises(DataError, match=r"^grade: choices is .*; expected a list of 2 to 26"):
        reftune.grade("The answer is red", "A", choices=choices)


def test_bad_arguments_of_grade_are_reported_in_one_line():
    with pytest.raises(RecipeError, match=r"^format: nll: unknown kind; did you mean nl"):
        reftune.grade("x", 1, format="nll")
    with pytest.raises(DataError, match=r"^grade: answer is nan; expected a number"):
        reftune.grade("x", float("nan"))
    for completion in (None, 3, ["3"]):
        with pytest.raises(DataError, match=r"^grade: completion is .*; expected text$"):
            reftune.grade(completion, 3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one tiny supervised stage."""
    folder = tmp_path_factory.mktemp("api") / "run"
    recipe = {
        "name": "tiny",
        "run_dir": str(folder),
        "model": {"scratch": {"hidden_size": 16, "layers": 1, "heads": 2, "context": 64}},
        "dataset": {"kind": "word_problems", "train": 12, "dev": 4, "test": 4, "distractors": 0},
        "format": "program",
        "lengths": {"max_new": 20},
        "stages": {
            "sft": {
                "kind": "sft",
                "epochs": 1,
                "batch_size": 6,
                "optimizer": {"learning_rate": 0.01},
            }
        },
    }
    assert reftune.run(recipe)["methods"]["sft"]["n"] == 4
    return folder


def test_run_takes_a_file_with_overrides_and_resumes(finished: Path, tmp_path: Path):
    from reftune.recipe import load_recipe

    (tmp_path / "tiny.yaml").write_text(dump_recipe(load_recipe(finished / "recipe.yaml")))
    started = (finished / "stages" / "sft" / "stage.json").stat().st_mtime
    summary = reftune.run(tmp_path / "tiny.yaml", f"run_dir={finished}")
    assert summary["methods"]["sft"]["n"] == 4
    assert (finished / "stages" / "sft" / "stage.json").stat().st_mtime == started, (
        "what is done is not done again"
    )
    with pytest.raises(RecipeError, match="seed=1: overrides work only with a recipe file"):
        reftune.run(load_recipe(tmp_path / "tiny.yaml"), "seed=1")


def test_evaluate_answers_as_the_run_did(finished: Path):
    from reftune.storage.files import JsonLines

    rows = JsonLines(finished / "eval" / "sft.jsonl").rows()
    problems = [
        {"id": row["id"], "question": row["question"], "answer": row["gold"]} for row in rows
    ]
    result = reftune.evaluate(finished / "stages" / "sft", problems)
    assert [completion.text for completion in result.completions] == [
        row["greedy"]["completion"] for row in rows
    ]
    assert [graded.verdict.value for graded in result.graded] == [
        row["greedy"]["verdict"] for row in rows
    ]
    assert result.n == 4
    assert result.ci95[0] <= result.accuracy <= result.ci95[1]


def changed(finished: Path, to: Path, **tables: dict) -> Path:
    """The stage folder of a copy of a run whose recipe has other keys in some tables."""
    copied = Path(shutil.copytree(finished, to))
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    for name, keys in tables.items():
        recipe[name] |= keys
    (copied / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return copied / "stages" / "sft"


def test_evaluate_finds_the_recipe_of_a_stage_folder_however_it_is_named(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stage = finished / "stages" / "sft"
    (tmp_path / "link").symlink_to(stage)
    (tmp_path / "other" / "stages").mkdir(parents=True)  # a run whose stage lies elsewhere
    shutil.copy(finished / "recipe.yaml", tmp_path / "other")
    moved = shutil.copytree(stage, tmp_path / "moved")
    (tmp_path / "other" / "stages" / "sft").symlink_to(moved)
    monkeypatch.setenv("HOME", str(finished))
    named = [
        *[(finished, "stages/sft"), (stage.parent, "sft"), (stage.parent, Path("sft"))],
        *[(stage, "."), (stage, "../sft"), (tmp_path, "link"), (tmp_path, "~/stages/sft")],
        (tmp_path, "other/stages/sft"),
    ]
    problem = {"question": "Eva has 19 drums.", "answer": 19}
    for folder, name in named:
        monkeypatch.chdir(folder)
        (graded,) = reftune.evaluate(name, [problem]).graded
        assert "solution()" in graded.reason, name  # as the format `program` says
    monkeypatch.chdir(stage.parent)
    (tmp_path / "stages").symlink_to(tmp_path)  # a folder `stages` that belongs to no run
    (graded,) = reftune.evaluate(tmp_path / "stages" / "moved", [problem], max_new=2).graded
    assert "solution()" not in graded.reason


@pytest.mark.parametrize(
    ("written", "message"),
    [
        *[(text, "not the recipe of a run: it has no stages") for text in ("", "- a", "5", "a: 1")],
        *[("a: [1", "not valid YAML"), ("a: 2026-13-01", "cannot be read: month must")],
    ],
)
def test_evaluate_reports_a_damaged_recipe_of_the_run(
    written: Any, message: str, finished: Path, tmp_path: Path
):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "sft").symlink_to(finished / "stages" / "sft")
    text = written if isinstance(written, str) else yaml.safe_dump(written)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        reftune.evaluate(tmp_path / "stages" / "sft", [{"question": "q", "answer": 1}])


@pytest.mark.parametrize("too_long", ["drop", "refuse"])
def test_evaluate_refuses_a_max_new_that_leaves_no_room_for_a_prompt(
    too_long: str, finished: Path, tmp_path: Path
):
    problem = {"question": "Eva has 19 drums.", "answer": 19}
    refused = "^max_new: 64; expected less than the model's context of 64 tokens"
    default = "; this is the default, and `max_new=…` sets another"
    for name, max_new in (("recipe", 64), ("argument", 20)):
        message = f"{refused}{default if name == 'recipe' else ''}$"
        limits = {"max_new": max_new, "too_long": too_long}
        folder = changed(finished, tmp_path / name, lengths=limits)
        with pytest.raises(RecipeError, match=message):
            reftune.evaluate(folder, [problem], max_new=None if name == "recipe" else 64)
        assert len(reftune.evaluate(folder, [problem], max_new=3).completions[0].token_ids) > 1


def test_evaluate_names_the_default_max_new_of_a_model_that_no_run_trained(make_policy):
    policy = make_policy("llama")
    assert policy.context <= 256
    with pytest.raises(
        RecipeError, match=r"^max_new: 256; .*; this is the default, and `max_new=…"
    ):
        reftune.evaluate(policy, [{"question": "wa wb", "answer": 3}])


def test_an_export_is_evaluated_with_the_format_and_limits_of_its_run(
    finished: Path, tmp_path: Path
):
    stage = changed(finished, tmp_path / "run", model={"dtype": "bfloat16"})
    out = export_model(tmp_path / "run", "sft", tmp_path / "model")
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert json.loads((out / "reftune.json").read_text()) == {
        "format": recipe["format"],
        "lengths": recipe["lengths"],
        "model": {"dtype": "bfloat16"},
    }
    problem = {"question": "Eva has 19 drums.", "answer": 19}
    ours, theirs = (reftune.evaluate(folder, [problem]) for folder in (stage, out))
    assert (ours.completions, ours.graded) == (theirs.completions, theirs.graded)
    assert len(reftune.evaluate(out, [problem], max_new=3).completions[0].token_ids) <= 3


@pytest.mark.parametrize(
    "stored", ["own.py:Own", {"kind": "own.py:Own"}, {"kind": "nl", "grading": "own.py:Own"}]
)
def test_evaluate_runs_no_code_that_an_exported_folder_names(
    stored: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(finished / "stages" / "sft", tmp_path / "model")
    (tmp_path / "own.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    (folder / "reftune.json").write_text(json.dumps({"format": stored}))
    problem = {"question": "Eva has 19 drums.", "answer": 19}
    with pytest.raises(RecipeError, match=r"own\.py:Own, which is not loaded; pass `format`$"):
        reftune.evaluate(folder, [problem])
    assert reftune.evaluate(folder, [problem], format="nl", max_new=2).n == 1
    assert not Path("ran").exists()
    (folder / "reftune.json").write_text("{")
    with pytest.raises(DataError, match=r"reftune\.json: not JSON"):
        reftune.evaluate(folder, [problem])


@pytest.mark.parametrize(
    "stored",
    [
        *[{"format": 5}, {"format": ["nl"]}, {"format": {"kind": 3}}, {"lengths": 5}],
        *[{"lengths": {"max_new": "x"}}, {"lengths": {"max_mew": 4}}],
        *[{"model": "x"}, {"model": {"dtype": "zz"}}],
    ],
)
def test_evaluate_refuses_settings_that_no_export_writes(
    stored: Any, finished: Path, tmp_path: Path
):
    folder = shutil.copytree(finished / "stages" / "sft", tmp_path / "model")
    (folder / "reftune.json").write_text(json.dumps(stored))
    problem = {"question": "Eva has 19 drums.", "answer": 19}
    with pytest.raises(
        DataError, match=r"^.*reftune\.json: expected what reftune export writes: .*$"
    ):
        reftune.evaluate(folder, [problem])


def test_an_exported_folder_does_not_weaken_the_sandbox(tmp_path: Path):
    stored = {"kind": "program", "sandbox": "subprocess", "allow_unisolated": True}
    (tmp_path / "reftune.json").write_text(json.dumps({"format": stored}))
    settings = import_module("reftune.api")._exported(str(tmp_path), has_format=False)
    assert settings["format"] == {"kind": "program", "sandbox": "subprocess"}


@pytest.mark.parametrize("model", [None, 5, object(), ["stages/sft"], Nl])
def test_evaluate_refuses_what_is_not_a_model(model: Any):
    with pytest.raises(RecipeError, match=r"^model: .*; expected a folder, Hub id or Policy$"):
        reftune.evaluate(model, [{"question": "q", "answer": 1}])


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        *[(["1+1?"], "problem 0 is '1\\+1\\?'"), ([None], "problem 0 is None")],
        *[
            ({"question": "q", "answer": 1}, "problem 0 is 'question'"),
            ("1+1?", "problem 0 is '1'"),
        ],
        *[(5, "problems is 5; expected a list"), (None, "problems is None; expected a list")],
        *[(np.array(["q"]), "problem 0 is "), (iter([]), "no problems; expected at least one")],
        ([{"question": "\ud83d", "answer": 1}], "half a surrogate pair"),
    ],
)
def test_evaluate_refuses_what_are_not_problems(problems: Any, message: str, make_policy):
    with pytest.raises(ReftuneError, match=message):
        reftune.evaluate(make_policy("llama"), problems)


def test_evaluate_takes_any_iterable_of_problems(make_policy):
    row = {"question": "wa wb", "answer": "A", "choices": np.array(["wa", "wb"])}
    for problems in (iter([row]), (row,), np.array([row])):
        (problem,) = reftune.evaluate(make_policy("llama"), problems, max_new=2).problems
        assert problem.choices == ("wa", "wb")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_evaluate_computes_in_the_dtype_of_the_run(
    dtype: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import torch

    from reftune.runs import auto
    from reftune.stages.rollouts import Collector

    used = []

    def solve(collector: Collector, policy, problems):
        used.append(policy.compute_dtype)
        return solve_really(collector, policy, problems)

    solve_really = Collector.solve
    monkeypatch.setattr(Collector, "solve", solve)
    monkeypatch.setattr(auto, "fastest_dtype", lambda device: "bfloat16")
    folder = changed(finished, tmp_path / "run", model={"dtype": dtype})
    problem = {"question": "Eva has 19 drums.", "answer": 19}
    reftune.evaluate(folder, [problem], max_new=2)
    elsewhere = shutil.copytree(folder, tmp_path / "model")  # a folder that belongs to no run
    reftune.evaluate(elsewhere, [problem], max_new=2)
    assert used == [torch.float32 if dtype == "float32" else torch.bfloat16, torch.bfloat16]


def test_evaluate_leaves_a_prompt_that_is_too_long_unanswered_if_the_run_does(
    finished: Path, tmp_path: Path
):
    short = {"question": "Eva has 19 drums.", "answer": 19}
    longer = {"question": "Eva has 19 drums. " * 3, "answer": 57}
    longest = {"question": "Eva has 19 drums. " * 40, "answer": 760}
    limit = {"max_new": 20, "max_prompt": 12}
    drops = changed(finished, tmp_path / "drops", lengths={**limit, "too_long": "drop"})
    result = reftune.evaluate(drops, [short, longer, longest])
    assert [c.finish_reason == "length" and not c.text for c in result.completions[1:]] == [
        True
    ] * 2
    assert len(result.completions[0].token_ids) > 1
    alone = reftune.evaluate(drops, [short, longer], max_new=3)
    assert len(alone.completions[0].token_ids) <= 3 and not alone.completions[1].text
    refuses = changed(finished, tmp_path / "refuses", lengths={**limit, "too_long": "refuse"})
    assert len(reftune.evaluate(refuses, [longer]).completions[0].token_ids) > 1
    with pytest.raises(DataError, match="problem 0: prompt of"):
        reftune.evaluate(refuses, [longest])


def test_evaluate_takes_a_policy_and_problems(make_policy):
    answer = Answer(kind="number", value=Fraction(3))
    problem = reftune.Problem(id="p", question="wa wb", answer=answer)
    result = reftune.evaluate(make_policy("llama"), [problem], max_new=3)
    assert len(result.completions[0].token_ids) <= 3
    assert result.accuracy == 0.0
    with pytest.raises(RecipeError, match="no problems"):
        reftune.evaluate(make_policy("llama"), [])
    with pytest.raises(RecipeError, match="max_new: 0; expected a positive number of tokens"):
        reftune.evaluate(make_policy("llama"), [problem], max_new=0)
    with pytest.raises(DataError, match="problem 0: question is None; expected text"):
        reftune.evaluate(make_policy("llama"), [{"prompt": "2 + 3?", "answer": 5}])
    rows = [{"id": 7, "question": question, "answer": 3} for question in ("wa", "wb")]
    with pytest.raises(DataError, match="problem 7: two problems have this id"):
        reftune.evaluate(make_policy("llama"), rows)
    assert reftune.evaluate(make_policy("llama"), [problem] * 2, max_new=3).n == 2


def test_evaluate_reads_rows_with_the_decimal_separator_of_the_format(make_policy):
    row, comma = {"question": "wa wb", "answer": "1,250"}, {"kind": "nl", "decimal": ","}
    result = reftune.evaluate(make_policy("llama"), [row], format=comma, max_new=3)
    assert result.problems[0].answer.value == Fraction("1.25")


def test_the_package_is_imported_fast():
    code = (
        "import sys, reftune; assert {'run', 'grade', 'evaluate'} <= set(dir(reftune)); assert not"
        " {'torch', 'pydantic', 'yaml'} & set(sys.modules), 'import reftune is heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_its_names_work_whatever_was_imported_before(monkeypatch: pytest.MonkeyPatch):
    for name in ("runs.run", "runs.evaluation", "terminal.cli"):
        import_module(f"reftune.{name}")
    assert {"run", "grade", "evaluate"} <= set(dir(reftune))
    assert callable(reftune.grade)
    monkeypatch.setattr("reftune.api.run", lambda *args, **keys: 5)
    monkeypatch.setattr("reftune.api.evaluate", lambda *args, **keys: 6)
    assert (reftune.run("x"), reftune.evaluate("m", [])) == (5, 6)
    with pytest.raises(AttributeError, match="no attribute 'rum'"):
        _ = reftune.rum


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["/x/bin/reftune", "run", "a.yaml", "b={c: d}"], "reftune run a.yaml 'b={c: d}'"),
        (["/x/reftune/__main__.py", "demo"], "reftune demo"),
        (["benchmarks/reproduce.py", "0", "1"], "python benchmarks/reproduce.py 0 1"),
    ],
)
def test_the_recorded_command_can_be_run_again(
    monkeypatch: pytest.MonkeyPatch, typed: list[str], told: str
):
    from reftune.storage.run_folder import command

    monkeypatch.setattr(sys, "argv", typed)
    assert command() == told


def test_answers_of_every_kind_are_graded() -> None:
    right = reftune.grade("The answer is Akkra.", ["Accra", "Akkra"], answer_kind="any_of")
    wrong = reftune.grade("The answer is 2, 1", [1, 2], answer_kind="list")
    assert right.verdict is reftune.Verdict.CORRECT
    assert wrong.verdict is reftune.Verdict.WRONG
    with pytest.raises(DataError, match="answer_kind: any_of"):
        reftune.grade("The answer is 2, 1", [1, 2])
