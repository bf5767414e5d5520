"""Logs metrics to TensorBoard, Weights & Biases or Trackio, through Accelerate's trackers. With or
without trackers, the run's `metrics.jsonl` contains the metrics."""

from __future__ import annotations

import hashlib
import importlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reftune.errors import RecipeError
from reftune.processes.world import is_main
from reftune.recipe import Recipe, TrackerName
from reftune.stages.stage import Progress
from reftune.storage.run_folder import RunFolder
from reftune.text import brief
from reftune.types import Solution

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "reftune"


def tracked(progress: Progress, recipe: Recipe) -> Progress:
    """A view that forwards events to `progress` and also logs them to the trackers that the recipe
    names. If the recipe does not set `trackers`, events are logged to TensorBoard, provided that it
    is installed. If there are no trackers, or this is not the main process, the result is
    `progress` itself. Raises: RecipeError if a named tracker is not installed."""
    names = recipe.trackers
    if names is None:
        names = ["tensorboard"] if find_spec("tensorboard") else []
    if not (names and is_main()):
        return progress
    for name in names:
        if not find_spec(name):
            raise RecipeError(f"trackers: {name} is not installed; pip install 'reftune[tracking]'")
    return TrackedProgress(progress, names, recipe)


class TrackedProgress(Progress):
    """A view that passes every event on to another view, and logs metrics as `STAGE/group/name`
    with the stage's step."""

    def __init__(self, progress: Progress, names: list[TrackerName], recipe: Recipe) -> None:
        self._progress, self._names, self._recipe = progress, names, recipe
        self._trackers: list[GeneralTracker] | None = None
        self._stage = ""

    def stage(self, name: str, total_steps: int, done_steps: int = 0) -> None:
        """Begin a stage. The trackers are not opened before the first stage, because some write to
        the run's folder, which must be locked first. If a tracker cannot start, a continued run
        goes on without it. Raises: RecipeError if a tracker cannot start in a new run."""
        if self._trackers is None:
            self._trackers = []
            for tracker in self._names:
                try:
                    self._trackers.append(_open(tracker, self._recipe))
                except RecipeError as error:
                    if not RunFolder(self._recipe.folder).metrics.exists():
                        raise
                    self.note(f"{error}; the run continues without {tracker}")
        self._stage = name
        self._progress.stage(name, total_steps, done_steps)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {
            f"{self._stage}/{name}": value
            for name, value in metrics.items()
            if math.isfinite(value)
        }

        def log(tracker: GeneralTracker) -> None:
            if tracker.name == "tensorboard":
                tracker.log(values, step=step)
            else:  # wandb and Trackio count every call as a step and reject a repeated step
                tracker.log({**values, f"{self._stage}/step": step})

        self._tell(log)
        self._progress.step(step, metrics)

    def solutions(self, step: int, solutions: Sequence[Solution]) -> None:
        """Log the first `tracker_rollouts` solutions as a table, to every tracker that supports
        tables."""
        shown = solutions[: self._recipe.tracker_rollouts]
        rows = [table_row(step, solution) for solution in shown]

        def log(tracker: GeneralTracker) -> None:
            table = _table(tracker.name, rows)
            if table is not None:
                tracker.log({f"{self._stage}/rollouts": table, f"{self._stage}/step": step})

        if rows:
            self._tell(log)
        self._progress.solutions(step, solutions)

    def note(self, message: str) -> None:
        self._progress.note(message)

    def close(self) -> None:
        self._progress.close()
        self._tell(lambda tracker: tracker.finish())
        self._trackers = None

    def _tell(self, act: Callable[[GeneralTracker], None]) -> None:
        """Call `act` with every tracker. A tracker that fails is dropped, because the run does not
        depend on it."""
        trackers = self._trackers or []
        for tracker in list(trackers):
            try:
                act(tracker)
            except Exception as error:  # noqa: BLE001  a service may fail in any way
                trackers.remove(tracker)
                self.note(f"{tracker.name}: {_reason(error)}; the run continues without it")


def table_row(step: int, solution: Solution) -> dict[str, Any]:
    """A sampled solution as a row of a table."""
    return {
        "step": step,
        "id": solution.problem.id,
        "question": solution.problem.question,
        "gold": str(solution.problem.answer),
        "completion": solution.completion.text,
        "verdict": solution.graded.verdict.value,
        "value": str(solution.graded.value or ""),
        "reward": solution.reward,
        "finish_reason": solution.completion.finish_reason,
    }


def _table(tracker: str, rows: list[dict[str, Any]]) -> Any:
    """The rows as a table of the tracker; None if the tracker does not support tables."""
    if tracker not in ("wandb", "trackio"):
        return None
    import pandas

    return importlib.import_module(tracker).Table(dataframe=pandas.DataFrame(rows))


def _open(name: TrackerName, recipe: Recipe) -> GeneralTracker:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # tells Accelerate's trackers which process they are in
    try:
        tracker: GeneralTracker = LOGGER_TYPE_TO_CLASS[name](**_settings(name, recipe))
        tracker.start()
    except Exception as error:  # noqa: BLE001  a service may fail in any way: no login, no network
        raise RecipeError(
            f"trackers: {name} cannot start: {_reason(error)}; trackers=[] runs without any"
        ) from None
    return tracker


def _reason(error: Exception) -> str:
    return brief(f"{type(error).__name__}: {error}")


def _settings(name: TrackerName, recipe: Recipe) -> dict[str, Any]:
    if name == "tensorboard":
        return {"run_name": name, "logging_dir": recipe.folder}
    settings: dict[str, Any] = {
        "run_name": PROJECT,
        "name": recipe.name,
        "config": recipe.model_dump(mode="json"),
    }
    if name == "wandb":
        settings["dir"] = str(Path(recipe.folder).absolute())
        environment = RunFolder(recipe.folder).environment
        if environment.is_file() and "WANDB_RUN_ID" not in os.environ:
            # env.json states when the run began, so a continued run keeps its id
            text = f"{recipe.name} {recipe.seed} {environment.read_text(encoding='utf-8')}"
            run_id = hashlib.sha256(text.encode()).hexdigest()[:16]
            settings |= {"id": run_id, "resume": "allow"}
    return settings
