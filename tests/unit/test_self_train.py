"""Offline self-training: joining samples and gold solutions, resumed sampling, and the stage."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reftune.errors import DataError, RecipeError
from reftune.grading.formats import Format
from reftune.grading.formats.nl import Nl
from reftune.grading.formats.program import Program
from reftune.model.policy import Policy
from reftune.recipe import LengthTable, Recipe
from reftune.runs.models import check_stage_graph
from reftune.runs.run import open_run
from reftune.stages import self_train
from reftune.stages.rollouts import Collector
from reftune.stages.self_train import (
    Samples,
    SelfTrain,
    describe,
    distinct,
    join_as_paper,
    join_once,
    less_answer,
)
from reftune.stages.stage import Progress, StageContext
from reftune.types import Attempt, Graded, Problem, Verdict

# --- joining --------------------------------------------------------------------------------------


def test_the_authors_files_hold_the_gold_solution_mostly_twice():
    # E23: correct completions a, b, a, c and gold g
    assert join_as_paper(["a", "b", "a", "c"], ["g"], 2) == ["a", "b", "g", "g"]
    assert join_as_paper(["a", "b", "a", "c"], ["g"], 10) == ["a", "b", "c", "g", "g"]
    assert join_as_paper(["a", "b", "a", "c"], ["b"], 10) == ["a", "b", "c", "b"]
    assert join_as_paper([], ["g"], 10) == ["g", "g"]


def test_joined_once_every_solution_is_one_row():
    assert join_once(["a", "b", "a", "c"], ["g"], 2) == ["a", "b", "g"]
    assert join_once(["a", "b", "a", "c"], ["b"], 10) == ["a", "b", "c"]
    assert join_once([], ["g"], 10) == ["g"]
    assert join_once(["a", "a", "b"], ["g"], 2) == ["a", "b", "g"], (
        "a repeated sample takes nobody's place"
    )


def test_without_gold_the_samples_are_all_there_is():
    assert join_once(["a"], [], 10) == join_as_paper(["a"], [], 10) == ["a"]


def test_texts_that_differ_in_outer_white_space_are_one_and_keep_the_first_spelling():
    assert distinct(["  a\n", "b", "a", " b", "a b"]) == ["  a\n", "b", "a b"]


# --- sampling -------------------------------------------------------------------------------------

FINE_TUNING = {"epochs": 1, "batch_size": 8, "optimizer": {"learning_rate": 3e-3}}


@pytest.fixture
def make_stage_recipe(make_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """A run of one self-training stage whose sampler is the base model."""

    def make(**settings: Any) -> Recipe:
        stage = {
            "kind": "self_train",
            "sampler": "base",
            "samples": 3,
            "sft": FINE_TUNING,
            **settings,
        }
        return make_recipe(
            stages={"sft": None, "reft": None, "offline_st": stage},
            evaluate={"stages": None},
            lengths={"max_new": 24},
        )

    return make


@pytest.fixture
def context(
    make_stage_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> StageContext:
    """The stage's context, before its first step."""
    contexts: list[StageContext] = []
    recipe = make_stage_recipe()
    with monkeypatch.context() as patch, open_run(recipe, Progress()) as run:
        patch.setattr(SelfTrain, "run", lambda self, context: contexts.append(context))
        run.train("offline_st")
    return contexts[0]


def test_solutions_that_spell_one_answer_in_two_ways_are_one() -> None:
    half = "Half of one."
    texts = [f"{half}\nThe answer is 1/2", f"{half} The answer is 0.5.", "Two.\nThe answer is 1/2"]
    assert distinct(texts, less_answer) == [texts[0], texts[2]]
    opened = [f"The answer is 3 × {n}, then 5. The answer is {3 * n + 5}." for n in (4, 5)]
    assert distinct(opened, less_answer) == opened, "only the last marker states the answer"
    # a solution of only the answer is compared as a whole
    assert len(distinct(["The answer is 1/2", "The answer is 0.5"], less_answer)) == 2
    joined = join_once(texts[:2], texts[2:], 10, less_answer)
    assert joined == [texts[0], texts[2]]
    assert join_as_paper(texts[:2], texts[2:], 10, less_answer) == [*joined, texts[2]]


@pytest.mark.parametrize(
    "last_lines",
    [
        ("return {n}",),
        ("answer = {n} * 4; return answer",),
        ("return total  # the answer is {n}",),
        ("return 'The answer is {n}'",),
        ("# The answer is", "return {n}"),
    ],
    ids=str,
)
def test_only_solutions_in_words_are_compared_without_their_answer(
    last_lines: Sequence[str], context: StageContext
) -> None:
    stage, problem = context.recipe.stages["offline_st"], context.splits.train[0]
    assert isinstance(stage, SelfTrain)
    problem = replace(problem, rationale=None)
    texts = ["\n".join(["total = 1", *last_lines]).format(n=n) for n in (3, 4)]
    drawn = [samples(problem, *texts, *texts, right=4)]

    def num_rows(format: Format) -> int:
        encoder = replace(context.collector.encoder, format=format)
        collector = replace(context.collector, encoder=encoder, lengths=LengthTable(max_new=70))
        return len(stage.examples(drawn, replace(context, collector=collector)))

    assert num_rows(Program()) == 2
    assert num_rows(Nl()) == len(distinct(texts, less_answer))


def draw(context: StageContext, problems: Sequence[Problem], path: Path) -> list[Samples]:
    """Two samples of each problem by the base model."""
    stage = context.stage
    assert isinstance(stage, SelfTrain)
    return stage.draw(context, problems, path, num=2)


def test_sampling_that_was_stopped_goes_on_to_the_same_samples(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(self_train, "SAMPLES_AT_ONCE", 4)  # 2 problems
    path, problems = context.folder.drawn, context.splits.train[:3]
    drawn = draw(context, problems, path)
    whole = path.read_bytes()
    assert [samples.problem.id for samples in drawn] == [
        json.loads(line)["id"] for line in whole.splitlines()
    ]
    texts = {attempt.completion for samples in drawn for attempt in samples.attempts}
    assert len(texts) == 6, "samples differ"
    lines = whole.splitlines(keepends=True)
    for left in (lines[0], lines[0] + lines[1] + lines[2][:20]):
        path.write_bytes(left)
        assert draw(context, problems, path) == drawn
        assert path.read_bytes() == whole


def test_samples_that_are_all_there_need_no_sampler(context: StageContext):
    path, problems = context.folder.drawn, context.splits.train[:2]
    drawn = draw(context, problems, path)
    assert draw(replace(context, load=refuse), problems, path) == drawn


def test_the_sampler_is_freed_before_training(make_stage_recipe: Callable[..., Recipe]) -> None:
    progress, kept = Progress(), []
    with open_run(make_stage_recipe(), progress) as run:
        progress.stage = lambda *_: kept.append(len(run.models.kept))
        run.train("offline_st")
    assert kept == [0]


@pytest.mark.parametrize("model", [{}, {"lora": {"rank": 1}}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("kind", ["self_train", "reward_model"])
def test_a_sampler_is_the_only_model_while_it_draws(
    kind: str,
    model: dict[str, Any],
    make_recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables: dict[str, Any] = {
        "self_train": {"sft": FINE_TUNING},
        "reward_model": {**FINE_TUNING, "init": "base", "dev_samples": 2},
    }
    stage = {"kind": kind, "sampler": "sft", "samples": 2, **tables[kind]}
    alive, solve = [], Collector.solve

    def counting(*args: Any, **options: Any) -> Any:
        alive.append(num_policies())
        return solve(*args, **options)

    recipe = make_recipe(
        model=model, stages={"reft": None, "drawn": stage}, lengths={"max_new": 24}
    )
    with open_run(recipe, Progress()) as run:
        run.train("sft")
        run.models.release()
        others = num_policies()
        monkeypatch.setattr(Collector, "solve", counting)
        run.train("drawn")
    assert len(alive) >= 2 and set(alive) == {others + 1}


def num_policies() -> int:
    return sum(type(thing) is Policy for thing in gc.get_objects())


def refuse(method: str) -> Any:
    raise AssertionError(f"{method} was loaded")


def test_two_files_of_a_stage_hold_different_samples(context: StageContext):
    problems = context.splits.train[:2]
    one, other = (
        draw(context, problems, context.folder.path / name) for name in ("one.jsonl", "other.jsonl")
    )
    assert one != other


def samples(problem: Problem, *texts: str, right: int) -> Samples:
    verdicts = [Verdict.CORRECT] * right + [Verdict.WRONG] * (len(texts) - right)
    attempts = [
        Attempt(completion=text, graded=Graded(verdict=verdict, value="1", reason=""))
        for text, verdict in zip(texts, verdicts, strict=True)
    ]
    return Samples(problem=problem, attempts=attempts, num_tokens=9)


def test_the_samples_are_summed_up_in_one_line(context: StageContext):
    first, second = context.splits.train[:2]
    drawn = [samples(first, "a", "b", "c", right=1), samples(second, "d", right=0)]
    assert describe(drawn) == "25% of 4 samples are correct; 1 of 2 problems have no correct sample"


# --- the stage ------------------------------------------------------------------------------------


def test_rows_are_prompt_and_solution_with_an_eos(context: StageContext):
    problem, encoder = context.splits.train[0], context.collector.encoder
    stage = context.recipe.stages["offline_st"]
    rows = stage.examples([samples(problem, "return 1", "wrong", right=1)], context)
    assert [row.prompt for row in rows] == [encoder.prompt(problem)] * 2
    assert [row.target for row in rows] == [
        [*encoder.encode("return 1"), encoder.tokenizer.eos_token_id],
        encoder.target(problem),
    ]


def test_rows_over_the_limits_are_left_out_and_no_row_at_all_is_an_error(context: StageContext):
    problem = replace(context.splits.train[0], rationale=None)
    stage, long = context.recipe.stages["offline_st"], " ".join(["return 1"] * 24)
    assert len(stage.examples([samples(problem, "return 1", long, right=2)], context)) == 1
    first = stage.model_copy(update={"keep": 1})
    (row,) = first.examples([samples(problem, long, "return 1", right=2)], context)
    assert row.target[:-1] == context.collector.encoder.encode("return 1"), "the first that fits"
    with pytest.raises(
        DataError,
        match=(
            r"^stages\.offline_st: nothing to train on: 100% of 1 samples are correct; 0 of 1"
            r" problems"
        ),
    ):
        stage.examples([samples(problem, long, right=1)], context)


def test_the_stage_leaves_a_model_and_what_it_cost(make_stage_recipe: Callable[..., Recipe]):
    recipe = make_stage_recipe(keep=1, gold="paper")
    with open_run(recipe, Progress()) as run:
        run.train("offline_st")
        run.models.load("offline_st")
        assert recipe.methods_to_evaluate == ["offline_st"]
    folder = recipe.folder / "stages" / "offline_st"
    rows = [json.loads(line) for line in (folder / "sampled.jsonl").read_text().splitlines()]
    document = json.loads((folder / "stage.json").read_text())
    assert [len(row["samples"]) for row in rows] == [3] * len(run.splits.train)
    assert (document["kind"], document["init"]) == ("self_train", "base")
    assert document["sampled_tokens"] == sum(row["tokens"] for row in rows)
    solved = sum(any(sample["verdict"] == "correct" for sample in row["samples"]) for row in rows)
    # each problem has its gold twice, and one correct sample where there is one that fits
    assert 2 * len(rows) <= document["sequence_passes"] <= 2 * len(rows) + solved


# --- refusals -------------------------------------------------------------------------------------


def test_a_sampler_trained_later_is_rejected(make_stage_recipe: Callable[..., Recipe]):
    with pytest.raises(
        RecipeError,
        match=r"^stages\.offline_st\.sampler: warmup is not an earlier method; known here: base$",
    ):
        check_stage_graph(make_stage_recipe(sampler="warmup"))
    with pytest.raises(RecipeError, match=r"^stages\.offline_st\.init: reft is not an earlier"):
        check_stage_graph(make_stage_recipe(init="reft"))


def test_a_wrong_key_in_the_fine_tuning_is_named(make_stage_recipe: Callable[..., Recipe]):
    with pytest.raises(
        RecipeError, match=r"stages\.offline_st.*sft\.epoch: unknown key; did you mean epochs\?"
    ):
        make_stage_recipe(sft={**FINE_TUNING, "epoch": 3})
