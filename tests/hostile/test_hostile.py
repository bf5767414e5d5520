"""A corpus of hostile programs in readable files runs against both sandboxes: none escapes, and
none harms another program."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import psutil
import pytest

from hostile.world import GOLD, PROBLEM, Attack, World, attacks, neighbour, world_in
from reftune.errors import ReftuneError
from reftune.grading.formats.program import Program
from reftune.grading.sandbox.subprocess import INTERPRETER_MIB
from reftune.types import Graded, Verdict

Backend = Literal["monty", "subprocess"]
Record = Callable[[str, object], None]

pytestmark = [pytest.mark.hostile, pytest.mark.timeout(600)]
GROUPS = {
    "environment",
    "files",
    "flooding",
    "forging",
    "introspection",
    "memory",
    "monkeypatching",
    "network",
    "poisoning",
    "processes",
    "recursion",
    "signals",
    "time",
}
TIMEOUT_S = {"monty": 0.5, "subprocess": 1.0}
MEMORY_MIB = 64
WORKER_MIB = {"monty": MEMORY_MIB + 64, "subprocess": MEMORY_MIB + INTERPRETER_MIB}
"""Most memory of a worker: the program's and its own."""
LATE_S = 6.0
"""Seconds by which a program may end late on a busy machine."""
DOORMAN_OFF = (
    "import sys\nsys.modules['__main__'].Doorman.__call__ = lambda self, event, args: None\n"
)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with world_in(tmp_path / "world") as world:
        yield world


def program_format(backend: Backend, grading: Literal["robust", "paper"] = "robust") -> Program:
    """The format that grades programs in the sandbox; skips the test if the system cannot run
    it."""
    format = Program(
        timeout_s=TIMEOUT_S[backend], memory_mib=MEMORY_MIB, sandbox=backend, grading=grading
    )
    try:
        format.grade([PROBLEM], ["def solution():\n    return 1"])
    except ReftuneError as error:
        pytest.skip(str(error))
    return format


def harm(world: World, before: object, attack: Attack, graded: Graded) -> list[str]:
    """The damage that the attack achieved."""
    found = []
    if graded.verdict is Verdict.CORRECT:
        found.append("it returned the secret")
    if world.state() != before:
        found.append("it changed files")
    if world.connections:
        found.append("it reached a socket")
    if not graded.reason.isprintable():
        found.append("its reason is not printable")
    return [f"{attack}: {each}" for each in found]


def grade_among_neighbours(
    format: Program, world: World, chosen: Sequence[Attack], *, prelude: str = ""
) -> tuple[list[Graded], list[str]]:
    """Grade a batch with an honest program after each attack. Returns: the attacks' grades, and the
    honest programs whose verdicts changed."""
    honest = [neighbour(number) for number in range(len(chosen))]
    programs = [
        each
        for attack, (source, _) in zip(chosen, honest, strict=True)
        for each in (prelude + world.program(attack), source)
    ]
    grades = format.grade([PROBLEM] * len(programs), programs)
    return grades[::2], [
        f"after {attack}: {grade.verdict} instead of {verdict}: {grade.reason}"
        for attack, grade, (_, verdict) in zip(chosen, grades[1::2], honest, strict=True)
        if grade.verdict is not verdict
    ]


def survive(
    format: Program, world: World, chosen: Sequence[Attack], record: Record, *, prelude: str = ""
) -> None:
    """Grade the attacks as one batch, and check the limits that hold for the whole batch."""
    before, started = world.state(), time.monotonic()
    grades, disturbed = grade_among_neighbours(format, world, chosen, prelude=prelude)
    seconds = time.monotonic() - started
    lost = [
        each
        for attack, graded in zip(chosen, grades, strict=True)
        for each in harm(world, before, attack, graded)
    ]
    record("tried", len(chosen))
    record("lost", len(lost) + len(disturbed))
    assert not lost
    assert not disturbed
    assert seconds < 2 * len(chosen) * (format.timeout_s + 1)


def test_the_corpus_is_large_varied_and_without_repetitions() -> None:
    corpus = attacks()
    assert {attack.group for attack in corpus} == GROUPS
    assert len(corpus) >= 150
    assert min(Counter(attack.group for attack in corpus).values()) >= 10
    assert max(Counter(attack.source for attack in corpus).values()) == 1
    assert max(Counter(str(attack) for attack in corpus).values()) == 1


def test_nothing_gets_out_of_monty(world: World, record_property: Record) -> None:
    survive(program_format("monty"), world, attacks(), record_property)


def test_a_sample_does_not_get_out_of_the_subprocess(world: World, record_property: Record) -> None:
    survive(program_format("subprocess"), world, attacks()[::12], record_property)


def test_without_its_audit_hook_the_kernel_holds_a_sample(
    world: World, record_property: Record
) -> None:
    chosen = attacks("files", "environment", "network", "processes", "signals", "introspection")[
        ::16
    ]
    survive(program_format("subprocess"), world, chosen, record_property, prelude=DOORMAN_OFF)


# --- the whole forms ------------------------------------------------------------------------------


class PeakMemory:
    """The largest memory of any child process in MiB, sampled every 10 ms."""

    def __init__(self) -> None:
        self.mib = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        this = psutil.Process()
        own = this.cmdline()
        while not self._done.wait(0.01):
            for child in this.children(recursive=True):
                try:
                    if (
                        child.cmdline() != own
                    ):  # before its exec a child shares this process's memory
                        self.mib = max(self.mib, child.memory_info().rss / 2**20)
                except psutil.Error:
                    continue


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["monty", "subprocess"])
@pytest.mark.parametrize("group", sorted(GROUPS))
def test_each_attack_is_contained_within_its_limits(
    backend: Backend, group: str, world: World, record_property: Record
) -> None:
    format, before, lost = program_format(backend), world.state(), []
    own_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    processes = len(psutil.Process().children(recursive=True))
    for attack in attacks(group):
        with PeakMemory() as peak:
            started = time.monotonic()
            [graded], disturbed = grade_among_neighbours(format, world, [attack])
            seconds = time.monotonic() - started
        lost += harm(world, before, attack, graded) + disturbed
        if seconds > 2 * format.timeout_s + LATE_S:
            lost.append(f"{attack}: {seconds:.1f} s")
        if peak.mib > WORKER_MIB[backend]:
            lost.append(f"{attack}: {peak.mib:.0f} MiB")
        if len(psutil.Process().children(recursive=True)) > processes + 1:
            lost.append(f"{attack}: left a process behind")
    record_property("tried", len(attacks(group)))
    record_property("lost", len(lost))
    assert not lost
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 < own_mib + 256


@pytest.mark.slow
def test_without_its_audit_hook_the_kernel_holds(world: World, record_property: Record) -> None:
    chosen = attacks("files", "environment", "network", "processes", "signals", "introspection")
    survive(program_format("subprocess"), world, chosen, record_property, prelude=DOORMAN_OFF)


@pytest.mark.slow
def test_nothing_gets_out_under_the_papers_rules(world: World, record_property: Record) -> None:
    # the paper's rules run one function up to its first blank line
    format, before = program_format("monty", "paper"), world.state()
    chosen = attacks()
    completions = [
        f"def solution():\n{textwrap.indent(world.program(each), '    ')}\n    return solution()"
        for each in chosen
    ]
    grades = format.grade([PROBLEM] * len(chosen), completions)
    lost = [
        each
        for attack, graded in zip(chosen, grades, strict=True)
        for each in harm(world, before, attack, graded)
    ]
    record_property("tried", len(chosen))
    record_property("lost", len(lost))
    assert not lost


NEEDS_MORE = {
    "environment: every open descriptor",
    "environment: its own arguments",
    "environment: os.getppid and its environment",
    "environment: the command line of the parent",
    "environment: the parent's environment in proc",
    "environment: the parent's memory",
    "environment: the password file",
    "environment: the user's home",
    "files: errors are caught and something innocent returned",
    "network: a name is looked up",
    "network: a raw socket",
    "network: a server of its own",
    "network: a socket pair",
    "network: netlink lists the machine's interfaces",
}
"""Attacks that search places without a secret on this machine, or whose success is invisible."""


@pytest.mark.slow
@pytest.mark.parametrize("group", ["files", "environment", "network", "introspection"])
def test_the_attacks_work_where_there_is_no_sandbox(group: str, tmp_path: Path) -> None:
    # otherwise the corpus would prove nothing
    harmless = []
    for number, attack in enumerate(each for each in attacks(group) if str(each) not in NEEDS_MORE):
        with world_in(tmp_path / str(number)) as world:
            before = world.state()
            program = f"{world.program(attack)}\nprint(solution())"
            with subprocess.Popen(
                [sys.executable, "-I", "-c", program],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=tmp_path,
                stdin=subprocess.DEVNULL,
                env=dict(os.environ),
                start_new_session=True,
            ) as process:
                try:
                    output = process.communicate(timeout=10)[0]
                except subprocess.TimeoutExpired:
                    process.kill()
                    output = b""
            time.sleep(0.2)  # so that the server has seen it
            if (
                str(GOLD).encode() not in output
                and world.state() == before
                and not world.connections
            ):
                harmless.append(str(attack))
    assert not harmless
