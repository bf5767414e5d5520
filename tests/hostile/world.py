"""The targets of hostile programs: a folder, honest neighbours, and a secret in a file, in the
environment and behind a socket.

A program escapes if it returns the secret (the gold answer, so that its verdict is CORRECT),
changes anything in the folder, leaves anything elsewhere, or reaches a socket.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from reftune.types import Answer, Problem, Verdict

GOLD = 918273645
CORPUS = Path(__file__).with_name("corpus")
LEFT_BEHIND = [
    Path(folder, "reftune-left-behind") for folder in ("/tmp", "/var/tmp", "/dev/shm", ".")
]
PROBLEM = Problem(id="gold", question="?", answer=Answer(kind="number", value=Fraction(GOLD)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Attack:
    """One program of the corpus."""

    group: str
    name: str
    source: str

    def __str__(self) -> str:
        return f"{self.group}: {self.name}"


def attacks(*groups: str) -> list[Attack]:
    """The programs of `groups`, or of all groups if none is named."""
    found = []
    for path in sorted(CORPUS.glob("*.py")):
        if not groups or path.stem in groups:
            for cell in path.read_text(encoding="utf-8").split("# %% ")[1:]:
                name, _, source = cell.partition("\n")
                found.append(Attack(group=path.stem, name=name.strip(), source=source))
    return found


HONEST = {
    Verdict.CORRECT: (
        f"import math, collections\nNEIGHBOUR = {GOLD}\ndef solution():\n    counted ="
        " collections.Counter([1, 1, 2])\n    wrong = math.floor(math.pi) + sum(range(3)) +"
        " len(str(counted[1])) - 7\n    return NEIGHBOUR + int(wrong)"
    ),
    Verdict.WRONG: "def solution():\n    apples = 23\n    return apples - round(abs(-3.0))",
    Verdict.NO_ANSWER: "def solution():\n    return None",
    Verdict.ERROR: "def solution():\n    return left_behind + apples",
}
"""Verdict → an honest program that gets it, if no built-in or module has been changed."""


def neighbour(number: int) -> tuple[str, Verdict]:
    """An honest program and its verdict. The program is unique, because equal ones would run only
    once."""
    verdict, source = list(HONEST.items())[number % len(HONEST)]
    return f"{source}\n# {number}", verdict


@dataclass(kw_only=True)
class World:
    """The places of the secret, and a record of the accesses to them."""

    root: Path
    port: int = 0
    connections: int = 0
    _sockets: list[socket.socket] = field(default_factory=list)
    _closing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._server = threading.Thread(target=self._serve)
        self.folder.mkdir(parents=True)
        self.secret.write_text(str(GOLD))
        Path(f"{self.secret}.py").write_text("")
        (self.folder / f"name-{GOLD}").touch()

    @property
    def secret(self) -> Path:
        return self.root / "secret"

    @property
    def address(self) -> str:
        """Address of the abstract socket, whose name is valid on the whole machine."""
        return f"reftune-secret-{os.getpid()}"

    @property
    def folder(self) -> Path:
        return self.root / "folder"

    def program(self, attack: Attack) -> str:
        """The attack's code, preceded by the names that it uses."""
        names = {
            "SECRET_FILE": str(self.secret),
            "FOLDER": str(self.folder),
            "PORT": self.port,
            "ADDRESS": self.address,
            "PARENT": os.getpid(),
            "NEIGHBOUR": 0,
        }
        return "".join(f"{name} = {value!r}\n" for name, value in names.items()) + attack.source

    def state(self) -> list[tuple[str, int, int, str]]:
        """Everything in the folders, as name, mode, time and content, and everything left
        elsewhere."""
        inside = sorted(path for path in self.root.rglob("*"))
        found = [
            (
                str(path),
                path.lstat().st_mode,
                path.lstat().st_mtime_ns * path.is_file(),
                path.read_text(errors="replace")[:100] if path.is_file() else "",
            )
            for path in inside
        ]
        return found + [(str(path), 0, 0, "") for path in LEFT_BEHIND if path.exists()]

    def serve(self) -> None:
        """Give the secret to any client over TCP, UDP or an abstract socket."""
        tcp = socket.create_server(("127.0.0.1", 0))
        self.port = tcp.getsockname()[1]
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", self.port))
        local = socket.socket(socket.AF_UNIX)
        local.bind(f"\0{self.address}")
        local.listen()
        self._sockets = [tcp, udp, local]
        self._server.start()

    def _serve(self) -> None:
        while not self._closing.is_set():
            ready, _, _ = select.select(self._sockets, [], [], 0.05)
            for server in ready:
                self.connections += 1
                if server.type == socket.SOCK_DGRAM:
                    server.recvfrom(100)
                    continue
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(f"HTTP/1.0 200 OK\r\n\r\n{GOLD}".encode())

    def close(self) -> None:
        self._closing.set()
        self._server.join()
        for each in self._sockets:
            each.close()


@contextlib.contextmanager
def world_in(root: Path) -> Iterator[World]:
    """A separate world, with the secret in the environment too."""
    world = World(root=root)
    world.serve()
    os.environ["REFTUNE_SECRET"] = str(GOLD)
    try:
        yield world
    finally:
        del os.environ["REFTUNE_SECRET"]
        world.close()
