"""The step benchmark's arithmetic; `make bench` shows that it runs."""

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
    targets = {"ratio_to_trl": 4.0, "update_mfu": 0.55, "memory_to_trl": 0.25}
    assert (
        step.regressions(
            {"ratio_to_trl": 3.6, "update_mfu": 0.18, "memory_to_trl": 0.34}, baseline, targets
        )
        == []
    )
    assert step.regressions({"ratio_to_trl": 9.0, "memory_to_trl": 0.1}, baseline, targets) == []
    lines = step.regressions(
        {"ratio_to_trl": 3.4, "update_mfu": 0.2, "memory_to_trl": 0.36}, baseline, targets
    )
    assert [line.split()[1] for line in lines] == ["ratio_to_trl", "memory_to_trl"]


def test_a_baseline_is_written_and_compared_with(step, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "ROOT", tmp_path)
    path = tmp_path / "step-avx2-2.json"
    assert step.against_baseline({"update_mfu": 0.2, "dtype": "float32"}, path, write=False)[
        0
    ].startswith("no baseline for step-avx2-2")
    step.against_baseline({"update_mfu": 0.2, "dtype": "float32"}, path, write=True)
    assert json.loads(path.read_text()) == {"update_mfu": 0.2, "dtype": "float32"}
    assert step.against_baseline({"update_mfu": 0.1, "dtype": "float32"}, path, write=False)[
        0
    ].startswith("regression: update_mfu")
    assert step.against_baseline({"update_mfu": 0.2, "dtype": "float32"}, path, write=False)[
        0
    ].startswith("no regression")


def test_the_floor_of_decoding_counts_the_rows_that_are_left(step):
    weights = step.MODEL["body"] + step.MODEL["vocabulary"] * step.MODEL["hidden"]
    # without bandwidth limits a step costs its rows' products: 2 rows, then 1
    floor = step.decode_floor([1, 2], [0, 0], peak=1.0, bytes_s=float("inf"), weight_bytes=2)
    assert floor == 2 * weights * (2 + 1)
    # with free products, every step reads the weights once
    assert (
        step.decode_floor([1, 2], [0, 0], peak=float("inf"), bytes_s=1.0, weight_bytes=2)
        == 2 * weights * 2
    )


def contestant(step_s: float, gib: float) -> dict[str, object]:
    phases = {"generate_s": 2.0, "score_s": 1.0, "update_s": 4.0}
    return {"steps": [{"step_s": step_s, **phases}], "peak_kib": gib * 2**20}


def test_trl_is_compared_with_its_faster_and_its_leaner_setting(step):
    results = {
        "reftune": contestant(8.0, 5.0),
        "reftune, recompute": contestant(10.0, 3.0),
        "plain": contestant(20.0, 8.0),
        "trl": contestant(24.0, 9.0),
        "trl, recompute": contestant(32.0, 6.0),
    }
    workload = step.Workload("", ["", ""], [5, 7], [1.0, 0.0])
    flops = step.smollm2_flops([5, 7], [3, 4])
    machine = {"matmul_flops": flops, "bytes_s": 1e12, "weight_bytes": 4, "dtype": "float32"}
    document = step.summary(results, workload, [3, 4], machine)
    assert document["ratio_to_trl"] == 24 / 8
    assert document["memory_to_trl"] == 3 / 6
    assert document["ratio_to_plain"] == 20 / 8
    assert document["update_mfu"] == pytest.approx(6 / 4)  # two updates of three passes, 1 s each
    assert document["step_to_arithmetic"] == pytest.approx(8 / 8)
    machine["dtype"] = "bfloat16"  # a pass of the policy more
    document = step.summary(results, workload, [3, 4], machine)
    assert document["step_to_arithmetic"] == pytest.approx(8 / 9)


def test_every_row_names_processor_and_dtype(step, capsys):
    document = {"medians_s": {"plain": {"step_s": 1.0}}, "peak_gib": {"plain": 1.0}, "demo_s": 99.0}
    step.print_table(document, {"processor": "avx2-2", "dtype": "float32"})
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 4  # two tables of a header and a row
    assert all("avx2-2 | float32" in row for row in (rows[1], rows[3]))
