"""`reftune score` grades the completions in a file, for debugging a reward."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from reftune.datasets.reading.files import json_lines, read_text
from reftune.datasets.reading.golds import GoldReader
from reftune.datasets.reading.rows import Row
from reftune.errors import DataError, ModelError, RecipeError
from reftune.grading.formats import Format, grades_of
from reftune.grading.formats.nl import Nl
from reftune.grading.formats.program import Program
from reftune.grading.golds import GoldKind
from reftune.grading.rewards import Reward
from reftune.grading.rewards.outcome import Outcome
from reftune.model.encoder import Encoder
from reftune.recipe import Recipe
from reftune.types import Completion, Graded, Problem

LOG = logging.getLogger(__name__)
BATCH = 256
DEFAULT = GoldReader()
Grade = Callable[[Sequence[Problem], Sequence[str]], list[Graded]]
_Row = tuple[Any, Problem, str]


def score_file(
    file: Path, kind: Literal["nl", "program"], *, grading: str = "robust"
) -> Iterator[dict[str, Any]]:
    """Grade a file of completions with the format `kind`; see `score_lines`. Raises: as
    `score_lines`; also RecipeError if the grading is unknown."""
    try:
        format = Nl(grading=grading) if kind == "nl" else Program(grading=grading)
    except ValidationError as error:
        raise RecipeError(f"--grading: {error.errors()[0]['msg']}") from None
    reward = Outcome(partial_on_choices=grading == "paper")
    grade = partial(grades_of, format)
    return score_lines(read_text(file).split("\n"), grade, reward, where=str(file))


def score_as_recipe(file: Path, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Grade a file of completions with a recipe's format, chat template, answer kind, sandbox,
    limits and reward. Raises: as `score_lines`; also RewardError if the reward fails."""
    from reftune.stages.rollouts import rewards_of

    return score_lines(
        read_text(file).split("\n"),
        _grade_of(recipe),
        partial(rewards_of, recipe.reward),
        where=str(file),
        golds=golds_of(recipe.dataset, recipe.format),
    )


def _grade_of(recipe: Recipe) -> Grade:
    """The function that grades completions as in training. With the `chat` style, it needs the
    tokenizer, because the chat template may begin a thought (`<think>`) that the completion
    continues. If the tokenizer cannot be loaded, a warning is logged, and completions are graded as
    if the template did not begin a thought."""
    if getattr(recipe.format, "style", None) == "chat" and recipe.model.path is not None:
        from reftune.model.weights import load_tokenizer

        try:
            return Encoder(load_tokenizer(recipe.model), recipe.format).grade
        except ModelError as error:
            LOG.warning(
                "graded as if the chat template did not begin a thought (such as <think>): %s",
                error,
            )
    return partial(grades_of, recipe.format)


def golds_of(dataset: object, format: Format) -> GoldReader:
    """The dataset's reader of gold answers. It expects decimal commas if the dataset or the format
    has them."""
    golds = getattr(dataset, "golds", None)
    if not isinstance(golds, GoldReader):  # a user's dataset, which may have these keys
        golds = GoldReader(
            kind=getattr(dataset, "answer_kind", "auto"), decimal=getattr(dataset, "decimal", ".")
        )
    has_commas = "," in (golds.decimal, getattr(format, "decimal", "."))
    return replace(golds, decimal="," if has_commas else ".")


def score_lines(
    lines: Iterable[str], grade: Grade, reward: Reward, *, where: str, golds: GoldReader = DEFAULT
) -> Iterator[dict[str, Any]]:
    """Grade lines of `{"id", "completion", "answer", "choices"?, "answer_kind"?}`. Keys marked `?`
    are optional. Yields `{"id", "verdict", "value", "reward", "reason"}` for each line.

    `where` is the file's name. `golds` reads the choices and gold answers; a line's `answer_kind`
    replaces `golds.kind`. Raises: DataError, before the first result, if a line cannot be read. The
    error names the file and the line.
    """
    rows = [_row(row, place, golds) for place, row in json_lines(where, lines)]
    if not rows:
        raise DataError(
            f"{where}: empty; expected an object with id, completion and answer on each line"
        )
    for start in range(0, len(rows), BATCH):
        keys, problems, texts = zip(*rows[start : start + BATCH], strict=True)
        grades = grade(problems, texts)
        completions = [
            Completion(token_ids=(), text=text, logprobs=(), finish_reason="eos") for text in texts
        ]
        rewards = reward(problems, completions, grades)
        for key, graded, earned in zip(keys, grades, rewards, strict=True):
            yield {
                "id": key,
                "verdict": graded.verdict.value,
                "value": graded.value,
                "reward": earned,
                "reason": graded.reason,
            }


def _row(row: Mapping[str, Any], where: str, golds: GoldReader) -> _Row:
    missing = [key for key in ("id", "completion", "answer") if row.get(key) is None]
    if missing:
        raise DataError(f"{where}: {missing[0]} is missing; expected id, completion and answer")
    if not isinstance(row["completion"], str):
        raise DataError(
            f"{where}: completion: expected a string, got {type(row['completion']).__name__}"
        )
    return row["id"], problem_of(row, where, golds), row["completion"]


def problem_of(row: Mapping[str, Any], where: str, golds: GoldReader = DEFAULT) -> Problem:
    """A problem from `{"id", "answer", "choices"?, "question"?, "answer_kind"?}`; keys marked `?`
    are optional. Answer and choices are read as in `jsonl` data, with two exceptions. First, an
    answer of kind `choice` needs no choices. Second, an answer that is both one option's label and
    another option's text is always read as the label; in `jsonl` data, other rows may decide how it
    is read.
    Raises: DataError, whose message begins with `where`, if the answer or the choices are
    invalid."""
    if row.get("answer") is None:
        raise DataError(f"{where}: answer is missing; expected a number, text or a letter")
    kind = golds.kind if row.get("answer_kind") is None else row["answer_kind"]
    if kind not in get_args(GoldKind):
        known = ", ".join(get_args(GoldKind))
        raise DataError(f"{where}: answer_kind: {str(kind)[:80]!r}; expected one of {known}")
    golds = replace(golds, kind=kind)
    options = golds.options(Row(where=where, id=str(row["id"]), columns=row), "choices")
    try:
        answer, _ = golds.gold(row["answer"], options)
    except DataError as error:
        raise DataError(f"{where}: answer is {error}") from None
    return Problem(
        id=str(row["id"]),
        question="" if row.get("question") is None else str(row["question"]),
        answer=answer,
        choices=() if options is None else options.texts,
        decimal=golds.decimal,
        columns={key: value for key, value in row.items() if key not in ("id", "completion")},
    )
