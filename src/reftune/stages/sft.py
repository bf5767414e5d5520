"""Supervised fine-tuning on gold rationales: ReFT's warm-up and the paper's main baseline."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import Field, model_validator
from torch import Tensor

from reftune.algorithms.base import LossTerms, token_weights
from reftune.errors import DataError
from reftune.model.batch import TokenBatch, token_batch
from reftune.model.policy import Policy
from reftune.recipe import refusal
from reftune.seeds import generator
from reftune.stages.loop import Look, Loop, Progression, TrainingTable
from reftune.stages.optimizer import Trained, accumulate_gradient
from reftune.stages.rollouts import Collector
from reftune.stages.stage import Cost, Stage, StageContext
from reftune.types import Problem

E = TypeVar("E")


class Schedule(TrainingTable):
    """The length and pace of supervised training."""

    epochs: float = Field(gt=0, allow_inf_nan=False)
    batch_size: int = Field(gt=0)
    """Sequences per optimizer step."""
    eval_every: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Epochs between dev evaluations."""

    def cost_of_rows(self, num_rows: int, *, sampled_before: int = 0) -> Cost:
        return Cost(
            steps=self.epochs * num_rows / self.batch_size,
            batch=self.batch_size,
            sampled_before=sampled_before,
            sampler=sampled_before > 0,
            looks=self.epochs / self.eval_every,
            state_bits=self.optimizer.state_bits,
        )


class Sft(Schedule, Stage):
    snapshots: dict[str, float] = Field(default_factory=dict)
    """Additional methods to save. `{NAME: EPOCHS}` saves the weights after EPOCHS epochs as the
    method NAME. If the stage ends earlier, it saves its last weights."""

    until: Literal["plateau"] | None = None
    """`plateau` ends the stage early if dev accuracy [levels off](handover.md). This needs
    `optimizer.schedule: constant`."""

    reads_rationales: ClassVar[bool] = True

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        for method, epoch in self.snapshots.items():
            if not 0 < epoch <= self.epochs:
                raise refusal(
                    "snapshot",
                    f"snapshots.{method}: {epoch:g}; expected an epoch above 0 and up to"
                    f" epochs={self.epochs}",
                )
        if self.until is not None and self.optimizer.schedule != "constant":
            schedule = self.optimizer.schedule
            raise refusal(
                "until", f"until: plateau needs optimizer.schedule: constant, got {schedule}"
            )
        return self

    @property
    def produces(self) -> tuple[str, ...]:
        return tuple(self.snapshots)

    def line(self) -> str:
        kept = "".join(
            f", snapshot {method} at epoch {epoch:g}" for method, epoch in self.snapshots.items()
        )
        return f"{schedule_line(self, self.init)}{kept}"

    def cost(self, *, num_train: int, num_dev: int) -> Cost:
        return self.cost_of_rows(num_train)

    def run(self, context: StageContext) -> None:
        """Train, saving the snapshots along the way, then save the model that was best on dev."""
        examples = gold_examples(context.splits.train, context.collector, context.policy)
        train_in_epochs(
            self,
            context,
            imitation(context.policy, examples),
            snapshots=self.snapshots,
            until_plateau=self.until is not None,
        )


def schedule_line(schedule: Schedule, init: str) -> str:
    """A summary, such as `3 epochs from base, batch size 32, learning rate 0.001`."""
    rate = schedule.optimizer.learning_rate
    epochs = "1 epoch" if schedule.epochs == 1 else f"{schedule.epochs:g} epochs"
    return f"{epochs} from {init}, batch size {schedule.batch_size}, learning rate {rate:g}"


@dataclass(frozen=True, slots=True)
class Example:
    """The token ids of a prompt and of the continuation to learn. The continuation includes its end
    token."""

    prompt: list[int]
    target: list[int]


def gold_examples(
    problems: Sequence[Problem], collector: Collector, policy: Policy
) -> list[Example]:
    """One example for each problem that has a gold rationale. Examples that are too long are left
    out. Raises: DataError if no example is left."""
    encoder = collector.encoder
    examples = [
        Example(encoder.prompt(problem), encoder.target(problem))
        for problem in problems
        if problem.rationale is not None
    ]
    kept = [e for e in examples if collector.fits(e.prompt, e.target, policy)]
    if not kept:
        raise DataError(
            f"no training row can be used: {len(examples)} of {len(problems)} have a rationale, and"
            f" none of these fits in {collector.limits(policy)}"
        )
    return kept


@dataclass(frozen=True, kw_only=True, slots=True)
class Task(Generic[E]):
    """A model and the examples on which `train_in_epochs` trains it."""

    model: Trained
    examples: Sequence[E]
    gradient: Callable[[Sequence[E]], dict[str, float]]
    """Accumulates the gradient of some examples and returns metrics. Raises: the errors of
    `accumulate_gradient`."""
    show: Callable[[Sequence[E]], Sequence[Mapping[str, Any]]]
    """Returns examples in readable form, to be saved if the loss or the gradient is not finite."""
    look: Callable[[], Look] | None = None
    """Evaluates the model on dev. None if the model is a policy, because `Loop` can evaluate a
    policy itself."""


def imitation(policy: Policy, examples: Sequence[Example]) -> Task[Example]:
    """The task of training `policy` to reproduce the targets of `examples`."""

    def gradient(rows: Sequence[Example]) -> dict[str, float]:
        batch = token_batch(
            [e.prompt for e in rows], [e.target for e in rows], device=policy.device
        )
        loss = accumulate_nll(policy, batch)
        num_tokens = int(batch.lengths.sum())
        return {"loss/sft": loss, "loss/total": loss, "compute/train_tokens": num_tokens}

    def show(rows: Sequence[Example]) -> list[dict[str, Any]]:
        sequences = [[*e.prompt, *e.target] for e in rows]
        return [{"text": policy.decode(tokens), "tokens": tokens} for tokens in sequences]

    return Task(model=policy, examples=examples, gradient=gradient, show=show)


def train_in_epochs(
    schedule: Schedule,
    context: StageContext,
    task: Task[E],
    *,
    snapshots: Mapping[str, float] | None = None,
    start: Progression | None = None,
    until_plateau: bool = False,
) -> None:
    """Train on batches of shuffled examples for `schedule.epochs` epochs. `start` is the stage's
    state before step 1; its `totals` and `seconds` contain the cost of creating the examples. For
    `snapshots`, see `Sft`; for `until_plateau`, see `Loop`."""
    steps_per_epoch = math.ceil(len(task.examples) / schedule.batch_size)

    def steps(epochs: float) -> int:
        return max(1, round(epochs * steps_per_epoch))

    def step(n: int) -> dict[str, float]:
        started = time.perf_counter()
        epoch, position = divmod(n - 1, steps_per_epoch)
        order = generator(context.seed("epoch"), epoch).permutation(len(task.examples)).tolist()
        first = position * schedule.batch_size
        rows = [task.examples[i] for i in order[first : first + schedule.batch_size]]
        task.model.train()
        metrics = loop.descend(n, partial(task.gradient, rows), partial(task.show, rows))
        return {
            "progress/epoch": n / steps_per_epoch,
            **metrics,
            "compute/sequence_passes": len(rows) if metrics else 0,
            "time/update_s": time.perf_counter() - started,
        }

    loop = Loop(
        context,
        schedule,
        task.model,
        total_steps=steps(schedule.epochs),
        eval_every=steps(schedule.eval_every),
        snapshots={method: steps(epoch) for method, epoch in (snapshots or {}).items()},
        look=task.look,
        start=start,
        until_plateau=until_plateau,
    )
    loop.run(step)


def accumulate_nll(policy: Policy, batch: TokenBatch) -> float:
    """Accumulate the gradient of the responses' negative log-likelihood, averaged over tokens, and
    return this loss in nats per token. Raises: the errors of `accumulate_gradient`."""
    weights = token_weights(batch.response_mask, "token")

    def loss(rows: Tensor) -> LossTerms:
        logprobs = policy(batch.rows(rows)).logprobs
        return LossTerms(total=-(logprobs * weights[rows, : logprobs.shape[1]]).sum())

    return accumulate_gradient(policy, batch, loss)["loss/total"]
