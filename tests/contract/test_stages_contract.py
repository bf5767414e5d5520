"""The contract of every stage. A new file in src/reftune/stages joins automatically: its smallest
table of keys is made from its fields."""

from __future__ import annotations

import json
from typing import Any

import pytest

from reftune.errors import RecipeError
from reftune.recipe import Table, component_class, known_kinds
from reftune.runs.run import open_run, run_recipe
from reftune.stages.stage import Cost, Progress, Stage
from reftune.storage.files import JsonLines

KNOWN: dict[str, Any] = {
    "init": "sft",
    "sampler": "warmup",
    "samples": 2,
    "dev_samples": 2,
    "epochs": 1,
    "batch_size": 8,
    "learning_rate": 0.01,
}
"""Values of keys by name, in any stage; all other required keys are 2."""


def smallest(table: type[Table]) -> dict[str, Any]:
    """The smallest table: `KNOWN` keys, and those that are required."""
    keys: dict[str, Any] = {}
    for name, field in table.model_fields.items():
        if name in KNOWN:
            keys[name] = KNOWN[name]
        elif field.is_required():
            is_table = isinstance(field.annotation, type) and issubclass(field.annotation, Table)
            keys[name] = smallest(field.annotation) if is_table else 2
    return keys


KINDS = known_kinds("stages")
KEYS = {kind: smallest(component_class(kind, group="stages")) for kind in KINDS}
"""The smallest stage of each kind that starts from the model of stage `sft`."""
each_stage = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def recipe_of(make_recipe):
    def make(kind: str) -> Any:
        stages = {"reft": None, "tried": {"kind": kind, **KEYS[kind]}}
        return make_recipe(stages=stages, evaluate={"samples": 0, "stages": ["sft"]})

    return make


def test_the_suite_finds_the_stages_by_their_files() -> None:
    assert {"sft", "rl", "self_train", "reward_model"} <= set(KINDS)


@each_stage
def test_a_stage_leaves_a_model_and_what_it_cost(kind: str, recipe_of) -> None:
    recipe = recipe_of(kind)
    with open_run(recipe, Progress()) as run:
        run.train("sft")
        run.train("tried")
        folder = run.folder.stage("tried")
        assert folder.is_done and run.is_trained("tried")
        info = json.loads(folder.info.read_text())
        assert (info["kind"], info["init"]) == (kind, "sft")
        assert info["is_method"] == recipe.stages["tried"].is_method
        assert info["sequence_passes"] > 0 and info["train_tokens"] > 0
        assert (folder.path / "model.safetensors").is_file()
        run.models.load("tried")
        steps = [
            row["step"] for row in JsonLines(run.folder.metrics).rows() if row["stage"] == "tried"
        ]
        assert steps and max(steps) == info["steps"]


@each_stage
def test_a_stage_that_is_done_is_not_trained_again(kind: str, recipe_of) -> None:
    recipe = recipe_of(kind)
    with open_run(recipe, Progress()) as run:
        run.train("sft")
        run.train("tried")
        before = run.folder.metrics.read_bytes()
        run.train("tried")
        assert run.folder.metrics.read_bytes() == before


@each_stage
def test_a_stage_names_what_it_reads(kind: str, recipe_of) -> None:
    stage: Stage = recipe_of(kind).stages["tried"]
    assert stage.init in stage.needs
    assert set(stage.needs) == {
        value for key, value in KEYS[kind].items() if key in ("init", "sampler")
    }


@each_stage
def test_only_methods_are_evaluated(kind: str, recipe_of) -> None:
    recipe = recipe_of(kind)
    every = recipe.model_copy(
        update={"evaluate": recipe.evaluate.model_copy(update={"stages": None})}
    )
    assert ("tried" in every.methods_to_evaluate) == recipe.stages["tried"].is_method


OWN = """
from typing import ClassVar

from reftune.stages.sft import Schedule, gold_examples, imitation, train_in_epochs
from reftune.stages.stage import Stage


class Judge(Schedule, Stage):
    is_method: ClassVar[bool] = False

    @property
    def produces(self):
        return ("early",)

    def run(self, context):
        examples = gold_examples(context.splits.train, context.collector, context.policy)
        task = imitation(context.policy, examples)
        train_in_epochs(self, context, task, snapshots={"early": 1})
"""


def test_a_run_with_an_own_stage_that_is_no_method_is_finished(make_recipe, tmp_path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    keys = {"epochs": 2, "batch_size": 8, "optimizer": {"learning_rate": 0.01}}
    judge = {"kind": f"{tmp_path}/own.py:Judge", **keys}
    stages = {"sft": None, "reft": None, "judge": judge}
    recipe = make_recipe(stages=stages, evaluate={"samples": 0, "stages": None})
    summary = run_recipe(recipe, progress=Progress())
    assert list(summary["methods"]) == ["early"]
    assert (recipe.folder / "summary.json").is_file()


@pytest.mark.parametrize(
    ("written", "missing"),
    [("", "kind, init, .*, looks"), ('{"kind": "x", "init": "base"}', "steps, ")],
)
def test_an_own_stage_that_does_not_describe_itself_is_named(
    make_recipe, tmp_path, written: str, missing: str
) -> None:
    write = f"context.folder.info.write_text({written!r})" if written else "pass"
    (tmp_path / "own.py").write_text(
        "from reftune.stages.stage import Stage\n\nclass Idle(Stage):\n"
        "    def run(self, context):\n"
        f"        context.folder.path.mkdir(parents=True)\n        {write}\n"
    )
    stages = {"sft": None, "reft": None, "idle": {"kind": f"{tmp_path}/own.py:Idle"}}
    recipe = make_recipe(stages=stages, evaluate={"samples": 0, "stages": None})
    with pytest.raises(RecipeError, match=rf"stages.idle: .*:Idle must write .* with {missing}"):
        run_recipe(recipe, progress=Progress())


@each_stage
def test_a_stage_states_its_plan_and_its_cost(kind: str, recipe_of) -> None:
    stage: Stage = recipe_of(kind).stages["tried"]
    assert "sft" in stage.line() and "\n" not in stage.line()
    small, large = stage.cost(num_train=24, num_dev=8), stage.cost(num_train=48, num_dev=8)
    assert isinstance(small, Cost) and isinstance(large, Cost)
    assert small.steps > 0 and small.batch > 0 and small.looks > 0
    assert large.steps >= small.steps and large.sampled_before >= small.sampled_before
    assert (small.sampled + small.sampled_before > 0) == stage.reads_questions
