"""A run: stages in order, then the evaluation of every method, then summary and report; all of it resumable."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from reftune.checkpoint import write_atomically
from reftune.collect import Collector
from reftune.datasets import Splits
from reftune.encoding import Encoder
from reftune.errors import CheckpointError, DataError, RecipeError
from reftune.evaluate import accuracy, evaluate
from reftune.formats import Format
from reftune.jsonlines import JsonLines
from reftune.models import load_model, load_pretrained
from reftune.policy import Policy
from reftune.progress import Progress
from reftune.recipe import Recipe, dump_recipe
from reftune.reward_model import WEIGHTS, Classifier, add_scores, is_scored, load_classifier, require_same_tokenizer
from reftune.seeds import derive_seed
from reftune.training import Stage, StageContext

ENVIRONMENT = ("reftune", "torch", "transformers", "accelerate", "peft", "pydantic-monty", "numpy")


def run_recipe(recipe: Recipe, *, progress: Progress) -> dict[str, Any]:
    """All stages, all evaluations, summary.json and report.html; what is done already is not done again.

    Returns: the summary. Raises: ReftuneError; Interrupted with the checkpoint's folder.
    """
    with open_run(recipe, progress) as run:
        for name in recipe.stages:
            run.train(name)
            run.report()
        for method in run.methods_to_evaluate():
            run.evaluate(method)
        return run.summarize()


def run_stages(recipe: Recipe, *, kinds: Collection[str], progress: Progress) -> None:
    """Only the stages of these kinds; what they start from must be there. Raises: as `run_recipe`."""
    names = [name for name, stage in recipe.stages.items() if stage.kind in kinds]
    if not names:
        raise RecipeError(f"{recipe.name}: no stage of kind {' or '.join(sorted(kinds))}; it has {_kinds(recipe)}")
    with open_run(recipe, progress) as run:
        for name in names:
            run.train(name)


def evaluate_methods(recipe: Recipe, methods: Collection[str], *, progress: Progress) -> dict[str, Any]:
    """Evaluate finished methods (all that the recipe names where `methods` is empty). Returns: the summary."""
    with open_run(recipe, progress) as run:
        for method in methods or run.methods_to_evaluate():
            run.evaluate(method)
        return run.summarize()


@contextmanager
def open_run(recipe: Recipe, progress: Progress) -> Iterator[Run]:
    """The run folder of a recipe, made or found, locked against a second process.

    Raises: CheckpointError for a folder that is unwritable, in use or not a run's; RecipeError for one of another recipe.
    """
    folder = recipe.folder
    check_stage_graph(recipe)
    run = Run(recipe=recipe, splits=load_splits(recipe), folder=folder, progress=progress)
    run.check_reranker()
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / ".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _claim(folder, recipe)
        except BlockingIOError:
            raise CheckpointError(f"{folder}: another process is using this run folder") from None
        except (NotADirectoryError, FileExistsError):
            raise CheckpointError(f"{folder}: cannot be a run folder: a file is in its place") from None
        except OSError as error:
            raise CheckpointError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
        yield run


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """An open run folder."""

    recipe: Recipe
    splits: Splits
    folder: Path
    progress: Progress

    def train(self, name: str) -> None:
        """Run stage `name` unless it is done. Raises: RecipeError where the method it starts from is not there yet."""
        folder, stage = self.stage_folder(name), self.recipe.stages[name]
        if all((self.stage_folder(method) / "stage.json").is_file() for method in (name, *stage.produces)):
            return
        policy = self.load_policy(stage.init, lora=True)
        context = StageContext(
            name=name,
            recipe=self.recipe,
            policy=policy,
            splits=self.splits,
            collector=self.collector(policy),
            folder=folder,
            metrics=JsonLines(self.folder / "metrics.jsonl"),
            progress=self.progress,
            load=self.load_policy,
        )
        stage.run(context)

    def load_policy(self, method: str, *, lora: bool = False) -> Policy:
        """The base model or a finished method's chosen one. `lora` adds fresh adapters where the recipe asks for them."""
        table = self.recipe.model
        if method == "base":
            texts = scratch_texts(self.recipe.format, self.splits) if table.scratch is not None else ()
            model, tokenizer = load_model(table, texts=texts, seed=derive_seed(self.recipe.seed, "base"))
        else:
            if not (self.stage_folder(method) / "stage.json").is_file():
                raise RecipeError(f"{self.stage_folder(method)}: method {method} is not trained yet; `reftune run` trains all")
            model, tokenizer = load_pretrained(self.stage_folder(method), trust_remote_code=table.trust_remote_code)
        torch.manual_seed(derive_seed(self.recipe.seed, "adapters"))
        policy = Policy(model, tokenizer, dtype=getattr(torch, table.dtype), lora=table.lora if lora else None)
        policy.load_value_head(self.stage_folder(method))
        policy.verify_head()
        return policy

    def collector(self, policy: Policy) -> Collector:
        return Collector(
            engine=self.recipe.engine,
            encoder=Encoder(policy.tokenizer, self.recipe.format),
            reward=self.recipe.reward,
            max_prompt=self.recipe.lengths.max_prompt,
        )

    def stage_folder(self, method: str) -> Path:
        return self.folder / "stages" / method

    def methods(self) -> list[str]:
        """All methods in the order they come to be; a stage's snapshots before the stage."""
        return [method for name, stage in self.recipe.stages.items() for method in _methods_of(name, stage)]

    def methods_to_evaluate(self) -> list[str]:
        wanted = self.recipe.evaluate.stages
        return [method for method in self.methods() if wanted is None or method in wanted]

    def evaluate(self, method: str) -> None:
        """Answer the test (or dev) problems with a method's chosen model, once, and score the samples for reranking."""
        table = self.recipe.evaluate
        problems = getattr(self.splits, table.split)[: table.limit]
        if not problems:
            raise DataError(f"evaluate.split: the dataset has no {table.split} problems")
        path = self.folder / "eval" / f"{method}.jsonl"
        if len(JsonLines(path).rows()) < len(problems):
            policy = self.load_policy(method)
            rows = evaluate(policy, problems, self.collector(policy), self.recipe, method=method, path=path)
            self.progress.note(f"{method}: {accuracy(rows):.1%} of {len(rows)} {table.split} problems right")
        if table.rerank is not None and not is_scored(JsonLines(path).rows()):
            classifier = self.load_reranker(table.rerank)
            encoder = Encoder(classifier.policy.tokenizer, self.recipe.format)
            add_scores(path, problems, classifier, encoder, max_tokens=self.recipe.model.micro_batch_tokens)

    def load_reranker(self, name: str) -> Classifier:
        """A reward model by its stage or by its folder in another run."""
        if name in self.recipe.stages:
            return load_classifier(self.load_policy(name), self.stage_folder(name))
        model, tokenizer = load_pretrained(name, trust_remote_code=self.recipe.model.trust_remote_code)
        return load_classifier(Policy(model, tokenizer, dtype=getattr(torch, self.recipe.model.dtype)), Path(name))

    def check_reranker(self) -> None:
        """Raises: ModelError where another run's reward model does not read what this run's methods write."""
        name = self.recipe.evaluate.rerank
        if name is not None and name not in self.recipe.stages:
            require_same_tokenizer(self.load_reranker(name), self.load_policy("base"), where=f"evaluate.rerank: {name}")

    def summarize(self) -> dict[str, Any]:
        """summary.json and report.html, from the files of the run alone."""
        from reftune.report import summarize

        summary = summarize(self.folder)
        write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2))
        self.report()
        return summary

    def report(self) -> None:
        """report.html as far as the run has come."""
        from reftune.report import write_report

        write_report([self.folder], self.folder / "report.html")


def load_splits(recipe: Recipe) -> Splits:
    """The recipe's problems. Raises: DataError."""
    splits: Splits = recipe.dataset.load(seed=derive_seed(recipe.seed, "data"))
    if not splits.train:
        dropped = ", ".join(f"{count} {reason}" for reason, count in splits.counts.items()) or "nothing was dropped"
        raise DataError(f"dataset: no training row is left ({dropped})")
    if not splits.dev:
        raise DataError("dataset: no dev problems, and models are chosen on dev; set dataset.dev_size or a dev file")
    return splits


def scratch_texts(format_: Format, splits: Splits) -> Iterator[str]:
    """The training texts, which give a from-scratch model its vocabulary."""
    for problem in splits.train:
        yield format_.prompt(problem)
        if problem.rationale is not None:
            yield format_.target(problem)


def check_stage_graph(recipe: Recipe) -> None:
    """A stage needs `base` or earlier methods only, nothing is made twice, and the reranker is one. Raises: RecipeError."""
    known, made = ["base"], {"base"}
    for name, stage in recipe.stages.items():
        for method in stage.needs:
            if method not in known:
                key = next(key for key in type(stage).model_fields if getattr(stage, key) == method)
                raise RecipeError(f"stages.{name}.{key}: {method} is no earlier method; known here: {', '.join(known)}")
        for method in (*stage.produces, name):
            if method in made:
                raise RecipeError(f"stages.{name}: method {method} is made twice")
            made.add(method)
        known += _methods_of(name, stage)
    for method in recipe.evaluate.stages or ():
        if method not in known[1:]:
            raise RecipeError(f"evaluate.stages: {method} is no method; known: {', '.join(known[1:])}")
    rerankers = [name for name, stage in recipe.stages.items() if not stage.is_method]
    rerank = recipe.evaluate.rerank
    if rerank is not None and rerank not in rerankers and not (Path(rerank) / WEIGHTS).is_file():
        raise RecipeError(
            f"evaluate.rerank: {rerank} is no reward model: not among this recipe's ({', '.join(rerankers) or 'it has none'}), "
            f"and no folder with a {WEIGHTS}"
        )


def _methods_of(name: str, stage: Stage) -> tuple[str, ...]:
    """What a stage leaves behind that answers problems."""
    return (*stage.produces, name) if stage.is_method else stage.produces


def _kinds(recipe: Recipe) -> str:
    return ", ".join(sorted({stage.kind for stage in recipe.stages.values()})) or "no stages"


def _claim(folder: Path, recipe: Recipe) -> None:
    """Write the recipe into a new folder, or check that the folder is this recipe's."""
    path, resolved = folder / "recipe.yaml", dump_recipe(recipe)
    if path.is_file():
        difference = _first_difference(yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(resolved))
        if difference is not None:
            raise RecipeError(f"{folder}: belongs to another recipe: {difference}; choose another run_dir")
        return
    if any(child.name != ".lock" for child in folder.iterdir()):
        raise CheckpointError(f"{folder}: is not empty and not a run folder (no recipe.yaml); choose another run_dir")
    write_atomically(path, resolved)
    write_atomically(folder / "env.json", json.dumps(environment(), indent=2))


def _first_difference(old: Any, new: Any, where: str = "") -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if where == "" and key == "run_dir":  # the folder may have been moved
                continue
            found = _first_difference(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))
            if found is not None:
                return found
        return None
    return None if old == new else f"{where} was {old!r}, now {new!r}"


def environment() -> dict[str, Any]:
    """Versions, machine and command, for the record."""
    return {
        **{name: _version(name) for name in ENVIRONMENT},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": " ".join(["reftune", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
