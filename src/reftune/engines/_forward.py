"""How the default engine reads tokens: through transformers, or written out in fewer operations if
`model.speed` knows the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor

from reftune.model.policy import Policy
from reftune.model.speed import llama
from reftune.model.speed.linears import packed_linears

Forward = Callable[[Tensor, Tensor, Any], Tensor]
"""Tokens (B, S), the mask (B, T) of cache and tokens, the cache, which the tokens are added to →
logits (B, V), fp32, after the last token."""


@contextmanager
def forward_pass(policy: Policy, *, pack: bool = True) -> Iterator[Forward]:
    """How `policy` reads tokens while it decodes; all processes must enter. `pack`: reorder weights
    where that is faster."""
    if llama.is_written_out(policy.model):
        yield llama.Decoder(policy.model, policy.compute_dtype, pack=pack)
        return

    def through_transformers(tokens: Tensor, mask: Tensor, cache: Any) -> Tensor:
        output = policy.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions_of(mask, tokens),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    with (
        policy.decoding(),
        packed_linears(policy.model, policy.compute_dtype) if pack else nullcontext(),
    ):
        yield through_transformers


def positions_of(mask: Tensor, tokens: Tensor) -> Tensor:
    """Places (B, S) of the newest `tokens` (B, S) in their rows, which are padded on the left."""
    return (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
