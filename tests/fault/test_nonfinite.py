"""A non-finite number stops or skips the step before the optimizer, in every training stage."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crash import EVERY_STAGE, assert_same_outcome, outcome, run_all
from reftune.errors import NonFiniteError
from reftune.model.value_head import fit_value_head
from reftune.recipe import Recipe
from reftune.runs.run import open_run
from reftune.stages.loop import Loop
from reftune.stages.reward_model import Classifier, Judged
from reftune.stages.stage import Progress
from reftune.storage.files import JsonLines

pytestmark = pytest.mark.fault

MakeRecipe = Callable[..., Recipe]

STAGES = {"sft": "sft", "reft": "reft", "judge": "reward_model"}


def poison(patch: pytest.MonkeyPatch, stage: str, steps: set[int]) -> None:
    """Make every gradient NaN in some steps of a stage."""
    from reftune.stages import loop

    now: list[Any] = [None]
    take = Loop._take

    def watched(self: Loop, step: Any) -> None:
        now[0] = (self.context.name, self.state.step + 1)
        take(self, step)

    def poisoned(original: Callable[..., float]) -> Callable[..., float]:
        def step(model: Any, optimizer: Any, **settings: Any) -> float:
            if now[0] in {(stage, step) for step in steps}:
                next(p for p in model.parameters() if p.grad is not None).grad[0] = math.nan
            return original(model, optimizer, **settings)

        return step

    patch.setattr(Loop, "_take", watched)
    patch.setattr(loop, "optimizer_step", poisoned(loop.optimizer_step))


def train(recipe: Recipe, *stages: str) -> None:
    with open_run(recipe, Progress()) as run:
        for stage in stages:
            run.train(stage)


def rows_of(recipe: Recipe, stage: str) -> list[dict[str, Any]]:
    return [
        row for row in JsonLines(recipe.folder / "metrics.jsonl").rows() if row["stage"] == stage
    ]


def assert_finite_weights(folder: Path) -> None:
    from safetensors.torch import load_file

    for path in folder.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path


def test_a_non_finite_step_stops_the_run_which_resumes_to_the_same_bits(
    make_recipe, tmp_path, monkeypatch
):
    straight = make_recipe(run_dir=str(tmp_path / "straight"))
    run_all(straight)
    recipe = make_recipe()
    with monkeypatch.context() as patch:
        poison(patch, "reft", {3})
        with pytest.raises(NonFiniteError) as error:
            run_all(recipe)
    saved = recipe.folder / "stages" / "reft" / "nonfinite-000003.json"
    assert str(error.value).startswith("reft step 3: gradient norm is nan: the gradient of ")
    assert str(error.value).endswith(
        f"; the weights were not changed; look at the samples in {saved}"
    )
    document = json.loads(saved.read_text())
    assert len(document["rows"]) == 8 and document["weights_not_finite"] == []
    assert_finite_weights(recipe.folder)
    saved.unlink()
    run_all(recipe)
    assert_same_outcome(recipe.folder, outcome(straight.folder))


@pytest.mark.parametrize("stage", ["sft", "reft", "judge"])
def test_non_finite_steps_are_skipped_if_the_recipe_allows_it(make_recipe, monkeypatch, stage):
    before = {"sft": (), "reft": ("sft",), "judge": ("sft",)}[stage]
    recipe = make_recipe(**with_skips(stage, max_skipped=2))
    poison(monkeypatch, stage, {2, 3})
    train(recipe, *before, stage)
    counts = {
        row["step"]: row["optim/skipped"]
        for row in rows_of(recipe, stage)
        if "optim/skipped" in row
    }
    assert [counts[step] for step in (1, 2, 3)] == [0, 1, 2]
    assert max(counts.values()) == 2
    assert not any("loss/total" in row for row in rows_of(recipe, stage) if row["step"] in (2, 3))
    assert_finite_weights(recipe.folder)
    assert {path.name for path in (recipe.folder / "stages" / stage).glob("nonfinite*")} == {
        "nonfinite-000002.json",
        "nonfinite-000003.json",
    }


def with_skips(stage: str, max_skipped: int) -> dict[str, Any]:
    """Recipe changes."""
    table = {"optimizer": {"on_nonfinite": "skip", "max_skipped": max_skipped}}
    changes = {"stages": {stage: table}}
    if stage == "judge":
        judge = {**EVERY_STAGE["stages"]["judge"], "batch_size": 8}
        changes = {
            "stages": {
                "judge": {**judge, "optimizer": {**judge["optimizer"], **table["optimizer"]}}
            }
        }
    return changes


def test_too_many_skipped_steps_stop_the_run_even_after_a_resume(make_recipe, monkeypatch):
    recipe = make_recipe(**with_skips("sft", max_skipped=1))
    with monkeypatch.context() as patch:
        poison(patch, "sft", {2, 4})
        with pytest.raises(
            NonFiniteError, match=r"sft step 4: .*; 1 earlier step skipped, as many as"
        ):
            train(recipe, "sft")
    poison(monkeypatch, "sft", {6})  # it resumes from step 3, after a skipped step
    with pytest.raises(NonFiniteError, match=r"sft step 6: .*; 1 earlier step skipped"):
        train(recipe, "sft")


def test_a_skipped_step_leaves_weights_and_optimizer_as_they_were(make_trainer, monkeypatch):
    trainer = make_trainer({"optimizer": {"on_nonfinite": "skip"}})
    trainer.step(1)
    before = {name: value.clone() for name, value in trainer.policy.state_dict().items()}
    moments = [
        value.clone() for state in trainer.loop.optimizer.state.values() for value in state.values()
    ]
    weight = trainer.policy.value_head.weight
    handle = weight.register_hook(lambda gradient: gradient * math.inf)
    metrics = trainer.step(2)
    handle.remove()
    assert "loss/total" not in metrics and metrics["compute/sequence_passes"] == 0
    assert all(
        torch.equal(value, before[name]) for name, value in trainer.policy.state_dict().items()
    )
    after = [value for state in trainer.loop.optimizer.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, moments, strict=True))
    assert trainer.step(3)["compute/sequence_passes"] > 0


def test_weights_that_were_not_finite_before_are_named(make_trainer):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.policy.value_head.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"\(value_head\.weight was already not finite\)"):
        trainer.step(1)


def test_a_reward_model_whose_loss_is_not_finite_saves_what_it_read(make_recipe, monkeypatch):
    recipe = make_recipe(stages={"judge": EVERY_STAGE["stages"]["judge"]})
    train(recipe, "sft")
    forward = Classifier.forward
    monkeypatch.setattr(
        Classifier, "forward", lambda self, batch: Judged(forward(self, batch).logits * math.nan)
    )
    with pytest.raises(NonFiniteError, match="judge step 1: loss is nan in rows 0"):
        train(recipe, "judge")
    rows = json.loads((recipe.folder / "stages" / "judge" / "nonfinite-000001.json").read_text())[
        "rows"
    ]
    assert {frozenset(row) for row in rows} == {frozenset({"id", "text", "label"})}


def test_a_value_head_is_not_fitted_to_non_finite_numbers():
    head = torch.nn.Linear(2, 1)
    before = head.weight.detach().clone()
    with pytest.raises(NonFiniteError, match="value head pre-fit"):
        fit_value_head(head, [(torch.tensor([[1.0, math.nan], [0, 1]]), torch.ones(2))])
    assert torch.equal(head.weight, before)
