"""A user's own reward function, as in `reward: my_reward.py:score`.

The function is called as TRL calls its `reward_funcs`: once per batch, with lists as keyword
arguments. These are the arguments:

- `prompts`: the questions
- `completions`: the generated texts
- `completion_ids`: the token ids of these texts
- `answer`: the gold answers as the data spells them, such as `1,250 apples`
- `golds`: the gold answers as reftune reads them, such as `1250`
- `verdicts`, `values` and `reasons`: the verdict, answer and reason in each completion's grade
- each column of the data, under its own name

If a column of the data is named `answer`, `golds`, `verdicts`, `values` or `reasons`, the argument
of that name holds this column instead. This does not apply to columns from which reftune reads the
question, answer, rationale, id or options.

The function receives the arguments that its signature names, or all of them if it takes `**kwargs`.
It may be async. If the function fails on a batch, it is called again with one sample at a time, to
find a sample that causes an error.

The function returns a list with one entry per completion: a number, a dict of named parts such as
`{"correct": 1.0, "short": 0.1}`, or None to exclude the completion from training. Instead of the
list, the function may return a dict of lists, such as
`{"correct": [1.0, …], "short": [0.1, …]}`. Every part must be a number, never None. The parts add
up to the reward, and each part is logged as `reward_part/NAME`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from pydantic import Field

from reftune.errors import RewardError
from reftune.grading.rewards import Sample, SumOfParts, blame, ids
from reftune.recipe import Component, component_class, refusal
from reftune.text import counted
from reftune.types import Completion, Graded, Problem

ARGUMENTS = frozenset(
    "prompts completions completion_ids answer golds verdicts values reasons".split()
)
"""Names of the arguments that are not columns of the data."""


class FunctionReward(Component):
    """Calls [your own function](grading.md#your-own-reward), which `kind` names as
    `file.py:name`."""

    timeout_s: float = Field(600.0, gt=0, allow_inf_nan=False)
    """Seconds that a call may take before the run stops. One call rewards all samples of a step."""

    def model_post_init(self, _: Any) -> None:
        if ":" not in self.kind:
            raise refusal("reward_function", "expected your own function as file.py:name")
        _function(self.kind)

    def __call__(
        self,
        problems: Sequence[Problem],
        completions: Sequence[Completion],
        graded: Sequence[Graded],
    ) -> list[float | None]:
        """One reward per completion, in the same order. Raises: RewardError if the function fails,
        takes too long or returns anything but rewards."""
        samples = list(zip(problems, completions, graded, strict=True))
        if not samples:
            return []
        try:
            rewards = self._call(samples)
        except RewardError:
            raise
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise blame(self.kind, self._call, samples, error) from error
        return [self._value(each, sample) for each, sample in zip(rewards, samples, strict=True)]

    def _call(self, samples: Sequence[Sample]) -> Sequence[Any]:
        arguments = self._arguments(samples)
        try:
            with _time_limit(self.timeout_s):
                rewards = _finished(_function(self.kind)(**arguments))
        except _TimeUpError:
            raise RewardError(
                f"reward {self.kind}: took more than timeout_s={self.timeout_s:g} for the batch"
                f" {ids(samples)}"
            ) from None
        if isinstance(rewards, Mapping):
            rewards = _by_sample(rewards, len(samples))
        is_list = hasattr(rewards, "__len__") and getattr(rewards, "ndim", 1) > 0
        if not is_list or isinstance(rewards, str | bytes | Mapping):
            raise RewardError(
                f"reward {self.kind}: expected a list of {counted(len(samples), 'number')}, got"
                f" {type(rewards).__name__}"
            )
        if len(rewards) != len(samples):
            raise RewardError(
                f"reward {self.kind}: expected {counted(len(samples), 'reward')}, got"
                f" {len(rewards)} for the batch {ids(samples)}"
            )
        return list(rewards)

    def _arguments(self, samples: Sequence[Sample]) -> dict[str, list[Any]]:
        offered = _columns(samples)
        named: set[str] = set()
        for each in inspect.signature(_function(self.kind)).parameters.values():
            if each.kind is each.VAR_KEYWORD:
                named.update(offered)
            elif each.kind is each.VAR_POSITIONAL:
                continue
            elif each.name in offered:
                named.add(each.name)
            elif each.default is each.empty:
                raise RewardError(
                    f"reward {self.kind}: has the argument {each.name}, which is not among"
                    f" {', '.join(sorted(offered))}"
                )
        return {name: column for name, column in offered.items() if name in named}

    def _value(self, reward: Any, sample: Sample) -> float | None:
        if reward is None:
            return None
        if not isinstance(reward, Mapping):
            return self._number(reward, sample)
        if not reward:
            raise RewardError(
                f"reward {self.kind}: sample {sample[0].id}: expected at least one part, got {{}}"
            )
        return SumOfParts(
            {str(name): self._number(part, sample, str(name)) for name, part in reward.items()}
        )

    def _number(self, reward: Any, sample: Sample, part: str = "") -> float:
        with suppress(TypeError, ValueError, OverflowError):
            if not isinstance(reward, str | bytes) and math.isfinite(number := float(reward)):
                return number
        line = repr(reward).partition("\n")[0][:100]
        where = f"reward {self.kind}: sample {sample[0].id}"
        wanted = f"a finite number for the part {part}" if part else "a finite number or None"
        raise RewardError(f"{where}: expected {wanted}, got {line}")


class _TimeUpError(BaseException):
    """Raised when a call runs out of time. It is not an `Exception`, because the user's code might
    catch every `Exception`."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _TimeUpError inside the `with` block when the time is up. Outside the main thread,
    there is no limit, because Python handles signals only in the main thread."""

    def expire(number: int, frame: Any) -> None:
        raise _TimeUpError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGALRM, expire)
    # The signal repeats every second, because the user's code may swallow the first error.
    rest = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *rest)
        signal.signal(signal.SIGALRM, handler)


@functools.cache
def _function(kind: str) -> Callable[..., Any]:
    function: Callable[..., Any] = component_class(kind, group="rewards")
    return function


def _columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for problem, _, _ in samples for name in problem.columns)
    return {
        "answer": [problem.written_answer for problem, _, _ in samples],
        "golds": [str(problem.answer) for problem, _, _ in samples],
        "verdicts": [grade.verdict.value for _, _, grade in samples],
        "values": [grade.value for _, _, grade in samples],
        "reasons": [grade.reason for _, _, grade in samples],
        **{name: [problem.columns.get(name) for problem, _, _ in samples] for name in names},
        "prompts": [problem.question for problem, _, _ in samples],
        "completions": [completion.text for _, completion, _ in samples],
        "completion_ids": [list(completion.token_ids) for _, completion, _ in samples],
    }


def _finished(result: Any) -> Any:
    """`result`, awaited if it is awaitable. Awaiting needs a new thread, because the current thread
    may already be running an event loop."""
    if not inspect.isawaitable(result):
        return result

    async def wait() -> Any:
        return await result

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, wait()).result()


def _by_sample(parts: Mapping[Any, Any], count: int) -> Any:
    """One mapping per sample if `parts` maps names to lists, otherwise `parts` itself."""
    columns = list(parts.values())
    if not columns or not all(isinstance(c, list | tuple) and len(c) == count for c in columns):
        return parts
    return [dict(zip(parts, row, strict=True)) for row in zip(*columns, strict=True)]
