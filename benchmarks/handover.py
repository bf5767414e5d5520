"""Measures how much ReFT and online self-training gain over SFT, depending on when they start.

python benchmarks/handover.py 0 1 2 3 4          # both tasks; resumes where it stopped
python benchmarks/handover.py 0 1 2 --only nl    # only the task with solutions in words
python benchmarks/handover.py 0 1 2 --publish    # adds these seeds to the results in docs/
python benchmarks/handover.py --page             # only tables and picture, from the committed JSON

A seed is one run of recipes/demo/handover-TASK.yaml. A hand-over is the switch from supervised
training to RL. After it, SFT takes at least as many gradient passes as ReFT with its cooldown, and
self-training draws as many rollouts as ReFT. A JSON file holds all finished seeds. Unless --publish
or --page is set, this file and the picture are written to runs/handover.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import reftune
from reftune.results.stats import Comparison, compare, compare_over_seeds
from reftune.stages.plateau import NEEDED_ACCURACY
from reftune.storage.files import JsonLines
from reftune.storage.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "handover.json"
PICTURE = ROOT / "docs" / "images" / "handover.svg"
OWN = Path("runs") / "handover"
"""Folder of results that are not published."""
TASKS = {"nl": "Solutions in words", "program": "Solutions are programs"}
"""Suffix of the recipe's name → the task's heading."""
METHODS = {"reft": "ReFT", "st": "Self-training"}
"""Prefix of a stage's name → the method's name. Both methods are compared with `sft`."""
LOOKS = 3
"""Number of dev evaluations before a hand-over that show whether dev accuracy still rises."""
PATIENCES = (2, 3, 4, 5)
"""Numbers of evaluations without a rise after which `first_stop` stops; each is tried."""
NOISE = 5.7
"""Points by which two evaluations of 300 dev problems may differ by chance. This is half the width
of the paired 95% interval if a quarter of the verdicts change: 1.96 · √(0.25 / 300)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Handover:
    """One hand-over of one seed."""

    epoch: int
    slope: float
    """Mean rise in dev accuracy over the last `LOOKS` evaluations before the hand-over, in points
    per evaluation."""
    rise: float
    """Best of the last `LOOKS` dev evaluations minus the best of all evaluations before them, in
    points."""
    sampled: float
    """Share of correct samples in ReFT's first rollout, on training questions at temperature 1."""
    passes: Mapping[str, int]
    """Method → gradient passes of its stage. The passes of the control (`sft`) are comparable with
    the sum of the passes of the cooldown (`warmup`) and of the method."""
    dev: Mapping[str, float]
    """Method → dev accuracy of the chosen model."""
    right: Mapping[str, str]
    """Method → one digit per test problem, 1 if the greedy answer is right."""


# --- one seed -------------------------------------------------------------------------------------


def run_seed(task: str, seed: int, overrides: Sequence[str]) -> RunFolder:
    """Train and evaluate one seed, and return its run folder."""
    name = f"handover-{task}-seed{seed}"
    recipe = ROOT / "recipes" / "demo" / f"handover-{task}.yaml"
    folder = RunFolder(Path("runs") / name)
    reftune.run(
        recipe, f"name={name}", f"run_dir={folder.path}", f"seed={seed}", *overrides, quiet=False
    )
    return folder


def read_seed(folder: RunFolder) -> dict[str, Any]:
    """A seed's entry in the JSON file, read from the folder of its finished run."""
    metrics = JsonLines(folder.metrics).rows()
    epochs = sorted(int(path.stem.split("_")[1]) for path in folder.path.glob("eval/reft_*.jsonl"))
    looks = dev_looks(metrics)
    handovers = [asdict(read_handover(folder, epoch, looks, metrics)) for epoch in epochs]
    return {"looks": looks, "handovers": handovers}


def read_handover(
    folder: RunFolder, epoch: int, looks: Mapping[int, float], metrics: Sequence[Mapping[str, Any]]
) -> Handover:
    methods = evaluated(folder, epoch)
    seen = [accuracy for at, accuracy in looks.items() if at <= epoch]
    stages = {method: stage_json(folder, f"{method}_{epoch}") for method in methods}
    return Handover(
        epoch=epoch,
        slope=slope(seen),
        rise=rise(seen, LOOKS),
        sampled=first_rollout(metrics, f"reft_{epoch}"),
        passes={method: stage["sequence_passes"] for method, stage in stages.items()},
        dev={method: stage["dev_accuracy"] for method, stage in stages.items()},
        right={method: right_answers(folder, f"{method}_{epoch}") for method in methods},
    )


def evaluated(folder: RunFolder, epoch: int) -> list[str]:
    """The methods evaluated for a hand-over. A run that was stopped early may lack self-training,
    which comes last."""
    methods = ("warmup", "sft", *METHODS)
    return [method for method in methods if folder.evaluation(f"{method}_{epoch}").exists()]


def dev_looks(metrics: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Epoch → dev accuracy of the supervised run from which the methods branch off."""
    trunk = [row for row in metrics if row["stage"] == "trunk"]
    epoch_of = {row["step"]: row["progress/epoch"] for row in trunk if "progress/epoch" in row}
    return {
        round(epoch_of[row["step"]]): row["dev/accuracy"] for row in trunk if "dev/accuracy" in row
    }


def slope(seen: Sequence[float]) -> float:
    """Mean rise over the last `LOOKS` evaluations in `seen`, in points per evaluation."""
    return 100 * (seen[-1] - seen[-1 - LOOKS]) / LOOKS


def rise(seen: Sequence[float], patience: int) -> float:
    """The best of the last `patience` evaluations minus the best of all evaluations before them, in
    points."""
    return 100 * (max(seen[-patience:]) - max(seen[:-patience]))


def first_rollout(metrics: Sequence[Mapping[str, Any]], stage: str) -> float:
    """Share of correct samples in the first rollout, which is drawn before any update."""
    return next(
        float(row["reward/correct"])
        for row in metrics
        if row["stage"] == stage and row["step"] == 1 and "reward/correct" in row
    )


def right_answers(folder: RunFolder, method: str) -> str:
    rows = JsonLines(folder.evaluation(method)).rows()
    return "".join("1" if row["greedy"]["verdict"] == "correct" else "0" for row in rows)


def stage_json(folder: RunFolder, method: str) -> dict[str, Any]:
    return dict(json.loads(folder.stage(method).info.read_text(encoding="utf-8")))


# --- over seeds -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One hand-over, with means and differences over all seeds."""

    epoch: int
    accuracy: Mapping[str, float]
    """Method → mean test accuracy."""
    gain: Mapping[str, Comparison]
    """Method → its difference from SFT."""
    slope: float
    sampled: float


def points_of(seeds: Mapping[str, Any]) -> list[Point]:
    """A task's hand-overs, each summarised over its seeds, earliest first."""
    by_epoch: dict[int, list[Mapping[str, Any]]] = {}
    for seed in seeds.values():
        for handover in seed["handovers"]:
            by_epoch.setdefault(handover["epoch"], []).append(handover)
    return [point_of(epoch, handovers) for epoch, handovers in sorted(by_epoch.items())]


def point_of(epoch: int, handovers: Sequence[Mapping[str, Any]]) -> Point:
    return Point(
        epoch=epoch,
        accuracy={
            method: float(np.mean(rows_of(method, handovers)))
            for method in ("warmup", "sft", *METHODS)
        },
        gain={method: gain_of(method, handovers) for method in METHODS},
        slope=float(np.mean([handover["slope"] for handover in handovers])),
        sampled=float(np.mean([handover["sampled"] for handover in handovers])),
    )


def gain_of(method: str, handovers: Sequence[Mapping[str, Any]]) -> Comparison:
    """The difference between a method and SFT, over the seeds that have both."""
    paired = [handover for handover in handovers if method in handover["right"]]
    rows, control = rows_of(method, paired), rows_of("sft", paired)
    return compare_over_seeds(method, rows, "sft", control, same_problems=False)


def rows_of(method: str, handovers: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """Whether each problem was solved, one array for each seed that has the method."""
    return [digits(h["right"][method]) for h in handovers if method in h["right"]]


def digits(text: str) -> np.ndarray:
    return np.array([digit == "1" for digit in text])


# --- when is the warm-up ready --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """The threshold on an indicator that best separates hand-overs after which ReFT beat SFT from
    the others."""

    sign: str
    """The rule in words, without the threshold."""
    value: float
    """The midpoint between the two neighbouring values that the cut separates."""
    num_wrong: int
    """Number of hand-overs on the wrong side."""
    n: int


def best_cut(sign: str, values: Sequence[float], wins: Sequence[bool], *, high_wins: bool) -> Cut:
    """The cut with the fewest errors. With `high_wins`, ReFT should win after the hand-overs above
    the cut; without it, after those below."""
    seen = sorted(set(values))
    middles = [(low + high) / 2 for low, high in pairwise(seen)]
    cuts = [seen[0] - 1, *middles, seen[-1] + 1]

    def num_wrong(cut: float) -> int:
        pairs = zip(values, wins, strict=True)
        return sum(((value > cut) == high_wins) != won for value, won in pairs)

    value = min(cuts, key=num_wrong)
    return Cut(sign=sign, value=value, num_wrong=num_wrong(value), n=len(values))


def cuts_of(seeds: Mapping[str, Any]) -> list[Cut]:
    """The cuts on the slope and the rise of dev accuracy, and on the share of correct samples."""
    handovers = [handover for seed in seeds.values() for handover in seed["handovers"]]
    wins = [seed_difference(handover["right"], "reft").difference > 0 for handover in handovers]
    slopes = [handover["slope"] for handover in handovers]
    rises = [handover["rise"] for handover in handovers]
    sampled = [100 * handover["sampled"] for handover in handovers]
    over = f"over {LOOKS} evaluations, in points"
    return [
        best_cut(f"the dev slope {over} per evaluation, is below", slopes, wins, high_wins=False),
        best_cut(f"the rise {over}, is below", rises, wins, high_wins=False),
        best_cut("the share of correct samples, in %, exceeds", sampled, wins, high_wins=True),
    ]


def first_stop(looks: Mapping[str, float], patience: int) -> str:
    """The first epoch at which dev accuracy has reached `NEEDED_ACCURACY` and the last `patience`
    evaluations show no rise beyond `NOISE`; a dash if there is none."""
    epochs, seen = list(looks), list(looks.values())
    ends = [n for n in range(patience + 1, len(seen) + 1) if max(seen[:n]) >= NEEDED_ACCURACY]
    return next((epochs[n - 1] for n in ends if rise(seen[:n], patience) <= NOISE), "–")


def stops_table(seeds: Mapping[str, Any]) -> str:
    head = "| seed | " + " | ".join(f"{patience} evaluations" for patience in PATIENCES) + " |"
    rows = [
        f"| {seed} | "
        + " | ".join(first_stop(found["looks"], patience) for patience in PATIENCES)
        + " |"
        for seed, found in seeds.items()
    ]
    return "\n".join([head, "|---:" * (len(PATIENCES) + 1) + "|", *rows])


def cuts_table(seeds: Mapping[str, Any]) -> str:
    head = "| hand over if | threshold | errors |\n|---|---:|---:|"
    rows = [
        f"| {cut.sign} | {cut.value:.1f} | {cut.num_wrong} of {cut.n} |" for cut in cuts_of(seeds)
    ]
    return "\n".join([head, *rows])


# --- tables ---------------------------------------------------------------------------------------


def curve_table(points: Sequence[Point]) -> str:
    """The means over seeds as a Markdown table, one row per hand-over."""
    head = (
        "| hand-over | dev slope | T = 1 | warm-up | SFT | ReFT | self-training "
        "| ReFT − SFT | self-training − SFT |\n|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    rows = [
        f"| epoch {point.epoch} | {signed(point.slope)} | {100 * point.sampled:.0f} | "
        + " | ".join(f"{100 * accuracy:.1f}" for accuracy in point.accuracy.values())
        + " | "
        + " | ".join(gain_text(point.gain[m]) + doubt(point.gain[m]) for m in METHODS)
        + " |"
        for point in points
    ]
    return "\n".join([head, *rows])


def seeds_table(seeds: Mapping[str, Any]) -> str:
    """A Markdown table with every seed's differences from SFT, one row per seed and hand-over."""
    head = (
        "| seed | hand-over | dev slope | dev rise | T = 1 | ReFT − SFT | self-training − SFT |\n"
        "|---:|---:|---:|---:|---:|---:|---:|"
    )
    rows = [
        f"| {seed} | epoch {handover['epoch']} | {signed(handover['slope'])} | "
        f"{signed(handover['rise'])} | "
        f"{100 * handover['sampled']:.0f} | "
        + " | ".join(seed_gain(handover["right"], method) for method in METHODS)
        + " |"
        for seed, found in seeds.items()
        for handover in found["handovers"]
    ]
    return "\n".join([head, *rows])


def seed_gain(right: Mapping[str, str], method: str) -> str:
    if method not in right:
        return "–"
    found = seed_difference(right, method)
    return gain_text(found) + doubt(found)


def seed_difference(right: Mapping[str, str], method: str) -> Comparison:
    return compare(method, digits(right[method]), "sft", digits(right["sft"]))


def seeds_text(points: Sequence[Point]) -> str:
    """The number of seeds of each method: `Seeds: ReFT 5, Self-training 3.`"""
    counts = [f"{name} {seed_count(points, method)}" for method, name in METHODS.items()]
    return f"Seeds: {', '.join(counts)}."


def seed_count(points: Sequence[Point], method: str) -> str:
    """The number of seeds that have a method, as text. If it differs between hand-overs, it is
    given as a range (`3–5`). A run that was stopped early may lack self-training."""
    counts = sorted({len(point.gain[method].by_seed) for point in points})
    return "–".join(str(count) for count in counts)


def gain_text(found: Comparison) -> str:
    low, high = found.ci95
    return f"{signed(100 * found.difference)} [{signed(100 * low)}, {signed(100 * high)}]"


def doubt(found: Comparison) -> str:
    """` n.s.` if a difference is not significant, else nothing."""
    return "" if found.significant else " n.s."


def signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")


# --- the picture ----------------------------------------------------------------------------------

INK, SOFT, GRID = "#17191c", "#565d66", "#e4e6e8"
LOOK = {"reft": ("#0b6fb8", "o", -1), "st": ("#c4670a", "s", 1)}
"""Method → colour, marker, and the side of the tick on which its interval is drawn."""


def draw(curves: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Draw the gain over SFT against the hand-over, one panel per task."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style: dict[Any, Any] = {"svg.hashsalt": "reftune", "font.size": 10, "text.color": INK}
    with matplotlib.rc_context(style):
        figure = Figure(
            figsize=(4.4 * max(1.45, len(curves)), 3.9),
            layout=ConstrainedLayoutEngine(wspace=0.06),
            facecolor="white",
        )
        panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
        for panel, (task, points) in zip(panels, curves.items(), strict=True):
            draw_panel(panel, points)
            panel.set_title(TASKS[task], fontsize=11, loc="left")
        panels[0].set_ylabel("test accuracy minus SFT's, points", color=SOFT)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def draw_panel(panel: Any, points: Sequence[Point]) -> None:
    panel.spines[["top", "right", "left", "bottom"]].set_visible(False)
    panel.tick_params(length=0, labelcolor=SOFT)
    panel.grid(axis="y", color=GRID)
    panel.set_axisbelow(True)
    panel.axhline(0, color=INK, linewidth=1.2)
    for method, (colour, marker, side) in LOOK.items():
        x = [place + 0.045 * side for place in range(len(points))]
        gains = [point.gain[method] for point in points]
        y = [100 * gain.difference for gain in gains]
        label = f"{METHODS[method]} ({seed_count(points, method)} seeds)"
        panel.plot(x, y, color=colour, marker=marker, linewidth=2, label=label)
        for place, gain in zip(x, gains, strict=True):
            seeds = [100 * difference for difference in gain.by_seed]
            panel.plot([place] * len(seeds), seeds, ".", color=colour, alpha=0.35, markersize=7)
        lows, highs = zip(*(gain.ci95 for gain in gains), strict=True)
        panel.vlines(x, [100 * low for low in lows], [100 * high for high in highs], color=colour)
    labels = [f"epoch {p.epoch}\nwarm-up {100 * p.accuracy['warmup']:.0f}%" for p in points]
    panel.set_xticks(range(len(points)), labels)
    panel.set_xlim(-0.35, len(points) - 0.65)
    panel.legend(frameon=False, loc="upper left")
    panel.set_xlabel("hand-over, and the warm-up's test accuracy", color=SOFT)


# --- the command ----------------------------------------------------------------------------------


def load_results(file: Path) -> dict[str, dict[str, Any]]:
    """Task → seed → results."""
    if not file.exists():
        return {}
    return dict(json.loads(file.read_text(encoding="utf-8")))


def add_seed(task: str, seed: int, found: Mapping[str, Any], file: Path) -> None:
    results = load_results(file)
    seeds = {**results.get(task, {}), str(seed): found}
    results[task] = dict(sorted(seeds.items(), key=lambda item: int(item[0])))
    ordered = {name: results[name] for name in TASKS if name in results}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def write_page(file: Path, picture: Path) -> None:
    """Print the tables and draw the picture."""
    results = load_results(file)
    curves = {task: points_of(seeds) for task, seeds in results.items()}
    for task, points in curves.items():
        print(f"## {TASKS[task]}\n\n{seeds_text(points)}\n\n{curve_table(points)}\n")
        print(seeds_table(results[task]) + "\n")
        print(cuts_table(results[task]) + "\n")
        print(stops_table(results[task]) + "\n")
    draw(curves, picture)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("seeds", type=int, nargs="*")
    parser.add_argument("--only", choices=TASKS, help="run only this task")
    parser.add_argument("--page", action="store_true", help="no training, only tables and picture")
    parser.add_argument("--publish", action="store_true", help="write to docs/, not runs/handover")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="override recipe keys"
    )
    options = parser.parse_args(arguments)
    file, picture = (
        (RESULTS, PICTURE)
        if options.page or options.publish
        else (OWN / "handover.json", OWN / "handover.svg")
    )
    if not options.page:
        for task in [options.only] if options.only else list(TASKS):
            for seed in options.seeds:
                add_seed(task, seed, read_seed(run_seed(task, seed, options.set)), file)
    write_page(file, picture)


if __name__ == "__main__":
    main()
