"""Connects the processes that a launcher (`torchrun` or `accelerate launch`) has started. Only this
module reads the launcher's environment variables."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from reftune.errors import ProcessError, RecipeError
from reftune.processes.heartbeat import Heartbeat
from reftune.processes.sharding import Fsdp2, Sharding, held
from reftune.processes.world import World, inhabited, is_main

TIMEOUT = timedelta(hours=2)
"""Longest wait for another process, for example while the main process writes. The heartbeat
reports a dead process much sooner."""

_store: Any = None
"""A store that all processes can read at any time; None if this process is not connected to
others."""
_launcher_store: Any = None
"""The launcher's store. It is kept, because a program may connect its processes several times."""
_joins = 0
"""How often this process has been connected to others."""


@contextmanager
def processes(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """For the duration of the block, connect this process to the others that a launcher started.
    Nothing happens if there are no others, or if they are already connected. An error in the block
    ends all processes: the first process to fail raises its error, and the others exit silently
    with status 1. Raises: RecipeError for a launcher setting that is not supported; ProcessError if
    another process has ended without raising an error, for example because it was killed."""
    global _store
    is_alone = int(environment.get("WORLD_SIZE", "1")) == 1
    if is_alone:
        wanted_sharding(environment)  # refuses what is not supported
    if is_alone or _store is not None:
        yield
        return
    import torch.distributed as dist

    # if this is true, some versions of transformers leave the weights empty in all processes but
    # one on each machine
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    _choose_gpu(environment)
    heartbeat, stdout = None, sys.stdout
    try:
        how = wanted_sharding(environment)
        world, _store, heartbeat = _join(environment)
        with inhabited(world), held(how):
            if not is_main():
                sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  closed with the process
                warnings.simplefilter("ignore")
            yield
            dist.destroy_process_group()
            heartbeat.leave()
    except Exception as error:
        if not first_to_tell():
            sys.exit(1)
        is_loss = isinstance(error, RuntimeError) and (
            isinstance(error, dist.DistError) or "by peer" in str(error)
        )
        if heartbeat is not None and is_loss:
            raise ProcessError(_ended_without_error(world, heartbeat.missing())) from None
        raise
    finally:
        if heartbeat is not None:
            heartbeat.stop()
        _store, sys.stdout = None, stdout


def first_to_tell() -> bool:
    """Whether this process is the first to end early and should therefore report why."""
    own = int(os.environ.get("RANK", "0"))
    if _store is None:
        return own == 0  # processes that cannot connect report similar errors; one is enough
    try:
        return _is_first(_store, own)
    # the store ended with the main process, which has reported its error; if that process was
    # killed, the launcher reports it
    except RuntimeError:
        return False


def _is_first(store: Any, own: int) -> bool:
    winner: bytes = store.compare_set("reftune/ended", "", str(own))
    return winner.decode() == str(own)


def _ended_without_error(world: World, missing: int | None) -> str:
    other = "another process" if missing is None else f"process {missing}"
    return (
        f"process {world.rank} of {world.size}: {other} ended without an error message (killed?"
        " out of memory? machine down?); the same command continues from the last checkpoint"
    )


def _end(world: World, store: Any, missing: int) -> None:
    """End this process, because its main thread might wait for hours for the process `missing`."""
    try:
        is_first = _is_first(store, world.rank)
    except RuntimeError:  # the missing process hosted the store
        is_first = world.rank == min({0, 1} - {missing})
    if is_first:
        print(_ended_without_error(world, missing), file=sys.stderr, flush=True)  # noqa: T201  nothing else would report it
    os._exit(1)


def _choose_gpu(environment: Mapping[str, str]) -> None:
    """If the machine has GPUs, use the GPU whose index is this process's local rank. If the machine
    has fewer GPUs than processes, the first process without a GPU raises a RecipeError, and the
    others without one exit silently with status 1."""
    import torch

    local, gpus = int(environment.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if gpus and local > gpus:
        sys.exit(1)
    if gpus and local == gpus:
        raise RecipeError(
            f"launcher: more processes than GPUs on this machine, which has {gpus}; expected at"
            " most one per GPU"
        )
    if gpus:
        torch.cuda.set_device(local)


def _join(environment: Mapping[str, str]) -> tuple[World, Any, Heartbeat]:
    """Connect to the other processes. Returns this process's world, the store that all processes
    share, and this process's heartbeat, already started."""
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    global _launcher_store, _joins
    if _launcher_store is None:
        _launcher_store, _, _ = next(iter(rendezvous("env://")))
    _joins += 1
    own, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    beside = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    store, beats, end = (
        PrefixStore(f"reftune/{_joins}", _launcher_store.clone()) for _ in range(3)
    )
    world = World(rank=own, size=size, local_size=beside)
    heartbeat = Heartbeat(beats, own, size, lambda missing: _end(world, end, missing))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() else "gloo"
    dist.init_process_group(
        backend, store=PrefixStore("group", store), rank=own, world_size=size, timeout=TIMEOUT
    )
    heartbeat.start()
    return world, store, heartbeat


REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "expected FSDP2, which splits weights as ZeRO 3 does",
    "ACCELERATE_USE_MEGATRON_LM": "expected DDP or FSDP2",
    "FSDP_OFFLOAD_PARAMS": "offloading is not supported; expected fsdp_offload_params: false",
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "expected false; set model.gradient_checkpointing in the recipe"
    ),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "expected none; set model.micro_batch_tokens in the recipe"
    ),
    "ACCELERATE_MIXED_PRECISION": "expected no; set model.dtype in the recipe",
    "ACCELERATE_GRADIENT_CLIPPING": "expected none; set optimizer.max_grad_norm in the recipe",
}
"""Environment variable of an unsupported launcher setting → what to use instead."""
UNASKED = ("false", "none", "no", "auto", "")
"""Values that mean that a setting is off or unset."""
AS_WE_DO = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}
"""Variable in `REFUSED` → a value that is accepted, because it requests what reftune does
anyway."""


def wanted_sharding(environment: Mapping[str, str]) -> Sharding:
    """The sharding that the launcher requests. Raises: RecipeError for an unsupported setting."""
    if (
        "WORLD_SIZE" not in environment
        and {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= environment.keys()
    ):
        raise RecipeError(
            "launcher: accelerate starts one process on the CPU even if it is asked for several;"
            " expected torchrun"
        )
    for name, remedy in REFUSED.items():
        value = environment.get(name, "false")
        if value.lower() not in (*UNASKED, AS_WE_DO.get(name)):
            raise RecipeError(f"launcher: {name} is {value}: {remedy}")
    replicas = _wanted_replicas(environment)
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return Sharding()
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise RecipeError(f"launcher: fsdp_version is {version}; expected 2")
    reshard = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
    return Fsdp2(reshard_after_forward=reshard, replicas=replicas)


def _wanted_replicas(environment: Mapping[str, str]) -> int:
    """Number of groups of processes, as set in accelerate's parallelism_config. Each group holds
    one copy of the model. Raises: RecipeError if the sizes in parallelism_config
    are not supported or do not match the number of processes."""
    if environment.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        return 1
    sizes = {
        axis: int(environment.get(f"PARALLELISM_CONFIG_{axis}_SIZE", "1"))
        for axis in ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP")
    }
    replicas, shards, *others = sizes.values()
    is_whole = replicas * shards == int(environment.get("WORLD_SIZE", replicas * shards))
    if others != [1, 1, 1] or shards == 1 or not is_whole:
        asked = ", ".join(f"{axis.lower()}_size {size}" for axis, size in sizes.items())
        raise RecipeError(
            f"launcher: parallelism_config is {asked}; expected dp_shard_size above 1,"
            " all other sizes but dp_replicate_size equal to 1, and as many processes as"
            " dp_replicate_size × dp_shard_size"
        )
    return replicas
