"""How much memory a stage takes and how many operations, from the model's configuration alone: its
passes are traced with tensors that have no storage.

Operations are counted by the formulas of PyTorch's flop counter. Its MemTracker cannot follow
parameters that are not trained (2.13 hooks their gradient), so live bytes are counted here.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reftune.engines._forward import forward_pass
from reftune.engines.kv import ROOM, _RoomyLayer
from reftune.model import frozen
from reftune.model.batch import PackedTokens, token_batch
from reftune.model.logprobs import token_logprobs
from reftune.model.policy import Policy
from reftune.model.scratch import make_scratch
from reftune.model.speed import llama
from reftune.model.speed.attention import ATTENTION
from reftune.model.weights import load_config
from reftune.recipe import ModelTable
from reftune.stages.stage import Cost

FP32 = 4
"""Bytes of a number: trained weights and their gradients are fp32 also where the arithmetic is not.
"""
NF4 = 0.5 + 4 / 64
"""Bytes of a weight in 4 bits, with the scale of its block."""
MOMENTS = {32: 8.0, 8: 2 + 2 * 4 / 256}
"""Bytes of AdamW's state for a weight, by bits."""
FEW = 4
"""Sequences that are traced at most."""
DRAWING = 5
"""fp32 tensors of rows × vocabulary that live at once while a token a row is drawn."""
USABLE = 0.9
"""Share of a device that a plan may fill; the rest is left to what is not counted."""

Sharding = Literal["one", "ddp", "fsdp2"]
"""One process; several, each with all weights; several, each with a part of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one device has to do at once."""

    prompt: int
    """Tokens of the longest prompt."""
    response: int
    """Tokens of the longest response."""
    batch: int
    """Sequences in one forward and backward pass."""
    rows: int
    """Sequences decoded at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes by purpose on one device: what is held all the time, and what the phases, which take
    turns, add to it."""

    held: Mapping[str, float]
    phases: Mapping[str, Mapping[str, float]]

    @property
    def parts(self) -> dict[str, float]:
        return {
            **self.held,
            **{name: size for parts in self.phases.values() for name, size in parts.items()},
        }

    @property
    def busiest(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> float:
        return sum(self.held.values()) + sum(self.phases[self.busiest].values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """A forward and backward pass on a micro-batch."""

    activations: float
    """Bytes kept for the backward pass, or taken for a moment, without the logits."""
    logits: float
    """Bytes of one chunk of logits, with its gradient."""
    forward_flops: float
    flops: float
    """Of both passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefill:
    """Bytes of reading the prompts of all rows at once."""

    casts: float
    """Copies of the weights, which sampling keeps from the first token to the last."""
    momentary: float
    cache: float
    """Of the keys and values of the prompts."""


class Outline:
    """A policy without weights: the shape of everything, the content of nothing."""

    def __init__(self, make: Callable[[], Any], table: ModelTable, *, device: str) -> None:
        """`make` builds the causal LM from its configuration."""
        tokenizer: Any = SimpleNamespace(eos_token_id=0, chat_template=None)  # nothing is decoded
        self.mode, self.table, self.device = FakeTensorMode(), table, device
        with torch.device("meta"):
            dtype = getattr(torch, table.dtype)
            self.policy = Policy(make(), tokenizer, dtype=dtype, lora=table.lora)
        if table.gradient_checkpointing:
            self.policy.recompute_blocks()
        _move_to_cpu(self.policy, self.mode)
        is_lora = self.policy.is_lora
        self.model = self.policy.model.get_base_model() if is_lora else self.policy.model
        head = self.model.get_output_embeddings().weight
        self.vocabulary: int = head.shape[0]
        ends = {id(p): p for p in (head, self.model.get_input_embeddings().weight)}
        self.ends = sum(p.numel() for p in ends.values())
        """Weights of embedding and output head, once where they are tied."""
        self.layer = max(map(_numel, _blocks(self.model)))
        """Weights of the largest transformer block."""
        self.total = _numel(self.model if not is_lora else self.policy.model)
        self.trained = sum(p.numel() for p in self.policy.parameters() if p.requires_grad)
        self.backbone = _numel(self.model.base_model)
        """Weights that a value model of its own copies."""
        if device != "cpu":
            _leave_out_masks(self.model)

    @cached_property
    def weights(self) -> float:
        """Bytes of the weights as training holds them."""
        quantized = set()
        if self.table.quantize is not None:
            layers = (layer.weight for _, _, layer in frozen.linear_layers(self.model))
            quantized = {id(weight) for weight in layers if not weight.requires_grad}
        return float(
            sum(
                NF4 * p.numel() if id(p) in quantized else p.nbytes
                for p in self.policy.model.parameters()
            )
        )

    @cached_property
    def reference(self) -> float:
        """Bytes of a frozen copy: matrices in the compute dtype; embeddings, which it may round,
        and vectors as they are."""
        width = self.policy.compute_dtype.itemsize
        inner = sum(layer.weight.numel() for _, _, layer in frozen.linear_layers(self.model))
        return float(width * inner + FP32 * (self.total - inner))

    @property
    def cache_bytes(self) -> float:
        """Of the keys and values of a token."""
        return float(self.prefill(prompt=1, rows=1).cache)

    @property
    def decoding_weights(self) -> float:
        """Bytes of the whole weights that each process needs to sample with, if it holds a part."""
        if self.policy.compute_dtype == torch.float32 or not llama.is_written_out(self.model):
            return self.weights
        embedding = self.model.get_input_embeddings().weight
        return float(self.prefill(prompt=1, rows=1).casts + FP32 * embedding.numel())

    @cache  # noqa: B019  an outline lives no longer than its plan
    def update(self, prompt: int, response: int, batch: int) -> Update:
        """Of a micro-batch of `batch` sequences of these lengths; a large one is extrapolated, as
        each further sequence takes the same."""
        if batch <= FEW:
            return self._update(prompt, response, batch)
        low, high = (self.update(prompt, response, count) for count in (FEW // 2, FEW))
        lots = (batch - FEW) / (FEW - FEW // 2)
        more = {
            name: getattr(high, name) + lots * (getattr(high, name) - getattr(low, name))
            for name in ("activations", "forward_flops", "flops")
        }
        return replace(high, **more)

    def _update(self, prompt: int, response: int, batch: int) -> Update:
        policy, real = self.policy, token_batch([[0] * prompt] * batch, [[0] * response] * batch)
        packed: PackedTokens | None = None
        if policy.packs and (self.device == "cpu" or policy.is_written_out):
            packed = policy.pack(real)
        convert = self.mode.from_tensor
        targets = convert(real.tokens[:, -response:].flatten())
        with self.mode, policy.arithmetic():
            for parameter in policy.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            tokens = torch.zeros(batch, prompt + response, dtype=torch.long)
            with _LiveBytes(policy) as live:
                if packed is None:
                    output = self.model.base_model(input_ids=tokens, use_cache=False)
                    hidden = output.last_hidden_state[:, -response:].flatten(0, 1)
                else:
                    hidden = policy.read(self.model.base_model, _converted(packed, convert))
                hidden.register_hook(lambda gradient: live.start_again())
                live.start_again()
                kept, head = live.now, self.model.get_output_embeddings()
                loss = token_logprobs(head, hidden, targets).sum()
                del hidden
                forward_flops = live.flops
                loss.backward()
        logits, layers = live.peaks[1] - kept, live.peak
        return Update(
            activations=max(kept, layers - logits),
            logits=logits,
            forward_flops=forward_flops,
            flops=live.flops,
        )

    @cache  # noqa: B019
    def prefill(self, *, prompt: int, rows: int) -> Prefill:
        """Of so many rows; many are extrapolated as in `update`."""
        if rows <= FEW:
            return self._prefill(prompt, rows)
        low, high = (self.prefill(prompt=prompt, rows=count) for count in (FEW // 2, FEW))
        lots = (rows - FEW) / (FEW - FEW // 2)
        more = {
            name: getattr(high, name) + lots * (getattr(high, name) - getattr(low, name))
            for name in ("momentary", "cache")
        }
        return replace(high, **more)

    @torch.no_grad()
    def _prefill(self, prompt: int, rows: int) -> Prefill:
        policy = self.policy
        with (
            self.mode,
            policy.inference(),
            _LiveBytes(policy) as live,
            forward_pass(policy, pack=False) as forward,
        ):
            past: Any = Cache(layer_class_to_replicate=_RoomyLayer)
            tokens = torch.zeros(rows, prompt, dtype=torch.long)
            forward(tokens, torch.ones_like(tokens), past)
            states = [states for layer in past.layers for states in (layer.keys, layer.values)]
            return Prefill(
                casts=live.now - sum(tensor.untyped_storage().nbytes() for tensor in states),
                momentary=live.peak - live.now,
                cache=sum(tensor.nbytes for tensor in states),
            )


def outline_of(table: ModelTable, texts: Iterable[str], *, device: str) -> Outline:
    """Of a recipe's model; `texts` give one from scratch its vocabulary. Raises: ModelError."""
    from transformers import AutoModelForCausalLM

    if table.scratch is not None:
        scratch = table.scratch
        return Outline(lambda: make_scratch(scratch, texts, seed=0)[0], table, device=device)
    config, trust = load_config(table), table.trust_remote_code
    return Outline(
        lambda: AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust
        ),
        table,
        device=device,
    )


def _converted(packed: PackedTokens, convert: Callable[[Tensor], Tensor]) -> PackedTokens:
    parts = (packed.tokens, packed.positions, packed.predictors, packed.packing)
    tokens, positions, predictors, packing = tree_map(
        lambda part: convert(part) if isinstance(part, Tensor) else part, parts
    )
    return PackedTokens(tokens=tokens, positions=positions, predictors=predictors, packing=packing)


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    batch, heads, length, size = query.shape
    return 2 * batch * heads * length * key.shape[-2] * (size + value.shape[-1])


def _attention_backward_flops(grad: Tensor, *states: Any, **kwargs: Any) -> int:
    return 5 * _attention_flops(*states) // 2  # the scores once more, and a gradient of each factor


FLOPS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""PyTorch's formulas, and those of what runs on a CPU only."""


def _blocks(model: nn.Module) -> nn.ModuleList:
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=_numel)


def _leave_out_masks(model: Any) -> None:
    """Fake tensors cannot be looked into, so masks would be made that a real pass finds
    needless."""
    attention = model.config._attn_implementation
    if attention not in ("sdpa", ATTENTION):
        return
    AttentionInterface.register("sdpa_without_masks", ALL_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("sdpa_without_masks")


def _move_to_cpu(module: nn.Module, mode: FakeTensorMode) -> None:
    """Tensors on the meta device become fakes of such on the CPU, in place; ties stay ties."""
    moved: dict[int, Any] = {}
    with mode:
        for tensors in (
            tensors for m in module.modules() for tensors in (m._parameters, m._buffers)
        ):
            for name, tensor in tensors.items():
                if tensor is not None:
                    if id(tensor) not in moved:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        moved[id(tensor)] = (
                            nn.Parameter(fake, requires_grad=tensor.requires_grad)
                            if is_parameter
                            else fake
                        )
                    tensors[name] = moved[id(tensor)]


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class _LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made under it that are alive, and the most there were, without the
    model's own; operations by PyTorch's formulas.

    PyTorch's `FlopCounterMode` would keep every block's tensors alive for the names it prints.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.flops = 0
        self.peaks: list[int] = []
        self._known: Any = WeakIdKeyDictionary()
        for tensor in (
            *model.parameters(),
            *model.buffers(),
            *(p.grad for p in model.parameters() if p.grad is not None),
        ):
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=result))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def start_again(self) -> None:
        """Note the peak so far; the next one is counted from here on."""
        self.peaks.append(self.peak)
        self.peak = self.now

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


# --- what adds up ---------------------------------------------------------------------------------


def stage_memory(
    outline: Outline,
    cost: Cost,
    engine: Any,
    work: Work,
    *,
    sharding: Sharding = "one",
    gpus: int = 1,
    device_bytes: float = 0.0,
) -> Memory:
    """Of a stage that trains the whole policy or its adapters. `device_bytes` are of a device in
    all.

    Source: the tensors that `model`, `stages` and `processes` make; docs/scaling.md has the
    equations.
    """
    update = outline.update(work.prompt, work.response, work.batch)
    parts = gpus if sharding == "fsdp2" else 1
    has_reference = cost.reference and not outline.policy.is_lora
    value_model = outline.backbone if cost.value_model else 0
    trained = outline.trained + value_model
    held = {
        "weights": (outline.weights + FP32 * value_model) / parts,
        "optimizer": MOMENTS[cost.state_bits] * trained / parts,
        "reference": outline.reference / parts if has_reference else 0.0,
    }
    training = {
        "gradients": FP32 * trained / parts,
        "activations": update.activations * (2.0 if cost.value_model else 1.0),
        "logits chunk": float(update.logits),
    }
    phases: dict[str, dict[str, float]] = {"update": training}
    if engine.kind == "vllm":
        share = engine.memory * device_bytes if engine.server is None else 0.0
        held["engine's copy"] = share
    else:
        prefill = outline.prefill(prompt=work.prompt, rows=work.rows)
        length = work.prompt + work.response + ROOM
        phases["generate"] = {
            "KV cache": float(outline.cache_bytes * work.rows * length),
            "reading prompts": float(prefill.momentary),
            "drawing tokens": float(DRAWING * FP32 * work.rows * outline.vocabulary),
            "engine's copy": float(prefill.casts),
        }
    if sharding == "fsdp2":
        # whole weights to sample and score with; two layers, the ends and gradients to train with
        if "generate" in phases:
            phases["generate"]["engine's copy"] = outline.decoding_weights
        if cost.scored:
            phases["score"] = {"scored weights": outline.weights}
        training["gathered"] = float(FP32 * (2 * outline.ends + 3 * outline.layer))
        whole = {name: parts * held[name] for name in ("weights", "reference")}
        phases["start"] = {"loading": max(0.0, sum(whole.values()) - sum(held.values()))}
    return Memory(held=held, phases=phases)


# --- what fits ------------------------------------------------------------------------------------


TOKENS = tuple(2**n for n in range(14, 8, -1))
"""Micro-batches that are tried, from large to small; more are no faster."""
ROWS = tuple(2**n for n in range(8, -1, -1))
"""Rows decoded at once that are tried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Of a pass, as `model.micro_batch_tokens` and `engine.batch_size` say."""

    tokens: int
    rows: int


def fitting(
    outline: Outline,
    cost: Cost,
    engine: Any,
    *,
    prompt: int,
    response: int,
    device_bytes: float,
    sharding: Sharding = "one",
    gpus: int = 1,
) -> Sizes:
    """The largest sizes whose phases stay within the usable part of a device; the smallest if none
    do. Two small passes are traced, as memory grows by the same for each further sequence."""
    room = USABLE * device_bytes
    few, more = (
        stage_memory(
            outline,
            cost,
            engine,
            Work(prompt=prompt, response=response, batch=count, rows=count),
            sharding=sharding,
            gpus=gpus,
            device_bytes=device_bytes,
        )
        for count in (2, 4)
    )
    held = sum(few.held.values())

    def needs(phase: str, count: int) -> float:
        low, high = (sum(memory.phases.get(phase, {}).values()) for memory in (few, more))
        return held + low + (high - low) / 2 * (count - 2)

    share = math.ceil(cost.batch / gpus)
    sequences = {tokens: min(share, max(1, tokens // (prompt + response))) for tokens in TOKENS}
    return Sizes(
        tokens=next((t for t in TOKENS if needs("update", sequences[t]) <= room), TOKENS[-1]),
        rows=next((r for r in ROWS if needs("generate", r) <= room), ROWS[-1]),
    )


def total_bytes(device: torch.device) -> float:
    """Memory of a device in all; of a CPU, this process's share of what its machine or container
    has."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    size = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdecimal():
        size = min(size, float(text))
    return size / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
