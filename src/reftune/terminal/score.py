"""`reftune score` grades the completions in a file, for debugging a reward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

from pydantic import ValidationError

from reftune.datasets.reading.files import json_lines, read_text
from reftune.errors import DataError, RecipeError
from reftune.grading.formats import Format
from reftune.grading.formats.nl import Nl
from reftune.grading.formats.program import Program
from reftune.grading.golds import GoldKind, read_gold
from reftune.grading.markers import DEFAULT, Reading
from reftune.grading.options import unlettered
from reftune.grading.rewards import Reward
from reftune.grading.rewards.outcome import Outcome
from reftune.recipe import Recipe
from reftune.types import Answer, Completion, Problem

BATCH = 256
_Row = tuple[Any, Problem, str]


def score_file(
    file: Path, kind: Literal["nl", "program"], *, grading: str = "robust"
) -> Iterator[dict[str, Any]]:
    """Grade a file of completions with the format `kind`; see `score_lines`. Raises: DataError if a
    line cannot be read; RecipeError if the grading is unknown. Both are raised before anything is
    graded."""
    try:
        format = Nl(grading=grading) if kind == "nl" else Program(grading=grading)
    except ValidationError as error:
        raise RecipeError(f"--grading: {error.errors()[0]['msg']}") from None
    reward = Outcome(partial_on_choices=grading == "paper")
    return score_lines(read_text(file).split("\n"), format, reward, where=str(file))


def score_as_recipe(file: Path, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Grade a file of completions with a recipe's format, answer kind, sandbox, limits and reward;
    see `score_lines`. Raises: DataError, before anything is graded, if a line cannot be read;
    RewardError if the reward fails."""
    from reftune.stages.rollouts import rewards_of

    decimals = [getattr(each, "decimal", ".") for each in (recipe.dataset, recipe.format)]
    return score_lines(
        read_text(file).split("\n"),
        recipe.format,
        partial(rewards_of, recipe.reward),
        where=str(file),
        kind=getattr(recipe.dataset, "answer_kind", "auto"),
        reading=Reading(decimal="," if "," in decimals else "."),
    )


def score_lines(
    lines: Iterable[str],
    format: Format,
    reward: Reward,
    *,
    where: str,
    kind: str = "auto",
    reading: Reading = DEFAULT,
) -> Iterator[dict[str, Any]]:
    """Grade lines of `{"id", "completion", "answer", "choices"?, "answer_kind"?}`. Yields `{"id",
    "verdict", "value", "reward", "reason"}` for each line.

    `where` is the file's name, `kind` is the answer kind for lines without `answer_kind`, and
    `reading` defines how gold answers are read. Raises: DataError, before anything is graded, if a
    line cannot be read. The error names the file and the line.
    """
    rows = [_row(row, place, kind, reading) for place, row in json_lines(where, lines)]
    if not rows:
        raise DataError(
            f"{where}: empty; expected an object with id, completion and answer on each line"
        )
    return _scored(rows, format, reward)


def _scored(rows: Sequence[_Row], format: Format, reward: Reward) -> Iterator[dict[str, Any]]:
    for start in range(0, len(rows), BATCH):
        keys, problems, texts = zip(*rows[start : start + BATCH], strict=True)
        grades = format.grade(problems, texts)
        completions = [
            Completion(token_ids=(), text=text, logprobs=(), finish_reason="eos") for text in texts
        ]
        for key, grade, earned in zip(
            keys, grades, reward(problems, completions, grades), strict=True
        ):
            yield {
                "id": key,
                "verdict": grade.verdict.value,
                "value": grade.value,
                "reward": earned,
                "reason": grade.reason,
            }


def _row(row: Mapping[str, Any], where: str, kind: str, reading: Reading) -> _Row:
    missing = [key for key in ("id", "completion", "answer") if row.get(key) is None]
    if missing:
        raise DataError(f"{where}: {missing[0]} is missing; expected id, completion and answer")
    if not isinstance(row["completion"], str):
        raise DataError(
            f"{where}: completion: expected a string, got {type(row['completion']).__name__}"
        )
    problem = problem_of({"answer_kind": kind, **row}, where, reading)
    return row["id"], problem, row["completion"]


def problem_of(row: Mapping[str, Any], where: str, reading: Reading = DEFAULT) -> Problem:
    """A problem from `{"id", "answer", "choices"?, "question"?, "answer_kind"?}`. Raises:
    DataError, whose message begins with `where`, if the answer or the choices are invalid."""
    if row.get("answer") is None:
        raise DataError(f"{where}: answer is missing; expected a number, text or a letter")
    choices = _choices(row.get("choices"), where)
    return Problem(
        id=str(row["id"]),
        question=str(row.get("question", "")),
        answer=_answer(row["answer"], choices, where, row.get("answer_kind", "auto"), reading),
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
    return unlettered([str(choice) for choice in value])


def _answer(
    value: Any, choices: tuple[str, ...], where: str, kind: str, reading: Reading
) -> Answer:
    """The gold answer of the given kind. `auto` means `choice` if there are choices or the value is
    a single letter. Otherwise, a value that consists only of a number is read as a number, and any
    other value is read as an expression, a list or text."""
    if kind not in get_args(GoldKind):
        known = ", ".join(get_args(GoldKind))
        raise DataError(f"{where}: answer_kind: {str(kind)[:80]!r}; expected one of {known}")
    is_letter = isinstance(value, str) and len(value.strip()) == 1 and value.strip().isalpha()
    if kind == "auto" and (choices or is_letter):
        kind = "choice"
    try:
        if isinstance(value, bool):
            raise DataError("a boolean")
        return read_gold(value, cast("GoldKind", kind), choices=choices, reading=reading)
    except DataError as error:
        choice = f"the letter or value of one of {len(choices)} choices"
        expected = choice if kind == "choice" else "a number, text or a letter"
        raise DataError(
            f"{where}: answer: expected {expected}, got {str(value)[:80]!r}: {error}"
        ) from None
