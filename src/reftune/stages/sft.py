"""Supervised fine-tuning on gold rationales: ReFT's warm-up and the paper's main baseline."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from reftune.algorithms.base import LossTerms
from reftune.algorithms.losses import token_weights
from reftune.errors import DataError, NonFiniteError
from reftune.model.batch import TokenBatch, token_batch
from reftune.model.encoder import Encoder
from reftune.model.policy import Policy
from reftune.processes.sharding import sharding
from reftune.recipe import Component, Table
from reftune.seeds import generator
from reftune.stages.loop import Loop, Progression
from reftune.stages.optimizer import (
    OptimizerTable,
    Trained,
    accumulate_gradient,
    make_optimizer,
    optimizer_step,
    rate,
)
from reftune.stages.stage import StageContext
from reftune.types import Problem


class Schedule(Table):
    """How long, how fast and how closely watched a supervised training is."""

    epochs: float = Field(gt=0)
    batch_size: int = Field(gt=0)
    """Sequences in one optimizer step."""
    optimizer: OptimizerTable
    eval_every: float = Field(1.0, gt=0)
    """Epochs between looks at dev; the best model on dev is the stage's result."""
    save_every_s: float = Field(300.0, ge=0)
    """Seconds between checkpoints."""
    keep: int = Field(2, gt=0)
    """Newest checkpoints kept; the best model on dev is kept beside them."""


class Sft(Schedule, Component):
    kind: Literal["sft"] = "sft"
    init: str = "base"
    """Method whose chosen model this stage starts from, or `base`."""
    snapshots: dict[str, float] = Field(default_factory=dict)
    """Method name → epoch. The weights after that epoch of this very schedule become a method of
    their own: the paper's warm-up is such a snapshot of its SFT run."""

    is_method: ClassVar[bool] = True

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

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.init,)

    @property
    def produces(self) -> tuple[str, ...]:
        return tuple(self.snapshots)

    def run(self, context: StageContext) -> None:
        """Train, then leave the model that was best on dev (and the snapshots)."""
        examples = gold_examples(
            context.splits.train,
            context.collector.encoder,
            max_target=context.recipe.lengths.max_new,
            context_length=context.policy.context,
        )
        train_on_examples(
            self, context, examples, kind=self.kind, init=self.init, snapshots=self.snapshots
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

    Raises: DataError where none is left.
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


def train_on_examples(
    schedule: Schedule,
    context: StageContext,
    examples: Sequence[Example],
    *,
    kind: str,
    init: str,
    snapshots: Mapping[str, float] | None = None,
    start: Progression | None = None,
) -> None:
    """Supervised training of the context's policy; `start` holds what was spent on making the
    examples."""
    policy, max_tokens = context.policy, context.recipe.model.micro_batch_tokens

    def accumulate(indices: Sequence[int], where: str) -> dict[str, float]:
        rows = [examples[i] for i in indices]
        batch = token_batch(
            [e.prompt for e in rows], [e.target for e in rows], device=policy.device
        )
        loss = accumulate_nll(policy, batch, max_tokens=max_tokens, where=where)
        return {
            "loss/sft": loss,
            "loss/total": loss,
            "compute/train_tokens": int(batch.lengths.sum()),
        }

    def show(indices: Sequence[int]) -> list[dict[str, Any]]:
        sequences = [[*examples[i].prompt, *examples[i].target] for i in indices]
        return [{"text": policy.decode(tokens), "tokens": tokens} for tokens in sequences]

    train_in_epochs(
        schedule,
        context,
        policy,
        len(examples),
        accumulate,
        show,
        kind=kind,
        init=init,
        snapshots=snapshots,
        start=start,
    )


def train_in_epochs(
    schedule: Schedule,
    context: StageContext,
    model: Trained,
    num_examples: int,
    accumulate: Callable[[Sequence[int], str], dict[str, float]],
    show: Callable[[Sequence[int]], Sequence[Mapping[str, Any]]],
    *,
    kind: str,
    init: str,
    snapshots: Mapping[str, float] | None = None,
    look: Callable[[], dict[str, float]] | None = None,
    start: Progression | None = None,
) -> None:
    """Steps on batches of shuffled examples; `accumulate(indices, where)` adds the gradient of one
    and returns metrics.

    `show(indices)` are the examples for a person to read where a step's numbers are not finite.
    """
    table = schedule.optimizer
    sharding().distribute(model)
    optimizer = make_optimizer(model, table)
    steps_per_epoch = math.ceil(num_examples / schedule.batch_size)
    total_steps = max(1, round(schedule.epochs * steps_per_epoch))

    def step(n: int) -> dict[str, float]:
        started, where = time.perf_counter(), f"{context.name} step {n}"
        epoch, position = divmod(n - 1, steps_per_epoch)
        order = generator(context.seed("epoch"), epoch).permutation(num_examples).tolist()
        indices = order[position * schedule.batch_size : (position + 1) * schedule.batch_size]
        model.train()
        share = rate(table, step=n, total_steps=total_steps)
        try:
            metrics = accumulate(indices, where)
            norm = optimizer_step(
                model, optimizer, share=share, max_grad_norm=table.max_grad_norm, where=where
            )
        except NonFiniteError as error:
            loop.give_up_step(error, show(indices))
            return {
                "progress/epoch": n / steps_per_epoch,
                "time/update_s": time.perf_counter() - started,
            }
        return {
            "progress/epoch": n / steps_per_epoch,
            **metrics,
            "grad/norm": norm,
            "optim/lr": table.learning_rate * share,
            "compute/sequence_passes": len(indices),
            "time/update_s": time.perf_counter() - started,
        }

    loop = Loop(
        context,
        optimizer,
        table,
        kind=kind,
        init=init,
        total_steps=total_steps,
        eval_every=max(1, round(schedule.eval_every * steps_per_epoch)),
        save_every_s=schedule.save_every_s,
        keep=schedule.keep,
        snapshots={
            method: max(1, round(epoch * steps_per_epoch))
            for method, epoch in (snapshots or {}).items()
        },
        model=model,
        look=look,
        start=start,
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

    def loss(index: torch.Tensor) -> LossTerms:
        scores = policy(batch.rows(index))
        return LossTerms(
            total=-(scores.logprobs * weights[index, : scores.logprobs.shape[1]]).sum()
        )

    return accumulate_gradient(policy, batch.lengths, loss, max_tokens=max_tokens, where=where)[
        "loss/total"
    ]
