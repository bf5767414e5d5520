"""JSON lines files, which can be cut back."""

from __future__ import annotations

import pytest

from reftune.errors import CheckpointError
from reftune.storage.files import JsonLines, write_atomically


@pytest.fixture
def lines(tmp_path) -> JsonLines:
    lines = JsonLines(tmp_path / "runs" / "metrics.jsonl")
    for step in range(4):
        lines.append({"stage": "sft" if step < 2 else "reft", "step": step, "text": "é\n"})
    return lines


def steps(lines: JsonLines) -> list[int]:
    return [row["step"] for row in lines.rows()]


def test_rows_come_back_in_order(lines):
    assert lines.rows()[3] == {"stage": "reft", "step": 3, "text": "é\n"}
    assert steps(lines) == [0, 1, 2, 3]


def test_a_file_that_is_not_there_has_no_rows(tmp_path):
    lines = JsonLines(tmp_path / "absent.jsonl")
    lines.truncate(0)
    lines.keep(3)
    assert lines.rows() == [] and lines.size() == 0
    assert not lines.path.exists()


def test_what_was_written_after_a_size_is_forgotten(lines):
    size = lines.size()
    lines.append({"step": 4})
    lines.truncate(size)
    assert steps(lines) == [0, 1, 2, 3]
    lines.truncate(size + 100)
    assert lines.size() == size


def test_a_torn_last_line_is_no_row(lines):
    with lines.path.open("a") as file:
        file.write('{"stage": "reft", "st')
    assert steps(lines) == [0, 1, 2, 3]


def test_a_damaged_line_is_named(lines):
    lines.path.write_text(lines.path.read_text().replace('"step": 2', '"step"'))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:3: damaged \(.*\); expected a JSON"):
        lines.rows()


def test_cutting_back_drops_a_torn_line_so_that_the_next_one_is_whole(lines):
    with lines.path.open("a") as file:
        file.write('{"stage": "reft", "st')
    lines.keep_of(lambda row: row.get("stage") == "report", 0)
    lines.append({"step": 4})
    assert steps(lines) == [0, 1, 2, 3, 4]


def test_cutting_back_a_stage_leaves_the_lines_of_the_others(lines):
    lines.append({"stage": "sft", "step": 4})
    lines.keep_of(lambda row: row.get("stage") == "reft", 1)
    assert steps(lines) == [0, 1, 2, 4]
    lines.keep_of(lambda row: row.get("stage") == "sft", 0)
    assert steps(lines) == [2]


def test_a_damaged_line_does_not_keep_a_stage_from_going_on(lines):
    lines.path.write_text(lines.path.read_text().replace('"step": 2', '"step"'))
    lines.keep_of(lambda row: row.get("stage") == "reft", 0)
    assert len(lines.path.read_text().splitlines()) == 3


def test_only_so_many_lines_are_kept(lines):
    lines.keep(3)
    assert steps(lines) == [0, 1, 2]
    lines.keep(9)
    assert steps(lines) == [0, 1, 2]
    lines.keep(0)
    assert lines.size() == 0


def test_a_place_that_cannot_be_written_is_reported_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be written: "):
        JsonLines(tmp_path / "file" / "metrics.jsonl").append({"step": 1})


def test_half_a_surrogate_pair_is_written_as_a_question_mark(lines, tmp_path):
    # a user's grader may return {"answer": "\\ud83d"} as read from a completion
    lines.append({"value": "a\ud83d", "reason": "\udc00 😀", "reward_part/\udfff": 1.0})
    assert lines.rows()[4] == {"value": "a?", "reason": "? 😀", "reward_part/?": 1.0}
    lines.keep(4)
    assert steps(lines) == [0, 1, 2, 3]
    write_atomically(tmp_path / "rows.json", '{"value": "a\ud83d é"}')
    assert (tmp_path / "rows.json").read_bytes() == '{"value": "a? é"}'.encode()
