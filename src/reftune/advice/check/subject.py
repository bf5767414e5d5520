"""The subject of a check: the data as the model sees it."""

from __future__ import annotations

from collections.abc import Collection, Sized
from dataclasses import dataclass
from statistics import median_high

from reftune.advice.check.report import Preview
from reftune.datasets import Splits
from reftune.model.encoder import Encoder
from reftune.model.policy import Policy
from reftune.recipe import Recipe
from reftune.stages.estimate import stage_costs
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

    @property
    def encoder(self) -> Encoder:
        return self.collector.encoder

    @property
    def problems(self) -> list[Problem]:
        return [*self.splits.train, *self.splits.dev, *self.splits.test]

    @property
    def learns_from_rationales(self) -> bool:
        """Whether any stage of the recipe needs gold rationales."""
        return any(stage.reads_rationales for stage in self.recipe.stages.values())

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


def subject_of(recipe: Recipe, splits: Splits, policy: Policy, method: str = "base") -> Subject:
    """The subject for a check with `policy`, which has the weights of `method`."""
    collector = collector_of(recipe, policy)
    encoder = collector.encoder
    prompts = {
        name: {problem.id: encoder.prompt(problem) for problem in getattr(splits, name)}
        for name in ("train", "dev", "test")
    }
    rows = []
    for problem in splits.train:
        if problem.rationale is not None:
            prompt, target = encoder.format.prompt(problem), encoder.format.target(problem)
            row = Row(
                problem=problem,
                prompt=encoder.text_of(prompt),
                target=target,
                reply=encoder.text_after(prompt, target),
                prompt_ids=prompts["train"][problem.id],
                target_ids=encoder.continuation(problem, target),
            )
            rows.append(row)
    return Subject(
        recipe=recipe,
        splits=splits,
        policy=policy,
        collector=collector,
        rows=rows,
        prompts=prompts,
        method=method,
    )


def preview_of(subject: Subject) -> Preview:
    """The first training row with a rationale. If no row has one, the first training prompt with
    an empty target."""
    row = subject.rows[0] if subject.rows else None
    problem = row.problem if row else subject.splits.train[0]
    target, target_ids = (row.reply, row.target_ids) if row else ("", [])
    prompt_ids = subject.prompts["train"][problem.id]

    def pieces(ids: list[int]) -> tuple[str, ...]:
        decode = subject.policy.tokenizer.decode
        return tuple(str(decode([id_], clean_up_tokenization_spaces=False)) for id_ in ids)

    return Preview(
        id=problem.id,
        prompt=subject.encoder.text_of(subject.encoder.format.prompt(problem)),
        target=target,
        prompt_ids=tuple(prompt_ids),
        target_ids=tuple(target_ids),
        prompt_tokens=pieces(prompt_ids),
        target_tokens=pieces(target_ids),
    )


def rl_inits(recipe: Recipe) -> list[str]:
    """The initial model of each stage that samples while it trains."""
    costs = stage_costs(recipe)
    return [recipe.stages[name].init for name, cost in costs.items() if cost.sampled > 0]


def share(part: Sized, whole: Sized) -> str:
    """The share of `part` in `whole`, such as `2.5%`."""
    return f"{len(part) / len(whole):.1%}"


def spread(sizes: Collection[int]) -> str:
    """The range and median of sizes, such as `12 to 96 (median 31)`."""
    return f"{min(sizes)} to {max(sizes)} (median {median_high(sizes)})" if sizes else "no"
