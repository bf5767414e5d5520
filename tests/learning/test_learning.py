"""A tiny model must learn on three seeds: PPO its reward, SFT its examples, and the value head the
predictable returns.

In the task, a one-word question has a one-word answer. Each test states its margin, which
every seed passes with room to spare.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reftune.recipe import Recipe
from reftune.runs.run import open_run
from reftune.stages.stage import Progress
from reftune.storage.files import JsonLines

SEEDS = [0, 1, 2]


COMPONENTS = Path(__file__).parent.parent / "components.py"


@pytest.fixture
def colours(make_recipe, tmp_path) -> Any:
    """A recipe of one stage on the colours task: two answers to each of eight questions for PPO,
    four for SFT."""

    def make(
        seed: int, stage: dict[str, Any], *, name: str = "it", num_answers: int = 2, **changes: Any
    ) -> Recipe:
        return make_recipe(
            seed=seed,
            run_dir=str(tmp_path / name),
            model={"scratch": {"hidden_size": 32, "context": 64, "dropout": 0.0}},
            dataset={"kind": f"{COMPONENTS}:Colours", "num_answers": num_answers},
            format={"kind": f"{COMPONENTS}:SayGold"},
            lengths={"max_new": 2},
            stages={
                "sft": None,
                "reft": None,
                "it": {"init": "base", "save_every_s": 1000, **stage},
            },
            evaluate={"stages": None},
            **changes,
        )

    return make


@pytest.fixture
def by_question() -> dict[str, str]:
    """A reward that depends only on the question."""
    return {"kind": f"{COMPONENTS}:ByQuestion"}


def trained(recipe: Recipe) -> list[dict[str, Any]]:
    with open_run(recipe, Progress()) as run:
        run.train("it")
    return JsonLines(recipe.folder / "metrics.jsonl").rows()


def values(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


PPO = {"kind": "rl", "prompts": 32, "value_prefit": 2, "optimizer": {"learning_rate": 0.01}}


@pytest.mark.parametrize("seed", SEEDS)
def test_ppo_learns_to_write_what_is_rewarded(colours, seed):
    # 1 for the answer, .1 for anything else; at the start 1 of about 12 words is right: .1 + .9/12
    # = .175
    rows = trained(colours(seed, {**PPO, "steps": 30, "eval_every": 30}))
    rewards = values(rows, "reward/mean")
    assert mean(rewards[:3]) < 0.35
    assert mean(rewards[-5:]) > 0.7
    assert values(rows, "dev/accuracy")[-1] >= 0.75


def test_ppo_does_not_learn_answers_that_are_not_rewarded(colours, by_question):
    # the reward depends only on the question, so right answers stay as rare as before: 1 of about
    # 12
    rows = trained(colours(0, {**PPO, "steps": 15, "eval_every": 15}, reward=by_question))
    assert mean(values(rows, "reward/correct")[-5:]) < 0.3


@pytest.mark.parametrize("seed", SEEDS)
def test_sft_learns_its_examples(colours, seed):
    stage = {
        "kind": "sft",
        "epochs": 40,
        "batch_size": 8,
        "eval_every": 40,
        "optimizer": {"learning_rate": 0.01, "warmup": 0.1},
    }
    rows = trained(colours(seed, stage, num_answers=4))
    losses = values(rows, "loss/sft")
    assert losses[0] > 1.5  # ln 12 = 2.5 nats for a word, about as much for the eos
    assert losses[-1] < 0.05
    assert values(rows, "dev/accuracy")[-1] == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_a_prefitted_value_head_explains_a_reward_that_can_be_foreseen(colours, by_question, seed):
    # the question alone decides the reward, so nearly all of its variance can be explained; an
    # unfitted head predicts 0
    explained = {}
    for prefit in (0, 4):
        stage = {**PPO, "steps": 1, "prompts": 64, "value_prefit": prefit}
        rows = trained(colours(seed, stage, reward=by_question, name=f"prefit-{prefit}"))
        explained[prefit] = values(rows, "value/explained_variance")[0]
    assert explained[0] == pytest.approx(0, abs=0.05)
    assert explained[4] > 0.8
