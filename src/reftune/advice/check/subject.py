"""The subject of a check: the data as the model sees it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass

from reftune.advice.check.report import Preview
from reftune.datasets import Splits
from reftune.model.encoder import Encoder
from reftune.model.policy import Policy
from reftune.recipe import Recipe
from reftune.stages.rollouts import Collector, collector_of
from reftune.types import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A training problem with its rationale, as text and as tokens."""

    problem: Problem
    prompt: str
    target: str
    """The text that the model should write."""
    reply: str
    """Everything after the prompt: `target` and any text that a chat template adds."""
    prompt_ids: list[int]
    target_ids: list[int]

    @property
    def ids(self) -> list[int]:
        """Ids of prompt and target, including the end token."""
        return [*self.prompt_ids, *self.target_ids]


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """Data, model and format to check."""

    recipe: Recipe
    splits: Splits
    policy: Policy
    collector: Collector
    rows: list[Row]
    prompts: dict[str, dict[str, list[int]]]
    """Split → problem id → prompt ids."""
    method: str
    """The method whose weights `policy` has: the first trained method that RL starts from, or
    `base` if there is no such method."""
    folder_problem: str = ""
    """Why a run could not use the recipe's run folder. Empty if a run could use the folder."""

    @property
    def encoder(self) -> Encoder:
        return self.collector.encoder

    @property
    def problems(self) -> list[Problem]:
        return [*self.splits.train, *self.splits.dev, *self.splits.test]

    @property
    def prompt_limit(self) -> float:
        """Maximum number of tokens in a prompt; infinite if there is no limit."""
        return self.collector.prompt_limit(self.policy)

    @property
    def fitting(self) -> dict[str, list[list[int]]]:
        """Split → token ids of each prompt that is not too long."""
        return {
            split: [ids for ids in prompts.values() if len(ids) <= self.prompt_limit]
            for split, prompts in self.prompts.items()
        }

    @property
    def fitting_rows(self) -> list[Row]:
        """The rows on which a stage can train: neither the prompt nor the target is too long."""
        most = self.recipe.lengths.max_new
        return [
            row
            for row in self.rows
            if len(row.prompt_ids) <= self.prompt_limit and len(row.target_ids) <= most
        ]


def subject_of(
    recipe: Recipe, splits: Splits, policy: Policy, method: str = "base", folder_problem: str = ""
) -> Subject:
    """The subject for a check with `policy`, which has the weights of `method`."""
    collector = collector_of(recipe, policy)
    encoder = collector.encoder
    prompts = {
        name: {problem.id: encoder.prompt(problem) for problem in getattr(splits, name)}
        for name in ("train", "dev", "test")
    }
    rows = [
        _row(problem, encoder, prompts["train"][problem.id])
        for problem in splits.train
        if problem.rationale is not None
    ]
    return Subject(
        recipe=recipe,
        splits=splits,
        policy=policy,
        collector=collector,
        rows=rows,
        prompts=prompts,
        method=method,
        folder_problem=folder_problem,
    )


def _row(problem: Problem, encoder: Encoder, prompt_ids: list[int]) -> Row:
    prompt, target = encoder.format.prompt(problem), encoder.format.target(problem)
    return Row(
        problem=problem,
        prompt=encoder.text_of(prompt),
        target=target,
        reply=encoder.text_after(prompt, target),
        prompt_ids=prompt_ids,
        target_ids=encoder.continuation(problem, target),
    )


def preview_of(subject: Subject) -> Preview:
    """The first training row with a rationale. If no row has one, the first training prompt with
    an empty target."""
    row = subject.rows[0] if subject.rows else _without_target(subject, subject.splits.train[0])

    def pieces(ids: Iterable[int]) -> tuple[str, ...]:
        return tuple(
            str(subject.policy.tokenizer.decode([id_], clean_up_tokenization_spaces=False))
            for id_ in ids
        )

    return Preview(
        id=row.problem.id,
        prompt=row.prompt,
        target=row.reply,
        prompt_ids=tuple(row.prompt_ids),
        target_ids=tuple(row.target_ids),
        prompt_tokens=pieces(row.prompt_ids),
        target_tokens=pieces(row.target_ids),
    )


def _without_target(subject: Subject, problem: Problem) -> Row:
    return Row(
        problem=problem,
        prompt=subject.encoder.text_of(subject.encoder.format.prompt(problem)),
        target="",
        reply="",
        prompt_ids=subject.prompts["train"][problem.id],
        target_ids=[],
    )


def learns_from_rationales(subject: Subject) -> bool:
    """Whether any stage of the recipe needs gold rationales."""
    return any(stage.reads_rationales for stage in subject.recipe.stages.values())


def rl_inits(recipe: Recipe) -> list[str]:
    """The initial model of each stage that samples while it trains."""
    costs = [(s.init, s.cost(num_train=0, num_dev=0)) for s in recipe.stages.values()]
    return [init for init, cost in costs if cost is not None and cost.sampled > 0]


def share(part: Sized, whole: Sized) -> str:
    """The share of `part` in `whole`, such as `2.5%`."""
    return f"{len(part) / len(whole):.1%}"


def mean(values: Sequence[float]) -> float:
    """The mean of `values`, which must not be empty."""
    return sum(values) / len(values)


def spread(sizes: Iterable[int]) -> str:
    """The range and median of sizes, such as `12 to 96 (median 31)`."""
    ordered = sorted(sizes)
    return (
        f"{ordered[0]} to {ordered[-1]} (median {ordered[len(ordered) // 2]})" if ordered else "no"
    )
