"""`reftune score`: completions in a file → verdicts. How a user debugs a reward."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from reftune.errors import DataError
from reftune.grading.formats import Format
from reftune.grading.formats.nl import Nl
from reftune.grading.formats.program import Program
from reftune.grading.golds import read_gold
from reftune.grading.rewards import Reward
from reftune.grading.rewards.outcome import Outcome
from reftune.types import Answer, Completion, Problem

BATCH = 256
Grading = Literal["robust", "paper"]
_Row = tuple[Any, Problem, str]


def score_file(
    file: Path, kind: Literal["nl", "program"], *, grading: Grading = "robust"
) -> Iterator[dict[str, Any]]:
    """Grade a file of completions with the format `kind`; see `score_lines`. Raises: DataError,
    before the first result."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    format = Nl(grading=grading) if kind == "nl" else Program(grading=grading)
    return score_lines(
        lines, format, Outcome(partial_on_choices=grading == "paper"), where=str(file)
    )


def score_lines(
    lines: Iterable[str], format: Format, reward: Reward, *, where: str
) -> Iterator[dict[str, Any]]:
    """`{"id", "completion", "answer", "choices"?}` a line → `{"id", "verdict", "value", "reward",
    "reason"}` a line.

    `where` is the file's name. Raises: DataError with file and line, before anything is graded.
    """
    rows = [_row(line, f"{where}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(
            f"{where}: empty; expected an object with id, completion and answer in each line"
        )
    return _scored(rows, format, reward)


def _scored(rows: Sequence[_Row], format: Format, reward: Reward) -> Iterator[dict[str, Any]]:
    for start in range(0, len(rows), BATCH):
        keys, problems, texts = zip(*rows[start : start + BATCH], strict=True)
        grades = format.grade(problems, texts)
        completions = [
            Completion(token_ids=(), text=text, logprobs=(), finish_reason="eos") for text in texts
        ]
        for key, grade, paid in zip(
            keys, grades, reward(problems, completions, grades), strict=True
        ):
            yield {
                "id": key,
                "verdict": grade.verdict.value,
                "value": grade.value,
                "reward": paid,
                "reason": grade.reason,
            }


def _row(line: str, where: str) -> _Row:
    """A line's id, problem and completion."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: expected an object with id, completion and answer, got {type(row).__name__}"
        )
    missing = [key for key in ("id", "completion", "answer") if row.get(key) is None]
    if missing:
        raise DataError(f"{where}: {missing[0]} is missing; expected id, completion and answer")
    if not isinstance(row["completion"], str):
        raise DataError(
            f"{where}: completion: expected a text, got {type(row['completion']).__name__}"
        )
    return row["id"], problem_of(row, where), row["completion"]


def problem_of(row: Mapping[str, Any], where: str) -> Problem:
    """A problem from `{"id", "answer", "choices"?, "question"?}`. Raises: DataError that begins
    with `where`."""
    if row.get("answer") is None:
        raise DataError(f"{where}: answer is missing; expected a number, a text or a letter")
    choices = _choices(row.get("choices"), where)
    return Problem(
        id=str(row["id"]),
        question=str(row.get("question", "")),
        answer=_answer(row["answer"], choices, where),
        choices=choices,
        columns={key: value for key, value in row.items() if key not in ("id", "completion")},
    )


def _choices(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not 2 <= len(value) <= 26:
        raise DataError(
            f"{where}: choices: expected a list of 2 to 26 options, got {str(value)[:80]!r}"
        )
    return tuple(str(choice) for choice in value)


def _answer(value: Any, choices: tuple[str, ...], where: str) -> Answer:
    """The gold answer: a letter with choices or alone, else a number if all of it is one, else a
    text."""
    is_letter = isinstance(value, str) and len(value.strip()) == 1 and value.strip().isalpha()
    is_choice = bool(choices) or is_letter
    expected = (
        f"the letter or value of one of {len(choices)} choices"
        if is_choice
        else "a number, a text or a letter"
    )
    try:
        if not isinstance(value, bool):
            return read_gold(value, "choice" if is_choice else "auto", choices=choices)
    except DataError:
        pass
    raise DataError(f"{where}: answer: expected {expected}, got {str(value)[:80]!r}")
