"""The loop that all stages share. It resumes a stage, takes its steps, evaluates on dev, saves
checkpoints and keeps the best model."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from reftune.errors import CheckpointError, EngineError, NonFiniteError
from reftune.model.weights import fingerprint
from reftune.processes import sharding, world
from reftune.processes.sharding import whole_tensors
from reftune.recipe import Table
from reftune.stages.optimizer import (
    OptimizerTable,
    Trained,
    is_finite,
    load_trainable,
    make_optimizer,
    optimizer_step,
    rate,
    trainable,
)
from reftune.stages.plateau import History, cooldown_steps, end_of_cooldown
from reftune.stages.probes.choices import choice_metrics, diagnose
from reftune.stages.stage import StageContext
from reftune.storage.checkpoint import (
    Checkpoint,
    load_latest,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from reftune.storage.files import (
    JsonLines,
    link_files,
    replace_folder,
    restore_folder,
    write_atomically,
)
from reftune.storage.run_folder import StageFolder
from reftune.text import brief, counted
from reftune.types import Verdict


@dataclass(slots=True)
class Progression:
    """The part of a stage's state that is not stored as tensors."""

    step: int = 0
    best_step: int = -1
    best_accuracy: float = -1.0
    looks: int = 0
    """Number of dev evaluations so far."""
    totals: dict[str, float] = field(default_factory=dict)
    """Sums of the `compute/…` metrics since the stage began."""
    ends_at: int | None = None
    """The stage's last step, set once dev accuracy has reached a plateau; None until then."""
    history: dict[str, Any] = field(default_factory=dict)
    """The fields of a `History`."""
    skipped: int = 0
    """Number of steps skipped because their loss or gradient was not finite."""
    seconds: float = 0.0
    rows: int = 0
    """Number of rows in metrics.jsonl that belong to the stage."""
    is_open: bool = False
    """Whether the dev evaluation and the snapshots due after `step` have yet to be made."""


BEST = "best.json"
"""A file in the folder of the best model so far, with that model's step and accuracy on dev."""


class Interrupted(Exception):
    """The run was asked to stop. Every step that the current stage has taken is saved. `str(self)`
    is the checkpoint's folder or, if the stage is finished, the stage's folder. If the engine has
    failed, `str(self)` is empty."""


@contextmanager
def stop_signals(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Call `handler` on SIGINT and SIGTERM inside the block, then restore the previous handlers.
    Without a handler, a shell's background jobs ignore SIGINT."""
    try:
        before = {
            number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:  # only the main thread can set handlers
        before = {}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class TrainingTable(Table):
    """The keys that all kinds of training share: optimizer, checkpoints and dev evaluations."""

    optimizer: OptimizerTable
    save_every_s: float = Field(300.0, ge=0)
    """Seconds between checkpoints."""
    keep: int = Field(2, gt=0)
    """How many of the latest checkpoints to keep, in addition to the best model."""
    probe_choices: bool = False
    """In dev evaluations of multiple-choice questions, also look for [reward
    hacking](metrics.md#multiple-choice). An evaluation may then take three times as long."""


class Loop:
    """Runs steps 1 to `total_steps` of a stage.

    `run` takes step n by calling `step(n)`. The result of `step(n)` may depend only on the weights,
    the optimizer's state and `n`. The loop seeds torch before each step, so a resumed run draws the
    same random numbers as an uninterrupted run.
    """

    def __init__(
        self,
        context: StageContext,
        table: TrainingTable,
        model: Trained,
        *,
        total_steps: int,
        eval_every: int,
        snapshots: Mapping[str, int] | None = None,
        look: Callable[[], Look] | None = None,
        start: Progression | None = None,
        until_plateau: bool = False,
    ) -> None:
        """`snapshots` maps the name of each snapshot to the step after which it is saved. If a
        plateau ends the stage before that step, the snapshot is saved after the stage's last step.
        `look()` evaluates the model on dev. It must be given if the model is not a policy. `start`
        is the stage's state before step 1. With `until_plateau`, a cooldown begins once dev
        accuracy no longer rises: the stage continues for a tenth as many steps as it has taken so
        far, but not beyond `total_steps`, while the learning rate falls to 0. The constructor
        distributes the model over the processes."""
        self.context, self.table, self.model = context, table, model
        self.total_steps, self.eval_every = total_steps, eval_every
        self.snapshots = dict(snapshots or {})
        self.look = look or partial(look_at_dev, context, probe_choices=table.probe_choices)
        self.is_worth_a_look = look is None and _is_candidate(context)
        self.samples = JsonLines(context.folder.samples)
        self.state = start or Progression()
        self.until_plateau = until_plateau
        self._stop, self._is_saved = False, True  # before step 1, there is nothing to save
        self._initial = fingerprint(context.policy.base.config)
        sharding.current.distribute(model)
        self.optimizer = make_optimizer(model, table.optimizer)

    def run(
        self, step: Callable[[int], dict[str, float]], *, before: Callable[[], None] | None = None
    ) -> None:
        """Run all remaining steps and save the model that was best on dev. If the stage has no
        checkpoint yet, `before()` is called before step 1. Raises: Interrupted after SIGINT or
        SIGTERM, once the stage's progress is saved."""
        resumed = self._resume()
        self.context.progress.stage(self.context.name, self.last_step, self.state.step)
        started, last_save = time.perf_counter() - self.state.seconds, time.perf_counter()
        with stop_signals(self._on_signal):
            if not resumed:
                with self._saving():
                    if before is not None:
                        before()
                    if self.is_worth_a_look:
                        self._look()
                self._save()
            while self.state.is_open or self.state.step < self.last_step:
                with self._saving():
                    if not self.state.is_open:
                        self._take(step)
                    self._close()
                self.state.seconds = time.perf_counter() - started
                is_old = time.perf_counter() - last_save >= self.table.save_every_s
                stop, due = world.any_of(self._stop, world.is_main() and is_old)
                self._stop = self._stop or stop  # a signal may have come in the meantime
                if stop or due:
                    saved, last_save = self._save(), time.perf_counter()
                    if stop and self.state.step < self.last_step:
                        world.wait("the checkpoint")  # when one process ends, its launcher ends all
                        raise Interrupted(str(saved))
            if not self._is_saved:
                self._save()  # if the stage is extended later, it continues from here
        self._finish()
        if self._stop:
            raise Interrupted(str(self.context.folder.path))

    def _on_signal(self, number: int, frame: Any) -> None:
        """At the first signal, save a checkpoint after the current step and stop. At the second
        signal, stop at once."""
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        self.context.progress.note("stopping after this step; interrupt again to stop at once")

    def _take(self, step: Callable[[int], dict[str, float]]) -> None:
        """Take the next step and record its metrics."""
        n = self.state.step + 1
        # each process draws its own dropout
        other = ("process", world.rank()) if world.rank() > 0 else ()
        torch.manual_seed(self.context.seed("step", n, *other))
        metrics = step(n)
        self.state.step, self.state.is_open, self._is_saved = n, True, False
        self.spend(metrics)
        table = self.table.optimizer
        metrics |= {"optim/lr": table.learning_rate * self._share(n), **self.state.totals}
        if table.on_nonfinite == "skip":
            metrics["optim/skipped"] = self.state.skipped
        self._record(metrics)

    def _close(self) -> None:
        """Evaluate on dev and save snapshots, if they are due at this step."""
        step, last = self.state.step, self.last_step
        methods = [method for method, at in self.snapshots.items() if step == min(at, last)]
        if step % self.eval_every == 0 or step == last:
            accuracy = self._look()
        elif methods:
            accuracy = self.look().metrics["dev/accuracy"]
            self.state.looks += 1
        for method in methods:
            self._snapshot(method, accuracy)
        self.state.is_open = self._is_saved = False

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """If the engine fails inside the `with` block, save a checkpoint if the stage has advanced
        since the last one. Then raise the engine's error again. Use this only if every engine error
        is raised in all processes and leaves the stage in a state that can be resumed.
        Raises: Interrupted instead of the engine's error, if the run has received SIGINT or
        SIGTERM, because the signal may have stopped the engine too."""
        try:
            yield
        except EngineError as error:
            if not self._is_saved:
                self._save()
            if any(world.any_of(self._stop)):
                raise Interrupted from error
            raise

    def spend(self, metrics: Mapping[str, float]) -> None:
        """Add the `compute/…` metrics to the stage's totals."""
        for name, value in metrics.items():
            if name.startswith("compute/"):
                self.state.totals[name] = self.state.totals.get(name, 0) + value

    def _record(self, metrics: dict[str, float]) -> None:
        where = {"stage": self.context.name, "step": self.state.step, "time": time.time()}
        self.context.metrics.append({**where, **metrics})
        self.state.rows += 1
        self.context.progress.step(self.state.step, metrics)

    # --- the optimizer ---

    @property
    def last_step(self) -> int:
        return self.total_steps if self.state.ends_at is None else self.state.ends_at

    def _share(self, n: int) -> float:
        """The learning rates at step `n`, as a share of their peaks."""
        share = rate(self.table.optimizer, step=n, total_steps=self.total_steps)
        ends_at = self.state.ends_at
        if ends_at is None:
            return share
        return share * min(1.0, (ends_at - n) / cooldown_steps(ends_at))

    def descend(
        self,
        n: int,
        gradient: Callable[[], dict[str, float]],
        rows: Callable[[], Sequence[Mapping[str, Any]]],
    ) -> dict[str, float]:
        """Take one of the optimizer steps that belong to the stage's step `n`. `gradient()`
        accumulates the gradient and returns metrics. Return these metrics and the gradient's norm.
        If the loss or the gradient is not finite, skip the optimizer step: leave the weights
        unchanged, save the samples that `rows()` returns, and return no metrics. Raises:
        NonFiniteError if the recipe does not allow this skip."""
        table = self.table.optimizer
        try:
            metrics = gradient()
            norm = optimizer_step(
                self.model, self.optimizer, share=self._share(n), max_grad_norm=table.max_grad_norm
            )
        except NonFiniteError as error:
            self._leave_out(n, error, rows())
            return {}
        return {**metrics, "grad/norm": norm}

    def _leave_out(self, n: int, error: NonFiniteError, rows: Sequence[Mapping[str, Any]]) -> None:
        """Skip an optimizer step that belongs to the stage's step `n`, because its loss or gradient
        is not finite: save its samples `rows`, clear the gradient and count the skip. Raises:
        NonFiniteError unless another skip is allowed."""
        self.optimizer.zero_grad(set_to_none=True)
        path, reason = self.context.folder.nonfinite(n), f"{self.context.name} step {n}: {error}"
        unsound = [name for name, value in self.model.named_parameters() if not is_finite(value)]
        document = {"where": reason, "weights_not_finite": unsound, "rows": list(rows)}
        write_atomically(path, json.dumps(document, indent=2, ensure_ascii=False))
        before = f" ({unsound[0]} was already not finite)" if unsound else ""
        message = f"{reason}{before}; the weights were not changed; look at the samples in {path}"
        table, skipped = self.table.optimizer, self.state.skipped
        if table.on_nonfinite == "stop":
            raise NonFiniteError(message)
        if skipped == table.max_skipped:
            raise NonFiniteError(
                f"{message}; {counted(skipped, 'earlier step')} skipped, as many as max_skipped"
                " allows"
            )
        self.state.skipped += 1
        self.context.progress.note(
            f"{message}; step skipped, {skipped + 1} of at most {table.max_skipped}"
        )

    # --- dev ---

    def _look(self) -> float:
        """Evaluate the model on dev and return its accuracy. Save the model if it is the best so
        far; on a tie, keep the earlier model."""
        look = self.look()
        accuracy = look.metrics["dev/accuracy"]
        self.state.looks += 1
        looks = {"dev/n": len(self.context.splits.dev), "dev/looks": self.state.looks}
        self._record({**look.metrics, **self._follow(look), **looks, **self.state.totals})
        if accuracy > self.state.best_accuracy:
            self.state.best_step, self.state.best_accuracy = self.state.step, accuracy
            replace_folder(self.context.folder.best, self._save_best)
        return accuracy

    def _save_best(self, folder: Path) -> None:
        self.model.save(folder)
        facts = {"step": self.state.best_step, "dev_accuracy": self.state.best_accuracy}
        write_atomically(folder / BEST, json.dumps(facts))

    def _adopt_best(self) -> None:
        """If the best model so far is at least as new as the checkpoint from which the stage
        resumes, read the model's step and accuracy from its folder, so that it remains the best
        model. The stage will repeat the steps after the checkpoint, but on a GPU, the repeated
        steps may not lead to an equally good model."""
        restore_folder(self.context.folder.best)
        path = self.context.folder.best / BEST
        facts = world.from_main(
            lambda: json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        )
        if facts is not None and facts["step"] >= self.state.step:
            self.state.best_step = facts["step"]
            self.state.best_accuracy = facts["dev_accuracy"]

    def _follow(self, look: Look) -> dict[str, float]:
        """Add the evaluation `look` to the history of dev accuracy, and return the recent rise in
        dev accuracy as metrics. With `until_plateau`, if accuracy has reached a plateau, also set
        the stage's last step. Once the last step is set, further calls do nothing and return no
        metrics: from then on, the learning rate falls, and this alone may raise accuracy."""
        if not look.correct or self.state.ends_at is not None:
            return {}
        history = History(**self.state.history)
        history.add(look.correct)
        self.state.history = asdict(history)
        step = self.state.step
        # at the last step, the stage ends anyway, and more epochs can still be trained later
        if self.until_plateau and history.is_flat() and step < self.total_steps:
            self.state.ends_at = min(self.total_steps, end_of_cooldown(step))
            self.context.progress.note(
                f"{self.context.name}: dev accuracy no longer rises; cooling down until step"
                f" {self.state.ends_at}"
            )
            self.context.progress.stage(self.context.name, self.last_step, step)
        latest = history.latest_rise()
        if latest is None:
            return {}
        return {"dev/rise": latest.value, "dev/rise_margin": latest.margin}

    # --- files ---

    def _resume(self) -> bool:
        """Restore the stage from its newest checkpoint, and remove what the stage has logged since
        that checkpoint. Returns: whether there was a checkpoint."""
        context = self.context
        found = load_latest(context.folder.checkpoints, note=context.progress.note)
        world.agree(
            None if found is None else found.step, what="found different checkpoints, by step"
        )
        samples_bytes = 0 if found is None else self._restore(found)
        # all stages write to this file
        context.metrics.keep_of(lambda row: row.get("stage") == context.name, self.state.rows)
        self.samples.truncate(samples_bytes)
        return found is not None

    def _restore(self, found: Checkpoint) -> int:
        """Restore the stage from a checkpoint. Returns: the size in bytes that samples.jsonl had at
        the checkpoint. Raises: CheckpointError if the checkpoint does not belong to this stage."""
        context, state = self.context, dict(found.state)
        try:
            samples_bytes = int(state.pop("samples_bytes"))
            initial = state.pop("initial", None)
            self.state = Progression(**state)
            load_trainable(self.model, found.tensors)
            load_optimizer_tensors(self.optimizer, found.tensors)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {brief(error)}"
            raise CheckpointError(
                f"{found.folder}: belongs to another model or reftune version: {reason}; choose"
                " another run_dir"
            ) from None
        if None not in (initial, self._initial) and initial != self._initial:
            raise CheckpointError(
                f"{found.folder}: the model {context.stage.init} has changed since this stage"
                " began; expected the same weights, or another run_dir"
            )
        self._adopt_best()
        self._is_saved = True
        if self.state.step == self.state.ends_at:
            context.progress.note(
                f"{context.name}: ended at its plateau, at step {self.state.step}, and is not"
                " trained further; to start another run from its model, set init:"
                f" {context.folder.path}"
            )
        elif self.state.step > 0:
            context.progress.note(
                f"{context.name}: resumed at step {self.state.step} of {self.last_step}"
            )
        return samples_bytes

    def _save(self) -> Path:
        for log in (self.context.metrics, self.samples):
            log.sync()
        self._is_saved = True
        return save_checkpoint(
            self.context.folder.checkpoints,
            step=self.state.step,
            tensors=whole_tensors({**trainable(self.model), **optimizer_tensors(self.optimizer)}),
            state={
                **asdict(self.state),
                "samples_bytes": self.samples.size(),
                "initial": self._initial,
            },
            keep=self.table.keep,
        )

    def _snapshot(self, method: str, accuracy: float) -> None:
        """Save the current weights as `method`, with their accuracy on dev."""
        folder = self.context.folder.run.stage(method)
        replace_folder(folder.path, self.model.save)
        self._describe(folder, self.state.step, accuracy, snapshot_of=self.context.name)

    def _finish(self) -> None:
        """Put the model that was chosen on dev into the stage's folder. `stage.json`, written last,
        marks the stage as done."""
        folder = self.context.folder
        link_files(folder.best, folder.path, but=BEST)
        self._describe(folder, self.state.best_step, self.state.best_accuracy)

    def _describe(
        self, folder: StageFolder, step: int, accuracy: float, *, snapshot_of: str | None = None
    ) -> None:
        """Write `stage.json`, with the saved model's step and dev accuracy, and the stage's cost so
        far. A snapshot's cost is a part of its stage's final cost, so the two must not be added."""
        document = {
            "stage": folder.path.name,
            "kind": self.context.stage.kind,
            "snapshot_of": snapshot_of,
            "is_method": snapshot_of is not None or self.context.stage.is_method,
            "init": self.context.stage.init,
            "chosen_step": step,
            "steps": self.state.step,
            "dev_accuracy": accuracy,
            "dev_n": len(self.context.splits.dev),
            "looks": self.state.looks,
            "wall_seconds": self.state.seconds,
            **{name.removeprefix("compute/"): int(n) for name, n in self.state.totals.items()},
        }
        write_atomically(folder.info, json.dumps(document, indent=2))


def _is_candidate(context: StageContext) -> bool:
    """Whether the initial model, too, is evaluated on dev, so that the stage may choose it. A model
    other than `base` is always evaluated. A `base` with random weights never is. A pretrained
    `base` usually does not know the answer format yet, so most stages do not evaluate it. The
    exceptions are stages that sample solutions and need no model besides `base`: they evaluate it,
    because they work only if it already knows the format."""
    stage, is_pretrained = context.stage, context.recipe.model.path is not None
    learns_from_itself = stage.reads_questions and set(stage.needs) == {"base"}
    return stage.init != "base" or (is_pretrained and learns_from_itself)


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """The result of one evaluation on dev."""

    metrics: dict[str, float]
    """`dev/accuracy` and possibly other metrics."""
    correct: tuple[bool, ...] = ()
    """Whether each problem was solved; empty for a model that is not a policy."""


def look_at_dev(context: StageContext, *, probe_choices: bool = False) -> Look:
    """Evaluate the policy on dev: solve the problems greedily and grade the solutions. The metrics
    contain `dev/accuracy`. With `probe_choices`, if all problems are multiple choice, the metrics
    also contain the warning signs of reward hacking that `probes.choices` computes."""
    problems = context.splits.dev
    solved = context.collector.solve(context.policy, problems)
    correct = tuple(graded.verdict is Verdict.CORRECT for graded in solved.graded)
    metrics = {"dev/accuracy": sum(correct) / len(problems)}
    if probe_choices and all(problem.is_multiple_choice for problem in problems):
        texts = [completion.text for completion in solved.completions]
        rows = diagnose(context.policy, context.collector, problems, texts, solved.graded)
        metrics |= choice_metrics(rows)
    return Look(metrics=metrics, correct=correct)
