"""What a recipe would take on given hardware, from the model's configuration alone: memory by part,
time of a step by phase.

The equations are in docs/scaling.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reftune.advice.memory import FP32, Memory, Outline, Sharding, Sizes, Work, training_memory
from reftune.errors import ModelError, RecipeError
from reftune.model.scratch import make_scratch
from reftune.model.weights import resolve
from reftune.recipe import ModelTable, Recipe
from reftune.runs.run import load_splits, scratch_texts

GB = 10**9
NODE = 8
"""GPUs of a machine that its fast links join."""
NETWORK = 50 * GB
"""Bytes a second of a GPU to other machines: one 400 Gbit/s adapter each, as in NVIDIA's DGX H100.
"""
DECODE_EFFICIENCY = 0.5
"""Share of the roofline that decoding reaches; the benchmark's target."""
PROMPT = 128
"""Tokens of a prompt where neither the recipe nor the user says."""


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
    """Memory of the stage that needs most, under each way to share it out; a step of each RL
    stage."""

    recipe: str
    stage: str
    weights: int
    trained: int
    dtype: str
    hardware: Hardware
    prompt: int
    response: int
    memory: Mapping[Sharding, Memory]
    """By sharding."""
    topology: str
    sharding: str | None
    """The simplest that fits; None where none does."""
    steps: Mapping[str, Mapping[str, Phase]]
    """Stage → phase → time, under `sharding`, or the one that takes least where none fits."""
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
    `lengths.max_prompt`, else 128, and `max_new`.

    Raises: RecipeError where no such stage trains the policy; ModelError where the configuration
    cannot be read.
    """
    if recipe.model.dtype == "auto":  # every GPU of `GPUS` multiplies bf16
        table = recipe.model.model_copy(update={"dtype": "bfloat16"})
        recipe = recipe.model_copy(update={"model": table})
    trained = {name: stage for name, stage in trainings(recipe).items() if only in (None, name)}
    if not trained:
        wanted = (
            "a stage of kind sft, self_train or rl"
            if only is None
            else f"one of {', '.join(trainings(recipe))}"
        )
        raise RecipeError(
            f"{recipe.name}: nothing to plan for{f' in {only}' * (only is not None)}; expected"
            f" {wanted}"
        )
    outline = Outline(model_maker(recipe), recipe.model, device="cuda")
    prompt, response = (
        prompt or recipe.lengths.max_prompt or PROMPT,
        response or recipe.lengths.max_new,
    )
    shardings: Sequence[Sharding] = ("one",) if hardware.gpus == 1 else ("one", "ddp", "fsdp2")
    of_stage = {
        name: {
            way: _memory(outline, stage, recipe, hardware, way, prompt, response)
            for way in shardings
        }
        for name, stage in trained.items()
    }
    stage = max(of_stage, key=lambda name: of_stage[name]["one"].peak)
    memory = of_stage[stage]
    usable = [way for way in shardings if way != "one" or hardware.gpus == 1]
    fitting = next((way for way in usable if memory[way].peak <= hardware.memory), None)
    cost = Cost(
        sizes=outline.sizes, hardware=hardware, recipe=recipe, prompt=prompt, response=response
    )
    smallest: Sharding = min(usable, key=lambda way: memory[way].peak)
    chosen = fitting or smallest
    reinforced = {name: stage for name, stage in trained.items() if hasattr(stage, "prompts")}
    return Plan(
        recipe=recipe.name,
        stage=stage,
        weights=outline.sizes.total,
        trained=outline.sizes.trained,
        dtype=recipe.model.dtype,
        hardware=hardware,
        prompt=prompt,
        response=response,
        memory=memory,
        topology="split" if getattr(recipe.engine, "server", None) else "colocated",
        sharding=fitting,
        steps={name: cost.step(stage, chosen) for name, stage in reinforced.items()},
        split={
            name: cost.best_split(stage, chosen)
            for name, stage in reinforced.items()
            if hardware.gpus > 1
        },
    )


def _memory(
    outline: Outline,
    stage: Any,
    recipe: Recipe,
    hardware: Hardware,
    way: Sharding,
    prompt: int,
    response: int,
) -> Memory:
    gpus = 1 if way == "one" else hardware.gpus
    work = stage_work(stage, recipe, prompt=prompt, response=response, gpus=gpus)
    return training_memory(
        outline, stage, recipe.engine, work, sharding=way, gpus=gpus, device_bytes=hardware.memory
    )


def trainings(recipe: Recipe) -> dict[str, Any]:
    """What trains the whole policy, by stage: an RL stage, or a supervised schedule."""
    stages = {
        name: stage.sft if stage.kind == "self_train" else stage
        for name, stage in recipe.stages.items()
    }
    return {
        name: stage
        for name, stage in stages.items()
        if recipe.stages[name].kind in ("sft", "self_train", "rl")
    }


def stage_work(
    stage: Any,
    recipe: Recipe,
    *,
    prompt: int,
    response: int,
    gpus: int = 1,
    problems: int | None = None,
) -> Work:
    """What a device does at once; `problems`: most that are decoded in one go, where that is
    known."""
    sequences = stage.prompts * stage.samples if hasattr(stage, "prompts") else stage.batch_size
    rows = getattr(recipe.engine, "batch_size", 1)
    return Work(
        prompt=prompt,
        response=response,
        batch=min(math.ceil(sequences / gpus), micro_batch_sequences(recipe, prompt, response)),
        rows=rows if problems is None else min(rows, math.ceil(problems / gpus)),
    )


def micro_batch_sequences(recipe: Recipe, prompt: int, response: int) -> int:
    """Sequences of so many tokens in one forward and backward pass, one at least."""
    return max(1, recipe.model.micro_batch_tokens // (prompt + response))


def model_maker(recipe: Recipe) -> Any:
    """What builds the recipe's model from its configuration. Raises: ModelError."""
    table = recipe.model
    if table.scratch is not None:
        texts, scratch = scratch_texts(recipe.format, load_splits(recipe)), table.scratch
        return lambda: make_scratch(scratch, texts, seed=0)[0]
    from transformers import AutoModelForCausalLM

    config = read_config(table)
    return lambda: AutoModelForCausalLM.from_config(
        config, trust_remote_code=table.trust_remote_code
    )


def read_config(table: ModelTable) -> Any:
    """The configuration in a model's folder or Hub repository. Raises: ModelError."""
    from transformers import AutoConfig

    assert table.path is not None
    try:
        return AutoConfig.from_pretrained(
            resolve(table.path),
            revision=table.revision or "main",
            trust_remote_code=table.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{table.path}: no config.json can be read; expected a model folder or a Hub id:"
            f" {reason}"
        ) from None


# --- time -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Time of a step, by arithmetic and bytes."""

    sizes: Sizes
    hardware: Hardware
    recipe: Recipe
    prompt: int
    response: int

    @property
    def rate(self) -> float:
        """FLOP/s that one GPU reaches."""
        peak: float = getattr(GPUS[self.hardware.kind], self.recipe.model.dtype)
        return peak * self.hardware.mfu

    @property
    def forward(self) -> float:
        """FLOPs of one sequence: 2 a weight and token, causal attention, logits of the response
        only."""
        length = self.prompt + self.response
        attention = 2 * self.sizes.layers * self.sizes.hidden * length**2
        return 2 * self.sizes.trunk * length + attention + self.head

    @property
    def head(self) -> float:
        return 2 * self.sizes.vocabulary * self.sizes.hidden * self.response

    def step(self, stage: Any, way: str, *, samplers: int | None = None) -> dict[str, Phase]:
        """Phases of a step; `samplers`: so many GPUs only sample, and the others only train."""
        trainers = self.hardware.gpus if samplers is None else self.hardware.gpus - samplers
        return {
            "generate": self.generate(stage, samplers or self.hardware.gpus, way),
            "score": self.score(stage, trainers),
            "update": self.update(stage, trainers, way),
        }

    def generate(self, stage: Any, gpus: int, way: str) -> Phase:
        """Each GPU its part of the samples: prompts once, then a token a row at a time."""
        gpu, sizes = GPUS[self.hardware.kind], self.sizes
        rollouts = math.ceil(stage.prompts * stage.samples / gpus)
        rows = min(rollouts, getattr(self.recipe.engine, "batch_size", rollouts))
        waves = rollouts / rows
        width = FP32 if self.recipe.model.dtype == "float32" else 2
        reading = width * sizes.total / gpu.memory
        context = self.prompt + self.response / 2
        cache = rows * context * sizes.cache_bytes / gpu.memory
        arithmetic = rows * 2 * sizes.total / getattr(gpu, self.recipe.model.dtype)
        token_s = max(reading + cache, arithmetic) / DECODE_EFFICIENCY
        prefill_s = math.ceil(rollouts / stage.samples) * 2 * sizes.trunk * self.prompt / self.rate
        gather_s = (
            FP32 * sizes.total * (gpus - 1) / gpus / self.hardware.link if way == "fsdp2" else 0.0
        )
        decode_s = waves * self.response * token_s
        costs = {"reading prompts": prefill_s, "gathering weights": gather_s}
        if arithmetic > reading + cache:
            costs["arithmetic"] = decode_s
        else:
            costs[
                f"reading the weights for {rows} rows" if reading >= cache else "reading the cache"
            ] = decode_s
        return Phase(seconds=sum(costs.values()), bound=max(costs, key=costs.__getitem__))

    def score(self, stage: Any, gpus: int) -> Phase:
        """Policy and reference, and a value model of its own."""
        passes = 2 if stage.algorithm.needs_reference else 1
        flops = passes * self.forward + self._value_model(stage)
        return Phase(
            seconds=stage.prompts * stage.samples * flops / gpus / self.rate, bound="arithmetic"
        )

    def update(self, stage: Any, gpus: int, way: str) -> Phase:
        """A backward pass is two forward passes; frozen weights need no gradient, so adapters save
        the half of it."""
        backward = 2 if self.recipe.model.lora is None else 1
        rollouts = stage.prompts * stage.samples
        compute_s = (
            rollouts * (1 + backward) * (self.forward + self._value_model(stage)) / gpus / self.rate
        )
        told_s = self._communication(rollouts, gpus, way)
        bound = "arithmetic" if compute_s >= told_s else "moving weights and gradients between GPUs"
        seconds = max(compute_s, told_s) if way == "fsdp2" else compute_s + told_s
        return Phase(seconds=stage.updates * seconds, bound=bound)

    def _communication(self, rollouts: int, gpus: int, way: str) -> float:
        """Seconds of one pass. DDP sums gradients once; FSDP2 gathers weights twice and scatters
        gradients each micro-batch."""
        share, sizes = (gpus - 1) / gpus, self.sizes
        if way != "fsdp2":
            return 2 * share * FP32 * sizes.trained / self.hardware.link
        micro_batches = math.ceil(
            rollouts / gpus / micro_batch_sequences(self.recipe, self.prompt, self.response)
        )
        return micro_batches * share * FP32 * (2 * sizes.total + sizes.trained) / self.hardware.link

    def _value_model(self, stage: Any) -> float:
        return self.forward - self.head if stage.value_model == "separate" else 0.0

    def best_split(self, stage: Any, way: str) -> dict[str, Any]:
        """The halves wait for each other, as samples are drawn of the newest weights."""
        seconds = {
            samplers: sum(
                phase.seconds for phase in self.step(stage, way, samplers=samplers).values()
            )
            for samplers in range(1, self.hardware.gpus)
        }
        best = min(seconds, key=seconds.__getitem__)
        return {
            "sampling_gpus": best,
            "training_gpus": self.hardware.gpus - best,
            "seconds": seconds[best],
        }


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
