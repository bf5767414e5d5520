"""Runs one program for `sandbox_subprocess`. Started as a script with -I -S and an empty environment; imports nothing of ours.

The settings are one JSON argument, the program comes on standard input. Lines written to the first standard output: `F…` for
each thing the program reached for and was refused, then `V…` with its value as JSON, or `E…` with its exception.

The audit hook labels and refuses what well-known doors lead to; what holds a determined program are the namespaces and
resource limits around it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from types import FrameType
from typing import Any

CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
NOT_ISOLATED = 77
REFUSED = tuple(
    "ctypes.dlopen ctypes.dlsym fcntl. ftplib. glob. http. imaplib. os. pathlib. poplib. pty. resource. shutil. smtplib. "
    "socket. sqlite3. subprocess. syslog. tempfile. urllib. webbrowser.".split()
)
HARMLESS = ("os.putenv", "os.unsetenv")


def main() -> None:
    settings = json.loads(sys.argv[1])
    source = sys.stdin.buffer.read().decode("utf-8", "replace")
    results = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    if not cut_off() and not settings["allow_unisolated"]:
        os._exit(NOT_ISOLATED)
    sys.path.extend(settings["paths"])
    sys.setrecursionlimit(settings["recursion"])
    for limit, value in settings["limits"].items():
        resource.setrlimit(getattr(resource, limit), (value, value))
    for name in ("ctypes", "resource", "signal"):  # so that the program's own import of one is noticed
        sys.modules.pop(name, None)
    sys.addaudithook(Doorman(results, settings))
    signal.setitimer(signal.ITIMER_REAL, settings["timeout_s"])
    os.write(results, run(source).encode("ascii", "backslashreplace"))
    os._exit(0)


def cut_off() -> bool:
    """Leave the network. False where the system does not let us."""
    flags = CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC
    try:
        if hasattr(os, "unshare"):
            os.unshare(flags)
            return True
        import ctypes

        return bool(ctypes.CDLL(None).unshare(flags) == 0)
    except (OSError, AttributeError):
        return False


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
    """Refuses, and reports, what a program reaches for outside itself; its packages may read their own files."""

    def __init__(self, results: int, settings: dict[str, Any]) -> None:
        self.results = results
        self.libraries = tuple(f"{path}/" for path in {*settings["libraries"], *settings["paths"]})
        self.forbidden = frozenset(settings["forbidden_modules"])

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            reads = flags & (os.O_WRONLY | os.O_RDWR) == 0
            # A syntax error looks for its source line in the file of that name.
            refused = not isinstance(path, int) and path != "<program>" and not (reads and self.is_library(path))
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
        return f"{os.path.abspath(text)}/".startswith(self.libraries)  # noqa: PTH100  pathlib would resolve links


def is_program(frame: FrameType | None) -> bool:
    """Whether the first frame outside the import system is the program's own."""
    while frame is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename == "<program>"


if __name__ == "__main__":
    main()
