"""`reftune plan`: the cost model redone by hand, what it prints, and what it says of bad input."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reftune.advice.plan import GPUS, NETWORK, Hardware, Planner, make_plan
from reftune.stages.stage import Cost
from reftune.terminal.cli import main

ROOT = Path(__file__).parents[2]
GPU = GPUS["h100"]
FORWARD, FLOPS = 1.6e8, 5e8
"""Operations of a sequence: forward, and forward and backward."""
OUTLINE: Any = SimpleNamespace(
    total=1_000_000,
    trained=900_000,
    ends=200_000,
    weights=4e6,
    cache_bytes=800,
    update=lambda prompt, response, batch: SimpleNamespace(
        forward_flops=batch * FORWARD, flops=batch * FLOPS
    ),
)


def planner(*, gpus: int = 1, dtype: str = "bfloat16", batch_size: int = 64) -> Planner:
    model = SimpleNamespace(dtype=dtype, micro_batch_tokens=500)
    recipe: Any = SimpleNamespace(model=model, engine=SimpleNamespace(batch_size=batch_size))
    return Planner(
        outline=OUTLINE,
        hardware=Hardware(gpus=gpus, memory=8e10, kind="h100", mfu=0.5),
        recipe=recipe,
        prompt=60,
        response=40,
    )


def cost(**changes: Any) -> Cost:
    """8 prompts, 4 samples each, scored by policy and reference, 2 updates."""
    rl = Cost(steps=1, batch=32, updates=2, scored=2, sampled=32, prompts=8, looks=1)
    return replace(rl, **changes)


def test_the_rate_is_a_share_of_the_data_sheets():
    assert planner().rate == GPU.bfloat16 / 2
    assert planner(dtype="float32").rate == GPU.float32 / 2


def test_scoring_passes_once_through_policy_reference_and_value_model():
    made = planner(gpus=4)
    rate = made.rate * 4
    assert made.step(cost(), "one")["score"].seconds == pytest.approx(32 * 2 * FORWARD / rate)
    one = made.step(cost(scored=1), "one")["score"].seconds
    assert one == pytest.approx(32 * FORWARD / rate)
    both = made.step(cost(scored=1, value_model=True), "one")["score"].seconds
    assert both == pytest.approx(2 * one)


def test_an_update_takes_the_operations_that_were_counted():
    found = planner().update(cost(), 1, "one")
    assert found.seconds == pytest.approx(2 * 32 * FLOPS / planner().rate)
    assert found.bound == "arithmetic"


def test_ddp_sums_gradients_once_an_update_and_fsdp2_moves_weights_each_micro_batch():
    # a ring moves 2 · 3/4 of the gradient; 900,000 of 4 bytes
    found = planner(gpus=4).communication(cost(), 4, "ddp")
    assert found == pytest.approx(2 * 0.75 * 3.6e6 / GPU.link)
    # 8 sequences a GPU, 5 of 100 tokens in a micro-batch of 500: two, each gathers weights twice,
    # scatters gradients once
    found = planner(gpus=4).communication(cost(), 4, "fsdp2")
    assert found == pytest.approx(2 * 0.75 * (8e6 + 3.6e6) / GPU.link)
    found = planner(gpus=16).communication(cost(), 16, "ddp")
    assert found == pytest.approx(2 * 15 / 16 * 3.6e6 / NETWORK), "two machines"


def test_few_rows_are_bound_by_reading_weights_and_cache_and_many_by_arithmetic():
    # 32 samples of 8 prompts; a token: 1e6 weights of 2 bytes and 32 rows of 60 + 20 tokens of 800
    # bytes, at half the roofline
    token_s = (2e6 + 32 * 80 * 800) / GPU.memory / 0.5
    prefill_s = 8 * 2 * 800_000 * 60 / planner().rate
    few = planner().generate(cost(), 1, "one")
    assert few.seconds == pytest.approx(40 * token_s + prefill_s)
    assert few.bound == "reading the cache"
    # a cache of 8 rows at once is a quarter of it, four times over
    waves = planner(batch_size=8).generate(cost(), 1, "one")
    assert waves.seconds == pytest.approx(
        4 * 40 * (2e6 + 8 * 80 * 800) / GPU.memory / 0.5 + prefill_s
    )
    assert waves.bound == "reading the weights for 8 rows"


def test_a_split_gives_the_step_to_two_groups_that_take_turns():
    made = planner(gpus=4)
    whole, split = made.step(cost(), "ddp"), made.best_split(cost(), "ddp")
    samplers = split["sampling_gpus"]
    halves = made.step(cost(), "ddp", samplers=samplers)
    assert (
        split["seconds"]
        == sum(phase.seconds for phase in halves.values())
        > sum(p.seconds for p in whole.values())
    )
    assert samplers + split["training_gpus"] == 4
    assert halves["update"] == made.update(cost(), 4 - samplers, "ddp")


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as left:
        main(["plan", "demo/smoke.yaml", "--json", *arguments])
    assert left.value.code == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_document_has_memory_by_sharding_and_time_by_phase(capsys):
    found = plan_json(
        capsys,
        "stages.reft.value_model=separate",
        "stages.reft.samples=8",
        "--gpus",
        "2",
        "--memory",
        "80",
    )
    assert list(found["memory"]) == ["one", "ddp", "fsdp2"] and found["stage"] == "reft", (
        "two transformers take most"
    )
    one, fsdp2 = found["memory"]["one"], found["memory"]["fsdp2"]
    assert fsdp2["parts"]["weights"] == one["parts"]["weights"] / 2
    assert found["sharding"] == "ddp" and all(of_way["fits"] for of_way in found["memory"].values())
    phases = found["steps"]["reft"]["phases"]
    assert set(phases) == {"generate", "score", "update"}
    assert found["steps"]["reft"]["seconds"] == sum(phase["seconds"] for phase in phases.values())
    assert found["assumed"]["mfu"] == 0.4


def test_what_fits_nowhere_is_said_so(make_recipe):
    tiny = Hardware(gpus=1, memory=1e3, kind="h100", mfu=0.4)
    plan = make_plan(make_recipe(), tiny)
    assert plan.sharding is None and list(plan.memory) == ["one"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["demo/smoke.yaml", "--gpus", "0"], "gpus"),
        (["demo/smoke.yaml", "--gpus", "many"], "gpus"),
        (
            ["demo/smoke.yaml", "model.scratch=null", "model.path=./nowhere"],
            "nowhere: no such model folder",
        ),
        (["demo/smoke.yaml", "stages.reft.steps=none"], "stages.reft.steps"),
        (["demo/nothing-like-it.yaml"], "no such recipe"),
        (
            ["demo/smoke.yaml", "--stage", "rtfe"],
            "nothing to plan for in rtfe; expected one of sft, offline_st",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, told, capsys):
    with pytest.raises(SystemExit) as left:
        main(["plan", *arguments])
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_on_scaling_shows_what_the_command_prints(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    shown = re.findall(r"```bash\nreftune (plan .+?)```\n\n```text\n(.+?)```", page, re.S)
    assert shown
    for command, output in shown:
        with pytest.raises(SystemExit):
            main(command.replace("\\\n", " ").split())
        assert capsys.readouterr().out.strip() == output.strip()


def test_the_committed_accuracy_is_on_the_page_and_within_its_tolerance_without_adapters():
    document = json.loads((ROOT / "docs/results/plan_accuracy.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    within = [
        row["case"]
        for row in document["rows"]
        if abs(row["error"]) <= document["tolerance"] == 0.15
    ]
    assert within == ["deep", "wide, value model", "wide, bf16", "smollm2"]
    for row in document["rows"]:
        assert (
            f"| {row['measured'] / 1e6:,.0f} | {row['predicted'] / 1e6:,.0f} |"
            f" {100 * row['error']:+.1f} % |" in page
        )
