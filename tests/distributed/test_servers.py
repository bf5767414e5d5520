"""Several processes sample from vLLM servers, which are stubs here."""

from __future__ import annotations

import pytest

import ranks
from compare import assert_same_run
from crash import run_all
from stub_vllm import stub_vllm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SHARE = 3
"""Requests of the second process per step: the problems in its half of 5 × 3 samples."""
STAGES = {"sft": None, "reft": {"init": "base", "steps": 3, "save_every_s": 0, "value_prefit": 0}}


@pytest.mark.parametrize(("num", "how", "lora"), [(2, "ddp", None), (2, "fsdp2", {"rank": 2})])
def test_processes_share_the_prompts_and_one_of_them_writes_the_weights(
    num, how, lora, steady_recipe, tmp_path
):
    # the stub's samples depend on seeds alone: shares change neither samples nor steps
    changes = {"stages": STAGES, "evaluate": {"samples": 0}, "model": {"lora": lora}}
    with stub_vllm(3) as stubs:
        alone, *both = stubs
        one = steady_recipe(tmp_path / "one", **changes, engine=engine(alone))
        run_all(one)
        two = steady_recipe(tmp_path / "two" / "run", **changes, engine=engine(*both))
        ended = ranks.run(two, how=how, num=num)
    assert [end.status for end in ended] == [0] * num, ended
    assert_same_run(two.folder, one.folder, but={"engine/requests"})
    assert [stub.folders for stub in both] == [both[0].folders] * 2
    assert len(both[0].folders) == len(alone.folders)
    asked = [len(stub.requests("/v1/completions")) for stub in both]
    assert min(asked) > 0 and sum(asked) >= len(alone.requests("/v1/completions"))


def engine(*stubs):
    return {"kind": "vllm", "server": [stub.address for stub in stubs]}


@pytest.mark.parametrize(
    ("how", "at", "lora"),
    [
        ("ddp", "/v1/completions", None),
        ("fsdp2", "/v1/completions", {"rank": 2}),
        ("ddp", "/v1/load_lora_adapter", {"rank": 2}),
        ("fsdp2", "/collective_rpc", None),
    ],
)
def test_a_server_that_dies_in_a_step_costs_a_line_and_no_step(
    how, at, lora, steady_recipe, tmp_path
):
    stages = {**STAGES, "reft": {**STAGES["reft"], "save_every_s": 1000.0}}
    changes = {"stages": stages, "evaluate": {"samples": 0}, "model": {"lora": lora}}
    with stub_vllm(2) as stubs:
        straight = steady_recipe(tmp_path / "straight" / "run", **changes, engine=engine(*stubs))
        assert [end.status for end in ranks.run(straight, how=how)] == [0, 0]
        # the second server, which the first process does not ask, dies in the second step
        stubs[1].dies_at = at, SHARE + 1 if at == "/v1/completions" else 1
        for stub in stubs:
            stub.asked.clear()
        killed = steady_recipe(tmp_path / "killed" / "run", **changes, engine=engine(*stubs))
        ended = ranks.run(killed, how=how)
        assert sorted(end.status for end in ended) == [1, 2], ended
        told = "".join(end.stderr for end in ended)
        assert told.count(f"engine vllm: no answer from {stubs[1].address}{at}") == 1
        assert "Traceback" not in told
        steps = {path.name for path in killed.folder.glob("stages/reft/checkpoints/step-*")}
        assert len(steps) == 2  # step 0, and the one before the server died
        stubs[1].dies_at = None
        assert [end.status for end in ranks.run(killed, how=how)] == [0, 0]
    assert_same_run(killed.folder, straight.folder)
