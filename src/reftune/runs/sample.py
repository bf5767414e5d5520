"""Samples and grades a few solutions for people to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reftune.datasets import load_splits
from reftune.errors import DataError, RecipeError
from reftune.model.policy import Policy
from reftune.recipe import Recipe
from reftune.runs.auto import settled
from reftune.runs.models import Models
from reftune.stages.rollouts import Collector, collector_of
from reftune.text import printable
from reftune.types import Attempt, Problem


def sample_method(
    recipe: Recipe, method: str, *, split: str, num: int, temperature: float
) -> list[dict[str, Any]]:
    """Solutions to the first `num` problems of a split, as the rows that `sample_rows` returns.
    `method` is either `base`, or a finished method of the recipe's run, or the path of a model
    folder. Raises: RecipeError if `method` is not trained yet, or is a stage whose model is not
    meant to solve problems; DataError if the split is empty; ModelError if the model cannot be
    used."""
    if method in recipe.stages and not recipe.stages[method].is_method:
        raise RecipeError(f"{method}: not a method, so its model answers no questions")
    recipe = settled(recipe)
    splits = load_splits(recipe)
    problems: Sequence[Problem] = getattr(splits, split)[:num]
    if not problems:
        raise DataError(f"--split: the dataset has no {split} problems; expected another split")
    policy = Models(recipe, splits).load(method)
    collector = collector_of(recipe, policy)
    return sample_rows(policy, collector, problems, recipe, temperature=temperature)


def sample_rows(
    policy: Policy,
    collector: Collector,
    problems: Sequence[Problem],
    recipe: Recipe,
    *,
    temperature: float,
) -> list[dict[str, Any]]:
    """One row per problem: the question, the gold answer, a completion, its verdict and reason."""
    solved = collector.solve(policy, problems, temperature=temperature, seed=recipe.seed)
    return [
        {
            "id": problem.id,
            "question": problem.question,
            "gold": str(problem.answer),
            **Attempt(
                completion=completion.text, graded=graded, finish_reason=completion.finish_reason
            ).to_row(),
        }
        for problem, completion, graded in zip(
            problems, solved.completions, solved.graded, strict=True
        )
    ]


def solution_text(row: Mapping[str, Any]) -> str:
    """A row of `sample_rows` as readable text."""
    verdict = f"→ {row['verdict']}: {row['reason']}"
    return printable(f"{row['question']}\n\n{row['completion']}\n\n{verdict}")
