"""Compares the peak memory of real runs with the predictions of `reftune plan`.

    python -m benchmarks.plan_accuracy [--only "deep;smollm2"] [--out
    docs/results/plan_accuracy.json]

Each case is one `reftune rl` of two PPO steps on the CPU, in its own process. The prediction counts
only tensors. The memory of the interpreter, the libraries and the data is therefore measured in a
run with almost no weights, and subtracted from the peak of each case. An environment variable makes
glibc return freed tensors of more than `RETURNED` bytes to the system. By default, glibc keeps some
freed memory that it cannot use again. The command prints a table and, as its last line, one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from benchmarks.step import measured

from reftune.datasets import load_splits
from reftune.model.encoder import Encoder
from reftune.model.weights import load_model, make_scratch, scratch_texts
from reftune.recipe import load_recipe
from reftune.stages.estimate import Estimate, Memory, stage_costs
from reftune.stages.outline import outline_of

IN_BF16 = {
    "scratch": {"hidden_size": 384, "layers": 12, "heads": 6},
    "dtype": "bfloat16",
    "micro_batch_tokens": 1500,
}
"""A small model, because a CPU without AMX multiplies bf16 slowly."""
CASES: dict[str, dict[str, Any]] = {
    "deep": {
        "model": {
            "scratch": {"hidden_size": 384, "layers": 24, "heads": 6},
            "micro_batch_tokens": 1500,
        }
    },
    "wide, value model": {
        "model": {
            "scratch": {"hidden_size": 768, "layers": 6, "heads": 12},
            "micro_batch_tokens": 2000,
        },
        "value_model": "separate",
    },
    "deep, adapters": {
        "model": {
            "scratch": {"hidden_size": 384, "layers": 24, "heads": 6},
            "micro_batch_tokens": 1500,
            "lora": {"rank": 16},
        }
    },
    "smollm2": {"model": {"path": "smollm2-135m", "micro_batch_tokens": 1200}, "prompts": 8},
    "smollm2, adapters": {
        "model": {"path": "smollm2-135m", "micro_batch_tokens": 1200, "lora": {"rank": 16}},
        "prompts": 8,
    },
    "bf16": {"model": IN_BF16, "prompts": 8},
    "bf16, adapters": {"model": {**IN_BF16, "lora": {"rank": 16}}, "prompts": 8},
}
NOTHING = {
    "model": {"scratch": {"hidden_size": 8, "layers": 1, "heads": 2}, "micro_batch_tokens": 100}
}
"""Recipe changes for a run with almost no weights."""
TOLERANCE = 0.15
RETURNED = 2**17
"""Size in bytes below which glibc keeps freed blocks."""


def recipe(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe of two PPO steps from the base model, in which every answer runs to the length
    limit."""
    prompts = case.get("prompts", 16)
    model = {"dtype": "float32", **case["model"], "device": "cpu"}
    if "scratch" in model:
        model["scratch"] = {**model["scratch"], "context": 128, "dropout": 0.0}
    return {
        "name": "plan",
        "run_dir": str(folder / "run"),
        "model": model,
        "dataset": {"kind": "word_problems", "train": prompts, "dev": 1, "test": 1},
        "format": {"kind": "program", "style": "compact"},
        "engine": {"kind": "kv", "batch_size": prompts},
        "lengths": {"max_new": 32},
        "trackers": [],
        "stages": {
            "reft": {
                "kind": "rl",
                "init": "base",
                "steps": 2,
                "prompts": prompts,
                "updates": 1,
                "value_model": case.get("value_model", "shared"),
                "eval_every": 2,
                "optimizer": {"learning_rate": 1e-6},
                "algorithm": {"kind": "ppo"},
            }
        },
    }


def write_recipe(case: dict[str, Any], folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(case, folder)), encoding="utf-8")
    return path


def measured_peak(path: Path) -> int:
    """Peak resident bytes of a run."""
    command = [sys.executable, "-m", "reftune", "rl", str(path), "--quiet"]
    found = measured(command, MALLOC_MMAP_THRESHOLD_=str(RETURNED))
    return int(found["peak_kib"]) * 1024


def predicted(path: Path) -> Memory:
    """The memory that `reftune plan` predicts, for the lengths of the recipe's own prompts."""
    loaded = load_recipe(path)
    splits = load_splits(loaded)
    texts = list(scratch_texts(loaded.format, splits))
    if loaded.model.scratch is not None:
        tokenizer = make_scratch(loaded.model.scratch, texts, seed=0)[1]
    else:
        tokenizer = load_model(loaded.model)[1]
    encoder = Encoder(tokenizer, loaded.format)
    lengths = [len(encoder.prompt(problem)) for problem in splits.train]
    (cost,) = stage_costs(loaded).values()
    return Estimate(
        recipe=loaded,
        cost=cost,
        outline=outline_of(loaded.model, texts, device="cpu"),
        prompt=max(lengths),
        mean_prompt=sum(lengths) / len(lengths),
        requests=cost.sampled,
    ).memory


def baseline() -> int:
    with tempfile.TemporaryDirectory() as name:
        return measured_peak(write_recipe(NOTHING, Path(name)))


def compare(case: str, nothing: int) -> dict[str, Any]:
    """Measured and predicted bytes of a case. `nothing` is the peak of a run with almost no
    weights."""
    with tempfile.TemporaryDirectory() as name:
        path = write_recipe(CASES[case], Path(name))
        memory = predicted(path)
        peak = measured_peak(path) - nothing
    error = memory.peak / peak - 1
    print(f"| {case} | {peak / 1e6:,.0f} | {memory.peak / 1e6:,.0f} | {error:+.1%} |", flush=True)
    found = {"case": case, "measured": peak, "predicted": memory.peak, "error": error}
    return {**found, "baseline": nothing, "busiest": memory.busiest, "parts": memory.parts}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=";".join(CASES), help="cases, separated by ;")
    parser.add_argument("--out", type=Path, help="file for the JSON document")
    arguments = parser.parse_args()
    print("| case | measured MB | predicted MB | error |\n|---|---:|---:|---:|")
    nothing = baseline()
    rows = [compare(case, nothing) for case in arguments.only.split(";")]
    document = {"tolerance": TOLERANCE, "returned_bytes": RETURNED, "rows": rows}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
