"""Engines turn prompts into completions. Each engine has its own file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from reftune.types import Completion, SamplingParams

if TYPE_CHECKING:
    from reftune.model.policy import Policy


traffic: Counter[str] = Counter()
"""The numbers of requests and bytes that this process's engine sent in its latest call. They are
logged as `engine/…`."""


class Engine(Protocol):
    """The interface of every engine. An engine may also have a method `verify()`, which raises a
    RecipeError if the engine cannot work in the present environment."""

    def generate(
        self, policy: Policy, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[Completion]:
        """One completion per prompt, in the order of the prompts.

        A completion depends only on the weights, its prompt, its position (`params.first_position`
        plus its index) and `params`, not on the other prompts.
        """
