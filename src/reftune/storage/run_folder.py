"""Defines the names and locations of a run's files, except those of a model or a checkpoint. Also
defines how a run claims and locks its folder. A run rejects a folder that contains the recipe of a
different run, and a folder that contains files but no recipe."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml

from reftune.errors import CheckpointError, DataError, RecipeError
from reftune.recipe import Recipe, dump_recipe, parse_recipe
from reftune.storage.files import write_atomically

if TYPE_CHECKING:
    from reftune.datasets import Splits
    from reftune.types import Problem


EXPORT_SETTINGS = "reftune.json"
"""The file in an exported model's folder from which `reftune.evaluate` reads the run's settings."""


class RunFolder:
    """The folder `runs/NAME`. docs/design.md describes the files that people and scripts read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.environment = path / "env.json"
        self.data = path / "data.json"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.report = path / "report.html"
        self.evaluations = path / "eval"
        self.lock = path / ".lock"

    @property
    def is_run(self) -> bool:
        """Whether a run has claimed the folder. A recipe alone may be a user's own file."""
        return self.recipe.is_file() and self.environment.is_file()

    def stage(self, method: str) -> StageFolder:
        """Folder of a stage, or of a snapshot that a stage saves."""
        return StageFolder(self.path / "stages" / method)

    def evaluation(self, method: str) -> Path:
        return self.evaluations / f"{method}.jsonl"

    def choices(self, method: str) -> Path:
        return self.evaluations / "choices" / f"{method}.jsonl"

    def trained(self) -> list[str]:
        """The sorted names of finished stages and snapshots."""
        return sorted(path.parent.name for path in self.path.glob("stages/*/stage.json"))

    def newest_checkpoint(self) -> Path | None:
        """Path of the checkpoint that was written last in any stage; None if there is none."""
        found = self.path.glob("stages/*/checkpoints/step-*")
        return max(found, key=lambda path: path.stat().st_mtime, default=None)


class StageFolder:
    """The folder `stages/NAME` of a stage or a snapshot. It contains a model in Hugging Face format
    and the files whose paths are attributes of this class. The model in a stage's folder was chosen
    on dev. A snapshot's folder contains the model as it was at the snapshot's step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info = path / "stage.json"
        """This file is written last."""
        self.samples = path / "samples.jsonl"
        self.drawn = path / "sampled.jsonl"
        """Solutions to the training problems, on which self-training or a reward model trains."""
        self.drawn_dev = path / "sampled_dev.jsonl"
        self.checkpoints = path / "checkpoints"
        self.best = self.checkpoints / "best"
        """Folder of the best model on dev so far."""

    def nonfinite(self, step: int) -> Path:
        return self.path / f"nonfinite-{step:06d}.json"

    @property
    def is_done(self) -> bool:
        """Whether the stage is complete."""
        return self.info.is_file()

    @property
    def has_begun(self) -> bool:
        """Whether the stage has a checkpoint."""
        return any(self.checkpoints.glob("step-*"))

    def facts(self) -> dict[str, Any]:
        """The content of the file `info`. The stage must be complete."""
        return dict(json.loads(self.info.read_text(encoding="utf-8")))

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.path.parents[1])


# --- ownership ------------------------------------------------------------------------------------


_FIRST = RunFolder(Path())
BEFORE_CLAIM = frozenset(
    [_FIRST.lock.name, _FIRST.environment.name, _FIRST.data.name]
    + [f".{path.name}.partial" for path in (_FIRST.environment, _FIRST.data, _FIRST.recipe)]
)
"""Names of files that may remain from a run that was killed before it wrote `recipe.yaml`."""
ENVIRONMENT = ("reftune", "torch", "transformers", "accelerate", "peft", "pydantic-monty", "numpy")
TRAINING = "training"
TRAINING_KEYS = {"optimizer", "save_every_s", "keep"}
"""A recipe's table with all these keys sets how a stage trains. It is the stage's own table or, in
self-training, its table `sft`. In the paths below, `TRAINING` stands for any such table."""
CHANGES_NO_RESULT = (
    *("run_dir", "check", "trackers", "tracker_rollouts", "engine.weights_dir"),
    *(f"{TRAINING}.{key}" for key in ("save_every_s", "keep")),
    *(f"{TRAINING}.optimizer.{key}" for key in ("on_nonfinite", "max_skipped")),
)
"""Keys and tables that change no existing file of a run except the recipe, summary and report."""
CHANGES_ROUNDING = (
    *("model.micro_batch_tokens", "model.gradient_checkpointing"),
    *("engine.batch_size", "engine.memory", "engine.server"),
)
"""Keys that set a run's memory use or where it samples. They change results only by rounding."""


@contextmanager
def claimed(folder: RunFolder, recipe: Recipe, splits: Splits) -> Iterator[list[str]]:
    """Claim the folder for this run, and lock it during the `with` block. `recipe` replaces the
    folder's old recipe. A stage with more steps or epochs than in the old recipe is reopened: its
    training continues, and its evaluation is moved to another folder. If the two recipes evaluate
    differently, all evaluations are moved. The old summary is deleted if a stage is reopened, or
    if the recipes differ in their stages or in `evaluate`.

    Yields: notes for the user on changes that affect results. Raises: the errors of
    `refuse_foreign`; DataError if the problems have changed since the run began; CheckpointError if
    the folder is in use or cannot be written."""
    notes: list[str] = []
    with ExitStack() as stack:
        with readable_errors(folder):
            folder.path.mkdir(parents=True, exist_ok=True)
            if not _lock(stack.enter_context(folder.lock.open("w"))):
                notes.append(
                    f"{folder.path}: this file system has no locks; make sure that no other process"
                    " uses the folder"
                )
            if refuse_foreign(folder, recipe):
                write_atomically(folder.environment, json.dumps(environment(), indent=2))
                write_atomically(folder.data, json.dumps(data_facts(splits), indent=2))
            else:
                refuse_changed_data(folder, splits)
                longer = lengthened_stages(folder, recipe)
                notes += [note for name in longer for note in _reopen(folder, name)]
                own, wanted = _own_and_wanted(folder, recipe)
                notes += _changed_environment(folder)
                notes += _stretched_rates(wanted, longer)
                notes += [*_changed_rounding(own, wanted), *_set_aside(folder, own, wanted)]
                has_other_stages = [*own["stages"]] != [*wanted["stages"]]
                if longer or has_other_stages or own.get("evaluate") != wanted.get("evaluate"):
                    folder.summary.unlink(missing_ok=True)
            # written last, because it claims a new folder for this run
            text = dump_recipe(recipe)
            if not folder.recipe.is_file() or folder.recipe.read_text(encoding="utf-8") != text:
                write_atomically(folder.recipe, text)
        yield notes


def _lock(file: IO[str], *, attempts: int = 5) -> bool:
    """Lock a file. Returns: whether its file system has locks. Raises: BlockingIOError if another
    process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if attempts == 1:
            raise
        time.sleep(0.1)  # `watch` locks the file for an instant
        return _lock(file, attempts=attempts - 1)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        return False
    return True


@contextmanager
def readable_errors(folder: RunFolder) -> Iterator[None]:
    """Turn an OSError inside the block into a CheckpointError."""
    path = folder.path
    try:
        yield
    except BlockingIOError:
        raise CheckpointError(f"{path}: another process is using this run folder") from None
    except (NotADirectoryError, FileExistsError):
        raise CheckpointError(f"{path}: cannot be a run folder: a file is in its place") from None
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: cannot be written: {error.strerror}"
        ) from None


def data_facts(splits: Splits) -> dict[str, Any]:
    """The content of `data.json`: the size and a hash of each split, and the number of rows dropped
    for each reason. The train split has two sizes: the number of problems with a rationale, and the
    number without one."""
    with_rationale = sum(problem.rationale is not None for problem in splits.train)
    sizes = {"train": with_rationale, "dev": len(splits.dev), "test": len(splits.test)}
    return {
        "problems": sizes,
        "train_without_rationale": len(splits.train) - with_rationale,
        "dropped": dict(splits.counts),
        "hashes": split_hashes(splits),
    }


def split_hashes(splits: Splits) -> dict[str, str]:
    """A hash of each split's problems. Columns that only a reward function reads are not hashed."""
    return {
        split: hashlib.sha256(json.dumps([*map(_hashed, problems)]).encode()).hexdigest()
        for split, problems in (("train", splits.train), ("dev", splits.dev), ("test", splits.test))
    }


def _hashed(p: Problem) -> list[Any]:
    turns = [[turn.role, turn.content] for turn in p.messages]
    return [p.id, p.question, p.choices, p.written_answer, p.rationale, *turns]


def refuse_changed_data(folder: RunFolder, splits: Splits) -> None:
    """Raises: DataError if the problems have changed since the run began; CheckpointError if the
    run's `data.json` cannot be read."""
    if not folder.data.is_file():
        return
    try:
        known = json.loads(folder.data.read_text(encoding="utf-8")).get("hashes", {})
    except (ValueError, AttributeError):
        raise CheckpointError(f"{folder.data}: damaged; expected a JSON object") from None
    for split, now in split_hashes(splits).items():
        if known.get(split, now) != now:
            raise DataError(
                f"{folder.path}: the {split} problems have changed since this run began; expected"
                " the same data, or another run_dir"
            )


def refuse_foreign(folder: RunFolder, recipe: Recipe) -> bool:
    """Return True if the folder is unclaimed, and False if this run has claimed it. Raises: for a
    claimed folder, whatever `lengthened_stages` raises; for an unclaimed one, CheckpointError if it
    contains files other than those that a killed run may leave (`BEFORE_CLAIM`)."""
    if folder.is_run:
        lengthened_stages(folder, recipe)
        return False
    path = folder.path
    if path.exists() and any(child.name not in BEFORE_CLAIM for child in path.iterdir()):
        raise CheckpointError(f"{path}: is not empty and not a run folder; choose another run_dir")
    return True


def lengthened_stages(folder: RunFolder, recipe: Recipe) -> list[str]:
    """The names of the stages that have begun and are lengthened: `recipe` gives them more steps or
    epochs than the folder's recipe does. A stage that has begun may be lengthened only if it trains
    a model that solves problems, not a reward model. `recipe` may also lengthen stages that have
    not begun, add stages and change `evaluate`. None of these changes affects a model that is
    already trained.

    Raises: RecipeError if the recipes differ in anything else that affects results, if a stage
    after a lengthened stage has begun, or if a lengthened stage is complete but its final
    checkpoint is gone; CheckpointError if the folder's recipe cannot be read."""
    own, wanted = _own_and_wanted(folder, recipe)
    own["stages"] = {**wanted["stages"], **(own.get("stages") or {})}
    longer = []
    for name, stage in own["stages"].items():
        table, spec = map(length_table, (stage, wanted["stages"].get(name, {})))
        for key in {"steps", "epochs"} & table.keys() & spec.keys():
            files = folder.stage(name)
            has_begun = files.is_done or files.has_begun
            if spec[key] > table[key] and (recipe.stages[name].is_method or not has_begun):
                table[key] = spec[key]
                if has_begun:
                    longer.append(name)
    free = {*CHANGES_NO_RESULT, *CHANGES_ROUNDING, "evaluate"}
    difference = first_difference(without(own, free), without(wanted, free))
    if difference is not None:
        raise RecipeError(
            f"{folder.path}: belongs to another recipe: {difference}; choose another run_dir"
        )
    for name in longer:
        _require_open(folder, recipe, name)
    return longer


def length_table(stage: dict[str, Any]) -> dict[str, Any]:
    """The table that sets a stage's steps or epochs: `stage` or, in self-training, its `sft`."""
    nested = stage.get("sft")
    return nested if isinstance(nested, dict) else stage


def without(recipe: Mapping[str, Any], keys: Collection[str], where: str = "") -> dict[str, Any]:
    """A copy of a recipe, or of its table at the path `where`, without some keys and tables. `keys`
    lists their paths, such as `engine.server`. In a path, `training` stands for any table that has
    all of `TRAINING_KEYS`."""
    kept = {}
    for name, value in recipe.items():
        place = f"{where}.{name}".lstrip(".")
        if place in keys:
            continue
        if isinstance(value, Mapping):
            value = without(value, keys, TRAINING if value.keys() >= TRAINING_KEYS else place)
        kept[name] = value
    return kept


def _changed_rounding(own: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """A note on each key in `CHANGES_ROUNDING` in which two recipes differ."""
    for place in CHANGES_ROUNDING:
        table, _, key = place.partition(".")
        change = first_difference(own[table].get(key), wanted[table].get(key), place)
        if change is not None:
            yield f"{change}; from here on, results may differ by rounding"


def _stretched_rates(recipe: dict[str, Any], longer: Collection[str]) -> Iterator[str]:
    """A note on each of the lengthened stages in which the learning rate depends on the length."""
    for name in longer:
        optimizer = length_table(recipe["stages"][name]).get("optimizer") or {}
        schedule, warmup = optimizer.get("schedule", "constant"), optimizer.get("warmup", 0)
        if schedule != "constant" or warmup:
            yield (
                f"stages.{name}: the learning rate (schedule {schedule}, warmup {warmup}) now"
                " follows the new length, so the result is not that of a run with this length from"
                " the start"
            )


def _changed_environment(folder: RunFolder) -> Iterator[str]:
    """Yield a note if the run began on a GPU but there is none now. Also yield a note if the
    version of torch has changed since the run began, and likewise for transformers."""
    try:
        old = dict(json.loads(folder.environment.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return
    now = environment()
    if old.get("gpu") and now["gpu"] is None:
        yield f"this run began on a machine with {old['gpu']}, but torch finds no GPU here"
    for name in ("torch", "transformers"):
        if old.get(name) not in (None, now[name]):
            yield f"{name} was {old[name]}, now {now[name]}; from here on, results may differ"


def _set_aside(folder: RunFolder, own: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """If the new recipe `wanted` evaluates differently from the folder's recipe `own`, rename the
    folder of evaluations, and yield a note. Two differences do not count: `wanted` may evaluate
    other methods, and it may have a reranker if `own` has none."""
    old, new = (each.get("evaluate") or {} for each in (own, wanted))
    free = {"stages", "rerank"} if old.get("rerank") is None else {"stages"}
    change = first_difference(without(old, free), without(new, free), "evaluate")
    if change is not None and any(folder.evaluations.rglob("*.jsonl")):
        aside = folder.evaluations.rename(_free_place(folder))
        yield f"{change}; the old evaluations are now in {aside}"


def _free_place(folder: RunFolder) -> Path:
    """The first of the paths `eval.1`, `eval.2`, … that does not exist yet. Old evaluations are
    moved there and not deleted, because they show how often a split was evaluated."""
    places = (folder.evaluations.with_suffix(f".{number}") for number in count(1))
    return next(path for path in places if not path.exists())


def _require_open(folder: RunFolder, recipe: Recipe, name: str) -> None:
    stage, names = folder.stage(name), list(recipe.stages)
    remedy = f"choose another run_dir; to start from this model there, set init: {stage.path}"
    for later in names[names.index(name) + 1 :]:
        if folder.stage(later).path.exists():
            raise RecipeError(
                f"stages.{name}: cannot continue, because the later stage {later} has begun;"
                f" {remedy}"
            )
    if stage.is_done:
        steps = stage.facts()["steps"]
        if not (stage.checkpoints / f"step-{steps:06d}").is_dir():
            raise RecipeError(
                f"stages.{name}: cannot continue without its final checkpoint, step {steps};"
                f" {remedy}"
            )


def _reopen(folder: RunFolder, name: str) -> Iterator[str]:
    """Let a stage continue from its last checkpoint and be evaluated again. Move any old evaluation
    of the stage to another folder, and yield a note about this."""
    folder.stage(name).info.unlink(missing_ok=True)
    aside = _free_place(folder)
    for path in filter(Path.is_file, (folder.evaluation(name), folder.choices(name))):
        place = aside / path.relative_to(folder.evaluations)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
    if aside.exists():
        yield f"{name}: trained further; its old evaluation is now in {aside}"


def _own_and_wanted(folder: RunFolder, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """The folder's recipe and `recipe` as dicts, with defaults filled in. If the folder's recipe is
    no longer valid, it is returned as stored, and no defaults are filled in. Raises:
    CheckpointError if the folder's recipe cannot be read."""
    try:
        own = yaml.safe_load(folder.recipe.read_bytes())
    except (yaml.YAMLError, ValueError):
        own = None
    if not isinstance(own, dict):
        raise CheckpointError(f"{folder.recipe}: not the recipe of a run; choose another run_dir")
    with suppress(RecipeError):  # adds the defaults of keys that are newer than the stored recipe
        own = yaml.safe_load(dump_recipe(parse_recipe(own)))
    return own, yaml.safe_load(dump_recipe(recipe))


def first_difference(old: Any, new: Any, where: str = "") -> str | None:
    """The first key (in the order of `old`) whose value differs between two tables, and both
    values, as text. Returns None if all values are equal. `where` is the tables' path in the
    recipe."""
    if isinstance(old, dict) and isinstance(new, dict):
        changes = (
            first_difference(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))
            for key in old | new
        )
        return next((change for change in changes if change is not None), None)
    return None if old == new else f"{where} was {old!r}, now {new!r}"


def environment() -> dict[str, Any]:
    """The versions, the machine and the command that are recorded in `env.json`."""
    import torch

    return {
        **{name: _version(name) for name in ENVIRONMENT},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": command(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def command() -> str:
    """The shell command that started this process."""
    program, *arguments = sys.argv
    is_ours = Path(program).name in ("reftune", "__main__.py")
    return shlex.join([*(["reftune"] if is_ours else ["python", program]), *arguments])


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
