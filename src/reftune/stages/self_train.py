"""Offline self-training fine-tunes on gold solutions and on correct samples, which are drawn once,
before the first step.

To match ReFT's code, set `gold: paper` and `top_k: 50`.
"""

from __future__ import annotations

import time
from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from reftune.errors import DataError
from reftune.grading.formats.nl import Nl
from reftune.grading.markers import marker_pattern
from reftune.processes.world import from_main
from reftune.stages.loop import Progression
from reftune.stages.rollouts import Solved
from reftune.stages.sft import Example, Schedule, imitation, schedule_line, train_in_epochs
from reftune.stages.stage import Cost, Stage, StageContext
from reftune.storage.files import JsonLines, in_parts
from reftune.text import counted
from reftune.types import Attempt, Problem

SAMPLES_AT_ONCE = 2000
"""Approximate number of samples drawn between two writes to disk. After an interruption, sampling
continues from the last write."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """The solutions to one problem, in the order in which they were drawn."""

    problem: Problem
    attempts: Sequence[Attempt]
    """The graded solutions, without the grades' reasons."""
    num_tokens: int
    """Total number of tokens in all samples."""

    @property
    def correct(self) -> list[str]:
        return [attempt.completion for attempt in self.attempts if attempt.correct]


class Sampled(Stage, ABC):
    """A stage that samples solutions to the training problems before its first step."""

    sampler: str = "warmup"
    """Model that draws the samples: `base` or an earlier method."""
    samples: int = Field(100, gt=0)
    """Samples per training problem."""
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0)
    """Sample only from the `top_k` most likely tokens. With 0, sample from all tokens."""

    reads_questions: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.init, self.sampler)

    def draw(
        self, context: StageContext, problems: Sequence[Problem], path: Path, *, num: int
    ) -> list[Samples]:
        """Draw `num` solutions to every problem and return them. The solutions are also written to
        `path`, one line per problem, so that sampling can continue after an interruption. For given
        settings, a problem's samples depend only on the sampler's weights, the seed and the
        problem's position in `problems`."""
        rows = from_main(JsonLines(path).rows)
        if len(rows) < len(problems):
            context.progress.note(
                f"{context.name}: drawing {counted(num, 'sample')} per problem from"
                f" {self.sampler}, for {counted(len(problems), 'problem')}"
            )
            policy = context.load(self.sampler)

            def answer(start: int, part: Sequence[Problem]) -> list[dict[str, Any]]:
                solved = context.collector.solve(
                    policy,
                    [problem for problem in part for _ in range(num)],
                    temperature=self.temperature,
                    top_k=self.top_k,
                    seed=context.seed(path.stem, start),
                )
                return _rows(part, solved, num)

            rows = in_parts(problems, path, answer, at_once=max(1, SAMPLES_AT_ONCE // num))
        return [
            Samples(
                problem=problem,
                attempts=[Attempt.from_row(sample) for sample in row["samples"]],
                num_tokens=row["tokens"],
            )
            for problem, row in zip(problems, rows, strict=True)
        ]


def _rows(problems: Sequence[Problem], solved: Solved, num: int) -> list[dict[str, Any]]:
    samples = [
        Attempt(
            completion=completion.text, graded=replace(graded, reason="", program_s=None)
        ).to_row()
        for completion, graded in zip(solved.completions, solved.graded, strict=True)
    ]
    lengths = [len(completion.token_ids) for completion in solved.completions]
    return [
        {"id": problem.id, "tokens": sum(lengths[i : i + num]), "samples": samples[i : i + num]}
        for problem, i in zip(problems, range(0, len(samples), num), strict=True)
    ]


def describe(drawn: Sequence[Samples]) -> str:
    """A summary of the samples, such as `62% of 8,000 samples are correct; 31 of 1,000 problems
    have no correct sample`."""
    correct = sum(len(samples.correct) for samples in drawn)
    total = sum(len(samples.attempts) for samples in drawn)
    unsolved = sum(not samples.correct for samples in drawn)
    return (
        f"{correct / total:.0%} of {total:,} samples are correct; {unsolved} of {len(drawn):,}"
        " problems have no correct sample"
    )


class SelfTrain(Sampled):
    init: str = "base"
    keep: int = Field(10, gt=0)
    """Maximum number of distinct correct samples kept per problem."""
    gold: Literal["once", "paper"] = "once"
    """How many rows a gold solution adds: 1 with `once`, 2 with `paper`, as in the data files of
    ReFT's authors. The number is one lower if a kept sample repeats the gold solution."""
    sft: Schedule
    """How to train: the keys of an `sft` stage, except `kind`, `init`, `snapshots` and `until`."""

    def line(self) -> str:
        sampled = f"{counted(self.samples, 'sample')} per problem from {self.sampler}"
        return f"{schedule_line(self.sft, self.init)}, on {sampled}"

    def cost(self, *, num_train: int, num_dev: int) -> Cost:
        """An upper bound on the cost, because repeated samples are used only once."""
        return self.sft.cost_of_rows(
            (1 + self.keep) * num_train, sampled_before=self.samples * num_train
        )

    def run(self, context: StageContext) -> None:
        """Draw samples, join them with the gold solutions, train, and save the model that was best
        on dev."""
        started = time.perf_counter()
        drawn = self.draw(context, context.splits.train, context.folder.drawn, num=self.samples)
        examples = self.examples(drawn, context)
        context.progress.note(
            f"{context.name}: {counted(len(examples), 'row')} to train on; {describe(drawn)}"
        )
        spent = {"compute/sampled_tokens": float(sum(samples.num_tokens for samples in drawn))}
        start = Progression(totals=spent, seconds=time.perf_counter() - started)
        train_in_epochs(self.sft, context, imitation(context.policy, examples), start=start)

    def examples(self, drawn: Sequence[Samples], context: StageContext) -> list[Example]:
        """The rows to train on: for each problem, at most `keep` correct samples and the gold
        solution. Overlong solutions are dropped before the samples are chosen. Raises: DataError if
        no row is left."""
        collector, policy = context.collector, context.policy
        encoder = collector.encoder
        join = join_once if self.gold == "once" else join_as_paper
        same = less_answer if isinstance(encoder.format, Nl) else str.strip
        kept: list[Example] = []
        for samples in drawn:
            problem, correct = samples.problem, samples.correct
            gold = [] if problem.rationale is None else [encoder.format.target(problem)]
            prompt, texts = encoder.prompt(problem), [*distinct(correct, same), *gold]
            rows = {text: Example(prompt, encoder.continuation(problem, text)) for text in texts}
            fitting = {t for t, row in rows.items() if collector.fits(prompt, row.target, policy)}
            correct = [text for text in correct if text in fitting]
            gold = [text for text in gold if text in fitting]
            kept += [rows[text] for text in join(correct, gold, self.keep, same)]
        if not kept:
            raise DataError(
                f"stages.{context.name}: nothing to train on: {describe(drawn)}; neither a correct"
                f" sample nor a gold rationale fits in {collector.limits(policy)}"
            )
        return kept


# --- joining samples and gold ---------------------------------------------------------------------


Same = Callable[[str], str]
"""Maps a solution to a text. Solutions with equal texts count as repeats of each other."""


def distinct(texts: Sequence[str], same: Same = str.strip) -> list[str]:
    """`texts` without repeats. Texts for which `same` returns equal results count as repeats, and
    only the first of them is kept. By default, leading and trailing white space is ignored."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(same(text), text)
    return list(first.values())


def less_answer(text: str) -> str:
    """A natural-language solution without its answer and without leading and trailing white space.
    The answer is the text from the last built-in answer marker, such as `####`, to the end. It is
    removed only if the marker is in the last line, and only if some text comes before the marker.
    Two solutions thus become equal if they differ only in how the answer is written, for example as
    1/2 in one and as 0.5 in the other."""
    *_, begins = 0, *(marker.start() for marker in marker_pattern(()).finditer(text))
    is_last_line = "\n" not in text[begins:].strip()
    return (is_last_line and text[:begins].strip()) or text.strip()


def join_once(
    correct: Sequence[str], gold: Sequence[str], keep: int, same: Same = str.strip
) -> list[str]:
    """The first `keep` distinct correct solutions, then the gold solution, if there is one and it
    is not already among them."""
    return distinct([*distinct(correct, same)[:keep], *gold], same)


def join_as_paper(
    correct: Sequence[str], gold: Sequence[str], keep: int, same: Same = str.strip
) -> list[str]:
    """The result of `join_once`, with the gold solution (if there is one) repeated at the end.
    Source: ReFT's code (arXiv:2401.08967, §4.2). There are two differences. White space at the
    start and end of a solution is kept, because programs need it. Also, solutions in words count as
    repeats if they differ only in how the answer is written."""
    return [*join_once(correct, gold, keep, same), *gold]
