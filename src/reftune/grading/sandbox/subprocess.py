"""The sandbox's opt-in fallback: each program in a CPython process of its own, for programs that
need packages.

Around each: an isolated interpreter without site, an empty environment, an empty temporary folder
as its place, Landlock (only the libraries can be read, nothing written), an allow-list of system
calls (no sockets, processes, threads, signals), user, network and IPC namespaces of its own, limits
on memory, processor time and open files, a session that is killed as a whole. docs/sandbox.md lists
what that covers and what not.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from reftune.errors import ReftuneError
from reftune.grading.sandbox.result import (
    FORBIDDEN_MODULES,
    ExecutionResult,
    ExecutionStatus,
    SandboxLimits,
    forbidden_error,
    one_line,
)

CHILD = Path(__file__).with_name("_child.py")
NOT_ISOLATED = 77
MAX_OUTPUT_BYTES = 1 << 16
START_S = 5.0
"""Time an interpreter may take to start and end, on a busy machine."""
INTERPRETER_MIB = 256
"""Address space of the interpreter and its packages, on top of the program's own."""
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""Nothing of ours; without these numpy reserves memory for a thread a core."""
SYSTEM_LIBRARIES = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/share/zoneinfo",
    "/etc/ld.so.cache",
)
"""What packages need of the system: shared libraries, and time zones for pandas."""


class SubprocessBackend:
    """One process a program. Raises: ReftuneError where the system cannot isolate it and
    `allow_unisolated` is not set."""

    def __init__(self, limits: SandboxLimits, *, allow_unisolated: bool) -> None:
        if sys.platform != "linux" and not allow_unisolated:
            raise ReftuneError(
                "sandbox: the subprocess backend isolates on Linux only; use monty, or set"
                " allow_unisolated"
            )
        self._timeout_s = limits.timeout_s
        settings = {
            "allow_unisolated": allow_unisolated,
            "timeout_s": limits.timeout_s,
            "recursion": limits.recursion,
            "forbidden_modules": sorted(FORBIDDEN_MODULES),
            "paths": _folders_of("purelib", "platlib"),
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
        self._command = [sys.executable, "-I", "-S", str(CHILD), json.dumps(settings)]
        probe = self.execute("def solution():\n    return 1\n\nsolution()")
        if probe.status is not ExecutionStatus.OK:
            raise ReftuneError(f"sandbox: the subprocess backend cannot start: {probe.reason}")

    def close(self) -> None:
        """Nothing outlives a program."""

    def execute(self, source: str) -> ExecutionResult:
        with tempfile.TemporaryDirectory(prefix="reftune-") as folder:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env=ENVIRONMENT,
                start_new_session=True,
            )
            try:
                output = _exchange(
                    process, source.encode("utf-8", "replace"), self._timeout_s + START_S
                )
            finally:
                _kill(process)
        return _read(output, process.returncode)


def _folders_of(*kinds: str) -> list[str]:
    return sorted({sysconfig.get_path(kind) for kind in kinds})


def _exchange(process: subprocess.Popen[bytes], source: bytes, timeout_s: float) -> bytes:
    """What the process writes until it ends, its time is up or it has written too much."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(source)
    deadline, output = time.monotonic() + timeout_s, b""
    while len(output) <= MAX_OUTPUT_BYTES:
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        chunk = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
        if not chunk:
            break
        output += chunk
    if time.monotonic() < deadline and len(output) <= MAX_OUTPUT_BYTES:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    return output


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _read(output: bytes, returncode: int) -> ExecutionResult:
    lines = output.decode("ascii", "replace").splitlines()
    last = lines[-1] if lines else ""
    reached = next((line[1:] for line in lines if line.startswith("F")), None)
    if reached is not None:
        return ExecutionResult(
            status=ExecutionStatus.FORBIDDEN, reason=one_line(f"it reached for {reached}")
        )
    if len(output) > MAX_OUTPUT_BYTES:
        return _error("the value is too large")
    if last.startswith("V"):
        return _value(last[1:])
    if last.startswith("E"):
        return ExecutionResult(status=_status(last[1:]), reason=one_line(last[1:]))
    if returncode == NOT_ISOLATED:
        return _error(f"the system lacks {last[1:200]} (allow_unisolated would do without)")
    if returncode in (-signal.SIGALRM, -signal.SIGKILL, -signal.SIGXCPU):
        return ExecutionResult(
            status=ExecutionStatus.TIMEOUT, reason="it was killed when its time was up"
        )
    return _error(f"the process ended with status {returncode}")


def _value(text: str) -> ExecutionResult:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _error(f"the value cannot be read: {str(error)[:100]}")
    return ExecutionResult(status=ExecutionStatus.OK, value=value)


def _error(reason: str) -> ExecutionResult:
    return ExecutionResult(status=ExecutionStatus.ERROR, reason=one_line(reason))


def _status(error: str) -> ExecutionStatus:
    if error.startswith("MemoryError"):
        return ExecutionStatus.MEMORY
    return (
        ExecutionStatus.FORBIDDEN
        if error.startswith("SystemExit") or forbidden_error(error)
        else ExecutionStatus.ERROR
    )
