"""The limits and results of programs, and the modules and names that programs must not use."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from typing import Any, Protocol

MAX_VALUE_BYTES = 1 << 20
"""Maximum size, in bytes, of a program's value in monty."""
MAX_PRINTED_CHARS = 2000
"""Number of characters kept from the end of a program's output."""

FORBIDDEN_MODULES = frozenset(
    "_io _posixsubprocess _socket _thread aiohttp asyncore builtins cffi code codeop concurrent"
    " ctypes faulthandler fcntl fileinput ftplib gc glob http httpx imaplib imp importlib inspect"
    " io marshal mmap multiprocessing nt pickle pip pkgutil platform poplib posix psutil pty pwd"
    " readline requests resource runpy sched select selectors shelve shutil signal site smtplib"
    " socket socketserver sqlite3 ssl subprocess syslog tempfile termios threading tracemalloc tty"
    " urllib urllib3 webbrowser winreg xmlrpc zipimport".split()
)
FORBIDDEN_NAMES = frozenset(
    "__builtins__ __import__ __loader__ __spec__ breakpoint compile exit globals input locals"
    " memoryview quit vars".split()
)

HARMLESS_IN_SYS = frozenset(
    "byteorder float_info getrecursionlimit getsizeof int_info set_int_max_str_digits"
    " setrecursionlimit".split()
)
"""Harmless names in `sys` that monty lacks."""


class ExecutionStatus(enum.Enum):
    """How a program ended."""

    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    FORBIDDEN = "forbidden"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionResult:
    """The result of running one program."""

    status: ExecutionStatus
    value: Any = None
    """The returned value; None unless the status is OK."""
    reason: str = ""
    """One line of explanation; empty if the status is OK."""
    printed: str = field(default="", compare=False)
    """The end of the program's output, if the status is OK."""
    seconds: float = field(default=0.0, compare=False)
    """Run time, including the start of the session or process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxLimits:
    """The limits of one program."""

    timeout_s: float = 1.0
    memory_mib: int = 64
    recursion: int = 1000
    """Maximum depth of nested calls."""


class Backend(Protocol):
    """Runs one program per call of `execute`. Several threads may call `execute` at once."""

    def execute(self, source: str) -> ExecutionResult: ...

    def close(self) -> None: ...


def failure(reason: str, status: ExecutionStatus = ExecutionStatus.ERROR) -> ExecutionResult:
    """A result without a value. Its reason is the first line of `reason`, cut to 200 characters,
    with `�` for unprintable characters."""
    line = reason.partition("\n")[0][:200]
    line = "".join(char if char.isprintable() else "�" for char in line)
    return ExecutionResult(status=status, reason=line)


_UNREACHABLE = re.compile(
    r"AttributeError: module '(os|sys)[.\w]*' has no attribute"
    r"|AttributeError: .* has no attribute '__\w+__'"
    r"|ImportError: cannot import name '\w+' from '(os|sys)'"
)


def forbidden_error(text: str) -> bool:
    """Whether an error message shows that the program tried to use something that the sandbox omits
    on purpose."""
    name = re.match(r"NameError: name '(\w+)' is not defined", text)
    if name is not None:
        return name.group(1) in FORBIDDEN_NAMES
    in_sys = re.search(r"module 'sys' has no attribute '(\w+)'", text)
    if in_sys is not None and in_sys.group(1) in HARMLESS_IN_SYS:
        return False
    return _UNREACHABLE.match(text) is not None
