"""The final evaluation. All methods solve the same problems greedily. Optionally, solutions are
also sampled, and a reward model scores the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from reftune.datasets import Splits
from reftune.errors import DataError
from reftune.processes import world
from reftune.recipe import Recipe
from reftune.runs.models import Models, stage_folder
from reftune.seeds import derive_seed
from reftune.stages.probes.choices import diagnose, write_rows
from reftune.stages.reward_model import (
    Classifier,
    add_scores,
    is_scored,
    load_classifier,
    require_same_tokenizer,
)
from reftune.stages.rollouts import collector_of
from reftune.stages.stage import Progress
from reftune.storage.files import JsonLines, in_parts
from reftune.storage.run_folder import RunFolder
from reftune.types import Attempt, Completion, Graded, Problem, Verdict

PROBLEMS_AT_ONCE = 250
"""Number of problems solved between two writes to disk."""


class FinalEvaluation:
    """Evaluates a recipe's methods. The results are files in the run folder."""

    def __init__(self, recipe: Recipe, splits: Splits, models: Models, progress: Progress) -> None:
        """Raises: DataError if there is no problem to evaluate."""
        self.recipe, self.models, self.progress = recipe, models, progress
        self.folder = RunFolder(recipe.folder)
        self.problems = recipe.evaluate.problems(splits)
        if not self.problems:
            raise DataError(
                f"evaluate.split: the dataset has no {recipe.evaluate.split} problems; expected"
                " some, or evaluate.split=dev"
            )

    def answer(self, method: str) -> None:
        """Let a method's model solve the problems, unless this is already done. On multiple choice,
        also check for warning signs of reward hacking."""
        path = self.folder.evaluation(method)
        rows = world.from_main(JsonLines(path).rows)
        if len(rows) < len(self.problems):
            answers = partial(self._answers, method)
            rows = in_parts(self.problems, path, answers, at_once=PROBLEMS_AT_ONCE)
            right = sum(row["greedy"]["verdict"] == Verdict.CORRECT.value for row in rows)
            self.progress.note(
                f"{method}: {right / len(rows):.1%} of {len(rows)} {self.recipe.evaluate.split}"
                " problems right"
            )
        if all(problem.is_multiple_choice for problem in self.problems):
            self._probe_choices(method, [Attempt.from_row(row["greedy"]) for row in rows])

    def _answers(
        self, method: str, start: int, problems: Sequence[Problem]
    ) -> list[dict[str, Any]]:
        """The result rows of `problems`. `start` is the position of `problems[0]` among all
        evaluated problems. Every sample depends only on the weights, the recipe, the method's name
        and the problem's position, so a resumed evaluation gives the same samples."""
        policy, table = self.models.load(method), self.recipe.evaluate
        collector = collector_of(self.recipe, policy)
        greedy = collector.solve(policy, problems)
        rows = [
            {
                "id": problem.id,
                "question": problem.question,
                "gold": str(problem.answer),
                "prompt_tokens": len(prompt),
                "greedy": {
                    **_attempt(completion, graded).to_row(),
                    "tokens": len(completion.token_ids),
                },
            }
            for problem, prompt, completion, graded in zip(
                problems, greedy.prompts, greedy.completions, greedy.graded, strict=True
            )
        ]
        num = table.num_samples(method)
        if num == 0:
            return rows
        sampled = collector.solve(
            policy,
            [problem for problem in problems for _ in range(num)],
            temperature=table.temperature,
            top_k=table.top_k,
            seed=derive_seed(self.recipe.seed, method, "evaluate", start),
        )
        samples = [
            _attempt(completion, graded).to_row()
            for completion, graded in zip(sampled.completions, sampled.graded, strict=True)
        ]
        return [{**row, "samples": samples[i * num : (i + 1) * num]} for i, row in enumerate(rows)]

    def _probe_choices(self, method: str, answers: Sequence[Attempt]) -> None:
        """Check a method's greedy answers for reward hacking, as `stages.probes.choices` describes,
        unless this was done before."""
        path = self.folder.choices(method)
        if len(world.from_main(JsonLines(path).rows)) == len(self.problems):
            return
        policy = self.models.load(method)
        found = diagnose(
            policy,
            collector_of(self.recipe, policy),
            self.problems,
            [answer.completion for answer in answers],
            [answer.graded for answer in answers],
        )
        write_rows(path, found)

    def score_samples(self) -> None:
        """If the recipe reranks, score the samples of all methods that are fully evaluated."""
        name = self.recipe.evaluate.rerank
        if name is None:
            return
        classifier = None
        for method in self.recipe.methods_to_evaluate:
            path = self.folder.evaluation(method)
            rows = world.from_main(JsonLines(path).rows)
            if len(rows) == len(self.problems) and not is_scored(rows):
                classifier = classifier or self._reranker(name)
                add_scores(path, self.problems, classifier)

    def check_reranker(self) -> None:
        """Raises: ModelError if another run's reranker does not use the base model's tokenizer."""
        name = self.recipe.evaluate.rerank
        if name is not None and name not in self.recipe.stages:
            require_same_tokenizer(
                self._reranker(name), self.models.load("base"), where=f"evaluate.rerank: {name}"
            )

    def _reranker(self, name: str) -> Classifier:
        """The reward model of the stage `name`. If there is no such stage, the result is the reward
        model in the folder `name`."""
        policy = self.models.load(name)
        encoder = collector_of(self.recipe, policy).encoder
        return load_classifier(policy, encoder, stage_folder(self.recipe, name).path)


def _attempt(completion: Completion, graded: Graded) -> Attempt:
    timeless = replace(graded, program_s=None)  # so that a repeated evaluation writes the same file
    return Attempt(
        completion=completion.text, graded=timeless, finish_reason=completion.finish_reason
    )
