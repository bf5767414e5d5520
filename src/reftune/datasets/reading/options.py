"""Reads the options of a multiple-choice row, in any of the usual layouts."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reftune.datasets.reading.rows import Row
from reftune.errors import DataError
from reftune.grading.golds import literal
from reftune.grading.options import unlettered
from reftune.text import shown

MOST = len(string.ascii_lowercase)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    """The data's label for each option, in lower case; empty if the options have no labels."""

    def letter(self, gold: str, positions_from: int | None) -> str | None:
        """The letter of the option with the label `gold` or, failing that, at position `gold`,
        counted from `positions_from`. None if there is no such option."""
        label, places = gold.strip().strip("().").lower(), range(len(self.texts))
        if label in self.labels:
            return string.ascii_lowercase[self.labels.index(label)]
        if positions_from is None or not label.isdecimal():
            return None
        place = int(label) - positions_from
        return string.ascii_lowercase[place] if place in places else None


def read_options(row: Row, columns: str | Sequence[str]) -> Options:
    """The options of a row. A single column contains a list of option texts,
    `{text: […], label: […]}`, a list of `{text, label}`, a mapping from labels to texts, or one of
    these written as a string. If there are several columns, each contains one option, and empty
    columns are skipped.

    Raises: DataError if the only column is missing, or if there are not 2 to 26 options.
    """
    if not isinstance(columns, str):
        found = {column[-1].lower(): row.get(column) for column in columns}
        value: Any = {label: text for label, text in found.items() if text is not None}
    else:
        value = row.value(columns)
    options = _options(literal(value) if isinstance(value, str) else value)
    if options is None:
        raise DataError(
            f"{row.where}: {columns if isinstance(columns, str) else ', '.join(columns)} is"
            f" {shown(value)}; expected a list of 2 to {MOST} option texts"
        )
    return options


def _options(value: object) -> Options | None:
    labels: Sequence[object] = ()
    if isinstance(value, Mapping) and isinstance(value.get("text"), Sequence):
        labels, value = value.get("label") or (), value["text"]
    elif isinstance(value, Mapping):
        labels, value = list(value), list(value.values())
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
    spelled = tuple(str(label).strip().lower() for label in labels)
    return Options(
        texts=unlettered([str(text).strip() for text in value]),
        labels=spelled if len(spelled) == len(value) else (),
    )
