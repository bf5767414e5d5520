"""Runs recipes in forked children that are killed, or whose disk fails, at chosen operations;
shared by the kill and fault suites.

A child is forked from the warm test process, because a fresh interpreter would spend its time on
imports. The child counts its file-system operations below the run folder through Python's audit
events. An event comes before its operation, so the child can die, tear a file or get an error at
exactly the n-th operation.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reftune.results.page.html  # noqa: F401  imported once here and not in every child
from reftune.recipe import Recipe, dump_recipe
from reftune.runs.run import open_run
from reftune.stages.stage import Progress
from reftune.storage.files import JsonLines
from reftune.terminal.cli import main

TRACKERS = ("tensorboard",)
"""Folders of trackers, which keep a file for each process and do not count as results."""
WRITES = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.truncate",
    "serialize_file",
}

OPTIMIZER = {"learning_rate": 0.05, "max_grad_norm": 1.0}
MORE_SFT: dict[str, Any] = {
    "kind": "sft",
    "init": "sft",
    "epochs": 1,
    "batch_size": 4,
    "optimizer": {"learning_rate": 1.0e-3},
}
"""A stage that a test adds to `make_recipe`."""
EVERY_STAGE: dict[str, Any] = {
    "evaluate": {"samples": 2, "stages": None, "rerank": "judge"},
    "stages": {
        "offline": {
            "kind": "self_train",
            "samples": 3,
            "keep": 2,
            "sft": {"epochs": 1, "batch_size": 16, "save_every_s": 0, "optimizer": OPTIMIZER},
        },
        "online": {
            "kind": "rl",
            "init": "warmup",
            "steps": 2,
            "prompts": 4,
            "samples": 2,
            "eval_every": 1,
            "save_every_s": 0,
            "optimizer": OPTIMIZER,
            "algorithm": {"kind": "online_st"},
        },
        "judge": {
            "kind": "reward_model",
            "samples": 3,
            "dev_samples": 2,
            "epochs": 1,
            "batch_size": 24,
            "save_every_s": 0,
            "optimizer": OPTIMIZER,
        },
    },
}
"""Changes that add both self-trainings and a reranking reward model to the warm-up, SFT and PPO of
`make_recipe`."""


def run_all(recipe: Recipe, progress: Progress | None = None) -> None:
    """Run every stage and evaluation that is not done yet, without the report."""
    with open_run(recipe, progress or Progress()) as run:
        for stage in recipe.stages:
            run.train(stage)
            for method in run.evaluated_after(stage):
                run.evaluation.answer(method)
        run.evaluation.score_samples()


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves behind, without clock times: weights and answers byte by byte,
    numbers by value."""

    def timeless(row: dict[str, Any]) -> dict[str, Any]:
        clocks = [
            name
            for name in row
            if name.startswith("time") or "seconds" in name or name.endswith("_s")
        ]
        return {name: value for name, value in row.items() if name not in clocks}

    found: dict[str, Any] = {}
    for pattern in (
        "stages/*/*.safetensors",
        "stages/*/value_head/*",
        "stages/*/sampled*.jsonl",
        "eval/*",
    ):
        found |= {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob(pattern)}
    for pattern in ("stages/*/stage.json", "summary.json"):
        found |= {
            str(path.relative_to(folder)): timeless(json.loads(path.read_text()))
            for path in folder.glob(pattern)
        }
    for path in folder.glob("stages/*/samples.jsonl"):
        found[str(path.relative_to(folder))] = [timeless(row) for row in JsonLines(path).rows()]
    found["metrics"] = [timeless(row) for row in JsonLines(folder / "metrics.jsonl").rows()]
    found["environment"] = sorted(json.loads((folder / "env.json").read_text()))
    listed = (path.relative_to(folder) for path in folder.rglob("*"))
    found["files"] = sorted(
        str(path) for path in listed if not {"checkpoints", *TRACKERS} & set(path.parts)
    )
    return found


def assert_same_outcome(folder: Path, straight: dict[str, Any]) -> None:
    """Check that outcomes are equal; a failure first names the files that differ."""
    found = outcome(folder)
    files = set(found["files"]) ^ set(straight["files"])
    assert not files, f"in only one of the two: {sorted(files)}"
    different = [
        name for name in found.keys() | straight.keys() if found.get(name) != straight.get(name)
    ]
    assert not different, f"not the same: {sorted(different)}"


# --- children -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Life:
    """How one child ended."""

    status: int | None
    """Exit status; None if it was killed."""
    stderr: str
    operations: int
    """Number of operations on files below the run folder; 0 if it was killed."""


Act = Callable[[str, str, bool], None]
"""Called at an operation with its event, its path, and whether a file is opened for appending."""


def live(
    recipe: Recipe,
    *,
    at: int | None = None,
    act: Act | None = None,
    kill_after_s: float | None = None,
    prepare: Callable[[], None] = lambda: None,
) -> Life:
    """Run `reftune run RECIPE` in a child. `act` is called at operation `at` and at all later ones;
    SIGKILL comes after `kill_after_s` seconds."""
    file, report = recipe.folder.with_suffix(".yaml"), recipe.folder.with_suffix(".life")
    file.write_text(dump_recipe(recipe))
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        status, operations = 1, [0]
        try:
            _watch(recipe.folder, operations, at, act)
            status, stderr = _command(file, prepare)
            report.write_text(json.dumps({"stderr": stderr, "operations": operations[0]}))
        finally:
            os._exit(status)
    if kill_after_s is not None:
        _kill_after(child, kill_after_s)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, (
            f"the child died of signal {os.WTERMSIG(status)}"
        )
        return Life(status=None, stderr="", operations=0)
    return Life(status=os.WEXITSTATUS(status), **json.loads(report.read_text()))


def _command(file: Path, prepare: Callable[[], None]) -> tuple[int, str]:
    """The exit status, and the text on stderr, including a traceback."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        try:
            prepare()
            main(["run", str(file), "--quiet"])
        except SystemExit as end:
            return int(end.code or 0), told.getvalue()
        except BaseException:  # noqa: BLE001  as the interpreter would
            return 1, told.getvalue() + traceback.format_exc()
    raise AssertionError("main exits")


def _kill_after(child: int, seconds: float) -> None:
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)


def _watch(folder: Path, operations: list[int], at: int | None, act: Act | None) -> None:
    import safetensors.torch as safe

    acting = [False]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if acting[0] or event not in WRITES or not arguments or not _is_below(arguments[0], folder):
            return
        appends = False
        if event == "open":
            mode, flags = arguments[1] or "", arguments[2]
            if not flags & (os.O_WRONLY | os.O_RDWR):
                return
            appends = "a" in mode
        operations[0] += 1
        if at is not None and act is not None and operations[0] >= at:
            acting[0] = True
            try:
                act(event, os.fsdecode(arguments[0]), appends)
            finally:
                acting[0] = False

    serialize = safe.serialize_file

    def serialize_file(tensors: Any, filename: Any, *rest: Any, **more: Any) -> None:
        hook("serialize_file", (os.fspath(filename),))  # Rust writes it, without an audit event
        serialize(tensors, filename, *rest, **more)

    safe.serialize_file = serialize_file
    sys.addaudithook(hook)


def _is_below(path: Any, folder: Path) -> bool:
    return isinstance(path, (str, bytes)) and os.fsdecode(path).startswith(f"{folder}{os.sep}")


def die(event: str, path: str, appends: bool) -> None:
    """Send SIGKILL before the operation."""
    os.kill(os.getpid(), signal.SIGKILL)


def tear(event: str, path: str, appends: bool) -> None:
    """If the operation writes a file, leave the beginning of some content in it; then send
    SIGKILL."""
    if event in {"open", "serialize_file"}:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if appends else os.O_TRUNC)
        descriptor = os.open(path, flags)
        os.write(descriptor, b'{"stage": "reft", "st')
    die(event, path, appends)


def refuse(number: int) -> Act:
    """An act that fails this operation, and all later ones, with an error number."""

    def act(event: str, path: str, appends: bool) -> None:
        is_removal = event in {"os.remove", "os.rmdir"}
        if not (
            is_removal and number in {errno.ENOSPC, errno.EDQUOT}
        ):  # a full disk lets files be removed
            raise OSError(number, os.strerror(number), path)

    return act


def signalled(number: int) -> Act:
    """An act that sends the process a signal, once."""
    sent: list[int] = []

    def act(event: str, path: str, appends: bool) -> None:
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    return act
