"""Before a run starts, finds problems that would spoil the run, and suggests a remedy for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

from reftune.advice.check import data, model, tokens
from reftune.advice.check.report import CheckReport, Finding, fail, ok
from reftune.advice.check.subject import Subject, preview_of, rl_inits, subject_of
from reftune.advice.golds import gold_kinds
from reftune.datasets import Dataset, Splits, load_dataset, load_splits
from reftune.datasets.mixture import Mixture
from reftune.datasets.reading.file_dataset import FileDataset
from reftune.errors import DataError, RecipeError, RewardError
from reftune.recipe import Component, ModelTable, Recipe, ScratchTable, local_path, shipped_recipes
from reftune.runs.auto import settled
from reftune.runs.models import Models, check_stage_graph, is_model_folder
from reftune.runs.run import threads_of
from reftune.storage.run_folder import RunFolder
from reftune.text import counted, did_you_mean

__all__ = ["CHECKS", "MODEL_CHECKS", "CheckReport", "Finding", "check_offline", "check_recipe"]


STAND_IN_TEMPLATE = "{% for turn in messages %}{{ turn.content }}\n{% endfor %}"
"""Stands in for the chat template of a model that is not loaded."""
OFFLINE = (
    *("columns", "gold_answers", "gold_rationales", "grader_refuses", "reward", "reward_errors"),
)
"""Names of the checks that work without the recipe's own model and data."""
EXAMPLES = "paper/examples"
UNSAFE = ("vocabulary", "prompt_length", "memory", "dtype")
"""If one of these checks fails, the model is not run, because running it could crash or be far too
slow."""


def check_recipe(recipe: Recipe) -> CheckReport:
    """Load the data and the model, and report what the checks find. If a check in `UNSAFE`, such as
    `memory`, fails, the model is not run. Nothing is written to the run folder.

    Raises: ReftuneError if the data or the model cannot be loaded, or if `stages`, `evaluate` or
    `check.waive` contains an unknown or invalid name.
    """
    _refuse_unknown_waivers(recipe.check.waive)
    check_stage_graph(recipe)
    recipe = settled(recipe)
    splits = load_splits(recipe)
    method = _starting_method(recipe, splits)
    with threads_of(recipe):
        policy = Models(recipe, splits).load(method, trained=True)
        subject = subject_of(recipe, splits, policy, method)
        findings = _findings(subject, CHECKS)
        if not any(finding.level == "fail" and finding.name in UNSAFE for finding in findings):
            findings += _findings(subject, MODEL_CHECKS)
    return CheckReport(
        recipe=recipe.name,
        findings=tuple(findings),
        golds=gold_kinds(subject.splits),
        preview=preview_of(subject),
        method=method,
        samples=tuple(row for finding in findings for row in finding.samples),
    )


def check_offline(recipe: Recipe) -> CheckReport:
    """Run the checks that need neither weights nor a download, and return a report. A word-level
    tokenizer always replaces the model's. If training data is not on this machine, reftune's
    examples replace it.

    Raises: ReftuneError as in `check_recipe`, and if reftune has no examples for the dataset.
    """
    _refuse_unknown_waivers(recipe.check.waive)
    check_stage_graph(recipe)
    dataset, missing = _offline_dataset(recipe.dataset, "dataset")
    source = "; ".join(dict.fromkeys(missing)) or "the recipe's own data"
    splits = load_splits(recipe.model_copy(update={"dataset": dataset}))
    lines = tuple(f"{name}: {stage.line()}" for name, stage in recipe.stages.items())
    schedule = replace(ok(counted(len(lines), "stage")), name="schedule", rows=lines)
    return CheckReport(
        recipe=recipe.name,
        findings=(replace(ok(source), name="data"), schedule, *check_texts(recipe, splits)),
        golds=gold_kinds(splits),
    )


def check_texts(recipe: Recipe, splits: Splits) -> list[Finding]:
    """The findings about data, format and reward. The checks do not need the recipe's model."""
    shape = ScratchTable(hidden_size=8, layers=1, heads=1, context=8192)
    scratch = ModelTable(scratch=shape, dtype="float32")
    recipe = recipe.model_copy(update={"model": scratch})
    policy = Models(recipe, splits).load("base")
    arguments = " ".join(getattr(recipe.format, "template_args", ()))
    policy.tokenizer.chat_template = f"{{# {arguments} #}}{STAND_IN_TEMPLATE}"
    subject = subject_of(recipe, splits, policy)
    return _findings(subject, {name: CHECKS[name] for name in OFFLINE})


def _offline_dataset(dataset: Component, where: str) -> tuple[Component, list[str]]:
    """Choose the `dataset` or, if its training data is not on this machine, reftune's examples. Dev
    or test data that is not on this machine is left out. The choice is made separately for each
    part of a mixture. `where` is the dataset's key in the recipe. Returns: the chosen dataset and,
    for each file or folder of data that is not on this machine, a message that says whether it is
    replaced or left out. Raises: DataError if reftune has no examples for this kind of dataset."""
    if isinstance(dataset, Mixture):
        parts, missing = {}, []
        for name, part in dataset.parts.items():
            chosen, of_part = _offline_dataset(part.dataset, f"{where}.parts.{name}.dataset")
            parts[name] = part.model_copy(update={"dataset": chosen, "share": None})
            missing += of_part
        return dataset.model_copy(update={"parts": parts}) if missing else dataset, missing
    keys = ("train", "dev", "test") if isinstance(dataset, FileDataset) else ("train",)
    sources = {key: getattr(dataset, key, None) for key in keys}
    absent = {
        key: source
        for key, source in sources.items()
        if isinstance(source, str) and not local_path(source).exists()
        if key == "train" or not source.startswith((".", "/", "~"))  # these are never on the Hub
    }
    train = absent.pop("train", None)
    missing = [
        f"{s} is not on this machine, and is left out" for s in absent.values() if s != train
    ]
    if train is None:
        return dataset.model_copy(update=dict.fromkeys(absent)), missing
    folder = shipped_recipes() / EXAMPLES / dataset.kind
    if not folder.is_dir():
        raise DataError(
            f"{where}.train: {train} is not on this machine, and reftune has no examples of"
            f" kind {dataset.kind}"
        )
    examples = {"train": str(folder), "dev": None, "test": None, "dev_size": 2}
    chosen = dataset.model_copy(update=examples)
    found = load_dataset(cast(Dataset, chosen), seed=0)
    count = len(found.train) + len(found.dev)
    told = f"{train} is not on this machine; {count} examples that come with reftune replace it"
    return chosen, [told, *missing]


def _findings(subject: Subject, checks: Mapping[str, Check]) -> list[Finding]:
    """One finding per check, in the order of `checks`. If a check raises a RewardError, that check
    fails. If a check fails but the recipe waives it, the finding is only a warning."""
    findings = []
    for name, check in checks.items():
        try:
            found = check(subject)
        except RewardError as error:
            found = fail(str(error), "fix the reward function")
        if found.level == "fail" and name in subject.recipe.check.waive:
            found = replace(found, level="warn", message=f"{found.message} (waived)")
        findings.append(replace(found, name=name))
    return findings


def _starting_method(recipe: Recipe, splits: Splits) -> str:
    folder, is_own = RunFolder(recipe.folder), not data.run_folder_problem(recipe, splits)
    inits = rl_inits(recipe)
    trained = (m for m in inits if (is_own and folder.stage(m).is_done) or is_model_folder(m))
    return next(trained, "base")


def _refuse_unknown_waivers(names: Sequence[str]) -> None:
    known = [*CHECKS, *MODEL_CHECKS]
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or f"expected one of {', '.join(known)}"
            raise RecipeError(f"check.waive: {name}: no such check; {hint}")


Check = Callable[[Subject], Finding]


def _named(*checks: Check) -> dict[str, Check]:
    return {check.__name__.removeprefix("check_"): check for check in checks}


CHECKS = _named(
    data.check_run_folder,
    data.check_splits,
    data.check_columns,
    data.check_gold_answers,
    data.check_gold_rationales,
    data.check_sandbox,
    data.check_grader_refuses,
    data.check_reward,
    data.check_reward_errors,
    tokens.check_prompt,
    tokens.check_boundary,
    tokens.check_prompt_length,
    tokens.check_target_length,
    tokens.check_vocabulary,
    tokens.check_eos,
    model.check_memory,
    model.check_dtype,
)
MODEL_CHECKS = _named(model.check_accuracy, model.check_logprobs, model.check_time)
"""Checks that run the model. They are skipped if a check in `UNSAFE` fails."""
