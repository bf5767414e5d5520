"""Samples and grades a few solutions for people to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reftune.errors import DataError
from reftune.model.policy import Policy
from reftune.recipe import Recipe
from reftune.runs.auto import settled
from reftune.runs.run import unclaimed
from reftune.stages.rollouts import Collector
from reftune.text import printable
from reftune.types import Attempt, Problem


def sample_method(
    recipe: Recipe, method: str, *, split: str, num: int, temperature: float
) -> list[dict[str, Any]]:
    """The rows of `sample_rows` for the first `num` problems of a split. The solutions come from
    `base` or from a finished method of the recipe's run.

    Raises: RecipeError if the method is not trained yet; DataError if the split is empty.
    """
    recipe = settled(recipe)
    run = unclaimed(recipe)
    problems: Sequence[Problem] = getattr(run.splits, split)[:num]
    if not problems:
        raise DataError(f"--split: the dataset has no {split} problems; expected another split")
    policy = run.load_policy(method)
    return sample_rows(policy, run.collector(policy), problems, recipe, temperature=temperature)


def sample_rows(
    policy: Policy,
    collector: Collector,
    problems: Sequence[Problem],
    recipe: Recipe,
    *,
    temperature: float,
) -> list[dict[str, Any]]:
    """One row per problem: question, gold answer, completion, verdict and its reason."""
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
