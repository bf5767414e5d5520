"""Reinforcement learning on the model's own solutions.

`Trainer.step` takes one step: generate → grade → reward → score → credit → update. Its code does
not depend on the algorithm. `loop.py` repeats the step.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, SerializeAsAny, model_validator
from pydantic.functional_validators import BeforeValidator
from torch import Tensor

from reftune.algorithms.base import (
    Algorithm,
    LossTerms,
    explained_variance,
    gae,
    masked_mean,
    token_rewards,
    truncated_importance,
)
from reftune.errors import RecipeError
from reftune.model.batch import RolloutBatch, TokenBatch, token_batch
from reftune.model.policy import AdapterReference, Policy, TokenScores
from reftune.model.value_head import fit_value_head
from reftune.recipe import component_class, known_kinds, load_component, refusal
from reftune.seeds import endless_indices, generator
from reftune.stages.loop import Loop, TrainingTable
from reftune.stages.optimizer import accumulate_gradient
from reftune.stages.stage import Cost, Stage, StageContext
from reftune.text import counted
from reftune.types import Attempt, Solution, Verdict


class Rl(TrainingTable, Stage):
    init: str = "warmup"
    algorithm: SerializeAsAny[
        Annotated[
            Algorithm, BeforeValidator(partial(load_component, group="algorithms", default="ppo"))
        ]
    ] = Field({}, validate_default=True)
    steps: int = Field(gt=0)
    """Number of rollouts to sample and train on."""
    prompts: int = Field(gt=0)
    """Problems per rollout."""
    samples: int = Field(1, gt=0)
    """Samples per training problem."""
    updates: int = Field(2, gt=0)
    """Training passes over each rollout (PPO epochs)."""
    minibatches: int = Field(1, gt=0)
    """Optimizer steps per pass."""
    mask_truncated: bool = False
    """In the loss, ignore samples that were cut off at `lengths.max_new` (DAPO, §3.4)."""
    temperature: float = Field(1.0, gt=0)
    mismatch_cap: float | None = Field(None, gt=0)
    """Use [importance weights](engines.md#when-sampler-and-trainer-differ) π_train / π_sample,
    capped at this value (usually 2). Default: no importance weights."""
    value_init: Literal["uniform", "zero"] = "zero"
    """`zero` keeps the initial model's value head. Its weights are 0 unless PPO has already trained
    it. `uniform` draws new weights at random, as ReFT's code does."""
    value_model: Literal["shared", "separate"] = "shared"
    """Whether the value head shares the policy's transformer or has its own."""
    value_prefit: int = Field(0, ge=0)
    """Number of additional rollouts to which the value head is fitted before PPO starts. An
    algorithm without a value head ignores this key."""
    eval_every: int = Field(10, gt=0)
    """Steps between dev evaluations."""

    reads_questions: ClassVar[bool] = True

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        least = self.algorithm.min_samples
        if self.samples < least:
            raise refusal(
                "samples",
                f"samples: expected at least {least}, got {self.samples}: {self.algorithm.kind}"
                " compares the samples of a problem",
            )
        if self.minibatches > self.prompts * self.samples:
            size = self.prompts * self.samples
            raise refusal(
                "minibatches",
                f"minibatches: expected at most prompts × samples = {size}, got {self.minibatches}",
            )
        if self.mismatch_cap is not None and not self.algorithm.sets_advantages:
            kind = self.algorithm.kind
            raise refusal("mismatch_cap", f"{_needs_advantages()}, got {kind}")
        return self

    def line(self) -> str:
        return (
            f"{counted(self.steps, 'rollout')} of {self.prompts} ×"
            f" {counted(self.samples, 'sample')} from {self.init} with {self.algorithm.kind},"
            f" {counted(self.updates, 'update')} each, learning rate"
            f" {self.optimizer.learning_rate:g}"
        )

    def cost(self, *, num_train: int, num_dev: int) -> Cost:
        solutions = self.prompts * self.samples
        return Cost(
            steps=self.steps,
            batch=solutions,
            updates=self.updates,
            scored=2 if self.algorithm.needs_reference else 1,
            sampled=solutions,
            sampled_before=solutions * self.value_prefit * self.algorithm.needs_values,
            looks=self.steps / self.eval_every,
            prompts=self.prompts,
            reference=self.algorithm.needs_reference,
            value_model=self.value_model == "separate",
            state_bits=self.optimizer.state_bits,
        )

    def run(self, context: StageContext) -> None:
        Trainer(self, context).run()


class Trainer:
    """A running RL stage."""

    def __init__(self, stage: Rl, context: StageContext) -> None:
        self.stage, self.context, self.policy = stage, context, context.policy
        self.algorithm = stage.algorithm
        self.reference: Policy | AdapterReference | None = (
            self.policy.make_reference() if self.algorithm.needs_reference else None
        )
        if stage.value_init == "uniform":
            self.policy.reset_value_head(context.seed("value_head"))
        if stage.value_model == "separate":
            self.policy.separate_value_model()
        self.loop = Loop(
            context, stage, self.policy, total_steps=stage.steps, eval_every=stage.eval_every
        )

    def run(self) -> None:
        fits_values = self.stage.value_prefit and self.algorithm.needs_values
        self.loop.run(self.step, before=self.prefit if fits_values else None)

    def step(self, n: int) -> dict[str, float]:
        """Sample one rollout, train on it, and return the step's metrics."""
        solutions, metrics = self.sample(n, "rollout")
        metrics["progress/epoch"] = n * self.stage.prompts / len(self.context.splits.train)
        collector = self.context.collector
        selected = [
            s
            for s in self.algorithm.select(solutions, collector.encoder)
            if collector.fits(s.prompt_ids, s.completion.token_ids, self.policy)
        ]
        if not selected:
            return metrics
        batch, scored = self.score(selected)
        credited = credited_by(self.algorithm, batch)
        batch, weighed = correct_mismatch(credited, self.stage.mismatch_cap)
        metrics |= {**scored, **weighed}
        masks = self.stage.mask_truncated
        kept = [
            i
            for i, s in enumerate(selected)
            if not (masks and s.source == "policy" and s.completion.finish_reason == "length")
        ]
        if not kept:
            return metrics
        if len(kept) < len(selected):
            batch = batch.rows(torch.tensor(kept, device=self.policy.device))
        return {**metrics, **self.update(batch, n)}

    def sample(self, n: int, purpose: str) -> tuple[list[Solution], dict[str, float]]:
        """Sample and return rollout `n`, with metrics. `purpose` is `rollout` or `prefit` (for
        fitting the value head). For a given recipe, samples depend only on the weights, `n` and
        `purpose`."""
        train, seed = self.context.splits.train, self.context.seed
        indices = endless_indices(
            len(train),
            start=(n - 1) * self.stage.prompts,
            count=self.stage.prompts,
            seed=seed(purpose, "order"),
        )
        solved = self.context.collector.solve(
            self.policy,
            [train[i] for i in indices for _ in range(self.stage.samples)],
            temperature=self.stage.temperature,
            seed=seed(purpose, "tokens", n),
        )
        solutions = self.context.collector.rewarded(solved)
        if not solutions:
            self.context.progress.note(
                f"{self.context.name} {purpose} {n}: every reward is None, so there is nothing to"
                " train on"
            )
        if purpose == "rollout":
            self._show(n, solutions)
        return solutions, {
            **rollout_metrics(solutions),
            "time/generate_s": solved.generate_s,
            "time/grade_s": solved.grade_s,
            **{f"engine/{name}": count for name, count in solved.traffic.items()},
        }

    def _show(self, n: int, solutions: Sequence[Solution]) -> None:
        followed = {problem.id for problem in self.context.splits.train[:PROBLEMS_FOLLOWED]}
        for solution in worth_showing(solutions, followed):
            self.loop.samples.append({"step": n, **sample_row(solution, self.policy)})
        if solutions:
            self.context.progress.solutions(n, solutions)

    def score(self, solutions: Sequence[Solution]) -> tuple[RolloutBatch, dict[str, float]]:
        """The solutions as a batch, and metrics. The batch includes the tokens' values and their
        log-probabilities under the policy. If there is a reference, the batch also includes the
        log-probabilities under the reference."""
        started = time.perf_counter()
        batch = rollout_batch(solutions, device=self.policy.device)
        scores = self._policy_scores(solutions, batch)
        batch = replace(batch, logprobs=scores.logprobs, values=scores.values)
        mask = batch.sampled_mask
        assert scores.entropy is not None
        metrics: dict[str, float] = {}
        if mask.any():
            metrics["policy/entropy"] = float(masked_mean(scores.entropy, mask))
            if scores.logprobs is not batch.sampling_logprobs:
                differences = (scores.logprobs - batch.sampling_logprobs).abs()
                metrics["kl/mismatch"] = float(masked_mean(differences, mask))
        if self.reference is not None:
            reference = self.reference.score(batch.tokens, temperature=self.stage.temperature)
            batch = replace(batch, ref_logprobs=reference.logprobs)
            metrics["kl/reference"] = float(
                ((batch.logprobs - reference.logprobs) * mask).sum(1).mean()
            )
        return batch, {**metrics, "time/score_s": time.perf_counter() - started}

    def _policy_scores(self, solutions: Sequence[Solution], batch: RolloutBatch) -> TokenScores:
        """The samples' log-probabilities, values and entropies under the policy that drew them.
        They are the engine's own numbers if the engine has computed them for every sample and
        `mismatch_cap` is unset. Otherwise, they are computed in a new forward pass."""
        completions = [s.completion for s in solutions]
        if self.stage.mismatch_cap is not None or not all(c.values for c in completions):
            return self.policy.score(batch.tokens, temperature=self.stage.temperature)
        values = per_token(batch.tokens, [c.values for c in completions])
        entropies = per_token(batch.tokens, [c.entropies for c in completions])
        return TokenScores(batch.sampling_logprobs, values, entropies)

    def update(self, batch: RolloutBatch, n: int) -> dict[str, float]:
        """Make `updates` passes over the rollout, with `minibatches` optimizer steps each, and
        return metrics. Each loss metric is averaged over the steps that report it. If the loss or
        the gradient of an optimizer step is not finite, this step and the rest of the update are
        skipped. Raises: NonFiniteError if the recipe does not allow this skip."""
        started = time.perf_counter()
        self.policy.train(self.algorithm.trains_with_dropout)
        steps: list[dict[str, float]] = []
        num_sequences = num_tokens = 0
        for part in self.parts(batch, n):
            rows = partial(batch_rows, part, self.policy)
            metrics = self.loop.descend(n, partial(self.accumulate, part), rows)
            if not metrics:
                break
            steps.append(metrics)
            num_sequences += len(part)
            num_tokens += int(part.tokens.lengths.sum())
        values = defaultdict(list)
        for name, value in chain(*(step.items() for step in steps)):
            values[name].append(value)
        return {
            **{name: sum(of_name) / len(of_name) for name, of_name in values.items()},
            **value_metrics(batch),
            "compute/sequence_passes": num_sequences,
            "compute/train_tokens": num_tokens,
            "time/update_s": time.perf_counter() - started,
        }

    def accumulate(self, batch: RolloutBatch) -> dict[str, float]:
        """Accumulate a minibatch's gradient and return metrics. Raises: the errors of
        `accumulate_gradient`."""

        def loss(index: Tensor) -> LossTerms:
            rows = batch.rows(index)
            scores = self.policy(rows.tokens, temperature=self.stage.temperature)
            return checked_terms(self.algorithm.loss(scores, rows), self.algorithm.kind)

        return accumulate_gradient(self.policy, batch.tokens, loss)

    def parts(self, batch: RolloutBatch, n: int) -> Iterator[RolloutBatch]:
        """The minibatches of all passes over `batch`, the batch of rollout number `n`. Each
        minibatch has its own loss weights."""
        count = min(self.stage.minibatches, len(batch))
        for update in range(self.stage.updates):
            draw = generator(self.context.seed("minibatches", n), update)
            order = torch.from_numpy(draw.permutation(len(batch))).to(batch.rewards.device)
            for index in order.tensor_split(count):
                part = batch if count == 1 else batch.rows(index)
                yield replace(part, weights=self.algorithm.weights(part))

    def prefit(self) -> None:
        """Fit the value head to the returns of the initial policy (VC-PPO, arXiv:2503.01491,
        §4.1)."""
        fitted = fit_value_head(self.policy.value_head, self._features_and_returns())
        explained = (
            f"; fitted to all but the last, it explains {fitted:.0%} of the variance of the last"
            " rollout's returns"
        )
        self.context.progress.note(
            f"{self.context.name}: rollouts to pre-fit the value head: {self.stage.value_prefit}"
            + explained * (not math.isnan(fitted))
        )

    def _features_and_returns(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Generate rollouts (batches of samples) for fitting the value head. For each rollout,
        yield the hidden states (N, H) and discounted returns (N,) of the N response tokens in its
        samples. Samples whose reward is None are left out, and so is a rollout that has only such
        samples. The returns include no KL penalty, because the policy still equals its reference.
        The sampled tokens count towards the stage's cost."""
        for n in range(1, self.stage.value_prefit + 1):
            solutions, metrics = self.sample(n, "prefit")
            self.loop.spend(metrics)
            if not solutions:
                continue
            batch = rollout_batch(solutions, device=self.policy.device)
            mask = batch.response_mask
            rewards = token_rewards(batch.rewards, batch.logprobs, None, mask, kl_coef=0.0)
            _, returns = gae(
                rewards, torch.zeros_like(rewards), mask, gamma=self.algorithm.discount, lam=1.0
            )
            yield self.policy.features(batch.tokens), returns[mask]


SAMPLES_KEPT = 4
"""Number of solutions stored per step in samples.jsonl. `worth_showing` adds at most two."""
PROBLEMS_FOLLOWED = 16
"""In samples.jsonl, solutions to the first `PROBLEMS_FOLLOWED` training problems take precedence.
Readers can then see how the solutions to a problem change."""


def rollout_batch(solutions: Sequence[Solution], *, device: torch.device) -> RolloutBatch:
    """Solutions as tensors. Until the trainer computes its own log-probabilities, `logprobs`
    contains the engine's."""
    ids = [s.problem.id for s in solutions]
    group_of = {id_: group for group, id_ in enumerate(dict.fromkeys(ids))}
    responses = [s.completion.token_ids for s in solutions]
    tokens = token_batch([s.prompt_ids for s in solutions], responses, device=device)
    logprobs = per_token(tokens, [s.completion.logprobs for s in solutions])
    return RolloutBatch(
        tokens=tokens,
        rewards=torch.tensor([s.reward for s in solutions], device=device),
        groups=torch.tensor([group_of[id_] for id_ in ids], device=device),
        gold=torch.tensor([s.source == "gold" for s in solutions], device=device),
        sampling_logprobs=logprobs,
        logprobs=logprobs,
    )


def per_token(tokens: TokenBatch, numbers: Sequence[Sequence[float]]) -> Tensor:
    """`numbers` as a tensor (B, R) that is 0 outside the responses. `numbers` has one list per
    sequence, and each list has one number per response token."""
    return tokens.unflatten(torch.tensor(list(chain(*numbers)), device=tokens.tokens.device))


def credited_by(algorithm: Algorithm, batch: RolloutBatch) -> RolloutBatch:
    """The result of the algorithm's `credit(batch)`. Raises: RecipeError if it is not a
    `RolloutBatch` of the same size as `batch`, or if its `advantages` or `returns` have the wrong
    shape. `advantages` must be None, (B, R) or (B, 1). `returns` must be None or (B, R)."""
    credited: object = algorithm.credit(batch)
    where = f"algorithm {algorithm.kind}: credit returned"
    if not isinstance(credited, RolloutBatch) or len(credited) != len(batch):
        size = f" of {len(credited)}" if isinstance(credited, RolloutBatch) else ""
        raise RecipeError(
            f"{where} {type(credited).__name__}{size}; expected a RolloutBatch of {len(batch)}"
        )
    whole = tuple(batch.logprobs.shape)
    for name, shapes in (("advantages", (whole, (len(batch), 1))), ("returns", (whole,))):
        tensor = getattr(credited, name)
        shape = None if tensor is None else tuple(getattr(tensor, "shape", ()))
        if shape is not None and shape not in shapes:
            expected = " or ".join(map(str, shapes))
            raise RecipeError(f"{where} {name} of shape {shape}; expected {expected}")
    return credited


def checked_terms(terms: object, kind: str) -> LossTerms:
    """`terms`, which the `loss` method of the algorithm `kind` returned. Raises: RecipeError unless
    `terms` is `LossTerms` with a scalar total that has a gradient."""
    total = getattr(terms, "total", None)
    is_loss = isinstance(total, Tensor) and total.dim() == 0 and total.requires_grad
    if isinstance(terms, LossTerms) and is_loss:
        return terms
    raise RecipeError(
        f"algorithm {kind}: loss returned {type(terms).__name__}; expected LossTerms with a total"
        " that is a scalar and has a gradient"
    )


def correct_mismatch(
    batch: RolloutBatch, cap: float | None
) -> tuple[RolloutBatch, dict[str, float]]:
    """Multiply a batch's advantages by the importance weights min(π_train / π_sample, cap). Here,
    π_train is a token's probability as computed by the trainer, and π_sample is its probability as
    computed by the engine. The weights scale a token's clipped policy loss, but not its value loss.
    If `cap` is None, the batch is not changed. Returns: the new batch and metrics. Raises:
    RecipeError if the algorithm has no advantages."""
    if cap is None:
        return batch, {}
    if batch.advantages is None:
        raise RecipeError(f"{_needs_advantages()}; `credit` set none")
    mask = batch.sampled_mask
    weights = truncated_importance(batch.logprobs, batch.sampling_logprobs, mask, cap=cap)
    metrics = {
        "mismatch/weight": float(masked_mean(weights, mask)),
        "mismatch/capped": float(masked_mean((weights >= cap).float(), mask)),
    }
    return replace(batch, advantages=batch.advantages * weights), metrics


def _needs_advantages() -> str:
    of_kind = {k: component_class(k, group="algorithms") for k in known_kinds("algorithms")}
    kinds = ", ".join(kind for kind, known in of_kind.items() if known.sets_advantages)
    return f"mismatch_cap: expected an algorithm with advantages ({kinds})"


def rollout_metrics(solutions: Sequence[Solution]) -> dict[str, float]:
    """Metrics of the samples: rewards, verdicts and lengths. A named part of the reward is averaged
    over the samples that have this part."""
    count = max(1, len(solutions))
    verdicts = Counter(s.graded.verdict for s in solutions)
    finished = Counter(s.completion.finish_reason for s in solutions)
    num_tokens = sum(len(s.completion.token_ids) for s in solutions)
    rewards, parts = defaultdict(list), defaultdict(list)
    for s in solutions:
        rewards[s.problem.id].append(s.reward)
        for name, value in s.reward_parts.items():
            parts[name].append(value)
    return {
        "reward/mean": sum(s.reward for s in solutions) / count,
        "reward/correct": verdicts[Verdict.CORRECT] / count,
        **{f"reward_part/{name}": sum(values) / len(values) for name, values in parts.items()},
        **{f"verdict/{verdict.value}": verdicts[verdict] / count for verdict in Verdict},
        "response/length": num_tokens / count,
        "response/truncated": finished["length"] / count,
        "groups/constant_reward": (
            sum(len(set(group)) == 1 for group in rewards.values()) / max(1, len(rewards))
        ),
        "compute/sampled_tokens": num_tokens,
    }


def value_metrics(batch: RolloutBatch) -> dict[str, float]:
    """Metrics of how well the value head predicted the returns; empty if there are no returns. The
    explained variance is left out if all returns are equal."""
    if batch.values is None or batch.returns is None:
        return {}
    mask = batch.response_mask
    explained = float(explained_variance(batch.values, batch.returns, mask))
    return {
        "value/mean": float(masked_mean(batch.values, mask)),
        **({} if math.isnan(explained) else {"value/explained_variance": explained}),
    }


def batch_rows(batch: RolloutBatch, policy: Policy) -> list[dict[str, Any]]:
    """The samples of a batch with every number that went into the loss, to help find the cause of a
    non-finite loss."""
    rows: list[dict[str, Any]] = []
    for i in range(len(batch)):
        own = batch.rows(torch.tensor([i], device=batch.rewards.device))
        tokens = own.tokens.tokens[0].tolist()
        tensors = {f.name: getattr(own, f.name) for f in fields(own) if f.name != "tokens"}
        numbers = {name: t[0].tolist() for name, t in tensors.items() if t is not None}
        rows.append({"text": policy.decode(tokens), "tokens": tokens, **numbers})
    return rows


def worth_showing(solutions: Sequence[Solution], followed: Collection[str]) -> list[Solution]:
    """The solutions to store. First, up to `SAMPLES_KEPT` solutions are chosen, each for a
    different problem if possible, starting with the problems in `followed`. Then the longest
    solution and one whose program reached its time limit are added, unless they are already
    included."""
    ids = [solution.problem.id for solution in solutions]
    first = {id_: place for place, id_ in reversed(list(enumerate(ids)))}
    places = sorted(
        range(len(solutions)), key=lambda i: (i != first[ids[i]], ids[i] not in followed)
    )
    longest = sorted(places, key=lambda i: -len(solutions[i].completion.token_ids))[:1]
    late = [i for i in places if solutions[i].graded.verdict is Verdict.TIMEOUT][:1]
    return [solutions[i] for i in dict.fromkeys([*places[:SAMPLES_KEPT], *longest, *late])]


def sample_row(solution: Solution, policy: Policy) -> dict[str, Any]:
    """A solution as a row of samples.jsonl."""
    completion = solution.completion
    attempt = Attempt(
        completion=completion.text,
        graded=solution.graded,
        finish_reason=completion.finish_reason,
        reward=solution.reward,
    )
    return {
        "id": solution.problem.id,
        "question": solution.problem.question,
        "gold": str(solution.problem.answer),
        "program_s": None,
        **attempt.to_row(),
        "logprobs": [round(logprob, 4) for logprob in completion.logprobs],
        "tokens": [policy.decode([token]) for token in completion.token_ids],
    }
