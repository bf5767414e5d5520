"""transformers' continuous batching: paged attention without padding, for an accelerator with flash
attention.

One promise of the contract is not kept: transformers draws all rows from one generator, so a
sampled completion depends on the whole list of prompts. The same call still gives the same tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from reftune.errors import EngineError
from reftune.model.policy import Policy
from reftune.model.speed.attention import attention_as_before
from reftune.recipe import Component
from reftune.types import Completion, SamplingParams

PAGE_TOKENS = 256
"""Tokens per page of the cache; flash attention reads pages of a multiple of 256."""
POLL_S = 1.0


class Continuous(Component):
    kind: str = "continuous"
    batch_size: PositiveInt | Literal["auto"] = "auto"
    """Rows decoded at once; `auto` takes what fits in device memory, up to 256."""
    batch_tokens: int = Field(2048, gt=0)
    """Tokens in one forward pass, prompts included."""

    batch_independent: ClassVar[bool] = False
    """Whether a request's tokens depend only on itself."""

    @property
    def rows(self) -> int:
        """Rows decoded at once, as a number even outside a run."""
        return 256 if self.batch_size == "auto" else self.batch_size

    @torch.no_grad()
    def generate(
        self, policy: Policy, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[Completion]:
        """One completion per prompt, in order; see `reftune.engines.Engine`.
        Raises: EngineError."""
        if not prompts:
            return []
        with (
            policy.decoding(),
            _untouched_generator(policy.device),
            _manager(policy, self._config(prompts, params), params) as m,
        ):
            ids = m.add_requests(
                [list(prompt) for prompt in prompts], max_new_tokens=params.max_new_tokens
            )
            # with every request known, so that batches do not depend on the timing of threads
            m.start()
            outputs = _collect(m, len(prompts))
        sampled = [outputs[id_] for id_ in ids]
        return [policy.completion(tuple(o.generated_tokens), tuple(o.logprobs)) for o in sampled]

    def _config(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> ContinuousBatchingConfig:
        """A cache just large enough for the rows that are decoded at once."""
        longest = max(len(prompt) for prompt in prompts) + params.max_new_tokens
        rows = min(self.rows, len(prompts))
        return ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=rows * (math.ceil(longest / PAGE_TOKENS) + 1),
            max_requests_per_batch=rows,
            max_batch_tokens=max(rows, self.batch_tokens),
            return_logprobs=True,
            seed=params.seed + params.first_position,
        )


@contextmanager
def _manager(
    policy: Policy, config: ContinuousBatchingConfig, params: SamplingParams
) -> Iterator[Any]:
    model = _in_compute_dtype(policy)
    if not getattr(
        model, "_supports_attention_backend", False
    ):  # it would ignore the pages, and write nonsense
        raise EngineError(
            f"engine continuous: {type(model).__name__} has an attention of its own; use engine=kv"
        )
    sampling = GenerationConfig(
        max_new_tokens=params.max_new_tokens,
        do_sample=params.temperature > 0,
        temperature=params.temperature or 1.0,
        top_k=params.top_k if params.temperature > 0 else 0,
        top_p=params.top_p if params.temperature > 0 else 1.0,
        eos_token_id=sorted(policy.eos_ids) or -1,  # -1: none
        pad_token_id=0,
    )
    with attention_as_before(model):
        try:
            manager = model.init_continuous_batching(sampling, config)
        except (AttributeError, ValueError) as error:
            raise EngineError(
                f"engine continuous: transformers cannot batch {type(model).__name__}: {error}"
            ) from None
        try:
            yield manager
        finally:
            manager.stop(block=True)
            manager.destroy()


def _in_compute_dtype(policy: Policy) -> Any:
    """In fp32 the policy's own model; in other dtypes a copy with cast weights, because the
    engine's threads do not see our autocast."""
    model = policy.base
    if policy.compute_dtype == torch.float32:
        return model
    cast: dict[int, Any] = {
        id(p): (
            torch.nn.Parameter(p.to(policy.compute_dtype), requires_grad=False)
            if p.is_floating_point()
            else p  # in 4 bits
        )
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo=cast)  # buffers stay fp32: rotary frequencies would suffer


def _collect(manager: Any, count: int) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    while len(outputs) < count:
        output = manager.get_result(timeout=POLL_S)
        if output is None:
            if not manager.is_running():
                raise EngineError(
                    f"engine continuous: stopped after {len(outputs)} of {count} completions"
                )
        elif output.error is not None:
            raise EngineError(f"engine continuous: {' '.join(str(output.error).split())}")
        elif output.is_finished():
            outputs[output.request_id] = output
    return outputs


@contextmanager
def _untouched_generator(device: torch.device) -> Iterator[None]:
    """Restore the global generators at the end, because transformers seeds and uses them."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
