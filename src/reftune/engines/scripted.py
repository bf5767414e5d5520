"""A fake engine for tests and dry runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from reftune.model.policy import Policy
from reftune.recipe import Component
from reftune.types import Completion, SamplingParams


class Scripted(Component):
    kind: str = "scripted"
    device_share: ClassVar[float] = 0.0
    texts: list[str] = Field(min_length=1)
    """Completions, assigned to the prompts in turn. After the last completion, the list starts
    again."""

    def generate(
        self, policy: Policy, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[Completion]:
        """See `reftune.engines.Engine`. All log-probabilities are 0."""
        positions = range(params.first_position, params.first_position + len(prompts))
        return [
            self._completion(policy, self.texts[i % len(self.texts)], params) for i in positions
        ]

    def _completion(self, policy: Policy, text: str, params: SamplingParams) -> Completion:
        token_ids = [
            *policy.tokenizer.encode(text, add_special_tokens=False),
            policy.tokenizer.eos_token_id,
        ]
        kept = token_ids[: params.max_new_tokens]
        return policy.completion(kept, (0.0,) * len(kept))
