"""Runs Llama-like transformers with few PyTorch calls, for training and for decoding.

In small models, the overhead of PyTorch's calls and of autograd takes longer than the arithmetic.
This file therefore has its own transformer blocks. Each block maps hidden states h to h'':

    h' = h + W_o attention(turn(W_q x), turn(W_k x), W_v x),    x = norm(h)
    h'' = h' + W_down (silu(W_gate y) · W_up y),                y = norm(h')

Here, `turn` applies rotary position embeddings. In Qwen3, queries and keys are normalised before
that. One half of this file is for training, and the other half is for decoding. The halves compute
the parts of a block as follows:

    part                   in training: `read_packed`       in decoding: `Decoder`
    norm                   `_RmsNorm`                       one PyTorch call
    queries, keys, values  linear layers, `_TurnAndPad`     one matmul for all three
    attention              `attention.attend_in_groups`     over the cache, for all rows at once
    silu(gate) · up        `_GatedSilu`                     one matmul for gate and up
    linear layers          the model's own modules          `product`

`_RmsNorm`, `_TurnAndPad` and `_GatedSilu` are autograd functions with closed-form gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from reftune.model.batch import PackedTokens, Packing
from reftune.model.layers import recomputed
from reftune.model.speed.attention import attend_in_groups, belongs_to, sum_slots, unpad

FAMILIES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
"""Classes in transformers that this file can run."""
FEW_ROWS = 16
"""Number of input rows for which the layout of a packed weight is chosen. This layout speeds up
products with more or fewer rows just as much."""
LARGE = 2**18
"""In fp32, oneDNN computes products whose weight has at least this many elements. If there are few
input rows, oneDNN is faster than MKL, which hardly divides such products among threads."""
Product = Callable[[Tensor], Tensor]
"""Multiplies rows (…, I) in any dtype by a weight, giving (…, O) in the weight's dtype."""
Copies = Literal["reordered", "ordinary", "none"]
"""Which copies to make of weights whose products would be faster in oneDNN's layout. `reordered`
copies have this layout. `ordinary` copies take as much memory, and may be fake tensors. `none`
makes no copies, as on devices other than the CPU."""


def is_written_out(model: Any) -> bool:
    """Whether the code in this module can run `model`, a causal LM. The model must belong to
    `FAMILIES` and use SiLU. It must not have adapters, quantized layers, sliding windows, or rotary
    position embeddings on only a part of each head."""
    config = model.config
    if not belongs_to(FAMILIES, model) or config.hidden_act != "silu":
        return False
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return False
    layers = [layer for name, layer in model.named_modules() if name.endswith("_proj")]
    return all(type(layer) is nn.Linear for layer in (*layers, model.get_output_embeddings()))


def query_key_value(attention: Any) -> list[nn.Linear]:
    """The layers that compute queries, keys and values: one for all three, or one for each."""
    if hasattr(attention, "qkv_proj"):
        return [attention.qkv_proj]
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def gate_up(mlp: Any) -> list[nn.Linear]:
    """The layers that compute gate and up: one for both, or one for each."""
    return [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]


def num_heads(attention: Any) -> tuple[int, int]:
    """The number of query heads and the number of key heads, which is also the number of value
    heads."""
    config = attention.config
    return config.num_attention_heads, config.num_key_value_heads


# --- whole sequences, with gradients --------------------------------------------------------------


def read_packed(backbone: Any, packed: PackedTokens, *, recompute: bool = False) -> Tensor:
    """The final hidden states (T, H) of packed tokens. `backbone` is the transformer without its
    output embedding. With `recompute`, only the input of each block is kept for the backward
    pass."""
    hidden: Tensor = backbone.embed_tokens(packed.tokens)
    cos, sin = (part[0, :, None] for part in backbone.rotary_emb(hidden, packed.positions[None]))
    read = partial(recomputed, _read_block) if recompute else _read_block
    for block in backbone.layers:
        hidden = read(block, hidden, cos, sin, packed.packing)
    return _norm(hidden, backbone.norm)


def _read_block(block: Any, hidden: Tensor, cos: Tensor, sin: Tensor, packing: Packing) -> Tensor:
    states = _norm(hidden, block.input_layernorm)
    states = _attention(block.self_attn, states, cos, sin, packing)
    hidden = hidden + getattr(block, "resid_attn_dropout", _unchanged)(states)
    states = _norm(hidden, block.post_attention_layernorm)
    parts = [layer(states) for layer in gate_up(block.mlp)]
    gate, up = parts if len(parts) == 2 else parts[0].chunk(2, -1)
    states = block.mlp.down_proj(_GatedSilu.apply(gate, up))  # type: ignore[no-untyped-call]
    return hidden + getattr(block, "resid_mlp_dropout", _unchanged)(states)


def _unchanged(states: Tensor) -> Tensor:
    return states


def _norm(hidden: Tensor, norm: Any) -> Tensor:
    normed: Tensor = _RmsNorm.apply(hidden, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]
    return normed


def _attention(
    attention: Any, states: Tensor, cos: Tensor, sin: Tensor, packing: Packing
) -> Tensor:
    """The attention output (T, H) for `states` (T, H)."""
    queries, keys = num_heads(attention)
    parts = [layer(states) for layer in query_key_value(attention)]
    if hasattr(attention, "q_norm"):
        for place, norm in enumerate((attention.q_norm, attention.k_norm)):
            heads = parts[place].unflatten(1, (-1, attention.head_dim))
            parts[place] = _norm(heads, norm).flatten(1)
    states = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    padded = _TurnAndPad.apply(  # type: ignore[no-untyped-call]
        states, cos, sin, packing, queries + keys
    )
    attended = attend_in_groups(
        attention,
        padded.split([queries, keys, keys], 1),
        packing,
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
    )
    output: Tensor = attention.o_proj(unpad(attended, packing).flatten(1))
    return output


class _RmsNorm(torch.autograd.Function):
    """y = w x̂,  x̂ = x r,  r = (mean(x²) + ε)^(-1/2), over the last dimension. g is dL/dy.

    dL/dw = Σ g x̂        dL/dx = r (g w - x̂ mean(g w x̂))
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        scale = norm.square_().div_(hidden.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        normed: Tensor = (hidden * scale).mul_(weight)
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, scale = ctx.saved_tensors
        normed = hidden * scale
        products = grads[0] * normed
        grad_weight = products.flatten(0, -2).sum(0)
        means = (products @ weight).div_(-hidden.shape[-1]).unsqueeze(-1)
        grad_hidden = (grads[0] * weight).addcmul_(normed, means).mul_(scale)
        return grad_hidden, grad_weight, None


class _GatedSilu(torch.autograd.Function):
    """y = silu(a) u,  silu(a) = a σ,  σ = 1 / (1 + e^(-a)). a and u, each (T, I), are the outputs
    of the gate and up projections. g is dL/dy.

    dL/da = g u (σ + silu(a) (1 - σ))        dL/du = g silu(a)
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        share = torch.sigmoid(gate)
        activated = gate * share
        slope = share.addcmul_(activated, 1 - share)
        return slope.mul_(up).mul_(grads[0]), activated.mul_(grads[0])


class _TurnAndPad(torch.autograd.Function):
    """Applies rotary embeddings to the first `turned` heads of each token, then copies all heads to
    the token's slots (see `Packing`). The input is (T, heads · D), and the result is
    (S, heads, D). The heads are those of queries, keys and values, in that order."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, cos: Tensor, sin: Tensor, packing: Packing, turned: int
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.packing, ctx.turned = packing, turned
        heads = states.view(len(states), -1, cos.shape[-1])
        heads = torch.cat([_turn(heads[:, :turned], cos, sin), heads[:, turned:]], 1)
        return heads.index_select(0, packing.slots)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        grad = sum_slots(grads[0], ctx.packing)
        turned = grad[:, : ctx.turned]
        turned.copy_(_turn(turned, cos, -sin))
        return grad.flatten(1), None, None, None, None


def _turn(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`states` (…, heads, D) with rotary position embeddings applied: the halves (l, r) of a head
    become (l cos - r sin, r cos + l sin). `cos` and `sin` are (…, 1, D)."""
    half = cos.shape[-1] // 2
    left, right = states.split(half, -1)
    turned = states * cos
    turned[..., :half].addcmul_(right, sin[..., :half], value=-1)
    turned[..., half:].addcmul_(left, sin[..., half:])
    return turned


# --- decoding -------------------------------------------------------------------------------------


class Decoder:
    """A causal LM prepared for decoding; see `engines.kv`. A `Decoder` is valid only until the LM's
    weights change."""

    def __init__(self, model: Any, dtype: torch.dtype, *, copies: Copies) -> None:
        self.embedding = model.get_input_embeddings().weight.detach()
        self.rotary, self.dtype, self.copies = model.model.rotary_emb, dtype, copies
        self.blocks = [_Block(block, dtype, copies) for block in model.model.layers]
        self.norm = _plain_norm(model.model.norm)
        self.head = product([model.get_output_embeddings()], dtype, copies=copies)

    def __call__(self, tokens: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """The final hidden state of each row's last token, (B, H). `tokens` (B, S) are the new
        tokens, and `mask` (B, T) covers cached and new tokens. Rows are padded on the left."""
        with torch.autocast(tokens.device.type, enabled=False):
            rows, length = tokens.shape
            positions = (mask.cumsum(1) - 1).clamp_(min=0)[:, -length:].flatten()
            reads_padding = length == 1 or self.copies != "reordered"
            places = None if reads_padding else mask[:, -length:].flatten().nonzero().squeeze(1)
            layout = _Layout(rows, length, places)
            tokens, positions = layout.pick(tokens.flatten()), layout.pick(positions)
            hidden = functional.embedding(tokens, self.embedding).float()
            cos, sin = (part[0].unsqueeze(1) for part in self.rotary(hidden, positions[None]))
            bias = torch.zeros((), dtype=self.dtype, device=mask.device).where(
                _visible(mask, length), -torch.inf
            )
            for block in self.blocks:
                hidden = block(hidden, cos, sin, bias, cache, layout)
            return self.norm(layout.lay_out(hidden)[:, -1])

    def logits(self, hidden: Tensor) -> Tensor:
        """The fp32 logits (B, V) for final hidden states (B, H)."""
        return self.head(hidden).float()


class _Layout(NamedTuple):
    """The layout of N tokens in B rows of S places. Rows are padded for attention only."""

    rows: int
    length: int
    places: Tensor | None
    """(N,) Indices of the tokens among all places; None if padding is read too."""

    def pick(self, flat: Tensor) -> Tensor:
        """The tokens' rows (N, …) of `flat`, which has one row per place (B · S, …)."""
        return flat if self.places is None else flat[self.places]

    def lay_out(self, states: Tensor) -> Tensor:
        """The tokens' `states` (N, …) as (B, S, …), with 0 in places without a token."""
        if self.places is not None:
            empty = states.new_zeros(self.rows * self.length, *states.shape[1:])
            states = empty.index_copy_(0, self.places, states)
        return states.view(self.rows, self.length, *states.shape[1:])


class _Block:
    """A block of the transformer. The attributes of its modules are looked up only once, when the
    `_Block` is created, because PyTorch is slow at looking them up."""

    def __init__(self, block: Any, dtype: torch.dtype, copies: Copies) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.index, self.dtype = attention.layer_idx, dtype
        self.head_size, self.scaling = attention.head_dim, attention.scaling
        self.queries, self.keys = num_heads(attention)
        self.attention_norm = _plain_norm(block.input_layernorm)
        self.mlp_norm = _plain_norm(block.post_attention_layernorm)
        head_norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else ()
        self.head_norms = [_plain_norm(norm) for norm in head_norms]
        self.query_key_value = product(query_key_value(attention), dtype, copies=copies)
        self.output = product([attention.o_proj], dtype, copies=copies)
        self.gate_up = product(gate_up(mlp), dtype, copies=copies)
        self.down = product([mlp.down_proj], dtype, copies=copies)

    def __call__(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, cache: Any, layout: _Layout
    ) -> Tensor:
        """The block's output (N, H) for `hidden` (N, H)."""
        states = self.attention_norm(hidden)
        hidden = hidden + self.output(self._attend(states, cos, sin, bias, cache, layout))
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, -1)
        return hidden + self.down(functional.silu(gate).mul_(up))

    def _attend(
        self, states: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, cache: Any, layout: _Layout
    ) -> Tensor:
        heads = self.query_key_value(states).view(len(states), -1, self.head_size)
        turned, value = heads.split([self.queries + self.keys, self.keys], 1)
        turned = turned.float()
        if self.head_norms:
            parts = zip(self.head_norms, turned.split([self.queries, self.keys], 1), strict=True)
            turned = torch.cat([norm(part) for norm, part in parts], 1)
        turned = layout.lay_out(_turn(turned, cos, sin).to(self.dtype))
        query, key = turned.transpose(1, 2).split([self.queries, self.keys], 1)
        value = layout.lay_out(value).transpose(1, 2)
        key, value = cache.update(key, value, self.index)
        attended = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bias,
            scale=self.scaling,
            enable_gqa=self.queries != self.keys,
        )
        return layout.pick(attended.transpose(1, 2).flatten(2).flatten(0, 1))


def _plain_norm(norm: Any) -> Callable[[Tensor], Tensor]:
    weight = norm.weight.detach()
    return partial(
        functional.rms_norm, normalized_shape=weight.shape, weight=weight, eps=norm.variance_epsilon
    )


def _visible(mask: Tensor, length: int) -> Tensor:
    """(B, 1, S, T) for S new tokens and T positions: True where the token may attend to the
    position. If S > 1, even padding attends to itself, because a softmax over nothing is NaN."""
    visible = mask.bool()[:, None, None, :]
    if length == 1:
        return visible
    own = torch.ones(length, mask.shape[1], dtype=torch.bool, device=mask.device)
    start = mask.shape[1] - length
    return (visible & own.tril(start)) | (own.tril(start) & own.triu(start))


# --- products of linear layers --------------------------------------------------------------------


@contextmanager
def packed_linears(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside the `with` block, linear layers use read-only copies of their weights that have been
    cast to `dtype` and stored in oneDNN's layout. Matmuls then take half to two thirds of their
    usual time. Copying 134 million weights takes 0.1 s. Layers that `_can_be_packed` rejects, such
    as small layers in fp32 and all layers on devices other than the CPU, stay unchanged."""
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and _can_be_packed(module.weight, dtype)
    ]
    for layer in layers:
        layer.forward = product([layer], dtype)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def product(
    layers: Sequence[nn.Linear], dtype: torch.dtype, *, copies: Copies = "reordered"
) -> Product:
    """A single product in `dtype` that computes the outputs of all `layers` for the same input
    rows, side by side."""
    weight = _joined([layer.weight for layer in layers], dtype)
    bias = None if layers[0].bias is None else _joined([layer.bias for layer in layers], dtype)
    if copies == "none" or not _can_be_packed(weight, dtype):
        return lambda rows: functional.linear(rows.to(dtype), weight, bias)
    if copies == "ordinary":
        copied = weight.clone()
        return lambda rows: functional.linear(rows.to(dtype), copied, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, FEW_ROWS)
    return lambda rows: torch.ops.mkldnn._linear_pointwise(
        rows.to(dtype), packed, bias, "none", [], ""
    )


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    cast = [part.detach().to(dtype) for part in parts]
    return cast[0] if len(parts) == 1 else torch.cat(cast)


def _can_be_packed(weight: Tensor, dtype: torch.dtype) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float32:
        return weight.numel() >= LARGE
    return dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
