"""Estimates, from the model's configuration, how much memory a recipe needs on given hardware and
how long its steps take. docs/experiments/plan.md has the equations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reftune.datasets import load_splits
from reftune.errors import RecipeError
from reftune.model.weights import scratch_texts
from reftune.recipe import Recipe
from reftune.stages.estimate import Estimate, Sharding, Sizes, estimates, stage_costs
from reftune.stages.outline import FP32, outline_of
from reftune.stages.stage import Pace
from reftune.text import counted

GB = 10**9
NODE = 8
"""Number of GPUs in a machine. Fast links join them."""
NETWORK = 50 * GB
"""Bytes per second from a GPU to other machines: one 400 Gbit/s adapter per GPU, as in NVIDIA's DGX
H100."""
DECODE_EFFICIENCY = 0.5
"""Share of the roofline's speed that decoding is assumed to reach. The target in benchmarks/step.py
is the same share."""
ARITHMETIC = "arithmetic"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """The peak rates of a GPU's SXM version, without sparsity. Source: NVIDIA's data sheets."""

    bfloat16: float
    """FLOP/s."""
    float32: float
    memory: float
    """Memory bandwidth in bytes per second."""
    link: float
    """Bytes per second, in each direction, to other GPUs of the same machine."""


GPUS = {
    "a100": Gpu(bfloat16=312e12, float32=19.5e12, memory=2.039e12, link=300e9),
    "h100": Gpu(bfloat16=989e12, float32=67e12, memory=3.35e12, link=450e9),
    "h200": Gpu(bfloat16=989e12, float32=67e12, memory=4.8e12, link=450e9),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """The hardware that a plan is made for, and what the plan assumes about this hardware."""

    gpus: int
    memory: float
    """Memory of one GPU, in bytes."""
    kind: str
    mfu: float
    """Share of the peak FLOP/s that scoring, updating and reading prompts are assumed to
    reach."""

    @property
    def gpu(self) -> Gpu:
        return GPUS[self.kind]

    @property
    def link(self) -> float:
        """Bytes per second of the slowest link that a collective operation uses."""
        return self.gpu.link if self.gpus <= NODE else NETWORK


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A part of a step."""

    seconds: float
    bound: str
    """What limits the phase's speed, such as `arithmetic` or `reading the cache`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The memory that a GPU needs under one sharding."""

    parts: Mapping[str, float]
    """Bytes by purpose."""
    peak: float
    busiest: str
    """The phase of a step in which the peak is reached."""
    fits: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A step of a sampling stage."""

    phases: Mapping[str, Phase]
    seconds: float
    bottleneck: str
    """The longest phase, and its `bound`."""
    steps: float
    stage_seconds: float
    """Seconds of the whole stage, excluding dev evaluations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The plan as `--json` prints it, in bytes, seconds and tokens."""

    recipe: str
    stage: Mapping[Sharding, str]
    """Sharding → the planned stage that needs the most memory on each GPU."""
    weights: int
    trained: int
    dtype: str
    prompt: int
    response: int
    sizes: Mapping[Sharding, Sizes]
    """Sharding → the batch sizes that the recipe sets or, for `auto`, the largest that fit."""
    memory: Mapping[Sharding, Share]
    topology: str
    sharding: Sharding | None
    """The simplest sharding that uses all GPUs and fits. None if no such sharding fits."""
    split: Mapping[str, Mapping[str, Any]]
    """Stage → the best division of the GPUs between sampling and training, and the seconds that a
    step then takes."""
    steps: Mapping[str, Step]
    """Sampling stage → its step under `sharding`. If `topology` is `split`, the GPUs are split as
    in `split`. If `sharding` is None, the step is computed for whichever sharding over all GPUs
    needs the least memory."""
    assumed: Mapping[str, Any]


def make_plan(
    recipe: Recipe,
    hardware: Hardware,
    *,
    prompt: int | None = None,
    response: int | None = None,
    only: str | None = None,
) -> Plan:
    """Estimate the memory that the stages need. If `only` is given, estimate it for that stage
    alone. For stages that sample in each step, also estimate the time per step. `prompt` and
    `response` are lengths in tokens, by default `lengths.max_prompt` (256 if unset) and
    `lengths.max_new`.

    Raises: RecipeError if no planned stage has a predictable cost; ModelError if the model's
    configuration cannot be read; DataError as in `load_splits`.
    """
    if recipe.model.dtype == "auto":  # every GPU in `GPUS` supports bf16
        table = recipe.model.model_copy(update={"dtype": "bfloat16"})
        recipe = recipe.model_copy(update={"model": table})
    costs = stage_costs(recipe)
    wanted = [name for name in costs if only in (None, name)]
    if not wanted:
        where = "" if only is None else f" in stage {only}"
        expected = f"one of {', '.join(costs)}" if costs else "a stage that can predict its cost"
        raise RecipeError(f"{recipe.name}: nothing to plan{where}; expected {expected}")
    if response is not None:
        lengths = recipe.lengths.model_copy(update={"max_new": response})
        recipe = recipe.model_copy(update={"lengths": lengths})
    texts = scratch_texts(recipe.format, load_splits(recipe)) if recipe.model.scratch else ()
    outline = outline_of(recipe.model, texts, device="cuda")
    made = estimates(recipe, outline, prompt=prompt)

    def planner(name: str, way: Sharding) -> Planner:
        devices = 1 if way == "one" else hardware.gpus
        estimate = replace(made[name], sharding=way, devices=devices, device_bytes=hardware.memory)
        return Planner(hardware=hardware, estimate=estimate)

    ways: Sequence[Sharding] = ("one",) if hardware.gpus == 1 else ("one", "ddp", "fsdp2")
    planners = {name: {way: planner(name, way) for way in ways} for name in wanted}
    stage = {way: max(wanted, key=lambda name: planners[name][way].share.peak) for way in ways}
    worst = {way: planners[name][way] for way, name in stage.items()}
    memory = {way: planned.share for way, planned in worst.items()}
    usable = ways[-2:]  # the shardings that use all GPUs
    fits = [way for way in usable if memory[way].fits]
    way = fits[0] if fits else min(usable, key=lambda way: memory[way].peak)
    sampling = {name: planners[name][way] for name in wanted if costs[name].sampled}
    splits = {name: of.best_split() for name, of in sampling.items() if hardware.gpus > 1}
    has_server = getattr(recipe.engine, "server", None) is not None
    samplers = {name: split["sampling_gpus"] for name, split in splits.items() if has_server}
    return Plan(
        recipe=recipe.name,
        stage=stage,
        weights=outline.total,
        trained=outline.trained,
        dtype=recipe.model.dtype,
        prompt=worst[way].estimate.prompt,
        response=recipe.lengths.max_new,
        sizes={way: planned.estimate.sizes for way, planned in worst.items()},
        memory=memory,
        topology="split" if has_server else "colocated",
        sharding=way if fits else None,
        split=splits,
        steps={name: of.step(samplers=samplers.get(name)) for name, of in sampling.items()},
        assumed={
            "gpus": hardware.gpus,
            "gpu": hardware.kind,
            "memory_bytes": hardware.memory,
            "mfu": hardware.mfu,
            "decode_efficiency": DECODE_EFFICIENCY,
            "flops": getattr(hardware.gpu, recipe.model.dtype),
            "bytes_s": hardware.gpu.memory,
            "link_bytes_s": hardware.link,
        },
    )


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Estimates the memory and the step time of a stage on given hardware."""

    hardware: Hardware
    estimate: Estimate

    @property
    def share(self) -> Share:
        memory = self.estimate.memory
        fits = memory.peak <= self.hardware.memory
        return Share(parts=memory.parts, peak=memory.peak, busiest=memory.busiest, fits=fits)

    # --- time ---

    @property
    def rate(self) -> float:
        """FLOP/s that one GPU is assumed to reach."""
        peak: float = getattr(self.hardware.gpu, self.estimate.recipe.model.dtype)
        return peak * self.hardware.mfu

    def flops(self, *, backward: bool) -> float:
        """FLOPs of a forward pass over one sequence, counted by tracing the model. `backward` adds
        the backward pass. A separate value model doubles the number."""
        made = self.estimate
        update = made.outline.update(made.prompt, made.response, 2)
        models = 2 if made.cost.value_model else 1
        return models * (update.flops if backward else update.forward_flops) / 2

    def step(self, *, samplers: int | None = None) -> Step:
        """The step's time. With `samplers`, that many GPUs only sample, and the others only
        train."""
        trainers = self.hardware.gpus - (samplers or 0)
        generate, update = self.generate(samplers or self.hardware.gpus), self.update(trainers)
        pace = Pace(
            generate=generate.seconds,
            score=self.flops(backward=False) / trainers / self.rate,
            update=update.seconds,
        )
        bounds = {"generate": generate.bound, "score": ARITHMETIC, "update": update.bound}
        cost = self.estimate.cost
        seconds = cost.phases(pace)
        phases = {name: Phase(seconds=s, bound=bounds[name]) for name, s in seconds.items()}
        longest = max(seconds, key=seconds.__getitem__)
        return Step(
            phases=phases,
            seconds=sum(seconds.values()),
            bottleneck=f"{longest}: {bounds[longest]}",
            steps=cost.steps,
            stage_seconds=cost.seconds(pace, num_dev=0),
        )

    def generate(self, gpus: int) -> Phase:
        """Sampling time per sequence. In each training step, a GPU reads its prompts and then
        generates many sequences at once, token by token."""
        gpu, made, cost = self.hardware.gpu, self.estimate, self.estimate.cost
        outline, total = made.outline, made.outline.total
        rollouts = math.ceil(cost.sampled / gpus)
        rows = min(rollouts, made.sizes.rows)
        width = outline.policy.compute_dtype.itemsize
        reading = min(outline.weights, width * total) / gpu.memory
        context = made.prompt + made.response / 2
        cache = rows * context * outline.cache_bytes / gpu.memory
        arithmetic = rows * 2 * total / (self.rate / self.hardware.mfu)
        token_s = max(reading + cache, arithmetic) / DECODE_EFFICIENCY
        trunk = total - outline.ends
        costs = {
            "reading prompts": math.ceil(cost.prompts / gpus) * 2 * trunk * made.prompt / self.rate
        }
        if made.sharding == "fsdp2":
            gathered = (gpus - 1) / gpus * made.gathered
            costs["gathering weights"] = gathered / self.hardware.link
        if arithmetic > reading + cache:
            slowest = ARITHMETIC
        elif reading >= cache:
            slowest = f"reading the weights for {counted(rows, 'row')}"
        else:
            slowest = "reading the cache"
        costs[slowest] = rollouts / rows * made.response * token_s
        return Phase(
            seconds=sum(costs.values()) / cost.sampled, bound=max(costs, key=costs.__getitem__)
        )

    def update(self, gpus: int) -> Phase:
        """Time per sequence to compute gradients (recomputation included) and to communicate. With
        DDP, the GPUs first compute and then communicate, so the two times are added. With FSDP2,
        the GPUs do both at once, so only the longer time counts."""
        compute_s = self.flops(backward=True) / gpus / self.rate
        exchange_s = self.communication(gpus) / self.estimate.cost.batch
        moving = "moving weights and gradients between GPUs"
        is_beside = self.estimate.sharding == "fsdp2"
        return Phase(
            seconds=max(compute_s, exchange_s) if is_beside else compute_s + exchange_s,
            bound=ARITHMETIC if compute_s >= exchange_s else moving,
        )

    def communication(self, gpus: int) -> float:
        """Seconds spent moving data between GPUs in one pass over the batch. DDP sums gradients
        once. For each micro-batch, FSDP2 gathers weights twice and scatters gradients once."""
        made, share = self.estimate, (gpus - 1) / gpus
        gradients = FP32 * made.outline.trained
        if made.sharding != "fsdp2":
            return 2 * share * gradients / self.hardware.link
        batch = max(1, made.sizes.tokens // made.length)
        micro_batches = math.ceil(made.cost.batch / gpus / batch)
        return micro_batches * share * (2 * made.outline.weights + gradients) / self.hardware.link

    def best_split(self) -> dict[str, Any]:
        """The fastest division of the GPUs into those that only sample and those that only train,
        and the resulting time per step in seconds. The two groups take turns, because samples come
        from the newest weights."""
        seconds = {n: self.step(samplers=n).seconds for n in range(1, self.hardware.gpus)}
        best = min(seconds, key=seconds.__getitem__)
        train = self.hardware.gpus - best
        return {"sampling_gpus": best, "training_gpus": train, "seconds": seconds[best]}


# --- text -----------------------------------------------------------------------------------------

WAYS = {"one": "1 GPU", "ddp": "DDP", "fsdp2": "FSDP2"}


def plan_text(plan: Plan) -> str:
    """The plan as text."""
    known = plan.assumed
    head = (
        f"{plan.recipe}: {plan.weights:,} weights, {plan.trained:,} trained including the value"
        f" head, {plan.dtype}; {known['gpus']} × {known['gpu'].upper()} with"
        f" {known['memory_bytes'] / GB:g} GB"
    )
    foot = (
        f"assumed: MFU {known['mfu']:.0%} of {known['flops'] / 1e12:g} TFLOP/s, decoding at"
        f" {known['decode_efficiency']:.0%} of its roofline ({known['bytes_s'] / 1e12:g} TB/s),"
        f" {known['link_bytes_s'] / GB:g} GB/s between GPUs, prompts of {plan.prompt} and"
        f" responses of {plan.response} tokens; times only for stages that sample in each step"
    )
    steps = (_step_text(plan, name, step) for name, step in plan.steps.items())
    return "\n\n".join([head, _memory_text(plan), *steps, foot])


def _memory_text(plan: Plan) -> str:
    shares, all_sizes, stages = plan.memory.values(), plan.sizes.values(), set(plan.stage.values())
    many = f" × {plan.assumed['gpus']}"
    ways = [WAYS[way] + many * (way != "one") for way in plan.memory]
    if len(stages) > 1:
        table = {"GB per GPU": ways, "stage": list(plan.stage.values())}
    else:
        table = {f"GB per GPU, stage {plan.stage['one']}": ways}
    for name in dict.fromkeys(name for share in shares for name in share.parts):
        found = (share.parts.get(name) for share in shares)
        table[name] = ["–" if size is None else f"{size / GB:.2f}" for size in found]
    table |= {
        "micro-batch, tokens": [f"{sizes.tokens:,}" for sizes in all_sizes],
        "decoded at once, rows": [f"{sizes.rows:,}" for sizes in all_sizes],
        "peak": [f"{share.peak / GB:.2f}" for share in shares],
        "reached in": [share.busiest for share in shares],
        "fits": ["yes" if share.fits else "no" for share in shares],
    }
    width = max(12, 2 + max(map(len, stages)))
    return "\n".join(
        f"{label:<24}" + "".join(f"{cell:>{width}}" for cell in cells)
        for label, cells in table.items()
    )


def _step_text(plan: Plan, name: str, step: Step) -> str:
    way = "does not fit; computed as if it did" if plan.sharding is None else WAYS[plan.sharding]
    rows = [(phase, f"{found.seconds:.3g} s", found.bound) for phase, found in step.phases.items()]
    rows.append(("all", f"{step.seconds:.3g} s", f"bottleneck: {step.bottleneck}"))
    if name in plan.split:
        seconds, sampling, training = (
            plan.split[name][key] for key in ("seconds", "sampling_gpus", "training_gpus")
        )
        samplers = f"{counted(sampling, 'GPU')} sample{'s' * (sampling == 1)}"
        trainers = f"{training} train{'s' * (training == 1)}"
        rows.append(("split", f"{seconds:.3g} s", f"{samplers} and {trainers}, in turn"))
    hours = f"{step.stage_seconds / 3600:,.1f} h"
    rows.append(("stage", hours, f"{counted(round(step.steps), 'step')}, without dev evaluations"))
    lines = [f"  {label:<10}{time:>11}   {note}" for label, time, note in rows]
    return "\n".join([f"a step of {name} ({way}, {plan.topology})", *lines])
