"""`reftune plan`: the cost model recomputed by hand, its output, and its errors for bad input."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reftune.advice.plan import GPUS, NETWORK, Hardware, Plan, Planner, make_plan, plan_text
from reftune.recipe import ModelTable
from reftune.stages.estimate import Estimate
from reftune.stages.outline import outline_of
from reftune.stages.stage import Cost
from reftune.terminal.cli import main

ROOT = Path(__file__).parents[2]
GPU = GPUS["h100"]
FORWARD, FLOPS = 1.6e8, 5e8
"""Operations per sequence of a forward pass, and of a forward and backward pass."""
OUTLINE: Any = SimpleNamespace(
    total=1_000_000,
    trained=900_000,
    ends=200_000,
    weights=4e6,
    gathered=3e6,
    policy=SimpleNamespace(compute_dtype=torch.bfloat16),
    cache_bytes=800,
    update=lambda prompt, response, batch: SimpleNamespace(
        forward_flops=batch * FORWARD, flops=batch * FLOPS
    ),
)


def planner(
    cost: Cost | None = None,
    way: Any = "one",
    *,
    gpus: int = 1,
    dtype: str = "bfloat16",
    batch_size: int = 64,
) -> Planner:
    recipe: Any = SimpleNamespace(
        model=SimpleNamespace(dtype=dtype, micro_batch_tokens=500),
        engine=SimpleNamespace(batch_size=batch_size),
        lengths=SimpleNamespace(max_new=40),
    )
    estimate = Estimate(
        recipe=recipe,
        cost=cost or rl(),
        outline=OUTLINE,
        prompt=60,
        sharding=way,
        devices=1 if way == "one" else gpus,
    )
    hardware = Hardware(gpus=gpus, memory=8e10, kind="h100", mfu=0.5)
    return Planner(hardware=hardware, estimate=estimate)


def rl(**changes: Any) -> Cost:
    """The cost of 8 prompts with 4 samples each, scored by policy and reference, and 2 updates."""
    cost = Cost(steps=1, batch=32, updates=2, scored=2, sampled=32, prompts=8, looks=1)
    return replace(cost, **changes)


def test_the_rate_is_a_share_of_the_data_sheets():
    assert planner().rate == GPU.bfloat16 / 2
    assert planner(dtype="float32").rate == GPU.float32 / 2


def test_scoring_passes_once_through_policy_reference_and_value_model():
    rate = planner().rate * 4

    def score(**changes: Any) -> float:
        return planner(rl(**changes), gpus=4).step().phases["score"].seconds

    assert score() == pytest.approx(32 * 2 * FORWARD / rate)
    assert score(scored=1) == pytest.approx(32 * FORWARD / rate)
    assert score(scored=1, value_model=True) == pytest.approx(2 * 32 * FORWARD / rate)


def test_a_stage_takes_its_steps_and_what_comes_before_them():
    # 10 steps, and as many samples as two of them before the first
    step = planner(rl(steps=10, sampled_before=64)).step()
    generate = step.phases["generate"].seconds
    assert step.stage_seconds == pytest.approx(10 * step.seconds + 2 * generate)


def test_an_update_takes_the_operations_that_were_counted():
    found = planner().step().phases["update"]
    assert found.seconds == pytest.approx(2 * 32 * FLOPS / planner().rate)
    assert found.bound == "arithmetic"


def test_ddp_sums_gradients_once_an_update_and_fsdp2_moves_weights_each_micro_batch():
    # a ring moves 2 · 3/4 of the gradient; 900,000 of 4 bytes
    found = planner(way="ddp", gpus=4).communication(4)
    assert found == pytest.approx(2 * 0.75 * 3.6e6 / GPU.link)
    # 8 sequences a GPU, 5 of 100 tokens in a micro-batch of 500: two, each gathers weights twice,
    # scatters gradients once
    found = planner(way="fsdp2", gpus=4).communication(4)
    assert found == pytest.approx(2 * 0.75 * (8e6 + 3.6e6) / GPU.link)
    found = planner(way="ddp", gpus=16).communication(16)
    assert found == pytest.approx(2 * 15 / 16 * 3.6e6 / NETWORK), "two machines"


def test_few_rows_are_bound_by_reading_weights_and_cache_and_many_by_arithmetic():
    # 32 samples of 8 prompts; a token: 1e6 weights of 2 bytes and 32 rows of 60 + 20 tokens of 800
    # bytes, at half the roofline
    token_s = (2e6 + 32 * 80 * 800) / GPU.memory / 0.5
    prefill_s = 8 * 2 * 800_000 * 60 / planner().rate
    few = planner().step().phases["generate"]
    assert few.seconds == pytest.approx(40 * token_s + prefill_s)
    assert few.bound == "reading the cache"
    # a cache of 8 rows at once is a quarter of it, four times over
    waves = planner(batch_size=8).step().phases["generate"]
    assert waves.seconds == pytest.approx(
        4 * 40 * (2e6 + 8 * 80 * 800) / GPU.memory / 0.5 + prefill_s
    )
    assert waves.bound == "reading the weights for 8 rows"
    # split weights come first, three quarters of them from the others
    gathered = (
        planner(way="fsdp2", gpus=4).generate(4).seconds - planner(gpus=4).generate(4).seconds
    )
    assert 32 * gathered == pytest.approx(0.75 * 3e6 / GPU.link)


def test_a_split_gives_the_step_to_two_groups_that_take_turns():
    made = planner(way="ddp", gpus=4)
    split = made.best_split()
    samplers = split["sampling_gpus"]
    halves = made.step(samplers=samplers)
    assert split["seconds"] == halves.seconds > made.step().seconds
    assert samplers + split["training_gpus"] == 4
    # 32 sequences, twice
    assert halves.phases["update"].seconds == pytest.approx(64 * made.update(4 - samplers).seconds)


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
    assert list(found["memory"]) == ["one", "ddp", "fsdp2"]
    assert set(found["stage"].values()) == {"reft"}, "two transformers take most"
    one, fsdp2 = found["memory"]["one"], found["memory"]["fsdp2"]
    assert fsdp2["parts"]["weights"] == one["parts"]["weights"] / 2
    assert found["sharding"] == "ddp" and all(of_way["fits"] for of_way in found["memory"].values())
    phases = found["steps"]["reft"]["phases"]
    assert set(phases) == {"generate", "score", "update"}
    assert found["steps"]["reft"]["seconds"] == sum(phase["seconds"] for phase in phases.values())
    assert found["assumed"]["mfu"] == 0.4


def test_every_sharding_shows_the_stage_that_needs_most_under_it(make_recipe):
    # RL has a reference; a reward model has a sampler, which FSDP2 does not split
    judge = {"kind": "reward_model", "sampler": "warmup", "batch_size": 1, "epochs": 1}
    stages = {"judge": {**judge, "optimizer": {"learning_rate": 1e-3}}}
    model = {"scratch": {"hidden_size": 512, "layers": 6}, "dtype": "bfloat16"}
    recipe = make_recipe(model=model, engine={"batch_size": 64}, stages=stages)

    def planned(memory: float, only: str | None = None) -> Plan:
        hardware = Hardware(gpus=8, memory=memory, kind="h100", mfu=0.4)
        return make_plan(recipe, hardware, prompt=8, response=8, only=only)

    plan = planned(80e9)
    assert plan.stage == {"one": "reft", "ddp": "reft", "fsdp2": "judge"}
    lines = plan_text(plan).splitlines()
    assert lines[3].split() == ["stage", "reft", "reft", "judge"]
    assert "GB per GPU, stage judge" in plan_text(planned(80e9, "judge"))
    # a sharding fits if all stages fit
    peaks = {name: planned(80e9, name).memory["fsdp2"].peak for name in ("reft", "judge")}
    assert plan.memory["fsdp2"].peak == peaks["judge"] > peaks["reft"]
    between = planned(sum(peaks.values()) / 2)
    assert not between.memory["fsdp2"].fits and between.sharding is None
    enough = planned(1.01 * peaks["judge"])
    assert enough.sharding == "fsdp2" and not enough.memory["ddp"].fits


def test_the_plan_states_that_nothing_fits(make_recipe):
    tiny = Hardware(gpus=1, memory=1e3, kind="h100", mfu=0.4)
    plan = make_plan(make_recipe(), tiny)
    assert plan.sharding is None and list(plan.memory) == ["one"]


def test_with_a_server_the_steps_are_those_of_the_split(make_recipe):
    hardware = Hardware(gpus=4, memory=80e9, kind="h100", mfu=0.4)
    server = make_recipe(engine={"kind": "vllm", "server": "http://host:8000"})
    plan, colocated = make_plan(server, hardware), make_plan(make_recipe(), hardware)
    assert (plan.topology, colocated.topology) == ("split", "colocated")
    assert plan.steps["reft"].seconds == plan.split["reft"]["seconds"]
    assert colocated.steps["reft"].seconds < colocated.split["reft"]["seconds"]


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
            "nothing to plan in stage rtfe; expected one of sft, offline_st",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, told, capsys):
    with pytest.raises(SystemExit) as left:
        main(["plan", *arguments])
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "t5"}, "Unrecognized configuration class"),
        ({"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4}, "not a multiple"),
        ({"hidden_size": 8}, "model_type"),
        ("{", "not a valid JSON file"),
    ],
)
def test_a_configuration_that_makes_no_model_is_one_line(config, told, tmp_path, capsys):
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    arguments = ["demo/smoke.yaml", "model.scratch=null", f"model.path={tmp_path}"]
    with pytest.raises(SystemExit) as left:
        main(["plan", *arguments])
    told_of = capsys.readouterr().err
    assert left.value.code == 2 and told_of.count("\n") == 1
    assert f"{tmp_path}: cannot be loaded as a causal language model: " in told_of
    assert told in told_of


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_pages_show_what_the_command_prints(tmp_path, monkeypatch, capsys):
    pages = ("scaling.md", "experiments/plan.md")
    text = "\n".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in pages)
    monkeypatch.chdir(tmp_path)
    shown = re.findall(r"```bash\nreftune (plan .+?)```\n\n```text\n(.+?)```", text, re.S)
    assert len(shown) == 3
    for command, output in shown:
        with pytest.raises(SystemExit):
            main(command.replace("\\\n", " ").split())
        assert capsys.readouterr().out.strip() == output.strip()


def test_the_committed_accuracy_is_on_the_page_and_within_its_tolerance():
    document = json.loads((ROOT / "docs/results/plan_accuracy.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/experiments/plan.md").read_text(encoding="utf-8")
    assert len(document["rows"]) >= 5 and document["tolerance"] == 0.15
    for row in document["rows"]:
        assert abs(row["error"]) <= document["tolerance"]
        assert (
            f"| {row['measured'] / 1e6:,.0f} | {row['predicted'] / 1e6:,.0f} |"
            f" {100 * row['error']:+.1f}% |" in page
        )


@pytest.mark.parametrize(
    ("model", "published"),
    [
        ("facebook/galactica-125m", 125e6),
        ("facebook/galactica-6.7b", 6.7e9),
        ("Salesforce/codegen-350M-mono", 350e6),
        ("codeparrot/codeparrot-small", 110e6),
        ("codellama/CodeLlama-7b-hf", 6.74e9),
    ],
)
def test_the_configurations_of_the_papers_models_have_the_published_sizes(model, published):
    table = ModelTable(path=model, dtype="float32")
    assert outline_of(table, (), device="cuda").total == pytest.approx(published, rel=0.02)
