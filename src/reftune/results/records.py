"""Reads the JSON and YAML files of a run folder into frozen dataclasses, without loading a model or
plug-in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml

from reftune.errors import DataError
from reftune.storage.run_folder import CHANGES_NO_RESULT, CHANGES_ROUNDING, RunFolder, without
from reftune.types import Attempt

Parsed = TypeVar("Parsed")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRow:
    """One problem of the final evaluation, with the answers of one method."""

    id: str
    question: str
    gold: str
    greedy: Attempt
    samples: tuple[Attempt, ...]
    grading: str | None = None
    """The recipe's `format.grading`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSample:
    """A sampled solution that training logged."""

    step: int
    id: str
    question: str
    gold: str
    attempt: Attempt
    tokens: tuple[str, ...]
    """The completion's tokens as text."""
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SampleFile:
    """Iterates over the solutions in a stage's `samples.jsonl`. If the file does not exist, there
    are none. Reading a damaged line raises a DataError."""

    path: Path

    def __iter__(self) -> Iterator[TrainingSample]:
        return _read_lines(self.path, _sample)


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricRow:
    """The metrics of one step of one stage."""

    step: int
    values: Mapping[str, float]

    @property
    def passes(self) -> float:
        """Number of sequences that the stage has trained on. If that number was not logged, the
        result is the number of steps."""
        return self.values.get("compute/sequence_passes", float(self.step))


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResults:
    """The results of a stage, whether it is finished or not. A snapshot of a stage has its own
    `StageResults`, because tables and reports show the snapshot as a separate method."""

    name: str
    kind: str
    init: str
    num_samples: int
    """Number of solutions sampled per problem: the stage's key `samples`, or 1 if this key is
    unset."""
    metrics: tuple[MetricRow, ...]
    """One row per step; empty for a snapshot, because the metrics belong to its stage."""
    samples: Iterable[TrainingSample]
    """The sampled solutions that training logged. They may not fit in memory, so every iteration
    reads them from the file."""
    info: Mapping[str, Any]
    """The content of `stage.json`; empty until the stage is done."""

    @property
    def chosen_step(self) -> int | None:
        return self.info.get("chosen_step")

    @property
    def is_method(self) -> bool:
        """Whether the stage's model solves problems. For a finished stage, this is read from
        `stage.json`. Before that, all kinds except `reward_model` count as methods."""
        return bool(self.info.get("is_method", self.kind != "reward_model"))


BASE = StageResults(
    name="base", kind="", init="base", num_samples=1, metrics=(), samples=(), info={}
)
"""Stands in for a stage if the method is `base`, which no stage has trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResults:
    """The results, recipe and environment of a run, whether it is finished or not."""

    folder: Path
    recipe: Mapping[str, Any]
    recipe_text: str
    env: Mapping[str, Any]
    stages: Mapping[str, StageResults]
    """Stages and snapshots in the order of training. A stage's snapshots come before the stage."""
    evals: Mapping[str, tuple[EvalRow, ...]]
    """Method → one row per problem. Only methods that have been evaluated are included, in the
    order of training."""
    missing: tuple[str, ...]
    """Names of the methods that are to be evaluated but have no complete results yet."""

    @property
    def name(self) -> str:
        return str(self.recipe.get("name", self.folder.name))

    @property
    def seed(self) -> int:
        return int(self.recipe.get("seed", 0))

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe without the keys in which runs of one recipe may differ: name, seed, and keys
        that do not change results beyond rounding."""
        return without(self.recipe, {"name", "seed", *CHANGES_NO_RESULT, *CHANGES_ROUNDING})

    def stage(self, method: str) -> StageResults:
        """The stage or snapshot whose model is `method`."""
        return BASE if method == "base" else self.stages[method]

    def whole_of(self, snapshot: StageResults) -> StageResults | None:
        """The stage that saved `snapshot`, if both chose the same model; otherwise None."""
        whole = self.stages.get(str(snapshot.info.get("snapshot_of")))
        return whole if whole is not None and whole.chosen_step == snapshot.chosen_step else None

    @property
    def wall_seconds(self) -> float:
        """Total training time in seconds. A stage's time includes its snapshots' time."""
        infos = [stage.info for stage in self.stages.values()]
        return sum(float(i.get("wall_seconds", 0)) for i in infos if not i.get("snapshot_of"))

    @property
    def split(self) -> str:
        return evaluated_split(self.recipe)


def evaluated_split(recipe: Mapping[str, Any]) -> str:
    """The split that a recipe's final evaluation uses."""
    return str((recipe.get("evaluate") or {}).get("split", "test"))


def read_run(folder: Path | str) -> RunResults:
    """Load the results of a run, whether it is finished or not.

    Raises: DataError if the folder is missing, is not a run folder, or contains a damaged file.
    """
    files = RunFolder(Path(folder))
    recipe, recipe_text = read_recipe(files.recipe)
    metrics = _read_metrics(files.metrics)
    infos = {name: read_json(files.stage(name).info) for name in files.trained()}
    stages = {
        name: StageResults(
            name=name,
            kind=str(spec.get("kind", "")),
            init=str(infos.get(name, {}).get("init") or spec.get("init") or "base"),
            num_samples=int(spec.get("samples") or 1),
            metrics=metrics.get(name, ()),
            samples=SampleFile(files.stage(name).samples),
            info=infos.get(name, {}),
        )
        for stage, keys in recipe["stages"].items()
        for name, spec in _with_snapshots(stage, keys, infos)
    }
    chosen = (recipe.get("evaluate") or {}).get("stages")
    answering = [name for name, stage in stages.items() if stage.is_method]
    wanted = answering if chosen is None else [m for m in ("base", *answering) if m in chosen]
    paths = {name: files.evaluation(name) for name in wanted if files.evaluation(name).exists()}
    evals = _whole(
        {name: _read_evals(path, recipe) for name, path in paths.items()},
        recipe,
        read_json(files.data).get("problems") or {},
    )
    return RunResults(
        folder=files.path,
        recipe=recipe,
        recipe_text=recipe_text,
        env=read_json(files.environment),
        stages=stages,
        evals=evals,
        missing=tuple(name for name in wanted if name not in evals),
    )


def read_runs(folders: Sequence[Path | str], *, finished: bool = True) -> list[RunResults]:
    """Load the results of several runs. Raises: the errors of `read_run`; DataError if `finished`
    is True and a run's final evaluation is incomplete."""
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        if finished and run.missing:
            raise DataError(
                f"{run.folder}: the run has not finished: no evaluation of"
                f" {', '.join(run.missing)}; `reftune run` with its recipe continues it"
            )
    return runs


# --- the files ------------------------------------------------------------------------------------


def read_recipe(path: Path) -> tuple[dict[str, Any], str]:
    """A run's recipe as a dict and as text. Raises: DataError if it cannot be read."""
    if not path.parent.is_dir():
        raise DataError(f"{path.parent}: no such run folder")
    try:
        text = path.read_text(encoding="utf-8")
        recipe = yaml.safe_load(text)
    except FileNotFoundError:
        raise DataError(f"{path.parent}: not a run folder: it has no recipe.yaml") from None
    # a date in month 13, an overlong number or bytes that are not UTF-8 raise ValueError
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError:
        raise DataError(f"{path}: not valid YAML") from None
    if not isinstance(recipe, dict) or not isinstance(recipe.get("stages"), dict):
        raise DataError(f"{path}: not the recipe of a run: it has no stages")
    return recipe, text


def _with_snapshots(
    name: str, spec: Any, infos: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, Mapping[str, Any]]]:
    """Pairs (name, recipe keys): one for each snapshot of a stage, then one for the stage itself.
    All have the stage's keys. `infos` maps each saved model to the content of its `stage.json`. A
    snapshot in `infos` gets a pair even if the recipe does not list it."""
    keys = dict(spec) if isinstance(spec, Mapping) else {"kind": spec}
    saved = [each for each, info in infos.items() if info.get("snapshot_of") == name]
    saved.sort(key=lambda each: int(infos[each].get("chosen_step", 0)))
    names = dict.fromkeys([*(keys.get("snapshots") or {}), *saved, name])
    return [(each, keys) for each in names]


def _whole(
    evals: Mapping[str, tuple[EvalRow, ...]], recipe: Mapping[str, Any], sizes: Mapping[str, int]
) -> dict[str, tuple[EvalRow, ...]]:
    """The complete evaluations. `sizes` contains the split sizes from data.json. An evaluation is
    incomplete if it has fewer problems than the longest evaluation, or fewer than the recipe asks
    for. If an evaluation's problems are not the first problems of the longest evaluation, it always
    counts as complete, so that the caller can report the difference."""
    ids = {name: [row.id for row in rows] for name, rows in evals.items()}
    longest = max(ids.values(), key=len, default=[])
    size = sizes.get(evaluated_split(recipe), 0)
    size = max(len(longest), min(size, (recipe.get("evaluate") or {}).get("limit") or size))
    return {
        name: evals[name]
        for name, found in ids.items()
        if len(found) == size or found != longest[: len(found)]
    }


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or an empty object if the file does not exist. Raises: DataError
    if the file does not contain a JSON object."""
    if not path.exists():
        return {}
    return _object(path.read_bytes(), where=str(path))


def _object(content: bytes, *, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_lines(path: Path, parse: Callable[[dict[str, Any]], Parsed]) -> Iterator[Parsed]:
    """Yields the result of `parse` for each JSON line of a file. If the last line has no newline,
    it is skipped, because it is still being written."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and line.endswith(b"\n"):
                where = f"{path}:{number}"
                row = _object(line, where=where)
                try:
                    yield parse(row)
                except KeyError as error:
                    raise DataError(f"{where}: {error.args[0]} is missing") from None
                except (ValueError, TypeError, AttributeError, OverflowError) as error:
                    raise DataError(
                        f"{where}: {error}; expected a line as reftune writes it"
                    ) from None


def _read_metrics(path: Path) -> dict[str, tuple[MetricRow, ...]]:
    """Stage → metrics, sorted by step. If a step has several rows, they are merged. If several of
    them contain the same metric, its last value is used."""
    stages: dict[str, dict[int, dict[str, float]]] = {}
    for stage, step, values in _read_lines(path, _metric_row):
        stages.setdefault(stage, {}).setdefault(step, {}).update(values)
    return {
        stage: tuple(MetricRow(step=step, values=steps[step]) for step in sorted(steps))
        for stage, steps in stages.items()
    }


def _metric_row(row: Mapping[str, Any]) -> tuple[str, int, dict[str, float]]:
    numbers = {key: v for key, v in row.items() if "/" in key and isinstance(v, int | float)}
    return str(row["stage"]), int(row["step"]), {key: float(v) for key, v in numbers.items()}


def _read_evals(path: Path, recipe: Mapping[str, Any]) -> tuple[EvalRow, ...]:
    format = recipe.get("format")
    grading = format.get("grading") if isinstance(format, Mapping) else None
    rows = tuple(_read_lines(path, partial(_eval_row, grading=grading)))
    if not rows:
        raise DataError(f"{path}: no evaluated problems")
    return rows


def _eval_row(row: Mapping[str, Any], *, grading: str | None) -> EvalRow:
    return EvalRow(
        id=str(row["id"]),
        question=str(row["question"]),
        gold=str(row["gold"]),
        greedy=Attempt.from_row(row["greedy"]),
        samples=tuple(map(Attempt.from_row, row.get("samples") or ())),
        grading=grading,
    )


def _sample(row: Mapping[str, Any]) -> TrainingSample:
    return TrainingSample(
        step=int(row["step"]),
        id=str(row["id"]),
        question=str(row["question"]),
        gold=str(row["gold"]),
        attempt=Attempt.from_row(row),
        tokens=tuple(row.get("tokens") or ()),
        logprobs=tuple(row.get("logprobs") or ()),
    )
