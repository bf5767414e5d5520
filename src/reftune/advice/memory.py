"""How much memory training takes, from the model's configuration alone: a step is traced with
tensors that have no storage."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reftune.engines._forward import forward_pass
from reftune.engines.kv import ROOM, _RoomyLayer
from reftune.model.logprobs import token_logprobs
from reftune.model.policy import Policy
from reftune.model.speed import llama
from reftune.model.speed.attention import ATTENTION
from reftune.recipe import ModelTable

FP32 = 4
"""Bytes of a number: weights, gradients and optimizer are fp32 also where the arithmetic is not."""
DRAWING = 5
"""fp32 tensors of rows × vocabulary that live at once while a token a row is drawn."""

Sharding = Literal["one", "ddp", "fsdp2"]
"""One process; several, each with all weights; several, each with a part of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Numbers of a model's shape."""

    total: int
    trained: int
    backbone: int
    """What a value model of its own copies: all but an output head that is not tied."""
    ends: int
    """Embedding and output head, once where they are tied."""
    layer: int
    """The largest one."""
    layers: int
    hidden: int
    vocabulary: int
    cache_bytes: int
    """Of the keys and values of a token."""

    @property
    def trunk(self) -> int:
        """All but the ends: what every token is multiplied with."""
        return self.total - self.ends


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
class Traced:
    """Bytes that passes take on top of weights and their gradients."""

    activations: float
    """Of a micro-batch: what is kept for the backward pass, and what the passes take for a moment.
    """
    logits: float
    """Of one chunk, with its gradient."""
    casts: float
    """Of the weights to the compute dtype, which sampling keeps from the first token to the last.
    """
    prefill: float
    """For a moment, while the prompts of all rows are read."""


class Outline:
    """A policy without weights: the shape of everything, the content of nothing."""

    def __init__(self, make: Callable[[], Any], table: ModelTable, *, device: str) -> None:
        """`make` builds the causal LM from its configuration; where `device` is no `cpu`, attention
        is in the compute dtype."""
        tokenizer: Any = SimpleNamespace(
            eos_token_id=0, chat_template=None
        )  # all that a policy asks of it before it decodes
        self.mode = FakeTensorMode()
        with torch.device("meta"):
            self.policy = Policy(
                make(), tokenizer, dtype=getattr(torch, table.dtype), lora=table.lora
            )
        _move_to_cpu(self.policy, self.mode)
        self.model = (
            self.policy.model.get_base_model() if self.policy.is_lora else self.policy.model
        )
        _leave_out_masks(self.model, device)

    @cached_property
    def sizes(self) -> Sizes:
        head = self.model.get_output_embeddings().weight
        ends = {id(p): p.numel() for p in (head, self.model.get_input_embeddings().weight)}
        blocks = max((m for m in self.model.modules() if isinstance(m, nn.ModuleList)), key=_numel)
        return Sizes(
            total=_numel(self.policy.model),
            trained=sum(p.numel() for p in self.policy.parameters() if p.requires_grad),
            backbone=_numel(self.model.base_model),
            ends=sum(ends.values()),
            layer=max(map(_numel, blocks)),
            layers=len(blocks),
            hidden=head.shape[1],
            vocabulary=head.shape[0],
            cache_bytes=self._prefill(prompt=1, rows=1)[2],
        )

    @property
    def decoding_weights(self) -> float:
        """Bytes that each process needs to sample with, where it holds but a part of the
        weights."""
        if self.policy.compute_dtype == torch.float32 or not llama.is_written_out(
            self.policy.model
        ):
            return float(FP32 * self.sizes.total)
        casts, _, _ = self._prefill(prompt=1, rows=1)
        return float(casts + FP32 * self.model.get_input_embeddings().weight.numel())

    @cache  # noqa: B019  an outline lives no longer than its plan
    def trace(self, work: Work) -> Traced:
        """Bytes of an update on a full micro-batch, and of reading the prompts of all rows at
        once."""
        activations, logits = self._update(work)
        casts, prefill, _ = self._prefill(prompt=work.prompt, rows=work.rows)
        return Traced(activations=activations, logits=logits, casts=casts, prefill=prefill)

    def _update(self, work: Work) -> tuple[int, int]:
        with self.mode, self.policy.arithmetic():
            tokens = torch.zeros(work.batch, work.prompt + work.response, dtype=torch.long)
            for parameter in self.policy.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            with _LiveBytes(self.policy) as live:
                hidden = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
                hidden = hidden[:, -work.response :].flatten(0, 1)
                hidden.register_hook(lambda gradient: live.start_again())
                live.start_again()
                kept = live.now
                head = self.model.get_output_embeddings()
                loss = token_logprobs(head, hidden, tokens[:, -work.response :].flatten()).sum()
                del hidden
                loss.backward()
        logits, layers = live.peaks[1] - kept, live.peak
        return max(kept, layers - logits), logits

    @torch.no_grad()
    def _prefill(self, *, prompt: int, rows: int) -> tuple[int, int, int]:
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
            held = sum(tensor.nbytes for tensor in states)
            casts = live.now - sum(tensor.untyped_storage().nbytes() for tensor in states)
            momentary = live.peak - live.now
        return casts, momentary, held


def _leave_out_masks(model: Any, device: str) -> None:
    """Fake tensors cannot be looked into, so masks would be made that a real pass finds
    needless."""
    attention = model.config._attn_implementation
    if attention not in ("sdpa", ATTENTION):
        return
    attention = attention if device == "cpu" else "sdpa"
    AttentionInterface.register(f"{attention}_without_masks", ALL_ATTENTION_FUNCTIONS[attention])
    model.set_attn_implementation(f"{attention}_without_masks")


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
    """Bytes of the tensors made under it that are alive, and the most there were; the model's own
    do not count."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
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


def training_memory(
    outline: Outline,
    stage: Any,
    engine: Any,
    work: Work,
    *,
    sharding: Sharding = "one",
    gpus: int = 1,
    device_bytes: float = 0.0,
) -> Memory:
    """Of a stage that trains the whole policy: supervised, or reinforcement learning.
    `device_bytes` are of a device in all.

    Source: the tensors that `model`, `stages` and `processes` make; docs/scaling.md has the
    equations.
    """
    sizes, traced = outline.sizes, outline.trace(work)
    parts = gpus if sharding == "fsdp2" else 1
    reinforced = getattr(stage, "kind", None) == "rl"
    is_separate = reinforced and stage.value_model == "separate"
    has_reference = reinforced and stage.algorithm.needs_reference and not outline.policy.is_lora
    value_model = sizes.backbone if is_separate else 0
    whole = FP32 * sizes.total
    held = {
        "weights": whole / parts,
        "optimizer": 2 * FP32 * sizes.trained / parts,
        "reference": whole / parts if has_reference else 0.0,
        "value model": 3 * FP32 * value_model / parts,
    }
    update = {
        "gradients": FP32 * (sizes.trained + value_model) / parts,
        "activations": traced.activations * (2.0 if is_separate else 1.0),
        "logits chunk": float(traced.logits),
    }
    length = work.prompt + work.response + ROOM
    generate = {
        "KV cache": float(sizes.cache_bytes * work.rows * length),
        "reading prompts": float(traced.prefill),
        "drawing tokens": float(DRAWING * FP32 * work.rows * sizes.vocabulary),
        "engine's copy": float(traced.casts),
    }
    if engine.kind == "vllm":
        generate = {}
        held["engine's copy"] = engine.memory * device_bytes if engine.server is None else 0.0
    phases = {"update": update, "generate": generate}
    if (
        sharding == "fsdp2"
    ):  # whole weights to sample and score with; two layers, the ends and gradients to train with
        if generate:
            generate["engine's copy"] = outline.decoding_weights
        if reinforced:
            phases["score"] = {"scored weights": float(whole)}
        update["gathered"] = float(FP32 * (2 * sizes.ends + 3 * sizes.layer))
        at_start = whole * (1 + has_reference) + FP32 * value_model
        phases["start"] = {"loading": max(0.0, at_start - sum(held.values()))}
    return Memory(held=held, phases=phases)
