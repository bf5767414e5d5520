"""Untrusted programs → values, inside limits on time, memory and recursion.

Two backends behind one interface. `monty` (the default) interprets Python in Rust, in worker processes that it replaces when
they die; there is no file, network, process or environment in it to reach. `subprocess` is the opt-in fallback for programs
that need packages: a CPython process of its own for each program.

What is FORBIDDEN: opening or listing files, reading the environment, asking the system for anything else, importing a module
whose purpose is to reach outside (`socket`, `subprocess`, `ctypes`, …), using what `os` and `sys` have outside the sandbox
(`os.system`, `sys.modules`, `sys.exit`), `__import__`, `globals`, `input`, `exit`, and dunder attributes that lead from an
object to the interpreter (`().__class__`). A try/except around the attempt hides neither the call nor the import. Importing
`os` or `sys` and using what is harmless there (`os.path.join`, `sys.maxsize`) is allowed: models write unused imports. A
module that is missing but harmless (numpy, sympy) is an ERROR.

Clock, random numbers and sleep are fixed, so that a program gives the same value every time.
"""

from __future__ import annotations

import datetime
import enum
import gc
import os
import re
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn, Protocol

from reftune.errors import ReftuneError

MAX_SOURCE_CHARS = 100_000
MAX_VALUE_BYTES = 1 << 20
"""Of what a program returns."""
GRACE_S = 0.25
"""How long a program over its time limit may take to stop by itself before its worker is killed."""

FORBIDDEN_MODULES = frozenset(
    "_io _posixsubprocess _socket _thread aiohttp asyncore builtins cffi code codeop concurrent ctypes faulthandler fcntl "
    "fileinput ftplib gc glob http httpx imaplib imp importlib inspect io marshal mmap multiprocessing nt pickle pip pkgutil "
    "platform poplib posix psutil pty pwd readline requests resource runpy sched select selectors shelve shutil signal site "
    "smtplib socket socketserver sqlite3 ssl subprocess syslog tempfile termios threading tracemalloc tty urllib urllib3 "
    "webbrowser winreg xmlrpc zipimport".split()
)
FORBIDDEN_NAMES = frozenset(
    "__builtins__ __import__ __loader__ __spec__ breakpoint compile exit globals input locals memoryview quit vars".split()
)


class ExecutionStatus(enum.Enum):
    """How a program ended."""

    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    FORBIDDEN = "forbidden"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionResult:
    """What became of one program."""

    status: ExecutionStatus
    value: Any = None
    """What the call returned; None unless the status is OK."""
    reason: str = ""
    """One line for a person; empty where the status is OK."""
    seconds: float = field(default=0.0, compare=False)
    """How long it ran, the start of its session included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxLimits:
    """What one program may use."""

    timeout_s: float = 1.0
    memory_mib: int = 64
    recursion: int = 1000
    """Nested calls."""


class Backend(Protocol):
    """Runs one program at a time; `execute` is called from several threads."""

    def execute(self, source: str) -> ExecutionResult: ...

    def close(self) -> None: ...


class Sandbox:
    """Runs programs side by side, each in a session of its own. Starts on first use; `close` or garbage collection ends it.

    Equal where the settings are; a copy, also in another process, starts workers of its own.
    """

    def __init__(
        self,
        limits: SandboxLimits | None = None,
        *,
        backend: Literal["monty", "subprocess"] = "monty",
        workers: int | None = None,
        allow_unisolated: bool = False,
    ) -> None:
        """`workers`: programs at a time, by default one a core. `allow_unisolated`: let the subprocess backend start where
        the system offers no namespaces to cut it off from the network."""
        self.limits = limits if limits is not None else SandboxLimits()
        self._kind = backend
        self._workers = workers if workers is not None else _num_cores()
        self._allow_unisolated = allow_unisolated
        self._backend: Backend | None = None

    def run(self, programs: Sequence[str], call: str = "solution()") -> list[ExecutionResult]:
        """Execute each program, then the expression `call` in its scope; one result a program, in order.

        Raises: ReftuneError where the sandbox itself cannot start. What a program does never raises.
        """
        if not programs:
            return []
        backend = self._started()

        def execute(program: str) -> ExecutionResult:
            if len(program) > MAX_SOURCE_CHARS:
                return _error(f"the program has {len(program):,} characters, more than {MAX_SOURCE_CHARS:,}")
            started = time.perf_counter()
            result = backend.execute(f"{program}\n\n{call}")
            return replace(result, seconds=time.perf_counter() - started)

        workers = min(self._workers, len(programs))
        if workers == 1:
            return [execute(program) for program in programs]
        with ThreadPoolExecutor(workers) as threads:
            return list(threads.map(execute, programs))

    def close(self) -> None:
        """End the workers. A later `run` starts new ones."""
        if self._backend is not None:
            self._backend.close()
        self._backend = None

    @property
    def _settings(self) -> tuple[SandboxLimits, str, int, bool]:
        return self.limits, self._kind, self._workers, self._allow_unisolated

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sandbox) and self._settings == other._settings

    def __hash__(self) -> int:
        return hash(self._settings)

    def __reduce__(self) -> tuple[Any, ...]:
        return _sandbox, self._settings

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _started(self) -> Backend:
        if self._kind == "monty":
            _refuse_after_fork()
        if self._backend is None:
            self._backend = self._start()
        return self._backend

    def _start(self) -> Backend:
        if self._kind == "monty":
            return _MontyBackend(self.limits, self._workers)
        from reftune.sandbox_subprocess import SubprocessBackend

        return SubprocessBackend(self.limits, allow_unisolated=self._allow_unisolated)


def _sandbox(limits: SandboxLimits, backend: Literal["monty", "subprocess"], workers: int, allow_unisolated: bool) -> Sandbox:
    return Sandbox(limits, backend=backend, workers=workers, allow_unisolated=allow_unisolated)


def _num_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _error(reason: str) -> ExecutionResult:
    return ExecutionResult(status=ExecutionStatus.ERROR, reason=reason)


# --- monty ------------------------------------------------------------------------------------------------------------


_monty_pid: int | None = None
_inherited: list[Any] = []


def _refuse_after_fork() -> None:
    """monty's event loop does not survive a fork: a child that used it would hang, and harm its parent.

    Raises: ReftuneError in a process that was forked after its parent ran a program.
    """
    if _monty_pid is not None and _monty_pid != os.getpid():
        raise ReftuneError(
            "sandbox: this process was forked after its parent had run programs; start it with the spawn method, "
            "or before the first program is run"
        )


class _MontyBackend:
    """A pool of monty workers; every program gets a fresh session."""

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
        """Runs twice where the worker dies: it may have died of something else."""
        return self._attempt(source) or self._attempt(source) or _error("the worker crashed twice")

    def _attempt(self, source: str) -> ExecutionResult | None:
        """None where the worker died before the program's time was up."""
        reached: list[str] = []

        def refuse(*, name: str, **_: Any) -> Any:
            reached.append(name)
            return self._monty.NOT_HANDLED

        modules = _Modules(reached)
        try:
            with self._pool.checkout(limits=self._limits, os_policy=self._policy, external_modules=modules) as session:
                value = session.feed_run(source, print_callback=_discard, os=refuse)
        except self._monty.MontyCrashedError as error:
            if not error.timed_out:
                return None
            result = ExecutionResult(status=ExecutionStatus.TIMEOUT, reason=_first_line(error))
        except self._monty.MontyError as error:
            result = _failed(error)
        except Exception as error:  # noqa: BLE001  a hostile value may fail in any way while it is turned into a Python one
            result = _error(f"the value cannot be read: {_first_line(error)}")
        else:
            result = _returned(value)
        if reached:
            return ExecutionResult(status=ExecutionStatus.FORBIDDEN, reason=f"it reached for {reached[0]}")
        return result


def _returned(value: Any) -> ExecutionResult:
    """Refuses a value that would fill the memory of the process that grades."""
    if _size_bytes(value, MAX_VALUE_BYTES) > MAX_VALUE_BYTES:
        return _error("the value is too large")
    return ExecutionResult(status=ExecutionStatus.OK, value=value)


def _failed(error: Exception) -> ExecutionResult:
    text = _first_line(error)
    if text.startswith("TimeoutError: ") and "time limit exceeded" in text:
        status = ExecutionStatus.TIMEOUT
    elif text.startswith("MemoryError: ") and "memory limit" in text:
        status = ExecutionStatus.MEMORY
    else:
        status = ExecutionStatus.FORBIDDEN if forbidden_error(text) else ExecutionStatus.ERROR
    return ExecutionResult(status=status, reason=text)


def _end_pool(pool: Any, pid: int) -> None:
    if os.getpid() == pid:
        pool.__exit__(None, None, None)
    else:
        _inherited.append(pool)  # dropping it would reach into the parent's event loop


def _discard(stream: str, text: str) -> None:
    """What a program prints is nobody's business."""


class _Modules(Mapping[str, NoReturn]):
    """Offers no module, and notes which forbidden ones were asked for."""

    def __init__(self, reached: list[str]) -> None:
        self._reached = reached

    def __getitem__(self, name: str) -> NoReturn:
        if name.partition(".")[0] in FORBIDDEN_MODULES:
            self._reached.append(f"the module {name}")
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


_UNREACHABLE = re.compile(
    r"AttributeError: module '(os|sys)[.\w]*' has no attribute"
    r"|AttributeError: .* has no attribute '__\w+__'"
    r"|ImportError: cannot import name '\w+' from '(os|sys)'"
)


def forbidden_error(text: str) -> bool:
    """Whether an error message says that the program reached for what the sandbox leaves out on purpose."""
    name = re.match(r"NameError: name '(\w+)' is not defined", text)
    return name.group(1) in FORBIDDEN_NAMES if name is not None else _UNREACHABLE.match(text) is not None


def _first_line(error: BaseException) -> str:
    """`Type: message`."""
    return one_line(str(error)) or type(error).__name__


def one_line(text: str) -> str:
    """The first line of what a program wrote, bounded, and without what could not be printed or would steer a terminal."""
    return "".join(char if char.isprintable() else "�" for char in text.partition("\n")[0][:200])


def _size_bytes(value: Any, limit: int) -> int:
    """Memory of a program's value with all that it holds, each object once; counting ends soon after `limit`."""
    size, waiting, seen = 0, [value], {id(value)}
    while waiting and size <= limit:
        each = waiting.pop()
        size += sys.getsizeof(each)
        if size <= limit:
            # monty keeps the attributes of an object where the garbage collector does not look
            inside = [*gc.get_referents(each), getattr(each, "attributes", None)]
            waiting += [item for item in inside if id(item) not in seen and not isinstance(item, type)]
            seen.update(map(id, inside))
    return size
