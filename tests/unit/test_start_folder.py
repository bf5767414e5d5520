"""A new run may start from a stage folder of an earlier one."""

from __future__ import annotations

import pytest
import torch

from reftune.errors import RecipeError
from reftune.runs.run import check_stage_graph, open_run
from reftune.stages.progress import SilentProgress


def test_a_stage_starts_from_the_folder_of_an_earlier_run_value_head_and_all(make_recipe, tmp_path):
    first = make_recipe(run_dir=str(tmp_path / "first"))
    with open_run(first, SilentProgress()) as run:
        run.train("sft")
        run.train("reft")
        left = run.load_policy("reft")
    source = tmp_path / "first" / "stages" / "reft"
    second = make_recipe(
        run_dir=str(tmp_path / "second"),
        stages={"sft": None, "reft": {"init": str(source), "value_prefit": 0}},
        evaluate={"stages": ["reft"]},
    )
    with open_run(second, SilentProgress()) as run:
        start = run.load_policy(str(source))
        for (name, value), (_, other) in zip(
            start.named_parameters(), left.named_parameters(), strict=True
        ):
            assert torch.equal(value, other), name
        assert float(start.value_head.weight.abs().sum()) > 0
        run.train("reft")
        assert run.is_trained("reft")


def test_a_folder_without_a_model_is_not_a_start(make_recipe, tmp_path):
    recipe = make_recipe(stages={"reft": {"init": str(tmp_path)}})
    with pytest.raises(RecipeError, match=r"stages.reft.init: .* is not an earlier method"):
        check_stage_graph(recipe)
