"""Times one step of reftune, of a plain rewrite of the ReFT authors' code (step_plain.py) and of
TRL's GRPO (step_trl.py), by default in this machine's fastest dtype. Also times the demo.

    python -m benchmarks.step [--samples 16] [--repeats N] [--trl PYTHON] [--only "reftune;plain"]
    [--dtype float32|bfloat16] [--write-baseline]
    python -m benchmarks.step --growth 64,512

Every contestant (one of these programs with one setting) samples answers of the same lengths with
SmolLM2-135M, scores them and makes two updates. TRL answers half of the prompts twice, because GRPO
compares answers to the same prompt.
The contestants run one after the other, each in its own process. The command prints a table, then
the figures that are worse than the baseline for this kind of CPU and, as its last line, one JSON
document. PYTHON is an interpreter that has TRL. With the default repeats, the command takes 10
minutes if the CPU has AMX and 20 if not. `--growth` times only reftune, once for each of the given
numbers of samples.
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
from reftune.runs.auto import Dtype, fastest_dtype

ROOT = Path(__file__).parent.parent
MODEL = {"layers": 30, "hidden": 576, "vocabulary": 49152, "body": 106_203_456}
"""SmolLM2-135M. `body` counts all weights except the embedding, which is also the output head."""
UPDATES = 2
BASELINES = ROOT / "benchmarks" / "baselines"
TOLERANCE = 0.15
"""Share by which a figure may be worse than its baseline. Two runs on one machine differ by up to a
tenth."""
LOWER_IS_BETTER = ("step_to_arithmetic", "bookkeeping_share", "memory_to_trl", "demo_s")
REPEATS: dict[Dtype, int] = {"bfloat16": 3, "float32": 2}
CONTESTANTS: dict[Dtype, tuple[str, ...]] = {
    "bfloat16": ("reftune", "reftune, recompute", "plain", "plain fp32", "trl", "trl, recompute"),
    "float32": ("reftune", "reftune, recompute", "plain", "trl", "trl, recompute"),
}
"""Dtype → contestants. `recompute` means gradient checkpointing."""
TARGETS: dict[Dtype, dict[str, float]] = {
    "bfloat16": {
        "ratio_to_trl": 4.0,
        "ratio_to_plain": 3.0,
        "ratio_to_plain_fp32": 5.0,
        "update_mfu": 0.30,
        "decode_roofline": 0.5,
        "bookkeeping_share": 0.02,
        "memory_to_trl": 0.7,
        "demo_s": 90.0,
    },
    "float32": {
        "ratio_to_trl": 2.5,
        "ratio_to_plain": 2.2,
        "step_to_arithmetic": 1.6,
        "update_mfu": 0.75,
        "bookkeeping_share": 0.02,
        "memory_to_trl": 0.7,
        "demo_s": 120.0,
    },
}
"""Dtype of the benchmark → targets."""


def recipe(
    workload: Path, samples: int, steps: int, runs: Path, *, dtype: Dtype, recompute: bool
) -> dict[str, Any]:
    """A recipe of one RL stage that starts from the base model, with one training question per
    answer of the workload. Dev and test have one problem each."""
    return {
        "name": "step",
        "run_dir": str(runs),
        "model": {
            "path": "smollm2-135m",
            "dtype": dtype,
            "micro_batch_tokens": 2048,
            "compile": dtype == "bfloat16" and not recompute,
            "gradient_checkpointing": recompute,
        },
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


def run_reftune(
    workload: Path,
    samples: int,
    repeats: int,
    folder: Path,
    *,
    dtype: Dtype,
    recompute: bool = False,
) -> dict[str, Any]:
    """Time `repeats` steps after a first step. The first step does not count, because in bf16 it
    includes compilation. If `repeats` is 0, time the first step. Returns: the result of
    `step_seconds`, and the peak memory."""
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    described = recipe(workload, samples, repeats + 1, run, dtype=dtype, recompute=recompute)
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(described), encoding="utf-8")
    peak = measured([sys.executable, "-m", "reftune", "run", str(path)])["peak_kib"]
    return {"steps": step_seconds(run), "peak_kib": peak}


def demo_seconds(folder: Path) -> float:
    """Seconds of the whole demo, from the command to the report."""
    started = time.perf_counter()
    measured([sys.executable, "-m", "reftune", "demo", f"run_dir={folder / 'demo'}"])
    return time.perf_counter() - started


def step_seconds(run: Path) -> list[dict[str, float]]:
    """Seconds of each step except the first, and of the step's phases, from a run's metrics. If the
    run has only one step: seconds of that step's phases, and their sum."""
    rows = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    rows = [row for row in rows if "time/update_s" in row]
    phases = [
        {name: row[f"time/{name}"] for name in ("generate_s", "grade_s", "score_s", "update_s")}
        for row in rows
    ]
    if len(rows) == 1:
        return [{"step_s": sum(phases[0].values())} | phases[0]]
    return [
        {"step_s": row["time"] - before["time"]} | of_step
        for (before, row), of_step in zip(itertools.pairwise(rows), phases[1:], strict=True)
    ]


def measured(command: list[str], **variables: str) -> dict[str, Any]:
    """Run a command at the root, with `variables` added to its environment. Returns: the content of
    its last line, if that is JSON, and its peak memory in KiB, which is never less than this
    process's memory. Raises: CalledProcessError."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        **variables,
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


def matmul_peak(dtype: Dtype) -> float:
    """FLOP/s of a large square matmul. It is repeated for three seconds, and the fastest repetition
    counts."""
    left, right = (torch.randn(2048, 2048).to(getattr(torch, dtype)) for _ in range(2))
    best, end = seconds(lambda: left @ right), time.perf_counter() + 3
    while time.perf_counter() < end:
        best = min(best, seconds(lambda: left @ right))
    return 2 * 2048**3 / best


def bandwidth(dtype: Dtype) -> float:
    """Bytes read per second by a product that is limited by memory: a matrix of 256 MiB times one
    vector."""
    columns = 2**28 // 2**13 // torch.finfo(getattr(torch, dtype)).bits * 8
    matrix = torch.randn(2**13, columns).to(getattr(torch, dtype))
    return matrix.nbytes / min(seconds(lambda: matrix @ matrix[0]) for _ in range(10))


def seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def step_flops(lengths: Sequence[int], prompts: Sequence[int], dtype: Dtype) -> float:
    """FLOPs of sampling, scoring and updates. An update counts as three forward passes. In bf16,
    scoring takes a forward pass of the policy and one of the reference. In fp32, only the reference
    needs a forward pass, because the policy's scores come from sampling."""
    scores = 1 if dtype == "float32" else 2
    return (1 + scores + 3 * UPDATES) * smollm2_flops(lengths, prompts)


def smollm2_flops(lengths: Sequence[int], prompts: Sequence[int]) -> float:
    """FLOPs of one forward pass of SmolLM2-135M."""
    head = MODEL["vocabulary"] * MODEL["hidden"]
    return forward_flops(MODEL["body"], head, MODEL["layers"], MODEL["hidden"], lengths, prompts)


def forward_flops(
    trunk: int, head: int, layers: int, hidden: int, lengths: Sequence[int], prompts: Sequence[int]
) -> float:
    """FLOPs of a forward pass: 2 per `trunk` weight and token, plus 2 per `head` weight and
    response token, plus causal attention."""
    attention = sum(
        2 * layers * hidden * (p + n) ** 2 for p, n in zip(prompts, lengths, strict=True)
    )
    return 2 * trunk * (sum(lengths) + sum(prompts)) + 2 * head * sum(lengths) + attention


def decode_floor(
    lengths: list[int], prompts: list[int], peak: float, bytes_s: float, weight_bytes: int
) -> float:
    """A lower bound on the time of sampling, in seconds: each token takes the time to read all
    weights or the time of its matmuls, whichever is longer."""
    weights = MODEL["body"] + MODEL["vocabulary"] * MODEL["hidden"]
    total = 2 * MODEL["body"] * sum(prompts) / peak
    for step in range(max(lengths)):
        rows = sum(length > step for length in lengths)
        total += max(weight_bytes * weights / bytes_s, 2 * weights * rows / peak)
    return total


# --- the table ------------------------------------------------------------------------------------


def summary(
    results: Mapping[str, Any], workload: Workload, prompts: list[int], machine: Mapping[str, Any]
) -> dict[str, Any]:
    """Medians, ratios and shares. TRL's time is taken from its faster setting, and TRL's memory
    from the setting that needs less."""
    medians = {
        name: {k: statistics.median(s[k] for s in r["steps"]) for k in r["steps"][0]}
        for name, r in results.items()
    }
    peaks = {name: r["peak_kib"] / 2**20 for name, r in results.items()}
    document: dict[str, Any] = {"medians_s": medians, "peak_gib": peaks}
    trl = [name for name in results if name.startswith("trl")]
    if trl and "reftune, recompute" in results:
        document["memory_to_trl"] = peaks["reftune, recompute"] / min(peaks[n] for n in trl)
    if "reftune" not in medians:
        return document
    ours = medians["reftune"]
    if trl:
        document["ratio_to_trl"] = min(medians[n]["step_s"] for n in trl) / ours["step_s"]
    for name, key in (("plain", "ratio_to_plain"), ("plain fp32", "ratio_to_plain_fp32")):
        if name in medians:
            document[key] = medians[name]["step_s"] / ours["step_s"]
    peak, lengths = machine["matmul_flops"], workload.lengths
    updates = 3 * UPDATES * smollm2_flops(lengths, prompts)
    document["update_mfu"] = updates / ours["update_s"] / peak
    document["step_to_arithmetic"] = ours["step_s"] / (
        step_flops(lengths, prompts, machine["dtype"]) / peak
    )
    floor = decode_floor(lengths, prompts, peak, machine["bytes_s"], machine["weight_bytes"])
    document["decode_roofline"] = floor / ours["generate_s"]
    document["bookkeeping_share"] = statistics.median(
        1 - (step["generate_s"] + step["score_s"] + step["update_s"]) / step["step_s"]
        for step in results["reftune"]["steps"]
    )
    return document


def print_table(document: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
    processor, dtype = machine["processor"], machine["dtype"]
    print(
        "| contestant | processor | dtype | step s | generate s | score s | update s | peak GiB |"
    )
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for name, median in document["medians_s"].items():
        cells = [
            f"{median[key]:.2f}" if key in median else ""
            for key in ("step_s", "generate_s", "score_s", "update_s")
        ]
        used = "float32" if name == "plain fp32" else dtype
        peak = f"{document['peak_gib'][name]:.1f}"
        print(f"| {name} | {processor} | {used} | {' | '.join(cells)} | {peak} |")
    print("\n| figure | processor | dtype | measured | target |\n|---|---|---|---:|---:|")
    for key, target in TARGETS[dtype].items():
        if key in document:
            bound = "≤" if key in LOWER_IS_BETTER else "≥"
            print(f"| {key} | {processor} | {dtype} | {document[key]:.3g} | {bound} {target} |")


# --- the baseline ---------------------------------------------------------------------------------


def processor(dtype: Dtype) -> str:
    """What the figures depend on, such as `amx_bf16-2`: the CPU's widest matmul instruction for
    `dtype`, and the number of threads."""
    found = torch.cpu.get_capabilities()
    widest = torch.backends.cpu.get_cpu_capability().lower()
    if dtype == "bfloat16":
        widest = next((n for n in ("amx_bf16", "avx512_bf16") if found.get(n)), widest)
    return f"{widest}-{torch.get_num_threads()}"


def regressions(
    document: Mapping[str, Any], baseline: Mapping[str, Any], targets: Mapping[str, float]
) -> list[str]:
    """A line for every figure that is worse than its baseline by more than the tolerance. A figure
    in `LOWER_IS_BETTER` that meets its target is never reported."""
    lines = []
    for key, target in targets.items():
        if key not in document or key not in baseline:
            continue
        now, before = document[key], baseline[key]
        most = max(target, before * (1 + TOLERANCE))
        is_worse = now > most if key in LOWER_IS_BETTER else now < before / (1 + TOLERANCE)
        if is_worse:
            lines.append(f"regression: {key} is {now:.3g}; the baseline is {before:.3g}")
    return lines


def against_baseline(document: Mapping[str, Any], path: Path, *, write: bool) -> list[str]:
    """Compare with the baseline in the file `path` or, with `write`, write that baseline. Returns
    the lines to print."""
    if write:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        return [f"baseline written: {path.relative_to(ROOT)}"]
    if not path.is_file():
        return [f"no baseline for {path.stem}: nothing to compare with"]
    baseline = json.loads(path.read_text(encoding="utf-8"))
    worse = regressions(document, baseline, TARGETS[document["dtype"]])
    return worse or [f"no regression against {path.relative_to(ROOT)} (tolerance {TOLERANCE:.0%})"]


# --- growth ---------------------------------------------------------------------------------------


def growth(sizes: Sequence[int], dtype: Dtype) -> dict[str, Any]:
    """Seconds of a step's phases and its peak memory, by number of samples. In fp32, the first step
    is timed. In bf16, the second step is timed, because the first step compiles.

    Answers are a quarter as long as in the comparison with other programs, so that the largest
    number of samples does not take an hour.
    """
    found = {}
    for samples in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_workload(the_workload(samples, shorter=4), folder / "workload.json")
            later = int(dtype == "bfloat16")
            ran = run_reftune(folder / "workload.json", samples, later, folder, dtype=dtype)
        found[samples] = {**ran["steps"][0], "peak_gib": ran["peak_kib"] / 2**20}
        per_sample = found[samples]["step_s"] / samples
        print(
            f"{samples} samples: {per_sample:.3f} s per sample, peak"
            f" {found[samples]['peak_gib']:.1f} GiB",
            file=sys.stderr,
        )
    first, last = found[sizes[0]], found[sizes[-1]]
    return {
        "dtype": dtype,
        "processor": processor(dtype),
        "growth": found,
        "time_per_sample_ratio": (last["step_s"] / sizes[-1]) / (first["step_s"] / sizes[0]),
        "memory_ratio": last["peak_gib"] / first["peak_gib"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--trl", help="interpreter that has TRL")
    parser.add_argument(
        "--only", help="what to run, as in `reftune;plain;demo`; contestants with TRL need --trl"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the fastest")
    parser.add_argument(
        "--write-baseline",
        action="store_true",
        help="make this run the baseline for its kind of CPU",
    )
    parser.add_argument("--growth", help="numbers of samples, as in 16,64,512")
    arguments = parser.parse_args()
    dtype: Dtype = arguments.dtype or fastest_dtype(torch.device("cpu"))
    if arguments.growth:
        print(json.dumps(growth([int(size) for size in arguments.growth.split(",")], dtype)))
        return
    repeats = arguments.repeats or REPEATS[dtype]
    workload = the_workload(arguments.samples)
    machine = {
        "processor": processor(dtype),
        "dtype": dtype,
        "matmul_flops": matmul_peak(dtype),
        "bytes_s": bandwidth(dtype),
        "weight_bytes": getattr(torch, dtype).itemsize,
    }
    wanted = arguments.only.split(";") if arguments.only else [*CONTESTANTS[dtype], "demo"]
    with tempfile.TemporaryDirectory() as name:
        results = {
            contestant: contest(contestant, workload, dtype, repeats, Path(name), arguments.trl)
            for contestant in wanted
            if contestant != "demo" and (arguments.trl or not contestant.startswith("trl"))
        }
        demo = {"demo_s": demo_seconds(Path(name))} if "demo" in wanted else {}
    prompts = prompt_lengths(workload)
    document = summary(results, workload, prompts, machine) | demo
    print_table(document, machine)
    settings = {"samples": arguments.samples, "repeats": repeats, "torch": torch.__version__}
    document |= {**settings, **machine, "mean_prompt": statistics.mean(prompts)}
    baseline = BASELINES / f"step-{machine['processor']}.json"
    print("", *against_baseline(document, baseline, write=arguments.write_baseline), sep="\n")
    print(json.dumps(document))


def contest(
    contestant: str, workload: Workload, dtype: Dtype, repeats: int, folder: Path, trl: str | None
) -> dict[str, Any]:
    """A contestant's seconds for each step, and its peak memory."""
    path = folder / "workload.json"
    write_workload(workload, path)
    recompute = contestant.endswith(", recompute")
    if contestant.startswith("reftune"):
        samples = len(workload.prompts)
        return run_reftune(path, samples, repeats, folder, dtype=dtype, recompute=recompute)
    if contestant.startswith("trl"):
        assert trl is not None
        activations = "recompute" if recompute else "keep"
        command = [trl, "-m", "benchmarks.step_trl", str(path), str(repeats), dtype, activations]
        return measured(command)
    used = "float32" if contestant == "plain fp32" else dtype
    return measured([sys.executable, "-m", "benchmarks.step_plain", str(path), used, str(repeats)])


def prompt_lengths(workload: Workload) -> list[int]:
    """Number of tokens in each prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workload.model)
    return [len(tokenizer(p, add_special_tokens=False)["input_ids"]) for p in workload.prompts]


def the_workload(samples: int, *, shorter: int = 1) -> Workload:
    return make_workload(smollm2_folder(), prompt_texts(samples), samples, shorter=shorter)


def prompt_texts(count: int) -> list[str]:
    """Generated questions in the compact style."""
    data = WordProblems(kind="word_problems", train=count, dev=1, test=1).load(seed=0)
    style = Program(kind="program", style="compact")
    return [str(style.prompt(problem)) for problem in data.train]


if __name__ == "__main__":
    main()
