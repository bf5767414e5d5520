"""A failing disk or a stop signal gives a clear line, keeps the last checkpoint whole, and the
resumed run ends with the same bits.

The short form is in the default tests; the long one runs with `make trust`, or `pytest -m "fault
and slow"`.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from crash import Life, assert_same_outcome, live, outcome, refuse, signalled
from reftune.recipe import Recipe
from reftune.storage.checkpoint import load_latest

pytestmark = [
    pytest.mark.fault,
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
]

MakeRecipe = Callable[..., Recipe]

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
"""Disk full, quota exceeded, read-only file system, no permission, broken disk."""


@pytest.fixture
def make_recipe(make_recipe: MakeRecipe) -> MakeRecipe:
    """As in all tests, but without trackers: a run continues without one that fails
    (tests/unit/test_trackers.py)."""
    return partial(make_recipe, trackers=[])


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return {}


@pytest.fixture
def straight(kept: dict[str, Any], make_recipe: MakeRecipe, tmp_path: Path) -> dict[str, Any]:
    """An undisturbed run: its outcome and its number of operations on files."""
    if not kept:
        recipe = make_recipe(run_dir=str(tmp_path / "straight"))
        life = live(recipe)
        assert life.status == 0, life.stderr
        kept.update(outcome=outcome(recipe.folder), operations=life.operations)
    return kept


def assert_last_checkpoints_whole(folder: Path) -> None:
    notes: list[str] = []
    for stage in folder.glob("stages/*"):
        load_latest(stage / "checkpoints", note=notes.append)
    assert notes == []


def assert_refused_in_one_line(life: Life, folder: Path, reason: str) -> None:
    assert life.status == 2, life.stderr
    assert life.stderr.startswith(str(folder)), life.stderr
    assert life.stderr.endswith(f": {reason}\n"), life.stderr
    assert len(life.stderr.splitlines()) == 1, life.stderr


def assert_survives(recipe: Recipe, straight: dict[str, Any], number: int, at: int) -> None:
    life = live(recipe, at=at, act=refuse(number))
    assert_refused_in_one_line(life, recipe.folder, f"cannot be written: {os.strerror(number)}")
    assert_last_checkpoints_whole(recipe.folder)
    life = live(recipe)
    assert life.status == 0, life.stderr
    assert_same_outcome(recipe.folder, straight["outcome"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", REFUSALS[:2], ids=errno.errorcode.get)
def test_a_disk_error_is_reported_in_one_line_and_loses_nothing(straight, make_recipe, number):
    at = random.Random(number).randint(straight["operations"] // 4, straight["operations"] // 2)
    assert_survives(make_recipe(), straight, number, at)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", REFUSALS, ids=errno.errorcode.get)
def test_a_disk_error_anywhere_loses_nothing(
    straight, make_recipe, tmp_path, record_property, number
):
    rng = random.Random(number)
    places = rng.sample(range(1, straight["operations"] + 1), 8)
    record_property("tried", len(places))
    for at in places:
        assert_survives(make_recipe(run_dir=str(tmp_path / f"run{at}")), straight, number, at)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("limit", [500, 4_000, 12_000])
def test_a_disk_that_fills_up_inside_a_write_loses_nothing(straight, make_recipe, limit):
    # no file may grow past the limit: the write itself fails half-way, in Python as in Rust
    recipe = make_recipe()
    life = live(
        recipe,
        prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
    )
    assert life.status == 2, life.stderr
    assert str(recipe.folder) in life.stderr and "cannot be written" in life.stderr
    assert len(life.stderr.splitlines()) == 1, life.stderr
    assert_last_checkpoints_whole(recipe.folder)
    assert live(recipe).status == 0
    assert_same_outcome(recipe.folder, straight["outcome"])


# --- signals --------------------------------------------------------------------------------------


def in_the_background() -> None:
    """Ignore SIGINT, as a shell does when it starts `reftune run … &`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def assert_stops_and_goes_on(
    recipe: Recipe, straight: dict[str, Any], number: int, at: int
) -> None:
    life = live(recipe, at=at, act=signalled(number), prepare=in_the_background)
    assert life.status == 130, life.stderr
    said = life.stderr.splitlines()[-1]
    assert said.startswith("interrupted; checkpoint: ") and said.endswith(
        "; the same command continues from there"
    )
    checkpoint = Path(said.removeprefix("interrupted; checkpoint: ").partition(";")[0])
    assert checkpoint.is_dir() and checkpoint.is_relative_to(recipe.folder)
    assert_last_checkpoints_whole(recipe.folder)
    life = live(recipe)
    assert life.status == 0, life.stderr
    assert_same_outcome(recipe.folder, straight["outcome"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("number", "share"),
    [(signal.SIGTERM, 0.5), (signal.SIGINT, 0.87)],
    ids=["training", "evaluation"],
)
def test_a_signal_stops_the_run_with_the_checkpoint_named(straight, make_recipe, number, share):
    assert_stops_and_goes_on(
        make_recipe(), straight, number, at=round(share * straight["operations"])
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_anywhere_loses_nothing(straight, make_recipe, tmp_path, record_property, number):
    # neither the evaluation, near the end, nor the time before the first step has its own handler
    rng, operations = random.Random(number), straight["operations"]
    places = rng.sample(range(operations // 10, operations * 9 // 10), 6)
    record_property("tried", len(places))
    for at in places:
        assert_stops_and_goes_on(
            make_recipe(run_dir=str(tmp_path / f"run{at}")), straight, number, at
        )
