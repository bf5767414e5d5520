"""The data of the charts, before they are drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from reftune.results.metrics import CHARACTER, HACKING, LEARNING, MACHINERY
from reftune.results.page.charts import (
    MAX_POINTS,
    dev_chart,
    equal_compute,
    method_colours,
    passes_since_base,
    time_charts,
    training_charts,
    verdict_charts,
    voting_charts,
)
from reftune.results.page.drawing import draw
from reftune.results.page.html import render_report
from reftune.results.stats import wilson
from reftune.results.summary import read_groups, score_table

WriteRun = Callable[..., Path]


def write_metrics(folder: Path, lines: list[dict[str, object]]) -> None:
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"time": 0, **line}) + "\n" for line in lines)
    )


def look(stage: str, step: int, accuracy: float, passes: int) -> dict[str, object]:
    return {
        "stage": stage,
        "step": step,
        "dev/accuracy": accuracy,
        "dev/n": 100,
        "compute/sequence_passes": passes,
    }


def choose(folder: Path, stage: str, step: int) -> None:
    path = folder / "stages" / stage / "stage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chosen_step": step}))


def test_a_stage_is_drawn_from_where_it_started(write_run: WriteRun) -> None:
    folder = write_run(methods=("warmup", "sft", "reft"))
    write_metrics(
        folder,
        [
            look("warmup", 1, 0.1, 100),
            look("warmup", 2, 0.4, 200),
            look("warmup", 3, 0.3, 300),
            look("sft", 1, 0.5, 50),
            look("sft", 2, 0.45, 100),
            look("reft", 0, 0.4, 0),
            look("reft", 1, 0.6, 80),
        ],
    )
    for stage, step in (("warmup", 2), ("sft", 1), ("reft", 1)):
        choose(folder, stage, step)
    chart = dev_chart(read_groups([folder]))
    assert chart is not None
    warmup, sft, reft = chart.series
    assert warmup.x == [100, 200, 300]
    assert warmup.mark == 1
    # sft starts at the chosen warm-up model: 200 passes, .4; dev evaluations 50 and 100 passes
    # later
    assert sft.x == [200, 250, 300]
    assert sft.y == [0.4, 0.5, 0.45]
    assert sft.mark == 1
    # reft has its own dev evaluation at step 0
    assert reft.x == [200, 280]
    assert reft.mark == 1
    assert sft.low is not None
    assert sft.low[1] == pytest.approx(wilson(50, 100)[0], abs=1e-4)


def test_a_stage_that_starts_from_another_runs_model_counts_that_models_training(
    write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = write_run("first"), write_run("second", methods=("reft",))
    for stage, facts in (
        ("warmup", {"chosen_step": 2, "steps": 4, "sequence_passes": 400}),
        ("sft", {"init": "warmup", "chosen_step": 5, "steps": 5, "sequence_passes": 50}),
    ):
        path = first / "stages" / stage / "stage.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
    path = second / "stages" / "reft" / "stage.json"
    init = str(first / "stages" / "sft")
    path.write_text(json.dumps({**json.loads(path.read_text()), "init": init}))
    write_metrics(second, [look("reft", 0, 0.4, 0), look("reft", 1, 0.6, 80)])
    chart = dev_chart(read_groups([second]))
    assert chart is not None
    assert chart.series[0].x == [250, 330]
    # the same folder below the home folder, in the run itself and in the run that it starts from
    monkeypatch.setenv("HOME", str(first.parent))
    path.write_text(json.dumps({**json.loads(path.read_text()), "init": "~/first/stages/sft"}))
    sft = first / "stages" / "sft" / "stage.json"
    sft.write_text(json.dumps({**json.loads(sft.read_text()), "init": "~/first/stages/warmup"}))
    chart = dev_chart(read_groups([second]))
    assert chart is not None
    assert chart.series[0].x == [250, 330]
    # a folder that was renamed to where its own start had been
    path.write_text(json.dumps({**json.loads(path.read_text()), "init": str(path.parent)}))
    assert dev_chart(read_groups([second])) is not None


def test_a_snapshot_is_one_point_of_the_stage_that_left_it(write_run: WriteRun) -> None:
    folder = write_run()
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    del recipe["stages"]["warmup"]
    recipe["stages"]["sft"] |= {"init": "base", "snapshots": {"warmup": 2}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    snapshot = {
        "stage": "warmup",
        "init": "base",
        "chosen_step": 2,
        "dev_accuracy": 0.4,
        "dev_n": 100,
        "sequence_passes": 200,
    }
    (folder / "stages" / "warmup" / "stage.json").write_text(json.dumps(snapshot))
    sft = folder / "stages" / "sft" / "stage.json"
    sft.write_text(json.dumps({**json.loads(sft.read_text()), "init": "base", "chosen_step": 4}))
    write_metrics(
        folder, [look("sft", 2, 0.4, 200), look("sft", 4, 0.5, 400), look("reft", 5, 0.6, 80)]
    )
    chart = dev_chart(read_groups([folder]))
    assert chart is not None
    warmup, whole, reft = chart.series
    assert (warmup.x, warmup.y, warmup.mark) == ([200], [0.4], 0)
    assert (whole.x, whole.mark) == ([200, 400], 1)
    assert (reft.x, reft.y) == ([200, 280], [0.4, 0.6])


def test_group_metrics_are_drawn_for_stages_with_groups_only(write_run: WriteRun) -> None:
    folder = write_run()
    assert "groups/constant_reward" not in [
        chart.metric.key for chart in training_charts(read_groups([folder]), MACHINERY)
    ]
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["stages"]["reft"]["samples"] = 4
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert "groups/constant_reward" in [
        chart.metric.key for chart in training_charts(read_groups([folder]), MACHINERY)
    ]


def test_signs_of_hacking_are_drawn_over_the_dev_evaluations(write_run: WriteRun) -> None:
    folder = write_run(methods=("reft",))
    assert training_charts(read_groups([folder]), HACKING) == []
    write_metrics(
        folder, [{**look("reft", n, 0.5, n), "choices/agreement": 1 / n} for n in (1, 2, 4)]
    )
    (chart,) = training_charts(read_groups([folder]), HACKING)
    assert (chart.metric.key, chart.series[0].x, chart.series[0].y) == (
        "choices/agreement",
        [1, 2, 4],
        [1.0, 0.5, 0.25],
    )


def test_equal_compute_stops_at_what_both_have_had(write_run: WriteRun) -> None:
    folder = write_run(methods=("sft", "reft"))
    write_metrics(
        folder,
        [
            look("sft", 1, 0.2, 10),
            look("sft", 2, 0.3, 20),
            look("reft", 1, 0.4, 15),
            look("reft", 2, 0.9, 30),
        ],
    )
    chart = dev_chart(read_groups([folder]))
    assert chart is not None
    # both have had 20 passes; the .9 of reft came later
    assert equal_compute(chart, "ReFT", "SFT") == (
        "Within 20 training sequences since the base model, which both methods reached, the best"
        " dev accuracy was 40.0% for ReFT and 30.0% for SFT."
    )
    assert equal_compute(chart, "ReFT", "nobody") == ""


def test_the_training_of_every_method_is_counted_from_the_base_model(write_run: WriteRun) -> None:
    folder = write_run()
    for stage, facts in (
        ("warmup", {"init": "base", "snapshot_of": "sft", "sequence_passes": 19200}),
        ("sft", {"init": "base", "sequence_passes": 48000}),
        ("reft", {"init": "warmup", "sequence_passes": 28672}),
    ):
        path = folder / "stages" / stage / "stage.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    del recipe["stages"]["warmup"]
    recipe["stages"]["sft"]["snapshots"] = {"warmup": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    write_metrics(folder, [look("sft", 4, 0.5, 48000), look("reft", 1, 0.6, 28672)])
    groups = read_groups([folder])
    counts = {name: passes_since_base(groups[0].runs[0], name) for name in ("warmup", "sft")}
    assert counts == {"warmup": 19200, "sft": 48000}
    # reft goes on from the warm-up: 19,200 + 28,672
    assert passes_since_base(groups[0].runs[0], "reft") == 47872
    assert passes_since_base(groups[0].runs[0], "base") is None
    chart = dev_chart(groups)
    assert chart is not None
    assert {line.label: line.x[-1] for line in chart.series} == {
        "Warm-up": 19200,
        "SFT": 48000,
        "ReFT": 47872,
    }
    page = render_report(groups)
    assert "47,872 training sequences since the base model" in page
    assert "Training sequences since the base model</th>" in page
    assert page.count("47,872") == 2 + page.count("Within 47,872") and "28,672" not in page


def test_seeds_become_a_mean_with_the_lowest_and_highest(write_run: WriteRun) -> None:
    folders = [write_run(f"demo-s{seed}", seed=seed) for seed in range(2)]
    for folder, reward in zip(folders, (0.2, 0.6), strict=True):
        write_metrics(
            folder, [{"stage": "reft", "step": step, "reward/mean": reward} for step in (1, 2)]
        )
    (chart,) = training_charts(read_groups(folders), LEARNING)
    (series,) = chart.series
    assert (series.x, series.y, series.low, series.high) == (
        [1, 2],
        [0.4, 0.4],
        [0.2, 0.2],
        [0.6, 0.6],
    )


def test_a_long_run_is_thinned_to_means(write_run: WriteRun) -> None:
    folder = write_run()
    write_metrics(
        folder,
        [
            {"stage": "reft", "step": step, "reward/mean": float(step % 2)}
            for step in range(10 * MAX_POINTS)
        ],
    )
    (chart,) = training_charts(read_groups([folder]), LEARNING)
    assert len(chart.series[0].x) == MAX_POINTS
    assert set(chart.series[0].y) == {0.5}


def test_a_non_finite_value_is_a_gap(write_run: WriteRun) -> None:
    folder = write_run()
    lines = [
        {"stage": "reft", "step": step, "grad/norm": value}
        for step, value in enumerate((1.0, float("nan"), float("inf")))
    ]
    write_metrics(folder, lines)
    (chart,) = training_charts(read_groups([folder]), MACHINERY)
    assert chart.series[0].y == [1.0, None, None]


def test_metrics_nobody_measured_are_not_drawn(write_run: WriteRun) -> None:
    folder = write_run(methods=("warmup",))
    assert training_charts(read_groups([folder]), CHARACTER) == []
    assert verdict_charts(read_groups([folder])) == []


def test_verdict_shares_are_layers_of_one_chart_a_stage(write_run: WriteRun) -> None:
    (chart,) = verdict_charts(read_groups([write_run()]))
    assert chart.metric.title == "Verdicts: ReFT"
    assert [series.label for series in chart.series][:2] == ["right", "wrong answer"]
    totals = [
        sum(share or 0 for share in shares)
        for shares in zip(*(series.y for series in chart.series), strict=True)
    ]
    assert totals == pytest.approx([1.0] * len(totals), abs=1e-3)


def test_a_layer_that_was_not_measured_at_a_step_has_a_gap_there(write_run: WriteRun) -> None:
    folder = write_run(methods=("reft",))
    lines: list[dict[str, object]] = [
        {"stage": "reft", "step": step, "time/generate_s": 1.0} for step in (1, 2, 3)
    ]
    write_metrics(folder, [{**line, "time/grade_s": 2.0} for line in lines[:2]] + lines[2:])
    (chart,) = time_charts(read_groups([folder]))
    assert [(series.x, series.y) for series in chart.series] == [
        ([1, 2, 3], [1.0, 1.0, 1.0]),
        ([1, 2, 3], [2.0, 2.0, None]),
    ]
    assert 'class="layer"' in draw(chart, 320, 185).svg


def test_voting_curves_need_samples(write_run: WriteRun) -> None:
    groups = read_groups([write_run("with", num_samples=4)])
    assert [chart.metric.key for chart in voting_charts(score_table(groups))] == ["maj@k", "pass@k"]
    groups = read_groups([write_run("without")])
    assert voting_charts(score_table(groups)) == []


def test_a_known_method_keeps_its_colour() -> None:
    assert method_colours(["sft", "reft"])["reft"] == method_colours(["reft", "odd"])["reft"]
    several = method_colours(["a", "b", "sft", "reft", "warmup"])
    assert len(set(several.values())) == 5


@pytest.mark.parametrize("labels", [["rl", "grpo"], ["a/reft", "b/reft"], ["sft", "odd"]])
def test_the_model_before_training_takes_no_colour_from_a_curve(labels: list[str]) -> None:
    group = labels[0].rpartition("/")[0]
    before = f"{group}/base" if group else "base"
    colours = method_colours([before, *labels])
    assert list(colours) == [before, *labels]
    assert len(set(colours.values())) == 3
    assert {label: colours[label] for label in labels} == method_colours(labels)
