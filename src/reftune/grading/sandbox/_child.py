"""Runs programs for the subprocess sandbox. This file runs as a script in a prepared environment
and imports nothing from reftune. Each program runs in a process forked from the script's process.

The script's process imports common modules, and slow packages if programs need them, so that a
program need not import them again. After that, it only forks processes, waits for them and kills
them. It never reads a program. Each message on the socket at descriptor 0 asks it to run a program.
The message names the program's working folder and carries three file descriptors: the program's
source, a pipe for its result, and a socket for its exit status. When the other end of the status
socket closes, the program is killed.

The result consists of lines. The first letter of each line indicates the line's kind. Each refused
access adds an `F` line. If the program is not killed, more lines follow: a `P` line with the end of
the program's output, if there is any, and then a `V` line with the program's value or an `E` line
with its exception. If the system lacks a required protection, the program is not started, and the
only line is an `N` line that names what is missing. `P`, `V` and `E` lines contain JSON.

The audit hook (`Doorman`) blocks and reports only the well-known ways out of the sandbox. A
determined program can get past the hook, but not past the kernel's limits.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

NOT_ISOLATED = 77
MAX_PRINTED_CHARS = 2000
CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_VERSION, LANDLOCK_RULE_PATH_BENEATH = 1, 1
LANDLOCK_READ_FILE, LANDLOCK_READ_DIR = 1 << 2, 1 << 3
LANDLOCK_TCP, LANDLOCK_SIGNALS_AND_SOCKETS = 0b11, 0b11
REFUSED = tuple(
    "ctypes.dlopen ctypes.dlsym fcntl. ftplib. glob. http. imaplib. os. pathlib. poplib. pty. "
    "resource. shutil. smtplib. socket. sqlite3. subprocess. syslog. tempfile. urllib. "
    "webbrowser.".split()
)
HARMLESS = ("os.putenv", "os.unsetenv")


# --- the process that forks -----------------------------------------------------------------------


def main() -> None:
    settings = json.loads(sys.argv[1])
    sys.path.extend(settings["paths"])
    for name in settings["preload"]:
        with contextlib.suppress(Exception):  # the program's own import will report the error
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    requests = socket.socket(fileno=os.dup(0))
    requests.send(b"ready")
    serve(requests, settings)


def serve(requests: socket.socket, settings: dict[str, Any]) -> None:
    """Fork a process for each request until the other end of the socket closes."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, tuple[int, socket.socket]] = {}
    ready = select.poll()
    ready.register(requests, select.POLLIN)
    ready.register(woken, select.POLLIN)
    while True:
        for descriptor, _ in ready.poll():
            if descriptor == requests.fileno():
                try:
                    message, descriptors, _, _ = socket.recv_fds(requests, 4096, 3)
                except OSError:
                    message = b""
                if not message:  # the other end has closed
                    for pid, _ in running.values():
                        kill(pid)
                    return
                source, results, status = descriptors
                pid = fork(os.fsdecode(message), source, results, settings)
                for each in (source, results):
                    os.close(each)
                running[status] = pid, socket.socket(fileno=status)
                ready.register(status, select.POLLIN)
            elif descriptor == woken:
                with contextlib.suppress(BlockingIOError):
                    os.read(woken, 4096)
                tell_ended(running, ready)
            elif descriptor in running and is_closed(running[descriptor][1]):
                pid, waiting = running.pop(descriptor)
                ready.unregister(descriptor)
                kill(pid)
                waiting.close()


def is_closed(waiting: socket.socket) -> bool:
    """Whether the other end of a program's status socket is closed, which means that nobody is
    waiting for the result any more. A poll event does not prove this, because the descriptor may
    have been closed and reused since the event."""
    try:
        return waiting.recv(1, socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def fork(folder: str, source: int, results: int, settings: dict[str, Any]) -> int:
    """Fork a process for one program and return its id. In the new process, the function never
    returns."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            run_program(folder, source, results, settings, parent)
        finally:
            os._exit(1)
    return pid


def tell_ended(running: dict[int, tuple[int, socket.socket]], ready: select.poll) -> None:
    """For each process that has ended, send its exit status and stop keeping track of it."""
    for descriptor, (pid, waiting) in list(running.items()):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            del running[descriptor]
            ready.unregister(descriptor)
            with contextlib.suppress(OSError):
                waiting.send(str(os.waitstatus_to_exitcode(status)).encode())
            waiting.close()


def kill(pid: int) -> None:
    for end in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            end(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


# --- the process of one program -------------------------------------------------------------------


def run_program(
    folder: str, source_file: int, results: int, settings: dict[str, Any], parent: int
) -> None:
    """Isolate the process, then run the program and write its result."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.chdir(folder)
    with open(os.dup(source_file), "rb") as file:  # noqa: PTH123  a descriptor, not a path
        source = file.read().decode("utf-8", "replace")
    keep_only(results)
    results = 3
    sys.setrecursionlimit(settings["recursion"])
    for limit, value in settings["limits"].items():
        resource.setrlimit(getattr(resource, limit), (value, value))
    signal.setitimer(signal.ITIMER_REAL, settings["timeout_s"])
    missing = fence_in(settings["readable"])
    if os.getppid() != parent:
        return
    if missing and not settings["allow_unisolated"]:
        os.write(results, f"N{missing}".encode())
        os._exit(NOT_ISOLATED)
    random.seed(0)
    doorman = Doorman(results, settings)
    builtins.__import__ = doorman.importing(builtins.__import__)
    sys.addaudithook(doorman)
    os.write(results, run(source).encode("ascii", "backslashreplace"))
    os._exit(0)


def keep_only(results: int) -> None:
    """Close every descriptor except `results`, which becomes descriptor 3. Descriptors 0, 1 and 2
    become the null device."""
    os.dup2(results, 3)
    os.closerange(4, max(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)


# --- limits that the kernel enforces --------------------------------------------------------------


def fence_in(readable: list[str]) -> str:
    """Permanently give up access to the network, other processes and the contents of all files
    except `readable`, as far as the system allows. Without seccomp, other processes may remain
    accessible. Access to files and the network can be blocked only if the system has certain
    features. Returns a phrase that names the features that the system lacks; empty if it lacks
    none."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        namespaces = libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC) == 0
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        files = only_read(libc, readable)
        calls = only_call(libc, ALLOWED_CALLS.get(os.uname().machine))
    except (OSError, AttributeError) as error:
        return f"a usable C library ({error})"
    needed = {
        "Landlock (to restrict file access)": files,
        "seccomp or namespaces (to block the network)": namespaces or calls,
    }
    return ", and ".join(name for name, there in needed.items() if not there)


def only_read(libc: ctypes.CDLL, paths: list[str]) -> bool:
    """Use Landlock so that the process can read only the files in `paths`, and cannot create,
    write, run or delete any file. Landlock does not cover metadata (`stat`, `chmod`). On newer
    kernels, Landlock also blocks TCP and signals to other processes. Returns False if access to
    files cannot be restricted."""
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
    """Use seccomp to make every system call that is not in `table` fail with EPERM. Returns False
    if this cannot be done, or if `table` is None because this file has no table for the machine's
    architecture."""
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
    # The calls of x86_64, except open, stat, lstat, poll, access, select, readlink and time, which
    # this architecture lacks.
    "aarch64": (
        0xC00000B7,
        (
            "63 64 57 80 62 222 226 215 214 139 67 65 66 124 216 233 23 101 172 93 160 17 169 165"
            " 179 153 174 176 175 177 173 132 178 98 123 61 113 114 115 94 56 79 78 48 72 73 168"
            " 278 291 293 439"
        ),
    ),
}
"""Architecture → its number in the kernel's audit.h, and the numbers of the system calls that a
program may make."""


# --- the program ----------------------------------------------------------------------------------


def run(source: str) -> str:
    """Run a program. Returns the last lines of its result: a `P` line if the program printed
    something, and a `V` or `E` line."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    printed = Printed()
    sys.stdout = printed
    dumps = json.dumps  # kept, because the program may replace json.dumps
    try:
        *body, call = source.rstrip().split("\n")
        exec(compile("\n".join(body), "<program>", "exec"), scope)
        value = eval(compile(call, "<program>", "eval"), scope)
        end = "V" + as_json(value, dumps)
    except BaseException as error:  # noqa: BLE001  a program may raise anything
        end = "E" + dumps(f"{type(error).__name__}: {str(error)[:300]}")
    return f"P{dumps(printed.tail)}\n{end}" if printed.tail else end


class Printed:
    """A standard output that keeps only the end of what is written to it."""

    tail = ""

    def write(self, text: str) -> int:
        self.tail = (self.tail + text)[-MAX_PRINTED_CHARS:]
        return len(text)

    def flush(self) -> None:
        """Do nothing, because nothing is buffered."""


def as_json(value: Any, dumps: Callable[..., str] = json.dumps) -> str:
    """`value` as JSON. A set becomes a sorted list. An object of any other type that JSON lacks
    becomes a string if it has `__float__` or `isoformat`, as a Fraction or a datetime does. The
    items of a list, set or dict are converted in the same way. Raises: TypeError if an object
    cannot be converted in any of these ways."""
    return dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if hasattr(value, "__float__") or hasattr(value, "isoformat"):
        return str(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


class Doorman:
    """Refuses and reports a program's attempts to reach outside the sandbox. Reading the files of
    Python and its packages is allowed."""

    def __init__(self, results: int, settings: dict[str, Any]) -> None:
        self.results = results
        self.readable = tuple(f"{path}/" for path in settings["readable"])
        self.forbidden = frozenset(settings["forbidden_modules"])

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            reads = flags & (os.O_WRONLY | os.O_RDWR) == 0
            # to quote the line of a SyntaxError, Python tries to open a file of this name
            refused = (
                not isinstance(path, int)
                and path not in ("<program>", "<string>")
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
            self.refuse(event, args)

    def importing(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """An `__import__` that refuses forbidden modules even if they are already loaded."""

        def wrapped(name: str, *args: Any, **kwargs: Any) -> Any:
            if name.partition(".")[0] in self.forbidden and is_program(sys._getframe(1)):
                self.refuse("import", (name,))
            return load(name, *args, **kwargs)

        return wrapped

    def refuse(self, event: str, args: tuple[Any, ...]) -> None:
        os.write(self.results, f"F{event} {str(args[:1])[:100]!a}\n".encode())
        raise PermissionError(f"{event} is forbidden")

    def is_library(self, path: Any) -> bool:
        text = os.fsdecode(path) if isinstance(path, str | bytes) else ""
        return f"{os.path.abspath(text)}/".startswith(self.readable)  # noqa: PTH100  Path.resolve would follow links


def is_program(frame: FrameType | None) -> bool:
    """Whether `frame` belongs to the program, or to the import system that the program called."""
    while frame is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename == "<program>"


if __name__ == "__main__":
    main()
