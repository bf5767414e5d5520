"""A run folder as frozen dataclasses. Reads JSON and YAML only: no model, no plug-in of the recipe
is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from reftune.errors import DataError
from reftune.grading import voting
from reftune.storage.run_folder import RunFolder
from reftune.types import Attempt, Graded, Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRow:
    """One problem of the final evaluation."""

    id: str
    question: str
    gold: str
    greedy: Attempt
    samples: tuple[Attempt, ...]
    valid: Callable[[Graded], bool] = voting.has_value
    """Which samples may vote."""
    same: voting.Same = voting.same_answer
    """When two values are one answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSample:
    """One sampled solution kept from training."""

    step: int
    id: str
    question: str
    gold: str
    attempt: Attempt
    tokens: tuple[str, ...]
    """The completion's tokens as text."""
    logprobs: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricRow:
    """Everything measured at one step of one stage."""

    step: int
    time: float
    """Unix seconds."""
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResults:
    """One stage, as far as it got, or a snapshot that a stage left behind as a method of its
    own."""

    name: str
    kind: str
    init: str
    num_samples: int
    """Solutions sampled of one problem in one step."""
    metrics: tuple[MetricRow, ...]
    """None for a snapshot: they are its stage's."""
    samples: tuple[TrainingSample, ...]
    info: Mapping[str, Any]
    """`stage.json`; empty until the stage is done."""

    @property
    def chosen_step(self) -> int | None:
        return self.info.get("chosen_step")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResults:
    """A run folder."""

    folder: Path
    recipe: Mapping[str, Any]
    recipe_text: str
    env: Mapping[str, Any]
    stages: Mapping[str, StageResults]
    """In the order they came to be; a stage's snapshots before the stage."""
    evals: Mapping[str, tuple[EvalRow, ...]]
    """Methods evaluated so far, in that order."""
    missing: tuple[str, ...]
    """Methods that the recipe wants evaluated and that are not yet."""

    @property
    def name(self) -> str:
        return str(self.recipe.get("name", self.folder.name))

    @property
    def seed(self) -> int:
        return int(self.recipe.get("seed", 0))

    @property
    def finished(self) -> bool:
        return not self.missing

    @property
    def wall_seconds(self) -> float:
        """Of all training; a snapshot's seconds are part of its stage's."""
        stages = [stage.info for stage in self.stages.values() if not stage.info.get("snapshot_of")]
        return sum(float(info.get("wall_seconds", 0)) for info in stages)

    @property
    def split(self) -> str:
        """Which problems the final evaluation used."""
        return str((self.recipe.get("evaluate") or {}).get("split", "test"))


def read_run(folder: Path | str) -> RunResults:
    """A run folder, finished or alive.

    Raises: DataError, one line, if the folder is missing, is not a run folder, or holds a damaged
    file.
    """
    files = RunFolder(Path(folder))
    recipe_text = _recipe_text(files)
    recipe = _recipe_mapping(files.recipe, recipe_text)
    metrics = _read_metrics(files.metrics)
    specs = {
        name: spec for stage in recipe["stages"].items() for name, spec in _with_snapshots(*stage)
    }
    wanted = _evaluated_methods(recipe, specs)
    evals = _whole(
        {
            name: _read_evals(files.evaluation(name), recipe)
            for name in wanted
            if files.evaluation(name).exists()
        }
    )
    return RunResults(
        folder=files.path,
        recipe=recipe,
        recipe_text=recipe_text,
        env=_read_json(files.environment),
        stages={
            name: _read_stage(files, name, spec, metrics.get(name, {}))
            for name, spec in specs.items()
        },
        evals=evals,
        missing=tuple(name for name in wanted if name not in evals),
    )


def require_finished(run: RunResults) -> None:
    """Raises: DataError if a method of the run was not evaluated."""
    if run.missing:
        raise DataError(
            f"{run.folder}: the run has not finished: no evaluation of {', '.join(run.missing)}; "
            "`reftune run` with its recipe continues it"
        )


def same_problems(evals: Mapping[str, tuple[EvalRow, ...]]) -> bool:
    """Whether all methods answered the same problems, in one order."""
    return (
        len({tuple((row.id, row.question, row.gold) for row in rows) for rows in evals.values()})
        <= 1
    )


# --- the files ------------------------------------------------------------------------------------


def _recipe_text(files: RunFolder) -> str:
    if not files.path.is_dir():
        raise DataError(f"{files.path}: no such run folder")
    try:
        return files.recipe.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{files.path}: not a run folder: it has no recipe.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{files.recipe}: cannot be read: {error}") from None


def _recipe_mapping(path: Path, text: str) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError:
        raise DataError(f"{path}: not valid YAML") from None
    if not isinstance(recipe, dict) or not isinstance(recipe.get("stages"), dict):
        raise DataError(f"{path}: not the recipe of a run: it has no stages")
    return recipe


def _with_snapshots(name: str, spec: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """A stage as (name, its keys), after the methods that it leaves behind on its way."""
    keys = dict(spec) if isinstance(spec, Mapping) else {"kind": spec}
    return [*((snapshot, keys) for snapshot in keys.get("snapshots") or {}), (name, keys)]


def _evaluated_methods(
    recipe: Mapping[str, Any], specs: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    chosen = (recipe.get("evaluate") or {}).get("stages")
    answering = [name for name, spec in specs.items() if spec.get("kind") != "reward_model"]
    return answering if chosen is None else [name for name in answering if name in chosen]


def _whole(evals: Mapping[str, tuple[EvalRow, ...]]) -> dict[str, tuple[EvalRow, ...]]:
    """Without evaluations still being written: those with fewer problems than the longest, as far
    as they go the same."""
    longest = max(evals.values(), key=len, default=())

    def is_partial(rows: tuple[EvalRow, ...]) -> bool:
        return len(rows) < len(longest) and all(
            row.id == whole.id for row, whole in zip(rows, longest, strict=False)
        )

    return {name: rows for name, rows in evals.items() if not is_partial(rows)}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    return _object(path.read_text(encoding="utf-8"), where=str(path))


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) of a JSON-lines file; a last line still being written is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and line.endswith("\n"):
                yield f"{path}:{number}", _object(line, where=f"{path}:{number}")


def _object(text: str, *, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_metrics(path: Path) -> dict[str, dict[int, MetricRow]]:
    """Stage → step → what was measured. A step that a resumed run repeats counts as it was last."""
    stages: dict[str, dict[int, MetricRow]] = {}
    for where, row in _lines(path):
        stage, step, time = (
            _take(row, "stage", where),
            int(_take(row, "step", where)),
            float(row.get("time", 0)),
        )
        values = {
            key: float(value)
            for key, value in row.items()
            if "/" in key and isinstance(value, int | float)
        }
        steps = stages.setdefault(str(stage), {})
        known = steps[step].values if step in steps else {}
        steps[step] = MetricRow(step=step, time=time, values={**known, **values})
    return stages


def _read_stage(
    files: RunFolder, name: str, spec: Mapping[str, Any], metrics: Mapping[int, MetricRow]
) -> StageResults:
    folder = files.stage(name)
    info = _read_json(folder.info)
    return StageResults(
        name=name,
        kind=str(spec.get("kind", "")),
        init=str(info.get("init") or spec.get("init") or "base"),
        num_samples=int(spec.get("samples") or 1),
        metrics=tuple(metrics[step] for step in sorted(metrics)),
        samples=tuple(_sample(row, where) for where, row in _lines(folder.samples)),
        info=info,
    )


def _read_evals(path: Path, recipe: Mapping[str, Any]) -> tuple[EvalRow, ...]:
    format = recipe.get("format")
    grading = format.get("grading") if isinstance(format, Mapping) else None
    rows = tuple(_eval_row(row, where, grading) for where, row in _lines(path))
    if not rows:
        raise DataError(f"{path}: no evaluated problem")
    return rows


def _eval_row(row: Mapping[str, Any], where: str, grading: str | None) -> EvalRow:
    return EvalRow(
        id=str(_take(row, "id", where)),
        question=str(_take(row, "question", where)),
        gold=str(_take(row, "gold", where)),
        greedy=_attempt(_take(row, "greedy", where), where),
        samples=tuple(_attempt(sample, where) for sample in row.get("samples") or ()),
        same=voting.equality(grading),
        valid=voting.voters(
            grading, is_choice=len(str(row["gold"])) == 1 and str(row["gold"]).isalpha()
        ),
    )


def _sample(row: Mapping[str, Any], where: str) -> TrainingSample:
    return TrainingSample(
        step=int(_take(row, "step", where)),
        id=str(_take(row, "id", where)),
        question=str(_take(row, "question", where)),
        gold=str(_take(row, "gold", where)),
        attempt=_attempt(row, where),
        tokens=tuple(row.get("tokens") or ()),
        logprobs=tuple(row.get("logprobs") or ()),
    )


def _attempt(row: Mapping[str, Any], where: str) -> Attempt:
    try:
        return Attempt.from_row(row)
    except KeyError as error:
        raise DataError(f"{where}: {error.args[0]} is missing") from None
    except ValueError as error:
        known = ", ".join(verdict.value for verdict in Verdict)
        raise DataError(f"{where}: {error}; expected one of {known}") from None


def _take(row: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise DataError(f"{where}: {key} is missing")
    return row[key]
