"""Lets the models of the transformers library read sequences without padding between them.

The sequences follow one another without gaps, and a prompt that several of them share appears once.
Attention is the exception: it pads the sequences in groups of similar length, and gives each
sequence its own copy of a shared prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reftune.model.batch import PackedTokens, Packing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "reftune"
FAMILIES = (
    "CodeGenForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "GemmaForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "OPTForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
"""Classes in transformers that take positions from the caller and attend causally to the whole
sequence, and can therefore read sequences without padding."""


def attend_our_way(model: PreTrainedModel) -> None:
    """If `model` is a CodeGen model or uses SDPA, make its attention accept packed sequences and a
    `Packing` that describes them. On a CPU, the attention then runs in fp32, except for a single
    new token (see `_attend`). Any other model stays unchanged."""
    if type(model).__name__ == "CodeGenForCausalLM":
        for module in model.modules():
            if hasattr(module, "_attn"):
                setattr(module, "_attn", partial(_attend_codegen, module, module._attn))  # noqa: B010
    if model.config._attn_implementation != "sdpa":
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


def takes_packing(model: PreTrainedModel) -> bool:
    """Whether `read_packed` supports this causal LM. Call `attend_our_way` on it first."""
    is_codegen = type(model).__name__ == "CodeGenForCausalLM"
    uses_ours = is_codegen or model.config._attn_implementation == ATTENTION
    return uses_ours and belongs_to(FAMILIES, model)


def belongs_to(families: Sequence[str], model: Any) -> bool:
    """Whether the class of `model` comes from the transformers library, the class's name is in
    `families`, and no layer of the model has a sliding window."""
    kind, window = type(model), getattr(model.config, "sliding_window", None)
    if window is not None and getattr(model.config, "use_sliding_window", True):
        return False
    return kind.__module__.startswith("transformers.models.") and kind.__name__ in families


def read_packed(backbone: Any, packed: PackedTokens) -> Tensor:
    """The final hidden states (T, H) of packed tokens. `backbone` is the transformer without its
    output embedding."""
    # transformers passes a four-dimensional mask on unchanged; nothing reads its values
    mask: Any = torch.empty(1, 1, 1, 1, device=packed.tokens.device)
    mask.packing = packed.packing  # CodeGen passes on only the mask
    hidden: Tensor = backbone(
        input_ids=packed.tokens[None],
        position_ids=packed.positions[None],
        attention_mask=mask,
        use_cache=False,
        packing=packed.packing,
    ).last_hidden_state[0]
    return hidden


def attend_in_groups(
    module: nn.Module, states: Sequence[Tensor], packing: Packing, **options: Any
) -> Tensor:
    """The attention output (S, heads, D), computed separately for each group in `packing`. `states`
    contains queries, keys and values in the same layout as the output; their numbers of heads may
    differ."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    parts = (part.split([rows * length for rows, length in packing.sizes]) for part in states)
    outputs = []
    for group, size in zip(zip(*parts, strict=True), packing.sizes, strict=True):
        query, key, value = (part.unflatten(0, size).transpose(1, 2) for part in group)
        attended, _ = sdpa_attention_forward(module, query, key, value, None, **options)
        outputs.append(attended.flatten(0, 1))
    return torch.cat(outputs)


def unpad(padded: Tensor, packing: Packing) -> Tensor:
    """The states (T, …) of the tokens, taken from the slots (S, …) in `padded`."""
    tokens: Tensor = _Unpad.apply(padded, packing)  # type: ignore[no-untyped-call]
    return tokens


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
    """The attention output (B, tokens, heads, D) for `query`, `key` and `value`, each (B, heads,
    tokens, D). With `packing`, B is 1 and `mask` is ignored.

    On a CPU, attention runs in fp32, because its backward pass is slow in bf16. But if there is
    only one new token, which attends to a cache, attention runs in the dtype of `query`.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    wanted, is_wide = query.dtype, query.device.type == "cpu" and query.shape[2] > 1
    if is_wide:
        query, key, value = query.float(), key.float(), value.float()
    with torch.autocast("cpu", enabled=False) if is_wide else nullcontext():
        if packing is None:
            output, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
        else:
            heads = [part[0].transpose(0, 1) for part in (query, key, value)]
            padded = [_Pad.apply(part, packing) for part in heads]  # type: ignore[no-untyped-call]
            output = unpad(attend_in_groups(module, padded, packing, **options), packing)[None]
    return output.to(wanted), None


def _attend_codegen(
    module: Any, original: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any = None
) -> tuple[Tensor, Any]:
    """CodeGen's own attention, whose inputs and output are (B, heads, tokens, D). If `mask` carries
    a packing, attention is computed as for other models."""
    packing = getattr(mask, "packing", None)
    if packing is None:
        attended: tuple[Tensor, Any] = original(query, key, value, mask)
        return attended
    dropout = module.attn_dropout.p if module.training else 0.0
    options = {"dropout": dropout, "scaling": module.scale_attn**-1, "is_causal": True}
    output, _ = _attend(module, query, key, value, None, packing=packing, **options)
    return output.transpose(1, 2), None


def sum_slots(slots: Tensor, packing: Packing) -> Tensor:
    """The gradient (T, …) of each token, summed over all slots that hold a copy of the token.
    `slots` (S, …) contains the gradient of each slot. Empty slots have gradient 0, because no token
    attends to them."""
    total = slots.index_select(0, packing.order)
    for tokens, further in zip(packing.repeats[::2], packing.repeats[1::2], strict=True):
        more = total.index_select(0, tokens) + slots.index_select(0, further)
        total.index_copy_(0, tokens, more)
    return total


class _Pad(torch.autograd.Function):
    """Copies the tokens' states (T, …) to their slots (S, …)."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return tokens.index_select(0, packing.slots)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum_slots(grads[0], ctx.packing), None


class _Unpad(torch.autograd.Function):
    """Takes the tokens' states (T, …) from their slots (S, …). Slots not read get gradient 0."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return padded.index_select(0, packing.order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].index_select(0, ctx.packing.slots)
        return grad.mul_(ctx.packing.is_read.view(-1, *[1] * (grad.dim() - 1))), None
