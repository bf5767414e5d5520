"""Several processes that train one model: their ranks, their shares of the work, and their
communication.

Every process runs the same code. In the expensive parts (decoding, grading, token scores and
gradients), each process handles its share of the samples. The results of all processes are joined,
so that every process has the same rollouts and takes the same optimizer step. Only the main process
writes to the run folder and prints, but an error message may come from any process. `launch`
connects the processes. `sharding` determines which process holds which weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from reftune.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
E = TypeVar("E", bound=Exception)


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The processes of a run, as seen by one of them."""

    rank: int = 0
    size: int = 1
    local_size: int = 1


ALONE = World()
_world = ALONE


@contextmanager
def inhabited(world: World) -> Iterator[None]:
    """Inside the block, make this process part of `world`, whose process group must already be
    initialised."""
    global _world
    _world = world
    try:
        yield
    finally:
        _world = ALONE


def rank() -> int:
    """This process's rank; 0 in the main process."""
    return _world.rank


def world_size() -> int:
    """Number of processes."""
    return _world.size


def local_size() -> int:
    """Number of processes on this machine."""
    return _world.local_size


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def own_part(num_items: int) -> slice:
    """The range of items that this process handles, out of `num_items`. The ranges of two processes
    differ in length by at most one."""
    return slice(num_items * rank() // world_size(), num_items * (rank() + 1) // world_size())


def gather(value: T) -> list[T]:
    """The `value` that each process passed, in order of rank."""
    if _world is ALONE:
        return [value]
    import torch.distributed as dist

    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_main(make: Callable[[], T]) -> T:
    """Call `make()` only in the main process, and return its value in every process."""
    if _world is ALONE:
        return make()
    import torch.distributed as dist

    box = [make() if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def wait(where: str) -> None:
    """Wait until all processes have made this call. Raises: RuntimeError if `where` differs between
    processes."""
    agree(where, what="are at different places")


def agree(value: T, *, what: str) -> T:
    """Return `value` after checking that it is the same in all processes. Raises: RuntimeError if
    it differs, which points to a bug or to a difference between machines. The message begins with
    `processes {what}:`."""
    values = gather(value)
    if any(other != values[0] for other in values):
        raise RuntimeError(f"processes {what}: {', '.join(map(str, values))}")
    return value


def any_of(*flags: bool) -> list[bool]:
    """For each flag, whether at least one process has set it."""
    return [any(column) for column in zip(*gather(flags), strict=True)]


def raise_together(error: E | None) -> None:
    """If any process passes an error, every process raises it. If several processes pass errors,
    every process raises the error of the lowest rank among them."""
    first = next((found for found in gather(error) if found is not None), None)
    if first is not None:
        raise first


@contextmanager
def together(kind: type[E]) -> Iterator[None]:
    """If any process raises an error of `kind` in the block, raise it in every process after all
    processes have left the block."""
    failed: E | None = None
    try:
        yield
    except kind as error:
        failed = error
    raise_together(failed)


def add_up(*tensors: Tensor) -> None:
    """Replace each tensor with its sum over all processes."""
    if _world is ALONE:
        return
    import torch.distributed as dist

    for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
        work.wait()


def shared_folder(path: Path) -> None:
    """Check that all machines share the run folder `path`. Raises: RecipeError in a process that
    does not see it."""
    wait(f"looking for {path}")
    if not path.exists():
        raise RecipeError(
            f"{path}: process {rank()} does not see it; expected a run folder that all machines"
            " share"
        )
