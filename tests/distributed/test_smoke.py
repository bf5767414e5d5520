"""One step of two processes equals that of one. The slow tests beside this file check much more."""

from __future__ import annotations

import json
from typing import Any

import pytest

import ranks
from compare import assert_same_numbers
from reftune.model.batch import token_batch
from reftune.processes import sharding, world
from reftune.stages.optimizer import OptimizerTable, make_optimizer, optimizer_step
from reftune.stages.sft import accumulate_nll


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_shares_may_be_uneven_or_empty(how, num_rows, make_policy, tmp_path):
    # with 1 row a process has none; with 3, a micro-batch each, one process has two of them and the
    # other one
    prompts, targets = (
        [[3], [4, 5], [6, 7]][:num_rows],
        [[8, 1], [9, 10, 1], [11, 12, 13, 1]][:num_rows],
    )

    def step(policy: Any) -> dict[str, Any]:
        sharding.current.distribute(policy)
        optimizer = make_optimizer(policy, OptimizerTable(learning_rate=1e-3))
        batch = token_batch(prompts, targets)
        policy.max_tokens = 1
        loss = accumulate_nll(policy, batch)
        norm = optimizer_step(policy, optimizer, share=1.0, max_grad_norm=1.0)
        scores = policy.score(batch)
        return {
            "loss": loss,
            "norm": norm,
            "logprobs": scores.logprobs.tolist(),
            "values": scores.values.tolist(),
        }

    def body() -> None:
        found = step(make_policy())
        assert all(other == found for other in world.gather(found))
        if world.is_main():
            (tmp_path / "found.json").write_text(json.dumps(found))

    ended = ranks.spread(body, tmp_path, how=how)
    assert [end.status for end in ended] == [0, 0], ended
    assert_same_numbers(json.loads((tmp_path / "found.json").read_text()), step(make_policy()))
