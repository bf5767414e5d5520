"""Whether a warm-up was finished when RL started from it, read from the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reftune.results.records import MetricRow, RunResults, StageResults
from reftune.results.summary import handovers
from reftune.results.tables import rise_line, sentence
from reftune.stages.plateau import Rise


def rows(*values: dict[str, float]) -> tuple[MetricRow, ...]:
    return tuple(MetricRow(step=i, values=row) for i, row in enumerate(values, start=1))


def stage(name: str, metrics: tuple[MetricRow, ...] = (), **info: Any) -> StageResults:
    return StageResults(
        name=name,
        kind="",
        init=str(info.get("init", "base")),
        num_samples=1,
        metrics=metrics,
        samples=(),
        info=info,
    )


def run(*stages: StageResults) -> RunResults:
    return RunResults(
        folder=Path("run"),
        recipe={},
        recipe_text="",
        env={},
        stages={stage.name: stage for stage in stages},
        evals={},
        missing=(),
    )


LOOKS = rows(
    {"dev/accuracy": 0.2},
    {"dev/accuracy": 0.5, "dev/rise": 0.3, "dev/rise_margin": 0.05},
    {"dev/accuracy": 0.51, "dev/rise": 0.01, "dev/rise_margin": 0.04},
)
LOOKS_AT_12_PERCENT = (
    {"dev/accuracy": 0.11},
    {"dev/accuracy": 0.12, "dev/rise": 0.01, "dev/rise_margin": 0.04},
)
RL = rows({"reward/mean": 0.5})


@pytest.mark.parametrize(("step", "ready"), [(2, False), (3, True)])
def test_a_snapshot_is_judged_by_the_last_evaluation_before_it(step: int, ready: bool) -> None:
    warmup = stage("warmup", chosen_step=step, snapshot_of="sft")
    (found,) = handovers(run(warmup, stage("sft", LOOKS), stage("reft", RL, init="warmup")))
    assert (found.stage, found.init, found.is_ready) == ("reft", "warmup", ready)
    assert ("may teach more than RL" in sentence(found)) != ready


@pytest.mark.parametrize("chosen", [2, 3])
def test_a_stage_is_judged_by_its_last_evaluation_whichever_model_was_chosen(chosen: int) -> None:
    sft = stage("sft", LOOKS, chosen_step=chosen)
    (found,) = handovers(run(sft, stage("reft", RL, init="sft")))
    assert found.is_ready and found.to_row()["margin"] == 0.04
    assert sentence(found) == (
        "sft was finished when reft began: dev accuracy had changed by +1.0 ± 4.0 points over 4"
        " evaluations"
    )


def test_a_warm_up_that_is_flat_before_it_can_be_rewarded_was_not_finished() -> None:
    flat = rows(*LOOKS_AT_12_PERCENT)
    (found,) = handovers(run(stage("sft", flat, chosen_step=2), stage("reft", RL, init="sft")))
    assert not found.rise.is_beyond_chance and not found.is_ready
    assert found.to_row()["ready"] is False
    assert sentence(found) == (
        "sft was flat at 12.0% on dev when reft began (+1.0 ± 4.0 points over 4 evaluations):"
        " RL needs about 20% correct on dev; train the warm-up longer, add questions with"
        " rationales, or start from a pretrained model"
    )


def test_few_dev_problems_do_not_tell_whether_a_warm_up_was_finished() -> None:
    # 20 dev problems, of which 5 were won and 1 was lost: +20 ± 22 points
    looks = rows({"dev/accuracy": 0.5, "dev/rise": 0.2, "dev/rise_margin": 0.223})
    (found,) = handovers(run(stage("sft", looks, chosen_step=1), stage("reft", RL, init="sft")))
    assert not found.is_ready
    assert sentence(found).startswith("dev has too few problems to tell whether sft was finished")


@pytest.mark.parametrize(
    ("rise", "accuracy", "line"),
    [
        (Rise(value=0.12, margin=0.05), 0.1, "is still rising by 3.0 points per evaluation"),
        (Rise(value=0.0, margin=0.0), 0.0, "is not rising, at 0.0%"),
        (Rise(value=0.0, margin=0.05), 0.197, "is not rising, at 19.7%"),
        (Rise(value=0.0, margin=0.05), 0.2, "is no longer rising"),
        (Rise(value=0.05, margin=0.15), 0.5, "too few problems to tell"),
    ],
)
def test_the_line_before_rl_says_what_should_follow(rise: Rise, accuracy: float, line: str) -> None:
    assert line in rise_line(rise, accuracy)
    assert ("RL can take over" in rise_line(rise, accuracy)) == (line == "is no longer rising")


@pytest.mark.parametrize(
    "stages",
    [
        (stage("reft", RL, init="base"),),
        (stage("sft", LOOKS[:1], chosen_step=1), stage("reft", RL, init="sft")),  # too few looks
        (stage("sft", LOOKS, chosen_step=3), stage("more", LOOKS, init="sft")),  # no RL
        (stage("sft", LOOKS), stage("reft", RL, init="sft")),  # not finished yet
    ],
)
def test_handovers_that_cannot_be_judged_are_left_out(stages: tuple[StageResults, ...]) -> None:
    assert handovers(run(*stages)) == []
