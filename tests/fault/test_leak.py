"""Memory, file handles, threads and worker processes stay flat over many steps. Runs with
`make trust`, or `pytest -m "fault and slow"`.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from reftune.runs.run import open_run
from reftune.stages.stage import Progress

pytestmark = pytest.mark.fault

PROCESS = Path("/proc/self")
STEPS = 2000


@dataclass(frozen=True, slots=True)
class Used:
    """The resources that this process holds."""

    resident_mib: float
    handles: int
    threads: int
    workers: int


def used(not_ours: Set[str] = frozenset()) -> Used:
    pages = int((PROCESS / "statm").read_text().split()[1])
    return Used(
        resident_mib=pages * os.sysconf("SC_PAGESIZE") / 2**20,
        handles=len(list((PROCESS / "fd").iterdir())),
        threads=len(list((PROCESS / "task").iterdir())),
        workers=len(children() - not_ours),
    )


def children() -> set[str]:
    return {
        child
        for task in (PROCESS / "task").iterdir()
        for child in (task / "children").read_text().split()
    }


class Watching(Progress):
    """Records the resources after each step. Workers that other tests left behind are not
    counted."""

    def __init__(self) -> None:
        self.seen: list[Used] = []
        self._not_ours = children()

    def step(self, step: int, metrics: Any) -> None:
        self.seen.append(used(self._not_ours))


@pytest.mark.skipif(not (PROCESS / "statm").exists(), reason="reads /proc")
@pytest.mark.timeout(1200)
@pytest.mark.slow
def test_nothing_grows_over_many_steps(make_recipe, monkeypatch):
    # programs run in a sandbox worker; a checkpoint every tenth of a second, a dev evaluation every
    # 20 steps
    monkeypatch.setattr(
        "reftune.grading.sandbox._num_cores", lambda: 1
    )  # a second worker would start when it is first needed
    stage = {
        "init": "base",
        "steps": STEPS,
        "prompts": 2,
        "value_prefit": 0,
        "eval_every": 20,
        "save_every_s": 0.1,
    }
    recipe, progress = make_recipe(format={"kind": "program"}, stages={"reft": stage}), Watching()
    with open_run(recipe, progress) as run:
        run.train("reft")
    quarter = len(progress.seen) // 4
    early, late = progress.seen[quarter : 2 * quarter], progress.seen[-quarter:]
    for what in ("handles", "threads", "workers"):
        assert max(getattr(u, what) for u in late) <= max(getattr(u, what) for u in early), what
    assert {u.workers for u in late} == {1}
    grown = statistics.median(u.resident_mib for u in late) - statistics.median(
        u.resident_mib for u in early
    )
    assert grown < 4, f"{grown:.1f} MiB over {STEPS // 2} steps"
