"""benchmarks/headline.py works in slices that stop, continue and end in tables."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from reftune.datasets.reading.splits import normalised
from reftune.recipe import load_recipe
from reftune.runs.models import check_stage_graph

ROOT = Path(__file__).parents[2]
METHODS = ["warmup", "sft", "reft"]


@pytest.fixture
def headline(benchmark_module) -> ModuleType:
    return benchmark_module("headline")


def test_both_methods_start_from_one_warmup_and_spend_alike():
    recipe = load_recipe(ROOT / "recipes/smollm2/headline.yaml")
    assert list(recipe.stages) == METHODS
    sft, reft = recipe.stages["sft"], recipe.stages["reft"]
    assert sft.init == reft.init == "warmup"
    passes = reft.steps * reft.prompts * reft.samples * reft.updates
    assert passes == pytest.approx(sft.epochs * 2520, rel=0.05)
    assert sft.epochs / sft.eval_every == reft.steps / reft.eval_every, (
        "equally many dev evaluations"
    )
    check_stage_graph(load_recipe(ROOT / "recipes/smollm2/headline-tiny.yaml"))


def test_questions_held_out_are_not_trained_on(headline, tmp_path):
    spellings = ("question {}", "Question  {} .")
    rows = [
        {"question": spellings[i // 400].format(i % 400), "answer_value": str(i)}
        for i in range(450)
    ]
    (tmp_path / "all.json").write_text(json.dumps(rows))
    headline.hold_out(tmp_path / "all.json", tmp_path)
    train, held_out = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("train", "held_out")
    )
    kept, learned = ({normalised(row["question"]) for row in part} for part in (held_out, train))
    assert len(held_out) == len(kept) == headline.HELD_OUT
    assert kept.isdisjoint(learned) and len(kept | learned) == 400


@pytest.mark.slow
def test_a_command_that_does_not_stop_when_asked_is_killed(headline):
    deaf = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", deaf]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        started = time.monotonic()
        headline.stop([process], patience_s=0.5)
        assert process.returncode == -9 and time.monotonic() - started < 30


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_slices_resume_until_the_tables_are_there(headline, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(headline, "LEAST_S", 0)
    command = ["--folder", str(tmp_path), "--tiny", "--seeds", "0", "1", "--together", "2"]
    headline.main([*command, "--minutes", "0.05"])  # three seconds: python has hardly begun
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not first["finished"] and first["table"] is None
    headline.main([*command, "--minutes", "8"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["finished"]
    for name in ("table", *headline.LATER):
        assert list(last[name]["methods"]) == METHODS and last[name]["seeds"] == 2
    assert "maj@20" in last["voting"]["methods"]["reft"]["scores"]
    assert last["seeds"]["0"]["stages"]["reft"]["steps"] == 2


@pytest.mark.slow
def test_a_run_that_fails_ends_the_slice_with_its_status(headline, tmp_path):
    with pytest.raises(SystemExit) as left:
        headline.main(
            ["--folder", str(tmp_path), "--tiny", "--minutes", "2", "stages.reft.steps=none"]
        )
    assert left.value.code == 2
