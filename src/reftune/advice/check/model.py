"""Checks of the model on this machine."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from statistics import fmean
from typing import Any

from reftune.advice.check.report import Finding, fail, ok, warn
from reftune.advice.check.subject import Subject, rl_inits
from reftune.advice.measured import available_bytes, measure_speed
from reftune.datasets import Splits
from reftune.engines import Engine
from reftune.errors import DataError
from reftune.model.batch import token_batch
from reftune.recipe import Recipe
from reftune.results.records import read_run
from reftune.results.stats import wilson
from reftune.results.summary import last_rise
from reftune.results.tables import rise_line
from reftune.runs.auto import product_rates, total_bytes
from reftune.runs.evaluation import PROBLEMS_AT_ONCE
from reftune.runs.models import stage_folder
from reftune.runs.sample import sample_rows
from reftune.stages.estimate import estimates, stage_costs
from reftune.stages.outline import Outline
from reftune.stages.plateau import NEEDED_ACCURACY, Rise
from reftune.stages.self_train import SAMPLES_AT_ONCE
from reftune.text import clock
from reftune.types import Completion, SamplingParams, Verdict

NUM_SAMPLED = 32
"""Maximum number of problems on which RL's initial model is tested."""
EXAMPLES_IN = {"chat": "format.instruction", "plain": "format.examples"}
"""Style of the prompt → the key for an example of a solution."""
NUM_SHOWN = 3
"""Number of sampled solutions that are shown, and number of prompts in `check_logprobs`."""
NUM_PROBED = 8
"""Number of prompts sampled to estimate the length of solutions if there are no rationales."""
NUM_TIMED = 512
"""Maximum number of rows used to estimate the time."""
LONG_RUN_S = 24 * 3600
"""Before a run longer than this, the check recommends a trial."""
MEASURED_ROWS = 64
"""Speed is measured on the number of rows in the largest step of any stage, but on no more rows
than the engine decodes at once. If no stage can predict its cost, this constant replaces the size
of the largest step. If the engine has no attribute `rows`, as with vLLM, this constant is the
limit."""
MAX_SLOWDOWN = 8.0
"""The check fails if matmuls in the recipe's dtype take more than this many times as long as in the
other dtype."""
PRODUCT = 1024
"""A timed matmul uses at most this many rows and this many columns of a weight."""
MAX_MISMATCH = {"float32": 0.01, "bfloat16": 0.1}
"""Dtype → maximum mean difference between the log-probabilities of engine and policy, in nats per
token."""
GIB = 2**30


def check_memory(subject: Subject) -> Finding:
    """Estimate from the model's shape how much memory training and sampling need, and check that
    this much is free on the device."""
    policy, recipe = subject.policy, subject.recipe
    lengths = [len(ids) for of in subject.fitting.values() for ids in of] or [1]
    model = policy.base
    outline = Outline(
        lambda: type(model)(copy.deepcopy(model.config)), recipe.model, device=policy.device.type
    )
    requests, whole = requests_at_once(recipe, subject.splits), total_bytes(policy.device)
    planned = [
        replace(made, mean_prompt=fmean(lengths), requests=requests, device_bytes=whole).memory
        for made in estimates(recipe, outline, prompt=max(lengths)).values()
    ]
    if not planned:
        return ok("unknown, because no stage can predict its memory")
    memory = max(planned, key=lambda memory: memory.peak)
    parts = memory.parts
    free = available_bytes(policy.device) + memory.held["weights"]
    message = (
        f"about {memory.peak / GIB:.1f} GiB of the {free / GIB:.1f} GiB that are free, the largest"
        f" part for {max(parts, key=parts.__getitem__)}"
    )
    if memory.peak <= free:
        return ok(message)
    key = "engine.memory" if getattr(recipe.engine, "device_share", None) else "engine.batch_size"
    return fail(
        message, f"lower model.micro_batch_tokens or {key}, or train adapters: model.lora.rank=16"
    )


def requests_at_once(recipe: Recipe, splits: Splits) -> int:
    """Maximum number of completions that a run requests in one call of the engine."""
    table = recipe.evaluate
    evaluated = min(len(table.problems(splits)), PROBLEMS_AT_ONCE)
    costs = stage_costs(recipe, num_train=len(splits.train), num_dev=len(splits.dev)).values()
    # a stage that samples in its steps draws at most `sampled` at once, even before the first step
    sampled = [cost.sampled or min(cost.sampled_before, SAMPLES_AT_ONCE) for cost in costs]
    return max(len(splits.dev), evaluated * max(1, table.samples), *sampled)


def check_dtype(subject: Subject) -> Finding:
    """Check that matmuls in the recipe's dtype (float32 or bfloat16) are not many times slower on
    this machine than matmuls in the other dtype."""
    policy, chosen = subject.policy, subject.recipe.model.dtype
    weight = max((p for p in policy.model.parameters() if p.dim() == 2), key=lambda p: p.numel())
    columns, inner = (min(size, PRODUCT) for size in weight.shape)
    rates = product_rates(policy.device, (PRODUCT // 4, inner, columns), seconds=0.5)
    (other,) = rates.keys() - {chosen}
    slowdown = rates[other] / rates[chosen]
    message = ", ".join(f"{name} {rate / 1e9:,.1f} GFLOP/s" for name, rate in rates.items())
    if slowdown <= MAX_SLOWDOWN:
        return ok(f"{chosen}; matmuls here: {message}")
    return fail(
        f"matmuls in {chosen} take {slowdown:,.0f} times as long as in {other} here: {message}",
        f"model.dtype={other}, or auto, which chooses it here",
    )


def check_accuracy(subject: Subject) -> Finding:
    """Check how many problems RL's initial model solves when it samples at temperature 1. Training
    problems are used if there are too few dev problems."""
    dev, train = (
        [p for p in problems if len(subject.prompts[split][p.id]) <= subject.prompt_limit]
        for split, problems in (("dev", subject.splits.dev), ("train", subject.splits.train))
    )
    if not (dev or train):
        dev = list(subject.splits.dev)
    problems = [*dev, *train][:NUM_SAMPLED]
    kinds = " and ".join(["dev"] * bool(dev) + ["training"] * (len(problems) > len(dev)))
    rows = sample_rows(subject.policy, subject.collector, problems, subject.recipe, temperature=1.0)
    correct = sum(row["verdict"] == Verdict.CORRECT.value for row in rows)
    low, high = wilson(correct, len(rows))
    message = (
        f"at temperature 1 the initial model solves {correct} of {len(rows)} {kinds} questions"
        f" ({correct / len(rows):.0%}, 95% interval {low:.0%} to {high:.0%}); RL needs about"
        f" {NEEDED_ACCURACY:.0%} correct to have something to reward"
    )
    last = _last_rise(subject)
    if last is not None:
        message += f"; {rise_line(*last)}"
    has_supervised = subject.learns_from_rationales and "base" not in rl_inits(subject.recipe)
    is_trained_first = subject.method == "base" and has_supervised
    if (high < NEEDED_ACCURACY or correct == 0) and not is_trained_first:
        finding = warn(message, _remedy(subject, rows))
    elif last is not None and last[0].is_beyond_chance:
        finding = warn(message, "train the warm-up further: until=plateau ends it automatically")
    else:
        finding = ok(f"{message}; a warm-up comes first" if is_trained_first else message)
    return replace(finding, samples=tuple(rows[:NUM_SHOWN]))


def _remedy(subject: Subject, rows: Sequence[Mapping[str, Any]]) -> str:
    """How to make the initial model solve more problems, if `rows` are its solutions."""
    start = "start RL from a warm-up, a stronger model or easier questions"
    if 2 * sum(row["verdict"] == Verdict.NO_ANSWER.value for row in rows) <= len(rows):
        return start
    place = EXAMPLES_IN.get(getattr(subject.recipe.format, "style", ""), "the prompt")
    return (
        f"most solutions state no answer: show its form with an example in {place}; if that is not"
        f" enough, {start}"
    )


def _last_rise(subject: Subject) -> tuple[Rise, float] | None:
    """The last recorded rise in dev accuracy in the stage that RL starts from (see `last_rise`),
    and the accuracy after this rise. Returns None if no rise was recorded."""
    if subject.method == "base":
        return None
    stage = stage_folder(subject.recipe, subject.method)
    try:
        return last_rise(read_run(stage.run.path), stage.path.name)
    except DataError:  # a model that was not saved by a run of reftune
        return None


def check_logprobs(subject: Subject) -> Finding:
    """Check that the engine's log-probabilities of its samples are close to the policy's."""
    prompts = (subject.fitting["dev"] or subject.fitting["train"])[:NUM_SHOWN]
    completions = _sampled(subject, prompts, max_new=min(32, subject.recipe.lengths.max_new))
    batch = token_batch(
        prompts, [completion.token_ids for completion in completions], device=subject.policy.device
    )
    scored = subject.policy.score(batch).logprobs[batch.response_mask]
    sampled = [logprob for completion in completions for logprob in completion.logprobs]
    mismatch = fmean(abs(a - b) for a, b in zip(sampled, scored.tolist(), strict=True))
    message = f"engine and policy differ by {mismatch:.2g} nats per token on average"
    if mismatch <= MAX_MISMATCH[subject.recipe.model.dtype]:
        return ok(message)
    return fail(message, "the engine does not sample from the policy; use engine=kv")


def _sampled(subject: Subject, prompts: list[list[int]], *, max_new: int) -> list[Completion]:
    """The model's completions of `prompts`, sampled at temperature 1."""
    longest = subject.recipe.lengths.max_prompt
    params = SamplingParams(max_new_tokens=max_new, max_prompt_tokens=longest)
    engine: Engine = subject.recipe.engine
    return engine.generate(subject.policy, prompts, params)


def check_time(subject: Subject) -> Finding:
    """Estimate the run's time on this machine, from a short measurement. If there are no
    rationales, solutions are assumed to be as long as the initial model's."""
    limit, most = subject.prompt_limit, subject.recipe.lengths.max_new
    fitting = (r for r in subject.rows if len(r.prompt_ids) <= limit and len(r.target_ids) <= most)
    rows = list(islice(fitting, NUM_TIMED))
    prompts, targets = [row.prompt_ids for row in rows], [row.target_ids for row in rows]
    recipe, num_dev = subject.recipe, len(subject.splits.dev)
    costs = stage_costs(
        recipe,
        num_train=len(subject.splits.train),
        num_rationales=len(subject.rows),
        num_dev=num_dev,
    )
    if not subject.rows:
        asked = subject.fitting["train"][:NUM_TIMED]
        sampled = cycle(_sampled(subject, asked[:NUM_PROBED], max_new=most))
        # equal prompts are read only once
        repeats = min(
            (cost.batch // cost.prompts for cost in costs.values() if cost.prompts), default=1
        )
        prompts = [prompt for prompt in asked for _ in range(repeats)][:NUM_TIMED]
        targets = [list(each.token_ids) for each in islice(sampled, len(prompts))]
    if not targets:
        return ok("unknown, because no training row is within the length limits")
    largest = max((cost.batch for cost in costs.values()), default=MEASURED_ROWS)
    speed = measure_speed(
        subject.policy,
        recipe.engine,
        prompts,
        targets,
        rows=min(largest, getattr(recipe.engine, "rows", MEASURED_ROWS)),
        max_tokens=recipe.model.max_tokens,
    )
    pace = speed.pace(prompt=fmean(map(len, prompts)), response=fmean(map(len, targets)))
    seconds = {name: cost.seconds(pace, num_dev=num_dev) for name, cost in costs.items()}
    stages = [
        f"{name} {clock(seconds[name])}" if name in seconds else f"{name} unknown"
        for name in recipe.stages
    ]
    evaluation_s = num_answers(subject) * pace.generate
    total = sum(seconds.values()) + evaluation_s
    message = (
        f"about {clock(total)}: {', '.join(stages)}, evaluation {clock(evaluation_s)}"
        f" ({speed.train:,.0f} tokens/s trained, {speed.sample:,.0f} sampled)"
    )
    if not subject.rows:
        message += "; assumes that solutions stay as long as those of the initial model"
    if total > LONG_RUN_S:
        return warn(message, "for a trial, set fewer epochs, steps, prompts or samples")
    return ok(message)


def num_answers(subject: Subject) -> int:
    """Number of answers in the final evaluation: one greedy answer for each problem and method,
    plus the samples."""
    table = subject.recipe.evaluate
    answers = [1 + table.num_samples(method) for method in subject.recipe.methods_to_evaluate]
    return len(table.problems(subject.splits)) * sum(answers)
