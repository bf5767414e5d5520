"""Finds device mistakes without a GPU: a tensor made without a device lands on one where nothing
can use it."""

from __future__ import annotations

import pytest
import torch

from reftune.engines import kv
from reftune.engines.kv import Kv, draw_tokens
from reftune.stages.reward_model import Classifier, Solution, accumulate_loss
from reftune.types import SamplingParams


def test_the_trap_catches_a_tensor_without_a_device():
    with torch.device("meta"), pytest.raises((RuntimeError, NotImplementedError)):
        (torch.ones(2, device="cpu") + torch.arange(2)).tolist()


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rloo", "online_st"])
def test_an_rl_step_gives_each_tensor_a_device(make_trainer, algorithm):
    stage = {
        "algorithm": {"kind": algorithm},
        "samples": 2,
        "mismatch_cap": None if algorithm == "online_st" else 2.0,
    }
    trainer = make_trainer(stage)
    with torch.device("meta"):
        metrics = trainer.step(1)
    assert metrics["grad/norm"] > 0


def test_preparing_the_value_head_gives_each_tensor_a_device(make_trainer):
    trainer = make_trainer({"value_prefit": 2})
    with torch.device("meta"):
        trainer.policy.reset_value_head(0)
        trainer.prefit()
    assert trainer.policy.value_head.weight.abs().sum() > 0


def test_a_reward_model_step_gives_each_tensor_a_device(make_trainer):
    trainer = make_trainer()
    problem = trainer.context.splits.train[0]
    solutions = [
        Solution(problem=problem, text=text, label=label) for label, text in enumerate(("1", "2 3"))
    ]
    with torch.device("meta"):
        classifier = Classifier(trainer.policy, trainer.context.collector.encoder, seed=1)
        metrics = accumulate_loss(classifier, solutions)
    assert metrics["loss/total"] > 0


def test_sampling_with_limits_gives_each_tensor_a_device(make_policy):
    policy, params = make_policy(), SamplingParams(max_new_tokens=4, top_k=5, top_p=0.9)
    with torch.device("meta"):
        completions = Kv(batch_size=2, refill=0.5).generate(policy, [[3], [4, 5], [6, 7]], params)
    assert len(completions) == 3


def test_sampling_gives_a_device_without_fp64_no_fp64(make_policy, monkeypatch):
    drawn = []

    def watched(logits, uniforms, params, **more):
        drawn.append(uniforms.dtype)
        return draw_tokens(logits, uniforms, params, **more)

    monkeypatch.setattr(kv, "widest", lambda device: torch.float32)
    monkeypatch.setattr(kv, "draw_tokens", watched)
    Kv().generate(make_policy(), [[3], [4, 5]], SamplingParams(max_new_tokens=4))
    assert set(drawn) == {torch.float32}
