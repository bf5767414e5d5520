"""An engine of your own. This one calls transformers' `generate` for one prompt at a time. It is
slow, but short enough to show what an engine must do.

To use it, set `engine: examples/engine.py:OneByOne` in the recipe.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from reftune.model.policy import Policy
from reftune.recipe import Component
from reftune.seeds import derive_seed
from reftune.types import Completion, SamplingParams


class OneByOne(Component):
    def generate(
        self, policy: Policy, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[Completion]:
        """One completion per prompt, in the same order. Each completion depends only on the
        weights, the prompt, the prompt's position and `params`."""
        was_training = policy.training
        policy.eval()
        try:
            return [
                self._complete(policy, prompt, params, place)
                for place, prompt in enumerate(prompts, params.first_position)
            ]
        finally:
            policy.train(was_training)

    @torch.no_grad()
    def _complete(
        self, policy: Policy, prompt: Sequence[int], params: SamplingParams, place: int
    ) -> Completion:
        draw: dict[str, float] = {"do_sample": False}
        if params.temperature > 0:
            draw = {
                "do_sample": True,
                "temperature": params.temperature,
                "top_k": params.top_k,
                "top_p": params.top_p,
            }
        ids = torch.tensor([list(prompt)], device=policy.device)
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(params.seed, "token", place))
            out = policy.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=params.max_new_tokens,
                eos_token_id=sorted(policy.eos_ids),
                pad_token_id=min(policy.eos_ids),
                return_dict_in_generate=True,
                output_logits=True,
                output_scores=True,
                **draw,
            )
        tokens = out.sequences[0, len(prompt) :].tolist()
        drawn_from = out.scores if params.temperature > 0 else out.logits
        logprobs = [
            float(scores[0].float().log_softmax(-1)[token])
            for scores, token in zip(drawn_from, tokens, strict=True)
        ]
        # PPO needs log-probabilities under the distribution that the tokens were drawn from
        return policy.completion(tokens, logprobs)
