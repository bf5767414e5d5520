"""Whether a reward model chooses better than at random, read from the run folder."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest
import yaml

from reftune.results import read_groups, report_command, summarize
from reftune.results.records import read_run
from reftune.results.summary import rerankers
from reftune.results.tables import remarks

BAD = (
    "judge's choice among 100 samples is no better than a random one on dev: 48.4% against 62.2%,"
    " −13.8 ± 4.1 points; do not rerank with it"
)


@pytest.fixture
def judged(write_run):
    """A finished run with the reward model `judge`, chosen at step 2 of three evaluations."""

    def write(accuracy: float, chance: float, margin: float) -> Path:
        folder: Path = write_run()
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        recipe["stages"]["judge"] = {"kind": "reward_model", "dev_samples": 100}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (folder / "stages" / "judge").mkdir()
        info = {"kind": "reward_model", "chosen_step": 2, "dev_accuracy": accuracy}
        (folder / "stages" / "judge" / "stage.json").write_text(json.dumps(info))
        looks = [(1, 0.1), (2, accuracy), (3, 0.2)]
        with (folder / "metrics.jsonl").open("a") as file:
            for step, found in looks:
                values = {"dev/accuracy": found, "dev/chance": chance, "dev/chance_margin": margin}
                row = {"stage": "judge", "step": step, "time": 0, **values}
                file.write(json.dumps(row) + "\n")
        return folder

    return write


@pytest.mark.parametrize(
    ("accuracy", "beats"),
    [(0.484, False), (0.622, False), (0.662, False), (0.664, True), (1.0, True)],
)
def test_it_beats_chance_only_beyond_the_margin(judged, accuracy: float, beats: bool) -> None:
    folder = judged(accuracy, chance=0.622, margin=0.041)
    (found,) = rerankers(read_run(folder))
    assert (found.stage, found.accuracy, found.beats_chance) == ("judge", accuracy, beats)
    (line,) = remarks(read_run(folder))
    assert ("do not rerank with it" in line) is not beats
    (row,) = summarize(*read_groups([folder]))["rerankers"]
    assert row == {
        "stage": "judge",
        "num_samples": 100,
        "accuracy": accuracy,
        "chance": 0.622,
        "margin": 0.041,
        "beats_chance": beats,
    }


def test_a_reward_model_chosen_at_its_start_is_not_taken_for_a_method(judged) -> None:
    folder = judged(0.664, chance=0.622, margin=0.041)
    path = folder / "stages" / "judge" / "stage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chosen_step": 0}))
    assert not any("its model is that of" in line for line in remarks(read_run(folder)))


def test_the_report_warns_in_one_line(judged) -> None:
    folder = judged(0.484, chance=0.622, margin=0.041)
    assert remarks(read_run(folder)) == [BAD]
    page = report_command([folder]).read_text(encoding="utf-8")
    assert html.unescape(page).count(BAD) == 1


def test_a_model_that_always_chooses_right_among_right_samples_is_no_better_than_chance(
    judged,
) -> None:
    (found,) = rerankers(read_run(judged(1.0, chance=1.0, margin=0.0)))
    assert not found.beats_chance


def test_one_that_is_still_training_is_left_out(judged) -> None:
    folder = judged(0.9, chance=0.5, margin=0.1)
    (folder / "stages" / "judge" / "stage.json").unlink()
    assert rerankers(read_run(folder)) == []
