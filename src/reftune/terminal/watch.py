"""`reftune watch RUN` shows the live view of another process's run, or of a finished run, from the
files in the run folder."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from reftune.errors import DataError
from reftune.stages.stage import Progress
from reftune.storage.run_folder import RunFolder, length_table
from reftune.types import Answer, Attempt, Completion, Problem, Solution

POLL_S = 1.0


class RunClock:
    """The clock of the live view, in Unix seconds. It gives the time of the last row read from the
    run's metrics. Once all rows of a run in progress have been read, it gives the current time."""

    def __init__(self) -> None:
        self.row_s: float | None = 0.0

    def __call__(self) -> float:
        return time.time() if self.row_s is None else self.row_s


def follow(
    folder: Path, progress: Progress, clock: RunClock, *, wait: Callable[[float], None] = time.sleep
) -> bool:
    """Report the run's past events to `progress`, then new ones as they occur, until no process is
    working on the run. Returns: whether the run is finished. Raises: DataError if `folder` is not a
    run folder."""
    stages = _stages(folder)
    metrics, current = Tail(RunFolder(folder).metrics), ""
    samples = {name: Tail(RunFolder(folder).stage(name).samples) for name in stages}
    while True:
        alive = is_alive(folder)  # checked before reading, so that an ended run is read to its end
        for row in metrics.rows():
            clock.row_s = float(row["time"])
            if row["stage"] != current:
                total = _total_steps(stages.get(row["stage"], {}), row)
                if total == 0:  # a dev evaluation before the first step, when the total is unknown
                    continue
                current = row["stage"]
                progress.stage(current, total, int(row["step"]))
            progress.step(
                int(row["step"]), {key: value for key, value in row.items() if "/" in key}
            )
        if alive:
            clock.row_s = None
        for name, tail in samples.items():
            for row in tail.rows()[-1:]:
                if name == current:
                    progress.solutions(int(row["step"]), [_solution(row)])
        if not alive:
            return RunFolder(folder).summary.is_file()
        wait(POLL_S)


def is_alive(folder: Path) -> bool:
    """Whether a process holds the run folder's lock."""
    try:
        with RunFolder(folder).lock.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # never locked, or copied without its lock
        return False
    return False


class Tail:
    """Reads JSON lines as they are written. If a resumed run shortens the file, reading continues
    from the file's new end."""

    def __init__(self, path: Path) -> None:
        self.path, self._read = path, 0

    def rows(self) -> list[dict[str, Any]]:
        """The complete lines written since the last call."""
        if not self.path.is_file():
            return []
        self._read = min(self._read, self.path.stat().st_size)
        with self.path.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
        self._read += len(whole) + bool(whole)
        rows = []
        for line in whole.split(b"\n"):
            with suppress(ValueError):  # in a shortened file, reading may begin inside a line
                rows.append(json.loads(line))
        return rows


def _stages(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        recipe = yaml.safe_load(RunFolder(folder).recipe.read_text(encoding="utf-8"))
        return {
            name: spec if isinstance(spec, dict) else {} for name, spec in recipe["stages"].items()
        }
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError):
        raise DataError(f"{folder}: not a run folder: it has no recipe.yaml with stages") from None


def _total_steps(stage: dict[str, Any], row: Mapping[str, Any]) -> int:
    """The number of steps of a stage, from its table in the recipe and a row of its metrics. If the
    table has no key `steps`, the number is extrapolated from its key `epochs` and the row's
    `progress/epoch`. If either is missing, the result is the row's step."""
    if "steps" in stage:
        return int(stage["steps"])
    epochs, epoch = length_table(stage).get("epochs"), row.get("progress/epoch")
    return round(row["step"] * epochs / epoch) if epochs and epoch else int(row["step"])


def _solution(row: Mapping[str, Any]) -> Solution:
    attempt = Attempt.from_row(row)
    completion = Completion(
        token_ids=(), text=attempt.completion, logprobs=(), finish_reason=row["finish_reason"]
    )
    answer = Answer(kind="text", value=str(row["gold"]))
    return Solution(
        problem=Problem(id=str(row["id"]), question=row["question"], answer=answer),
        prompt_ids=(),
        completion=completion,
        graded=attempt.graded,
        reward=row["reward"],
    )
