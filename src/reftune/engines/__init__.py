"""Engines: prompts → completions. One file per engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from reftune.types import Completion, SamplingParams

if TYPE_CHECKING:
    from reftune.model.policy import Policy


traffic: Counter[str] = Counter()
"""What engines have sent since the last step, which logs it as `engine/…`."""


class Engine(Protocol):
    """What every engine offers."""

    def generate(
        self, policy: Policy, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[Completion]:
        """One completion per prompt, in order.

        The tokens are a function of the weights, the prompts and `params` only: not of the other
        prompts in the batch.
        """
