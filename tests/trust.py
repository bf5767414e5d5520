"""`make trust` runs the suites behind the promises of docs/reliability.md and docs/sandbox.md in
full, and prints one table.

A test counts as one case. A test of many cases calls `record_property("tried", number)` and, if
some were lost, `record_property("lost", number)`. The exit status is 1 if any case was lost or none
was tried.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SUITES = ("kill", "fault", "hostile", "fuzz")
ROOT = Path(__file__).parents[1]
NO_TESTS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """The results of a suite's cases."""

    suite: str
    tried: int
    survived: int
    lost: int
    skipped: int
    """Tests that this system cannot run; their cases do not count as tried."""
    seconds: float


def run(suite: str, *, short: bool, limit_s: float) -> Count:
    """Run one suite. A suite that does not end within `limit_s` seconds, or ends without a report,
    counts as one lost case."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        marker = f"{suite} and not slow" if short else suite
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--tb=short",
            "-m",
            marker,
            f"--junitxml={report}",
        ]
        command += [
            "-o",
            "junit_family=xunit1",
            "tests",
        ]  # the newer format has no place for the tests' properties
        try:
            status = subprocess.run(
                command, cwd=ROOT, stdout=sys.stderr, timeout=limit_s, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = -1
        if not report.exists():
            return Count(
                suite=suite,
                tried=1,
                survived=0,
                lost=1,
                skipped=0,
                seconds=time.monotonic() - started,
            )
        return count(
            suite, report, seconds=time.monotonic() - started, broke=status not in (0, 1, NO_TESTS)
        )


def count(suite: str, report: Path, *, seconds: float, broke: bool = False) -> Count:
    """Add up a JUnit report. `broke` means that pytest itself ended in an error, which counts as
    one more lost case."""
    tried = lost = skipped = 0
    for case in ElementTree.parse(report).iter("testcase"):
        said = {each.get("name"): int(each.get("value", "0")) for each in case.iter("property")}
        if case.find("skipped") is not None:
            skipped += 1
            continue
        failed = case.find("failure") is not None or case.find("error") is not None
        tried += said.get("tried", 1)
        lost += max(1, said.get("lost", 1)) if failed else 0
    tried, lost = tried + broke, lost + broke
    return Count(
        suite=suite, tried=tried, survived=tried - lost, lost=lost, skipped=skipped, seconds=seconds
    )


def table(counts: Sequence[Count]) -> str:
    """A Markdown table, one line per suite."""
    lines = [
        "| suite | tried | survived | lost | skipped tests | seconds |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.suite} | {each.tried:,} | {each.survived:,} | {each.lost:,} | {each.skipped} |"
        f" {each.seconds:.0f} |"
        for each in counts
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "suites",
        nargs="*",
        default=SUITES,
        metavar="SUITE",
        help=f"among {', '.join(SUITES)}; default: all",
    )
    parser.add_argument("--short", action="store_true", help="only what `make test` runs of them")
    parser.add_argument(
        "--limit-s", type=float, default=1800, help="time a suite may take (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    for suite in options.suites:
        if suite not in SUITES:
            parser.error(f"{suite}: no such suite; expected one of {', '.join(SUITES)}")
    counts = [run(suite, short=options.short, limit_s=options.limit_s) for suite in options.suites]
    print(
        json.dumps([asdict(each) for each in counts], indent=2) if options.json else table(counts)
    )
    return int(any(each.lost or not each.tried for each in counts))


if __name__ == "__main__":
    raise SystemExit(main())
