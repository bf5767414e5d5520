"""A run trains its stages in order, evaluates the models that they save (the methods), and writes a
summary and a report. It can be resumed at any point."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reftune.datasets import Splits, load_dataset
from reftune.errors import DataError, RecipeError
from reftune.grading.formats import Format
from reftune.model.adapters import require_continuable, with_adapters
from reftune.model.encoder import Encoder, stop_texts
from reftune.model.policy import Policy
from reftune.model.weights import is_adapter_folder, load_model, load_pretrained, saved_dtype
from reftune.processes import launch, sharding, world
from reftune.recipe import Recipe
from reftune.runs.auto import choose_device, settled
from reftune.runs.evaluation import accuracy, evaluate
from reftune.seeds import derive_seed
from reftune.stages.probes.choices import diagnose, write_rows
from reftune.stages.reward_model import (
    WEIGHTS,
    Classifier,
    add_scores,
    is_scored,
    load_classifier,
    require_same_tokenizer,
)
from reftune.stages.rollouts import Collector
from reftune.stages.sft import gold_examples
from reftune.stages.stage import Progress, Stage, StageContext
from reftune.storage.files import JsonLines, write_atomically
from reftune.storage.run_folder import (
    RunFolder,
    StageFolder,
    claimed,
    readable_errors,
    refuse_foreign,
)
from reftune.types import Attempt, Conversation, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run_recipe(recipe: Recipe, *, progress: Progress) -> dict[str, Any]:
    """Run all stages and evaluations, and write summary.json and report.html. Finished parts are
    not repeated.

    Returns: the summary. Raises: ReftuneError if the run cannot start or continue; Interrupted if
    a signal stops the training.
    """
    with open_run(recipe, progress) as run:
        run.complete(report=True)
        return run.summarize()


def run_stages(
    recipe: Recipe, *, kinds: Collection[str], progress: Progress
) -> dict[str, dict[str, Any]]:
    """Run only the stages of these kinds. Any other methods that these stages read must be trained
    already. Returns: stage name → content of its `stage.json`. Raises: the errors of
    `run_recipe`."""
    stages = recipe.stages
    names = [name for name, stage in stages.items() if stage.kind in kinds]
    if not names:
        wanted, found = sorted(kinds), sorted({stage.kind for stage in stages.values()})
        raise RecipeError(
            f"{recipe.name}: no stage of kind {' or '.join(wanted)}; it has {', '.join(found)}"
        )
    made = {"base", *names, *(method for name in names for method in stages[name].produces)}
    needed = [method for name in names for method in stages[name].needs if method not in made]
    _require_trained(recipe, needed)
    with open_run(recipe, progress) as run:
        for name in names:
            run.train(name)
        return world.from_main(lambda: {name: run.folder.stage(name).facts() for name in names})


def evaluate_methods(
    recipe: Recipe, methods: Collection[str], *, progress: Progress
) -> dict[str, Any]:
    """Evaluate `methods` or, if none are given, all that the recipe evaluates. Returns: the
    summary. Raises: RecipeError if a method is not trained yet, and the errors of `run_recipe`."""
    check_stage_graph(recipe)
    methods = methods or methods_to_evaluate(recipe)
    _require_trained(recipe, methods)
    with open_run(recipe, progress) as run:
        for method in methods:
            run.evaluate(method)
        run.score_samples()
        return run.summarize()


@contextmanager
def open_run(recipe: Recipe, progress: Progress) -> Iterator[Run]:
    """Open or create a recipe's run folder, and lock it against other runs. Raises: CheckpointError
    if the folder cannot be written, is in use or is not a run folder; RecipeError if it belongs to
    another recipe, or if the stage graph is wrong; DataError or ModelError if the data or the model
    cannot be used."""
    folder = RunFolder(recipe.folder)
    check_stage_graph(recipe)
    recipe = settled(recipe)
    with readable_errors(folder):
        is_new = world.from_main(lambda: refuse_foreign(folder, recipe))
    run = Run(recipe=recipe, splits=load_splits(recipe), folder=folder, progress=progress)
    run.check_reranker()
    if is_new:
        run.verify_inputs()
    with ExitStack() as stack:
        stack.enter_context(threads_of(recipe))
        if world.is_main():
            stack.enter_context(claimed(folder, recipe, run.splits))
        world.shared_folder(folder.path)
        if world.world_size() > 1:
            progress.note(launch.describe())
        yield run


def unclaimed(recipe: Recipe, splits: Splits | None = None) -> Run:
    """A run for reading only: its folder is not locked, and nothing is reported."""
    return Run(
        recipe=recipe,
        splits=load_splits(recipe) if splits is None else splits,
        folder=RunFolder(recipe.folder),
        progress=Progress(),
    )


@contextmanager
def threads_of(recipe: Recipe) -> Iterator[None]:
    """Inside the block, use the recipe's number of CPU threads; afterwards, the previous number."""
    before = torch.get_num_threads()
    # setting the same number again makes decoding a quarter slower
    if recipe.threads in (None, before):
        yield
        return
    torch.set_num_threads(recipe.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A recipe, its problems and its run folder."""

    recipe: Recipe
    splits: Splits
    folder: RunFolder
    progress: Progress
    loaded: dict[tuple[str, bool], Policy] = field(default_factory=dict)
    """The policy that was loaded last, unless training has changed it. Its key is a pair: the
    method, and whether the policy was built for training with adapters or gradient
    checkpointing."""

    def is_trained(self, name: str) -> bool:
        """Whether stage `name` has saved all its models."""
        methods = (name, *self.recipe.stages[name].produces)
        return world.from_main(lambda: all(self.folder.stage(m).is_done for m in methods))

    def complete(self, *, report: bool = False) -> None:
        """Run every unfinished stage and evaluation. With `report`, also write a report after each
        stage."""
        names = list(self.recipe.stages)
        for name, following in zip(names, [*names[1:], None], strict=True):
            if not self.is_trained(name):
                self.train(name)
                if report:
                    self.report()
            init = None if following is None else self.recipe.stages[following].init
            own = _methods_of(name, self.recipe.stages[name])
            left = [method for method in methods_to_evaluate(self.recipe) if method in own]
            # the model from which the next stage starts comes last, so that it stays loaded
            for method in sorted(left, key=lambda method: method == init):
                self.evaluate(method)
        self.score_samples()

    def verify_inputs(self) -> None:
        """Load the model and encode the problems, to find unusable inputs before the run starts.

        Raises: ModelError or RecipeError if the model cannot be used; DataError if a prompt is too
        long and the recipe does not drop such prompts, or if no training row or no problem to
        evaluate is left.
        """
        policy = self.load_policy("base", trained=True)
        collector, stages = self.collector(policy), self.recipe.stages.values()
        train = collector.trainable(self.splits, policy).train
        if not train:
            raise DataError("dataset: every training prompt is too long; raise lengths.max_prompt")
        asked = [*self.splits.dev, *self.problems_to_evaluate()]
        if any(stage.reads_questions for stage in stages):
            asked += train
        collector.prompts(asked, policy)
        if any(stage.reads_rationales for stage in stages):
            gold_examples(train, collector, policy)

    def train(self, name: str) -> None:
        """Run stage `name` unless it is done. Raises: RecipeError if its `init` is not trained
        yet."""
        if self.is_trained(name):
            return
        stage = self.recipe.stages[name]
        policy = self.load_policy(stage.init, trained=True)
        self.loaded.clear()  # training changes the policy
        collector = self.collector(policy)
        splits = collector.trainable(self.splits, policy)
        if len(splits.train) < len(self.splits.train):
            dropped = len(self.splits.train) - len(splits.train)
            self.progress.note(f"{name}: {dropped} training prompts are too long and were left out")
        context = StageContext(
            name=name,
            stage=stage,
            recipe=self.recipe,
            policy=policy,
            splits=splits,
            collector=collector,
            folder=self.folder.stage(name),
            metrics=JsonLines(self.folder.metrics),
            progress=self.progress,
            load=self.load_policy,
        )
        stage.run(context)
        world.wait(f"the end of {name}")

    def load_policy(self, method: str, *, trained: bool = False) -> Policy:
        """Load the base model or a finished method's model. With `trained`, the policy may be
        trained, and has adapters if the recipe sets `lora`; without `trained`, the policy must not
        be changed. With a 4-bit base, training continues with the adapters of `method`; with any
        other base, the adapters are new."""
        table = self.recipe.model
        is_other = table.lora is not None or table.gradient_checkpointing
        key = (method, trained and is_other)
        if key not in self.loaded:
            self.loaded.clear()  # frees memory for the next policy
            # a policy that was only read can be trained later, if both kinds are built alike
            self.loaded[key] = self._load_policy(method, trained=trained or not is_other)
        return self.loaded[key]

    def _load_policy(self, method: str, *, trained: bool) -> Policy:
        table = self.recipe.model
        if method != "base":
            _require_trained(self.recipe, [method])
        torch.manual_seed(derive_seed(self.recipe.seed, "adapters"))
        folder = stage_folder(self.recipe, method).path
        continues = trained and table.quantize is not None
        loaded = self._load(
            "base" if continues else method, as_stored=not trained or table.lora is not None
        )
        policy = self._policy(*loaded, trained=trained)
        if continues and method != "base":
            if is_adapter_folder(folder):
                require_continuable(folder, table)
            policy.load_adapters(folder)
        policy.load_value_head(folder)
        policy.verify_head()
        if trained and table.gradient_checkpointing:
            policy.recompute_blocks()
        if table.compile:
            policy.compile_blocks()
        return policy

    def _load(
        self, method: str, *, as_stored: bool
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        table = self.recipe.model
        if method == "base":
            is_scratch = table.scratch is not None
            texts = scratch_texts(self.recipe.format, self.splits) if is_scratch else ()
            seed = derive_seed(self.recipe.seed, "base")
            return load_model(table, texts=texts, seed=seed, as_stored=as_stored)
        folder, trust = stage_folder(self.recipe, method).path, table.trust_remote_code
        if is_adapter_folder(folder):
            model, tokenizer = self._load("base", as_stored=as_stored)
            return with_adapters(model, folder, base=table.path), tokenizer
        return load_pretrained(folder, trust_remote_code=trust, as_stored=as_stored)

    def _policy(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, trained: bool = False
    ) -> Policy:
        """A policy in the recipe's dtype and on its device. Raises: RecipeError for a setting that
        this machine or FSDP2 does not support; ModelError if the recipe's settings do not suit the
        model."""
        table = self.recipe.model
        if trained and table.quantize is not None and sharding.current.splits:
            raise RecipeError("model.quantize: FSDP2 cannot split weights in 4 bits; expected DDP")
        policy = Policy(
            model,
            tokenizer,
            dtype=getattr(torch, table.dtype),
            lora=table.lora if trained else None,
            quantize=table.quantize if trained else None,
            trained=trained,
            stop=stop_texts(self.recipe.format),
        )
        policy.saved_dtype, policy.max_tokens = saved_dtype(table), table.max_tokens
        return policy.to(choose_device(table.device))

    def collector(self, policy: Policy) -> Collector:
        return Collector(
            engine=self.recipe.engine,
            encoder=Encoder(policy.tokenizer, self.recipe.format),
            reward=self.recipe.reward,
            lengths=self.recipe.lengths,
        )

    def problems_to_evaluate(self) -> Sequence[Problem]:
        """The problems of `evaluate.split`, or only the first `evaluate.limit` if that is set.
        Raises: DataError if there are none."""
        table = self.recipe.evaluate
        problems: Sequence[Problem] = getattr(self.splits, table.split)[: table.limit]
        if not problems:
            raise DataError(
                f"evaluate.split: the dataset has no {table.split} problems; expected some, or"
                " evaluate.split=dev"
            )
        return problems

    def evaluate(self, method: str) -> None:
        """Let a method's model answer `problems_to_evaluate`, unless it already has. On multiple
        choice, also check for warning signs of reward hacking."""
        problems, path = self.problems_to_evaluate(), self.folder.evaluation(method)
        rows = world.from_main(JsonLines(path).rows)
        if len(rows) < len(problems):
            policy = self.load_policy(method)
            rows = evaluate(
                policy, problems, self.collector(policy), self.recipe, method=method, path=path
            )
            split = self.recipe.evaluate.split
            self.progress.note(
                f"{method}: {accuracy(rows):.1%} of {len(rows)} {split} problems right"
            )
        if all(problem.is_multiple_choice for problem in problems):
            self.probe_choices(method, problems, [Attempt.from_row(row["greedy"]) for row in rows])

    def probe_choices(
        self, method: str, problems: Sequence[Problem], answers: Sequence[Attempt]
    ) -> None:
        """Check a method's greedy answers for reward hacking, unless this is already done; see
        `stages.probes.choices`."""
        path = self.folder.choices(method)
        if len(world.from_main(JsonLines(path).rows)) == len(problems):
            return
        policy = self.load_policy(method)
        found = diagnose(
            policy,
            self.collector(policy),
            problems,
            [answer.completion for answer in answers],
            [answer.graded for answer in answers],
        )
        write_rows(path, found)

    def score_samples(self) -> None:
        """If the recipe reranks, score the samples of all evaluations with the reward model."""
        name = self.recipe.evaluate.rerank
        if name is None:
            return
        paths = [self.folder.evaluation(m) for m in methods_to_evaluate(self.recipe)]
        unscored = [path for path in paths if not is_scored(world.from_main(JsonLines(path).rows))]
        if not unscored:
            return
        classifier, problems = self.load_reranker(name), self.problems_to_evaluate()
        for path in unscored:
            add_scores(path, problems, classifier)

    def load_reranker(self, name: str) -> Classifier:
        """The reward model of stage `name` or, if there is no such stage, in the folder `name`."""
        if name in self.recipe.stages:
            policy, folder = self.load_policy(name), self.folder.stage(name).path
        else:
            trust = self.recipe.model.trust_remote_code
            policy = self._policy(*load_pretrained(name, trust_remote_code=trust))
            folder = Path(name)
        return load_classifier(policy, Encoder(policy.tokenizer, self.recipe.format), folder)

    def check_reranker(self) -> None:
        """Raises: ModelError if a reranker from another run does not have the base model's
        tokenizer."""
        name = self.recipe.evaluate.rerank
        if name is not None and name not in self.recipe.stages:
            require_same_tokenizer(
                self.load_reranker(name), self.load_policy("base"), where=f"evaluate.rerank: {name}"
            )

    def summarize(self) -> dict[str, Any]:
        """Write summary.json and report.html from the run's files, and return the summary."""
        from reftune.results import summarize

        summary = world.from_main(lambda: summarize(self.folder.path))
        write_atomically(self.folder.summary, json.dumps(summary, indent=2))
        self.report()
        return summary

    def report(self) -> None:
        """Write report.html for the run so far."""
        from reftune.results import write_report

        if world.is_main():
            write_report([self.folder.path], self.folder.report)


def load_splits(recipe: Recipe) -> Splits:
    """The recipe's problems. Raises: DataError if there is no training row or no dev problem."""
    splits = load_dataset(recipe.dataset, seed=derive_seed(recipe.seed, "data"))
    if not splits.train:
        dropped = (
            ", ".join(f"{count} {reason}" for reason, count in splits.counts.items())
            or "nothing was dropped"
        )
        raise DataError(f"dataset: no training row is left ({dropped})")
    if not splits.dev:
        raise DataError(
            "dataset: no dev problems, and models are chosen on dev; set dataset.dev_size or a dev"
            " file"
        )
    return splits


def scratch_texts(format_: Format, splits: Splits) -> Iterator[str]:
    """Training prompts and gold solutions, from which a from-scratch model takes its vocabulary."""
    for problem in splits.train:
        prompt = format_.prompt(problem)
        yield from (
            (turn.content for turn in prompt.turns)
            if isinstance(prompt, Conversation)
            else (prompt,)
        )
        if problem.rationale is not None:
            yield format_.target(problem)


def is_model_folder(method: str) -> bool:
    """Whether `method` is the path of a folder that contains a model or adapters."""
    return (Path(method) / "config.json").is_file() or is_adapter_folder(Path(method))


def stage_folder(recipe: Recipe, method: str) -> StageFolder:
    """The folder of a method of this recipe; for any other `method`, the folder at that path."""
    stages = recipe.stages.items()
    own = {"base", *(made for name, stage in stages for made in (*stage.produces, name))}
    return RunFolder(recipe.folder).stage(method) if method in own else StageFolder(Path(method))


def check_stage_graph(recipe: Recipe) -> None:
    """Check that stages read only `base`, earlier methods or model folders, that no two stages save
    the same method, and that `evaluate` names methods and a reward model that exist. Raises:
    RecipeError if a check fails."""
    known, made = ["base"], {"base"}
    for name, stage in recipe.stages.items():
        for method in stage.needs:
            if method not in known and not is_model_folder(method):
                key = next(key for key in type(stage).model_fields if getattr(stage, key) == method)
                raise RecipeError(
                    f"stages.{name}.{key}: {method} is not an earlier method; known here:"
                    f" {', '.join(known)}"
                )
        for method in (*stage.produces, name):
            if method in made:
                raise RecipeError(f"stages.{name}: two stages save the method {method}")
            made.add(method)
        known += _methods_of(name, stage)
    for key in ("stages", "sampled"):
        for method in getattr(recipe.evaluate, key) or ():
            if method not in known[1:]:
                raise RecipeError(
                    f"evaluate.{key}: {method} is not a method; known: {', '.join(known[1:])}"
                )
    rerankers = [name for name, stage in recipe.stages.items() if not stage.is_method]
    rerank = recipe.evaluate.rerank
    if rerank is not None and rerank not in rerankers and not (Path(rerank) / WEIGHTS).is_file():
        raise RecipeError(
            f"evaluate.rerank: {rerank} is not a reward model: neither one of this recipe's"
            f" ({', '.join(rerankers) or 'it has none'}) nor a folder with a {WEIGHTS}"
        )


def methods_to_evaluate(recipe: Recipe) -> list[str]:
    """The names of the methods to evaluate, in training order. A stage's snapshots come before the
    model that the stage chose on dev."""
    methods = [
        method for name, stage in recipe.stages.items() for method in _methods_of(name, stage)
    ]
    wanted = recipe.evaluate.stages
    return [method for method in methods if wanted is None or method in wanted]


def _methods_of(name: str, stage: Stage) -> tuple[str, ...]:
    """The names of the methods that a stage saves: those of its snapshots and, unless the stage is
    a reward model, the stage's own name."""
    return (*stage.produces, name) if stage.is_method else stage.produces


def _require_trained(recipe: Recipe, methods: Collection[str]) -> None:
    for method in methods:
        folder = RunFolder(recipe.folder).stage(method)
        if not (folder.is_done or is_model_folder(method)):
            raise RecipeError(
                f"{folder.path}: method {method} is not trained yet; `reftune run` trains it"
            )
