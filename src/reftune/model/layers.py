"""Modifies the layers of a loaded model: casts or quantizes frozen weights, speeds up dropout, and
adds gradient checkpointing.

Weights are frozen if the model is only evaluated or serves as a reference, or if only adapters are
trained. Frozen matrices are kept in 4 bits or in the compute dtype. The compute dtype loses nothing
in linear layers, because autocast would cast their weights to it on every use anyway. Vectors, such
as biases and norm weights, stay in fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reftune.errors import ModelError

Embeddings = Literal["all", "exact", "none"]
"""Which embeddings are cast to a dtype: all of them, only those that the dtype represents exactly,
or none. Autocast itself casts no embeddings."""

# PEFT imports bitsandbytes, which warns if it lacks a kernel that reftune does not use
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def narrow(model: nn.Module, dtype: torch.dtype, *, embeddings: Embeddings) -> None:
    """Cast frozen matrices to `dtype` and all other parameters to fp32, in place. `embeddings`
    determines which embeddings are cast to `dtype`. Under autocast, a hook casts the output of
    these embeddings back to fp32, so that hidden states stay in fp32."""
    matrices = narrowable(model, dtype, embeddings=embeddings)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            is_narrow = id(parameter) in matrices and not parameter.requires_grad
            parameter.data = parameter.data.to(dtype if is_narrow else torch.float32)
    for module in model.modules():
        if type(module) is nn.Embedding and module.weight.dtype != torch.float32:
            module._forward_hooks.clear()
            module.register_forward_hook(_widen)


def narrowable(
    model: nn.Module, dtype: torch.dtype, *, embeddings: Embeddings
) -> dict[int, nn.Parameter]:
    """The matrices that `narrow` casts to `dtype` if they are frozen, keyed by `id`."""
    from transformers.pytorch_utils import Conv1D

    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if not isinstance(module, nn.Linear | Conv1D) and type(module) is not nn.Embedding:
            continue
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        is_cast = id(weight) not in looked_up or embeddings == "all"
        if not is_cast and embeddings == "exact":
            is_cast = torch.equal(weight.to(dtype).to(weight.dtype), weight)
        if is_cast and weight.is_floating_point():  # false for weights in 4 bits
            found[id(weight)] = weight
    return found


def _widen(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output.float() if torch.is_autocast_enabled(output.device.type) else output


def quantize(model: Any, dtype: torch.dtype) -> None:
    """Quantize all linear layers except the output head to 4 bits, in place. The format is NF4 in
    blocks of 64 weights (QLoRA, arXiv:2305.14314, §3). The quantized weights are the same as those
    of Hugging Face transformers with `BitsAndBytesConfig(load_in_4bit=True,
    bnb_4bit_quant_type="nf4")`. Matmuls run in `dtype`. Raises: ModelError if bitsandbytes is not
    installed or there are no linear layers."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError:
        raise ModelError(
            "model.quantize: bitsandbytes is not installed; run pip install 'reftune[quantize]'"
        ) from None
    layers = list(linear_layers(model))
    if not layers:
        raise ModelError(
            f"model.quantize: {type(model).__name__} has no linear layers (nn.Linear) to quantize"
        )
    for parent, name, layer in layers:
        quantized = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=dtype,
            compress_statistics=False,
            quant_type="nf4",
            device="meta",
        )
        device, weight = layer.weight.device, layer.weight.detach().float()
        quantized.weight = Params4bit(
            weight, quant_type="nf4", compress_statistics=False, module=quantized
        )
        quantized.bias = layer.bias
        quantized.support_avx512bf16_for_cpu = False  # True would repack weights that training uses
        setattr(parent, name, quantized.to(device))
    model.is_loaded_in_4bit = True  # PEFT reads this attribute


def linear_layers(model: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The parent, name and module of each linear layer except the output head."""
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                yield parent, name, child


@torch.no_grad()
def plain_state(
    model: Any, dtype: torch.dtype = torch.float32, *, merged: bool = True
) -> dict[str, Tensor]:
    """The weights of a model as plain tensors on the CPU. If `merged` is True, adapters are merged
    in fp32; if not, they are left out. The results are rounded to `dtype`. 4-bit weights are
    dequantized, and tied weights stay tied."""
    layers = _lora_layers(model)
    base = model.get_base_model() if layers else model
    tensors = dict(base.named_parameters(remove_duplicate=False))
    buffers = dict(base.named_buffers(remove_duplicate=False))
    tensors |= {name: buffers[name] for name in base.state_dict() if name in buffers}
    plain: dict[int, Tensor] = {}
    state = {}
    for name, tensor in tensors.items():
        if "lora_" in name:
            continue
        if id(tensor) not in plain:
            adapted = layers.get(id(tensor)) if merged else None
            plain[id(tensor)] = _plain(tensor, adapted, dtype)
        state[name.replace(".base_layer.", ".")] = plain[id(tensor)]
    return state


def _lora_layers(model: Any) -> dict[int, Any]:
    """The LoRA layers, keyed by the `id` of their base weights. PEFT is imported only if needed,
    because its import takes seconds."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    return {id(m.get_base_layer().weight): m for m in model.modules() if isinstance(m, LoraLayer)}


def _plain(tensor: Tensor, adapted: Any, dtype: torch.dtype) -> Tensor:
    value = tensor.detach()
    if hasattr(tensor, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        value = dequantize_4bit(value, tensor.quant_state)
    if not value.is_floating_point():
        return value.cpu()
    value = value.float()
    for adapter in () if adapted is None else adapted.active_adapters:
        value = value + adapted.get_delta_weight(adapter).float()
    return value.to("cpu", dtype)


# --- dropout --------------------------------------------------------------------------------------


STEPS = 2**16
"""Dropout probabilities are rounded to multiples of 1 / STEPS, so that one random 64-bit number is
enough for four entries of a mask."""


def use_cheap_dropout(model: nn.Module) -> None:
    """Replace the dropout layers of `model` in place. On a CPU, the new layers draw masks seven
    times as fast as PyTorch's layers."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p))


class Dropout(nn.Dropout):
    """`nn.Dropout`, except that on a CPU, its masks differ from PyTorch's for the same seed."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p in (0, 1) or input.device.type != "cpu":
            return super().forward(input)
        dropped: Tensor = _Dropout.apply(input, self.p)  # type: ignore[no-untyped-call]
        return dropped


class _Dropout(torch.autograd.Function):
    """Sets each entry to 0 with probability p, and multiplies the others by 1 / (1 - p)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, p: float) -> Tensor:
        ctx.first_kept = round(p * STEPS) - STEPS // 2
        words = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device="cpu")
        draws = words.random_(-(2**63), None).view(torch.int16)[: values.numel()]
        ctx.save_for_backward(draws.view(values.shape))
        return _drop(values, draws.view(values.shape), ctx.first_kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (draws,) = ctx.saved_tensors
        return _drop(grads[0], draws, ctx.first_kept), None


def _drop(values: Tensor, draws: Tensor, first_kept: int) -> Tensor:
    kept = torch.empty_like(values)
    torch.ge(draws, first_kept, out=kept)
    share = (STEPS // 2 - first_kept) / STEPS
    return kept.mul_(values).div_(share)


# --- recomputing ----------------------------------------------------------------------------------


def recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `forward(*args, **kwargs)` without keeping the activations for the backward pass, which
    recomputes them."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def recompute(block: nn.Module) -> None:
    """Use gradient checkpointing (arXiv:1604.06174) in `block` and in later copies of it. A block
    then keeps only its input, and recomputes its activations in the backward pass."""
    # a partial rather than a closure, so that a deep copy of the block calls its own `forward`
    block.forward = partial(recomputed, block.forward)
