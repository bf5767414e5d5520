"""A fake engine for tests and dry runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from reftune.model.policy import Policy
from reftune.recipe import Component
from reftune.types import Completion, SamplingParams


class Scripted(Component):
    device_share: ClassVar[float] = 0.0
    texts: list[str] = Field(min_length=1)
    """Completions, assigned to the prompts in turn. After the last completion, the list starts
    again."""

    def generate(
        self, policy: Policy, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[Completion]:
        """See `reftune.engines.Engine`. All log-probabilities are 0."""
        completions = []
        for position in range(params.first_position, params.first_position + len(prompts)):
            text = self.texts[position % len(self.texts)]
            tokens = policy.tokenizer.encode(text, add_special_tokens=False)
            kept = [*tokens, policy.tokenizer.eos_token_id][: params.max_new_tokens]
            completions.append(policy.completion(kept, (0.0,) * len(kept)))
        return completions
