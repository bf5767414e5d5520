"""What a launcher (`torchrun`, `accelerate launch`) asks for: how many processes, on which devices,
and whether weights are split. It says so through the environment, which nothing else reads."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reftune.errors import ProcessError, RecipeError
from reftune.processes.sharding import Fsdp2, Sharding, held, sharding
from reftune.processes.world import World, inhabited, is_main, world_size

if TYPE_CHECKING:
    import torch

TIMEOUT = timedelta(hours=2)
"""How long a process waits for another: longer than the main one ever writes. A launcher ends all
when one dies."""

_store: Any = None
"""Seen by all processes without their taking part; None before they have joined."""


@contextmanager
def processes(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Join the processes that a launcher started, and leave them at the end; does nothing in a
    single process.

    An error ends all of them. It leaves this context in the process that was first; the others exit
    with status 1, silently.
    Raises: RecipeError for a launcher's setting that is not followed here; ProcessError if another
    process is gone.
    """
    global _store
    if _store is not None or not _is_launched(environment):
        yield
        return
    import torch.distributed as dist

    try:
        how = wanted_sharding(environment)
        world, _store = _join(environment)
        with inhabited(world), held(how):
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
                f"process {world.rank} of {world.size}: another one ended without a word (killed?"
                " out of memory?), the launcher says which; the same command goes on from the last"
                " checkpoint"
            ) from None
        raise
    finally:
        _store = None


def first_to_tell() -> bool:
    """Whether this process is the first of all to end early, and so the one that says why."""
    own = os.environ.get("RANK", "0")
    if _store is None:
        return own == "0"  # before they have joined, all meet the same error
    try:
        told = _store.compare_set("reftune/ended", "", own)
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
            "launcher: accelerate starts one process on the CPU even if it is asked for several;"
            " expected torchrun"
        )
    wanted_sharding(environment)
    return int(environment.get("WORLD_SIZE", "1")) > 1


def _join(environment: Mapping[str, str]) -> tuple[World, Any]:
    """The processes, and the store that they share."""
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

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
    return World(rank=own, size=size), store


REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "expected FSDP2, which splits the same as ZeRO 3",
    "ACCELERATE_USE_MEGATRON_LM": "expected DDP or FSDP2",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "expected DDP or FSDP2",
    "FSDP_OFFLOAD_PARAMS": (
        "weights stay where they are trained; expected fsdp_offload_params: false"
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "expected false; the recipe's model.gradient_checkpointing says it"
    ),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "expected none; the recipe's model.micro_batch_tokens divides a step"
    ),
    "ACCELERATE_GRADIENT_CLIPPING": "expected none; the recipe's optimizer.max_grad_norm says it",
}
"""Settings of a launcher that would not be followed, and what to do instead."""
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
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return Sharding()
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise RecipeError(f"launcher: fsdp_version is {version}; expected 2")
    reshard = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
    return Fsdp2(reshard_after_forward=reshard)


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """This process's device. Raises: RecipeError if there is no such device."""
    import torch

    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise RecipeError("model.device: cuda, but torch finds no GPU; expected auto or cpu here")
    return (
        torch.device("cuda", torch.cuda.current_device())
        if has_gpu and wanted != "cpu"
        else torch.device("cpu")
    )


def describe() -> str:
    """`8 processes, weights sharded (FSDP2)`"""
    return f"{world_size()} processes, {sharding()}"
