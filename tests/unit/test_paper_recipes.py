"""recipes/paper has the settings of the authors' code; each recipe passes the offline check, and
every stage runs two steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reftune.advice.check import check_offline
from reftune.datasets import load_splits
from reftune.model.weights import scratch_texts
from reftune.recipe import Recipe, load_recipe
from reftune.runs.run import run_recipe
from reftune.stages.stage import Progress

PAPER = Path(__file__).parents[2] / "recipes" / "paper"
NAMES = sorted(path.stem for path in PAPER.glob("*.yaml") if path.stem != "published")
LARGE, SMALL = (
    ("galactica-6.7b", "codellama-7b"),
    ("galactica-125m", "codeparrot-small", "codegen-350m"),
)
TASKS = ("gsm8k", "svamp", "mathqa-mcq", "mathqa-numeric")
ABLATIONS = {
    "ablation-no-partial-reward",
    "ablation-no-kl",
    "ablation-separate-value-model",
    "ablation-warmup-length",
}
FAMILY = {
    "galactica": "opt",
    "codellama": "llama",
    "codeparrot": "gpt2",
    "codegen": "codegen",
    "ablation": "llama",
}
CONTEXT = {
    "opt": "max_position_embeddings",
    "llama": "max_position_embeddings",
    "gpt2": "n_positions",
    "codegen": "n_positions",
}


def load(name: str, *overrides: str) -> Recipe:
    return load_recipe(PAPER / f"{name}.yaml", overrides)


def test_there_is_a_recipe_for_every_model_and_task_of_the_paper_and_for_every_ablation():
    large = {
        f"{model}-{task}-{kind}" for model in LARGE for task in TASKS for kind in ("nl", "program")
    }
    small = {f"{model}-{task}-program" for model in SMALL for task in TASKS[:3]}
    assert set(NAMES) == large | small | ABLATIONS
    for name in large | small:
        assert list(load(name).stages) == [
            "sft",
            "offline_st",
            "online_st",
            "reft",
            "reward_model",
        ], name


# task, rationale → rollouts, warm-up epochs, KL coefficient of the 7B models: scripts of the
# authors' code
PER_TASK = [
    ("gsm8k", "nl", 300 * 234, 2, 0.05),
    ("gsm8k", "program", 300 * 230, 2, 0.01),
    ("svamp", "nl", 300 * 97, 2, 0.05),
    ("svamp", "program", 300 * 96, 2, 0.01),
    ("mathqa-mcq", "nl", 300 * 465, 5, 0.05),
    ("mathqa-mcq", "program", 300 * 477, 2, 0.01),
    ("mathqa-numeric", "nl", 300 * 280, 10, 0.01),
]


@pytest.mark.parametrize("model", LARGE)
@pytest.mark.parametrize(("task", "kind", "rollouts", "warmup", "kl_coef"), PER_TASK)
def test_the_large_models_have_the_authors_settings(model, task, kind, rollouts, warmup, kl_coef):
    recipe = load(f"{model}-{task}-{kind}")
    sft, offline, online, reft, reranker = recipe.stages.values()
    assert (sft.epochs, sft.batch_size, sft.snapshots) == (40, 48, {"warmup": warmup})
    assert (sft.optimizer.learning_rate, sft.optimizer.schedule, sft.optimizer.warmup) == (
        1e-5,
        "linear",
        0.1,
    )
    assert (offline.init, offline.samples, offline.keep, offline.top_k, offline.gold) == (
        "base",
        100,
        10,
        50,
        "paper",
    )
    assert (offline.sft.epochs, offline.sft.batch_size, offline.sft.optimizer) == (
        20,
        48,
        sft.optimizer,
    )
    assert (online.steps, online.prompts, online.optimizer.learning_rate) == (rollouts, 32, 3e-7)
    assert (online.algorithm.gold_max_tokens, online.algorithm.dropout) == (300, True)
    assert (reft.steps, reft.prompts, reft.samples, reft.updates) == (rollouts, 32, 1, 2)
    assert (reft.optimizer.learning_rate, reft.optimizer.schedule) == (3e-7, "constant")
    assert (reft.value_init, reft.value_prefit, reft.value_model) == ("uniform", 0, "shared")
    ppo = reft.algorithm
    assert (ppo.kl_coef, ppo.gamma, ppo.lam, ppo.value_coef) == (kl_coef, 1.0, 0.95, 5.0)
    assert (ppo.clip_low, ppo.clip_high, ppo.value_clip, ppo.reduction) == (
        0.2,
        0.2,
        0.2,
        "sequence",
    )
    assert (reranker.epochs, reranker.batch_size, reranker.samples, reranker.top_k) == (
        3,
        24,
        100,
        50,
    )
    assert reranker.optimizer.learning_rate == 1e-6
    assert (recipe.format.style, recipe.format.grading, recipe.reward.partial) == (
        "paper",
        "paper",
        0.1,
    )
    assert (recipe.evaluate.samples, recipe.evaluate.top_k) == (100, 50)


@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize(
    ("task", "rollouts", "epochs", "warmup"),
    [("gsm8k", 29, 40, 10), ("svamp", 12, 40, 10), ("mathqa-mcq", 60, 100, 40)],
)
def test_the_small_models_have_the_authors_settings(model, task, rollouts, epochs, warmup):
    sft, _, _, reft, _ = load(f"{model}-{task}-program").stages.values()
    assert (sft.epochs, sft.snapshots, sft.optimizer.learning_rate) == (
        epochs,
        {"warmup": warmup},
        2e-5,
    )
    assert (reft.steps, reft.prompts, reft.optimizer.learning_rate) == (700 * rollouts, 256, 3e-6)
    assert (reft.algorithm.kl_coef, reft.algorithm.value_coef) == (0.01, 5.0)


@pytest.mark.parametrize("name", NAMES)
def test_only_large_models_are_saved_once_an_hour(name):
    tables = [getattr(stage, "sft", stage) for stage in load(name).stages.values()]
    expected = 300 if name.startswith(SMALL) else 3600
    assert {table.save_every_s for table in tables} == {expected}


def test_an_ablation_changes_only_the_setting_in_its_name():
    plain = load("codellama-7b-gsm8k-program").stages
    partial, no_kl = load("ablation-no-partial-reward"), load("ablation-no-kl")
    separate, warmups = load("ablation-separate-value-model"), load("ablation-warmup-length")
    assert partial.reward.partial == 0 and partial.stages["reft"] == plain["reft"]
    assert no_kl.stages["reft"].algorithm == plain["reft"].algorithm.model_copy(
        update={"kl_coef": 0}
    )
    assert separate.stages["reft"] == plain["reft"].model_copy(update={"value_model": "separate"})
    for name, stage in list(warmups.stages.items())[1:]:
        assert stage == plain["reft"].model_copy(update={"init": stage.init}), name
    epochs = warmups.stages["sft"].snapshots
    assert sorted(epochs[stage.init] for stage in list(warmups.stages.values())[1:]) == [
        1,
        2,
        3,
        5,
        10,
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_passes_the_offline_check(name):
    report = check_offline(load(name))
    assert not report.failed, report.to_text()
    assert {"data", "schedule", "gold_answers", "gold_rationales", "reward"} <= {
        finding.name for finding in report.findings
    }


# --- two steps of every stage ---------------------------------------------------------------------


def family(name: str) -> str:
    return FAMILY[name.partition("-")[0]]


def stage_set(name: str) -> tuple[Any, ...]:
    """The settings that determine the code that a recipe runs."""
    stages = load(name).stages.values()
    return tuple(
        (s.kind, getattr(getattr(s, "algorithm", None), "kind", ""), getattr(s, "value_model", ""))
        for s in stages
    )


def distinct_runs() -> list[str]:
    """One recipe for each pair of family and stages, with different tasks for the families."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in NAMES:
        groups.setdefault((family(name), stage_set(name)), []).append(name)
    return [names[number % len(names)] for number, names in enumerate(groups.values())]


def shortened(name: str, folder: Path, model: Path) -> Recipe:
    kind = load(name).dataset.kind
    overrides = [
        f"run_dir={folder / 'run'}",
        f"model.path={model}",
        "model.dtype=float32",
        "lengths.max_new=90",
    ]
    overrides += [
        f"dataset.train={PAPER / 'examples' / kind}",
        "dataset.dev_size=2",
        "evaluate.limit=1",
    ]
    for stage, table in load(name).stages.items():
        key = f"stages.{stage}"
        if table.kind == "rl":
            overrides += [f"{key}.steps=2", f"{key}.prompts=2", f"{key}.eval_every=2"]
        elif table.kind == "self_train":
            overrides += [f"{key}.samples=2", f"{key}.sft.epochs=1", f"{key}.sft.batch_size=8"]
        elif table.kind == "reward_model":
            overrides += [
                f"{key}.samples=2",
                f"{key}.dev_samples=2",
                f"{key}.epochs=1",
                f"{key}.batch_size=8",
            ]
        else:
            snapshots = ", ".join(f"{method}: 1" for method in table.snapshots)
            overrides += [
                f"{key}.epochs=1",
                f"{key}.batch_size=4",
                f"{key}.snapshots={{{snapshots}}}",
            ]
    if load(name).evaluate.samples:
        overrides.append("evaluate.samples=2")
    return load(name, *overrides)


def save_model(name: str, folder: Path, make_model: Callable[..., Any]) -> Path:
    """A model of the recipe's family, two layers deep, with random weights and the words of the
    examples."""
    from reftune.model.weights import word_tokenizer

    recipe = load(
        name, f"dataset.train={PAPER / 'examples' / load(name).dataset.kind}", "dataset.dev_size=2"
    )
    tokenizer = word_tokenizer(scratch_texts(recipe.format, load_splits(recipe)))
    model = make_model(family(name), vocab_size=len(tokenizer), **{CONTEXT[family(name)]: 384})
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


LONG = ("ablation-warmup-length", "galactica-6.7b-mathqa-mcq-program")


def slow_if_long(name: str) -> Any:
    """Mark long runs as slow, and small models: the parity tests train their families, and their
    stages are those of the large ones."""
    is_slow = family(name) in ("codegen", "gpt2") or name in LONG
    return pytest.param(name, marks=pytest.mark.slow) if is_slow else name


@pytest.mark.parametrize("name", [slow_if_long(name) for name in distinct_runs()])
def test_two_steps_of_every_stage_run_on_a_random_model_of_the_family(name, tmp_path, make_model):
    recipe = shortened(name, tmp_path, save_model(name, tmp_path, make_model))
    summary = run_recipe(recipe, progress=Progress())
    for stage in recipe.stages:
        assert (
            json.loads((recipe.folder / "stages" / stage / "stage.json").read_text())["steps"] >= 2
        ), stage
    methods = [name for name, stage in recipe.stages.items() if stage.is_method]
    assert set(methods) < set(summary["methods"])
    if recipe.evaluate.rerank is not None:
        assert all(
            {"maj@2", "rerank@2", "pass@2"} <= set(scores) for scores in summary["methods"].values()
        )
