"""Any task of the reasoning-gym package: generated questions, and a scorer that grades the
model's answers."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from pydantic import Field

from reftune.datasets import Splits
from reftune.datasets.reading.rationales import drop_contradictions
from reftune.datasets.reading.splits import draw_splits, question_key
from reftune.errors import DataError, RecipeError
from reftune.recipe import Component, unknown_key
from reftune.text import did_you_mean
from reftune.types import ANY_ANSWER, Answer, Problem

SEED_RANGE = 100_000_000
"""Each `data_seed` has this many seeds for test and as many for train. Question n of a split uses
the split's first seed + n."""
PATIENCE = 20
"""Draws per question after which the search for different questions gives up."""


class ReasoningGym(Component):
    """Generates questions with the package reasoning-gym."""

    task: str = "gsm_symbolic"
    """Name of a task, such as `chain_sum`."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Settings of the task, such as `{min_terms: 2, max_terms: 4}`."""
    train_size: int = Field(1000, gt=0)
    dev_size: int = Field(200, ge=0)
    test_size: int = Field(500, ge=0)
    """Test questions do not depend on the other sizes."""
    data_seed: int = Field(0, ge=0, le=20)
    """Determines the questions of all splits; the run's seed chooses which of them are dev."""

    def load(self, *, seed: int) -> Splits:
        """Generate all splits. Raises: RecipeError for an unknown task or setting; DataError if the
        task has too few different questions."""
        test = self._draw("test", self.test_size, without=[])
        rest = self._draw("train", self.train_size + self.dev_size, without=test)
        splits = draw_splits(train=rest, dev=None, test=test, dev_size=self.dev_size, seed=seed)
        return drop_contradictions(splits)

    def _draw(self, split: str, count: int, *, without: list[Problem]) -> list[Problem]:
        """The first `count` different questions from the split's seeds, skipping those of
        `without`."""
        first_seed = (2 * self.data_seed + (split == "train")) * SEED_RANGE
        drawn: dict[str, Problem] = {}
        asked = {question_key(problem) for problem in without}
        for start in range(first_seed, first_seed + PATIENCE * count, max(count, 1)):
            task = self._task(start, count)
            for n in range(count):
                problem = _problem(f"{self.task}-{split}-{start + n}", task, task[n])
                if question_key(problem) not in asked:
                    drawn.setdefault(question_key(problem), problem)
            if len(drawn) >= count:
                break
        if len(drawn) < count:
            raise DataError(
                f"reasoning_gym {self.task}: {len(drawn)} different {split} questions in"
                f" {PATIENCE * count} draws, expected {count}; make the splits smaller or widen"
                " dataset.config"
            )
        return list(drawn.values())[:count]

    def _task(self, seed: int, size: int) -> Any:
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError:
            raise RecipeError(
                "dataset.kind: reasoning_gym needs its package: pip install"
                " 'reftune[reasoning-gym]'"
            ) from None
        if self.task not in DATASETS:
            listed = "expected a name of reasoning_gym.factory.DATASETS"
            hint = did_you_mean(self.task, DATASETS) or listed
            raise RecipeError(f"dataset.task: {self.task}: unknown task; {hint}")
        names = (field.name for field in dataclasses.fields(DATASETS[self.task][1]))
        known = [name for name in names if name not in ("seed", "size")]
        for key in self.config:
            if key not in known:
                raise RecipeError(f"dataset.config.{unknown_key(key, known)}")
        try:
            return reasoning_gym.create_dataset(self.task, **self.config, seed=seed, size=size)
        except (AssertionError, TypeError, ValueError) as error:
            raise RecipeError(
                f"dataset.config: {self.task} rejects {self.config}:"
                f" {error or type(error).__name__}"
            ) from None


def _problem(id: str, task: Any, entry: dict[str, Any]) -> Problem:
    cot, gold = entry["metadata"].get("answer_cot"), entry["answer"]
    return Problem(
        id=id,
        question=entry["question"],
        answer=ANY_ANSWER if gold is None else Answer(kind="text", value=str(gold)),
        rationale=None if cot is None else cot.partition("####")[0].strip(),
        columns={"metadata": entry["metadata"]},
        scorer=partial(task.score_answer, entry=entry),
    )
