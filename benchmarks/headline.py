"""Compares SFT, offline and online self-training and ReFT (`paper` and `modern`) on SmolLM2-135M
and SVAMP programs, over seeds.

    python -m benchmarks.headline --folder F --minutes 9 --model MODEL --data SVAMP [KEY=VALUE …]
    # repeat until finished
    python -m benchmarks.headline --folder F --tiny
    # a model made from scratch; takes seconds

A call works for about the given number of minutes, stops its run with a checkpoint, and exits with
status 0; the next call continues from there. MODEL is a folder in Hugging Face format (or
`smollm2-135m`), and SVAMP a folder with the ReFT authors' files. Progress goes to stderr; the last
line on stdout is one JSON document with the table of all finished seeds.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reftune.results import table_command

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "smollm2"
SEEDS = (0, 1, 2)
LEAST_S = 20.0
"""A run is not started if fewer seconds are left."""
PATIENCE_S = 90.0
"""Seconds for the step in progress and its checkpoint. After these, a run is killed, and its last
checkpoint remains valid."""
STOPPED = 130
"""Exit status of a run that was interrupted and saved a checkpoint."""


def run_for(command: Sequence[str], seconds: float, *, patience_s: float = PATIENCE_S) -> int:
    """Run a command, ask it to stop after `seconds`, and return its exit status."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        return process.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return STOPPED


def command_of(seed: int, folder: Path, recipe: Path, overrides: Sequence[str]) -> list[str]:
    settings = [f"name={folder.name}", f"run_dir={folder}", f"seed={seed}", *overrides]
    return [sys.executable, "-m", "reftune", "run", str(recipe), *settings]


def work(
    folder: Path, recipe: Path, seeds: Sequence[int], minutes: float, overrides: Sequence[str]
) -> None:
    """Run seed after seed, until all are finished or the time is over. Raises: SystemExit with the
    status of a run that failed."""
    end = time.monotonic() + 60 * minutes
    for seed in seeds:
        run = folder / f"seed-{seed}"
        if is_finished(run):
            continue
        left = end - time.monotonic() - PATIENCE_S * (minutes > 2)
        if left < LEAST_S:
            return
        status = run_for(command_of(seed, run, recipe, overrides), left)
        if status in (STOPPED, -signal.SIGTERM):  # SIGTERM: it came before the run handled signals
            return
        if status != 0:
            sys.exit(status)


def is_finished(run: Path) -> bool:
    return (run / "summary.json").is_file()


def progress(run: Path) -> dict[str, Any]:
    """The progress of a run: its finished stages with their dev accuracy, and the last step of an
    unfinished one."""
    done = {}
    for path in sorted(run.glob("stages/*/stage.json")):
        stage = json.loads(path.read_text(encoding="utf-8"))
        done[stage["stage"]] = {
            name: stage[name] for name in ("dev_accuracy", "chosen_step", "steps", "wall_seconds")
        }
    rows = (
        (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        if (run / "metrics.jsonl").is_file()
        else []
    )
    last = json.loads(rows[-1]) if rows else {}
    return {
        "finished": is_finished(run),
        "stages": done,
        "last": {key: last[key] for key in ("stage", "step") if key in last},
    }


def document(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    runs = {seed: folder / f"seed-{seed}" for seed in seeds}
    finished = [run for run in runs.values() if is_finished(run)]
    return {
        "finished": len(finished) == len(runs),
        "seeds": {str(seed): progress(run) for seed, run in runs.items()},
        "table": json.loads(table_command(finished, json=True)) if finished else None,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--minutes", type=float, default=9.0, help="about how long this call works")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--model", help="folder in Hugging Face format")
    parser.add_argument("--data", type=Path, help="folder with the ReFT authors' SVAMP files")
    parser.add_argument(
        "--tiny", action="store_true", help="a model made from scratch and generated questions"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="recipe keys to change; the same at every call",
    )
    asked = parser.parse_args(arguments)
    overrides = list(asked.overrides)
    if asked.model:
        overrides.append(f"model.path={asked.model}")
    if asked.data:
        overrides += [f"dataset.train={asked.data.resolve() / 'svamp_python_sdp.json'}"]
        overrides += [f"dataset.test={asked.data.resolve() / 'svamp_test_set.json'}"]
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    work(
        folder,
        RECIPES / f"headline{'-tiny' if asked.tiny else ''}.yaml",
        asked.seeds,
        asked.minutes,
        overrides,
    )
    print(json.dumps(document(folder, asked.seeds)))


if __name__ == "__main__":
    main()
