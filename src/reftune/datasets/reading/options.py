"""Reads the options of a multiple-choice row, in any of the usual layouts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any, TypeGuard

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
    places: tuple[int, ...]
    """The index of each option in the data. Options that the row leaves blank are counted too."""
    labels: tuple[str, ...] = ()
    """The data's label for each option, as `bare` returns it; empty if the options have no
    labels."""

    def letter(self, gold: str, positions_from: int | None) -> str | None:
        """The letter of the option at the position `gold`, counted from `positions_from`, or of the
        option whose label is `gold`. If `positions_from` is set, a whole number is always a
        position; if not, positions are not accepted. Returns None if no option is found."""
        label = bare(gold)
        if positions_from is not None and label.isdecimal():
            place = int(label) - positions_from
            return ascii_lowercase[self.places.index(place)] if place in self.places else None
        return ascii_lowercase[self.labels.index(label)] if label in self.labels else None


def bare(label: str) -> str:
    """A label in lower case, without the brackets around it and the full stop after it: `a` for
    `(A)`."""
    return label.strip().strip("().").lower()


def read_options(row: Row, columns: str | Sequence[str], reading: Reading) -> Options | None:
    """The options of a row; None if the columns are empty or missing. If `columns` is a single
    column, it contains one of the following, possibly written as a string:

    - a list of option texts
    - a list of `{text, label}`
    - `{text: […], label: […]}`
    - a mapping from labels to texts

    If there are several columns, each contains one option, and blank columns are skipped. If the
    names of the columns end in consecutive letters or numbers, as in `option_a`, `option_b`, these
    letters or numbers are the labels. Texts that are null are skipped, except in a list of
    texts. Options stored as numbers rather than text are written with the decimal separator of
    `reading`.

    Raises: DataError if the options have another layout, or if there are fewer than 2 or more than
    26 of them.
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
    """Whether a cell is null, blank, an empty list, or a mapping of only empty cells. The texts
    "null" and "[]" count as empty too."""
    if isinstance(cell, Mapping):
        return all(map(is_empty, cell.values()))
    if isinstance(cell, str):
        return cell.strip() in ("", "[]", "null")
    return cell is None or (isinstance(cell, list) and not cell)


def _in_columns(row: Row, columns: Sequence[str]) -> list[Any]:
    """The options in several columns, with their labels if the columns' names contain labels."""
    texts = [None if row.is_blank(name) else row.get(name) for name in columns]
    labels = [re.sub(r".*?(\d+|.)$", r"\1", name.lower()) for name in columns]
    places = [int(label) if label.isdecimal() else ord(label) for label in labels]
    is_labelled = sorted(places) == list(range(min(places), min(places) + len(columns)))
    pairs = zip(labels, texts, strict=True)
    return [{"label": label if is_labelled else None, "text": text} for label, text in pairs]


def _options(value: object, reading: Reading) -> Options | None:
    filled = [
        (place, label, text)
        for place, (label, text) in enumerate(_labelled(value))
        if text is not None
    ]
    is_valid = 2 <= len(filled) <= MOST
    if not is_valid or not all(isinstance(text, str | int | float) for _, _, text in filled):
        return None
    places, labels, values = zip(*filled, strict=True)
    texts = [x if isinstance(x, str) else with_separator(str(x), reading.decimal) for x in values]
    return Options(
        texts=unlettered([text.strip() for text in texts]),
        places=places,
        labels=() if None in labels else tuple(bare(str(label)) for label in labels),
    )


def _labelled(value: Any) -> list[tuple[Any, Any]]:
    """The label and the text of each option, where known. Empty if `value` has an unknown
    layout."""
    if isinstance(value, Mapping) and "text" in value:
        labels, texts = value.get("label"), value["text"]
        if not _is_list(texts):
            return []
        if not _is_list(labels) or len(labels) != len(texts):
            labels = [None] * len(texts)
        return [*zip(labels, texts, strict=True)]
    if isinstance(value, Mapping):
        return [pair for pair in value.items() if pair[1] is not None]  # null: no such label
    if not _is_list(value):
        return []
    if all(isinstance(item, Mapping) and "text" in item for item in value):
        return [(item.get("label"), item["text"]) for item in value]
    return [] if None in value else [(None, text) for text in value]


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    is_sequence = isinstance(value, Sequence) or hasattr(value, "__array__")  # numpy, pandas
    return is_sequence and not isinstance(value, str)
