"""Attention of models that read whole sequences: over sequences without padding between them, and
on a processor in fp32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reftune.model.batch import Packing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "reftune"


def attend_our_way(model: PreTrainedModel) -> None:
    """Have a model that attends by PyTorch's own attention take `packing`, and attend in fp32 where
    it is on a processor.

    There the backward pass of bf16 attention is slow.
    """
    if model.config._attn_implementation != "sdpa":
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


@contextmanager
def attention_as_before(model: PreTrainedModel) -> Iterator[None]:
    """Without `attend_our_way`, for what knows transformers' own attention only."""
    is_ours = model.config._attn_implementation == ATTENTION
    if is_ours:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if is_ours:
            model.set_attn_implementation(ATTENTION)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`query`, `key` and `value` (B, heads, tokens, D) → (B, tokens, heads, D). With `packing`, B
    is 1 and `mask` is not read.

    One new token against a cache is read as it lies: nothing is cast.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packing is not None:
        return _attend_packed(module, (query, key, value), packing, options), None
    if query.shape[2] == 1 or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    with torch.autocast("cpu", enabled=False):
        output, _ = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), mask, **options
        )
    return output.to(query.dtype), None


def _attend_packed(
    module: nn.Module, states: Sequence[Tensor], packing: Packing, options: Mapping[str, Any]
) -> Tensor:
    """One group of sequences after the other, padded for attention only."""
    padded = [_pad(part[0].transpose(0, 1), packing) for part in states]
    outputs, start = [], 0
    for rows, length in packing.sizes:
        group = slice(start, start + rows * length)
        query, key, value = (
            part[group].unflatten(0, (rows, length)).transpose(1, 2) for part in padded
        )
        outputs.append(_attend(module, query, key, value, None, **options)[0].flatten(0, 1))
        start = group.stop
    return _unpad(torch.cat(outputs), packing)[None]


def _pad(tokens: Tensor, packing: Packing) -> Tensor:
    padded: Tensor = _Pad.apply(tokens, packing.slots, packing.order)  # type: ignore[no-untyped-call]
    return padded


def _unpad(padded: Tensor, packing: Packing) -> Tensor:
    tokens: Tensor = _Unpad.apply(padded, packing.slots, packing.is_token, packing.order)  # type: ignore[no-untyped-call]
    return tokens


class _Pad(torch.autograd.Function):
    """(T, …) tokens → (S, …) slots. No real token sees what is in the others, so their gradient is
    0 and not added up."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, slots: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return tokens.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grads[0].index_select(0, order), None, None


class _Unpad(torch.autograd.Function):
    """(S, …) slots → (T, …) tokens."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, slots: Tensor, is_token: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(slots, is_token)
        return padded.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        slots, is_token = ctx.saved_tensors
        return grads[0].index_select(0, slots) * is_token[:, None, None], None, None, None
