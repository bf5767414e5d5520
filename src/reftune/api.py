"""The Python interface: `run`, `grade` and `evaluate`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from reftune.datasets.reading.golds import GoldReader
from reftune.datasets.reading.rows import Row
from reftune.errors import DataError, RecipeError
from reftune.grading.formats import Format, grades_of
from reftune.processes import launch, world
from reftune.recipe import (
    LengthTable,
    ModelTable,
    Recipe,
    load_component,
    load_recipe,
    parse_recipe,
)
from reftune.results.records import read_json, read_recipe
from reftune.results.stats import wilson
from reftune.storage.run_folder import EXPORT_SETTINGS, StageFolder
from reftune.terminal.score import golds_of, problem_of
from reftune.text import shown
from reftune.types import Completion, Graded, Problem, Verdict

if TYPE_CHECKING:
    from reftune.model.policy import Policy

FormatSpec = str | Mapping[str, Any] | Format
"""A `Format`, a format's kind (`nl`, `program` or `file.py:Name`), or a mapping from a format's
recipe keys to values."""


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path, *overrides: str, quiet: bool = True
) -> dict[str, Any]:
    """Train all stages of a recipe and evaluate their models, as `reftune run` does. `recipe` is
    the path of a recipe file, a mapping from recipe keys (except `extends`) to values, or a
    `Recipe`. An unfinished run is resumed. If a launcher such as torchrun starts several processes,
    all of them must call this function.

    `overrides` are `key=value` strings, which are allowed only if `recipe` is a path. If `quiet` is
    false, progress is shown on stderr. Returns: the content of the run's `summary.json`. Raises:
    ReftuneError if the run cannot start or continue; `reftune.stages.loop.Interrupted` if SIGINT or
    SIGTERM stops the training.
    """
    with launch.processes():
        from reftune.runs.run import run_recipe
        from reftune.terminal.live import make_progress
        from reftune.terminal.trackers import tracked

        if isinstance(recipe, str | Path):
            recipe = load_recipe(recipe, overrides)
        elif overrides:
            raise RecipeError(
                f"{overrides[0]}: overrides work only with a recipe file; expected the key in the"
                " recipe itself"
            )
        parsed = recipe if isinstance(recipe, Recipe) else parse_recipe(recipe)
        progress = tracked(make_progress(quiet=quiet or not world.is_main()), parsed)
        with closing(progress):
            return run_recipe(parsed, progress=progress)


def grade(
    completion: str,
    answer: float | str | Sequence[float | str],
    *,
    choices: Iterable[str] | Mapping[str, Any] | None = (),
    answer_kind: str = "auto",
    format: FormatSpec = "nl",
    question: str = "",
) -> Graded:
    """Grade a completion as in training and evaluation. `answer` is the gold answer: a number,
    text, the letter of a choice, or an answer of the kind that `answer_kind` names
    (docs/datasets.md). `choices` are the texts of the multiple-choice options, in order, or options
    with labels: `{"A": "red", "B": "blue"}` or `{"text": ["red", "blue"], "label": ["A", "B"]}`.
    `question` is needed only by a `format` of your own.

        >>> grade("so 3 · 7 = 21. The answer is 21", 21).verdict
        <Verdict.CORRECT: 'correct'>

    Raises: DataError if `completion` is not text, or if `choices` or `answer` cannot be read;
    RecipeError if the format is unusable; ReftuneError if a package or sandbox that grading needs
    is missing. A completion's text never causes an error.
    """
    if not isinstance(completion, str):
        raise DataError(f"grade: completion is {shown(completion)}; expected text")
    own: Format = _component(format, "format")
    if isinstance(choices, Iterable) and not isinstance(choices, str | Mapping):
        choices = list(choices) or None
    row = {
        "id": "1",
        "answer": answer,
        "answer_kind": answer_kind,
        "choices": choices,
        "question": question,
    }
    return grades_of(own, [problem_of(row, "grade", golds_of(None, own))], [completion])[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A model's greedy solutions to problems, and their grades."""

    problems: tuple[Problem, ...]
    completions: tuple[Completion, ...]
    graded: tuple[Graded, ...]

    @property
    def n(self) -> int:
        return len(self.problems)

    @property
    def accuracy(self) -> float:
        """Share of problems that the model solved correctly."""
        return self._num_correct / self.n

    @property
    def ci95(self) -> tuple[float, float]:
        """Wilson's 95% confidence interval for the accuracy."""
        return wilson(self._num_correct, self.n)

    @property
    def _num_correct(self) -> int:
        return sum(graded.verdict is Verdict.CORRECT for graded in self.graded)


def evaluate(
    model: str | Path | Policy,
    problems: Sequence[Problem | Mapping[str, Any]],
    *,
    format: FormatSpec | None = None,
    max_new: int | None = None,
) -> Evaluation:
    """Generate a model's greedy solutions to problems, and grade the solutions.

    `model` is the folder `stages/NAME` of a run, any other model folder in Hugging Face format, a
    Hub id, `smollm2-135m` or a loaded `Policy`. `problems` are `Problem`s, or mappings with the
    keys `question`, `answer` and, optionally, `id`, `choices` and `answer_kind`. `max_new` is the
    maximum number of tokens per solution.

    For a folder `stages/NAME`, answers and choices are read as in the run's dataset. The defaults
    of `format` and `max_new` are the run's settings, and the model computes in the run's dtype. If
    the run's `lengths.too_long` is `drop`, a problem whose prompt is too long counts as unanswered.
    All of this also applies to a folder that `reftune export` wrote, with three exceptions. First,
    answers and choices are read as in `grade`. Second, you must pass `format` if the run's format
    or grader is your own. Third, the run's `format.allow_unisolated` is ignored.

    For any other model, answers and choices are read as in `grade`. `format` defaults to `nl` and
    `max_new` to 256, and the dtype is the one that `model.dtype: auto` chooses. A `Policy` keeps
    its own dtype.

    Raises: ReftuneError if the model, a problem, the format or `max_new` cannot be used.
    """
    from reftune.grading.rewards.outcome import Outcome
    from reftune.model.encoder import Encoder, stop_texts
    from reftune.model.policy import Policy
    from reftune.stages.rollouts import Collector

    try:
        items = iter(problems)
    except TypeError:
        raise RecipeError(f"evaluate: problems is {shown(problems)}; expected a list") from None
    if not (rows := list(items)):
        raise RecipeError("evaluate: no problems; expected at least one")
    if max_new is not None and (not isinstance(max_new, int) or max_new < 1):
        raise RecipeError(f"max_new: {max_new!r}; expected a positive number of tokens")
    recipe: Mapping[str, Any] = {}
    if isinstance(model, Policy):
        policy = model
    else:
        path = _path(model)
        recipe = _recipe_of(path) or _exported(path, has_format=format is not None)
        policy = _policy(path, recipe)
    put: Format = _component(format or recipe.get("format") or "nl", "format")
    golds = golds_of(_dataset(recipe), put)
    found = tuple(p if isinstance(p, Problem) else _asked(p, i, golds) for i, p in enumerate(rows))
    with_id = {problem.id: problem for problem in found}
    for problem in found:
        if with_id[problem.id] != problem:
            raise DataError(
                f"problem {problem.id}: two problems have this id; expected different ids"
            )
    lengths = LengthTable.model_validate(recipe.get("lengths") or {})
    if lengths.too_long == "refuse":  # ignore max_prompt; only the context limits prompts
        lengths = LengthTable(max_new=lengths.max_new)
    if max_new is not None:
        lengths = lengths.model_copy(update={"max_new": max_new})
    collector = Collector(
        engine=load_component("kv", group="engines"),
        encoder=Encoder(policy.tokenizer, put),
        reward=Outcome(),
        lengths=lengths,
    )
    if collector.prompt_limit(policy) == 0:
        default = "" if max_new else "; this is the default, and `max_new=…` sets another"
        raise RecipeError(
            f"max_new: {lengths.max_new}; expected less than the model's context of"
            f" {policy.context} tokens{default}"
        )
    own = policy.stop
    policy.stop = replace(own, texts=stop_texts(put))
    try:
        solved = collector.solve(policy, found)
    finally:
        policy.stop = own
    return Evaluation(
        problems=found, completions=tuple(solved.completions), graded=tuple(solved.graded)
    )


def _asked(row: Mapping[str, Any], index: int, golds: GoldReader) -> Problem:
    where = f"problem {index}"
    try:
        row = {"id": index, **row}
    except TypeError:
        raise DataError(
            f"evaluate: {where} is {shown(row)}; expected a list of Problems or mappings"
        ) from None
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: question is {shown(question)}; expected text")
    Row(where=where, id="", columns=row).refuse_half_pairs("question", "choices")
    return problem_of(row, where, golds)


def _path(model: str | Path) -> str:
    """The path or Hub id of a model, as text. A `Path` that exists is made absolute, because
    `Path("./smollm2-135m")` loses its `./` when converted to text and would then be taken for the
    name of the packaged model."""
    try:
        path = os.fsdecode(model)
    except TypeError:
        raise RecipeError(f"model: {shown(model)}; expected a folder, Hub id or Policy") from None
    return str(model.absolute()) if isinstance(model, Path) and model.exists() else path


def _policy(path: str, recipe: Mapping[str, Any]) -> Policy:
    """Load the model as a policy that cannot be trained. Its dtype is `model.dtype` in `recipe`,
    the settings of the run that trained the model. If `recipe` is empty, the dtype is chosen as for
    `model.dtype: auto`."""
    import torch

    from reftune.model.policy import Policy
    from reftune.model.weights import load_model
    from reftune.runs.auto import choose_device, fastest_dtype

    dtype = (recipe.get("model") or {}).get("dtype", "auto")
    device = choose_device("auto")
    name = fastest_dtype(device) if dtype == "auto" else dtype
    loaded = load_model(ModelTable(path=path), as_stored=True)
    return Policy(*loaded, dtype=getattr(torch, name), trained=False).to(device)


def _recipe_of(path: str) -> Mapping[str, Any]:
    """The recipe of the run that trained the model at `path`, if `path` leads to the folder
    `stages/NAME` of a run; empty for any other model. Raises: DataError if the recipe cannot be
    read."""
    from reftune.model.weights import resolve

    folder = resolve(path)
    if isinstance(folder, str):
        return {}
    for stage in (folder.absolute(), folder.resolve()):  # NAME may be a link
        if stage.parent.name == "stages" and (file := StageFolder(stage).run.recipe).is_file():
            return read_recipe(file)[0]
    return {}


def _exported(path: str, *, has_format: bool) -> Mapping[str, Any]:
    """The run's settings, read from a model folder that `reftune export` wrote; empty for any other
    model, including a Hub id. Raises: DataError if they cannot be read; RecipeError if the format
    or its grader is in a user's file, because loading a model folder must not run code. With
    `has_format`, the RecipeError is not raised."""
    from reftune.model.weights import resolve

    file = Path(resolve(path)) / EXPORT_SETTINGS
    settings = read_json(file)
    stored = settings.get("format")
    keys = stored if isinstance(stored, dict) else {"kind": stored}
    try:
        LengthTable.model_validate(settings.get("lengths") or {})
        ModelTable.model_validate({"path": path, **(settings.get("model") or {})})
        if not isinstance(keys.get("kind"), str | None):
            raise TypeError(f"format is {shown(stored)}")
    except (TypeError, ValueError) as error:  # a ValidationError is a ValueError
        told = str(error).replace("\n", " ")
        raise DataError(f"{file}: expected what reftune export writes: {told}") from None
    own = [name for key in ("kind", "grading") if ":" in (name := str(keys.get(key)))]
    if own and not has_format:
        raise RecipeError(f"{path}: trained with {own[0]}, which is not loaded; pass `format`")
    keys.pop("allow_unisolated", None)  # nor may a model folder weaken the sandbox
    return settings


def _dataset(recipe: Mapping[str, Any]) -> Any:
    """The dataset that a recipe names. None if it names none, or one that cannot be loaded."""
    try:
        return _component(recipe.get("dataset"), "dataset")
    except RecipeError:
        return None


def _component(spec: Any, table: str) -> Any:
    """The component that `spec` describes, if `spec` is a string or a mapping. Anything else, such
    as a component or None, is returned unchanged. `table` is the component's recipe key, such as
    `format`. Raises: RecipeError if a string or mapping does not describe a valid component."""
    if not isinstance(spec, str | Mapping):
        return spec
    try:
        return load_component(spec, group=f"{table}s")
    except PydanticCustomError as error:
        raise RecipeError(f"{table}: {error.message()}") from None
    except ValidationError as error:
        raise RecipeError(f"{table}: {error.errors()[0]['msg']}") from None
