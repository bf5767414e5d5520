"""Completions of every kind, with a person's verdicts. To add one, add a line to
grader_table.jsonl."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Literal

import pytest

from reftune.grading.formats.nl import Nl
from reftune.grading.formats.program import Program
from reftune.grading.rewards.outcome import Outcome
from reftune.terminal.score import score_lines

TABLE = Path(__file__).with_name("grader_table.jsonl")
ROWS = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", ["nl", "program"])
def test_the_grader_agrees_with_every_hand_given_verdict(kind: Literal["nl", "program"]) -> None:
    rows = [{**row, "id": number} for number, row in enumerate(ROWS, 1) if row["format"] == kind]
    format = Nl() if kind == "nl" else Program()
    scored = score_lines(map(json.dumps, rows), format.grade, Outcome(), where=TABLE.name)
    disagreements = [
        f"line {row['id']}: {row['completion'][:60]!r}: expected {row['verdict']}, got"
        f" {result['verdict']}: {result['reason']}"
        for row, result in zip(rows, scored, strict=True)
        if row["verdict"] != result["verdict"]
    ]
    assert not disagreements, "\n".join(disagreements)


def test_the_table_is_large_varied_and_without_repetitions() -> None:
    assert len(ROWS) >= 300
    assert set(Counter(row["verdict"] for row in ROWS)) == {
        "correct",
        "wrong",
        "no_answer",
        "error",
        "timeout",
        "memory",
        "forbidden",
    }
    keys = Counter(
        json.dumps([row["format"], row["completion"], row["answer"], row.get("choices")])
        for row in ROWS
    )
    assert not [key for key, count in keys.items() if count > 1]
