"""The model before training: RL may choose it on dev, and the final evaluation may include it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from reftune.datasets import load_splits
from reftune.errors import RecipeError
from reftune.model.weights import load_model, scratch_texts
from reftune.recipe import Recipe
from reftune.results.records import read_run
from reftune.results.summary import leader, read_groups, score_table
from reftune.results.tables import headline, render_table, same_models
from reftune.runs.models import check_stage_graph
from reftune.runs.run import evaluate_methods, open_run, run_recipe
from reftune.stages import loop as loop_module
from reftune.stages.loop import Look
from reftune.stages.stage import Progress
from reftune.storage.files import JsonLines

FROM_BASE = {"sft": None, "reft": {"init": "base"}}
OWN = {
    "kind": "self_train",
    "samples": 3,
    "sft": {"epochs": 1, "batch_size": 16, "optimizer": {"learning_rate": 0.05}},
}

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def pretrained(make_recipe: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    """`make` for a model that is read from a folder."""
    recipe = make_recipe()
    model, tokenizer = load_model(
        recipe.model, texts=scratch_texts(recipe.format, load_splits(recipe))
    )
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    path = {"scratch": None, "path": str(tmp_path / "model")}
    return partial(make, make_recipe, path)


def make(
    make_recipe: MakeRecipe,
    model: dict[str, Any],
    *,
    evaluated: list[str] | None = None,
    **changes: Any,
) -> Recipe:
    """A recipe that evaluates `evaluated`, by default all methods."""
    recipe = make_recipe(model=model, evaluate={"samples": 0, "stages": None}, **changes)
    table = recipe.evaluate.model_copy(update={"stages": evaluated})
    return recipe.model_copy(update={"evaluate": table})


def dev_steps(recipe: Recipe, stage: str) -> list[int]:
    rows = JsonLines(recipe.folder / "metrics.jsonl").rows()
    return [row["step"] for row in rows if row["stage"] == stage and "dev/accuracy" in row]


# --- on dev ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "looks_before"),
    [
        (FROM_BASE, True),
        ({"sft": None, "reft": None, "own": {**OWN, "sampler": "base"}}, True),
        ({"reft": None, "own": {**OWN, "sampler": "sft"}}, False),  # it learns from another model
        ({"sft": {"snapshots": None}, "reft": None}, False),
    ],
)
def test_a_stage_that_learns_from_samples_of_a_pretrained_model_evaluates_this_model_first(
    pretrained, stages, looks_before
):
    recipe = pretrained(stages=stages)
    last = [*recipe.stages][-1]
    with open_run(recipe, Progress()) as run:
        for name in recipe.stages:
            run.train(name)
        assert (dev_steps(recipe, last)[0] == 0) == looks_before
        assert run.folder.stage(last).facts()["looks"] == len(dev_steps(recipe, last))


def test_an_untrained_model_is_not_evaluated(make_recipe):
    recipe = make_recipe(stages=FROM_BASE)
    with open_run(recipe, Progress()) as run:
        run.train("reft")
    assert dev_steps(recipe, "reft") == [2, 4]


def test_rl_that_only_harms_a_pretrained_model_keeps_it_and_says_so(pretrained, monkeypatch):
    scores = iter([0.5, 0.4, 0.5])
    monkeypatch.setattr(
        loop_module,
        "look_at_dev",
        lambda context, **_: Look(metrics={"dev/accuracy": next(scores)}),
    )
    recipe = pretrained(stages=FROM_BASE, evaluated=["base", "reft"])
    run_recipe(recipe, progress=Progress())
    run = read_run(recipe.folder)
    assert run.stages["reft"].chosen_step == 0
    assert same_models(run) == ["reft never beat base on dev, so they are the same model"]
    answers = [[row.greedy.completion for row in run.evals[name]] for name in ("base", "reft")]
    assert answers[0] == answers[1]


def test_the_first_evaluation_changes_no_weights(pretrained, monkeypatch, tmp_path):
    def weights(folder: str) -> bytes:
        recipe = pretrained(stages=FROM_BASE, run_dir=str(tmp_path / folder))
        with open_run(recipe, Progress()) as run:
            run.train("reft")
            path = run.folder.stage("reft").checkpoints / "step-000004"
        (tensors,) = path.glob("*.safetensors")
        return tensors.read_bytes()

    found = weights("with")
    monkeypatch.setattr(loop_module, "_is_candidate", lambda context: False)
    assert weights("without") == found


# --- on test --------------------------------------------------------------------------------------


def test_the_report_compares_a_trained_model_with_the_model_before_training(pretrained):
    recipe = pretrained(stages=FROM_BASE, evaluated=["reft", "base"])
    summary = run_recipe(recipe, progress=Progress())
    assert list(summary["methods"]) == ["base", "reft"]
    assert summary["methods"]["base"]["looks"] is None
    assert [(found["a"], found["b"]) for found in summary["comparisons"]] == [("reft", "base")]
    table = score_table(read_groups([recipe.folder]))
    assert table.baseline == "base"
    assert "ReFT" in headline(table).title and "Base model" in headline(table).title
    assert "Models were chosen by dev accuracy (dev evaluations: ReFT 3)" in headline(table).chosen
    assert render_table(table, "text").splitlines()[2].startswith("Base model")
    assert (recipe.folder / "report.html").is_file()
    before = (recipe.folder / "eval" / "base.jsonl").read_bytes()
    assert evaluate_methods(recipe, ["base"], progress=Progress()) == summary
    assert (recipe.folder / "eval" / "base.jsonl").read_bytes() == before


def test_beside_a_supervised_method_the_model_before_training_is_neither_baseline_nor_leader(
    pretrained,
):
    stages = {"sft": {"snapshots": {}}, "reft": {"init": "base"}}
    recipe = pretrained(stages=stages, evaluated=["base", "sft", "reft"])
    run_recipe(recipe, progress=Progress())
    table = score_table(read_groups([recipe.folder]))
    assert table.baseline == "sft"
    best = leader(table)
    assert best is not None and best.label == "reft"


def test_a_finished_run_is_compared_with_the_model_before_training_later(pretrained):
    alone = pretrained(stages=FROM_BASE)
    assert list(run_recipe(alone, progress=Progress())["methods"]) == ["reft"]
    trained = (alone.folder / "eval" / "reft.jsonl").stat().st_mtime_ns
    both = pretrained(stages=FROM_BASE, evaluated=["base", "reft"])
    assert list(evaluate_methods(both, (), progress=Progress())["methods"]) == ["base", "reft"]
    assert (alone.folder / "eval" / "reft.jsonl").stat().st_mtime_ns == trained
    assert not (alone.folder / "eval.1").exists()


def test_samples_of_the_model_before_training_are_voted_on(pretrained):
    recipe = pretrained(stages=FROM_BASE, evaluated=["base", "reft"])
    sampled = recipe.evaluate.model_copy(update={"samples": 2, "sampled": ["base"]})
    recipe = recipe.model_copy(update={"evaluate": sampled})
    summary = run_recipe(recipe, progress=Progress())
    assert "maj@2" in summary["methods"]["base"] and "maj@2" not in summary["methods"]["reft"]


def test_an_untrained_model_is_not_a_method(make_recipe):
    recipe = make(make_recipe, {}, evaluated=["base", "reft"])
    with pytest.raises(
        RecipeError, match=r"evaluate\.stages: base is not a method; known: warmup, sft, reft"
    ):
        check_stage_graph(recipe)
