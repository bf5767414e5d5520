"""Several processes that train one model: who they are, what they share out, what they tell each
other.

Every process runs the same code. The dear parts (decoding, grading, token scores, gradients) are
shared out by rows and put together again, so that every process then holds the same rollouts,
advantages and weights; only the main one writes and prints. A launcher (`torchrun`, `accelerate
launch`) says through the environment how many there are, and whether weights are sharded.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from reftune.errors import ProcessError, RecipeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from reftune.processes.zero import ZeroOptimizer

T = TypeVar("T")
E = TypeVar("E", bound=Exception)

TIMEOUT = timedelta(hours=2)
"""How long a process waits for another: longer than the main one ever writes. A launcher ends all
when one dies."""

Sharding = Literal["none", "fsdp2", "zero1", "zero2", "zero3"]
ZERO: Mapping[Sharding, int] = {"zero1": 1, "zero2": 2, "zero3": 3}
"""Stages of DeepSpeed's ZeRO."""


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The processes of a run, as one of them sees it."""

    rank: int
    size: int
    sharding: Sharding
    reshard_after_forward: bool
    store: Any
    """Seen by all processes without their taking part."""


_world: World | None = None
_twins: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()
_zero: weakref.WeakKeyDictionary[nn.Module, weakref.ref[ZeroOptimizer]] = (
    weakref.WeakKeyDictionary()
)
"""Of models that ZeRO trains; whoever made the optimizer owns it."""


def rank() -> int:
    """0 in the main process."""
    return 0 if _world is None else _world.rank


def world_size() -> int:
    """Number of processes."""
    return 1 if _world is None else _world.size


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


# --- beginning and end ----------------------------------------------------------------------------


@contextmanager
def processes(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Join the processes that a launcher started, and leave them at the end; does nothing in a
    single process.

    An error ends all of them. It leaves this context in the process that was first; the others exit
    with status 1, silently.
    Raises: RecipeError for a launcher's setting that is not followed here; ProcessError where
    another process is gone.
    """
    global _world
    if _world is not None or not _is_launched(environment):
        yield
        return
    import torch.distributed as dist

    try:
        _world = _join(environment)
        if not is_main():
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  closed with the process
            warnings.simplefilter("ignore")
        yield
        dist.destroy_process_group()
    except Exception as error:
        if not first_to_tell():
            sys.exit(1)
        if isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and "by peer" in str(error)
        ):
            raise ProcessError(
                f"process {rank()} of {world_size()}: another one ended without a word (killed? out"
                " of memory?), the launcher says which; the same command goes on from the last"
                " checkpoint"
            ) from None
        raise
    finally:
        _world = None


def first_to_tell() -> bool:
    """Whether this process is the first of all to end early, and so the one that says why."""
    if _world is None:
        return (
            os.environ.get("RANK", "0") == "0"
        )  # before they have joined, all meet the same error
    own = str(_world.rank)
    try:
        told = _world.store.compare_set("reftune/ended", "", own)
    # the store went with the main process, which has told; had it been killed, the launcher would
    # say so
    except RuntimeError:
        return False
    return bool(told.decode() == own)


def _is_launched(environment: Mapping[str, str]) -> bool:
    if (
        "WORLD_SIZE" not in environment
        and {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= environment.keys()
    ):
        raise RecipeError(
            "launcher: accelerate starts one process on the CPU where it is asked for several;"
            " expected torchrun"
        )
    wanted_sharding(environment)
    return int(environment.get("WORLD_SIZE", "1")) > 1


def _join(environment: Mapping[str, str]) -> World:
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    sharding = wanted_sharding(environment)
    if sharding in ZERO and importlib.util.find_spec("deepspeed") is None:
        raise RecipeError(
            "launcher: DeepSpeed is asked for and not installed; expected pip install"
            " 'reftune[deepspeed]'"
        )
    local, gpus = int(environment.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if gpus and local >= gpus:
        raise RecipeError(
            f"launcher: more processes than GPUs on this machine, which has {gpus}; expected at"
            " most one each"
        )
    if gpus:
        torch.cuda.set_device(local)
    store, own, size = next(iter(rendezvous("env://")))
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(
        backend, store=PrefixStore("group", store), rank=own, world_size=size, timeout=TIMEOUT
    )
    reshard = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
    return World(rank=own, size=size, sharding=sharding, reshard_after_forward=reshard, store=store)


REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "expected DDP, FSDP2 or DeepSpeed ZeRO",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "expected DDP, FSDP2 or DeepSpeed ZeRO",
    "FSDP_OFFLOAD_PARAMS": (
        "weights stay where they are trained; expected fsdp_offload_params: false"
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "expected false; the recipe's model.micro_batch_tokens bounds activations"
    ),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": (
        "expected none; its state stays where the weights are trained"
    ),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": (
        "expected none; weights stay where they are trained"
    ),
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": (
        "expected zero3_init_flag: false; every process loads the model whole, then it is split"
    ),
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": (
        "expected false; models are saved whole, in fp32"
    ),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "expected zero_stage alone; the recipe says the rest",
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "expected none; there is no expert parallelism",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "expected none; the recipe's model.micro_batch_tokens divides a step"
    ),
    "ACCELERATE_GRADIENT_CLIPPING": "expected none; the recipe's optimizer.max_grad_norm says it",
}
"""Settings of a launcher that would be passed over, and what to do instead."""
UNASKED = ("false", "none", "auto", "")
"""Values of a setting with which it asks for nothing."""
AS_WE_DO = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}
"""Values with which a setting asks for what happens anyway."""


def wanted_sharding(environment: Mapping[str, str]) -> Sharding:
    """What the launcher asks for. Raises: RecipeError for what would not run as asked."""
    for name, told in REFUSED.items():
        value = environment.get(name, "false")
        if value.lower() not in (*UNASKED, AS_WE_DO.get(name)):
            raise RecipeError(f"launcher: {name} is {value}: {told}")
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise RecipeError(
            f"launcher: mixed_precision is {precision}; expected no, as the recipe's model.dtype"
            " says it"
        )
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return _wanted_stage(environment)
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return "none"
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise RecipeError(f"launcher: fsdp_version is {version}; expected 2")
    return "fsdp2"


def _wanted_stage(environment: Mapping[str, str]) -> Sharding:
    wanted = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "missing")
    found = next((sharding for sharding, stage in ZERO.items() if str(stage) == wanted), None)
    if found is None:
        raise RecipeError(f"launcher: zero_stage is {wanted}; expected 1, 2 or 3")
    return found


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """This process's device. Raises: RecipeError where there is no such one."""
    import torch

    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise RecipeError("model.device: cuda, but torch finds no GPU; expected auto or cpu here")
    return (
        torch.device("cuda", torch.cuda.current_device())
        if has_gpu and wanted != "cpu"
        else torch.device("cpu")
    )


HELD: Mapping[Sharding, str] = {
    "none": "weights whole in each (DDP)",
    "fsdp2": "weights sharded (FSDP2)",
    "zero1": "weights whole in each, optimizer sharded (ZeRO 1)",
    "zero2": "weights whole in each, gradients and optimizer sharded (ZeRO 2)",
    "zero3": "weights sharded (ZeRO 3)",
}


def describe() -> str:
    """`8 processes, weights sharded (FSDP2)`"""
    return f"{world_size()} processes, {HELD['none' if _world is None else _world.sharding]}"


# --- telling each other ---------------------------------------------------------------------------


def own_part(num_items: int) -> slice:
    """The consecutive items that are this process's, of `num_items` in order; equal shares but for
    one."""
    return slice(num_items * rank() // world_size(), num_items * (rank() + 1) // world_size())


def gather(value: T) -> list[T]:
    """The value of every process, in their order."""
    if _world is None:
        return [value]
    import torch.distributed as dist

    gathered: list[Any] = [None] * _world.size
    dist.all_gather_object(gathered, value)
    return gathered


def join_parts(items: Sequence[T]) -> list[T]:
    """The items of all processes, in their order."""
    return [item for part in gather(list(items)) for item in part]


def from_main(make: Callable[[], T]) -> T:
    """What the main process makes; `make` is called there only."""
    if _world is None:
        return make()
    import torch.distributed as dist

    box = [make() if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def wait(where: str) -> None:
    """Until all processes are here."""
    agree(where, what="are at different places")


def agree(value: T, *, what: str) -> T:
    """`value`, the same everywhere. Raises: RuntimeError where it is not: a mistake of ours, or
    machines that differ."""
    values = gather(value)
    if any(other != values[0] for other in values):
        raise RuntimeError(f"processes {what}: {', '.join(map(str, values))}")
    return value


def any_of(*flags: bool) -> list[bool]:
    """For each flag whether it is up in any process."""
    return [any(column) for column in zip(*gather(flags), strict=True)]


def raise_together(error: E | None) -> None:
    """Raise in every process where one has an error. Raises: the first one's."""
    first = next((found for found in gather(error) if found is not None), None)
    if first is not None:
        raise first


def add_up(*tensors: Tensor) -> None:
    """Replace each by its sum over all processes."""
    if _world is None:
        return
    import torch.distributed as dist

    for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
        work.wait()


# --- weights --------------------------------------------------------------------------------------


def distribute(model: Any) -> None:
    """Make `model` one that all processes train: equal everywhere, and sharded where the launcher
    asked for it.

    Sharded weights are gathered a transformer block at a time. What ZeRO trains it takes over in
    `distribute_optimizer`. Does nothing in a single process.
    """
    if _world is None:
        return
    import torch.distributed as dist

    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), src=0)
    is_frozen = not any(parameter.requires_grad for parameter in model.parameters())
    is_split_here = _world.sharding == "fsdp2" or (_world.sharding == "zero3" and is_frozen)
    if is_split_here:
        shard(model, transformer_blocks(model))
    assert is_sharded(model) == is_split_here, (
        "the launcher asked for another sharding than what runs"
    )


def distribute_optimizer(model: Any, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What steps a distributed `model`: `optimizer` itself, or ZeRO around it where the launcher
    asked for that."""
    if _world is None or _world.sharding not in ZERO:
        return optimizer
    from reftune.processes.zero import ZeroOptimizer

    if _world.sharding == "zero3":
        _twins[model] = _twin(model)
    zero = ZeroOptimizer(model, optimizer, stage=ZERO[_world.sharding])
    _zero[model] = weakref.ref(zero)
    assert is_sharded(model) == (_world.sharding == "zero3"), (
        "the launcher asked for another stage than what runs"
    )
    return zero


def _zero_of(model: Any) -> ZeroOptimizer | None:
    found = _zero.get(model)
    return None if found is None else found()


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules in `model` that transformers names as not to be split."""
    names = {
        name
        for module in model.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }
    return [module for module in model.modules() if type(module).__name__ in names]


def shard(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Split every parameter over the processes, in place; gradients are sums over them, as losses
    are written for."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    assert _world is not None
    device = next(model.parameters()).device
    twin = _twin(model)
    mesh = init_device_mesh(device.type, (_world.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=_world.reshard_after_forward)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    _twins[model] = twin


def _twin(model: nn.Module) -> nn.Module:
    """A copy of the modules whose parameters take no memory; buffers and ties are as in `model`."""
    import copy

    from torch import nn

    hollow = {
        id(p): nn.Parameter(p.detach().new_empty(0), requires_grad=False)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo=hollow)


def is_sharded(model: Any) -> bool:
    """Whether its parameters are split over the processes at this moment."""
    return (
        _world is not None and _world.sharding != "none" and any(map(_is_part, model.parameters()))
    )


def _is_part(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    from reftune.processes import zero

    return isinstance(tensor, DTensor) or zero.is_split(tensor)


def is_in_step(model: Any) -> bool:
    """Whether the processes wait for each other in every micro-batch, and so must have equally
    many."""
    return is_sharded(model) or _zero_of(model) is not None


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Every process holds all weights of a sharded model, for reading: forward passes need no other
    process meanwhile.

    All processes must enter. The children of `model` are plain copies; it must not be called
    itself, only what it holds.
    """
    if not is_sharded(model):
        yield
        return
    twin, sharded = _twins[model], dict(model._modules)
    for full, part in zip(twin.parameters(), model.parameters(), strict=True):
        full.data = whole_tensor(part).detach()
    model._modules.update(twin._modules)
    try:
        yield
    finally:
        model._modules.update(sharded)
        for full in twin.parameters():
            full.data = full.data.new_empty(0)


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor that all processes hold a part of; a plain one as it is."""
    if hasattr(tensor, "full_tensor"):
        whole: Tensor = tensor.full_tensor()
        return whole
    from reftune.processes import zero

    return zero.whole_parameter(tensor) if zero.is_split(tensor) else tensor


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors whole, to be saved: sharded ones on the CPU, and in the main process only."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = whole_tensor(tensor).detach()
        if is_main():
            found[name] = value.cpu() if _is_part(tensor) else value
    return found


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """The whole `value`, which every process has, split as `like` is; as it is where `like` is
    plain."""
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def assign(parameter: Tensor, value: Tensor) -> None:
    """Set `parameter` of a model that is trained to the whole `value`, which every process has."""
    from reftune.processes import zero

    if not zero.assign(parameter, value):
        parameter.copy_(part_of(value, parameter))


# --- gradients ------------------------------------------------------------------------------------


def backward(model: Any, loss: Tensor, *, is_last: bool) -> None:
    """Add the gradient of a micro-batch's `loss`, with `is_last` that of the step's last one."""
    zero = _zero_of(model)
    if zero is None:
        loss.backward()
    else:
        zero.backward(loss, is_last=is_last)


def add_up_gradients(model: Any) -> None:
    """Sum the gradients over all processes; those of processes that are in step are sums
    already."""
    if _world is not None and not is_in_step(model):
        add_up(*(p.grad for p in model.parameters() if p.grad is not None))


def gradients(model: Any) -> dict[str, Tensor]:
    """By parameter, what of its gradient this process steps with; of the same parameters in all
    processes."""
    zero = _zero_of(model)
    return (
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if zero is None
        else zero.gradients()
    )


def gradient_norm(model: Any) -> Tensor:
    """√ of the sum of squares of the whole gradient."""
    import torch

    norm = whole_tensor(torch.nn.utils.get_total_norm(gradients(model).values()))
    if _zero_of(model) is None:
        return norm
    squares = norm.square()
    add_up(squares)
    return squares.sqrt()


def shared_folder(path: Path) -> None:
    """Raises: RecipeError in a process that does not see what the main one wrote at `path`."""
    wait(f"looking for {path}")
    if not path.exists():
        raise RecipeError(
            f"{path}: process {rank()} does not see it; expected a run folder that all machines"
            " share"
        )
