"""Runs untrusted programs within limits on time, memory and recursion, and returns their values.

There are two backends. `monty` is an interpreter for Python, written in Rust. It runs in worker
processes and gives programs no access to files, the network, processes or the environment.
`subprocess` runs CPython with the installed packages, in an isolated process per program. The
default, `auto`, runs a program in monty first. If the program needs a feature of Python that monty
lacks (see `gaps.py`), `auto` runs it again in a subprocess. With `auto`, programs cannot import
third-party packages, so that verdicts do not depend on which packages are installed. If the
subprocess backend cannot start, `auto` uses monty alone.

In both backends, a program gets the status FORBIDDEN if it opens a file outside Python's libraries,
lists a folder outside them, or imports a forbidden module, such as `socket` or `ctypes`. A program
cannot hide this by catching the error. It also gets the status FORBIDDEN if it calls a function of
`os` or `sys` that acts outside the program, such as `os.system` or `sys.exit`. Only monty forbids
opening files in Python's libraries, reading the environment, and using `__import__`, `globals`,
`input`, or dunder attributes that lead from an object to the interpreter, such as `().__class__`.
Programs may import `os` and `sys` and use harmless members of both, such as `sys.maxsize`. If a
program imports a harmless module that is missing, such as numpy, the status is ERROR.

Both backends seed the module `random`. In monty, the clock stands still and `sleep` takes no time,
so that a program returns the same value every time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from reftune.errors import ReftuneError
from reftune.grading.sandbox.gaps import gap
from reftune.grading.sandbox.monty import MontyBackend, refuse_after_fork
from reftune.grading.sandbox.result import (
    Backend,
    ExecutionResult,
    ExecutionStatus,
    SandboxLimits,
    failure,
)

__all__ = ["ExecutionResult", "ExecutionStatus", "Sandbox", "SandboxKind", "SandboxLimits"]

SandboxKind = Literal["auto", "monty", "subprocess"]
MAX_SOURCE_CHARS = 100_000


@dataclass
class Sandbox:
    """Runs programs in parallel. No program can pass any state to another program. The workers
    start when they are first needed. They end when `close` is called or the sandbox is
    garbage-collected.

    Sandboxes with equal settings compare equal. A copy of a sandbox, for example in another
    process, starts its own workers.
    """

    limits: SandboxLimits = field(default_factory=SandboxLimits)
    backend: SandboxKind = "auto"
    workers: int | None = None
    """Maximum number of programs that run at once, by default one per core."""
    allow_unisolated: bool = False
    """Let the subprocess backend start even without isolation."""
    _started: Backend | None = field(default=None, init=False, repr=False, compare=False)

    def run(self, programs: Sequence[str], call: str = "solution()") -> list[ExecutionResult]:
        """Execute each program, then evaluate the expression `call` in the program's scope. Returns
        one result per program, in the order of `programs`.

        Raises: ReftuneError if the sandbox cannot start. The backends `monty` and `auto` also raise
        it if this process was forked after its parent had run a program in one of these two
        backends.
        """
        if not programs:
            return []
        if self.backend != "subprocess":
            refuse_after_fork()
        num_threads = _num_cores() if self.workers is None else self.workers
        backend = self._started = self._started or self._start(num_threads)

        def execute(program: str) -> ExecutionResult:
            if len(program) > MAX_SOURCE_CHARS:
                return failure(
                    f"the program has {len(program):,} characters; the maximum is"
                    f" {MAX_SOURCE_CHARS:,}"
                )
            started = time.perf_counter()
            result = backend.execute(f"{program}\n\n{call}")
            return replace(result, seconds=time.perf_counter() - started)

        if min(num_threads, len(programs)) == 1:
            return [execute(program) for program in programs]
        with ThreadPoolExecutor(num_threads) as threads:
            return list(threads.map(execute, programs))

    def close(self) -> None:
        """End the workers. A later `run` starts new ones."""
        if self._started is not None:
            self._started.close()
        self._started = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Sandbox, (self.limits, self.backend, self.workers, self.allow_unisolated)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, num_workers: int) -> Backend:
        def start(*, packages: bool) -> Backend:
            from reftune.grading.sandbox.subprocess import SubprocessBackend

            return SubprocessBackend(
                self.limits, allow_unisolated=self.allow_unisolated, packages=packages
            )

        if self.backend == "subprocess":
            return start(packages=True)
        monty = MontyBackend(self.limits, num_workers)
        if self.backend == "monty":
            return monty
        return _MontyFirst(monty, partial(start, packages=False))


class _MontyFirst:
    """Runs a program in monty, and again in a subprocess if the program needs a feature that monty
    lacks."""

    def __init__(self, monty: Backend, start: Callable[[], Backend]) -> None:
        self._monty, self._start = monty, start
        self._starting = threading.Lock()
        self._subprocess: Backend | None = None
        self._refused = ""

    def execute(self, source: str) -> ExecutionResult:
        result = self._monty.execute(source)
        missing = gap(result)
        if missing is None:
            return result
        with self._starting:
            if self._subprocess is None and not self._refused:
                try:
                    self._subprocess = self._start()
                except ReftuneError as error:  # for example, no way to isolate a subprocess
                    self._refused = str(error)
        if self._subprocess is not None:
            return self._subprocess.execute(source)
        return failure(f"{result.reason} (monty lacks {missing}; {self._refused})")

    def close(self) -> None:
        self._monty.close()
        if self._subprocess is not None:
            self._subprocess.close()


def _num_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
