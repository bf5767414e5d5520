"""Counts the bytes and operations that a model's forward and backward passes need, without
allocating any tensor. PyTorch 2.13's MemTracker is not used, because it fails on parameters that
are not trained."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reftune.engines.kv import _RoomyLayer, reader
from reftune.model import layers
from reftune.model.batch import PackedTokens, token_batch
from reftune.model.logprobs import token_logprobs
from reftune.model.policy import Policy
from reftune.model.speed.attention import ATTENTION
from reftune.model.weights import untrained
from reftune.processes.sharding import block_matrices, transformer_blocks
from reftune.recipe import ModelTable

FP32 = 4
"""Bytes per fp32 number. Trained weights and their gradients are fp32, whatever the compute
dtype."""
NF4 = 0.5 + 4 / 64
"""Bytes per 4-bit weight. A block of 64 weights shares a 4-byte scale."""
FEW, MORE = 2, 4
"""A pass is traced with these two numbers of sequences. Its cost with any other number is
extrapolated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """The cost of a forward and backward pass on a micro-batch."""

    kept: float
    """Bytes that the forward pass leaves for the backward pass."""
    momentary: float
    """Peak number of bytes in use in addition to `kept`."""
    forward_flops: float
    flops: float
    """Floating-point operations of both passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefill:
    """The memory needed to read a batch of prompts at once."""

    casts: float
    """Bytes of the copies of weights that sampling keeps in memory."""
    momentary: float
    """Peak number of bytes in use in addition to `casts` and `cache`."""
    cache: float
    """Bytes of the keys and values of the prompts."""


class Outline:
    """A policy that has no weights, only the shapes of its tensors."""

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
        self.model = self.policy.base
        head = self.model.get_output_embeddings().weight
        self.vocabulary: int = head.shape[0]
        ends = {id(p): p for p in (head, self.model.get_input_embeddings().weight)}
        self.ends = sum(p.numel() for p in ends.values())
        """Number of weights in the embedding and the output head, counted once if tied."""
        self.total = _numel(self.policy.model)
        self.layer = max(map(_numel, transformer_blocks(self.model)), default=self.total)
        """Number of weights in the largest transformer block."""
        self.trained = sum(p.numel() for p in self.policy.parameters() if p.requires_grad)
        self.backbone = _numel(self.model.base_model)
        """Number of weights that a separate value model copies."""
        if device != "cpu":
            _leave_out_masks(self.model)

    @cached_property
    def weights(self) -> float:
        """Bytes of the weights during training."""
        if self.table.quantize is None:
            return self._bytes({})
        linear = (layer.weight for _, _, layer in layers.linear_layers(self.model))
        return self._bytes({id(w): NF4 for w in linear if not w.requires_grad})

    def _bytes(self, widths: Mapping[int, float]) -> float:
        """Bytes of all weights. `widths` (id → bytes per element) overrides the element size of the
        weights that it lists."""
        weights = self.policy.model.parameters()
        return float(sum(p.numel() * widths.get(id(p), p.itemsize) for p in weights))

    @cached_property
    def reference(self) -> float:
        """Bytes of a frozen copy of the model. The copy's matrices are in the compute dtype. Its
        embeddings and vectors keep their original dtype."""
        dtype = self.policy.compute_dtype
        cast = layers.narrowable(self.model, dtype, embeddings="none")
        return self._bytes({id_: float(dtype.itemsize) for id_ in cast})

    @cached_property
    def gathered(self) -> float:
        """Bytes of all weights when FSDP2 gathers them for sampling and scoring: the transformer
        blocks' matrices in the compute dtype, all other weights in their original dtype."""
        width = float(self.policy.compute_dtype.itemsize)
        return self._bytes(dict.fromkeys(block_matrices(self.policy), width))

    @cached_property
    def gathered_copies(self) -> float:
        """Bytes of the additional copies that sampling makes of gathered weights."""
        with self._as_gathered():
            return self._prefill(1, 1, of_gathered=True).casts

    @contextmanager
    def _as_gathered(self) -> Iterator[None]:
        cast, dtype = block_matrices(self.policy), self.policy.compute_dtype
        held = [(p, p.data, p.requires_grad) for p in self.policy.parameters()]
        try:
            for p, data, _ in held:
                p.requires_grad_(False)
                p.data = data.to(dtype) if id(p) in cast else data
            yield
        finally:
            for p, data, is_trained in held:
                p.data = data
                p.requires_grad_(is_trained)

    @property
    def cache_bytes(self) -> float:
        """Bytes of one token's keys and values in all layers."""
        return float(self.prefill(prompt=1, rows=1).cache)

    def update(self, prompt: int, response: int, batch: float) -> Update:
        """The cost of a micro-batch of `batch` sequences with these prompt and response lengths."""
        return _of_many(lambda count: self._update(prompt, response, count), batch)

    @cache  # noqa: B019  an outline lives no longer than its plan
    def _update(self, prompt: int, response: int, batch: int) -> Update:
        policy, backbone = self.policy, self.model.base_model
        # distinct prompts, because equal prompts would be read only once
        real = token_batch([[row] * prompt for row in range(batch)], [[0] * response] * batch)
        is_packed = policy.packs and (self.device == "cpu" or policy.is_written_out)
        parts = tree_map_only(Tensor, self.mode.from_tensor, asdict(real.packed()))
        with self.mode, policy.arithmetic():
            for parameter in policy.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            tokens = torch.zeros(batch, prompt + response, dtype=torch.long)
            with _LiveBytes(policy) as live:
                if is_packed:
                    hidden = policy.read(backbone, PackedTokens(**parts))
                else:
                    states = backbone(input_ids=tokens, use_cache=False).last_hidden_state
                    hidden = states[:, -response:].flatten(0, 1)
                    del states
                targets = tokens[:, -response:].flatten()
                loss = token_logprobs(self.model.get_output_embeddings(), hidden, targets).sum()
                del hidden
                kept, forward_flops = live.now, live.flops
                loss.backward()
        return Update(
            kept=kept, momentary=live.peak - kept, forward_flops=forward_flops, flops=live.flops
        )

    def prefill(self, *, prompt: int, rows: int) -> Prefill:
        """The memory needed to read `rows` prompts at once."""
        return _of_many(lambda count: self._prefill(prompt, count), rows)

    @cache  # noqa: B019
    @torch.no_grad()
    def _prefill(self, prompt: int, rows: int, *, of_gathered: bool = False) -> Prefill:
        """The memory needed to read `rows` prompts of `prompt` tokens at once, computed on fake
        tensors. Callers set `of_gathered` while the model holds gathered weights. It has no effect
        on the computation, but it makes `@cache` store this result separately from the result for
        ordinary weights."""
        policy = self.policy
        with (
            self.mode,
            policy.inference(),
            _LiveBytes(policy) as live,
            reader(policy, copies="ordinary" if self.device == "cpu" else "none") as reads,
        ):
            past: Any = Cache(layer_class_to_replicate=_RoomyLayer)
            tokens = torch.zeros(rows, prompt, dtype=torch.long)
            reads.head(reads.forward(tokens, torch.ones_like(tokens), past))
            states = [states for layer in past.layers for states in (layer.keys, layer.values)]
            return Prefill(
                casts=live.now - sum(tensor.untyped_storage().nbytes() for tensor in states),
                momentary=live.peak - live.now,
                cache=sum(tensor.nbytes for tensor in states),
            )


def outline_of(table: ModelTable, texts: Iterable[str], *, device: str) -> Outline:
    """The outline of a recipe's model. A from-scratch model gets its vocabulary from `texts`.
    Raises: ModelError if the configuration cannot be loaded."""
    return Outline(lambda: untrained(table, texts=texts), table, device=device)


T = TypeVar("T", Update, Prefill)


def _of_many(trace: Callable[[int], T], count: float) -> T:
    """The result of `trace`, extrapolated linearly to `count` sequences."""
    few, more = trace(FEW), trace(MORE)
    high = asdict(more)
    each = {name: (high[name] - size) / (MORE - FEW) for name, size in asdict(few).items()}
    return type(more)(**{name: high[name] + (count - MORE) * each[name] for name in high})


def _leave_out_masks(model: Any) -> None:
    """Turn off mask creation, because fake tensors do not reveal that a mask is unnecessary."""
    if model.config._attn_implementation in ("sdpa", ATTENTION):
        AttentionInterface.register("sdpa_without_masks", ALL_ATTENTION_FUNCTIONS["sdpa"])
        model.set_attn_implementation("sdpa_without_masks")


def _move_to_cpu(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace meta tensors in place with fake CPU tensors. Tied weights stay tied."""
    moved: dict[int, Any] = {}
    with mode:
        for m in module.modules():
            for tensors in (m._parameters, m._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in moved:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                        is_parameter, grad = isinstance(tensor, nn.Parameter), tensor.requires_grad
                        moved[id(tensor)] = nn.Parameter(fake, grad) if is_parameter else fake
                    tensors[name] = moved[id(tensor)]


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- counters -------------------------------------------------------------------------------------


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    batch, heads, length, size = query.shape
    return 2 * batch * heads * length * key.shape[-2] * (size + value.shape[-1])


def _attention_backward_flops(grad: Tensor, *states: Any, **kwargs: Any) -> int:
    # 5 matrix products, where the forward pass has 2: 1 recomputes the scores, 4 yield gradients
    return 5 * _attention_flops(*states) // 2


FLOPS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""Operation → the formula for its number of FLOPs. The formulas for attention on a CPU are our
own; all others are PyTorch's."""


class _LiveBytes(TorchDispatchMode):
    """Counts floating-point operations, and the current and peak bytes of all tensors that are
    created while it is active. The model's own tensors are not included. PyTorch's
    `FlopCounterMode` is not used, because it would keep every block's tensors alive."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.flops = 0
        self._known: Any = WeakIdKeyDictionary()
        gradients = (p.grad for p in model.parameters() if p.grad is not None)
        for tensor in (*model.parameters(), *model.buffers(), *gradients):
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
