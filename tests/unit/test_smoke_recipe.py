"""An even smaller recipes/demo/smoke.yaml: every stage, every method, votes and reranking, and
their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reftune.recipe import Recipe, known_kinds, load_recipe
from reftune.runs.run import run_recipe
from reftune.stages.stage import Progress

SMOKE = Path(__file__).parents[2] / "recipes" / "demo" / "smoke.yaml"
STAGES = load_recipe(SMOKE).stages
RL = tuple(name for name, stage in STAGES.items() if stage.kind == "rl")
METHODS = ("warmup", "sft", "offline_st", *RL)

SMALLER = [
    "model.scratch.hidden_size=16",
    "model.scratch.layers=1",
    "dataset.train=24",
    "dataset.dev=4",
    "dataset.test=6",
    "stages.sft.epochs=6",
    "stages.sft.eval_every=3",
    "stages.sft.snapshots.warmup=3",
    "stages.offline_st.samples=3",
    "stages.offline_st.sft.epochs=1",
    *(
        f"stages.{method}.{key}"
        for method in RL
        for key in ("steps=1", "prompts=4", "eval_every=1")
    ),
    # so few samples may all earn the same reward
    "stages.reft_modern.algorithm.drop_constant_groups=false",
    "stages.reward_model.samples=3",
    "stages.reward_model.dev_samples=2",
    "evaluate.samples=3",
]


@pytest.fixture(scope="module")
def finished(build_once: Callable[..., Path]) -> tuple[Recipe, dict[str, Any]]:
    """The recipe and the summary of a whole run of it."""
    import torch

    torch.set_num_threads(1)

    def recipe_in(folder: Path) -> Recipe:
        return load_recipe(SMOKE, [*SMALLER, f"run_dir={folder / 'run'}"])

    def fill(folder: Path) -> None:
        summary = run_recipe(recipe_in(folder), progress=Progress())
        (folder / "returned.json").write_text(json.dumps(summary))

    folder = build_once("smoke", fill)
    return recipe_in(folder), json.loads((folder / "returned.json").read_text())


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_summary_holds_every_method_with_votes_and_reranking(finished):
    recipe, summary = finished
    assert tuple(summary["methods"]) == METHODS, "a reward model is no method"
    for method, scores in summary["methods"].items():
        assert {
            "accuracy",
            "ci95",
            "n",
            "maj@3",
            "rerank@3",
            "pass@3",
            "dev_accuracy",
            "looks",
        } <= set(scores), method
        assert scores["n"] == 6
        assert max(scores["maj@3"], scores["rerank@3"]) <= scores["pass@3"] <= 1
    assert {"a", "b", "difference", "ci95", "p_value", "n"} <= set(summary["comparisons"][0])
    assert json.loads((recipe.folder / "summary.json").read_text()) == summary


def test_the_run_folder_is_complete(finished):
    recipe, _ = finished
    assert {"recipe.yaml", "env.json", "metrics.jsonl", "summary.json", "report.html"} <= {
        p.name for p in recipe.folder.iterdir()
    }
    assert {"reftune", "python", "torch", "transformers", "command", "started"} <= set(
        json.loads((recipe.folder / "env.json").read_text())
    )
    for method in (*METHODS, "reward_model"):
        folder = recipe.folder / "stages" / method
        assert {"config.json", "model.safetensors", "tokenizer.json", "stage.json"} <= {
            p.name for p in folder.iterdir()
        }, method
        document = json.loads((folder / "stage.json").read_text())
        assert {
            "stage",
            "kind",
            "init",
            "chosen_step",
            "dev_accuracy",
            "dev_n",
            "looks",
            "wall_seconds",
        } <= set(document)
        assert {"sequence_passes", "train_tokens"} <= set(document), method


def test_a_stage_records_its_start_and_its_cost(finished):
    recipe, _ = finished
    documents = {
        method: json.loads((recipe.folder / "stages" / method / "stage.json").read_text())
        for method in METHODS
    }
    assert {m: d["init"] for m, d in documents.items()} == {
        **dict.fromkeys(("warmup", "sft", "offline_st"), "base"),
        **dict.fromkeys(RL, "warmup"),
    }
    assert all(documents[method]["sampled_tokens"] > 0 for method in ("offline_st", *RL))


def test_every_stage_logs_its_metrics(finished):
    recipe, _ = finished
    logged: dict[str, set[str]] = {}
    for row in rows(recipe.folder / "metrics.jsonl"):
        logged.setdefault(row["stage"], set()).update(row)
    common = {
        "step",
        "time",
        "loss/total",
        "grad/norm",
        "optim/lr",
        "compute/sequence_passes",
        "compute/train_tokens",
        "time/update_s",
        "progress/epoch",
        "dev/accuracy",
        "dev/n",
        "dev/looks",
    }
    sampled = {
        "reward/mean",
        "reward/correct",
        "verdict/correct",
        "verdict/forbidden",
        "response/length",
        "response/truncated",
        "policy/entropy",
        "groups/constant_reward",
        "compute/sampled_tokens",
        "time/generate_s",
        "time/grade_s",
        "time/score_s",
    }
    clipped = {"policy/loss", "policy/clip_fraction", "policy/approx_kl", "policy/ratio_max"}
    values = {"value/loss", "value/explained_variance", "value/mean"}
    expected: dict[str, set[str]] = {
        **dict.fromkeys(RL, sampled | clipped),
        "sft": {"loss/sft"},
        "offline_st": {"loss/sft", "compute/sampled_tokens"},
        # without a correct sample, online self-training has no sampled token to measure
        "online_st": (sampled - {"policy/entropy"} | {"policy/gold_nll", "policy/positive_nll"}),
        "reft": sampled | clipped | values | {"kl/reference"},
        # in so few steps, its returns are all equal
        "reft_modern": sampled | clipped | values - {"value/explained_variance"} | {"kl/reference"},
        "grpo": sampled | clipped | {"kl/reference", "kl/penalty"},
        "rloo": sampled | clipped | {"kl/reference"},
        "reward_model": {"reward_model/accuracy", "compute/sampled_tokens"},
    }
    assert set(logged) == set(expected)
    for stage, keys in expected.items():
        assert (keys | common) - logged[stage] == set(), stage


@pytest.mark.parametrize("method", METHODS)
def test_answers_and_samples_of_every_method_are_kept(finished, method):
    recipe, _ = finished
    answers = rows(recipe.folder / "eval" / f"{method}.jsonl")
    assert [row["id"] for row in answers] == [f"test-{i}" for i in range(6)]
    for row in answers:
        assert {"question", "gold", "prompt_tokens"} <= set(row)
        assert {"completion", "verdict", "value", "reason", "finish_reason", "tokens"} <= set(
            row["greedy"]
        )
        assert len(row["samples"]) == 3 and all(
            0 <= sample["score"] <= 1 for sample in row["samples"]
        )
    if method in RL:
        shown = rows(recipe.folder / "stages" / method / "samples.jsonl")
        assert {
            "step",
            "id",
            "question",
            "gold",
            "completion",
            "verdict",
            "value",
            "reward",
            "reason",
            "finish_reason",
            "program_s",
            "logprobs",
            "tokens",
        } <= set(shown[0])


def test_a_finished_run_is_not_done_again(finished):
    recipe, summary = finished
    before = {path: path.stat().st_mtime_ns for path in recipe.folder.rglob("*.safetensors")}
    assert run_recipe(recipe, progress=Progress()) == summary
    assert {
        path: path.stat().st_mtime_ns for path in recipe.folder.rglob("*.safetensors")
    } == before


def test_the_recipe_has_every_built_in_kind_of_stage_and_algorithm():
    assert {stage.kind for stage in STAGES.values()} == set(known_kinds("stages"))
    assert {STAGES[name].algorithm.kind for name in RL} == set(known_kinds("algorithms"))


def test_the_recipe_names_what_the_paper_compares():
    recipe = load_recipe(SMOKE)
    assert {"sft", "offline_st", "online_st", "reft", "reward_model"} <= set(recipe.stages)
    assert (
        recipe.stages["reft"].algorithm.kind == "ppo"
        and recipe.stages["reft"].value_init == "uniform"
    )
    assert recipe.evaluate.samples == 8 and recipe.evaluate.rerank == "reward_model"
