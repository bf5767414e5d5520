"""Runs one program for the subprocess sandbox. Started as a script with -I -S and an empty
environment; imports nothing of ours.

The settings are one JSON argument, the program comes on standard input. Lines written to the first
standard output: `F…` for each thing the program reached for and was refused, then `V…` with its
value as JSON, or `E…` with its exception; `N…` where the program was not started because the system
lacks what is named.

The audit hook only labels and refuses what well-known doors lead to. What holds a determined
program is the kernel: Landlock (files), seccomp (an allow-list of system calls: no sockets,
processes, threads, signals or timers), namespaces and limits.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from types import FrameType
from typing import Any

NOT_ISOLATED = 77
CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_VERSION, LANDLOCK_RULE_PATH_BENEATH, LANDLOCK_READ_FILE, LANDLOCK_READ_DIR = (
    1,
    1,
    1 << 2,
    1 << 3,
)
LANDLOCK_TCP, LANDLOCK_SIGNALS_AND_SOCKETS = 0b11, 0b11
REFUSED = tuple(
    "ctypes.dlopen ctypes.dlsym fcntl. ftplib. glob. http. imaplib. os. pathlib. poplib. pty. "
    "resource. shutil. smtplib. socket. sqlite3. subprocess. syslog. tempfile. urllib. "
    "webbrowser.".split()
)
HARMLESS = ("os.putenv", "os.unsetenv")


def main() -> None:
    settings = json.loads(sys.argv[1])
    source = sys.stdin.buffer.read().decode("utf-8", "replace")
    results = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)
    sys.path.extend(settings["paths"])
    sys.setrecursionlimit(settings["recursion"])
    for limit, value in settings["limits"].items():
        resource.setrlimit(getattr(resource, limit), (value, value))
    signal.setitimer(signal.ITIMER_REAL, settings["timeout_s"])
    missing = fence_in(settings["readable"])
    if missing and not settings["allow_unisolated"]:
        os.write(results, f"N{missing}".encode())
        os._exit(NOT_ISOLATED)
    for name in (
        "ctypes",
        "resource",
        "signal",
    ):  # so that the program's own import of one is noticed
        sys.modules.pop(name, None)
    sys.addaudithook(Doorman(results, settings))
    os.write(results, run(source).encode("ascii", "backslashreplace"))
    os._exit(0)


# --- what the kernel enforces ---------------------------------------------------------------------


def fence_in(readable: list[str]) -> str:
    """Give up, for good, the network, other processes and all files but `readable`. Returns what
    the system cannot do."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        namespaces = libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC) == 0
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        files = only_read(libc, readable)
        calls = only_call(libc, ALLOWED_CALLS.get(os.uname().machine))
    except (OSError, AttributeError) as error:
        return f"the system's C library ({error})"
    needed = {
        "Landlock, to fence off files": files,
        "seccomp or namespaces, to cut off the network": namespaces or calls,
    }
    return " and ".join(name for name, there in needed.items() if not there)


def only_read(libc: ctypes.CDLL, paths: list[str]) -> bool:
    """Landlock: `paths` may be read, nothing else in the file system opened, written, made, renamed
    or removed."""
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), LANDLOCK_VERSION)
    if version < 1:
        return False
    fields = 1 if version < 4 else 2 if version < 6 else 3
    actions = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    handled = struct.pack("=QQQ", actions, LANDLOCK_TCP, LANDLOCK_SIGNALS_AND_SOCKETS)[: 8 * fields]
    rules = libc.syscall(LANDLOCK_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0)
    for path in paths:
        if not os.path.exists(path):  # noqa: PTH110  pathlib is not imported for this
            continue
        may = LANDLOCK_READ_FILE | (LANDLOCK_READ_DIR if os.path.isdir(path) else 0)  # noqa: PTH112
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", may, descriptor)
        if libc.syscall(LANDLOCK_ADD_RULE, rules, LANDLOCK_RULE_PATH_BENEATH, rule, 0) != 0:
            return False
        os.close(descriptor)
    done = bool(libc.syscall(LANDLOCK_RESTRICT_SELF, rules, 0) == 0)
    os.close(rules)
    return done


def only_call(libc: ctypes.CDLL, table: tuple[int, str] | None) -> bool:
    """seccomp: every system call but the allowed ones fails with EPERM. False for machines without
    a table."""
    if table is None:
        return False
    architecture, numbers = table[0], [int(number) for number in table[1].split()]
    load, equal, give = 0x20, 0x15, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    program += [(equal, len(numbers) - index, 0, number) for index, number in enumerate(numbers)]
    program += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    filter = struct.pack("@HP", len(program), ctypes.addressof(code))
    return bool(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter, 0, 0) == 0)


ALLOWED_CALLS = {
    # read write open close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigreturn
    # pread64 readv writev access select sched_yield mremap madvise dup nanosleep getpid exit uname
    # getcwd readlink gettimeofday getrusage sysinfo times getuid getgid geteuid getegid getppid
    # sigaltstack gettid time futex sched_getaffinity getdents64 clock_gettime clock_getres
    # clock_nanosleep exit_group openat newfstatat readlinkat faccessat pselect6 ppoll getcpu
    # getrandom statx rseq faccessat2
    "x86_64": (
        0xC000003E,
        (
            "0 1 2 3 4 5 6 7 8 9 10 11 12 15 17 19 20 21 23 24 25 28 32 35 39 60 63 79 89 96 98 99"
            " 100 102 104 107 108 110 131 186 201 202 204 217 228 229 230 231 257 262 267 269 270"
            " 271 309 318 332 334 439"
        ),
    ),
    # The same; open, stat, lstat, poll, access, select, readlink and time do not exist there.
    "aarch64": (
        0xC00000B7,
        (
            "63 64 57 80 62 222 226 215 214 139 67 65 66 124 216 233 23 101 172 93 160 17 169 165"
            " 179 153 174 176 175 177 173 132 178 98 123 61 113 114 115 94 56 79 78 48 72 73 168"
            " 278 291 293 439"
        ),
    ),
}
"""Machine → its number in the kernel's audit.h, and the system calls that a program may make."""


# --- the program ----------------------------------------------------------------------------------


def run(source: str) -> str:
    scope: dict[str, Any] = {"__name__": "__main__"}
    try:
        *body, call = source.rstrip().split("\n")
        exec(compile("\n".join(body), "<program>", "exec"), scope)
        value = eval(compile(call, "<program>", "eval"), scope)
        return "V" + as_json(value)
    except BaseException as error:  # noqa: BLE001  a program may raise anything
        return f"E{type(error).__name__}: {str(error)[:300]!r}"


def as_json(value: Any) -> str:
    """JSON, or the text of a number of another type (Fraction, numpy, sympy)."""
    try:
        return json.dumps(value)
    except TypeError:
        if hasattr(value, "__float__"):
            return json.dumps(str(value))
        raise


class Doorman:
    """Refuses, and reports, what a program reaches for outside itself; its packages may read their
    own files."""

    def __init__(self, results: int, settings: dict[str, Any]) -> None:
        self.results = results
        self.readable = tuple(f"{path}/" for path in settings["readable"])
        self.forbidden = frozenset(settings["forbidden_modules"])

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            reads = flags & (os.O_WRONLY | os.O_RDWR) == 0
            # A syntax error looks for its source line in the file of that name.
            refused = (
                not isinstance(path, int)
                and path != "<program>"
                and not (reads and self.is_library(path))
            )
        elif event in ("os.listdir", "os.scandir"):
            refused = not self.is_library(args[0])
        elif event == "import":
            refused = args[0].partition(".")[0] in self.forbidden and is_program(sys._getframe(1))
        else:
            own_symbols = event == "ctypes.dlopen" and args[0] is None
            refused = event.startswith(REFUSED) and event not in HARMLESS and not own_symbols
        if refused:
            os.write(self.results, f"F{event} {str(args[:1])[:100]!a}\n".encode())
            raise PermissionError(f"{event} is forbidden")

    def is_library(self, path: Any) -> bool:
        text = os.fsdecode(path) if isinstance(path, str | bytes) else ""
        return f"{os.path.abspath(text)}/".startswith(self.readable)  # noqa: PTH100  pathlib would resolve links


def is_program(frame: FrameType | None) -> bool:
    """Whether the first frame outside the import system is the program's own."""
    while frame is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename == "<program>"


if __name__ == "__main__":
    main()
