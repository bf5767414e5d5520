"""What a recipe would take on given hardware, from the model's configuration alone: memory by part,
time of a step by phase.

The equations are in docs/scaling.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reftune.errors import RecipeError
from reftune.recipe import Recipe
from reftune.runs.run import load_splits, scratch_texts
from reftune.stages.memory import (
    FP32,
    Memory,
    Outline,
    Sharding,
    Sizes,
    Work,
    fitting,
    outline_of,
    stage_memory,
)
from reftune.stages.stage import Cost

GB = 10**9
NODE = 8
"""GPUs of a machine that its fast links join."""
NETWORK = 50 * GB
"""Bytes a second of a GPU to other machines: one 400 Gbit/s adapter each, as in NVIDIA's DGX H100.
"""
DECODE_EFFICIENCY = 0.5
"""Share of the roofline that decoding reaches; the benchmark's target."""
PROMPT = 256
"""Tokens of a prompt if neither the recipe nor the user says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Peak rates, from NVIDIA's data sheets, dense, SXM versions."""

    bfloat16: float
    """FLOP/s."""
    float32: float
    memory: float
    """Bytes a second."""
    link: float
    """Bytes a second and direction to GPUs of the same machine."""


GPUS = {
    "a100": Gpu(bfloat16=312e12, float32=19.5e12, memory=2.039e12, link=300e9),
    "h100": Gpu(bfloat16=989e12, float32=67e12, memory=3.35e12, link=450e9),
    "h200": Gpu(bfloat16=989e12, float32=67e12, memory=4.8e12, link=450e9),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """What the plan is for, and what it assumes of it."""

    gpus: int
    memory: float
    """Bytes of one GPU."""
    kind: str
    mfu: float
    """Share of the peak arithmetic that scoring and updating reach."""

    @property
    def link(self) -> float:
        """Bytes a second of the slowest link that a GPU's share of a collective passes."""
        return GPUS[self.kind].link if self.gpus <= NODE else NETWORK


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A part of a step."""

    seconds: float
    bound: str
    """What takes the time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Memory of the stage that needs most, under each way to share it out; a step of each stage
    that samples."""

    recipe: str
    stage: str
    weights: int
    trained: int
    dtype: str
    hardware: Hardware
    prompt: int
    response: int
    sizes: Mapping[Sharding, Sizes]
    """By sharding; the recipe's, or what fits if it says `auto`."""
    memory: Mapping[Sharding, Memory]
    topology: str
    sharding: Sharding | None
    """The simplest that fits; None if none does."""
    steps: Mapping[str, Mapping[str, Phase]]
    """Stage → phase → time, under `sharding`, or the one that takes least if none fits."""
    split: Mapping[str, Mapping[str, Any]]
    """Stage → the best division into GPUs that sample and GPUs that train, and the step's seconds.
    """


def make_plan(
    recipe: Recipe,
    hardware: Hardware,
    *,
    prompt: int | None = None,
    response: int | None = None,
    only: str | None = None,
) -> Plan:
    """Of all stages, or `only` one. Tokens of prompts and responses: by default
    `lengths.max_prompt`, else 256, and `max_new`.

    Raises: RecipeError if no such stage says what it costs; ModelError if the configuration cannot
    be read.
    """
    if recipe.model.dtype == "auto":  # every GPU of `GPUS` multiplies bf16
        table = recipe.model.model_copy(update={"dtype": "bfloat16"})
        recipe = recipe.model_copy(update={"model": table})
    costs = stage_costs(recipe)
    wanted = {name: cost for name, cost in costs.items() if only in (None, name)}
    if not wanted:
        where = "" if only is None else f" in {only}"
        expected = f"one of {', '.join(costs)}" if costs else "a stage that says what it costs"
        raise RecipeError(f"{recipe.name}: nothing to plan for{where}; expected {expected}")
    texts = scratch_texts(recipe.format, load_splits(recipe)) if recipe.model.scratch else ()
    planner = Planner(
        recipe=recipe,
        hardware=hardware,
        outline=outline_of(recipe.model, texts, device="cuda"),
        prompt=prompt or recipe.lengths.max_prompt or PROMPT,
        response=response or recipe.lengths.max_new,
    )
    ways: Sequence[Sharding] = ("one",) if hardware.gpus == 1 else ("one", "ddp", "fsdp2")
    memory = {
        name: {way: planner.memory(cost, way) for way in ways} for name, cost in wanted.items()
    }
    stage = max(memory, key=lambda name: memory[name]["one"].peak)
    usable = [way for way in ways if way != "one" or hardware.gpus == 1]
    fits = [way for way in usable if memory[stage][way].peak <= hardware.memory]
    way = fits[0] if fits else min(usable, key=lambda way: memory[stage][way].peak)
    sampling = {name: cost for name, cost in wanted.items() if cost.sampled}
    many = sampling if hardware.gpus > 1 else {}
    return Plan(
        recipe=recipe.name,
        stage=stage,
        weights=planner.outline.total,
        trained=planner.outline.trained,
        dtype=recipe.model.dtype,
        hardware=hardware,
        prompt=planner.prompt,
        response=planner.response,
        sizes={way: planner.sizes(wanted[stage], way) for way in ways},
        memory=memory[stage],
        topology="split" if getattr(recipe.engine, "server", None) else "colocated",
        sharding=way if fits else None,
        steps={name: planner.step(cost, way) for name, cost in sampling.items()},
        split={name: planner.best_split(cost, way) for name, cost in many.items()},
    )


def stage_costs(recipe: Recipe, *, num_train: int = 1, num_dev: int = 1) -> dict[str, Cost]:
    """By stage; those that cannot foretell it are left out."""
    costs = {
        name: stage.cost(num_train=num_train, num_dev=num_dev)
        for name, stage in recipe.stages.items()
    }
    return {name: cost for name, cost in costs.items() if cost is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Planner:
    """A recipe's model on given hardware: memory by part, time by arithmetic and bytes."""

    recipe: Recipe
    hardware: Hardware
    outline: Outline
    prompt: int
    response: int

    # --- memory ---

    def sizes(self, cost: Cost, way: Sharding) -> Sizes:
        """The recipe's sizes, and what fits for those that it leaves to us."""
        tokens = self.recipe.model.micro_batch_tokens
        rows = getattr(self.recipe.engine, "batch_size", cost.sampled or 1)
        found = Sizes(tokens=0, rows=0)
        if "auto" in (tokens, rows):
            found = fitting(
                self.outline,
                cost,
                self.recipe.engine,
                prompt=self.prompt,
                response=self.response,
                device_bytes=self.hardware.memory,
                sharding=way,
                gpus=self._gpus(way),
            )
        return Sizes(
            tokens=found.tokens if tokens == "auto" else tokens,
            rows=found.rows if rows == "auto" else rows,
        )

    def memory(self, cost: Cost, way: Sharding) -> Memory:
        """Of one GPU in a stage."""
        sizes, gpus = self.sizes(cost, way), self._gpus(way)
        work = work_of(cost, sizes, prompt=self.prompt, response=self.response, gpus=gpus)
        return stage_memory(
            self.outline,
            cost,
            self.recipe.engine,
            work,
            sharding=way,
            gpus=gpus,
            device_bytes=self.hardware.memory,
        )

    def _gpus(self, way: Sharding) -> int:
        return 1 if way == "one" else self.hardware.gpus

    # --- time ---

    @property
    def rate(self) -> float:
        """FLOP/s that one GPU reaches."""
        return self._peak * self.hardware.mfu

    @property
    def _peak(self) -> float:
        peak: float = getattr(GPUS[self.hardware.kind], self.recipe.model.dtype)
        return peak

    def flops(self, cost: Cost, *, backward: bool) -> float:
        """FLOPs of a pass over one sequence, counted in a trace; twice with a value model."""
        update = self.outline.update(self.prompt, self.response, 2)
        models = 2 if cost.value_model else 1
        return models * (update.flops if backward else update.forward_flops) / 2

    def step(self, cost: Cost, way: Sharding, *, samplers: int | None = None) -> dict[str, Phase]:
        """Phases of a step; `samplers`: so many GPUs only sample, and the others only train."""
        trainers = self.hardware.gpus if samplers is None else self.hardware.gpus - samplers
        flops = cost.batch * cost.scored * self.flops(cost, backward=False)
        return {
            "generate": self.generate(cost, samplers or self.hardware.gpus, way),
            "score": Phase(seconds=flops / trainers / self.rate, bound="arithmetic"),
            "update": self.update(cost, trainers, way),
        }

    def generate(self, cost: Cost, gpus: int, way: Sharding) -> Phase:
        """Each GPU its part of the samples: prompts once, then a token a row at a time."""
        gpu, total = GPUS[self.hardware.kind], self.outline.total
        rollouts = math.ceil(cost.sampled / gpus)
        rows = min(rollouts, self.sizes(cost, way).rows)
        width = FP32 if self.recipe.model.dtype == "float32" else 2
        reading = min(self.outline.weights, width * total) / gpu.memory
        context = self.prompt + self.response / 2
        cache = rows * context * self.outline.cache_bytes / gpu.memory
        arithmetic = rows * 2 * total / self._peak
        token_s = max(reading + cache, arithmetic) / DECODE_EFFICIENCY
        trunk = total - self.outline.ends
        prefill_s = math.ceil(cost.prompts / gpus) * 2 * trunk * self.prompt / self.rate
        share = (gpus - 1) / gpus if way == "fsdp2" else 0.0
        decode_s = rollouts / rows * self.response * token_s
        costs = {
            "reading prompts": prefill_s,
            "gathering weights": share * self.outline.weights / self.hardware.link,
        }
        if arithmetic > reading + cache:
            costs["arithmetic"] = decode_s
        elif reading >= cache:
            costs[f"reading the weights for {rows} rows"] = decode_s
        else:
            costs["reading the cache"] = decode_s
        return Phase(seconds=sum(costs.values()), bound=max(costs, key=costs.__getitem__))

    def update(self, cost: Cost, gpus: int, way: Sharding) -> Phase:
        """Forward and backward passes, blocks computed again included; DDP adds gradients up after
        them, FSDP2 moves weights beside them."""
        compute_s = cost.batch * self.flops(cost, backward=True) / gpus / self.rate
        told_s = self.communication(cost, gpus, way)
        bound = "arithmetic" if compute_s >= told_s else "moving weights and gradients between GPUs"
        seconds = max(compute_s, told_s) if way == "fsdp2" else compute_s + told_s
        return Phase(seconds=cost.updates * seconds, bound=bound)

    def communication(self, cost: Cost, gpus: int, way: Sharding) -> float:
        """Seconds of one pass. DDP sums gradients once; FSDP2 gathers weights twice and scatters
        gradients each micro-batch."""
        share, gradients = (gpus - 1) / gpus, FP32 * self.outline.trained
        if way != "fsdp2":
            return 2 * share * gradients / self.hardware.link
        batch = micro_batch(self.sizes(cost, way).tokens, self.prompt + self.response)
        micro_batches = math.ceil(cost.batch / gpus / batch)
        return micro_batches * share * (2 * self.outline.weights + gradients) / self.hardware.link

    def best_split(self, cost: Cost, way: Sharding) -> dict[str, Any]:
        """The halves wait for each other, as samples are drawn of the newest weights."""
        seconds = {
            samplers: sum(
                phase.seconds for phase in self.step(cost, way, samplers=samplers).values()
            )
            for samplers in range(1, self.hardware.gpus)
        }
        best = min(seconds, key=seconds.__getitem__)
        return {
            "sampling_gpus": best,
            "training_gpus": self.hardware.gpus - best,
            "seconds": seconds[best],
        }


def work_of(
    cost: Cost,
    sizes: Sizes,
    *,
    prompt: int,
    response: int,
    gpus: int = 1,
    problems: int | None = None,
) -> Work:
    """What a device does at once; `problems`: most that are decoded in one go, if that is known."""
    share = math.ceil(cost.batch / gpus)
    batch = min(share, micro_batch(sizes.tokens, prompt + response))
    rows = sizes.rows if problems is None else min(sizes.rows, math.ceil(problems / gpus))
    return Work(prompt=prompt, response=response, batch=batch, rows=rows)


def micro_batch(tokens: int, length: int) -> int:
    """Sequences of `length` tokens in a forward and backward pass, one at least."""
    return max(1, tokens // length)


# --- what a person sees ---------------------------------------------------------------------------

WAYS = {"one": "1 GPU", "ddp": "DDP", "fsdp2": "FSDP2"}


def plan_document(plan: Plan) -> dict[str, Any]:
    """For scripts: bytes and seconds."""
    memory = {
        way: {
            "parts": memory.parts,
            "peak": memory.peak,
            "busiest": memory.busiest,
            "fits": memory.peak <= plan.hardware.memory,
        }
        for way, memory in plan.memory.items()
    }
    steps = {
        name: {
            "phases": {phase: asdict(cost) for phase, cost in phases.items()},
            "seconds": sum(cost.seconds for cost in phases.values()),
            "bottleneck": _bottleneck(phases),
        }
        for name, phases in plan.steps.items()
    }
    facts = {
        name: getattr(plan, name)
        for name in ("recipe", "stage", "weights", "trained", "dtype", "prompt", "response")
    }
    facts["sizes"] = {way: asdict(sizes) for way, sizes in plan.sizes.items()}
    choice = {"topology": plan.topology, "sharding": plan.sharding, "split": dict(plan.split)}
    return {
        **facts,
        "memory": memory,
        **choice,
        "steps": steps,
        "assumed": _assumed(plan.hardware, plan.dtype),
    }


def _assumed(hardware: Hardware, dtype: str) -> dict[str, Any]:
    gpu = GPUS[hardware.kind]
    return {
        "gpus": hardware.gpus,
        "gpu": hardware.kind,
        "memory_bytes": hardware.memory,
        "mfu": hardware.mfu,
        "decode_efficiency": DECODE_EFFICIENCY,
        "flops": getattr(gpu, dtype),
        "bytes_s": gpu.memory,
        "link_bytes_s": hardware.link,
    }


def _bottleneck(phases: Mapping[str, Phase]) -> str:
    name = max(phases, key=lambda phase: phases[phase].seconds)
    return f"{name}: {phases[name].bound}"


def plan_text(plan: Plan) -> str:
    """For a person."""
    hardware, shown = plan.hardware, plan.hardware.kind.upper()
    head = (
        f"{plan.recipe}: {plan.weights:,} weights, {plan.trained:,} trained with the value head,"
        f" {plan.dtype}; {hardware.gpus} × {shown} with {hardware.memory / GB:g} GB"
    )
    parts = [head, _memory_text(plan)]
    parts += [_step_text(plan, name, phases) for name, phases in plan.steps.items()]
    assumed = _assumed(hardware, plan.dtype)
    parts.append(
        f"assumed: MFU {hardware.mfu:.0%} of {assumed['flops'] / 1e12:g} TFLOP/s, decoding at"
        f" {DECODE_EFFICIENCY:.0%} of its roofline ({assumed['bytes_s'] / 1e12:g} TB/s),"
        f" {assumed['link_bytes_s'] / GB:g} GB/s between GPUs, prompts of {plan.prompt} and"
        f" responses of {plan.response} tokens"
    )
    return "\n\n".join(parts)


def _memory_text(plan: Plan) -> str:
    ways = {
        way: WAYS[way] + (f" × {plan.hardware.gpus}" if way != "one" else "") for way in plan.memory
    }
    lines = [
        f"{'GB a GPU, stage ' + plan.stage:<24}" + "".join(f"{name:>12}" for name in ways.values())
    ]
    names = dict.fromkeys(name for memory in plan.memory.values() for name in memory.parts)
    lines += [
        f"{name:<24}" + "".join(_cell(plan.memory[way].parts.get(name)) for way in ways)
        for name in names
    ]
    for name in ("tokens", "rows"):
        label = {"tokens": "micro-batch, tokens", "rows": "decoded at once, rows"}[name]
        lines.append(
            f"{label:<24}" + "".join(f"{getattr(plan.sizes[way], name):>12,}" for way in ways)
        )
    lines.append(f"{'peak':<24}" + "".join(_cell(plan.memory[way].peak) for way in ways))
    lines.append(f"{'reached in':<24}" + "".join(f"{plan.memory[way].busiest:>12}" for way in ways))
    fits = (plan.memory[way].peak <= plan.hardware.memory for way in ways)
    lines.append(f"{'fits':<24}" + "".join(f"{'yes' if it else 'no':>12}" for it in fits))
    return "\n".join(lines)


def _cell(size: float | None) -> str:
    return f"{'–' if size is None else f'{size / GB:.2f}':>12}"


def _step_text(plan: Plan, name: str, phases: Mapping[str, Phase]) -> str:
    way = "fits nowhere; as it would be with room" if plan.sharding is None else WAYS[plan.sharding]
    lines = [f"a step of {name} ({way}, {plan.topology})"]
    lines += [
        f"  {phase:<10}{cost.seconds:>9.3g} s   {cost.bound}" for phase, cost in phases.items()
    ]
    lines.append(
        f"  {'all':<10}{sum(cost.seconds for cost in phases.values()):>9.3g} s   bottleneck:"
        f" {_bottleneck(phases)}"
    )
    if name in plan.split:
        split = plan.split[name]
        lines.append(
            f"  {'split':<10}{split['seconds']:>9.3g} s   of the GPUs {split['sampling_gpus']}"
            f" sample and {split['training_gpus']} train, in turn"
        )
    return "\n".join(lines)
