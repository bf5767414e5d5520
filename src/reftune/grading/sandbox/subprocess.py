"""The `subprocess` backend, which runs each program in a CPython process of its own.

Some packages, such as numpy, are slow to import. For each combination of such packages that a
program uses, a Python interpreter (the forking process) imports them once and stays running. Each
program runs in a fork of the interpreter that has its packages. The program gets a fixed
environment and an empty temporary folder as its working directory. Start-up hooks in site-packages
do not run. The kernel's Landlock lets the program read only the libraries of Python and of the
system. Landlock also blocks all writing to files, even in the working directory. An allow-list of
system calls rules out sockets, new processes, threads and signals. Each program has its own
session, namespaces and resource limits. docs/sandbox.md lists what these protections cover.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reftune.errors import ReftuneError
from reftune.grading.sandbox.result import (
    FORBIDDEN_MODULES,
    ExecutionResult,
    ExecutionStatus,
    SandboxLimits,
    failure,
    forbidden_error,
)

CHILD = Path(__file__).with_name("_child.py")
NOT_ISOLATED = 77
MAX_OUTPUT_BYTES = 1 << 16
START_S = 5.0
"""Seconds allowed, beyond the time limit, for a process to start and end on a busy machine."""
PRELOAD_S = 120.0
"""Seconds allowed for an interpreter to start and import the packages."""
PRELOADED = tuple(
    "bisect calendar collections copy datetime decimal enum fractions functools heapq itertools"
    " math operator re statistics string typing".split()
)
_PACKAGE = re.compile(r"^[ \t]*(?:import|from)[ \t]+(numpy|pandas|scipy|sympy)\b", re.MULTILINE)
"""Finds the slow packages that a program imports."""
INTERPRETER_MIB = 256
"""MiB of address space for the interpreter and its packages, in addition to the program's limit."""
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
"""The environment variables of a program. Without the first two, numpy reserves memory for one
thread per core. The last variable fixes the order in which sets of strings are iterated."""
SYSTEM_LIBRARIES = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/share/zoneinfo",
    "/etc/ld.so.cache",
)
"""Files that packages need: shared libraries, and time zones for pandas."""


class SubprocessBackend:
    """Runs programs, each in a process forked from a running interpreter. Raises: ReftuneError if
    these processes cannot start, or if the system cannot isolate them and `allow_unisolated` is not
    set."""

    def __init__(
        self, limits: SandboxLimits, *, allow_unisolated: bool, packages: bool = True
    ) -> None:
        """`packages` lets programs import packages that do not come with Python."""
        if sys.platform != "linux" and not allow_unisolated:
            raise ReftuneError(
                "sandbox: the subprocess backend isolates programs only on Linux; use monty, or set"
                " allow_unisolated"
            )
        self._timeout_s = limits.timeout_s
        self._settings = {
            "allow_unisolated": allow_unisolated,
            "timeout_s": limits.timeout_s,
            "recursion": limits.recursion,
            "forbidden_modules": sorted(FORBIDDEN_MODULES),
            "paths": _folders_of("purelib", "platlib") if packages else [],
            "readable": [
                *_folders_of("purelib", "platlib", "stdlib", "platstdlib"),
                f"{sys.base_prefix}/lib",
                *SYSTEM_LIBRARIES,
            ],
            "limits": {
                "RLIMIT_AS": (INTERPRETER_MIB + limits.memory_mib) << 20,
                "RLIMIT_CPU": int(limits.timeout_s + START_S),
                "RLIMIT_FSIZE": 1 << 20,
                "RLIMIT_NOFILE": 64,
                "RLIMIT_NPROC": 0,
                "RLIMIT_CORE": 0,
            },
        }
        self._starting = threading.Lock()
        self._forkers: dict[tuple[str, ...], _Forker] = {}
        probe = self.execute("def solution():\n    return 1\n\nsolution()")
        if probe.status is not ExecutionStatus.OK:
            self.close()
            raise ReftuneError(f"sandbox: the subprocess backend cannot start: {probe.reason}")

    def close(self) -> None:
        """End the forking processes, the only processes that outlive a program."""
        for forker in self._forkers.values():
            forker.close()
        self._forkers.clear()

    def execute(self, source: str) -> ExecutionResult:
        """Run a program. If the forking process dies, run the program once more, because the
        program may not be the cause."""
        return self._attempt(source) or self._attempt(source) or failure("the worker died twice")

    def _attempt(self, source: str) -> ExecutionResult | None:
        """The result of one try; None if the forking process died before the program ended."""
        forker = self._forker(tuple(sorted(set(_PACKAGE.findall(source)))))
        with (
            tempfile.TemporaryDirectory(prefix="reftune-") as folder,
            tempfile.TemporaryFile() as program,
        ):
            program.write(source.encode("utf-8", "replace"))
            program.seek(0)
            ended = forker.run(program.fileno(), folder, self._timeout_s + START_S)
        if ended is None:
            forker.close()
            return None
        return _read(*ended)

    def _forker(self, packages: tuple[str, ...]) -> _Forker:
        with self._starting:
            forker = self._forkers.get(packages)
            if forker is None or forker.closed:
                forker = _Forker({**self._settings, "preload": [*PRELOADED, *packages]})
                self._forkers[packages] = forker
            return forker


def _folders_of(*kinds: str) -> list[str]:
    return sorted({sysconfig.get_path(kind) for kind in kinds})


class _Forker:
    """A running interpreter that forks a process for each program.

    If the process that created this object forks, its child processes may use the object too,
    because each program has its own output pipe and status socket.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        kind = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_STREAM
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, kind)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-s", "-P", "-S", str(CHILD), json.dumps(settings)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=ENVIRONMENT,
                start_new_session=True,
            )
        self._one_at_a_time = threading.Lock()
        self._finalizer = weakref.finalize(self, _end, self._requests, self._process, os.getpid())
        self._requests.settimeout(PRELOAD_S)
        with contextlib.suppress(OSError):
            self._requests.recv(16)
        self._requests.settimeout(None)

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    def close(self) -> None:
        self._finalizer()

    def run(self, source: int, folder: str, timeout_s: float) -> tuple[bytes, int] | None:
        """Run the program at descriptor `source` in `folder`. Returns the program's output and exit
        status; None if the forking process died."""
        output, results = os.pipe()
        ours, theirs = socket.socketpair()
        with open(output, "rb", buffering=0), ours:  # noqa: PTH123  a descriptor, not a path
            try:
                with theirs, self._one_at_a_time:
                    socket.send_fds(
                        self._requests, [os.fsencode(folder)], [source, results, theirs.fileno()]
                    )
            except OSError:
                return None
            finally:
                os.close(results)
            return _exchange(output, ours, timeout_s)


def _end(requests: socket.socket, process: subprocess.Popen[bytes], pid: int) -> None:
    """End the forking process by closing its socket."""
    requests.close()
    if os.getpid() == pid:
        try:
            process.wait(START_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _exchange(output: int, status: socket.socket, timeout_s: float) -> tuple[bytes, int] | None:
    """Read the program's output until the program ends, runs out of time or writes too much. Kill
    the program if it has not ended by itself. Returns the output and the exit status. Returns None
    if the process that forks the programs has died."""
    deadline, written, code = time.monotonic() + timeout_s, b"", None
    while len(written) <= MAX_OUTPUT_BYTES:
        ready, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        chunk = os.read(output, 1 << 16)
        if not chunk:
            code = _received(status, deadline - time.monotonic())
            break
        written += chunk
    if code is None:
        status.shutdown(socket.SHUT_WR)  # asks the forking process to kill the program
        _received(status, START_S)
        return written, -signal.SIGKILL
    return (written, int(code)) if code else None


def _received(status: socket.socket, timeout_s: float) -> bytes | None:
    """The program's exit status; empty if the forking process died, None if time ran out."""
    status.settimeout(max(0.01, timeout_s))
    try:
        return status.recv(16)
    except TimeoutError:
        return None
    except OSError:
        return b""


def _read(output: bytes, returncode: int) -> ExecutionResult:
    lines = output.decode("ascii", "replace").splitlines() or [""]
    first = {line[:1]: line[1:] for line in reversed(lines)}
    letter, last = lines[-1][:1], lines[-1][1:]
    if "F" in first:
        return failure(f"the program tried to use {first['F']}", ExecutionStatus.FORBIDDEN)
    if len(output) > MAX_OUTPUT_BYTES:
        return failure("the value is too large")
    if letter in ("V", "E"):
        try:
            content, printed = json.loads(last), str(json.loads(first.get("P", '""')))
        except (ValueError, RecursionError) as error:
            return failure(f"the value cannot be read: {str(error)[:100]}")
        if letter == "V":
            return ExecutionResult(status=ExecutionStatus.OK, value=content, printed=printed)
        return failure(str(content), _status(str(content)))
    if returncode == NOT_ISOLATED:
        return failure(f"the system lacks {last[:200]}; to start anyway, set allow_unisolated")
    if returncode in (-signal.SIGALRM, -signal.SIGKILL, -signal.SIGXCPU):
        return failure("the program was killed when its time was up", ExecutionStatus.TIMEOUT)
    return failure(f"the process ended with status {returncode}")


def _status(error: str) -> ExecutionStatus:
    if error.startswith("MemoryError"):
        return ExecutionStatus.MEMORY
    is_forbidden = error.startswith("SystemExit") or forbidden_error(error)
    return ExecutionStatus.FORBIDDEN if is_forbidden else ExecutionStatus.ERROR
