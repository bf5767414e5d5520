"""Compares ReFT with more supervised fine-tuning of SmolLM2-135M on SVAMP programs, over seeds.

    python -m benchmarks.headline --folder F --minutes 9 --model MODEL --data SVAMP [KEY=VALUE …]
    # repeat until finished
    python -m benchmarks.headline --folder F --tiny
    # a model trained from scratch; takes seconds

A call works for about the given number of minutes, stops its runs with a checkpoint, and exits with
status 0. The next call continues from there. With `--together N`, N seeds run at once on one GPU.
MODEL is a folder in Hugging Face format (or `smollm2-135m`), and SVAMP is a folder with the ReFT
authors' files. Of the training questions, 300 are held out. Each seed's chosen models greedily
answer the held-out questions and the authors' test questions. For voting, these models also answer
the first 250 test questions 20 times each. Progress goes to stderr. The last line on stdout is one
JSON document with the tables of all finished seeds.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reftune.datasets.reading.splits import normalised
from reftune.recipe import dump_recipe, load_recipe
from reftune.results import table_command
from reftune.runs.run import Run, threads_of
from reftune.seeds import derive_seed
from reftune.stages.stage import Progress
from reftune.storage.files import JsonLines, write_atomically
from reftune.storage.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "smollm2"
SEEDS = (0, 1, 2)
HELD_OUT = 300
"""Number of questions of the training file that no seed uses for training or choosing a model."""
LEAST_S = 20.0
"""No command is started if fewer seconds are left."""
PATIENCE_S = 90.0
"""Seconds that a run has, once it is told to stop, to finish its step and save a checkpoint. A run
that takes longer is killed; its last checkpoint remains valid."""
SHOWN = ("dev_accuracy", "chosen_step", "steps", "wall_seconds")
"""The keys of `stage.json` that a stage's progress shows."""
LATER = ("voting", "held_out")
"""Evaluations that follow a run. Each has a folder of the same name within the run's folder."""


# --- data -----------------------------------------------------------------------------------------


def hold_out(source: Path, folder: Path) -> None:
    """Divide one of the authors' files into held_out.json and train.json in `folder`. Questions are
    sorted by their hashes, and the first `HELD_OUT` are held out. Questions that differ only in
    case, spacing or punctuation stay together."""
    spellings: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads(source.read_text(encoding="utf-8")):
        spellings.setdefault(normalised(row["question"]), []).append(row)
    ordered = [spellings[text] for text in sorted(spellings, key=lambda text: derive_seed(0, text))]
    held_out = [rows[-1] for rows in ordered[:HELD_OUT]]
    train = [row for rows in ordered[HELD_OUT:] for row in rows]
    for name, part in (("held_out", held_out), ("train", train)):
        write_atomically(folder / f"{name}.json", json.dumps(part))


# --- one seed -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seed:
    """The commands of one seed: first the run, then the evaluations that follow it."""

    run: Path
    recipe: Path
    seed: int
    overrides: Sequence[str]
    held_out: Path | None

    @property
    def is_finished(self) -> bool:
        return all(is_finished(self.run / name) for name in ("", *LATER))

    def start(self) -> subprocess.Popen[bytes]:
        """Start the next command and return its process."""
        if not is_finished(self.run):
            settings = [f"name={self.run.parent.name}", f"run_dir={self.run}", f"seed={self.seed}"]
            command = ["reftune", "run", str(self.recipe), *settings, *self.overrides]
        else:
            command = ["benchmarks.headline", "--evaluate", str(self.run)]
            command += ["--held-out", str(self.held_out)] if self.held_out else []
        return subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, stdout=subprocess.DEVNULL
        )


def is_finished(run: Path) -> bool:
    return RunFolder(run).summary.is_file()


def evaluate(run: Path, held_out: Path | None) -> None:
    """Evaluate a finished run's models again. Each evaluation has its own run folder, which shares
    the models of `run`."""
    changes = {
        "voting": ["evaluate.samples=20", "evaluate.limit=250"],
        "held_out": [] if held_out is None else [f"dataset.test={held_out}"],
    }
    for name in LATER:
        again = RunFolder(run / name)
        recipe = load_recipe(RunFolder(run).recipe, [f"run_dir={again.path}", *changes[name]])
        again.path.mkdir(exist_ok=True)
        for shared in (again.path / "stages", again.metrics, again.environment):
            if not shared.is_symlink():
                shared.symlink_to(Path("..") / shared.name)
        write_atomically(again.recipe, dump_recipe(recipe))
        later = Run(recipe, Progress())
        with threads_of(recipe):
            for method in recipe.methods_to_evaluate:
                later.evaluation.answer(method)
        later.summarize()


# --- all seeds ------------------------------------------------------------------------------------


def work(seeds: Sequence[Seed], minutes: float, *, together: int) -> None:
    """Run `together` seeds at a time, until all seeds are finished or time is up. Raises:
    SystemExit with the status of a command that failed."""
    end = time.monotonic() + 60 * minutes - PATIENCE_S * (minutes > 2)
    running: dict[int, subprocess.Popen[bytes]] = {}
    try:
        while True:
            waiting = [seed for seed in seeds if seed.seed not in running and not seed.is_finished]
            if end - time.monotonic() < LEAST_S:
                waiting = []
            for seed in waiting[: together - len(running)]:
                running[seed.seed] = seed.start()
            if not running or time.monotonic() > end:
                return
            time.sleep(0.2)
            for number, process in [*running.items()]:
                status = process.poll()
                if status is not None:
                    del running[number]
                if status:
                    sys.exit(status)
    finally:
        stop([*running.values()])


def stop(processes: Sequence[subprocess.Popen[bytes]], *, patience_s: float = PATIENCE_S) -> None:
    """Ask processes to stop, and kill those that have not stopped after `patience_s`."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    end = time.monotonic() + patience_s
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# --- results --------------------------------------------------------------------------------------


def progress(run: Path) -> dict[str, Any]:
    """The progress of a run: its finished stages with their dev accuracy, and the last step of an
    unfinished stage."""
    folder = RunFolder(run)
    facts = {method: folder.stage(method).facts() for method in folder.trained()}
    last: Mapping[str, Any] = next(reversed(JsonLines(folder.metrics).rows()), {})
    return {
        "finished": is_finished(run),
        "stages": {method: {name: facts[method][name] for name in SHOWN} for method in facts},
        "last": {key: last[key] for key in ("stage", "step") if key in last},
    }


def document(seeds: Sequence[Seed]) -> dict[str, Any]:
    def table(name: str) -> Any:
        runs = [seed.run / name for seed in seeds if is_finished(seed.run / name)]
        return json.loads(table_command(runs, "json")) if runs else None

    return {
        "finished": all(seed.is_finished for seed in seeds),
        "seeds": {str(seed.seed): progress(seed.run) for seed in seeds},
        "table": table(""),
        **{name: table(name) for name in LATER},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="folder for the runs")
    parser.add_argument("--minutes", type=float, default=9.0, help="about how long this call works")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--together", type=int, default=1, help="number of seeds to run at once")
    parser.add_argument("--model", help="folder in Hugging Face format")
    parser.add_argument("--data", type=Path, help="folder with the ReFT authors' SVAMP files")
    parser.add_argument(
        "--tiny", action="store_true", help="train from scratch on generated questions"
    )
    parser.add_argument("--evaluate", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--held-out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="recipe keys to change; give the same keys in every call",
    )
    asked = parser.parse_args(arguments)
    if asked.evaluate:
        evaluate(asked.evaluate, asked.held_out)
        return
    if asked.folder is None:
        parser.error("--folder: expected a folder for the runs")
    overrides = list(asked.overrides)
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if asked.model:
        overrides.append(f"model.path={asked.model}")
    if asked.data:
        hold_out(asked.data / "svamp_python_sdp.json", folder)
        overrides += [f"dataset.train={folder / 'train.json'}"]
        overrides += [f"dataset.test={asked.data.resolve() / 'svamp_test_set.json'}"]
    seeds = [
        Seed(
            run=folder / f"seed-{seed}",
            recipe=RECIPES / f"headline{'-tiny' if asked.tiny else ''}.yaml",
            seed=seed,
            overrides=overrides,
            held_out=folder / "held_out.json" if asked.data else None,
        )
        for seed in asked.seeds
    ]
    work(seeds, asked.minutes, together=asked.together)
    print(json.dumps(document(seeds)))


if __name__ == "__main__":
    main()
