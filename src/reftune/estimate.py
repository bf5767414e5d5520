"""What a run will need: memory from the model's shape, time from a short measurement on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reftune.batch import TokenBatch, micro_batches, token_batch
from reftune.datasets import Splits
from reftune.engines import Engine
from reftune.losses import masked_mean
from reftune.policy import LOGIT_ELEMENTS, Policy
from reftune.recipe import Recipe
from reftune.types import SamplingParams

ACTIVATIONS_PER_TOKEN = 24
"""Numbers kept for the backward pass of one token in one layer, in units of the hidden size, for Llama-like layers."""
MEASURED_TOKENS = 1024
"""Trained on, at most, to learn the speed."""
LONG_PASS_S = 1.0
MEASURED_ROWS = 64
MEASURED_NEW_TOKENS = 16
SCORING_COST = 1 / 3
"""Of a forward pass, in units of a forward and backward pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Tokens a second on this machine."""

    train: float
    """Prompt and response, forward and backward."""
    sample: float
    """Responses, all rows together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Mean lengths of the training rows, tokens."""

    prompt: float
    target: float


def measure_speed(policy: Policy, engine: Engine, prompts: Sequence[list[int]], targets: Sequence[list[int]]) -> Speed:
    """Train on a few rows (no optimizer step) and sample a few tokens."""
    return Speed(train=_train_speed(policy, prompts, targets), sample=_sample_speed(policy, engine, prompts))


def _train_speed(policy: Policy, prompts: Sequence[list[int]], targets: Sequence[list[int]]) -> float:
    lengths = torch.tensor([len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True)])
    index = next(micro_batches(lengths, max_tokens=MEASURED_TOKENS)).tolist()
    batch = token_batch([prompts[i] for i in index], [targets[i] for i in index], device=policy.device)
    seconds = _training_pass_seconds(policy, batch)
    if seconds < LONG_PASS_S:
        seconds = _training_pass_seconds(policy, batch)  # the first one also allocated, which counts where it is short
    return int(batch.lengths.sum()) / seconds


def _training_pass_seconds(policy: Policy, batch: TokenBatch) -> float:
    started = time.perf_counter()
    masked_mean(policy(batch).logprobs, batch.response_mask).backward()
    policy.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def _sample_speed(policy: Policy, engine: Engine, prompts: Sequence[list[int]]) -> float:
    started = time.perf_counter()
    completions = engine.generate(policy, prompts[:MEASURED_ROWS], SamplingParams(max_new_tokens=MEASURED_NEW_TOKENS))
    return sum(len(completion.token_ids) for completion in completions) / (time.perf_counter() - started)


def stage_seconds(recipe: Recipe, splits: Splits, lengths: Lengths, speed: Speed) -> dict[str, float]:
    """Seconds by stage, looks at dev included; at most, where equal samples count once. A user's own stages are left out."""
    look_s, num_train = len(splits.dev) * lengths.target / speed.sample, len(splits.train)
    seconds = {}
    for name, stage in recipe.stages.items():
        if stage.kind == "sft":
            seconds[name] = _sft_seconds(stage, num_train, lengths, speed, look_s)
        elif stage.kind == "self_train":
            sampling_s = stage.samples * num_train * lengths.target / speed.sample
            seconds[name] = sampling_s + _sft_seconds(stage.sft, (1 + stage.keep) * num_train, lengths, speed, look_s)
        elif stage.kind == "reward_model":
            num_sampled = stage.samples * num_train + stage.dev_samples * len(splits.dev)
            seconds[name] = num_sampled * lengths.target / speed.sample
            seconds[name] += _sft_seconds(stage, stage.samples * num_train, lengths, speed, look_s)
        elif stage.kind == "rl":
            seconds[name] = _rl_seconds(stage, lengths, speed, look_s)
    return seconds


def evaluation_seconds(recipe: Recipe, splits: Splits, num_methods: int, lengths: Lengths, speed: Speed) -> float:
    """Seconds of the final evaluation of so many methods."""
    num_problems = len(getattr(splits, recipe.evaluate.split)[: recipe.evaluate.limit])
    return num_methods * num_problems * (1 + recipe.evaluate.samples) * lengths.target / speed.sample


def _sft_seconds(schedule: Any, num_rows: int, lengths: Lengths, speed: Speed, look_s: float) -> float:
    train_s = schedule.epochs * num_rows * (lengths.prompt + lengths.target) / speed.train
    return float(train_s + schedule.epochs / schedule.eval_every * look_s)


def _rl_seconds(stage: Any, lengths: Lengths, speed: Speed, look_s: float) -> float:
    rollouts = stage.prompts * stage.samples
    passes = stage.updates + SCORING_COST * (2 if stage.algorithm.needs_reference else 1)
    step_s = rollouts * (lengths.target / speed.sample + passes * (lengths.prompt + lengths.target) / speed.train)
    prefit_s = rollouts * stage.value_prefit * lengths.target / speed.sample
    return float(stage.steps * step_s + prefit_s + stage.steps / stage.eval_every * look_s)


def memory_parts(policy: Policy, recipe: Recipe, *, longest_prompt: int) -> dict[str, float]:
    """Bytes by purpose at the busiest moment of training, where a micro-batch is full of tokens."""
    config = policy.model.config
    total = sum(parameter.numel() for parameter in policy.parameters())
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    tokens = recipe.model.micro_batch_tokens
    width = 4 if policy.compute_dtype == torch.float32 else 3  # autocast keeps part of it in fp32
    copies = [stage for stage in recipe.stages.values() if stage.kind == "rl" and stage.algorithm.needs_reference]
    return {
        "weights": 4.0 * total,
        "gradients": 4.0 * trained,
        "optimizer": 8.0 * trained,
        "reference": 4.0 * total if copies and not policy.is_lora else 0.0,
        "activations": float(ACTIVATIONS_PER_TOKEN * config.hidden_size * config.num_hidden_layers * tokens * width),
        "logits": 3 * 4.0 * min(LOGIT_ELEMENTS, tokens * config.vocab_size),
        "cache": _cache_bytes(
            config, rows=getattr(recipe.engine, "batch_size", 1), length=longest_prompt + recipe.lengths.max_new
        ),
    }


def _cache_bytes(config: Any, *, rows: int, length: int) -> float:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return float(4 * 2 * config.num_hidden_layers * kv_heads * head_dim * rows * length)


def peak_bytes(parts: Mapping[str, float]) -> float:
    """Sampling and updating take turns, so the cache and the activations do not add up."""
    update = parts["activations"] + parts["logits"] + parts["gradients"]
    return parts["weights"] + parts["optimizer"] + parts["reference"] + max(update, parts["cache"])


def available_bytes(device: torch.device) -> float:
    """Free memory of the device; infinite where it cannot be told."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), math.inf)
