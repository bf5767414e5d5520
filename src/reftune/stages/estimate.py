"""Estimates the memory that each phase of a stage needs on a device. Finds the largest micro-batch
that fits, and the largest number of sequences that can be decoded at once.

This module serves `check` and `plan`, and chooses the sizes that a recipe sets to `auto`.
docs/experiments/plan.md has the equations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from reftune.engines.kv import ROOM
from reftune.recipe import Recipe
from reftune.stages.outline import FP32, Outline
from reftune.stages.stage import Cost

MOMENTS = {32: 8.0, 8: 2 + 2 * 4 / 256}
"""`state_bits` → bytes of AdamW's state per weight."""
DRAWING = 5
"""Number of fp32 tensors of size rows × vocabulary that exist while tokens are drawn."""
USABLE = 0.9
"""Share of a device's memory that a plan may fill. The rest is left for anything that the estimate
does not count."""
TOKENS = tuple(2**n for n in range(14, 8, -1))
"""Candidate micro-batch sizes in tokens, from large to small. Even larger sizes would be no
faster."""
ROWS = tuple(2**n for n in range(8, -1, -1))
"""Candidate numbers of sequences to decode at once, from large to small."""
PROMPT = 256
"""Assumed length of the longest prompt, in tokens, if the recipe sets no limit."""

Sharding = Literal["one", "ddp", "fsdp2"]
"""`one` is a single process. With `ddp`, each of several processes holds all weights. With `fsdp2`,
each process holds a part of the weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Values of `model.micro_batch_tokens` (`tokens`) and `engine.batch_size` (`rows`)."""

    tokens: int
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """The bytes that a stage needs on one device, by purpose."""

    held: Mapping[str, float]
    """Bytes held all the time."""
    phases: Mapping[str, Mapping[str, float]]
    """Phase → the additional bytes that it needs, by purpose. Only one phase runs at a time."""

    @property
    def parts(self) -> dict[str, float]:
        return {
            **self.held,
            **{name: size for parts in self.phases.values() for name, size in parts.items()},
        }

    def of(self, phase: str) -> float:
        """The bytes held during a phase."""
        return sum(self.held.values()) + sum(self.phases.get(phase, {}).values())

    @property
    def busiest(self) -> str:
        return max(self.phases, key=self.of)

    @property
    def peak(self) -> float:
        return self.of(self.busiest)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The memory that a running stage needs on each device. All devices are identical."""

    recipe: Recipe
    cost: Cost
    outline: Outline
    prompt: int
    """Length of the longest prompt, in tokens."""
    sharding: Sharding = "one"
    devices: int = 1
    replicas: int = 1
    """With `fsdp2`, the number of groups of devices. Each group holds one copy of the model."""
    device_bytes: float = 0.0
    """Total memory of a device."""
    mean_prompt: float | None = None
    """Length of the average prompt, in tokens, if known."""
    requests: int | None = None
    """Maximum number of completions that all processes together request from the engine in one
    call, if known."""

    @property
    def response(self) -> int:
        """Length of the longest response, in tokens."""
        return self.recipe.lengths.max_new

    @property
    def length(self) -> int:
        """Length of the longest sequence, in tokens."""
        return self.prompt + self.response

    def micro_batch(self, tokens: int) -> float:
        """The number of tokens in a step's largest pass, divided by `length`, the maximum length of
        a sequence. A pass has at most `tokens` tokens, unless a single sequence is longer. The
        result is at least 1."""
        packs = self.outline.policy.packs
        mean = ((packs and self.mean_prompt) or self.prompt) + self.response
        share = math.ceil(self.cost.batch / self.devices) * mean
        return max(1.0, min(share, tokens) / self.length)

    def is_one_pass(self, tokens: int) -> bool:
        """Whether each device's share of a step's sequences fits in one pass. If so, no gradients
        exist before the backward pass."""
        return math.ceil(self.cost.batch / self.devices) * self.length <= tokens

    @cached_property
    def sizes(self) -> Sizes:
        """The recipe's sizes. Each `auto` is replaced by the size that `fitting` returns."""
        tokens = self.recipe.model.micro_batch_tokens
        rows = getattr(self.recipe.engine, "batch_size", self.cost.sampled or 1)
        return Sizes(
            tokens=self.fitting.tokens if tokens == "auto" else tokens,
            rows=self.fitting.rows if rows == "auto" else rows,
        )

    @cached_property
    def memory(self) -> Memory:
        return self.memory_of(self.sizes)

    def memory_of(self, sizes: Sizes) -> Memory:
        """Memory needed on each device for passes of these sizes."""
        outline, cost = self.outline, self.cost
        is_split = self.sharding == "fsdp2"
        parts = self.devices // self.replicas if is_split else 1
        has_reference = cost.reference and not outline.policy.is_lora
        value_model = outline.backbone if cost.value_model else 0
        trained = outline.trained + value_model
        whole = {
            "weights": outline.weights + FP32 * value_model,
            "optimizer": MOMENTS[cost.state_bits] * trained,
            "reference": outline.reference if has_reference else 0.0,
        }
        held = {name: size / parts for name, size in whole.items()}
        update = outline.update(self.prompt, self.response, self.micro_batch(sizes.tokens))
        models = 2 if cost.value_model else 1
        activations = models * update.kept + update.momentary
        gradients = FP32 * trained / parts
        if self.is_one_pass(sizes.tokens):  # activations are freed as gradients arrive
            gradients = max(0.0, gradients - activations)
        training = {"gradients": gradients, "activations": activations}
        phases: dict[str, dict[str, float]] = {"update": training}
        own_share = getattr(self.recipe.engine, "device_share", None)
        sampling, copies = ({}, 0.0) if own_share is not None else self._sampling(sizes.rows)
        if own_share is None:
            copy = self.gathered + outline.gathered_copies if is_split else copies
            phases["generate"] = {**sampling, "engine's copy": copy}
        if cost.sampler:  # neither the policy nor its optimizer exists yet
            sampler = self._sampler(copies) - sum(held.values())
            phases["draw"] = {**sampling, "sampler": max(0.0, sampler)}
        if own_share is not None:
            held["engine's copy"] = own_share * self.device_bytes
        if is_split:
            training["gathered"] = float(FP32 * (2 * outline.ends + 3 * outline.layer))
            if cost.scored:
                phases["score"] = {"gathered to score": self.gathered}
            phases["save"] = {"gathered to save": whole["weights"]}
            start = whole["weights"] + whole["reference"] - sum(held.values())
            phases["start"] = {"loading": max(0.0, start)}
        return Memory(held=held, phases=phases)

    @property
    def gathered(self) -> float:
        """Bytes of the weights that FSDP2 gathers to sample or score. A separate value model is
        gathered too; it has no output head."""
        outline = self.outline
        if not self.cost.value_model:
            return outline.gathered
        return 2 * outline.gathered - FP32 * (outline.total - outline.backbone)

    def _sampler(self, copies: float) -> float:
        """Bytes that each device needs for the sampler, a model that is loaded only to sample. This
        includes the engine's copies of the sampler's weights, which take at most `copies` bytes."""
        outline, table = self.outline, self.outline.table
        is_frozen = table.lora is not None or table.gradient_checkpointing
        if is_frozen:
            return outline.reference + min(copies, outline.gathered_copies)
        return outline.weights + copies

    def _sampling(self, rows: int) -> tuple[dict[str, float], float]:
        """A pair. The first item maps each use of memory to its size in bytes when up to `rows`
        sequences are sampled at once. The second is the size, in bytes, of the copies that the
        engine makes of the policy's weights. This size assumes that FSDP2 does not split the
        weights."""
        if self.requests is not None:
            rows = min(rows, math.ceil(self.requests / self.devices))
        outline = self.outline
        prefill = outline.prefill(prompt=self.prompt, rows=rows)
        return {
            "KV cache": float(outline.cache_bytes * rows * (self.length + ROOM)),
            "reading prompts": float(prefill.momentary),
            "drawing tokens": float(DRAWING * FP32 * rows * outline.vocabulary),
        }, float(prefill.casts)

    @cached_property
    def fitting(self) -> Sizes:
        """The largest value in `TOKENS` with which the update fits in a device's usable memory, and
        the largest value in `ROWS` with which sampling fits. If no value in a list fits, the list's
        smallest value is returned."""
        room = USABLE * self.device_bytes

        def fits(phase: str, sizes: Sizes) -> bool:
            return self.memory_of(sizes).of(phase) <= room

        few, one = TOKENS[-1], ROWS[-1]
        tokens = (t for t in TOKENS if fits("update", Sizes(tokens=t, rows=one)))
        sizes = (Sizes(tokens=few, rows=r) for r in ROWS)
        rows = (s.rows for s in sizes if fits("generate", s) and fits("draw", s))
        return Sizes(tokens=next(tokens, few), rows=next(rows, one))


def estimates(
    recipe: Recipe, outline: Outline, *, prompt: int | None = None
) -> dict[str, Estimate]:
    """A memory estimate for each stage, with one process on one device. Stages that cannot predict
    their cost are left out. `prompt` is the length of the longest prompt, in tokens. If it is None,
    the recipe's limit is used, or `PROMPT` if there is no limit."""
    prompt = prompt or recipe.lengths.max_prompt or PROMPT
    return {
        name: Estimate(recipe=recipe, cost=cost, outline=outline, prompt=prompt)
        for name, cost in stage_costs(recipe).items()
    }


def stage_costs(
    recipe: Recipe, *, num_train: int = 1, num_rationales: int | None = None, num_dev: int = 1
) -> dict[str, Cost]:
    """The `Cost` of each stage. Stages that cannot predict their cost are left out. Of `num_train`
    training problems, `num_rationales` have a rationale; by default, all have one. `num_dev` is the
    number of dev problems."""
    supervised = num_train if num_rationales is None else num_rationales
    costs = {
        name: stage.cost(
            num_train=supervised if stage.reads_rationales else num_train, num_dev=num_dev
        )
        for name, stage in recipe.stages.items()
    }
    return {name: cost for name, cost in costs.items() if cost is not None}
