"""Sharding of weights: every process holds either all weights (DDP) or a part of them (FSDP2)."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from reftune.processes import world

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Sharding:
    """How training is spread over the processes. This base class is plain DDP: every process holds
    all weights, and gradients are summed over the processes once per optimizer step."""

    splits: ClassVar[bool] = False
    """Whether weights, gradients and optimizer state are split across the processes."""

    def __str__(self) -> str:
        return "all weights in each (DDP)"

    def distribute(self, model: Any) -> None:
        """Prepare `model` for training by all processes: copy the main process's weights to the
        others and, for FSDP2, split all weights in place."""
        if world.world_size() == 1:
            return
        import torch.distributed as dist

        for parameter in model.parameters():
            dist.broadcast(parameter.detach(), src=0)

    def is_split(self, model: Any) -> bool:
        """Whether each process currently holds only a part of `model`. If so, all processes must
        run the same number of forward and backward passes, because each pass exchanges weights or
        gradients with other processes."""
        parameters = model.parameters() if world.world_size() > 1 else ()
        return any(hasattr(parameter, "full_tensor") for parameter in parameters)

    @contextmanager
    def whole(self, model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Inside the `with` block, every process can read all the weights of `model`, so a forward
        pass involves no other process. All processes must enter the block. If the weights are split
        over the processes, each child module of `model` is replaced with an unsplit copy until the
        block ends. Call these child modules, not `model` itself. If `dtype` is given, the weight
        matrices of the copies' transformer blocks are cast to `dtype`, as autocast would do
        anyway."""
        if not self.is_split(model):
            yield
            return
        twin, split = _twins[model], dict(model._modules)
        cast = block_matrices(twin)
        for full, part in zip(twin.parameters(), model.parameters(), strict=True):
            value = part.detach()
            is_cast = dtype is not None and id(full) in cast
            full.data = whole_tensor(value.to(dtype) if is_cast else value)
        model._modules.update(twin._modules)
        try:
            yield
        finally:
            model._modules.update(split)
            for full in twin.parameters():
                full.data = full.data.new_empty(0)

    def add_up_gradients(self, model: Any) -> None:
        """Sum the gradients of `model` over the processes, unless the backward passes have already
        done so."""
        if not self.is_split(model):
            world.add_up(*(p.grad for p in model.parameters() if p.grad is not None))


@dataclass(frozen=True)
class Fsdp2(Sharding):
    """Each process holds a part of the weights, gradients and optimizer state. Weights are gathered
    one transformer block at a time."""

    splits: ClassVar[bool] = True
    reshard_after_forward: bool = True
    replicas: int = 1
    """Number of groups of consecutive processes. Each group holds one copy of the model."""

    def __str__(self) -> str:
        groups = "" if self.replicas == 1 else f", in each of {self.replicas} groups"
        return f"weights sharded (FSDP2{groups})"

    def distribute(self, model: Any) -> None:
        super().distribute(model)
        if world.world_size() == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        twin = _twin(model)
        shape = (self.replicas, world.world_size() // self.replicas)
        device = next(model.parameters()).device.type
        grid = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
        mesh = grid if self.replicas > 1 else grid["shard"]
        for block in transformer_blocks(model):
            fully_shard(block, mesh=mesh, reshard_after_forward=self.reshard_after_forward)
        fully_shard(model, mesh=mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # the losses assume sums, not averages
                module.set_force_sum_reduction_for_comms(True)  # gloo supports no other reduction
        _twins[model] = twin


current = Sharding()
_twins: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()
"""Maps each split model to its `_twin`. Inside the block of `Sharding.whole`, the twin holds the
unsharded weights."""


@contextmanager
def held(how: Sharding) -> Iterator[None]:
    """Make `how` the current sharding inside the block."""
    global current
    current = how
    try:
        yield
    finally:
        current = Sharding()


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of `model`: the modules whose classes are listed in transformers'
    `_no_split_modules`."""
    names = {
        name
        for module in model.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }
    return [module for module in model.modules() if type(module).__name__ in names]


def block_matrices(model: nn.Module) -> set[int]:
    """The `id`s of the weight matrices of all linear layers in the transformer blocks."""
    from torch import nn

    blocks = transformer_blocks(model)
    layers = (layer for block in blocks for layer in block.modules())
    return {id(layer.weight) for layer in layers if isinstance(layer, nn.Linear)}


def _twin(model: nn.Module) -> nn.Module:
    """A copy of `model` with empty parameters. Buffers are copied, and tied weights stay tied."""
    from torch import nn

    hollow = {
        id(p): nn.Parameter(p.detach().new_empty(0), requires_grad=False)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo=hollow)


# --- tensors --------------------------------------------------------------------------------------


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of `tensor`. If it is split across the processes, all of them must call this.
    If it is not split, it is returned unchanged."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, moved to the CPU. A tensor that is split across the processes is gathered first.
    All processes must call this. Only the main process gets the tensors, because it alone saves
    them. The other processes get an empty dict."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = whole_tensor(tensor).detach()
        if world.is_main():
            found[name] = value if value is tensor else value.cpu()
    return found


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """Split `value` in the same way as `like`, and return this process's part. If `like` is not
    split, return all of `value`. Every process must pass all of `value`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def assign(parameter: Tensor, value: Tensor) -> None:
    """Set `parameter`, which may be split, to `value`. Every process must pass the whole
    `value`."""
    parameter.copy_(part_of(value, parameter))
