"""benchmarks/headline.py works in slices that stop, continue and end in a table."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from reftune.recipe import load_recipe
from reftune.runs.run import check_stage_graph

ROOT = Path(__file__).parents[2]
METHODS = ["warmup", "sft", "offline_st", "online_st", "reft", "reft_tuned"]


@pytest.fixture
def headline(benchmark_module) -> ModuleType:
    return benchmark_module("headline")


def test_its_recipes_are_sound_and_spend_alike():
    recipe = load_recipe(ROOT / "recipes/smollm2/headline.yaml")
    check_stage_graph(recipe)
    stages = recipe.stages
    assert [*stages["sft"].produces, *stages] == METHODS
    continued = (stages["sft"].epochs - stages["sft"].snapshots["warmup"]) * 2823
    for name in ("reft", "reft_tuned"):
        stage = stages[name]
        assert (stage.steps + stage.value_prefit) * stage.prompts * stage.samples == 14_080, (
            "sampled solutions"
        )
        assert stage.steps * stage.prompts * stage.samples * stage.updates == pytest.approx(
            continued, rel=0.05
        )
    check_stage_graph(load_recipe(ROOT / "recipes/smollm2/headline-tiny.yaml"))


@pytest.mark.slow
def test_a_command_that_takes_too_long_is_asked_to_stop_and_then_killed(headline):
    asked = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(130)); print(flush=True);"
        " time.sleep(60)"
    )
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    assert headline.run_for([sys.executable, "-c", asked], 3) == 130
    started = time.monotonic()
    assert headline.run_for([sys.executable, "-c", deaf], 3, patience_s=0.5) == headline.STOPPED
    assert time.monotonic() - started < 30
    assert headline.run_for([sys.executable, "-c", "raise SystemExit(2)"], 60) == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_slices_resume_until_the_table_is_there(headline, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(headline, "LEAST_S", 0)
    command = ["--folder", str(tmp_path), "--tiny", "--seeds", "0"]
    headline.main([*command, "--minutes", "0.05"])  # three seconds: python has hardly begun
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not first["finished"] and first["table"] is None
    headline.main([*command, "--minutes", "4"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["finished"] and sorted(last["table"]["methods"]) == sorted(METHODS)
    assert last["seeds"]["0"]["stages"]["reft"]["steps"] == 2


@pytest.mark.slow
def test_a_run_that_fails_ends_the_slice_with_its_status(headline, tmp_path):
    with pytest.raises(SystemExit) as left:
        headline.main(
            ["--folder", str(tmp_path), "--tiny", "--minutes", "2", "stages.reft.steps=none"]
        )
    assert left.value.code == 2
