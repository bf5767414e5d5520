"""On a GPU, a step equals that of the CPU within float tolerance; skipped without a GPU."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crash import EVERY_STAGE, assert_same_outcome, outcome, run_all
from reftune.engines.kv import Kv
from reftune.model.batch import token_batch
from reftune.model.policy import Policy
from reftune.recipe import Recipe
from reftune.runs.run import open_run
from reftune.stages.loop import Interrupted
from reftune.stages.rl import Trainer
from reftune.stages.sft import accumulate_nll
from reftune.stages.stage import Progress
from reftune.types import SamplingParams

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # deterministic matmuls need it, before the first of them

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]

PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11], [12]]
RESPONSES = [[13, 14, 1], [15, 1], [16, 17, 18, 19, 1], [1]]
MakePolicy = Callable[..., Policy]


def gradients(
    policy: Policy, device: str, dtype: torch.dtype
) -> tuple[float, dict[str, torch.Tensor]]:
    policy.to(device)
    policy.compute_dtype = dtype
    policy.max_tokens = 12
    loss = accumulate_nll(policy, token_batch(PROMPTS, RESPONSES, device=device))
    return loss, {name: p.grad.cpu() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "qwen3, tied", "gpt2"])
def test_loss_and_gradients_are_those_of_the_cpu(make_policy: MakePolicy, family: str):
    loss, found = gradients(make_policy(family), "cuda", torch.float32)
    expected_loss, expected = gradients(make_policy(family), "cpu", torch.float32)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_bf16_arithmetic_keeps_weights_and_log_probabilities_in_fp32(make_policy: MakePolicy):
    exact_loss, exact = gradients(make_policy(), "cuda", torch.float32)
    policy = make_policy()
    loss, found = gradients(policy, "cuda", torch.bfloat16)
    scores = policy.score(token_batch(PROMPTS, RESPONSES, device="cuda"))
    assert {p.dtype for p in policy.parameters()} == {scores.logprobs.dtype} == {torch.float32}
    assert loss == pytest.approx(exact_loss, rel=0.05) and loss != exact_loss
    for name, gradient in exact.items():
        assert (
            torch.nn.functional.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0)
            > 0.97
        ), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_of_samples_are_those_recomputed(
    make_policy: MakePolicy, dtype: torch.dtype
):
    policy = make_policy(dtype=dtype).to("cuda")
    completions = Kv(batch_size=3).generate(
        policy, PROMPTS * 4, SamplingParams(max_new_tokens=12, seed=1)
    )
    batch = token_batch(
        PROMPTS * 4, [completion.token_ids for completion in completions], device="cuda"
    )
    recomputed = policy.score(batch).logprobs[batch.response_mask].cpu()
    sampled = torch.tensor(
        [logprob for completion in completions for logprob in completion.logprobs]
    )
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert (recomputed - sampled).abs().mean() < tolerance


def test_the_same_tokens_are_drawn_as_on_the_cpu(make_policy: MakePolicy):
    params = SamplingParams(max_new_tokens=12, seed=1)
    found = Kv().generate(make_policy().to("cuda"), PROMPTS, params)
    assert [c.token_ids for c in found] == [
        c.token_ids for c in Kv().generate(make_policy(), PROMPTS, params)
    ]


def test_a_ppo_step_is_that_of_the_cpu(make_trainer: Callable[..., Trainer], tmp_path: Path):
    model = {"scratch": {"dropout": 0.0}}
    steps: list[dict[str, float]] = []
    credit: list[torch.Tensor] = []
    for device in ("cpu", "cuda"):
        trainer = make_trainer(
            {"optimizer": {"learning_rate": 1e-3}},
            model={**model, "device": device},
            run_dir=str(tmp_path / device),
        )
        solutions, _ = trainer.sample(1, "rollout")
        batch, _ = trainer.score(solutions)
        batch = trainer.algorithm.credit(batch)
        assert batch.advantages is not None and batch.advantages.device.type == device
        credit.append(batch.advantages.cpu())
        weighted = replace(batch, weights=trainer.algorithm.weights(batch))
        steps.append(trainer.accumulate(weighted))
    torch.testing.assert_close(credit[1], credit[0], rtol=1e-3, atol=1e-4)
    assert steps[1] == pytest.approx(steps[0], rel=1e-3, abs=1e-5)


def test_every_stage_runs_and_resumes_on_the_gpu(
    make_recipe: Callable[..., Recipe], tmp_path: Path
):
    changes = {**EVERY_STAGE, "model": {"device": "cuda"}}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        run_all(make_recipe(**changes, run_dir=str(tmp_path / "straight")))
        recipe = make_recipe(**changes, run_dir=str(tmp_path / "stopped"))
        for stage in recipe.stages:
            with pytest.raises(Interrupted), open_run(recipe, StopAtOnce()) as run:
                run.train(stage)
            with open_run(recipe, Progress()) as run:
                run.train(stage)
        run_all(recipe)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_outcome(tmp_path / "stopped", outcome(tmp_path / "straight"))


class StopAtOnce(Progress):
    """Asks the loop to stop in its first step, as SIGTERM does."""

    def step(self, step: int, metrics: Any) -> None:
        if step == 1 and "loss/total" in metrics:
            os.kill(os.getpid(), signal.SIGTERM)


def test_peak_memory_hardly_grows_with_the_number_of_samples(make_policy: MakePolicy):
    # rows are scored and trained one micro-batch at a time: beyond a micro-batch, a row adds its
    # ids, masks and indices, but no activations
    policy = make_policy().to("cuda")
    policy.max_tokens = 64

    def peak(copies: int) -> int:
        batch = token_batch(PROMPTS * copies, RESPONSES * copies, device="cuda")
        policy.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        accumulate_nll(policy, batch)
        return torch.cuda.max_memory_allocated() - before

    peak(4)  # libraries allocate workspaces at first use
    few, many = 4 * len(PROMPTS), 64 * len(PROMPTS)
    growth = (peak(64) - peak(4)) / (many - few)
    assert growth < 0.1 * peak(4) / few


def test_the_benchmark_s_step_runs_on_the_gpu(benchmark_module, tmp_path: Path):
    gpu = benchmark_module("gpu")
    model = gpu.scratch_model(tmp_path / "model", tiny=True)
    setting = gpu.Setting(folder=str(tmp_path), model=str(model), device="cuda", **gpu.TINY)
    assert gpu.step_reftune(setting)["step_s"] > 0
