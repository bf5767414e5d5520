"""Makes a fake run folder in milliseconds, as a trainer would leave it, with plausible curves,
samples and evaluations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

START = 1_790_000_000.0
NAMES = ["Ann", "Ben", "Cleo", "Dan", "Eve", "Finn"]
THINGS = ["apples", "books", "coins", "pens"]

KINDS = {"warmup": "sft", "sft": "sft", "offline_st": "self_train", "online_st": "rl", "reft": "rl"}
INITS = {
    "warmup": "base",
    "sft": "warmup",
    "offline_st": "base",
    "online_st": "warmup",
    "reft": "warmup",
}
ABILITY = {"warmup": 0.2, "sft": 0.6, "offline_st": 1.2, "online_st": 1.1, "reft": 1.6}

WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Writes a run folder under the test's own folder and returns it; see `write_fake_run`."""

    def write(name: str = "demo", **options: Any) -> Path:
        return write_fake_run(tmp_path / name, name=name, **options)

    return write


def write_fake_run(
    folder: Path,
    *,
    name: str = "demo",
    seed: int = 0,
    methods: Iterable[str] = ("warmup", "sft", "reft"),
    num_problems: int = 24,
    num_samples: int = 0,
    rl_steps: int = 20,
    evaluated: Iterable[str] | None = None,
    problem_seed: int = 0,
) -> Path:
    """Write a fake run folder. `evaluated` (default: all) are the methods with an evaluation;
    problems depend only on `problem_seed`."""
    methods = list(methods)
    rng = np.random.default_rng(seed + 1)
    problems = [
        _problem(index, np.random.default_rng([problem_seed, index]))
        for index in range(num_problems)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {
        "name": name,
        "seed": seed,
        "model": {"scratch": {"hidden_size": 64, "layers": 3}},
        "dataset": {"kind": "word_problems", "train": 1000, "dev": 300, "test": num_problems},
        "format": {"kind": "program", "prompt": "compact"},
        "stages": {method: {"kind": KINDS[method], "init": INITS[method]} for method in methods},
        "evaluate": {"split": "test", "samples": num_samples},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    env = {
        "reftune": "0.1.0",
        "python": "3.12.4",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "cpu_count": 2,
        "command": "reftune demo",
        "started": "2026-09-01T10:00:00+00:00",
    }
    (folder / "env.json").write_text(json.dumps(env), encoding="utf-8")
    lines: list[dict[str, Any]] = []
    passes = 0
    for method in methods:
        history = (
            _rl_metrics(method, rl_steps, rng)
            if KINDS[method] == "rl"
            else _sft_metrics(method, rng)
        )
        lines += history
        passes = int(history[-1]["compute/sequence_passes"])
        _write_stage(folder, method, history, passes)
        if KINDS[method] == "rl":
            _write_lines(
                folder / "stages" / method / "samples.jsonl",
                _training_samples(problems, rl_steps, rng),
            )
    _write_lines(folder / "metrics.jsonl", lines)
    for method in methods if evaluated is None else evaluated:
        rows = [_eval_row(problem, ABILITY[method], num_samples, rng) for problem in problems]
        _write_lines(folder / "eval" / f"{method}.jsonl", rows)
    return folder


def _write_stage(folder: Path, method: str, history: list[dict[str, Any]], passes: int) -> None:
    looks = [line for line in history if "dev/accuracy" in line]
    best = max(looks, key=lambda line: line["dev/accuracy"])
    info = {
        "stage": method,
        "kind": KINDS[method],
        "init": INITS[method],
        "chosen_step": best["step"],
        "dev_accuracy": best["dev/accuracy"],
        "dev_n": 300,
        "looks": len(looks),
        "wall_seconds": 61.5,
        "sequence_passes": passes,
        "train_tokens": passes * 14,
        "sampled_tokens": passes * 7,
    }
    stage = folder / "stages" / method
    stage.mkdir(parents=True, exist_ok=True)
    (stage / "stage.json").write_text(json.dumps(info), encoding="utf-8")


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# --- curves ---------------------------------------------------------------------------------------


def _sft_metrics(method: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    begin, end, steps = (0.02, 0.5, 840) if INITS[method] == "base" else (0.5, 0.58, 1040)
    if method == "offline_st":
        end = 0.68
    lines = []
    for step in range(10, steps + 1, 10):
        share = step / steps
        line = {
            "stage": method,
            "step": step,
            "time": START + step * 0.06,
            "progress/epoch": step / 31,
            "loss/total": 0.9 * np.exp(-4 * share) + 0.12 + 0.02 * rng.random(),
            "grad/norm": 0.6 + 0.3 * rng.random(),
            "optim/lr": 4e-3 * (1 - share),
            "compute/sequence_passes": step * 32,
            "compute/train_tokens": step * 450,
            "time/update_s": 0.05 + 0.01 * rng.random(),
        }
        line["loss/sft"] = line["loss/total"]
        lines.append(line)
        if step % 60 == 0 or step == steps:
            accuracy = (
                begin + (end - begin) / (1 + np.exp(6 - 11 * share)) + 0.03 * rng.standard_normal()
            )
            lines.append(_look(method, step, float(np.clip(accuracy, 0, 1)), step * 32, len(lines)))
    return lines


def _rl_metrics(method: str, steps: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [_look(method, 0, 0.5, 0, 0)]
    for step in range(1, steps + 1):
        share = step / steps
        correct = 0.31 + 0.36 * (1 - np.exp(-3 * share)) + 0.03 * rng.standard_normal()
        error = 0.14 * np.exp(-3 * share) + 0.01 * rng.random()
        missing = 0.10 * np.exp(-5 * share) + 0.005 * rng.random()
        lines.append(
            {
                "stage": method,
                "step": step,
                "time": START + step * 0.4,
                "progress/epoch": step * 128 / 1000,
                "loss/total": 0.4 + 0.1 * rng.random(),
                "grad/norm": 0.9 + 0.4 * rng.random(),
                "optim/lr": 1e-3,
                "compute/sequence_passes": step * 256,
                "compute/train_tokens": step * 256 * 14,
                "compute/sampled_tokens": step * 128 * 14,
                "reward/mean": correct + 0.1 * (1 - correct - error - missing),
                "reward/correct": correct,
                "verdict/correct": correct,
                "verdict/error": error,
                "verdict/no_answer": missing,
                "verdict/wrong": 1 - correct - error - missing,
                "verdict/timeout": 0.0,
                "verdict/memory": 0.0,
                "verdict/forbidden": 0.0,
                "response/length": 14 + 1.5 * share + 0.4 * rng.random(),
                "response/truncated": 0.04 * np.exp(-4 * share),
                "kl/reference": 6 * (1 - np.exp(-2 * share)) + rng.random(),
                "kl/mismatch": 2e-7 * rng.random(),
                "policy/loss": -0.02 * rng.random(),
                "policy/entropy": 0.32 - 0.2 * share + 0.01 * rng.random(),
                "policy/clip_fraction": 0.08 + 0.03 * rng.random(),
                "policy/approx_kl": 0.01 * rng.random(),
                "policy/ratio_max": 2 + rng.random(),
                "value/loss": 0.08 - 0.03 * share,
                "value/explained_variance": (
                    0.65 - 0.5 * np.exp(-5 * share) + 0.04 * rng.standard_normal()
                ),
                "value/mean": correct,
                "groups/constant_reward": 0.4 + 0.2 * share,
                "time/generate_s": 0.09 + 0.01 * rng.random(),
                "time/grade_s": 0.02,
                "time/score_s": 0.05,
                "time/update_s": 0.24 + 0.02 * rng.random(),
            }
        )
        if step % 5 == 0:
            accuracy = 0.5 + 0.22 * (1 - np.exp(-3.5 * share)) + 0.015 * rng.standard_normal()
            lines.append(
                _look(method, step, float(np.clip(accuracy, 0, 1)), step * 256, len(lines))
            )
    return lines


def _look(method: str, step: int, accuracy: float, passes: int, looks: int) -> dict[str, Any]:
    return {
        "stage": method,
        "step": step,
        "time": START + step,
        "dev/accuracy": round(accuracy * 300) / 300,
        "dev/n": 300,
        "dev/looks": looks,
        "compute/sequence_passes": passes,
    }


# --- problems and what was written about them -----------------------------------------------------


def _problem(index: int, rng: np.random.Generator) -> dict[str, Any]:
    first, second = rng.choice(NAMES, 2, replace=False)
    thing, a, b, c = rng.choice(THINGS), *rng.integers(2, 31, 3)
    question = (
        f"{first} has {a} {thing}. {second} has {b} times as many. {first} buys {c} more. How many"
        " do they have?"
    )
    names = {"first": str(first).lower(), "second": str(second).lower()}
    return {
        "id": f"test-{index:04d}",
        "question": question,
        "gold": int(a + a * b + c),
        "numbers": (int(a), int(b), int(c)),
        "difficulty": float(rng.standard_normal()),
        **names,
    }


def _attempt(
    problem: Mapping[str, Any], ability: float, rng: np.random.Generator
) -> dict[str, Any]:
    luck = ability - problem["difficulty"] + rng.logistic()
    a, b, c = problem["numbers"]
    first, second = problem["first"], problem["second"]
    if luck < -2.5:
        text, verdict, value = (
            f"def solution():\n    {first} = {a}\n    return {second}",
            "error",
            None,
        )
        reason = f"NameError: name '{second}' is not defined"
    elif luck < -1.8:
        text, verdict, value, reason = (
            f"{first} has {a} times {b}",
            "no_answer",
            None,
            "no function solution() in the text",
        )
    else:
        operator = "*" if luck > 0 else "+"
        text = (
            f"def solution():\n    {first} = {a}\n    {second} = {first} {operator} {b}\n"
            f"    {first} = {first} + {c}\n    return {first} + {second}"
        )
        got = a + c + (a * b if luck > 0 else a + b)
        verdict, value = ("correct" if got == problem["gold"] else "wrong"), str(got)
        reason = (
            f"{got} equals {problem['gold']}"
            if verdict == "correct"
            else f"{got}, expected {problem['gold']}"
        )
    reward = {"correct": 1.0, "wrong": 0.1}.get(verdict, 0.0)
    return {
        "completion": text,
        "verdict": verdict,
        "value": value,
        "reward": reward,
        "reason": reason,
        "finish_reason": "eos",
    }


def _eval_row(
    problem: Mapping[str, Any], ability: float, num_samples: int, rng: np.random.Generator
) -> dict[str, Any]:
    greedy = _attempt(problem, ability, rng)
    return {
        "id": problem["id"],
        "question": problem["question"],
        "gold": str(problem["gold"]),
        "prompt_tokens": 22,
        "greedy": {**greedy, "tokens": len(greedy["completion"].split())},
        "samples": [_attempt(problem, ability - 0.5, rng) for _ in range(num_samples)],
    }


def _training_samples(
    problems: list[dict[str, Any]], steps: int, rng: np.random.Generator
) -> Iterable[dict[str, Any]]:
    for step in range(1, steps + 1):
        for index in {0, 1, int(rng.integers(len(problems)))}:  # two problems recur in every step
            problem = problems[index % len(problems)]
            attempt = _attempt(problem, 1.5 * step / steps, rng)
            tokens = [*re.findall(r"\s*\S+", attempt["completion"]), "<eos>"]
            logprobs = [round(float(-rng.exponential(0.25)), 4) for _ in tokens]
            yield {
                "step": step,
                "id": problem["id"],
                "question": problem["question"],
                "gold": str(problem["gold"]),
                **attempt,
                "program_s": 0.002 * (step % 7),
                "tokens": tokens,
                "logprobs": logprobs,
            }
