"""Programs in the sandbox: values, limits, refusals, and isolation from the next program."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from reftune.errors import ReftuneError
from reftune.grading.sandbox import Sandbox
from reftune.grading.sandbox import subprocess as sandbox_subprocess
from reftune.grading.sandbox.gaps import gap
from reftune.grading.sandbox.result import (
    MAX_PRINTED_CHARS,
    ExecutionResult,
    ExecutionStatus,
    SandboxLimits,
)

OK, ERROR, TIMEOUT, MEMORY, FORBIDDEN = ExecutionStatus
ORDINARY = "def solution():\n    apples = {}\n    eaten = 3\n    return apples - eaten"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(backend="monty") as sandbox:
        yield sandbox


def returned(expression: str) -> str:
    return f"def solution():\n    return {expression}"


def statuses(results: list[ExecutionResult]) -> list[ExecutionStatus]:
    return [result.status for result in results]


def test_values_come_back_in_order_as_plain_python(sandbox: Sandbox) -> None:
    values = [6, 2.5, "six", True, None, [1, "a"], (1, 2), 10**30]
    results = sandbox.run([returned(repr(value)) for value in values])
    assert [result.value for result in results] == values
    assert set(statuses(results)) == {OK}


def test_no_programs_need_no_worker() -> None:
    assert Sandbox(backend="monty").run([]) == []


def test_the_call_is_any_expression_in_the_programs_scope(sandbox: Sandbox) -> None:
    assert sandbox.run(["def price(n):\n    return n * 2"], call="price(4) + 1")[0].value == 9


@pytest.mark.parametrize(
    "source",
    [
        "def solution(:",
        returned("1 / 0"),
        returned("undefined"),
        returned("solution()"),
        "x = 5",
        "",
        "\x00",
        "\ud800",
        "(" * 10_000,
    ],
)
def test_a_program_that_fails_is_an_error_with_a_reason(sandbox: Sandbox, source: str) -> None:
    result = sandbox.run([source])[0]
    assert result.status is ERROR
    assert result.value is None
    assert result.reason
    assert "\n" not in result.reason


@pytest.mark.parametrize(
    "outside",
    [
        "return 9",
        "return",
        "return ()",
        "return (5, 6)",
        "x = 1; return x",
        "if solution() == 5:\n    return 9",
        "for i in range(3):\n    return i",
        "try:\n    return 9\nfinally:\n    x = 1",
    ],
)
def test_a_return_outside_a_function_is_an_error(sandbox: Sandbox, outside: str) -> None:
    result = sandbox.run([returned("5") + f"\n{outside}"])[0]
    assert result == ExecutionResult(status=ERROR, reason="'return' outside function")


def test_a_tuple_and_nothing_are_values_too(sandbox: Sandbox) -> None:
    results = sandbox.run([returned("(5, 6)"), returned("()"), returned("None")])
    assert [result.value for result in results] == [(5, 6), (), None]
    assert sandbox.run(["x = 5"], call="x, 6\n")[0].value == (5, 6)


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("def solution():\n    while True:\n        pass", TIMEOUT),
        ("def solution():\n    while True:\n        print('x' * 1000)", TIMEOUT),
        (returned("sum(range(10 ** 12))"), TIMEOUT),
        (returned("'a' * 10 ** 9"), MEMORY),
        (returned("[0] * 10 ** 10"), MEMORY),
        (returned("9 ** 9 ** 9"), MEMORY),
        (
            (
                "def solution():\n    x = 1\n    for _ in range(10 ** 8):\n        x = (x, x)\n   "
                " return x"
            ),
            MEMORY,
        ),
        ("def solution():\n    return solution()", ERROR),
    ],
)
def test_hostile_programs_end_within_their_limits(source: str, status: ExecutionStatus) -> None:
    with Sandbox(
        SandboxLimits(timeout_s=0.3 if status is TIMEOUT else 30, memory_mib=16), workers=1
    ) as sandbox:
        sandbox.run([returned("1")])
        started = time.perf_counter()
        results = sandbox.run([source, returned("5")])
    assert statuses(results) == [status, OK]
    assert time.perf_counter() - started < 30  # under 1 s on a free core


def test_a_power_that_overruns_the_clock_is_stopped() -> None:
    # the machine's speed decides which limit it meets first: time, memory or the length of a number
    with Sandbox(SandboxLimits(timeout_s=0.3, memory_mib=16), workers=1) as sandbox:
        results = sandbox.run([returned("10 ** 10000000"), returned("5")])
    assert results[0].status is not OK
    assert results[1].status is OK


def test_a_timeout_cannot_be_caught() -> None:
    source = (
        "def solution():\n    try:\n        while True:\n            pass\n    except"
        " BaseException:\n        return 5"
    )
    with Sandbox(SandboxLimits(timeout_s=0.2)) as sandbox:
        assert sandbox.run([source])[0].status is TIMEOUT


def test_recursion_within_the_limit_is_allowed(sandbox: Sandbox) -> None:
    source = (
        "def depth(n):\n    return 0 if n == 0 else 1 + depth(n - 1)\n\ndef solution():\n    return"
        " depth({})"
    )
    assert sandbox.run([source.format(500)])[0].value == 500
    assert sandbox.run([source.format(5000)])[0].status is ERROR


@pytest.mark.parametrize(
    "source",
    [
        returned("open('/etc/passwd').read()"),
        "import os\n" + returned("os.system('true')"),
        "import os\n" + returned("os.environ['HOME']"),
        "import os\n" + returned("os.listdir('/')"),
        "import sys\n" + returned("sys.modules"),
        "import sys\n" + returned("sys.exit(5)"),
        "from sys import exit\n" + returned("exit(5)"),
        "import subprocess\n" + returned("1"),
        "import socket\n" + returned("1"),
        "import urllib.request\n" + returned("1"),
        "from ctypes import cdll\n" + returned("1"),
        returned("__import__('os')"),
        returned("().__class__.__bases__"),
        returned("solution.__globals__"),
        returned("globals()"),
        returned("input()"),
        (
            "def solution():\n    try:\n        open('/tmp/x', 'w')\n    except Exception:\n       "
            " pass\n    return 5"
        ),
        (
            "def solution():\n    try:\n        import socket\n    except ImportError:\n       "
            " pass\n    return 5"
        ),
    ],
)
def test_reaching_outside_is_forbidden_even_where_the_attempt_is_caught(
    sandbox: Sandbox, source: str
) -> None:
    result = sandbox.run([source])[0]
    assert result.status is FORBIDDEN
    assert result.value is None
    assert result.reason


@pytest.mark.parametrize(
    "source",
    [
        "import os, sys, math, re, json, datetime, random, itertools, collections, functools\n"
        + returned("sys.maxsize"),
        "import os\n" + returned("os.path.join('a', 'b')"),
        returned("sum(x * x for x in range(10))"),
        "class Shop:\n    price = 5\n\n" + returned("Shop().price"),
    ],
)
def test_harmless_code_is_not_refused(sandbox: Sandbox, source: str) -> None:
    assert sandbox.run([source])[0].status is OK


def test_a_missing_package_is_an_error_not_a_crime(sandbox: Sandbox) -> None:
    assert sandbox.run(["import numpy\n" + returned("1")])[0].status is ERROR


def test_clock_sleep_and_random_numbers_are_the_same_every_time(sandbox: Sandbox) -> None:
    source = "import random, time, datetime as d\n" + returned(
        "[random.random(), time.time(), time.sleep(99), str(d.date.today())]"
    )
    started = time.perf_counter()
    first, second = sandbox.run([source, source + "\n"])
    assert time.perf_counter() - started < 8  # a system sleep would take at least 10 s
    assert first.status is OK
    assert first.value == second.value


def test_no_program_sees_what_another_left_behind() -> None:
    poison = "import math\nmath.pi = 3\nint = str\nsolution_of_others = 5\n" + returned("1")
    with Sandbox(workers=1) as sandbox:
        results = sandbox.run(
            [
                poison,
                "import math\n" + returned("[math.pi > 3, int('7')]"),
                returned("solution_of_others"),
            ]
        )
    assert results[1].value == [True, 7]
    assert results[2].status is ERROR


def test_a_program_longer_than_the_limit_is_refused(sandbox: Sandbox) -> None:
    assert "characters" in sandbox.run(["x = 1\n" * 100_000])[0].reason


def test_a_killed_worker_is_replaced() -> None:
    with Sandbox(workers=1) as sandbox:
        assert sandbox.run([returned("1")])[0].value == 1
        for pid in workers_of(os.getpid()):
            os.kill(pid, 9)
        results = sandbox.run([returned("2")] * 3)
    assert [result.value for result in results] == [2, 2, 2]


def test_copies_are_equal_and_start_workers_of_their_own(sandbox: Sandbox) -> None:
    sandbox.run([returned("1")])
    copied = pickle.loads(pickle.dumps(sandbox))
    assert copied == copy.deepcopy(sandbox) == sandbox
    assert copied != Sandbox(SandboxLimits(timeout_s=7))
    with copied:
        assert copied.run([returned("5")])[0].value == 5


def test_closing_ends_the_workers_and_running_again_starts_new_ones() -> None:
    before = set(workers_of(os.getpid()))
    sandbox = Sandbox(workers=1)
    assert sandbox.run([returned("1")])[0].value == 1
    assert set(workers_of(os.getpid())) > before
    sandbox.close()
    assert set(workers_of(os.getpid())) <= before
    assert sandbox.run([returned("1")])[0].value == 1
    sandbox.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_is_told_how_to_start_instead(sandbox: Sandbox) -> None:
    assert sandbox.run([returned("1")])[0].value == 1
    child = multiprocessing.get_context("fork").Process(target=_run_in_child, args=(sandbox,))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert sandbox.run([returned("2")])[0].value == 2


def _run_in_child(sandbox: Sandbox) -> None:
    with pytest.raises(ReftuneError, match="forked"):
        sandbox.run([returned("1")])


def test_a_worker_that_cannot_start_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONTY_BIN", "/nowhere/monty")
    with pytest.raises(ReftuneError, match="cannot be started"):
        Sandbox().run([returned("1")])


@pytest.mark.parametrize(
    "value",
    [
        "'x' * 10 ** 7",
        "1 << 10 ** 7",
        "[str(i) * 100 for i in range(10_000)]",
        "ValueError('x' * 10 ** 7)",
        "Box()",
    ],
)
def test_a_value_that_would_fill_the_graders_memory_is_an_error(
    sandbox: Sandbox, value: str
) -> None:
    box = "class Box:\n    def __init__(self):\n        self.content = 'x' * 10 ** 7\n\n"
    result = sandbox.run([box + returned(value)])[0]
    assert result == ExecutionResult(status=ERROR, reason="the value is too large")


@pytest.mark.parametrize("pair", ["[x, x]", "(x, x)", "{1: x, 2: x}", "Box(x)"])
def test_a_shared_part_of_a_value_counts_as_often_as_it_occurs(sandbox: Sandbox, pair: str) -> None:
    # 2^10 copies of x take less than a MiB, but the text of 2^40 copies would fill any memory
    sources = [
        "class Box:\n    def __init__(self, x):\n        self.x = [x, x]\n\n"
        f"def solution():\n    x = 0\n    for _ in range({n}):\n        x = {pair}\n    return x"
        for n in (5, 40)
    ]
    assert [each.reason for each in sandbox.run(sources)] == ["", "the value is too large"]


def test_a_circular_value_is_read(sandbox: Sandbox) -> None:
    circular = "def solution():\n    x = [1]\n    x.append(x)\n    return x"
    assert sandbox.run([circular])[0].status is OK


def test_a_reason_cannot_steer_a_terminal(sandbox: Sandbox) -> None:
    result = sandbox.run(["def solution():\n    raise ValueError('\\x1b[2J\\x07\\r\\ud800')"])[0]
    assert result.reason == "ValueError: �[2J���"


def test_a_thousand_ordinary_programs_take_about_a_second() -> None:
    programs = [ORDINARY.format(number) for number in range(1000)]
    with Sandbox(workers=1) as sandbox:
        sandbox.run(programs[:1])
        started = time.perf_counter()
        results = sandbox.run(programs)
    assert [result.value for result in results] == [number - 3 for number in range(1000)]
    assert time.perf_counter() - started < 10  # 0.5 s on a free core


def test_programs_that_wait_for_their_limit_run_side_by_side() -> None:
    with Sandbox(SandboxLimits(timeout_s=1.0), workers=4) as sandbox:
        sandbox.run([returned("1")] * 4)
        started = time.perf_counter()
        sandbox.run(["def solution():\n    while True:\n        pass"] * 4)
    assert time.perf_counter() - started < 3.5  # one after the other it would be 4 s


def workers_of(parent: int) -> list[int]:
    """Living monty workers that `parent` started."""
    processes = Path("/proc")
    if not processes.is_dir():
        pytest.skip("the system does not list its processes in /proc")
    found = []
    for stat in processes.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may end meanwhile
            name, _, rest = stat.read_text().partition(") ")
            state, ppid = rest.split()[:2]
            if "(monty" in name and state != "Z" and int(ppid) == parent:
                found.append(int(stat.parent.name))
    return found


# --- the subprocess backend -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def fallback() -> Iterator[Sandbox]:
    if sys.platform != "linux":
        pytest.skip("the subprocess backend isolates on Linux only")
    with Sandbox(SandboxLimits(timeout_s=30), backend="subprocess", workers=1) as sandbox:
        try:
            sandbox.run([returned("1")])
        except ReftuneError as error:
            pytest.skip(str(error))
        yield sandbox


def test_the_fallback_runs_programs_with_installed_packages(fallback: Sandbox) -> None:
    results = fallback.run(
        [
            returned("2.5"),
            "from fractions import Fraction\n" + returned("Fraction(1, 2)"),
            returned("float('inf')"),
        ]
    )
    assert [result.value for result in results] == [2.5, "1/2", float("inf")]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("[Fraction(1, 2), 3]", ["1/2", 3]),
        ("(Decimal('1.50'), [Decimal('2')])", ["1.50", ["2"]]),
        ("{Decimal('3'), Decimal('2')}", ["2", "3"]),
        ("[{3, 2}, frozenset({Fraction(1, 2)})]", [[2, 3], ["1/2"]]),
        ("[date(2024, 1, 5)]", ["2024-01-05"]),
        ("{'a': Fraction(1, 2)}", {"a": "1/2"}),
        ("list(numpy.array([2, 3]))", ["2", "3"]),
        ("[1j]", None),
        ("[object()]", None),
    ],
)
def test_items_are_read_as_values_are(fallback: Sandbox, expression: str, value: object) -> None:
    source = (
        "import numpy\nfrom datetime import date\nfrom decimal import Decimal\n"
        f"from fractions import Fraction\n{returned(expression)}"
    )
    result = fallback.run([source])[0]
    assert (result.status, result.value) == (ERROR if value is None else OK, value)


@pytest.mark.parametrize(
    ("source", "status"),
    [
        (returned("1 / 0"), ERROR),
        ("def solution(:", ERROR),
        (returned("'x' * 10 ** 6"), ERROR),
        (returned("'a' * 10 ** 9"), MEMORY),
        (returned("open('/etc/passwd').read()"), FORBIDDEN),
        (returned("open('x', 'w')"), FORBIDDEN),
        ("import os\n" + returned("os.system('true')"), FORBIDDEN),
        ("import os\n" + returned("os.fork()"), FORBIDDEN),
        ("import socket\n" + returned("1"), FORBIDDEN),
        (
            (
                "def solution():\n    try:\n        import subprocess\n    except Exception:\n     "
                "   pass\n    return 5"
            ),
            FORBIDDEN,
        ),
        ("import sys\n" + returned("sys.exit(5)"), FORBIDDEN),
    ],
)
def test_the_fallback_gives_the_same_labels(
    fallback: Sandbox, source: str, status: ExecutionStatus
) -> None:
    assert fallback.run([source])[0].status is status


def test_the_fallback_kills_what_does_not_end(fallback: Sandbox) -> None:
    with Sandbox(
        SandboxLimits(timeout_s=0.3), backend="subprocess", allow_unisolated=True
    ) as sandbox:
        assert sandbox.run(["def solution():\n    while True:\n        pass"])[0].status is TIMEOUT


def test_the_fallback_hides_the_environment(
    fallback: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFTUNE_SECRET", "5")
    assert (
        fallback.run(["import os\n" + returned("os.environ.get('REFTUNE_SECRET', 'hidden')")])[
            0
        ].value
        == "hidden"
    )


def test_what_is_printed_is_kept_to_its_end(fallback: Sandbox, sandbox: Sandbox) -> None:
    source = "def solution():\n    for i in range(3000):\n        print(i)\n    return 1"
    for each in (fallback, sandbox):
        printed = each.run([source])[0].printed
        assert printed.endswith("2998\n2999\n")
        assert len(printed) == MAX_PRINTED_CHARS


def test_a_program_finds_its_packages_as_they_were_installed(fallback: Sandbox) -> None:
    # the forking process has imported numpy; each program has its own copy of it
    poison = "import numpy\nnumpy.pi = 3\n" + returned("numpy.pi")
    honest = "import numpy\n" + returned("bool(numpy.pi > 3)")
    results = fallback.run([poison, honest, poison, honest])
    assert [result.value for result in results] == [3, True, 3, True]


def test_a_forbidden_module_is_noticed_though_it_is_loaded(fallback: Sandbox) -> None:
    # numpy has imported these
    for name in ("ctypes", "threading", "pickle"):
        source = f"import numpy\nimport {name}\n" + returned("numpy.pi")
        assert fallback.run([source])[0].status is FORBIDDEN, name


def test_sets_and_random_numbers_are_the_same_every_time_in_the_fallback() -> None:
    source = "import random\n" + returned("[random.random(), list({'a', 'b', 'c', 'd', 'e'})]")
    values = []
    for _ in range(2):
        with Sandbox(backend="subprocess", allow_unisolated=True) as sandbox:
            values.append(sandbox.run([source])[0].value)
    assert values[0] == values[1]


def forkers() -> list[psutil.Process]:
    """The processes that fork programs for this one."""
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE
        and str(sandbox_subprocess.CHILD) in child.cmdline()
    ]


def test_a_killed_forking_process_is_replaced(fallback: Sandbox) -> None:
    before = forkers()
    with Sandbox(backend="subprocess", allow_unisolated=True) as sandbox:
        assert sandbox.run([returned("1")])[0].value == 1
        for process in set(forkers()) - set(before):
            process.kill()
        assert [result.value for result in sandbox.run([returned("2")] * 3)] == [2, 2, 2]
    assert forkers() == before


def test_a_program_that_closes_its_result_and_stays_is_killed(fallback: Sandbox) -> None:
    source = "def solution():\n    import os\n    os.close(3)\n    while True:\n        pass"
    with Sandbox(
        SandboxLimits(timeout_s=0.3), backend="subprocess", allow_unisolated=True
    ) as sandbox:
        results = sandbox.run([source, returned("5")])
        assert results[0].status in (TIMEOUT, FORBIDDEN)
        assert results[1].value == 5
        assert not [child for forker in forkers() for child in forker.children()]


def test_a_warm_program_takes_milliseconds(fallback: Sandbox) -> None:
    program = "import numpy as np\n" + returned("int(np.sum([{}, 3]))")
    fallback.run([program.format(0)])
    started = time.perf_counter()
    results = fallback.run([program.format(number) for number in range(20)])
    assert [result.value for result in results] == [number + 3 for number in range(20)]
    assert time.perf_counter() - started < 4  # 0.1 s on a free core; 5 s before there were forks


# --- monty, and the subprocess for what it lacks --------------------------------------------------


@pytest.fixture(scope="module")
def auto(fallback: Sandbox) -> Iterator[Sandbox]:
    with Sandbox(SandboxLimits(timeout_s=30), workers=1) as sandbox:
        yield sandbox


LACKING = {
    "yield expressions": "def g():\n    yield 5\n\n" + returned("sum(g())"),
    "yield from expressions": "def g():\n    yield from [5]\n\n" + returned("sum(g())"),
    "the 'del' statement": "def solution():\n    x = [5, 6]\n    del x[1]\n    return x[0]",
    "import *": "from math import *\n" + returned("floor(5.5)"),
    "dict.get as a value": returned("max({5: 1}, key={5: 1}.get)"),
    "list.count as a value": returned("max([5, 4, 5], key=[5, 4, 5].count)"),
    "str.strip as a value": returned("len(list(map(str.strip, ['a '] * 5)))"),
    "a generator's next": returned("next(x for x in range(10) if x * x == 25)"),
    "method decorators (classmethod/staticmethod/property)": (
        "class A:\n    @property\n    def v(self):\n        return 5\n\n" + returned("A().v")
    ),
    "class inheritance and metaclasses": (
        "class A:\n    v = 5\n\nclass B(A):\n    pass\n\n" + returned("B.v")
    ),
    "the module fractions": "from fractions import Fraction\n" + returned("int(Fraction(10, 2))"),
    "the module statistics": "import statistics\n" + returned("statistics.median([4, 5, 6])"),
    "the module heapq": "import heapq\n" + returned("heapq.nsmallest(1, [7, 5])[0]"),
    "the module string": "import string\n" + returned("string.digits.index('5')"),
    "the module operator": "import operator\n" + returned("operator.add(2, 3)"),
    "the module calendar": "import calendar\n" + returned("calendar.monthrange(2024, 2)[1] - 24"),
    "sys.setrecursionlimit": ("import sys\nsys.setrecursionlimit(10000)\n" + returned("5")),
    "callable": returned("5 if callable(len) else 0"),
    "modular inverses with pow": returned("pow(3, -1, 7)"),
    "date.toordinal as a value": (
        "from datetime import date\n" + returned("date(1, 1, 5).toordinal()")
    ),
    "ordering of objects": (
        "class A:\n    def __init__(self, x):\n        self.x = x\n"
        "    def __lt__(self, other):\n        return self.x < other.x\n\n"
        + returned("min([A(6), A(5)]).x")
    ),
    "the module enum": ("import enum\n" + returned("enum.Enum('K', {'A': 5}).A.value")),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_monty_lacks_is_named_and_runs_in_the_subprocess(
    sandbox: Sandbox, auto: Sandbox, name: str
) -> None:
    # docs/sandbox.md lists each too, and should change when a new monty supports one
    assert gap(sandbox.run([LACKING[name]])[0]) == name.strip("'")
    assert auto.run([LACKING[name]])[0].value == 5


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("import numpy\n" + returned("int(numpy.sum([5]))"), ERROR),
        ("def g():\n    import numpy\n    return numpy.pi\n\n" + returned("g()"), ERROR),
        ("import not_a_module\n" + returned("5"), ERROR),
        (returned("{}.apples"), ERROR),
        (returned("1 / 0"), ERROR),
        ("import subprocess\n" + returned("5"), FORBIDDEN),
        ("import math\n" + returned("math.no_such_function(5)"), ERROR),
    ],
)
def test_packages_and_mistakes_are_no_reason_for_the_subprocess(
    sandbox: Sandbox, auto: Sandbox, source: str, status: ExecutionStatus
) -> None:
    result = sandbox.run([source])[0]
    assert gap(result) is None
    assert result == auto.run([source])[0]
    assert result.status is status


@pytest.mark.parametrize("module", ["this", "msvcrt", "idlelib"])
@pytest.mark.parametrize(
    "error",
    [
        "AttributeError(\"module '{}' has no attribute 'x'\")",
        "ImportError(\"cannot import name 'x' from '{}'\")",
    ],
)
def test_no_error_of_a_program_imports_a_module_here(
    sandbox: Sandbox, error: str, module: str
) -> None:
    result = sandbox.run([f"def solution():\n    raise {error.format(module)}"])[0]
    imported = {*sys.modules}
    assert gap(result) is None
    assert {*sys.modules} == imported


@pytest.mark.parametrize("name", ["math.cbrt", "collections.ChainMap", "itertools.chain"])
def test_a_name_that_a_module_of_monty_lacks_is_a_gap(sandbox: Sandbox, name: str) -> None:
    module, _, function = name.partition(".")
    sources = [
        f"import {module}\n{returned(name)}",
        f"from {module} import {function}\n{returned('5')}",
    ]
    for result in sandbox.run(sources):
        assert gap(result) == (name if result.status is ERROR else None)


def test_a_missing_package_is_reported_along_with_what_monty_lacks(auto: Sandbox) -> None:
    result = auto.run(["from numpy import *\n" + returned("5")])[0]
    assert result.status is ERROR
    assert "numpy" in result.reason


def test_without_isolation_auto_is_monty_and_reports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "plan9")
    with Sandbox() as sandbox:
        lacking, ordinary = sandbox.run([LACKING["the module heapq"], returned("5")])
    assert lacking.status is ERROR
    assert "monty lacks the module heapq" in lacking.reason
    assert ordinary.value == 5


def child_without(tmp_path: Path, changes: dict[str, str]) -> Path:
    """The sandbox's child process on a system that lacks a protection."""
    source = sandbox_subprocess.CHILD.read_text(encoding="utf-8")
    for there, gone in changes.items():
        assert there in source
        source = source.replace(there, gone)
    path = tmp_path / "child.py"
    path.write_text(source, encoding="utf-8")
    return path


NO_LANDLOCK = {"if version < 1:": "if True:"}
NO_SECCOMP = {"if table is None:": "if True:"}
NO_NAMESPACES = {"libc.unshare(": "1 + ("}


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        (NO_LANDLOCK, r"lacks Landlock \(to restrict file access\); .* set allow_unisolated"),
        (
            NO_SECCOMP | NO_NAMESPACES,
            r"lacks seccomp or namespaces \(to block the network\); .* set allow_unisolated",
        ),
    ],
)
def test_the_fallback_refuses_a_kernel_that_cannot_fence_it_in(
    fallback: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    lacking: dict[str, str],
    message: str,
) -> None:
    monkeypatch.setattr(sandbox_subprocess, "CHILD", child_without(tmp_path, lacking))
    with pytest.raises(ReftuneError, match=message):
        Sandbox(backend="subprocess").run([returned("1")])
    assert Sandbox(backend="subprocess", allow_unisolated=True).run([returned("1")])[0].value == 1


@pytest.mark.parametrize("lacking", [NO_SECCOMP, NO_NAMESPACES])
def test_either_seccomp_or_namespaces_are_enough(
    fallback: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lacking: dict[str, str]
) -> None:
    monkeypatch.setattr(sandbox_subprocess, "CHILD", child_without(tmp_path, lacking))
    assert Sandbox(backend="subprocess").run([returned("1")])[0].value == 1


def test_the_fallback_refuses_to_start_where_it_cannot_isolate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "plan9")
    with pytest.raises(ReftuneError, match="allow_unisolated"):
        Sandbox(backend="subprocess").run([returned("1")])
