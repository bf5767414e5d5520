"""benchmarks/reproduce.py: the page is a function of the tables, and states whether each finding
holds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from reftune.recipe import load_recipe
from reftune.runs.models import check_stage_graph

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "recipes" / "demo"
SAMPLED = {"comparison": 11_776, "comparison-nl": 5_632, "modern": 11_264, "tuned": 11_264}
"""Recipe → solutions that every RL stage samples, including those that fit the value head."""


@pytest.fixture(scope="module")
def reproduce() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproduce", ROOT / "benchmarks" / "reproduce.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compared(a: str, b: str, difference: float, low: float, high: float) -> dict[str, Any]:
    return {
        "a": a,
        "b": b,
        "difference": difference,
        "ci95": [low, high],
        "significant": low > 0 or high < 0,
    }


def table(*comparisons: dict[str, Any], methods: str = "sft offline_st reft") -> dict[str, Any]:
    score = {"accuracy": 0.5, "ci95": [0.4, 0.6]}
    return {
        "commit": "1234567",
        "seeds": 5,
        "baseline": "sft",
        "methods": {name: {"scores": {"greedy": score}} for name in methods.split()},
        "comparisons": list(comparisons),
    }


def test_a_finding_holds_is_undecided_or_is_turned_round(reproduce):
    page = reproduce.page(
        {
            "comparison": table(
                compared("reft", "sft", 0.1, 0.05, 0.15),
                compared("offline_st", "reft", 0.04, 0.01, 0.07),
            ),
            "comparison-nl": table(compared("reft", "sft", 0.01, -0.02, 0.04)),
        },
        ours=False,
    )
    assert (
        "| ReFT beats supervised fine-tuning (SFT) | holds: +10.0 [+5.0, +15.0] | undecided: +1.0"
        " [−2.0, +4.0] |" in page
    )
    assert (
        "| ReFT beats offline self-training | the opposite holds: −4.0 [−7.0, −1.0] | not run |"
        in page
    )
    assert "Over 5 seeds of `recipes/demo/comparison-nl.yaml` at commit 1234567:" in page
    assert "| ReFT | 50.0 [40.0, 60.0] | +1.0 [−2.0, +4.0] n.s. |" in page


def test_one_seed_decides_no_finding(reproduce):
    one = {**table(compared("reft", "sft", 0.1, 0.05, 0.15), methods="sft reft"), "seeds": 1}
    page = reproduce.page({"comparison": one}, ours=False)
    assert reproduce.ONE_SEED in page and reproduce.ONE_SEED in reproduce.modern_page(
        one, ours=False
    )
    assert "| one seed: +10.0 [+5.0, +15.0] |" in page and "holds:" not in page
    five = reproduce.page({"comparison": {**one, "seeds": 5}}, ours=False)
    assert reproduce.ONE_SEED not in five and "| holds: +10.0 [+5.0, +15.0] |" in five
    mixed = reproduce.page({"comparison": one, "comparison-nl": {**one, "seeds": 5}}, ours=False)
    assert "| one seed: +10.0 [+5.0, +15.0] | holds: +10.0 [+5.0, +15.0] |" in mixed


def test_only_our_own_results_come_with_our_texts_about_them(reproduce):
    own, published = (
        reproduce.page({"comparison": table()}, ours=ours)
        + reproduce.modern_page(table(methods="sft reft reft_modern"), ours=ours)
        for ours in (False, True)
    )
    texts = [*reproduce.OPEN, reproduce.NOTES["comparison"], reproduce.NOTES["modern"]]
    assert all(text in published and text not in own for text in texts)


def test_a_vote_is_found_whatever_its_number_of_samples(reproduce):
    voted = table(compared("reft maj@20", "sft maj@20", 0.03, 0.01, 0.05))
    assert reproduce.difference(voted, "reft maj", "sft maj")["difference"] == 0.03
    assert reproduce.difference(voted, "sft maj", "reft maj")["difference"] == -0.03
    assert reproduce.difference(voted, "reft", "sft") is None


def test_the_ablation_shows_what_a_part_contributes(reproduce):
    modern = table(
        compared("reft_modern", "reft", 0.03, 0.01, 0.05),
        compared("no_prefit", "reft_modern", -0.02, -0.03, -0.01),
        methods="sft reft reft_modern no_prefit",
    )
    text = reproduce.modern_page(modern, ours=True)
    assert "| ReFT modern | 50.0 [40.0, 60.0] | – | +3.0 [+1.0, +5.0] |" in text
    assert "| prefit | +2.0 [+1.0, +3.0] |" in text
    assert "| ReFT modern |" not in reproduce.page({"modern": modern}, ours=True)


@pytest.mark.parametrize("recipe", ["comparison", "comparison-nl", "modern", "tuned"])
def test_its_recipes_are_sound_and_spend_alike(reproduce, recipe):
    assert recipe in reproduce.TITLES
    loaded = load_recipe(DEMO / f"{recipe}.yaml")
    check_stage_graph(loaded)
    sampled = {
        name: (stage.steps + stage.value_prefit) * stage.prompts * stage.samples
        for name, stage in loaded.stages.items()
        if stage.kind == "rl" and name != "online_st"
    }
    assert set(sampled.values()) == {SAMPLED[recipe]}
    sft, train = loaded.stages["sft"], loaded.dataset.train
    warmup = next(s for s in loaded.stages.values() if "warmup" in getattr(s, "snapshots", {}))
    continued = (sft.epochs - sft.snapshots.get("warmup", 0)) * train
    cooled = 0 if warmup is sft else warmup.epochs * train  # passes of ReFT, not of the control
    updates = {
        stage.updates * stage.steps * stage.prompts * stage.samples
        for name, stage in loaded.stages.items()
        if name in sampled and name != "reft_tuned"  # at equal samples only
    }
    assert all(abs(cooled + passes - continued) <= 0.1 * continued for passes in updates)
