"""Samples solutions to problems, grades them and rewards them."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral, Real
from typing import Any

from reftune.datasets import Splits
from reftune.engines import Engine, traffic
from reftune.errors import DataError, EngineError, ReftuneError, RewardError
from reftune.grading.rewards import Reward, SumOfParts, blame
from reftune.model.encoder import Encoder
from reftune.model.policy import Policy
from reftune.processes import sharding, world
from reftune.recipe import LengthTable, Recipe
from reftune.text import counted, shown
from reftune.types import Completion, Graded, Problem, SamplingParams, Solution


@dataclass(frozen=True, kw_only=True, slots=True)
class Solved:
    """Graded completions, in the order of their problems, and the cost of obtaining them."""

    problems: Sequence[Problem]
    prompts: list[list[int]]
    completions: list[Completion]
    graded: list[Graded]
    generate_s: float
    grade_s: float
    traffic: Mapping[str, int]
    """The engine's requests and bytes, summed over all processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Collector:
    """Samples solutions to problems, grades them and rewards them."""

    engine: Engine
    encoder: Encoder
    reward: Reward
    lengths: LengthTable

    # --- limits ---

    def prompt_limit(self, policy: Policy) -> float:
        """Maximum number of tokens in a prompt; infinite if there is no limit."""
        room = math.inf if policy.context is None else policy.context - self.lengths.max_new
        return max(0, min(room, self.lengths.max_prompt or math.inf))

    def fits(self, prompt: Sequence[int], response: Sequence[int], policy: Policy) -> bool:
        """Whether a response, sampled or gold, fits in `lengths.max_new` and, together with its
        prompt, in the model's context."""
        longest = policy.context or math.inf
        return len(response) <= self.lengths.max_new and len(prompt) + len(response) <= longest

    def limits(self, policy: Policy) -> str:
        """The limits that `fits` checks, as text."""
        context = "" if policy.context is None else f" and the model's context of {policy.context}"
        return f"lengths.max_new={counted(self.lengths.max_new, 'token')}{context}"

    def trainable(self, splits: Splits, policy: Policy) -> Splits:
        """`splits` without the training questions whose prompts are too long. If the recipe does
        not drop such questions, `splits` is returned unchanged."""
        if self.lengths.too_long == "refuse":
            return splits
        limit = self.prompt_limit(policy)
        train = tuple(p for p in splits.train if len(self.encoder.prompt(p)) <= limit)
        return replace(splits, train=train)

    def prompts(self, problems: Sequence[Problem], policy: Policy) -> list[list[int]]:
        """The problems' prompts as token ids. Raises: DataError for the first prompt that is too
        long, if `lengths.too_long` is `refuse`."""
        encoded: dict[str, list[int]] = {}
        limit = self.prompt_limit(policy)
        for problem in problems:
            if problem.id not in encoded:
                prompt = encoded[problem.id] = self.encoder.prompt(problem)
                if self.lengths.too_long == "refuse" and len(prompt) > limit:
                    raise DataError(
                        f"problem {problem.id}: prompt of {counted(len(prompt), 'token')}; at most"
                        f" {limit:.0f} fit (limits: lengths.max_prompt, and the model's context of"
                        f" {policy.context} less {self.lengths.max_new} new tokens); to leave such"
                        " problems out, set lengths.too_long=drop"
                    )
        return [encoded[problem.id] for problem in problems]

    # --- solving and rewarding ---

    def solve(
        self,
        policy: Policy,
        problems: Sequence[Problem],
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> Solved:
        """One graded completion per problem, greedy unless a temperature is given. To get several
        completions, repeat the problem. With several processes, each one solves its share of the
        problems, and every process receives all completions. If the recipe drops prompts that are
        too long, the completions of such prompts are empty. Raises: EngineError if the engine
        fails; DataError if a prompt is too long and the recipe does not drop it."""
        started = time.perf_counter()
        prompts, limit = self.prompts(problems, policy), self.prompt_limit(policy)
        own = world.own_part(len(problems))
        params = SamplingParams(
            max_new_tokens=self.lengths.max_new,
            max_prompt_tokens=self.lengths.max_prompt,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            first_position=own.start,
        )
        fits = [len(prompt) <= limit for prompt in prompts[own]]
        # a prompt that is too long is cut to one token, so that the other prompts keep their
        # positions in the batch
        asked = [ids if ok else ids[-1:] for ids, ok in zip(prompts[own], fits, strict=True)]
        traffic.clear()
        with world.together(EngineError), sharding.current.whole(policy, policy.compute_dtype):
            completions = self.engine.generate(policy, asked, params)
            _require_whole(
                completions,
                problems[own],
                max_new=self.lengths.max_new,
                vocabulary=policy.base.get_input_embeddings().weight.shape[0],
                engine=type(self.engine).__name__,
            )
        unasked = Completion(
            token_ids=(int(self.encoder.tokenizer.eos_token_id),),
            text="",
            logprobs=(0.0,),
            finish_reason="length",
        )
        completions = [c if ok else unasked for c, ok in zip(completions, fits, strict=True)]
        generated = time.perf_counter()
        graded = self.encoder.grade(problems[own], [c.text for c in completions])
        parts = world.gather((completions, graded, traffic))
        return Solved(
            problems=problems,
            prompts=prompts,
            completions=[each for own, _, _ in parts for each in own],
            graded=[each for _, own, _ in parts for each in own],
            generate_s=generated - started,
            grade_s=time.perf_counter() - generated,
            traffic=sum((own for _, _, own in parts), Counter()),
        )

    def rewarded(self, solved: Solved) -> list[Solution]:
        """The rewarded solutions, except those whose reward is None. Raises: RewardError if a
        reward cannot be computed or is not finite."""
        columns = (solved.problems, solved.completions, solved.graded)
        rewards = rewards_of(self.reward, *columns)
        return [
            Solution(
                problem=problem,
                prompt_ids=tuple(prompt),
                completion=completion,
                graded=graded,
                reward=float(reward),
                reward_parts=reward.parts if isinstance(reward, SumOfParts) else {},
            )
            for problem, completion, graded, prompt, reward in zip(
                *columns, solved.prompts, rewards, strict=True
            )
            if reward is not None
        ]


def rewards_of(
    reward: Reward,
    problems: Sequence[Problem],
    completions: Sequence[Completion],
    graded: Sequence[Graded],
) -> list[float | None]:
    """One reward per completion. The main process computes all rewards, so that a reward function
    can compare samples. Raises: RewardError if the reward function fails, or if it does not return
    a finite number or None for each completion."""
    columns, kind = (problems, completions, graded), getattr(reward, "kind", type(reward).__name__)
    try:
        rewards = world.from_main(partial(reward, *columns))
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        if isinstance(error, ReftuneError) or not world.is_main():
            raise
        samples = list(zip(*columns, strict=True))
        raise blame(kind, lambda some: reward(*zip(*some, strict=True)), samples, error) from error
    found = len(rewards) if hasattr(rewards, "__len__") else type(rewards).__name__
    if found != len(problems):
        expected = counted(len(problems), "reward")
        raise RewardError(f"reward {kind}: expected a list of {expected}, got {found}")
    for problem, value in zip(problems, rewards, strict=True):
        if value is not None and not _is_finite(value):
            raise RewardError(
                f"reward {kind}: sample {problem.id}: expected a finite number or None, got"
                f" {shown(value)}"
            )
    return rewards


def collector_of(recipe: Recipe, policy: Policy) -> Collector:
    """A collector with the recipe's engine, format, reward and limits."""
    return Collector(
        engine=recipe.engine,
        encoder=Encoder(policy.tokenizer, recipe.format),
        reward=recipe.reward,
        lengths=recipe.lengths,
    )


FINISH_REASONS = ("eos", "stop", "length")


def _require_whole(
    completions: object, problems: Sequence[Problem], *, max_new: int, vocabulary: int, engine: str
) -> None:
    """Check the engine's completions. Raises: EngineError if a completion is missing or is not what
    `Completion` describes."""
    if not isinstance(completions, list | tuple):
        kind = type(completions).__name__
        raise EngineError(f"engine {engine}: returned {kind}; expected a list of Completions")
    if len(completions) != len(problems):
        raise EngineError(
            f"engine {engine}: returned {counted(len(completions), 'completion')} for"
            f" {counted(len(problems), 'prompt')}"
        )
    for problem, completion in zip(problems, completions, strict=True):
        fault = _fault(completion, max_new=max_new, vocabulary=vocabulary)
        if fault is not None:
            raise EngineError(f"engine {engine}: problem {problem.id}: {fault}")


def _fault(completion: object, *, max_new: int, vocabulary: int) -> str | None:
    """What is wrong with a completion; None if nothing is. A step may sample a million tokens, so
    token ids and log-probabilities are checked only by their sum, minimum and maximum, which are
    fast to compute."""
    if not isinstance(completion, Completion):
        return f"expected a Completion, got {type(completion).__name__}"
    ids: Any = completion.token_ids
    logprobs: Any = completion.logprobs
    text: Any = completion.text
    if not isinstance(ids, tuple | list) or not isinstance(logprobs, tuple | list):
        types = f"{type(ids).__name__} and {type(logprobs).__name__}"
        return f"expected tuples of token_ids and logprobs, got {types}"
    if len(ids) == 0 or len(ids) != len(logprobs):
        return (
            f"{counted(len(ids), 'token')} with {len(logprobs)} log-probabilities; expected at"
            " least one token (the eos) and one log-probability per token"
        )
    if len(ids) > max_new:
        return f"{counted(len(ids), 'token')}; expected at most max_new_tokens, {max_new}"
    if not isinstance(text, str):
        return f"text is {shown(text)}; expected text"
    if completion.finish_reason not in FINISH_REASONS:
        reasons = ", ".join(FINISH_REASONS)
        return f"finish_reason is {shown(completion.finish_reason)}; expected {reasons}"
    if not isinstance(_sum(ids), Integral) or not 0 <= min(ids) <= max(ids) < vocabulary:
        return f"token_ids are {shown(ids)}; expected ids below the vocabulary's size, {vocabulary}"
    total = _sum(logprobs)
    if not isinstance(total, Real) or not math.isfinite(total):
        return f"logprobs are {shown(logprobs)}; expected finite numbers"
    return None


def _sum(numbers: Sequence[Any]) -> object:
    """The sum of the numbers; None if they cannot be added. The sum's type shows the numbers'
    type."""
    try:
        return sum(numbers)
    except TypeError:
        return None


def _is_finite(value: object) -> bool:
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False
