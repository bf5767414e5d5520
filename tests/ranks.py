"""Starts several processes on one machine, as a launcher would, but forked from the warm test
process."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reftune.processes.launch import processes
from reftune.recipe import Recipe, dump_recipe
from reftune.terminal.cli import main

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""The environment that `accelerate launch` sets for FSDP2."""
TWO_BY_TWO = {
    **FSDP2,
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}
SHARDINGS = {"ddp": {}, "fsdp2": FSDP2, "2x2": TWO_BY_TWO}
HANGS_S = 240
"""Seconds after which processes count as waiting for each other: far more than they take alone on
two cores, and below the time limit of their tests."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How one process ended. A negative status is the signal that ended it."""

    status: int
    stdout: str
    stderr: str


def spread(
    body: Callable[[], object], folder: Path, *, how: str = "ddp", num: int = 2
) -> list[Ended]:
    """Like `launch`, but the processes are joined."""

    def joined() -> None:
        with processes():
            body()

    return launch(joined, folder, how, num)


def run(recipe: Recipe, *, how: str = "ddp", num: int = 2) -> list[Ended]:
    """Run `reftune run RECIPE` in `num` processes."""
    file = recipe.folder.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_recipe(recipe))
    return launch(lambda: main(["run", str(file)]), recipe.folder.parent, how, num)


def launch(body: Callable[[], object], folder: Path, how: str, num: int) -> list[Ended]:
    """Run `body` in `num` processes, which are not joined yet. Their output goes to `folder`. Fails
    if a process is still alive after `HANGS_S` seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    launcher = {
        "WORLD_SIZE": str(num),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        **SHARDINGS[how],
    }
    sys.stdout.flush()
    children = [
        _fork(body, folder, {**launcher, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(num)
    ]
    statuses = _wait(children)
    told = [
        [(folder / f"rank{rank}.{name}").read_text() for name in ("out", "err")]
        for rank in range(num)
    ]
    return [Ended(status, *texts) for status, texts in zip(statuses, told, strict=True)]


def free_port() -> int:
    """A port without a listener, outside the range from which the system gives clients a port, so
    that none takes it before the server is up."""
    while True:
        port = secrets.choice(range(10_000, 32_000))
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def _fork(body: Callable[[], object], folder: Path, environment: dict[str, str]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ.update(environment)
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(
                os.open(
                    folder / f"rank{environment['RANK']}.{name}",
                    os.O_CREAT | os.O_TRUNC | os.O_WRONLY,
                ),
                number,
            )
        sys.stdout, sys.stderr = (
            os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2)
        )
        body()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:  # noqa: BLE001  as the interpreter would
        traceback.print_exc()
    finally:
        os._exit(status)


def _wait(children: list[int]) -> list[int]:
    """The exit statuses. If a process dies, no launcher ends the others: they must notice it
    themselves."""
    deadline, statuses = time.monotonic() + HANGS_S, dict.fromkeys(children, 0)
    alive = list(children)
    while alive and time.monotonic() < deadline:
        for child in list(alive):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                alive.remove(child)
                statuses[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for child in alive:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not alive, f"{len(alive)} of {len(children)} processes still wait after {HANGS_S} s"
    return list(statuses.values())
