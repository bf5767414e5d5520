"""Checks that two runs are the same up to rounding."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from reftune.storage.files import JsonLines

WEIGHT_ATOL = 1e-4
"""Tolerance for weights that move by 3e-3 a step, because Adam magnifies the rounding of a gradient
near 0.
"""
GRADIENT_ATOL = 2e-6
"""Tolerance for the gradients' running means, which are near 0.01."""


def assert_same_numbers(found: Any, expected: Any, where: str = "") -> None:
    """Check that texts and whole numbers are equal and that other numbers are close. Clock times
    are left out."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name, value in expected.items():
            if not (name.startswith("time") or name.endswith("_s") or "seconds" in name):
                assert_same_numbers(found[name], value, f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same_numbers(one, other, f"{where}[{i}]")
    elif isinstance(expected, float):
        # kl/mismatch is the rounding of individual tokens
        assert math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-5), (
            f"{where}: {found} is not {expected}"
        )
    else:
        assert found == expected, where


def assert_same_run(found: Path, expected: Path, *, but: Collection[str] = ()) -> None:
    """Check that two runs have the same metrics (except `but`), weights, optimizer state and
    answers."""
    for file in sorted(expected.rglob("*.safetensors")):
        tensors, others = load_file(file), load_file(found / file.relative_to(expected))
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            atol = GRADIENT_ATOL if name.startswith("optimizer.") else WEIGHT_ATOL
            assert torch.allclose(others[name], tensor, rtol=1e-3, atol=atol), (
                f"{file} {name}: {others[name]} is not {tensor}"
            )
    for file in sorted([*expected.rglob("*.jsonl"), *expected.rglob("stage.json")]):
        other = found / file.relative_to(expected)
        if file.suffix == ".jsonl":
            rows = [
                [{k: v for k, v in row.items() if k not in but} for row in JsonLines(path).rows()]
                for path in (other, file)
            ]
            assert_same_numbers(*rows, file.name)
        else:
            assert_same_numbers(
                json.loads(other.read_text()), json.loads(file.read_text()), file.name
            )
