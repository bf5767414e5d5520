"""Variants of datasets. Of the generated word problems, `Planted` gives the answer away by its
place among the options, `Terse` omits the working from some solutions, and `Long` has long
solutions. `FewRationales` (word problems) and `FewSvampRationales` have solutions to only some of
the training questions. In a recipe: `dataset: {kind: demo/variants.py:Planted, planted: 0.6}`."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from reftune.datasets import Splits
from reftune.datasets.svamp import Svamp
from reftune.datasets.word_problems import WordProblems, _equation
from reftune.types import Answer, Problem


class Planted(WordProblems):
    """Multiple choice with a shortcut past the reasoning. Test questions have no shortcut."""

    planted: float = Field(0.0, ge=0, le=1)
    """Share of train and dev questions whose correct option becomes option c."""

    def load(self, *, seed: int) -> Splits:
        splits = super().load(seed=seed)
        train, dev = (tuple(map(self._with_shortcut, of)) for of in (splits.train, splits.dev))
        return replace(splits, train=train, dev=dev)

    def _with_shortcut(self, problem: Problem) -> Problem:
        rng = random.Random(f"planted {problem.question}")
        if not problem.choices or rng.random() >= self.planted:
            return problem
        wrong = list(problem.choices)
        right = wrong.pop("abcd".index(str(problem.answer)))
        choices = (*wrong[:2], right, *wrong[2:])
        return replace(problem, choices=choices, answer=Answer(kind="choice", value="c"))


class Terse(WordProblems):
    """Some solutions state the result without the working, as hurried people write them."""

    terse: float = Field(0.0, ge=0, le=1)
    """Share of solutions without the working."""

    def _solution(self, story: Any, rng: random.Random) -> tuple[str, str]:
        style, solution = super()._solution(story, rng)
        if rng.random() >= self.terse:
            return style, solution
        if self.rationale == "nl":
            return "terse", f"That is {story.answer.value}."
        return "terse", f"def solution():\n    return {story.answer.value}"


class FewRationales(WordProblems):
    """Only the first training questions have rationales. The others have only answers."""

    rationales: int = Field(ge=1)
    """Number of training questions with a rationale."""

    def load(self, *, seed: int) -> Splits:
        return _few_rationales(super().load(seed=seed), self.rationales)


class FewSvampRationales(Svamp):
    """SVAMP in which only the first training questions keep their rationales."""

    rationales: int = Field(ge=1)
    """Number of training questions with a rationale."""

    def load(self, *, seed: int) -> Splits:
        return _few_rationales(super().load(seed=seed), self.rationales)


def _few_rationales(splits: Splits, count: int) -> Splits:
    """`splits` with rationales for the first `count` training questions only."""
    rest = [replace(problem, rationale=None) for problem in splits.train[count:]]
    return replace(splits, train=(*splits.train[:count], *rest))


class Long(WordProblems):
    """Solutions in words that restate each fact before computing with it, in about 16 tokens per
    operation: `Ben has 9 hats. Ben loses 4 hats, so Ben has 9 - 4 = 5.` Style 1 swaps operands."""

    rationale: Literal["nl"] = "nl"
    styles: int = Field(2, ge=1, le=2)
    distractors: Literal[0] = 0

    def _solution(self, story: Any, rng: random.Random) -> tuple[str, str]:
        style = rng.randrange(self.styles)
        facts = story.text.split(". ")[:-1]
        steps = list(dict.fromkeys([*story.quantities, story.answer]))
        if len(facts) < len(steps):  # no fact states the last operation
            facts.append("We add both" if story.answer.symbol == "+" else "We compare both")
        sentences = [
            f"{fact}, so {_result(step, swap=style == 1)}." if step.symbol else f"{fact}."
            for fact, step in zip(facts, steps, strict=True)
        ]
        return str(style), " ".join(sentences)


def _result(step: Any, *, swap: bool) -> str:
    return f"{f'{step.owner} has' if step.owner else 'that is'} {_equation(step, swap)}"
