"""Measures this machine's speed of training and sampling, and its free memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from reftune.algorithms.base import masked_mean
from reftune.engines import Engine
from reftune.model.batch import TokenBatch, token_batch
from reftune.model.policy import Policy
from reftune.runs.auto import total_bytes
from reftune.stages.stage import Pace
from reftune.types import SamplingParams

WARM_TOKENS = 256
"""Before training is timed, an untimed pass reads up to this many tokens, because the first pass
chooses kernels, casts weights and allocates memory."""
WARM_NEW_TOKENS, FEWEST_NEW_TOKENS = 2, 12
"""Number of tokens sampled per row to warm up, and minimum number of tokens sampled per row to
measure the speed."""
BUDGET_S = 8.0
"""Target duration of a timed pass, in seconds."""
STEADY_S = 0.5
"""A pass shorter than this is repeated until this many seconds have elapsed."""
SCORING_COST = 1 / 3
"""Cost of a forward pass, as a share of the cost of a forward and backward pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    train: float
    """Prompt and response tokens per second, in forward and backward passes."""
    sample: float
    """Response tokens per second, over all rows."""

    def pace(self, *, prompt: float, response: float) -> Pace:
        """Seconds per sequence. `prompt` and `response` are mean lengths in tokens."""
        update = (prompt + response) / self.train
        return Pace(generate=response / self.sample, score=SCORING_COST * update, update=update)


def measure_speed(
    policy: Policy,
    engine: Engine,
    prompts: Sequence[list[int]],
    targets: Sequence[list[int]],
    *,
    rows: int,
    max_tokens: int,
) -> Speed:
    """Measure the speed of sampling for the first `rows` prompts, and of training on these prompts
    and their targets. An untimed pass precedes each measurement. A training pass takes no optimizer
    step. The timed training pass uses as many rows as fit in `max_tokens` and the time budget, but
    at least one. If a prompt is so long that its sample could exceed the model's context, only the
    prompt's end is used for sampling."""
    batch = token_batch(prompts[:rows], targets[:rows], device=policy.device)
    length = math.ceil(sum(map(len, targets)) / len(targets))
    context = policy.context
    room = 0 if context is None else max(1, context - max(length, FEWEST_NEW_TOKENS))
    return Speed(
        train=_train_speed(policy, batch, max_tokens),
        sample=_sample_speed(policy, engine, [ids[-room:] for ids in prompts[:rows]], length),
    )


def _train_speed(policy: Policy, batch: TokenBatch, max_tokens: int) -> float:
    few = _rows_within(batch, WARM_TOKENS)
    _training_pass(policy, few)
    affordable = BUDGET_S * int(few.lengths.sum()) / _seconds(lambda: _training_pass(policy, few))
    many = _rows_within(batch, min(max_tokens, affordable))
    return int(many.lengths.sum()) / _seconds(lambda: _training_pass(policy, many))


def _rows_within(batch: TokenBatch, max_tokens: float) -> TokenBatch:
    """The batch's first rows: as many as fit in `max_tokens` with their padding, but at least
    one."""
    count = max(1, int(max_tokens // int(batch.lengths.max())))
    return batch.rows(torch.arange(min(count, len(batch.lengths))))


def _training_pass(policy: Policy, batch: TokenBatch) -> None:
    masked_mean(policy(batch).logprobs, batch.response_mask).backward()
    policy.zero_grad(set_to_none=True)
    if policy.device.type == "cuda":
        torch.cuda.synchronize(policy.device)


def _sample_speed(
    policy: Policy, engine: Engine, prompts: Sequence[list[int]], num_tokens: int
) -> float:
    """The speed of sampling a solution of `num_tokens` tokens for each prompt, in tokens per second
    for all prompts together. If time is short, shorter solutions of at least `FEWEST_NEW_TOKENS`
    tokens are measured. If the measured solutions do not have `num_tokens` tokens, the speed at
    `num_tokens` is extrapolated. For a solution of one token, the time for `WARM_NEW_TOKENS` tokens
    is used."""

    longest = max(map(len, prompts))

    def sample(length: int) -> int:
        params = SamplingParams(max_new_tokens=length, max_prompt_tokens=longest)
        completions = engine.generate(policy, prompts, params)
        return sum(len(completion.token_ids) for completion in completions)

    sample(WARM_NEW_TOKENS)
    begun_s = _seconds(lambda: sample(WARM_NEW_TOKENS))  # mostly the time to read the prompts
    length = max(FEWEST_NEW_TOKENS, min(num_tokens, int(BUDGET_S / begun_s * WARM_NEW_TOKENS)))
    started = time.perf_counter()
    num_sampled = sample(length)
    seconds = time.perf_counter() - started
    step_s = max(0.0, seconds - begun_s) / (length - WARM_NEW_TOKENS)
    # for fewer than WARM_NEW_TOKENS tokens, an extrapolated time could be negative
    seconds += step_s * (max(num_tokens, WARM_NEW_TOKENS) - length)
    return num_sampled * (num_tokens / length) / seconds


def _seconds(act: Callable[[], object]) -> float:
    started, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - started < STEADY_S:
        act()
        calls += 1
    return (time.perf_counter() - started) / calls


def available_bytes(device: torch.device) -> float:
    """The device's free memory in bytes. On a CPU, the result is at most one process's share of the
    memory of the machine or container."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="ascii").splitlines() if meminfo.is_file() else []
    free = [float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([*free, total_bytes(device)])
