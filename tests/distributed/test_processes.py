"""Two processes train as one does, with the same losses, gradients, answers and checkpoints; they
never wait forever, and report nothing twice."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
from compare import assert_same_numbers, assert_same_run
from crash import EVERY_STAGE, run_all
from reftune.algorithms.base import LossTerms
from reftune.engines.kv import Kv
from reftune.errors import NonFiniteError
from reftune.model.batch import token_batch
from reftune.processes import heartbeat, sharding, world
from reftune.processes.launch import processes
from reftune.processes.sharding import whole_tensor
from reftune.recipe import Recipe, dump_recipe
from reftune.runs.run import Run
from reftune.stages.optimizer import (
    OptimizerTable,
    accumulate_gradient,
    is_finite,
    make_optimizer,
    optimizer_step,
)
from reftune.stages.sft import accumulate_nll
from reftune.stages.stage import Progress
from reftune.storage.files import JsonLines
from reftune.types import SamplingParams

SteadyRecipe = Callable[..., Recipe]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
FAILING = Path(__file__).parent / "failing.py"
SHARDINGS = ["ddp", "fsdp2"]


@pytest.fixture(scope="module")
def kept() -> dict[str, Path]:
    return {}


@pytest.fixture
def by_one(kept: dict[str, Path], steady_recipe: SteadyRecipe, tmp_path: Path) -> Path:
    """The folder of the run by one process, made once."""
    if "one" not in kept:
        run_all(steady_recipe(tmp_path / "one"))
        kept["one"] = tmp_path / "one"
    return kept["one"]


@pytest.fixture
def by_two(
    kept: dict[str, Path], steady_recipe: SteadyRecipe, tmp_path: Path
) -> Callable[[str], Path]:
    """The folder of the run by two processes, made once for each sharding."""

    def make(how: str) -> Path:
        if how not in kept:
            recipe = steady_recipe(tmp_path / how / "run")
            ended = ranks.run(recipe, how=how)
            assert [one.status for one in ended] == [0, 0], ended
            kept[how] = recipe.folder
        return kept[how]

    return make


# --- the same as one process ----------------------------------------------------------------------


@pytest.mark.parametrize("how", SHARDINGS)
def test_two_processes_take_the_steps_of_one(how, by_one, by_two):
    # SFT and PPO; a checkpoint a step holds weights and, in Adam's first moment, gradients:
    # whitening over half of the rollout, a mean of the processes' means or a row counted twice
    # would show in them
    assert len(list(by_one.glob("stages/*/checkpoints/step-*"))) == 9
    assert_same_run(by_two(how), by_one)


@pytest.mark.parametrize("how", ["ddp", "fsdp2", "2x2"])
def test_four_processes_take_the_steps_of_one(how, by_one, steady_recipe, tmp_path):
    recipe = steady_recipe(tmp_path / "run")
    ended = ranks.run(recipe, how=how, num=4)
    assert [one.status for one in ended] == [0] * 4, ended
    assert ("in each of 2 groups" in ended[0].stderr) == (how == "2x2")
    assert_same_run(recipe.folder, by_one)


@pytest.mark.parametrize("how", SHARDINGS)
def test_the_main_process_speaks_and_says_how_weights_are_held(how, by_two):
    folder = by_two(how).parent
    main, other = ((folder / f"rank{rank}.err").read_text() for rank in (0, 1))
    held = {
        "ddp": "2 processes, all weights in each (DDP)",
        "fsdp2": "2 processes, weights sharded (FSDP2)",
    }[how]
    assert main.count(held) == 1 and main.count("report: ") == 1
    assert (folder / "rank0.out").read_text().count("Greedy") == 1
    assert (folder / "rank1.out").read_text() == other == ""


@pytest.mark.parametrize(
    ("saved_by", "stage", "resumed_by"),
    [
        ("fsdp2", "reft", "one"),
        ("one", "reft", "fsdp2"),
        ("one", "sft", "ddp"),
        ("ddp", "sft", "one"),
    ],
)
def test_a_checkpoint_goes_on_at_another_world_size(
    saved_by, stage, resumed_by, by_one, by_two, steady_recipe, tmp_path
):
    folder = tmp_path / "again" / "run"
    shutil.copytree(by_one if saved_by == "one" else by_two(saved_by), folder)
    rewind(folder, stage, 2)
    recipe = steady_recipe(folder)
    if resumed_by == "one":
        run_all(recipe)
    else:
        ended = ranks.run(recipe, how=resumed_by)
        assert [one.status for one in ended] == [0, 0], ended
        assert f"{stage}: resumed at step 2 of " in ended[0].stderr
    assert_same_run(folder, by_one)


def rewind(folder: Path, stage: str, step: int) -> None:
    """Leave a run as if it had been killed right after it saved `step` of a stage."""
    for path in folder.glob(f"stages/{stage}/checkpoints/step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (folder / "stages" / stage / "stage.json").unlink()
    if stage == "sft":
        shutil.rmtree(folder / "stages" / "reft")
        shutil.rmtree(folder / "stages" / "warmup")
    for path in folder.glob("eval/*.jsonl"):
        path.unlink()


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"lora": {"rank": 2}}},
        {"model": {"gradient_checkpointing": True}},
        {"stages": {"reft": {"value_model": "separate"}}},
        {"stages": {"reft": {"value_prefit": 2}}},
    ],
    ids=["lora", "blocks computed again", "value model", "value head fitted"],
)
def test_adapters_a_value_model_and_a_fitted_head_are_sharded_too(changes, steady_recipe, tmp_path):
    # the reference of a LoRA policy is a whole copy with the adapter off
    one, two = tmp_path / "one", tmp_path / "two" / "run"
    changes = {**changes, "evaluate": {"samples": 0}}
    stages = {
        "sft": None,
        "reft": {"init": "base", "steps": 2, **changes.get("stages", {}).get("reft", {})},
    }
    run_all(steady_recipe(one, **{**changes, "stages": stages}))
    ended = ranks.run(steady_recipe(two, **{**changes, "stages": stages}), how="fsdp2")
    assert [end.status for end in ended] == [0, 0], ended
    assert_same_run(two, one)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_a_frozen_base_in_bf16_is_sharded_too(how, steady_recipe, tmp_path):
    # in bf16 rounding may flip a near-tie, so only the first step is compared
    model = {"lora": {"rank": 2}, "dtype": "bfloat16", "gradient_checkpointing": True}
    changes = {
        "stages": {"sft": None, "reft": {"init": "base", "steps": 2}},
        "model": model,
        "evaluate": {"samples": 0},
    }
    one, two = tmp_path / "one", tmp_path / "two" / "run"
    run_all(steady_recipe(one, **changes))
    ended = ranks.run(steady_recipe(two, **changes), how=how)
    assert [end.status for end in ended] == [0, 0], ended
    first, second = (JsonLines(folder / "metrics.jsonl").rows()[0] for folder in (one, two))
    assert second["kl/reference"] == first["kl/reference"] == 0
    assert second["grad/norm"] == pytest.approx(first["grad/norm"], rel=0.05)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": {"lora": {"rank": 2}, "quantize": "nf4"}}, "model.quantize: FSDP2"),
        ({"stages": {"reft": {"optimizer": {"state_bits": 8}}}}, "optimizer.state_bits: 8 needs"),
    ],
)
def test_what_fsdp2_cannot_split_is_refused_and_runs_with_whole_weights(
    changes, told, steady_recipe, tmp_path
):
    reft = {"init": "base", "steps": 2, **changes.get("stages", {}).get("reft", {})}
    changes = {**changes, "evaluate": {"samples": 0}, "stages": {"sft": None, "reft": reft}}
    ended = ranks.run(steady_recipe(tmp_path / "split", **changes), how="fsdp2")
    assert sum(end.status == 2 for end in ended) == 1, ended
    assert sum(told in end.stderr for end in ended) == 1, ended
    ended = ranks.run(steady_recipe(tmp_path / "whole", **changes), how="ddp")
    assert [end.status for end in ended] == [0, 0], ended


def test_compiled_blocks_are_sharded_too(steady_recipe, tmp_path, monkeypatch):
    # a C++ compiler would take minutes here; tests/parity/test_plain_reference.py uses one
    compiled = torch.nn.Module.compile
    as_traced = {"backend": "aot_eager"}
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda block, **how: compiled(block, **as_traced, **how)
    )
    # tracing takes nearly all the time: one block, one step
    changes = {
        "stages": {"sft": None, "reft": {"init": "base", "steps": 1, "value_prefit": 0}},
        "evaluate": {"samples": 0},
        "model": {"scratch": {"layers": 1}},
    }
    one, two = tmp_path / "one", tmp_path / "two" / "run"
    run_all(steady_recipe(one, **changes))
    changes["model"]["compile"] = True
    ended = ranks.run(steady_recipe(two, **changes), how="fsdp2")
    assert [end.status for end in ended] == [0, 0], ended
    assert_same_run(two, one)


@pytest.mark.parametrize("how", SHARDINGS)
def test_every_stage_is_the_same(how, steady_recipe, tmp_path):
    changes = {
        **EVERY_STAGE,
        "stages": {name: merge_rate(stage) for name, stage in EVERY_STAGE["stages"].items()},
    }
    run_all(steady_recipe(tmp_path / "one", **changes))
    ended = ranks.run(steady_recipe(tmp_path / "two" / "run", **changes), how=how)
    assert [end.status for end in ended] == [0, 0], ended
    assert_same_run(tmp_path / "two" / "run", tmp_path / "one")


def merge_rate(stage: dict[str, Any]) -> dict[str, Any]:
    """The stage at a learning rate that does not amplify rounding."""
    if "sft" in stage:
        return {**stage, "sft": merge_rate(stage["sft"])}
    return {**stage, "optimizer": {"learning_rate": 0.003}}


# --- uneven shares --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", SHARDINGS)
def test_decoding_waits_for_nobody(how, make_policy, tmp_path):
    # one process decodes a token a row, the other 20, and a third nothing at all: steps that met
    # would not
    prompts, lengths = [[3], [4, 5], [6, 7]], [1, 20, 0]

    def body() -> None:
        policy = make_policy()
        sharding.current.distribute(policy)
        own = lengths[world.rank()]
        params = SamplingParams(max_new_tokens=max(1, own), seed=1, first_position=world.rank())
        with sharding.current.whole(policy):
            found = Kv().generate(policy, prompts[world.rank() :][: min(1, own)], params)
        tokens = [c.token_ids for part in world.gather(found) for c in part]
        if world.is_main():
            (tmp_path / "found.json").write_text(json.dumps(tokens))

    ended = ranks.spread(body, tmp_path, how=how, num=3)
    assert [end.status for end in ended] == [0, 0, 0], ended
    whole = Kv().generate(make_policy(), prompts, SamplingParams(max_new_tokens=20, seed=1))
    assert json.loads((tmp_path / "found.json").read_text()) == [
        [whole[0].token_ids[0]],
        list(whole[1].token_ids),
    ]


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "rank"), [("ddp", 0), ("fsdp2", 1)])
def test_a_process_that_fails_ends_the_run_with_its_reason(how, rank, steady_recipe, tmp_path):
    recipe = steady_recipe(tmp_path / "run", format={"kind": f"{FAILING}:Failing", "rank": rank})
    ended = ranks.run(recipe, how=how)
    told = "".join(end.stderr for end in ended)
    assert ended[rank].status == 2 and ended[1 - rank].status == 1, ended
    assert (
        told.count("no grade today") == 1
        and "Traceback" not in told
        and "another process" not in told
    )


def test_a_bug_in_one_process_leaves_one_traceback(steady_recipe, tmp_path):
    ended = ranks.run(
        steady_recipe(tmp_path / "run", format={"kind": f"{FAILING}:Failing", "how": "bug"})
    )
    assert [end.status for end in ended] == [1, 1]
    assert ended[0].stderr.count("Traceback") == 0
    assert ended[1].stderr.endswith("ZeroDivisionError: no grade today\n")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_missed_by_the_other(rank, steady_recipe, tmp_path):
    ended = ranks.run(
        steady_recipe(
            tmp_path / "run", format={"kind": f"{FAILING}:Failing", "how": "killed", "rank": rank}
        )
    )
    assert ended[rank].status == -9 and ended[1 - rank].status == 1
    assert "Traceback" not in ended[1 - rank].stderr
    if rank == 1:  # only the main process knows of the others; the launcher reports its death
        assert (
            ended[0]
            .stderr.splitlines()[-1]
            .startswith("process 0 of 2: process 1 ended without an error")
        )


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_dead_process_is_noticed_by_those_that_meet_nobody(killed, tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "SILENCE_S", 3.0)

    def body() -> None:
        world.wait("here")
        if world.rank() == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(50)  # as in an operation that waits for the killed process

    started = time.monotonic()
    ended = ranks.spread(body, tmp_path, num=3)
    assert time.monotonic() - started < 30
    assert [end.status for end in ended] == [-9 if rank == killed else 1 for rank in range(3)]
    told = "".join(end.stderr for end in ended)
    assert told.count(f"of 3: process {killed} ended without an error") == 1


def test_a_process_that_is_busy_or_done_is_not_taken_for_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "SILENCE_S", 3.0)

    def body() -> None:
        if world.is_main():
            time.sleep(6)  # writes, while the others wait
        world.wait("written")
        if world.is_main():
            time.sleep(6)  # the others are done

    ended = ranks.spread(body, tmp_path, num=3)
    assert [(end.status, end.stderr) for end in ended] == [(0, "")] * 3


@pytest.mark.parametrize("how", SHARDINGS)
def test_a_step_that_is_refused_in_one_process_is_in_both_and_leaves_no_trace(
    how, make_policy, tmp_path
):
    batch = token_batch([[3], [4, 5], [6, 7, 8]], [[1]] * 3)

    def step(policy: Any, optimizer: Any) -> dict[str, Any]:
        policy.max_tokens = 1
        loss = accumulate_nll(policy, batch)
        norm = optimizer_step(policy, optimizer, share=0.5, max_grad_norm=1.0)
        return {"loss": loss, "norm": norm, "logprobs": policy.score(batch).logprobs.tolist()}

    def make() -> tuple[Any, Any]:
        policy = make_policy()
        sharding.current.distribute(policy)
        return policy, make_optimizer(policy, OptimizerTable(learning_rate=1e-3, weight_decay=0.1))

    def body() -> None:
        policy, optimizer = make()
        weights = torch.tensor(
            [[1.0], [1.0], [math.nan]]
        )  # the longest row: in sorted turns it is the first process's
        policy.max_tokens = 9

        def loss(rows: torch.Tensor) -> LossTerms:
            return LossTerms(total=(policy(batch.rows(rows)).logprobs * weights[rows]).sum())

        with pytest.raises(NonFiniteError, match=r"^loss is nan in rows 0, 2"):
            accumulate_gradient(policy, batch, loss)
        optimizer.zero_grad()
        first = step(policy, optimizer)
        accumulate_nll(policy, batch)
        local(policy.model.model.norm.weight.grad)[-1:] = (
            math.inf
        )  # where a process has a part of it
        with pytest.raises(
            NonFiniteError,
            match=r"^gradient norm is (inf|nan): the gradient of model\.model\.norm\.weight is",
        ):
            optimizer_step(policy, optimizer, share=1.0, max_grad_norm=1.0)
        assert all(is_finite(parameter) for parameter in policy.parameters())
        found = [first, step(policy, optimizer)]
        if world.is_main():
            (tmp_path / "found.json").write_text(json.dumps(found))

    ended = ranks.spread(body, tmp_path, how=how)
    assert [end.status for end in ended] == [0, 0], ended
    policy, optimizer = make()
    assert_same_numbers(
        json.loads((tmp_path / "found.json").read_text()),
        [step(policy, optimizer) for _ in range(2)],
    )


# --- what is held ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", SHARDINGS)
def test_each_process_holds_what_its_sharding_says(how, make_policy, tmp_path):
    def body() -> None:
        policy = make_policy(dtype=torch.bfloat16)
        before = {name: p.detach().clone() for name, p in policy.named_parameters()}
        total = sum(map(torch.numel, before.values()))
        reference: Any = policy.make_reference()
        sharding.current.distribute(policy)
        optimizer = make_optimizer(policy, OptimizerTable(learning_rate=1e-6))
        scores = policy(token_batch([[3], [4, 5]], [[8, 1], [9, 1]]))
        (-scores.logprobs.sum()).backward()
        gradients = sum(local(p.grad).numel() for p in policy.parameters() if p.grad is not None)
        sharding.current.add_up_gradients(policy)
        optimizer_step(policy, optimizer, share=1.0, max_grad_norm=1.0)
        states = (
            sum(
                local(s[key]).numel()
                for s in optimizer.state.values()
                for key in ("exp_avg", "exp_avg_sq")
            )
            / 2
        )
        weights, frozen = (
            sum(local(p).numel() for p in model.parameters()) for model in (policy, reference)
        )
        shares = [held / total for held in (states, gradients, weights, frozen)]
        is_half = [share < 0.6 if how == "fsdp2" else share > 0.9 for share in shares]
        assert all(is_half), shares
        # bf16 arithmetic, fp32 weights: bf16 would round a step of 1e-6 away
        for name, parameter in policy.named_parameters():
            now = whole_tensor(parameter).detach()
            assert now.dtype == torch.float32
            assert 0 < (now - before[name]).abs().max() < 2e-6 or name.startswith("value_head")

    ended = ranks.spread(body, tmp_path, how=how)
    assert [end.status for end in ended] == [0, 0], ended


def test_matrices_are_gathered_in_the_compute_dtype_and_nothing_else_changes(make_policy, tmp_path):
    batch = token_batch([[3], [4, 5], [6, 7, 8]], [[8, 1], [9, 1], [10, 11, 1]])

    def scores(policy: Any) -> list[Any]:
        found = policy.score(batch)
        return [tensor.tolist() for tensor in (found.logprobs, found.values, found.entropy)]

    def body() -> None:
        policy = make_policy(dtype=torch.bfloat16)
        sharding.current.distribute(policy)
        with policy.inference():
            layer = policy.model.model.layers[0]
            assert layer.self_attn.q_proj.weight.dtype == torch.bfloat16
            assert layer.input_layernorm.weight.dtype == torch.float32
            assert policy.value_head.weight.dtype == torch.float32
            assert policy.model.lm_head.weight.dtype == torch.float32
        with sharding.current.whole(policy):
            assert {p.dtype for p in next(policy.children()).parameters()} == {torch.float32}
        found = scores(policy)
        if world.is_main():
            (tmp_path / "found.json").write_text(json.dumps(found))

    ended = ranks.spread(body, tmp_path, how="fsdp2")
    assert [end.status for end in ended] == [0, 0], ended
    assert_same_numbers(
        json.loads((tmp_path / "found.json").read_text()), scores(make_policy(dtype=torch.bfloat16))
    )


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def test_a_second_run_on_the_folder_is_refused_once(steady_recipe, tmp_path):
    recipe = steady_recipe(tmp_path / "run")
    recipe.folder.mkdir()
    (recipe.folder / "mine.txt").touch()
    ended = ranks.run(recipe)
    assert ended[0].status == 2 and ended[1].status == 1
    assert "".join(end.stderr for end in ended).count("choose another run_dir") == 1


# --- launchers ------------------------------------------------------------------------------------


TORCHRUN = ["torch.distributed.run", "--nproc_per_node", "2"]
ACCELERATE = [
    "accelerate.commands.launch",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
]
LAUNCHERS = [
    pytest.param(TORCHRUN, "(DDP)", id="torchrun"),
    pytest.param([*ACCELERATE, "--use_fsdp", "--fsdp_version", "2"], "(FSDP2)", id="accelerate"),
]


@pytest.mark.parametrize(("launcher", "how"), LAUNCHERS)
def test_launchers_run_what_they_are_asked_for(launcher, how, by_one, steady_recipe, tmp_path):
    recipe, file = steady_recipe(tmp_path / "run"), tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    port = [
        "--master_port" if launcher is TORCHRUN else "--main_process_port",
        str(ranks.free_port()),
    ]
    command = [sys.executable, "-m", *launcher, *port, "-m", "reftune", "run", str(file)]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=ranks.HANGS_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count(how) == 1 and ended.stdout.count("Greedy") == 1
    assert_same_run(recipe.folder, by_one)


def test_a_program_may_connect_its_processes_several_times(tmp_path: Path):
    def twice() -> None:
        for n in range(2):
            with processes():
                assert world.gather((n, world.rank())) == [(n, 0), (n, 1)]
                assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
        print("done")  # noqa: T201  by both processes, so stdout is restored

    ended = ranks.launch(twice, tmp_path, how="ddp", num=2)
    assert [(one.status, one.stdout) for one in ended] == [(0, "done\n")] * 2, ended


def test_processes_with_different_problems_are_refused(steady_recipe: SteadyRecipe, tmp_path: Path):
    recipe = steady_recipe(tmp_path / "run")

    def body() -> None:
        Run(recipe.model_copy(update={"seed": world.rank()}), Progress())

    ended = ranks.spread(body, tmp_path)
    assert [one.status for one in ended] == [1, 1]
    told = "".join(one.stderr for one in ended)
    assert told.count("problems differ between processes; expected the same files") == 1
