"""A recipe whose steps do not depend on the number of processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from reftune.recipe import Recipe


@pytest.fixture
def steady_recipe(make_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """As `make_recipe`, but without dropout, whose draws depend on the batch, and with small steps
    of several micro-batches."""
    optimizer = {"learning_rate": 0.003}
    steady = {
        "model": {"scratch": {"layers": 2, "dropout": 0.0}, "micro_batch_tokens": 300},
        "trackers": [],
        "evaluate": {"stages": ["reft"]},
        "stages": {
            "sft": {"epochs": 1, "batch_size": 7, "keep": 100, "optimizer": optimizer},
            "reft": {"steps": 3, "prompts": 5, "samples": 3, "keep": 100, "optimizer": optimizer},
        },
    }

    def make(run_dir: Path, **changes: Any) -> Recipe:
        from reftune.recipe import merge

        gone = {name: None for name, stage in changes.get("stages", {}).items() if stage is None}
        merged = merge(merge(steady, changes), {"run_dir": str(run_dir)})
        return make_recipe(**{**merged, "stages": {**merged["stages"], **gone}})

    return make
