"""What makes bf16 arithmetic fast on a processor. Nothing here changes results beyond rounding, and a GPU never comes here."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "reftune_cpu"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""From glibc's malloc.h."""
LARGEST_KEPT = 32 * 2**20
"""Bytes; larger blocks go back to the system when they are freed. The largest threshold that glibc takes."""


def keep_freed_memory() -> None:
    """Let the allocator keep the memory of freed tensors, of all threads, instead of asking for zeroed pages at every step.

    A training step frees and asks again for the same gigabytes. Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, LARGEST_KEPT), (M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(option, value)


def attend_in_fp32(model: PreTrainedModel) -> None:
    """Have a model that reads whole sequences attend in fp32: the backward pass of bf16 attention is slow on processors."""
    if model.config._attn_implementation != "sdpa":
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


def attend_as_before(model: PreTrainedModel) -> None:
    """Undo `attend_in_fp32`, for what knows transformers' own attention only."""
    if model.config._attn_implementation == ATTENTION:
        model.set_attn_implementation("sdpa")


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> tuple[Tensor, None]:
    """`query`, `key` and `value` (B, heads, tokens, D). One new token against a cache is read as it lies: nothing is cast."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.shape[2] == 1 or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, *args, **options)
    with torch.autocast("cpu", enabled=False):
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), *args, **options)
    return output.to(query.dtype), None
