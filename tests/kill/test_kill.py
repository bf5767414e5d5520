"""A run that is killed anywhere, any number of times, and restarted with the same command ends with
the same bits.

The run has every stage, sampling and evaluation: SFT with its warm-up, both self-trainings, PPO, a
reward model, reranking, summary and report. Kills come at a random operation on a file, in the
middle of a write (which leaves a torn file), and by the clock. The short form is in the default
tests; the long one runs with `make trust`, or `pytest -m "kill and slow"`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from crash import EVERY_STAGE, assert_same_outcome, die, live, outcome, tear
from reftune.recipe import Recipe

pytestmark = [
    pytest.mark.kill,
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
]

MakeRecipe = Callable[..., Recipe]


@dataclass(frozen=True, slots=True)
class Straight:
    """A run that was not killed."""

    outcome: dict[str, Any]
    operations: int
    seconds: float


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample and evaluate in several parts, so that a kill can come between them."""
    monkeypatch.setattr("reftune.runs.evaluation.PROBLEMS_AT_ONCE", 4)
    monkeypatch.setattr("reftune.stages.self_train.SAMPLES_AT_ONCE", 24)


@pytest.fixture(scope="module")
def kept() -> list[Straight]:
    return []


@pytest.fixture
def straight(
    kept: list[Straight], _small_parts: None, make_recipe: MakeRecipe, tmp_path: Path
) -> Straight:
    if not kept:
        recipe, started = (
            make_recipe(run_dir=str(tmp_path / "straight"), **EVERY_STAGE),
            time.perf_counter(),
        )
        life = live(recipe)
        assert life.status == 0, life.stderr
        kept.append(
            Straight(
                outcome=outcome(recipe.folder),
                operations=life.operations,
                seconds=time.perf_counter() - started,
            )
        )
    return kept[0]


def random_life(recipe: Recipe, straight: Straight, rng: random.Random, share: float) -> bool:
    """Start the run and kill it at random, within a share of a whole run's operations or seconds.
    Returns: whether it ended first."""
    how = rng.choice((die, tear, None))
    if how is None:
        life = live(recipe, kill_after_s=rng.uniform(0, straight.seconds * share))
    else:
        life = live(recipe, at=rng.randint(1, int(straight.operations * share)), act=how)
    assert life.status in (None, 0), life.stderr
    return life.status == 0


def killed_until_it_ends(
    recipe: Recipe, straight: Straight, rng: random.Random, share: float
) -> int:
    """The number of kills before the run ended, with the outcome of the straight run."""
    kills = 0
    while not random_life(recipe, straight, rng, share):
        kills += 1
    assert_same_outcome(recipe.folder, straight.outcome)
    return kills


def test_the_run_that_is_compared_with_has_every_stage(straight: Straight):
    stages = {
        f"stages/{name}/model.safetensors"
        for name in ("warmup", "sft", "offline", "online", "reft", "judge")
    }
    answers = {f"eval/{name}.jsonl" for name in ("warmup", "sft", "offline", "online", "reft")}
    samples = {
        "stages/offline/sampled.jsonl",
        "stages/judge/sampled.jsonl",
        "stages/judge/sampled_dev.jsonl",
    }
    assert stages | answers | samples | {
        "summary.json",
        "stages/judge/classifier.safetensors",
    } <= set(straight.outcome)
    # a stage whose first dev evaluation was the best saved the weights that it started from
    moved = {
        name
        for name in stages
        if straight.outcome[name.replace("model.safetensors", "stage.json")]["chosen_step"] > 0
    }
    assert len(moved) >= 4
    assert len({straight.outcome[name] for name in moved}) == len(moved)
    assert b'"score"' in straight.outcome["eval/reft.jsonl"]


@pytest.mark.timeout(600)
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(
    straight, make_recipe, tmp_path, record_property
):
    # if the machine has become faster, kills by the clock may come too late; then another run is
    # killed, until one has survived three kills
    rng, kills = random.Random(5), [0]
    while kills[-1] < 3:
        recipe = make_recipe(run_dir=str(tmp_path / f"run{len(kills)}"), **EVERY_STAGE)
        kills.append(killed_until_it_ends(recipe, straight, rng, share=0.4))
    record_property("tried", sum(kills))


def die_between_renames(event: str, path: str, appends: bool) -> None:
    """Send SIGKILL when a folder has been moved away, and before another takes its place."""
    new = Path(path)
    old = new.with_name(new.name.replace(".partial", ".old"))
    if event == "os.rename" and new.is_dir() and old.exists() and old != new:
        die(event, path, appends)


def test_a_run_killed_while_a_folder_is_replaced_ends_with_the_same_bits(straight, make_recipe):
    recipe = make_recipe(**EVERY_STAGE)
    assert live(recipe, at=1, act=die_between_renames).status is None
    (moved,) = recipe.folder.rglob(".*.old")
    assert not moved.with_name(moved.stem.removeprefix(".")).exists()
    assert live(recipe).status == 0
    assert_same_outcome(recipe.folder, straight.outcome)
    assert not [*recipe.folder.rglob(".*.old")]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(6))
def test_runs_killed_at_many_random_moments_end_with_the_same_bits(
    straight, make_recipe, tmp_path, record_property, seed
):
    # 6 × 10 kills at least
    rng, kills, number = random.Random(seed), 0, 0
    while kills < 10:
        number += 1
        kills += killed_until_it_ends(
            make_recipe(run_dir=str(tmp_path / f"run{number}"), **EVERY_STAGE),
            straight,
            rng,
            share=0.2,
        )
    record_property("tried", kills)
