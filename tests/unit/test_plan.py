"""`reftune plan`: the cost model redone by hand, what it prints, and what it says of bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reftune.advice.memory import Sizes
from reftune.advice.plan import GPUS, NETWORK, Cost, Hardware, make_plan
from reftune.terminal.cli import main

ROOT = Path(__file__).parents[2]
GPU = GPUS["h100"]
SIZES = Sizes(
    total=1_000_000,
    trained=900_000,
    backbone=950_000,
    ends=200_000,
    layer=400_000,
    layers=2,
    hidden=100,
    vocabulary=1000,
    cache_bytes=800,
)


def cost(*, gpus: int = 1, dtype: str = "bfloat16", lora: Any = None, batch_size: int = 64) -> Cost:
    model = SimpleNamespace(dtype=dtype, lora=lora, micro_batch_tokens=500)
    recipe: Any = SimpleNamespace(model=model, engine=SimpleNamespace(batch_size=batch_size))
    return Cost(
        sizes=SIZES,
        hardware=Hardware(gpus=gpus, memory=8e10, kind="h100", mfu=0.5),
        recipe=recipe,
        prompt=60,
        response=40,
    )


def stage(
    *, prompts: int = 8, samples: int = 4, value_model: str = "shared", needs_reference: bool = True
) -> Any:
    algorithm = SimpleNamespace(needs_reference=needs_reference)
    return SimpleNamespace(
        prompts=prompts, samples=samples, updates=2, value_model=value_model, algorithm=algorithm
    )


HEAD = 2 * 1000 * 100 * 40
"""Logits of 40 tokens of the response."""
FORWARD = 2 * 800_000 * 100 + 2 * 2 * 100 * 100**2 + HEAD
"""100 tokens through 800,000 weights of the trunk, attention of two layers of width 100, and the
head."""


def test_flops_of_a_sequence_are_trunk_attention_and_the_responses_logits():
    assert (cost().forward, cost().head) == (FORWARD, HEAD)
    assert cost().rate == GPU.bfloat16 / 2
    assert cost(dtype="float32").rate == GPU.float32 / 2


def test_scoring_passes_once_through_policy_reference_and_value_model():
    rate = cost(gpus=4).rate * 4
    assert cost(gpus=4).score(stage(), 4).seconds == pytest.approx(32 * 2 * FORWARD / rate)
    assert cost(gpus=4).score(stage(needs_reference=False), 4).seconds == pytest.approx(
        32 * FORWARD / rate
    )
    assert cost(gpus=4).score(stage(value_model="separate"), 4).seconds == pytest.approx(
        32 * (3 * FORWARD - HEAD) / rate
    )


def test_an_update_is_three_passes_and_two_with_adapters():
    rate = cost().rate
    assert cost().update(stage(), 1, "one").seconds == pytest.approx(2 * 32 * 3 * FORWARD / rate)
    assert cost(lora="adapters").update(stage(), 1, "one").seconds == pytest.approx(
        2 * 32 * 2 * FORWARD / rate
    )
    assert cost().update(stage(), 1, "one").bound == "arithmetic"


def test_ddp_sums_gradients_once_an_update_and_fsdp2_moves_weights_each_micro_batch():
    # a ring moves 2 · 3/4 of the gradient; 900,000 of 4 bytes
    assert cost(gpus=4)._communication(32, 4, "ddp") == pytest.approx(2 * 0.75 * 3.6e6 / GPU.link)
    # 8 sequences a GPU, 5 of 100 tokens in a micro-batch of 500: two, each gathers weights twice,
    # scatters gradients once
    assert cost(gpus=4)._communication(32, 4, "fsdp2") == pytest.approx(
        2 * 0.75 * (8e6 + 3.6e6) / GPU.link
    )
    assert cost(gpus=16)._communication(32, 16, "ddp") == pytest.approx(
        2 * 15 / 16 * 3.6e6 / NETWORK
    ), "two machines"


def test_few_rows_are_bound_by_reading_weights_and_cache_and_many_by_arithmetic():
    # 32 samples of 8 prompts; a token: 1e6 weights of 2 bytes and 32 rows of 60 + 20 tokens of 800
    # bytes, at half the roofline
    token_s = (2e6 + 32 * 80 * 800) / GPU.memory / 0.5
    prefill_s = 8 * 2 * 800_000 * 60 / cost().rate
    few = cost().generate(stage(), 1, "one")
    assert few.seconds == pytest.approx(40 * token_s + prefill_s)
    assert few.bound == "reading the cache"
    # a cache of 8 rows at once is a quarter of it, four times over
    waves = cost(batch_size=8).generate(stage(), 1, "one")
    assert waves.seconds == pytest.approx(
        4 * 40 * (2e6 + 8 * 80 * 800) / GPU.memory / 0.5 + prefill_s
    )
    assert waves.bound == "reading the weights for 8 rows"


def test_a_split_gives_the_step_to_two_groups_that_take_turns():
    whole, split = cost(gpus=4).step(stage(), "ddp"), cost(gpus=4).best_split(stage(), "ddp")
    samplers = split["sampling_gpus"]
    halves = cost(gpus=4).step(stage(), "ddp", samplers=samplers)
    assert (
        split["seconds"]
        == sum(phase.seconds for phase in halves.values())
        > sum(p.seconds for p in whole.values())
    )
    assert samplers + split["training_gpus"] == 4
    assert halves["update"] == cost(gpus=4).update(stage(), 4 - samplers, "ddp")


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
    assert (
        one["parts"]["value model"] > 0 and fsdp2["parts"]["weights"] == one["parts"]["weights"] / 2
    )
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


@pytest.mark.timeout(300)
def test_the_page_on_scaling_shows_what_the_command_prints(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "7b").mkdir()
    (tmp_path / "7b" / "config.json").write_text(
        re.search(r"<!-- file: 7b/config.json -->\n```text\n(.+?)```", page, re.S)[1]
    )
    shown = re.findall(r"```bash\nreftune (plan .+?)```\n\n```text\n(.+?)```", page, re.S)
    assert len(shown) == 2
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
