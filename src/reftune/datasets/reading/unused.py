"""Finds columns that are not used although they may belong to the question."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import islice
from string import punctuation

from reftune.datasets.reading.file_dataset import Split
from reftune.datasets.reading.shapes import NAMES, Columns
from reftune.types import Problem

NUM_LOOKED_AT = 100
"""Number of filled cells that are examined to tell whether a column contains text."""
LEAST_IN_LIST = 8
"""An item of a list is long if it has at least this many words. Tags usually have fewer."""
SAMPLES = frozenset(
    "answers completions generations outputs rationales responses solutions".split()
)
"""Names of columns with lists of solutions, which do not belong to the question."""
LEAST_WORDS = 3
"""Minimum number of words in a cell of text. Names and categories usually have fewer words."""


def unused_columns(splits: Mapping[Split, Sequence[Problem]], used: Columns) -> tuple[str, ...]:
    """Notes on the unused columns of the training data that may belong to the question. One note
    names the text columns and the setting that would make them part of the question. A second note
    names columns whose cells are lists, such as the earlier turns of a conversation or several
    passages. Columns of images are named only if a question contains `<image>`."""
    train, notes = splits["train"], []
    columns = dict.fromkeys(name for problem in train for name in problem.columns)
    unused = [name for name in columns if name not in used.names]
    if found := [name for name in unused if _is_text(name, train)]:
        everyone = [problem for problems in splits.values() for problem in problems]
        # every row needs text in the first column of the question
        first = [name for name in found if not any(_is_blank(each, name) for each in everyone)]
        joined = [*first, *used.asked, *(name for name in found if name not in first)]
        flags = shlex.join(word for name in joined for word in ("--question", name))
        notes.append(
            f"the text in column{'s' * (len(found) > 1)} {', '.join(found)} is not used; if it"
            f" belongs to the question, set dataset.columns.question=[{','.join(joined)}] (in"
            f" `reftune init`: {flags})"
        )
    if found := [name for name in unused if any(_adds_list(name, problem) for problem in train)]:
        notes.append(
            f"the lists in column{'s' * (len(found) > 1)} {', '.join(found)} are not used; if they"
            " belong to the question, write them as text, or as turns of a conversation (images"
            " are not supported)"
        )
    return tuple(notes)


def _adds_list(column: str, problem: Problem) -> bool:
    cell, name = problem.columns.get(column), column.lower()
    if not isinstance(cell, Sequence) or isinstance(cell, str) or not cell or name in SAMPLES:
        return False
    if name in ("image", "images"):
        return "<image>" in problem.question
    is_long = (isinstance(item, str) and len(item.split()) >= LEAST_IN_LIST for item in cell)
    return name == "history" or (any(is_long) and problem.question not in cell)


def _is_text(column: str, problems: Sequence[Problem]) -> bool:
    """Whether most of the column's first `NUM_LOOKED_AT` filled cells are texts of at least
    `LEAST_WORDS` words. A text that only repeats a part of the row's question does not count. If
    the column's name suggests answers or rationales, the result is False."""
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
