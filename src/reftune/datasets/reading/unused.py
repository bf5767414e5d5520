"""Finds columns of text that are not used although they may belong to the question."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import islice
from string import punctuation

from reftune.datasets.reading.file_dataset import Split
from reftune.datasets.reading.shapes import NAMES
from reftune.types import Problem

NUM_LOOKED_AT = 100
"""Number of filled cells that are examined to tell whether a column contains text."""
LEAST_WORDS = 3
"""Minimum number of words in a cell of text. Names and categories usually have fewer words."""


def unused_columns(splits: Mapping[Split, Sequence[Problem]], question: Sequence[str]) -> str:
    """One line on the unused columns of train that contain text, with the setting that would make
    them part of the question; empty if there are none. `question` lists the question's columns."""
    train = splits["train"]
    columns = dict.fromkeys(name for problem in train for name in problem.columns)
    found = [name for name in columns if _is_text(name, train)]
    if not found:
        return ""
    everyone = [problem for problems in splits.values() for problem in problems]
    # every row needs text in the first column of the question
    first = [name for name in found if not any(_is_blank(each, name) for each in everyone)]
    joined = [*first, *question, *(name for name in found if name not in first)]
    flags = shlex.join(word for name in joined for word in ("--question", name))
    return (
        f"the text in column{'s' * (len(found) > 1)} {', '.join(found)} is not used; if it belongs"
        f" to the question, set dataset.columns.question=[{','.join(joined)}] (in `reftune init`:"
        f" {flags})"
    )


def _is_text(column: str, problems: Sequence[Problem]) -> bool:
    """Whether most cells of a column are text that is not in the row's question. A column that is
    named like an answer or a rationale does not count."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", column)]
    if {*NAMES["answer"], *NAMES["rationale"]} & {column.lower(), *words}:
        return False
    all_filled = (problem for problem in problems if not _is_blank(problem, column))
    filled = [*islice(all_filled, NUM_LOOKED_AT)]
    return 2 * sum(_adds_text(each.columns[column], each) for each in filled) > len(filled)


def _is_blank(problem: Problem, column: str) -> bool:
    cell = problem.columns.get(column)
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _adds_text(cell: object, problem: Problem) -> bool:
    """Whether a cell is text that neither contains the question nor is part of it."""
    asked = "\n".join([turn.content for turn in problem.messages] or [problem.question])
    if not isinstance(cell, str) or cell.strip() in asked or problem.question in cell:
        return False
    words = [word for word in cell.split() if word.strip(punctuation).isalpha()]
    return len(words) >= LEAST_WORDS
