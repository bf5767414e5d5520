"""Runs a recipe: trains its stages in order, evaluates the models that they save (the methods), and
writes a summary and a report. A run can be resumed at any point."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch

from reftune.datasets import Splits, load_splits
from reftune.errors import DataError, RecipeError
from reftune.processes import sharding, world
from reftune.recipe import Recipe
from reftune.results import read_groups, summarize, write_report
from reftune.runs.auto import settled
from reftune.runs.evaluation import FinalEvaluation
from reftune.runs.models import Models, check_stage_graph, require_trained
from reftune.stages.rollouts import Collector, collector_of
from reftune.stages.sft import gold_examples
from reftune.stages.stage import FACTS, Progress, StageContext
from reftune.storage.files import JsonLines, write_atomically
from reftune.storage.run_folder import (
    RunFolder,
    claimed,
    readable_errors,
    refuse_foreign,
    split_hashes,
)
from reftune.text import counted


def run_recipe(recipe: Recipe, *, progress: Progress) -> dict[str, Any]:
    """Run all stages and evaluations that are not finished, and write summary.json and report.html.
    Returns: the summary. Raises: ReftuneError if the run cannot start or continue; Interrupted if a
    signal stops the training."""
    with open_run(recipe, progress) as run:
        if "base" in recipe.methods_to_evaluate:
            run.evaluation.answer("base")
        for stage in recipe.stages:
            if not run.is_trained(stage):
                run.train(stage)
                run.report()
            run.require_facts(stage)
            for method in run.evaluated_after(stage):
                run.evaluation.answer(method)
        run.evaluation.score_samples()
        return run.summarize()


def run_stages(recipe: Recipe, *, kind: str, progress: Progress) -> dict[str, dict[str, Any]]:
    """Run only the stages of kind `kind`. If they use models that other stages save, those models
    must already be trained. Returns: the content of each stage's `stage.json`, keyed by stage name.
    Raises: the errors of `run_recipe`."""
    check_stage_graph(recipe)
    stages = recipe.stages
    names = [name for name, stage in stages.items() if stage.kind == kind]
    if not names:
        found = ", ".join(sorted({stage.kind for stage in stages.values()}))
        raise RecipeError(f"{recipe.name}: no stage of kind {kind}; it has {found}")
    made = {"base", *(method for name in names for method in recipe.saved_by(name))}
    require_trained(recipe, [m for name in names for m in stages[name].needs if m not in made])
    with open_run(recipe, progress) as run:
        for name in names:
            run.train(name)
        return world.from_main(lambda: {name: run.folder.stage(name).facts() for name in names})


def evaluate_methods(
    recipe: Recipe, methods: Collection[str], *, progress: Progress
) -> dict[str, Any]:
    """Evaluate `methods` or, if there are none, all methods that the recipe evaluates. Returns: the
    summary of all methods evaluated so far. Raises: RecipeError if a method is not among those that
    the recipe evaluates, or if a method or the reward model for reranking has not been trained yet;
    also any error that `run_recipe` raises."""
    check_stage_graph(recipe)
    for method in methods:
        if method not in recipe.methods_to_evaluate:
            known = ", ".join(recipe.methods_to_evaluate)
            raise RecipeError(
                f"{recipe.name}: does not evaluate {method}; evaluate.stages allows {known}"
            )
    methods = methods or recipe.methods_to_evaluate
    rerank = recipe.evaluate.rerank
    require_trained(recipe, [*methods, *([rerank] if rerank in recipe.stages else [])])
    with open_run(recipe, progress) as run:
        for method in methods:
            run.evaluation.answer(method)
        run.evaluation.score_samples()
        return run.summarize()


@contextmanager
def open_run(recipe: Recipe, progress: Progress) -> Iterator[Run]:
    """Open or create a recipe's run folder, and lock it against other runs. Raises: CheckpointError
    if the folder cannot be written, is in use or is not a run folder; RecipeError if the recipe
    cannot be run here, or if the folder belongs to another recipe or is not shared by all machines;
    DataError if the data cannot be used or has changed; ModelError if the model cannot be used."""
    check_stage_graph(recipe)
    recipe, folder = settled(recipe), RunFolder(recipe.folder)
    with readable_errors(folder):
        is_new = world.from_main(lambda: refuse_foreign(folder, recipe))
    run = Run(recipe, progress)
    run.evaluation.check_reranker()
    if is_new:
        run.verify_inputs()
    with ExitStack() as stack:
        stack.enter_context(threads_of(recipe))
        if world.is_main():
            for note in stack.enter_context(claimed(folder, recipe, run.splits)):
                progress.note(note)
        world.shared_folder(folder.path)
        if world.world_size() > 1:
            progress.note(f"{world.world_size()} processes, {sharding.current}")
        yield run


class Run:
    """A recipe with its problems, its models and its run folder."""

    def __init__(self, recipe: Recipe, progress: Progress) -> None:
        """Raises: DataError if the data cannot be used."""
        self.recipe, self.progress = recipe, progress
        self.folder = RunFolder(recipe.folder)
        self.splits = load_splits(recipe)
        _require_same_problems(self.splits)
        self.models = Models(recipe, self.splits)
        self.evaluation = FinalEvaluation(recipe, self.splits, self.models, progress)

    def verify_inputs(self) -> None:
        """Load the model and encode the problems, to find unusable inputs before the run starts.
        Raises: ModelError or RecipeError if the model cannot be used, for example because it has no
        embedding for a token; DataError if a prompt is too long and the recipe does not drop such
        prompts, or if no training problem can be used; the errors of `verify_engine`."""
        self.verify_engine()
        policy, stages = self.models.load("base", trained=True), self.recipe.stages.values()
        collector = collector_of(self.recipe, policy)
        train = collector.trainable(self.splits, policy).train
        if not train:
            raise DataError("dataset: every training prompt is too long; raise lengths.max_prompt")
        asked = [*self.splits.dev, *self.evaluation.problems]
        if any(stage.reads_questions for stage in stages):
            asked += train
        encoded = collector.prompts(asked, policy)
        if any(stage.reads_rationales for stage in stages):
            encoded += [example.target for example in gold_examples(train, collector, policy)]
        encoder = collector.encoder
        policy.require_known([*encoded, [encoder.end_of(encoder.format.prompt(train[0]))]])

    def verify_engine(self) -> None:
        """Raises: RecipeError if the engine finds that it cannot work in this environment."""
        getattr(self.recipe.engine, "verify", lambda: None)()

    def is_trained(self, name: str) -> bool:
        """Whether stage `name` has saved all its models."""
        saved = self.recipe.saved_by(name)
        return world.from_main(lambda: all(self.folder.stage(model).is_done for model in saved))

    def train(self, name: str) -> None:
        """Run stage `name` unless it is done. Raises: RecipeError if its `init` is not trained
        yet, or if the engine cannot work here."""
        if self.is_trained(name):
            return
        self.verify_engine()  # also if the run is continued on another machine
        stage = self.recipe.stages[name]
        collector, splits = self._inputs_of(stage.init)
        if len(splits.train) < len(self.splits.train):
            dropped = len(self.splits.train) - len(splits.train)
            self.progress.note(
                f"{name}: {counted(dropped, 'training prompt')} left out as too long"
            )
        context = StageContext(
            name=name,
            stage=stage,
            recipe=self.recipe,
            splits=splits,
            collector=collector,
            folder=self.folder.stage(name),
            metrics=JsonLines(self.folder.metrics),
            progress=self.progress,
            load=self.models.load,
            take=self.models.take,
        )
        stage.run(context)
        world.wait(f"the end of {name}")

    def _inputs_of(self, init: str) -> tuple[Collector, Splits]:
        """The collector of a stage that starts from `init`, and the problems that fit its model."""
        policy = self.models.load(init, trained=True)
        collector = collector_of(self.recipe, policy)
        return collector, collector.trainable(self.splits, policy)

    def require_facts(self, name: str) -> None:
        """Raises: RecipeError if the `stage.json` of a trained stage lacks a key in `FACTS`."""
        folder = self.folder.stage(name)
        facts = world.from_main(lambda: folder.facts() if folder.is_done else {})
        missing = [key for key in FACTS if key not in facts]
        if missing:
            raise RecipeError(
                f"stages.{name}: {self.recipe.stages[name].kind} must write {folder.info} with"
                f" {', '.join(missing)}"
            )

    def evaluated_after(self, name: str) -> list[str]:
        """The methods of stage `name` that the recipe evaluates. If the next stage starts from one
        of these methods, that method comes last, so that its model stays loaded."""
        following = dict(pairwise(self.recipe.stages)).get(name)
        init = None if following is None else self.recipe.stages[following].init
        wanted = self.recipe.methods_to_evaluate
        methods = [method for method in self.recipe.methods_of(name) if method in wanted]
        return sorted(methods, key=lambda method: method == init)

    def summarize(self) -> dict[str, Any]:
        """Write report.html from the run's files and, if all methods are evaluated, summary.json.
        Returns: the summary of the methods that are evaluated."""

        def written() -> dict[str, Any]:
            groups = read_groups([self.folder.path], finished=False)
            summary = summarize(*groups)
            if not any(run.missing for group in groups for run in group.runs):
                write_atomically(self.folder.summary, json.dumps(summary, indent=2))
            write_report(groups, self.folder.report)
            return summary

        return world.from_main(written)

    def report(self) -> None:
        """Write report.html for the run so far."""
        if world.is_main():
            write_report(read_groups([self.folder.path], finished=False), self.folder.report)


def _require_same_problems(splits: Splits) -> None:
    """Raises: DataError if the processes have different problems."""
    if world.world_size() == 1:
        return
    first, *others = world.gather(split_hashes(splits))
    different = [split for split in first if any(other[split] != first[split] for other in others)]
    if different:
        raise DataError(
            f"dataset: the {' and '.join(different)} problems differ between processes; expected"
            " the same files and packages on every machine and, for generated questions, the same"
            " PYTHONHASHSEED"
        )


@contextmanager
def threads_of(recipe: Recipe) -> Iterator[None]:
    """Inside the block, PyTorch uses the recipe's number of CPU threads. Afterwards, the previous
    number is restored."""
    before = torch.get_num_threads()
    # setting the number, even to the same value, makes decoding a quarter slower
    if recipe.threads in (None, before):
        yield
        return
    torch.set_num_threads(recipe.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
