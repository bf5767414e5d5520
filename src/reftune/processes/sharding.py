"""Sharding of weights: every process holds all of them (DDP) or a part (FSDP2). `current` is the
sharding in use; all other code asks it."""

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
    """All weights in every process; gradients are summed once per step."""

    splits: ClassVar[bool] = False
    """Whether weights, gradients and optimizer state are split over the processes."""

    def __str__(self) -> str:
        return "weights whole in each (DDP)"

    def distribute(self, model: Any) -> None:
        """Prepare `model` for training by all processes: with the main process's weights, split in
        place if sharded."""
        if world.world_size() == 1:
            return
        import torch.distributed as dist

        for parameter in model.parameters():
            dist.broadcast(parameter.detach(), src=0)

    def is_split(self, model: Any) -> bool:
        """Whether each process currently holds a part of `model`. Forward and backward passes then
        wait for all processes, which must run equally many."""
        return False

    @contextmanager
    def whole(self, model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Give every process all weights of `model`, for reading, so that forward passes need no
        other process. Matrices of transformer blocks may be in `dtype`, to which autocast would
        cast them anyway. All processes must enter. The children of a split `model` are plain
        copies; call these, not the model itself.
        """
        yield

    def add_up_gradients(self, model: Any) -> None:
        """Sum the gradients that backward passes have not summed over the processes already."""
        if world.world_size() > 1:
            world.add_up(*(p.grad for p in model.parameters() if p.grad is not None))


@dataclass(frozen=True)
class Fsdp2(Sharding):
    """A part of the weights, gradients and optimizer state in each process, gathered a transformer
    block at a time."""

    splits: ClassVar[bool] = True
    reshard_after_forward: bool = True
    replicas: int = 1
    """Number of groups of consecutive processes that each hold the model once."""

    def __str__(self) -> str:
        groups = "" if self.replicas == 1 else f", in each of {self.replicas} groups"
        return f"weights sharded (FSDP2{groups})"

    def distribute(self, model: Any) -> None:
        super().distribute(model)
        if world.world_size() > 1:
            self._split(model)

    def _split(self, model: nn.Module) -> None:
        """Split every parameter; gradients are summed over the processes, as the losses assume."""
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
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo supports no other
        _twins[model] = twin

    def is_split(self, model: Any) -> bool:
        from torch.distributed.tensor import DTensor

        return any(isinstance(parameter, DTensor) for parameter in model.parameters())

    @contextmanager
    def whole(self, model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
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
        if not self.is_split(model):
            super().add_up_gradients(model)


current = Sharding()
"""This run's sharding."""
_twins: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()
"""Split models → the same modules, which hold whole weights for a while."""


@contextmanager
def held(how: Sharding) -> Iterator[None]:
    """Use this sharding while the block runs."""
    global current
    current = how
    try:
        yield
    finally:
        current = Sharding()


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules in `model` that transformers lists as not to be split."""
    names = {
        name
        for module in model.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }
    return [module for module in model.modules() if type(module).__name__ in names]


def block_matrices(model: nn.Module) -> set[int]:
    """The matrices of linear layers in transformer blocks, by id; heads and embeddings are not
    among them."""
    from torch import nn

    blocks = transformer_blocks(model)
    layers = (layer for block in blocks for layer in block.modules())
    return {id(layer.weight) for layer in layers if isinstance(layer, nn.Linear)}


def _twin(model: nn.Module) -> nn.Module:
    """A copy of the modules, with parameters that take no memory; buffers and ties are as in
    `model`."""
    from torch import nn

    hollow = {
        id(p): nn.Parameter(p.detach().new_empty(0), requires_grad=False)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo=hollow)


# --- tensors --------------------------------------------------------------------------------------


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor split over the processes; a plain tensor is returned as it is."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors whole, for saving: split ones on the CPU, and only in the main process."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = whole_tensor(tensor).detach()
        if world.is_main():
            found[name] = value if value is tensor else value.cpu()
    return found


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """The whole `value`, held by every process, split like `like`; unchanged if `like` is plain."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def assign(parameter: Tensor, value: Tensor) -> None:
    """Set `parameter` of a model in training to the whole `value`, held by every process."""
    parameter.copy_(part_of(value, parameter))
