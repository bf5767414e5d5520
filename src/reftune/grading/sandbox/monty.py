"""The `monty` backend, which runs programs in worker processes with pydantic-monty, a Python
interpreter written in Rust."""

from __future__ import annotations

import datetime
import gc
import os
import re
import sys
import weakref
from typing import Any, NoReturn

from reftune.errors import ReftuneError
from reftune.grading.sandbox.result import (
    FORBIDDEN_MODULES,
    MAX_PRINTED_CHARS,
    MAX_VALUE_BYTES,
    ExecutionResult,
    ExecutionStatus,
    SandboxLimits,
    failure,
    forbidden_error,
)

GRACE_S = 0.25
"""If a program is still running this many seconds after its time limit, its worker is killed."""

_END = "reftune: end of the program"
"""Returned with the value of a program that was run to its end."""

_monty_pid: int | None = None
_inherited: list[Any] = []


def refuse_after_fork() -> None:
    """Raise a ReftuneError if this process was forked after its parent had run a program. monty's
    event loop does not survive a fork: the child would hang and could disrupt the parent's loop."""
    if _monty_pid is not None and _monty_pid != os.getpid():
        raise ReftuneError(
            "sandbox: this process was forked after its parent had run programs; start it with the"
            " spawn method, or before the first program is run"
        )


class MontyBackend:
    """A pool of monty workers. Every program gets a fresh session."""

    def __init__(self, limits: SandboxLimits, workers: int) -> None:
        import pydantic_monty as monty

        global _monty_pid
        _monty_pid = os.getpid()
        self._monty = monty
        self._limits: monty.ResourceLimits = {
            "max_feed_duration_secs": limits.timeout_s,
            "max_memory": limits.memory_mib << 20,
            "max_recursion_depth": limits.recursion,
        }
        self._policy: monty.OSPolicy = {
            "sleep": "zero",
            "random_start": {"seed": 0},
            "datetime": datetime.datetime(2024, 1, 1),
        }
        self._pool = monty.Monty(
            max_processes=workers,
            request_timeout=limits.timeout_s + 2 * GRACE_S,
            feed_duration_limit_grace=GRACE_S,
        )
        try:
            self._pool.__enter__()
        except (OSError, RuntimeError) as error:
            raise ReftuneError(f"sandbox: the monty worker cannot be started: {error}") from None
        self._finalizer = weakref.finalize(self, _end_pool, self._pool, os.getpid())

    def close(self) -> None:
        self._finalizer()

    def execute(self, source: str) -> ExecutionResult:
        """Run a program. If the worker dies, run the program once more, because the program may not
        be the cause."""
        return self._attempt(source) or self._attempt(source) or failure("the worker crashed twice")

    def _attempt(self, source: str) -> ExecutionResult | None:
        """The result of one try; None if the worker died before the program's time was up."""
        program, _, call = source.rstrip().rpartition("\n")
        reached: list[str] = []
        printed = ""

        def refuse(*, name: str, **_: Any) -> Any:
            reached.append(name)
            return self._monty.NOT_HANDLED

        def keep(_: str, text: str) -> None:
            nonlocal printed
            printed = (printed + text)[-MAX_PRINTED_CHARS:]

        try:
            with self._pool.checkout(
                limits=self._limits, os_policy=self._policy, external_modules=_Modules(reached)
            ) as session:
                value = session.feed_run(
                    f"{program}\n({_END!r}, ({call}))", print_callback=keep, os=refuse
                )
        except self._monty.MontyCrashedError as error:
            if not error.timed_out:
                return None
            result = failure(_told(error), ExecutionStatus.TIMEOUT)
        except self._monty.MontyError as error:
            result = failure(_told(error), _status(_told(error)))
        except Exception as error:  # noqa: BLE001  converting a hostile value to Python may fail in any way
            result = failure(f"the value cannot be read: {_told(error)}")
        else:
            if not isinstance(value, tuple) or value[:1] != (_END,):
                # monty runs such a program up to the `return`; Python refuses it
                result = failure("'return' outside function")
            elif _size_bytes(value := value[-1], MAX_VALUE_BYTES) > MAX_VALUE_BYTES:
                # it would fill the memory of the grading process
                result = failure("the value is too large")
            else:
                result = ExecutionResult(status=ExecutionStatus.OK, value=value, printed=printed)
        if reached:
            return failure(f"the program tried to use {reached[0]}", ExecutionStatus.FORBIDDEN)
        return result


def _told(error: BaseException) -> str:
    """The first line of an error's message or, if there is no message, the name of the error's
    type. The messages of monty's errors include this name."""
    return str(error).partition("\n")[0] or type(error).__name__


def _status(error: str) -> ExecutionStatus:
    if re.match(r"TimeoutError: .*time limit exceeded", error):
        return ExecutionStatus.TIMEOUT
    if re.match(r"MemoryError: .*memory limit", error):
        return ExecutionStatus.MEMORY
    return ExecutionStatus.FORBIDDEN if forbidden_error(error) else ExecutionStatus.ERROR


def _end_pool(pool: Any, pid: int) -> None:
    if os.getpid() == pid:
        pool.__exit__(None, None, None)
    else:
        _inherited.append(pool)  # garbage collection would disrupt the parent's event loop


class _Modules(dict[str, NoReturn]):
    """Contains no modules, but records the forbidden modules that a program tries to import."""

    def __init__(self, reached: list[str]) -> None:
        self._reached = reached

    def __missing__(self, name: str) -> NoReturn:
        if name.partition(".")[0] in FORBIDDEN_MODULES:
            self._reached.append(f"the module {name}")
        raise KeyError(name)


def _size_bytes(value: Any, limit: int) -> int:
    """Bytes of memory that a program's value and everything in it occupy. An object that occurs
    several times is counted each time. Counting stops as soon as the sum exceeds `limit`, so it
    ends even if the value contains itself."""
    size, waiting = 0, [value]
    while waiting and size <= limit:
        each = waiting.pop()
        size += sys.getsizeof(each)
        if size <= limit:
            # monty keeps the attributes of an object where the garbage collector does not look
            attributes = getattr(each, "attributes", None)
            inside = gc.get_referents(each) + ([] if attributes is None else [attributes])
            waiting += [item for item in inside if not isinstance(item, type)]
    return size
