"""One ReFT step, side by side: reftune, the authors' step in plain transformers (fp32 and bf16) and
TRL's GRPO.

    python -m benchmarks.step [--samples 16] [--repeats 5] [--trl PYTHON] [--only
    reftune,plain-bf16] [--write-baseline]
    python -m benchmarks.step --growth 16,64,512

Every contestant samples answers of the same lengths to the same prompts, scores them and makes two
updates, on SmolLM2-135M, in a process of its own, one after the other. Prints a table, what is
worse than in the baseline of this kind of processor, and, as its last line, one JSON document.
PYTHON is an interpreter with TRL in it. `--growth` times reftune alone on more and more samples.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from benchmarks.workload import Workload, make_workload, write_workload

from reftune.datasets.word_problems import WordProblems
from reftune.grading.formats.program import Program
from reftune.model.weights import smollm2_folder

ROOT = Path(__file__).parent.parent
MODEL = {"layers": 30, "hidden": 576, "vocabulary": 49152, "body": 106_203_456}
"""SmolLM2-135M; `body` counts all weights but the embedding, which is also the output head."""
UPDATES = 2
BASELINES = ROOT / "benchmarks" / "baselines"
TOLERANCE = 0.15
"""Share by which a figure may be worse than its baseline: two runs on one machine differ by up to a
tenth."""
LOWER_IS_BETTER = ("bookkeeping_share", "memory_to_trl")
TARGETS = {
    "ratio_to_trl": 4.0,
    "ratio_to_plain": 5.0,
    "ratio_to_plain_bf16": 2.5,
    "update_mfu": 0.55,
    "decode_roofline": 0.5,
    "bookkeeping_share": 0.02,
    "memory_to_trl": 0.25,
}


def recipe(workload: Path, samples: int, steps: int, runs: Path) -> dict[str, Any]:
    """ReFT from the base model on the workload's questions; nothing is evaluated but one dev
    problem at the end."""
    return {
        "name": "step",
        "run_dir": str(runs),
        "model": {"path": "smollm2-135m", "dtype": "bfloat16", "micro_batch_tokens": 2048},
        "dataset": {"kind": "word_problems", "train": samples, "dev": 1, "test": 1},
        "format": {"kind": "program", "style": "compact"},
        "engine": {
            "kind": f"{ROOT}/benchmarks/forced_engine.py:ForcedKv",
            "workload": str(workload),
        },
        "lengths": {"max_new": 150},
        "stages": {
            "reft": {
                "kind": "rl",
                "init": "base",
                "steps": steps,
                "prompts": samples,
                "updates": UPDATES,
                "eval_every": steps + 1,
                "optimizer": {"learning_rate": 3e-7},
                "algorithm": {"kind": "ppo", "kl_coef": 0.01},
            }
        },
    }


def run_reftune(workload: Path, samples: int, repeats: int, folder: Path) -> dict[str, Any]:
    """`repeats` steps after one that is not counted, in which the blocks are compiled."""
    described = recipe(workload, samples, repeats + 1, folder / "run")
    described["model"]["compile"] = True
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(described), encoding="utf-8")
    peak = measured([sys.executable, "-m", "reftune", "run", str(path)])["peak_kib"]
    return {"steps": step_seconds(folder / "run"), "peak_kib": peak}


def step_seconds(run: Path) -> list[dict[str, float]]:
    """Of each step but the first: the whole and its phases, from a run's metrics."""
    rows = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    rows = [row for row in rows if "time/update_s" in row]
    return [
        {"step_s": row["time"] - before["time"]}
        | {name: row[f"time/{name}"] for name in ("generate_s", "grade_s", "score_s", "update_s")}
        for before, row in itertools.pairwise(rows)
    ]


def measured(command: list[str]) -> dict[str, Any]:
    """Run a command at the root; its last line, where that is JSON, and its peak memory. Raises
    CalledProcessError."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=sys.stderr
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise subprocess.CalledProcessError(status, command)
        output.seek(0)
        lines = output.read().strip().splitlines()
    result: dict[str, Any] = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return {**result, "peak_kib": usage.ru_maxrss}


# --- the machine ----------------------------------------------------------------------------------


def matmul_peak() -> float:
    """bf16 FLOP/s of a large square product, the best of a hundred."""
    a, b = (
        torch.randn(2048, 2048, dtype=torch.bfloat16),
        torch.randn(2048, 2048, dtype=torch.bfloat16),
    )
    return 2 * 2048**3 / min(seconds(lambda: a @ b) for _ in range(100))


def bandwidth() -> float:
    """Bytes a second read by a product that is all reading: a matrix of 256 MiB by one vector."""
    matrix, vector = (
        torch.randn(2**13, 2**14, dtype=torch.bfloat16),
        torch.randn(2**14, dtype=torch.bfloat16),
    )
    return matrix.nbytes / min(seconds(lambda: matrix @ vector) for _ in range(10))


def seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def update_flops(lengths: list[int], prompts: list[int]) -> float:
    """Of all updates: three times the forward pass."""
    head = MODEL["vocabulary"] * MODEL["hidden"]
    return (
        UPDATES
        * 3
        * forward_flops(MODEL["body"], head, MODEL["layers"], MODEL["hidden"], lengths, prompts)
    )


def forward_flops(
    trunk: int, head: int, layers: int, hidden: int, lengths: Sequence[int], prompts: Sequence[int]
) -> float:
    """2 a weight and token, `trunk` and `head` in weights; logits for response tokens only, causal
    attention."""
    attention = sum(
        2 * layers * hidden * (p + n) ** 2 for p, n in zip(prompts, lengths, strict=True)
    )
    return 2 * trunk * (sum(lengths) + sum(prompts)) + 2 * head * sum(lengths) + attention


def decode_floor(lengths: list[int], prompts: list[int], peak: float, bytes_s: float) -> float:
    """Seconds that sampling takes at least: each step reads all weights (bf16) or is bound by its
    products."""
    weights = MODEL["body"] + MODEL["vocabulary"] * MODEL["hidden"]
    total = 2 * MODEL["body"] * sum(prompts) / peak
    for step in range(max(lengths)):
        rows = sum(length > step for length in lengths)
        total += max(2 * weights / bytes_s, 2 * weights * rows / peak)
    return total


# --- the table ------------------------------------------------------------------------------------


def summary(
    results: dict[str, Any], workload: Workload, prompts: list[int], machine: dict[str, float]
) -> dict[str, Any]:
    """Medians, ratios and shares."""
    medians = {
        name: {k: statistics.median(s[k] for s in r["steps"]) for k in r["steps"][0]}
        for name, r in results.items()
    }
    document: dict[str, Any] = {
        "medians_s": medians,
        "peak_gib": {n: r["peak_kib"] / 2**20 for n, r in results.items()},
    }
    if "reftune" in medians:
        ours = medians["reftune"]
        for name, key in (
            ("trl", "ratio_to_trl"),
            ("plain-fp32", "ratio_to_plain"),
            ("plain-bf16", "ratio_to_plain_bf16"),
        ):
            if name in medians:
                document[key] = medians[name]["step_s"] / ours["step_s"]
        if "trl" in results:
            document["memory_to_trl"] = results["reftune"]["peak_kib"] / results["trl"]["peak_kib"]
        flops = update_flops(workload.lengths, prompts)
        document["update_mfu"] = flops / ours["update_s"] / machine["matmul_flops"]
        floor = decode_floor(workload.lengths, prompts, machine["matmul_flops"], machine["bytes_s"])
        document["decode_roofline"] = floor / ours["generate_s"]
        document["bookkeeping_share"] = statistics.median(
            1 - (step["generate_s"] + step["score_s"] + step["update_s"]) / step["step_s"]
            for step in results["reftune"]["steps"]
        )
    return document


def print_table(document: dict[str, Any]) -> None:
    print(
        "| contestant | step s | generate s | score s | update s | peak GiB"
        " |\n|---|---|---|---|---|---|"
    )
    for name, median in document["medians_s"].items():
        cells = [
            f"{median[key]:.2f}" if key in median else ""
            for key in ("step_s", "generate_s", "score_s", "update_s")
        ]
        print(f"| {name} | {' | '.join(cells)} | {document['peak_gib'][name]:.1f} |")
    print("\n| figure | measured | target |\n|---|---|---|")
    for key, target in TARGETS.items():
        if key in document:
            bound = "≤" if key in LOWER_IS_BETTER else "≥"
            print(f"| {key} | {document[key]:.3g} | {bound} {target} |")


# --- the baseline ---------------------------------------------------------------------------------


def processor() -> str:
    """What decides the figures: the widest bf16 product of the processor, and the threads, as in
    `amx_bf16-2`."""
    capabilities = torch.cpu.get_capabilities()
    widest = next(
        (
            name
            for name in ("amx_bf16", "avx512_bf16", "avx512_f", "avx2")
            if capabilities.get(name)
        ),
        "other",
    )
    return f"{widest}-{torch.get_num_threads()}"


def regressions(document: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    """A line for every figure worse than its baseline by more than the tolerance; not for a share
    that meets its target."""
    lines = []
    for key in TARGETS:
        if key not in document or key not in baseline:
            continue
        now, before = document[key], baseline[key]
        most = max(TARGETS[key], before * (1 + TOLERANCE))
        is_worse = now > most if key in LOWER_IS_BETTER else now < before / (1 + TOLERANCE)
        if is_worse:
            lines.append(f"regression: {key} is {now:.3g}, the baseline {before:.3g}")
    return lines


def against_baseline(document: Mapping[str, Any], path: Path, *, write: bool) -> list[str]:
    """Compare with the baseline of this kind of processor, or make it."""
    if write:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        return [f"baseline written: {path.relative_to(ROOT)}"]
    if not path.is_file():
        return [f"no baseline for {path.stem}: nothing to compare with"]
    worse = regressions(document, json.loads(path.read_text(encoding="utf-8")))
    return worse or [f"no regression against {path.relative_to(ROOT)} (tolerance {TOLERANCE:.0%})"]


# --- growth ---------------------------------------------------------------------------------------


def growth(sizes: Sequence[int]) -> dict[str, Any]:
    """Seconds of a step's phases and its peak memory, by number of samples, in the second step of a
    run.

    Answers are a quarter as long as elsewhere, so that the largest number does not take an hour.
    """
    found = {}
    for samples in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_workload(the_workload(samples, shorter=4), folder / "workload.json")
            ran = run_reftune(folder / "workload.json", samples, 1, folder)
        found[samples] = {**ran["steps"][0], "peak_gib": ran["peak_kib"] / 2**20}
        per_sample = found[samples]["step_s"] / samples
        print(
            f"{samples} samples: {per_sample:.3f} s a sample, peak"
            f" {found[samples]['peak_gib']:.1f} GiB",
            file=sys.stderr,
        )
    first, last = found[sizes[0]], found[sizes[-1]]
    return {
        "growth": found,
        "time_per_sample_ratio": (last["step_s"] / sizes[-1]) / (first["step_s"] / sizes[0]),
        "memory_ratio": last["peak_gib"] / first["peak_gib"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trl", help="interpreter that has TRL")
    parser.add_argument("--only", default="reftune,plain-bf16,plain-fp32,trl")
    parser.add_argument(
        "--write-baseline",
        action="store_true",
        help="make this run the baseline of its kind of processor",
    )
    parser.add_argument("--growth", help="numbers of samples, as in 16,64,512")
    arguments = parser.parse_args()
    if arguments.growth:
        print(json.dumps(growth([int(size) for size in arguments.growth.split(",")])))
        return
    workload = the_workload(arguments.samples)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workload.model)
    prompts = [
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in workload.prompts
    ]
    machine = {
        "matmul_flops": matmul_peak(),
        "bytes_s": bandwidth(),
        "threads": torch.get_num_threads(),
    }
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "workload.json"
        write_workload(workload, path)
        plain = [sys.executable, "-m", "benchmarks.step_plain", str(path)]
        for contestant in arguments.only.split(","):
            repeats = arguments.repeats
            if contestant == "reftune":
                results[contestant] = run_reftune(path, arguments.samples, repeats, folder)
            elif contestant == "trl" and arguments.trl:
                results[contestant] = measured(
                    [arguments.trl, "-m", "benchmarks.step_trl", str(path), str(repeats)]
                )
            elif contestant.startswith("plain"):
                dtype = {"plain-fp32": "float32", "plain-bf16": "bfloat16"}[contestant]
                results[contestant] = measured([*plain, dtype, str(repeats)])
    document = summary(results, workload, prompts, machine)
    print_table(document)
    settings = {
        "samples": arguments.samples,
        "repeats": arguments.repeats,
        "torch": torch.__version__,
        "machine": machine,
    }
    document |= {**settings, "mean_prompt": statistics.mean(prompts)}
    baseline = BASELINES / f"step-{processor()}.json"
    print("", *against_baseline(document, baseline, write=arguments.write_baseline), sep="\n")
    print(json.dumps(document))


def the_workload(samples: int, *, shorter: int = 1) -> Workload:
    return make_workload(smollm2_folder(), prompt_texts(samples), samples, shorter=shorter)


def prompt_texts(count: int) -> list[str]:
    """Generated questions in the compact style."""
    data = WordProblems(kind="word_problems", train=count, dev=1, test=1).load(seed=0)
    return [Program(kind="program", style="compact").prompt(problem) for problem in data.train]


if __name__ == "__main__":
    main()
