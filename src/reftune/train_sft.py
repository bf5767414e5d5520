"""Supervised fine-tuning on gold rationales: ReFT's warm-up and the paper's main baseline."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from reftune.batch import TokenBatch, micro_batches, token_batch
from reftune.encoding import Encoder
from reftune.errors import DataError, NonFiniteError
from reftune.losses import token_weights
from reftune.policy import Policy
from reftune.recipe import Component
from reftune.seeds import generator
from reftune.training import Loop, OptimizerTable, StageContext, make_optimizer, optimizer_step, rate
from reftune.types import Problem


class Sft(Component):
    kind: Literal["sft"] = "sft"
    init: str = "base"
    """Method whose chosen model this stage starts from, or `base`."""
    epochs: float = Field(gt=0)
    batch_size: int = Field(gt=0)
    """Sequences in one optimizer step."""
    optimizer: OptimizerTable
    snapshots: dict[str, float] = Field(default_factory=dict)
    """Method name → epoch. The weights after that epoch of this very schedule become a method of their own: the paper's
    warm-up is such a snapshot of its SFT run."""
    eval_every: float = Field(1.0, gt=0)
    """Epochs between looks at dev; the best model on dev is the stage's result."""
    save_every_s: float = Field(300.0, ge=0)
    """Seconds between checkpoints."""

    @model_validator(mode="after")
    def _snapshots_are_passed(self) -> Self:
        for method, epoch in self.snapshots.items():
            if not 0 < epoch <= self.epochs:
                raise PydanticCustomError("snapshot", "snapshots.{method}: expected an epoch within 0 and epochs={epochs}",
                                          {"method": method, "epochs": self.epochs})  # fmt: skip
        return self

    @property
    def produces(self) -> tuple[str, ...]:
        return tuple(self.snapshots)

    def run(self, context: StageContext) -> None:
        """Train, then leave the model that was best on dev (and the snapshots)."""
        examples = gold_examples(context.splits.train, context.collector.encoder, max_target=context.recipe.lengths.max_new,
                                 context_length=context.policy.context)  # fmt: skip
        train_on_examples(self, context, examples)


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
    examples = [Example(encoder.prompt(problem), encoder.target(problem)) for problem in with_rationale]
    kept = [
        e for e in examples if len(e.target) <= max_target and len(e.prompt) + len(e.target) <= (context_length or math.inf)
    ]
    if not kept:
        raise DataError(
            f"no training row is left of {len(problems)}: {len(with_rationale)} have a rationale, and none of them fits in "
            f"lengths.max_new={max_target} tokens and the model's context of {context_length}"
        )
    return kept


def train_on_examples(stage: Sft, context: StageContext, examples: list[Example]) -> None:
    """The SFT loop over any examples."""
    policy, table = context.policy, stage.optimizer
    optimizer = make_optimizer(policy, table)
    steps_per_epoch = math.ceil(len(examples) / stage.batch_size)
    total_steps = max(1, round(stage.epochs * steps_per_epoch))

    def step(n: int) -> dict[str, float]:
        started = time.perf_counter()
        epoch, position = divmod(n - 1, steps_per_epoch)
        order = generator(context.seed("epoch"), epoch).permutation(len(examples))
        rows = [examples[i] for i in order[position * stage.batch_size : (position + 1) * stage.batch_size]]
        batch = token_batch([e.prompt for e in rows], [e.target for e in rows], device=policy.device)
        policy.train()
        loss = accumulate_nll(
            policy, batch, max_tokens=context.recipe.model.micro_batch_tokens, where=f"{context.name} step {n}"
        )
        share = rate(table, step=n, total_steps=total_steps)
        norm = optimizer_step(
            policy, optimizer, share=share, max_grad_norm=table.max_grad_norm, where=f"{context.name} step {n}"
        )
        return {
            "progress/epoch": n / steps_per_epoch,
            "loss/sft": loss,
            "loss/total": loss,
            "grad/norm": norm,
            "optim/lr": table.learning_rate * share,
            "compute/sequence_passes": len(rows),
            "compute/train_tokens": int(batch.lengths.sum()),
            "time/update_s": time.perf_counter() - started,
        }

    loop = Loop(
        context,
        optimizer,
        kind=stage.kind,
        init=stage.init,
        total_steps=total_steps,
        eval_every=max(1, round(stage.eval_every * steps_per_epoch)),
        save_every_s=stage.save_every_s,
        snapshots={method: max(1, round(epoch * steps_per_epoch)) for method, epoch in stage.snapshots.items()},
    )
    loop.run(step)


def accumulate_nll(
    policy: Policy, batch: TokenBatch, *, max_tokens: int, where: str, weights: torch.Tensor | None = None
) -> float:
    """Add the gradient of the token-mean negative log-likelihood of the responses; its value, nats a token.

    Raises: NonFiniteError before the gradient is used.
    """
    weights = token_weights(batch.response_mask, "token") if weights is None else weights
    total = 0.0
    for index in micro_batches(batch.lengths, max_tokens=max_tokens):
        scores = policy(batch.rows(index))
        loss = -(scores.logprobs * weights[index, : scores.logprobs.shape[1]]).sum()
        if not torch.isfinite(loss):
            raise NonFiniteError(f"{where}: loss is {float(loss)}; the weights were not changed")
        loss.backward()
        total += float(loss.detach())
    return total
