"""Runs some of the checks of `reftune check`, because running all of them takes seconds."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from reftune.advice.check import CHECKS, MODEL_CHECKS, CheckReport, check_recipe
from reftune.recipe import Recipe

MEASURED = frozenset({"memory", "dtype", "time"})
"""Checks that trace or time the model, whatever the data."""
UNMEASURED = frozenset({*CHECKS, *MODEL_CHECKS}) - MEASURED


def check_only(recipe: Recipe, names: Collection[str]) -> CheckReport:
    """The report of the named checks; the others are not run."""
    with pytest.MonkeyPatch.context() as patch:
        for group, checks in (("CHECKS", CHECKS), ("MODEL_CHECKS", MODEL_CHECKS)):
            chosen = {name: check for name, check in checks.items() if name in names}
            patch.setattr(f"reftune.advice.check.{group}", chosen)
        return check_recipe(recipe)
