"""Two deliberately flawed kinds of word problems: one gives the answer away by its place among the
options, the other has solutions without their working. In a recipe:
`dataset: {kind: demo/variants.py:Planted, planted: 0.6}`."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from pydantic import Field

from reftune.datasets import Splits
from reftune.datasets.word_problems import WordProblems
from reftune.types import Answer, Problem


class Planted(WordProblems):
    """Multiple choice with a shortcut past the reasoning. Test questions have none."""

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
