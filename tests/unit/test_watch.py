"""`reftune watch`: the view of another process's run, from its files."""

import fcntl
import json
from io import StringIO
from pathlib import Path

import pytest

from reftune.errors import DataError
from reftune.terminal.live import LineProgress
from reftune.terminal.watch import RunClock, Tail, follow, is_alive

RECIPE = "name: x\nstages:\n  sft: {kind: sft, epochs: 4}\n  reft: {kind: rl, steps: 3}\n"


class Told:
    """A view that records its events."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __getattr__(self, name: str):
        return lambda *given: self.calls.append((name, *given))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / ".lock").touch()
    return tmp_path


def write(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def sft(step: int, **more: float) -> dict:
    return {
        "stage": "sft",
        "step": step,
        "time": 100.0 + step,
        "progress/epoch": step / 5,
        "loss/sft": 1 / step,
        **more,
    }


def test_a_finished_run_is_told_from_its_files(run: Path):
    # epochs: 4 and a row at step 5 = epoch 1 imply 20 steps; the dev evaluation at step 0 states no
    # total
    first = {"stage": "sft", "step": 0, "time": 99.0, "dev/accuracy": 0.0}
    write(
        run / "metrics.jsonl",
        first,
        sft(5),
        sft(20),
        {"stage": "reft", "step": 1, "time": 200.0, "reward/mean": 0.5},
    )
    sample = {
        "step": 1,
        "id": "p",
        "question": "1 + 1?",
        "gold": "2",
        "completion": "3",
        "verdict": "wrong",
        "value": "3",
        "reason": "3 is not 2",
        "reward": 0.1,
        "finish_reason": "eos",
    }
    write(run / "stages" / "reft" / "samples.jsonl", {**sample, "completion": "7"}, sample)
    (run / "summary.json").write_text("{}")
    told = Told()
    assert follow(run, told, RunClock())
    *calls, (kind, step, [solution]) = told.calls
    assert calls == [
        ("stage", "sft", 20, 5),
        ("step", 5, {"progress/epoch": 1.0, "loss/sft": 0.2}),
        ("step", 20, {"progress/epoch": 4.0, "loss/sft": 0.05}),
        ("stage", "reft", 3, 1),
        ("step", 1, {"reward/mean": 0.5}),
    ]
    assert (kind, step) == ("solutions", 1)
    assert (solution.completion.text, solution.graded.reason, solution.reward) == (
        "3",
        "3 is not 2",
        0.1,
    )


def test_it_follows_a_run_until_its_process_is_gone(run: Path):
    metrics, told, waits = run / "metrics.jsonl", Told(), []
    lock = (run / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    write(metrics, sft(1))

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 1:
            write(metrics, sft(2))
            with metrics.open("a") as file:
                file.write('{"stage": "sft", "st')  # being written
        else:
            with metrics.open("a") as file:
                file.write('ep": 3, "time": 103.0}\n')
            lock.close()

    assert not follow(run, told, RunClock(), wait=wait)
    assert [call[1] for call in told.calls if call[0] == "step"] == [1, 2, 3]
    assert len(waits) == 2


def test_the_clock_of_a_run_that_is_over_is_the_runs_own(run: Path):
    write(run / "metrics.jsonl", sft(1), sft(20))
    stream, clock = StringIO(), RunClock()
    progress = LineProgress(stream, time_s=clock)
    follow(run, progress, clock)
    progress.close()
    assert stream.getvalue().splitlines()[-1] == "sft  20/20  0:19  loss 0.050"  # times 101 and 120


def test_a_file_that_was_cut_back_goes_on_from_its_end(tmp_path: Path):
    tail = Tail(tmp_path / "a.jsonl")
    assert tail.rows() == []
    write(tail.path, {"n": 1}, {"n": 2})
    assert [row["n"] for row in tail.rows()] == [1, 2]
    tail.path.write_text('{"n": 1}\n')
    assert tail.rows() == []
    write(tail.path, {"n": 3})
    assert [row["n"] for row in tail.rows()] == [3]


def test_a_folder_that_is_no_run_folder_is_rejected(tmp_path: Path):
    with pytest.raises(DataError, match=r"not a run folder: it has no recipe\.yaml with stages"):
        follow(tmp_path, Told(), RunClock())
    assert not is_alive(tmp_path)
