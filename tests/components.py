"""Recipe components as a user might write them, for the tests."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from reftune.datasets import Splits
from reftune.recipe import Component
from reftune.types import Answer, Completion, Graded, Problem, Verdict


class Tossed(Component):
    """A format whose targets are bodies of programs. The bytes of question and completion decide,
    like a coin toss, whether a completion is right. No program is run."""

    def prompt(self, problem: Problem) -> str:
        return f"{problem.question}\ndef solution():\n"

    def target(self, problem: Problem) -> str:
        assert problem.rationale is not None
        return problem.rationale.removeprefix("def solution():\n")

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Graded]:
        tosses = [
            zlib.crc32(f"{p.question}{text}".encode()) % 2
            for p, text in zip(problems, completions, strict=True)
        ]
        return [
            Graded(verdict=Verdict.WRONG if toss else Verdict.CORRECT, value=str(toss), reason="")
            for toss in tosses
        ]


class SayGold(Tossed):
    """A completion is right if it starts with the gold answer."""

    def prompt(self, problem: Problem) -> str:
        return f"{problem.question}\n"

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Graded]:
        return [
            Graded(
                verdict=Verdict.CORRECT if text.startswith(str(p.answer)) else Verdict.WRONG,
                value=text,
                reason="",
            )
            for p, text in zip(problems, completions, strict=True)
        ]


class Colours(Component):
    """One-word questions with one-word answers. Every split has the same words. The format ignores
    `choices`, which make the questions of the splits differ."""

    num_answers: int = 4

    def load(self, *, seed: int) -> Splits:
        words = ("red", "green", "blue", "white", "black", "grey", "pink", "brown")

        def problem(split: str, i: int) -> Problem:
            answer = Answer(kind="text", value=words[i % self.num_answers])
            return Problem(
                id=f"{split}-{i}",
                question=words[i % len(words)],
                answer=answer,
                rationale=str(answer.value),
                choices=(split,),
            )

        train, dev, test = (
            tuple(problem(split, i) for i in range(8)) for split in ("train", "dev", "test")
        )
        return Splits(train=train, dev=dev, test=test)


class ByVerdict(Component):
    """1 for a right answer, 0.1 for a wrong one."""

    def __call__(
        self,
        problems: Sequence[Problem],
        completions: Sequence[Completion],
        graded: Sequence[Graded],
    ) -> list[float | None]:
        return [1.0 if g.verdict is Verdict.CORRECT else 0.1 for g in graded]


class ByQuestion(Component):
    """A reward of 1 for questions that begin in the first half of the alphabet, whatever the
    answer, so that a value head can predict it."""

    def __call__(
        self,
        problems: Sequence[Problem],
        completions: Sequence[Completion],
        graded: Sequence[Graded],
    ) -> list[float | None]:
        return [float(p.question[0].lower() < "h") for p in problems]
