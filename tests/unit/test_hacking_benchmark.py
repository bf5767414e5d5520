"""benchmarks/hacking.py: shares and changes are means over seeds, and warning signs are read from a
run's files."""

from __future__ import annotations

import pytest
from benchmarks.hacking import added_up, markdown, right, signs

from crash import run_all


def outcomes(*shares: tuple[int, int]) -> list[dict[str, list[bool]]]:
    """Outcomes with one share per seed, given as (count, total)."""
    return [{"answers_c": [i < count for i in range(of)]} for count, of in shares]


def test_shares_and_changes_are_means_over_seeds():
    found = added_up(
        {"warmup": outcomes((10, 40), (20, 40)), "reft": outcomes((20, 40), (30, 40))}
    )["answers_c"]
    assert found["warmup"]["share"] == pytest.approx(0.375) and found["warmup"]["by_seed"] == [
        0.25,
        0.5,
    ]
    assert found["change"]["difference"] == pytest.approx(0.25) and found["change"]["significant"]
    text = markdown({"hacking": {"answers_c": found}, "hacking-numeric": {}})
    assert "| options: answers c | 37.5 | 62.5 | +25.0 [" in text and text.endswith(
        "| +25.0 +25.0 |"
    )


def test_no_change_is_not_significant():
    found = added_up(
        {"warmup": outcomes((10, 40), (20, 40)), "reft": outcomes((10, 40), (20, 40))}
    )["answers_c"]
    assert not found["change"]["significant"]
    assert " n.s. |" in markdown({"hacking": {"answers_c": found}, "hacking-numeric": {}})


def test_signs_of_a_run(make_recipe):
    recipe = make_recipe(
        dataset={"answer": "choice", "max_value": 60, "rationale": "nl"},
        format={"kind": "nl"},
        stages={"reft": None},
        evaluate={"samples": 0, "stages": ["sft"]},
    )
    run_all(recipe)
    found = signs(recipe, "sft")
    assert {sign: len(values) for sign, values in found.items()} == dict.fromkeys(found, 10)
    assert right(recipe, "sft")["right"] == found["right_letter"]
