"""Supervised fine-tuning on gold rationales: ReFT's warm-up and the paper's main baseline."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from reftune.algorithms.base import LossTerms
from reftune.algorithms.losses import token_weights
from reftune.errors import DataError, NonFiniteError
from reftune.model.batch import TokenBatch, token_batch
from reftune.model.encoder import Encoder
from reftune.model.policy import Policy
from reftune.seeds import generator
from reftune.stages.loop import Look, Loop, Progression, TrainingTable
from reftune.stages.optimizer import Gradient, Trained
from reftune.stages.stage import Cost, Stage, StageContext
from reftune.types import Problem


class Schedule(TrainingTable):
    """Length and pace of supervised training."""

    epochs: float = Field(gt=0)
    batch_size: int = Field(gt=0)
    """Sequences in one optimizer step."""
    eval_every: float = Field(1.0, gt=0)
    """Epochs between looks at dev; the best model on dev is the stage's result."""

    def cost_of_rows(self, num_rows: int, *, sampled_before: int = 0) -> Cost:
        """What training on so many rows does."""
        return Cost(
            steps=self.epochs * num_rows / self.batch_size,
            batch=self.batch_size,
            sampled_before=sampled_before,
            looks=self.epochs / self.eval_every,
            state_bits=self.optimizer.state_bits,
        )


class Sft(Schedule, Stage):
    kind: Literal["sft"] = "sft"
    snapshots: dict[str, float] = Field(default_factory=dict)
    """Method name → epoch. The weights after that epoch become a method of their own, such as the
    paper's warm-up."""

    until: Literal["plateau"] | None = None
    """`plateau`: end once dev has not risen beyond its paired 95 % interval over four looks, with a
    cooldown over a tenth of the steps so far, and after `epochs` at the latest. RL can then begin.
    Needs `optimizer.schedule: constant`."""

    reads_rationales: ClassVar[bool] = True

    @model_validator(mode="after")
    def _snapshots_are_passed(self) -> Self:
        for method, epoch in self.snapshots.items():
            if not 0 < epoch <= self.epochs:
                raise PydanticCustomError(
                    "snapshot",
                    "snapshots.{method}: expected an epoch within 0 and epochs={epochs}",
                    {"method": method, "epochs": self.epochs},
                )
        return self

    @model_validator(mode="after")
    def _constant_until_the_plateau(self) -> Self:
        if self.until is not None and self.optimizer.schedule != "constant":
            raise PydanticCustomError(
                "until",
                "until: plateau needs optimizer.schedule: constant, got {schedule}",
                {"schedule": self.optimizer.schedule},
            )
        return self

    @property
    def produces(self) -> tuple[str, ...]:
        return tuple(self.snapshots)

    def line(self) -> str:
        """`67 epochs of 32 from base, warmup after 32, learning rate 0.002`"""
        kept = "".join(f", {method} after {epoch:g}" for method, epoch in self.snapshots.items())
        return f"{schedule_line(self, self.init)}{kept}"

    def cost(self, *, num_train: int, num_dev: int) -> Cost:
        return self.cost_of_rows(num_train)

    def run(self, context: StageContext) -> None:
        """Train, then leave the model that was best on dev (and the snapshots)."""
        examples = gold_examples(
            context.splits.train,
            context.collector.encoder,
            max_target=context.recipe.lengths.max_new,
            context_length=context.policy.context,
        )
        task = Imitation(context, examples)
        is_open = self.until is not None
        train_in_epochs(self, context, task, snapshots=self.snapshots, until_plateau=is_open)


def schedule_line(schedule: Schedule, init: str) -> str:
    """`3 epochs of 32 from base, learning rate 0.001`"""
    rate = schedule.optimizer.learning_rate
    return (
        f"{schedule.epochs:g} epochs of {schedule.batch_size} from {init}, learning rate {rate:g}"
    )


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the continuation to learn, eos included."""

    prompt: list[int]
    target: list[int]


def gold_examples(
    problems: tuple[Problem, ...], encoder: Encoder, *, max_target: int, context_length: int | None
) -> list[Example]:
    """The problems' gold rationales; those that do not fit are left out.

    Raises: DataError if none is left.
    """
    with_rationale = [problem for problem in problems if problem.rationale is not None]
    examples = [
        Example(encoder.prompt(problem), encoder.target(problem)) for problem in with_rationale
    ]
    kept = fitting(examples, max_target=max_target, context_length=context_length)
    if not kept:
        raise DataError(
            f"no training row is left of {len(problems)}: {len(with_rationale)} have a rationale,"
            f" and none of them fits in lengths.max_new={max_target} tokens and the model's context"
            f" of {context_length}"
        )
    return kept


def fitting(
    examples: Iterable[Example], *, max_target: int, context_length: int | None
) -> list[Example]:
    """Those that are within the limits."""
    longest = math.inf if context_length is None else context_length
    return [
        e
        for e in examples
        if len(e.target) <= max_target and len(e.prompt) + len(e.target) <= longest
    ]


class Task(Protocol):
    """What is learned in epochs over examples."""

    @property
    def model(self) -> Trained: ...

    @property
    def look(self) -> Callable[[], Look] | None:
        """`dev/accuracy` of what is not a policy; None: greedy answers to dev."""

    def __len__(self) -> int:
        """Number of examples."""

    def gradient(self, indices: Sequence[int], where: str) -> dict[str, float]:
        """Add the gradient of these examples; metrics. Raises: NonFiniteError before it is used."""

    def show(self, indices: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        """The examples, for a person to read if a step's numbers are not finite."""


class Imitation:
    """Writing the targets of examples, by a context's policy."""

    look: ClassVar[None] = None

    def __init__(self, context: StageContext, examples: Sequence[Example]) -> None:
        self.model: Policy = context.policy
        self.examples = examples
        self.max_tokens = context.recipe.model.max_tokens

    def __len__(self) -> int:
        return len(self.examples)

    def gradient(self, indices: Sequence[int], where: str) -> dict[str, float]:
        rows = [self.examples[i] for i in indices]
        batch = token_batch(
            [e.prompt for e in rows], [e.target for e in rows], device=self.model.device
        )
        loss = accumulate_nll(self.model, batch, max_tokens=self.max_tokens, where=where)
        num_tokens = int(batch.lengths.sum())
        return {"loss/sft": loss, "loss/total": loss, "compute/train_tokens": num_tokens}

    def show(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        sequences = [[*self.examples[i].prompt, *self.examples[i].target] for i in indices]
        return [{"text": self.model.decode(tokens), "tokens": tokens} for tokens in sequences]


def train_in_epochs(
    schedule: Schedule,
    context: StageContext,
    task: Task,
    *,
    snapshots: Mapping[str, float] | None = None,
    start: Progression | None = None,
    until_plateau: bool = False,
) -> None:
    """Optimizer steps on batches of shuffled examples; `start` holds what was spent on making the
    examples."""
    steps_per_epoch = math.ceil(len(task) / schedule.batch_size)

    def step(n: int) -> dict[str, float]:
        started, where = time.perf_counter(), f"{context.name} step {n}"
        epoch, position = divmod(n - 1, steps_per_epoch)
        order = generator(context.seed("epoch"), epoch).permutation(len(task)).tolist()
        indices = order[position * schedule.batch_size : (position + 1) * schedule.batch_size]
        task.model.train()
        metrics: dict[str, float] = {"progress/epoch": n / steps_per_epoch}
        try:
            metrics |= task.gradient(indices, where)
            metrics |= {"grad/norm": loop.optimizer_step(n), "optim/lr": loop.learning_rate(n)}
            metrics["compute/sequence_passes"] = len(indices)
        except NonFiniteError as error:
            loop.give_up_step(error, task.show(indices))
            metrics = {"progress/epoch": n / steps_per_epoch}
        return {**metrics, "time/update_s": time.perf_counter() - started}

    loop = Loop(
        context,
        schedule,
        task.model,
        total_steps=max(1, round(schedule.epochs * steps_per_epoch)),
        eval_every=max(1, round(schedule.eval_every * steps_per_epoch)),
        snapshots={
            method: max(1, round(epoch * steps_per_epoch))
            for method, epoch in (snapshots or {}).items()
        },
        look=task.look,
        start=start,
        until_plateau=until_plateau,
    )
    loop.run(step)


def accumulate_nll(
    policy: Policy,
    batch: TokenBatch,
    *,
    max_tokens: int,
    where: str,
    weights: torch.Tensor | None = None,
) -> float:
    """Add the gradient of the token-mean negative log-likelihood of the responses; its value, nats
    a token.

    Raises: NonFiniteError before the gradient is used.
    """
    weights = token_weights(batch.response_mask, "token") if weights is None else weights
    gradient = Gradient(policy, batch.lengths, max_tokens=max_tokens, where=where)
    for rows in gradient:
        logprobs = policy(batch.rows(rows)).logprobs
        gradient.add(LossTerms(total=-(logprobs * weights[rows, : logprobs.shape[1]]).sum()))
    return gradient.finish()["loss/total"]
