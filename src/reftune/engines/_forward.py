"""How the default engine reads tokens: through transformers, or for Llama-like models in fewer
operations.

Where a batch is small, starting operations takes longer than many of them do. Those of a block of a
Llama-like model are written out here: query, key and value in one product, gate and up in another,
from copies of the weights in the compute dtype; keys are kept in that dtype too, and cast once
instead of at every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from reftune.model.policy import Policy
from reftune.model.speed.linears import packed_linears, product
from reftune.model.weights import is_llama_like
from reftune.processes.sharding import whole_tensor

Forward = Callable[[Tensor, Tensor, Any], Tensor]
"""Tokens (B, S), the mask (B, T) of cache and tokens, the cache, which the tokens are added to →
logits (B, V), fp32, after the last token."""


@contextmanager
def forward_pass(policy: Policy, *, pack: bool = True) -> Iterator[Forward]:
    """How `policy` reads tokens while it decodes; all processes must enter. `pack`: reorder weights
    where that is faster."""
    if is_written_out(policy.model):
        yield LlamaForward(policy.model, policy.compute_dtype, pack=pack)
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


def is_written_out(model: Any) -> bool:
    """Whether `LlamaForward` computes what `model` does: not with adapters, and not where it is
    quantized."""
    if not is_llama_like(model):
        return False
    layers = [
        layer
        for block in model.model.layers
        for part in (block.self_attn, block.mlp)
        for layer in _projections(part)
    ]
    return all(type(layer) is nn.Linear for layer in (*layers, model.get_output_embeddings()))


def _projections(part: nn.Module) -> list[nn.Module]:
    return [layer for name, layer in part.named_children() if name.endswith("_proj")]


class LlamaForward:
    """A Llama-like model, to read only, as long as its weights do not change. See `Forward`.

    Weights that are split over processes are gathered one by one, so that none holds all of them in
    fp32.
    """

    def __init__(self, model: Any, dtype: torch.dtype, *, pack: bool) -> None:
        self.embedding = whole_tensor(model.get_input_embeddings().weight).detach()
        self.rotary, self.dtype = model.model.rotary_emb, dtype
        self.blocks = [
            _Block(block, index, dtype, pack) for index, block in enumerate(model.model.layers)
        ]
        self.norm = _Norm(model.model.norm)
        self.head = product([model.get_output_embeddings()], dtype, pack=pack)

    def __call__(self, tokens: Tensor, mask: Tensor, cache: Any) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            hidden = functional.embedding(tokens, self.embedding)
            cos, sin = (
                part.unsqueeze(1) for part in self.rotary(hidden, positions_of(mask, tokens))
            )
            bias = torch.zeros((), dtype=self.dtype, device=mask.device).where(
                _visible(mask, tokens.shape[1]), -torch.inf
            )
            for block in self.blocks:
                hidden = block(hidden, cos, sin, bias, cache)
            return self.head(self.norm(hidden[:, -1])).float()


class _Block:
    def __init__(self, block: Any, index: int, dtype: torch.dtype, pack: bool) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.index, self.dtype, self.head_size, self.scaling = (
            index,
            dtype,
            attention.head_dim,
            attention.scaling,
        )
        self.attention_norm, self.mlp_norm = (
            _Norm(block.input_layernorm),
            _Norm(block.post_attention_layernorm),
        )
        has_norms = hasattr(attention, "q_norm")
        self.head_norms = (_Norm(attention.q_norm), _Norm(attention.k_norm)) if has_norms else None
        self.query_key_value = product(
            [attention.q_proj, attention.k_proj, attention.v_proj], dtype, pack=pack
        )
        self.output = product([attention.o_proj], dtype, pack=pack)
        self.gate_up = product([mlp.gate_proj, mlp.up_proj], dtype, pack=pack)
        self.act, self.down = mlp.act_fn, product([mlp.down_proj], dtype, pack=pack)
        self.queries = attention.q_proj.out_features // attention.head_dim
        self.keys = attention.k_proj.out_features // attention.head_dim

    def __call__(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, cache: Any
    ) -> Tensor:
        hidden = hidden + self.output(
            self._attend(self.attention_norm(hidden), cos, sin, bias, cache)
        )
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, -1)
        return hidden + self.down(self.act(gate) * up)

    def _attend(self, states: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, cache: Any) -> Tensor:
        rows, length, _ = states.shape
        heads = self.query_key_value(states).view(rows, length, -1, self.head_size).transpose(1, 2)
        turned, value = heads.split([self.queries + self.keys, self.keys], 1)
        query, key = self._turn(turned, cos, sin).split([self.queries, self.keys], 1)
        key, value = cache.update(key, value, self.index)
        attended = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bias,
            scale=self.scaling,
            enable_gqa=self.queries != self.keys,
        )
        return attended.transpose(1, 2).flatten(2)

    def _turn(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary positions of queries and keys, (B, heads, S, D)."""
        heads = heads.float()
        if self.head_norms is not None:
            parts = heads.split([self.queries, self.keys], 1)
            heads = torch.cat(
                [norm(part) for norm, part in zip(self.head_norms, parts, strict=True)], 1
            )
        left, right = heads.chunk(2, -1)
        return (heads * cos + torch.cat([-right, left], -1) * sin).to(self.dtype)


class _Norm:
    def __init__(self, norm: Any) -> None:
        self.weight, self.epsilon = whole_tensor(norm.weight).detach(), norm.variance_epsilon

    def __call__(self, hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden, self.weight.shape, self.weight, self.epsilon)


def _visible(mask: Tensor, length: int) -> Tensor:
    """(B, 1, S, T), True where a token reads another; padding reads itself, as a softmax over
    nothing is not a number."""
    visible = mask.bool()[:, None, None, :]
    if length == 1:
        return visible
    own = torch.ones(length, mask.shape[1], dtype=torch.bool, device=mask.device)
    start = mask.shape[1] - length
    return (visible & own.tril(start)) | (own.tril(start) & own.triu(start))
