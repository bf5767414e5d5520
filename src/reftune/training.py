"""What every training stage shares: the optimizer, the step that refuses non-finite numbers, and the loop around steps that
resumes, evaluates on dev, keeps the best model and saves."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import nn

from reftune import distributed
from reftune.algorithms import LossTerms
from reftune.batch import own_micro_batches
from reftune.checkpoint import (
    link_files,
    load_latest,
    load_optimizer_tensors,
    optimizer_tensors,
    replace_folder,
    save_checkpoint,
    write_atomically,
)
from reftune.choices import choice_metrics, diagnose, is_multiple_choice
from reftune.collect import Collector
from reftune.datasets import Splits
from reftune.errors import CheckpointError, NonFiniteError
from reftune.jsonlines import JsonLines
from reftune.policy import Policy
from reftune.progress import Progress
from reftune.recipe import Recipe, Table
from reftune.seeds import derive_seed
from reftune.signals import stop_signals
from reftune.types import SamplingParams, Verdict


class OptimizerTable(Table):
    """AdamW and its learning rate."""

    learning_rate: float = Field(gt=0)
    value_learning_rate: float | None = Field(None, gt=0)
    """Of the value head; None: the same."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up; linear and cosine reach 0 at the last step."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """On matrices; never on biases, norms and the value head."""
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0)
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What becomes of a step whose loss or gradient is not finite: the run stops before it, or goes on without it."""
    max_skipped: int = Field(10, gt=0)
    """Steps of a stage that `on_nonfinite: skip` may leave out; the next one stops the run."""


class Trained(Protocol):
    """A module that is trained and kept: a policy, or what a stage makes of one."""

    @property
    def packs(self) -> bool: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def train(self) -> Any: ...

    def save(self, folder: Path) -> None: ...


def make_optimizer(model: Trained, table: OptimizerTable) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters of a model that has been distributed, a value head in a group of its own."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if name.startswith("value_head.")]
    body = [p for name, p in trained.items() if not name.startswith("value_head.")]
    groups = [
        {"params": [p for p in body if p.dim() > 1], "weight_decay": table.weight_decay, "peak": table.learning_rate},
        {"params": [p for p in body if p.dim() <= 1], "weight_decay": 0.0, "peak": table.learning_rate},
        {"params": head, "weight_decay": 0.0, "peak": table.value_learning_rate or table.learning_rate},
    ]
    adamw = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=table.learning_rate, betas=table.betas, eps=1e-8, fused=True
    )
    return distributed.distribute_optimizer(model, adamw)


def rate(table: OptimizerTable, *, step: int, total_steps: int) -> float:
    """Share of the peak learning rate at `step` (1-based), in [0, 1]."""
    warmup_steps = round(table.warmup * total_steps)
    if step <= warmup_steps:
        return step / warmup_steps
    remaining = (total_steps - step) / max(1, total_steps - warmup_steps)
    if table.schedule == "linear":
        return remaining
    if table.schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * remaining))
    return 1.0


def optimizer_step(
    model: Trained, optimizer: torch.optim.Optimizer, *, share: float, max_grad_norm: float, where: str
) -> float:
    """Clip, step, clear; the gradient's norm before clipping.

    Raises: NonFiniteError, naming the first parameter concerned, before anything changed.
    """
    gradients, norm = distributed.gradients(model), distributed.gradient_norm(model)
    if not torch.isfinite(norm):
        first = next((name for name, gradient in gradients.items() if not is_finite(gradient)), "their sum of squares")
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(f"{where}: gradient norm is {float(norm)}, first in {first}")
    kept = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients.values():
        gradient.mul_(kept)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


def accumulate_gradient(
    model: Trained, lengths: torch.Tensor, loss_of: Callable[[torch.Tensor], LossTerms], *, max_tokens: int, where: str
) -> dict[str, float]:
    """Add the gradient of a minibatch, micro-batch by micro-batch, each process its own; `loss/total` and metrics.

    `loss_of(rows)` is the part of the loss that the rows of the minibatch add; parts are summed, metrics too (`…_max`: the
    largest). `lengths` (B,) tokens. Raises: NonFiniteError, naming rows, before the gradient is used.
    """
    totals: dict[str, float] = {}
    failed: NonFiniteError | None = None
    even = distributed.is_in_step(model)
    batches = list(own_micro_batches(lengths, max_tokens=max_tokens, packed=model.packs, even=even))
    for number, (index, counts) in enumerate(batches, start=1):
        terms = loss_of(index)
        if counts:
            failed = failed or not_finite(terms.total, index, where)
            _add_metrics(totals, {"loss/total": float(terms.total.detach()), **terms.metrics})
        distributed.backward(model, terms.total if counts else terms.total * 0, is_last=number == len(batches))
    distributed.raise_together(failed)
    distributed.add_up_gradients(model)
    together: dict[str, float] = {}
    for of_process in distributed.gather(totals):
        _add_metrics(together, of_process)
    return together


def _add_metrics(totals: dict[str, float], metrics: Mapping[str, float | torch.Tensor]) -> None:
    for name, value in metrics.items():
        add = max if name.endswith("_max") else float.__add__
        totals[name] = add(totals.get(name, 0.0), float(value))


def not_finite(loss: torch.Tensor, rows: torch.Tensor, where: str) -> NonFiniteError | None:
    """What is wrong with `loss`, naming the rows of the step's batch that it is of."""
    if torch.isfinite(loss):
        return None
    concerned = ", ".join(map(str, sorted(rows.tolist())[:8])) + (" …" if len(rows) > 8 else "")
    return NonFiniteError(f"{where}: loss is {float(loss.detach())} in rows {concerned}")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all its numbers are, in all processes."""
    return not any(distributed.any_of(not distributed.whole_tensor(tensor).isfinite().all()))


@dataclass(frozen=True, kw_only=True, slots=True)
class StageContext:
    """What a stage works with."""

    name: str
    recipe: Recipe
    policy: Policy
    """Initialised as the stage asks; trained in place."""
    splits: Splits
    collector: Collector
    folder: Path
    """`stages/NAME` of the run."""
    metrics: JsonLines
    progress: Progress
    load: Callable[[str], Policy]
    """The base model or an earlier method's chosen one, by name, for stages that need a second model."""

    def seed(self, *parts: int | str) -> int:
        return derive_seed(self.recipe.seed, self.name, *parts)


class Stage(Protocol):
    """A training. Stages are components; `init` names the method whose chosen model they start from, or `base`."""

    init: str

    @property
    def needs(self) -> tuple[str, ...]:
        """All methods whose models this stage reads, `init` among them."""

    @property
    def produces(self) -> tuple[str, ...]:
        """Further methods this stage leaves behind, as snapshots."""

    @property
    def is_method(self) -> bool:
        """Whether its model answers problems, and so is evaluated and can be built on."""

    def run(self, context: StageContext) -> None:
        """Train, then leave the chosen model and `stage.json` in `context.folder`."""


@dataclass(slots=True)
class Progression:
    """The part of a stage's state that is not tensors."""

    step: int = 0
    best_step: int = -1
    best_accuracy: float = -1.0
    looks: int = 0
    """Times the dev split was scored."""
    totals: dict[str, float] = field(default_factory=dict)
    """`compute/…` sums since the stage began."""
    skipped: int = 0
    """Steps left out because their numbers were not finite."""
    seconds: float = 0.0


class Interrupted(Exception):
    """The run was asked to stop and has saved a checkpoint; str() is its folder."""


class Loop:
    """Steps 1 … total: resume, step, log, evaluate on dev, keep the best, save.

    `step(n)` must be a function of the weights, the optimizer and `n`: the loop seeds torch for each step, so a resumed run
    repeats the very same numbers.
    """

    def __init__(
        self,
        context: StageContext,
        optimizer: torch.optim.Optimizer,
        table: OptimizerTable,
        *,
        kind: str,
        init: str,
        total_steps: int,
        eval_every: int,
        save_every_s: float,
        keep: int = 2,
        snapshots: Mapping[str, int] | None = None,
        model: Trained | None = None,
        look: Callable[[], dict[str, float]] | None = None,
        start: Progression | None = None,
    ) -> None:
        """`model` and `look`, its `dev/accuracy` and more, are for what is no policy; `start` holds what came before step 1."""
        self.context, self.optimizer, self.table, self.kind, self.init = context, optimizer, table, kind, init
        self.total_steps, self.eval_every, self.save_every_s, self.keep = total_steps, eval_every, save_every_s, keep
        self.snapshots = dict(snapshots or {})
        self.model: Trained = context.policy if model is None else model
        self.look = look or partial(look_at_dev, context)
        self.is_worth_a_look = look is None and init != "base"
        self.samples = JsonLines(context.folder / "samples.jsonl")
        self.state = start or Progression()
        self._stop = False

    # --- the loop ---

    def run(self, step: Callable[[int], dict[str, float]], *, before: Callable[[], None] | None = None) -> None:
        """Run all remaining steps and leave the chosen model. `before` runs at step 0 of a fresh stage.

        Raises: Interrupted after SIGINT or SIGTERM, checkpoint saved.
        """
        resumed = self._resume()
        self.context.progress.stage(self.context.name, self.total_steps, self.state.step)
        started, last_save = time.perf_counter() - self.state.seconds, time.perf_counter()
        with self._signals():
            if not resumed:
                if before is not None:
                    before()
                if self.is_worth_a_look:
                    self._look()
                self._save()
            while self.state.step < self.total_steps:
                self.state.step += 1
                self._log(self._seeded(step))
                if self.state.step % self.eval_every == 0 or self.state.step == self.total_steps:
                    self._look()
                for method in [method for method, at in self.snapshots.items() if at == self.state.step]:
                    self._snapshot(method)
                self.state.seconds = time.perf_counter() - started
                due = distributed.is_main() and time.perf_counter() - last_save >= self.save_every_s
                stop, due = distributed.any_of(self._stop, due)
                self._stop = self._stop or stop  # a signal may have come meanwhile
                if stop or due:
                    saved, last_save = self._save(), time.perf_counter()
                    if stop and self.state.step < self.total_steps:
                        raise Interrupted(str(saved))
        self._finish()
        if self._stop:
            raise Interrupted(str(self.context.folder))

    def _seeded(self, step: Callable[[int], dict[str, float]]) -> dict[str, float]:
        other = ("process", distributed.rank()) if distributed.rank() > 0 else ()  # whose dropout should not repeat ours
        torch.manual_seed(self.context.seed("step", self.state.step, *other))
        return step(self.state.step)

    def _log(self, metrics: dict[str, float]) -> None:
        for name in [name for name in metrics if name.startswith("compute/")]:
            self.state.totals[name] = self.state.totals.get(name, 0) + metrics[name]
        skipped = {"optim/skipped": self.state.skipped} if self.table.on_nonfinite == "skip" else {}
        row = {**metrics, **self.state.totals, **skipped}
        self.context.metrics.append({"stage": self.context.name, "step": self.state.step, "time": time.time(), **row})
        self.context.progress.step(self.state.step, row)

    def give_up_step(self, error: NonFiniteError, rows: Sequence[Mapping[str, Any]]) -> None:
        """Save the batch of a step whose numbers are not finite and clear its gradient; return where the step may be left out.

        Raises: NonFiniteError where it may not.
        """
        self.optimizer.zero_grad(set_to_none=True)
        path = self.context.folder / f"nonfinite-{self.state.step:06d}.json"
        unsound = [name for name, value in self.model.named_parameters() if not is_finite(value)]
        document = {"where": str(error), "weights_not_finite": unsound, "rows": list(rows)}
        write_atomically(path, json.dumps(document, indent=2, ensure_ascii=False))
        before = f" ({unsound[0]} was not finite before it)" if unsound else ""
        told = f"{error}{before}; the weights were not changed; look at the samples in {path}"
        if self.table.on_nonfinite == "stop":
            raise NonFiniteError(told)
        if self.state.skipped == self.table.max_skipped:
            raise NonFiniteError(f"{told}; {self.state.skipped} steps were left out before, as many as max_skipped allows")
        self.state.skipped += 1
        self.context.progress.note(f"{told}; left out, {self.state.skipped} of at most {self.table.max_skipped}")

    # --- dev ---

    def _look(self) -> None:
        """Accuracy on dev, greedy for a policy; the best model so far is kept. Ties keep the earlier one."""
        seen, dev_n = self.look(), len(self.context.splits.dev)
        accuracy = seen["dev/accuracy"]
        self.state.looks += 1
        row = {**seen, "dev/n": dev_n, "dev/looks": self.state.looks, **self.state.totals}
        self.context.metrics.append({"stage": self.context.name, "step": self.state.step, "time": time.time(), **row})
        self.context.progress.step(self.state.step, row)
        if accuracy > self.state.best_accuracy:
            self.state.best_step, self.state.best_accuracy = self.state.step, accuracy
            replace_folder(self._best, self.model.save)

    @property
    def _best(self) -> Path:
        return self.context.folder / "checkpoints" / "best"

    # --- files ---

    def _resume(self) -> bool:
        found = load_latest(self.context.folder / "checkpoints", note=self.context.progress.note)
        distributed.agree(None if found is None else found.step, what="found different checkpoints, by step")
        if found is None:
            self.samples.truncate(0)
            self.context.metrics.truncate_from(lambda row: row["stage"] == self.context.name)
            return False
        state = dict(found.state)
        try:
            metrics_bytes, samples_bytes = state.pop("metrics_bytes"), state.pop("samples_bytes")
            self.state = Progression(**state)
            load_trainable(self.model, found.tensors)
            load_optimizer_tensors(self.optimizer, found.tensors)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise CheckpointError(f"{found.folder}: is of another model or version: {reason}; choose another run_dir") from None
        self.context.metrics.truncate(metrics_bytes)
        self.samples.truncate(samples_bytes)
        if self.state.step > 0:
            self.context.progress.note(f"{self.context.name}: resumed at step {self.state.step} of {self.total_steps}")
        return True

    def _save(self) -> Path:
        state = {name: getattr(self.state, name) for name in Progression.__slots__}
        tensors = distributed.whole_tensors({**trainable(self.model), **optimizer_tensors(self.optimizer)})
        for log in (self.context.metrics, self.samples):
            log.sync()
        return save_checkpoint(
            self.context.folder / "checkpoints",
            step=self.state.step,
            tensors=tensors,
            state={**state, "metrics_bytes": self.context.metrics.size(), "samples_bytes": self.samples.size()},
            keep=self.keep,
        )

    def _snapshot(self, method: str) -> None:
        """Leave the weights as they are now as a method of their own."""
        folder = self.context.folder.parent / method
        accuracy = self.look()["dev/accuracy"]
        self.state.looks += 1
        replace_folder(folder, self.model.save)
        write_stage(folder, method, self, chosen_step=self.state.step, accuracy=accuracy, snapshot_of=self.context.name)

    def _finish(self) -> None:
        """Put the model chosen on dev in the stage's folder; `stage.json` comes last and marks the stage as done."""
        link_files(self._best, self.context.folder)
        write_stage(
            self.context.folder, self.context.name, self, chosen_step=self.state.best_step, accuracy=self.state.best_accuracy
        )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM stops after the step in progress, with a checkpoint; a second one stops at once."""

        def stop(number: int, frame: Any) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True
            self.context.progress.note("stopping after this step; once more stops at once")

        with stop_signals(stop):
            yield


def look_at_dev(context: StageContext) -> dict[str, float]:
    """`dev/accuracy`, the share of dev answered right by greedy decoding; on multiple choice the signs of `choices` too."""
    problems, max_new = context.splits.dev, context.recipe.lengths.max_new
    solved = context.collector.solve(context.policy, problems, SamplingParams(max_new_tokens=max_new, temperature=0))
    metrics = {"dev/accuracy": sum(graded.verdict is Verdict.CORRECT for graded in solved.graded) / len(problems)}
    if not is_multiple_choice(problems):
        return metrics
    texts = [completion.text for completion in solved.completions]
    rows = diagnose(context.policy, context.collector, problems, texts, solved.graded, max_new_tokens=max_new)
    return metrics | choice_metrics(rows)


def write_stage(
    folder: Path, method: str, loop: Loop, *, chosen_step: int, accuracy: float, snapshot_of: str | None = None
) -> None:
    """`stage.json`: what was chosen, on what, and what it cost; a snapshot's cost is part of its stage's."""
    totals = loop.state.totals
    document = {
        "stage": method,
        "kind": loop.kind,
        "snapshot_of": snapshot_of,
        "init": loop.init,
        "chosen_step": chosen_step,
        "steps": loop.state.step,
        "dev_accuracy": accuracy,
        "dev_n": len(loop.context.splits.dev),
        "looks": loop.state.looks,
        "wall_seconds": loop.state.seconds,
        **{name.removeprefix("compute/"): int(value) for name, value in totals.items()},
    }
    write_atomically(folder / "stage.json", json.dumps(document, indent=2))


def trainable(model: Trained) -> dict[str, torch.Tensor]:
    """The parameters that training changes, by name."""
    return {f"policy.{name}": value for name, value in model.named_parameters() if value.requires_grad}


@torch.no_grad()
def load_trainable(model: Trained, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `trainable` took."""
    for name, parameter in trainable(model).items():
        distributed.assign(parameter, tensors[name])
