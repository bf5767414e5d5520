"""Reads the options of a multiple-choice row, in any of the usual layouts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

from reftune.datasets.reading.rows import Row
from reftune.errors import DataError
from reftune.grading.decimals import with_separator
from reftune.grading.golds import literal
from reftune.grading.markers import Reading
from reftune.grading.options import unlettered
from reftune.text import shown

MOST = len(ascii_lowercase)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The options of a row, in the order of the data."""

    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    """The data's label for each option, in lower case; empty if the options have no labels."""

    def letter(self, gold: str, positions_from: int | None) -> str | None:
        """The letter of the option whose label is `gold`. If there is no such option, `gold` may be
        the position of an option, counted from `positions_from` (None: positions are not accepted).
        Returns None if no option is found."""
        label = bare(gold)
        if label in self.labels:
            return ascii_lowercase[self.labels.index(label)]
        if positions_from is None or not label.isdecimal():
            return None
        place = int(label) - positions_from
        return ascii_lowercase[place] if place in range(len(self.texts)) else None


def bare(label: str) -> str:
    """A label without brackets and final points, in lower case: `a` for `(A)`."""
    return label.strip().strip("().").lower()


def read_options(row: Row, columns: str | Sequence[str], reading: Reading) -> Options | None:
    """The options of a row; None if the columns are empty or missing. If `columns` is a single
    column, it contains one of the following, possibly written as a string:

    - a list of option texts
    - a list of `{text, label}`
    - `{text: […], label: […]}`
    - a mapping from labels to texts, in which nulls are skipped

    If there are several columns, each contains one option, and blank columns are skipped. If the
    names of the columns end in consecutive letters or numbers, as in `option_a`, `option_b`, these
    letters or numbers are the labels. Options stored as numbers rather than text are written
    with the decimal separator of `reading`.

    Raises: DataError if there are not 2 to 26 options.
    """
    names = [columns] if isinstance(columns, str) else columns
    if all(is_empty(row.get(name)) for name in names):
        return None
    value = row.get(columns) if isinstance(columns, str) else _in_columns(row, columns)
    options = _options(literal(value) if isinstance(value, str) else value, reading)
    if options is None:
        raise DataError(
            f"{row.where}: {', '.join(names)} is {shown(value)}; expected a list of 2 to {MOST}"
            " option texts"
        )
    return options


def is_empty(cell: object) -> bool:
    """Whether a cell is null, blank, an empty list, or a mapping of only empty cells. Null and the
    empty list may be written as text."""
    if isinstance(cell, Mapping):
        return all(map(is_empty, cell.values()))
    if isinstance(cell, str):
        return cell.strip() in ("", "[]", "null")
    return cell is None or cell == []


def _in_columns(row: Row, columns: Sequence[str]) -> Mapping[str, Any] | list[Any]:
    """The options in several columns, with their labels if the columns' names contain labels."""
    filled = [(name, row.get(name)) for name in columns if not row.is_blank(name)]
    labels = {name: re.sub(r".*?(\d+|.)$", r"\1", name.lower()) for name in columns}
    places = [int(label) if label.isdecimal() else ord(label) for label in labels.values()]
    if sorted(places) == list(range(min(places), min(places) + len(columns))):
        return {labels[name]: text for name, text in filled}
    return [text for _, text in filled]


def _options(value: object, reading: Reading) -> Options | None:
    labels: Sequence[object] = ()
    if isinstance(value, Mapping) and isinstance(value.get("text"), Sequence):
        labels, value = value.get("label") or (), value["text"]
    elif isinstance(value, Mapping):
        filled = {label: text for label, text in value.items() if text is not None}
        labels, value = list(filled), list(filled.values())
    elif isinstance(value, Sequence) and all(
        isinstance(item, Mapping) and "text" in item for item in value
    ):
        labels, value = [item.get("label") for item in value], [item["text"] for item in value]
    if (
        isinstance(value, str)
        or not isinstance(value, Sequence)
        or not 2 <= len(value) <= MOST
        or not all(isinstance(text, (str, int, float)) for text in value)
    ):
        return None
    texts = [x if isinstance(x, str) else with_separator(str(x), reading.decimal) for x in value]
    spelled = tuple(str(label).strip().lower() for label in labels if label is not None)
    return Options(
        texts=unlettered([text.strip() for text in texts]),
        labels=spelled if len(spelled) == len(value) else (),
    )
