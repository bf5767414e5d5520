"""The step benchmark's arithmetic; that it runs is shown by `make bench`."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def step(benchmark_module) -> ModuleType:
    return benchmark_module("step")


def test_a_regression_is_a_ratio_that_fell_or_a_share_that_rose(step):
    baseline = {"ratio_to_trl": 4.0, "update_mfu": 0.2, "memory_to_trl": 0.3}
    assert (
        step.regressions({"ratio_to_trl": 3.6, "update_mfu": 0.18, "memory_to_trl": 0.34}, baseline)
        == []
    )
    assert step.regressions({"ratio_to_trl": 9.0, "memory_to_trl": 0.1}, baseline) == []
    lines = step.regressions(
        {"ratio_to_trl": 3.4, "update_mfu": 0.2, "memory_to_trl": 0.36}, baseline
    )
    assert [line.split()[1] for line in lines] == ["ratio_to_trl", "memory_to_trl"]


def test_a_baseline_is_written_and_compared_with(step, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "ROOT", tmp_path)
    path = tmp_path / "step-avx2-2.json"
    assert step.against_baseline({"update_mfu": 0.2}, path, write=False)[0].startswith(
        "no baseline for step-avx2-2"
    )
    step.against_baseline({"update_mfu": 0.2}, path, write=True)
    assert json.loads(path.read_text()) == {"update_mfu": 0.2}
    assert step.against_baseline({"update_mfu": 0.1}, path, write=False)[0].startswith(
        "regression: update_mfu"
    )
    assert step.against_baseline({"update_mfu": 0.2}, path, write=False)[0].startswith(
        "no regression"
    )


def test_the_floor_of_decoding_counts_the_rows_that_are_left(step):
    weights = step.MODEL["body"] + step.MODEL["vocabulary"] * step.MODEL["hidden"]
    # without bandwidth limits a step costs its rows' products: 2 rows, then 1
    floor = step.decode_floor([1, 2], [0, 0], peak=1.0, bytes_s=float("inf"))
    assert floor == 2 * weights * (2 + 1)
    # with products for nothing every step reads the weights once
    assert step.decode_floor([1, 2], [0, 0], peak=float("inf"), bytes_s=1.0) == 2 * weights * 2
