"""Reads the rows of a local file, a folder with one file per split, or a Hub dataset. Every row
records its location for error messages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from reftune.datasets.reading.files import (
    READERS,
    as_written,
    ending,
    first_line,
    plain,
    read_file,
    type_name,
)
from reftune.errors import DataError
from reftune.grading.golds import number_gold
from reftune.recipe import local_path
from reftune.text import shown
from reftune.types import Answer

SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "dev": ("dev", "validation", "valid", "val"),
    "test": ("test",),
}
"""Split → possible names of the split's file in a folder, without the extension. They are tried
in this order. On the Hub, the dev split is called `validation`."""
MISSING = object()
_HALF_PAIR = re.compile("[\ud800-\udfff]")
"""Matches one half of a surrogate pair. JSON writes some characters, such as emoji, as a pair."""
_SHARD = re.compile(r"-(\d+)-of-(\d+)\b")
"""Matches the end of a shard's name: its number, and the number of shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One record of a data source. Methods that take a column's name also accept the path of a
    nested column, such as `reward_model.ground_truth`."""

    where: str
    """`file:line`, or the source and the row's number if the source has no lines."""
    id: str
    """`FILE-N` for row N of a file, or `NAME-SPLIT-N` on the Hub. Used if the data has no ids."""
    columns: Mapping[str, Any]

    def text(self, column: str) -> str:
        """The column's text. Raises: DataError if the value is missing, empty or not text."""
        value = self.value(column)
        if not isinstance(value, str) or not value.strip():
            is_column = isinstance(value, Mapping) and "0" in value
            hint = " (in pandas, write to_json with orient='records')" * is_column
            raise DataError(f"{self.where}: {column} is {shown(value)}; expected text{hint}")
        self.refuse_half_pairs(column)
        return value.strip()

    def refuse_half_pairs(self, *columns: str) -> None:
        """Raises: DataError if text in one of the columns contains half a surrogate pair, which
        neither a tokenizer nor a file accepts."""
        for column in columns:
            value = self.get(column)
            if any(_HALF_PAIR.search(text) for text in _texts(value)):
                raise DataError(
                    f"{self.where}: {column} is {shown(value)}, which contains half a surrogate"
                    " pair; expected text"
                )

    def optional_text(self, column: str) -> str | None:
        """Like `text`, but None if the column is missing, null or blank."""
        return None if self.is_blank(column) else self.text(column)

    def is_blank(self, column: str) -> bool:
        """Whether the column is missing, null or blank."""
        value = self.get(column)
        return value is None or (isinstance(value, str) and not value.strip())

    def number_gold(self, column: str) -> Answer:
        """The gold number in a column. Raises: DataError if the value is not a single number."""
        value = self.value(column)
        answer = number_gold(value)
        if answer is None:
            raise DataError(f"{self.where}: {column} is {shown(value)}; expected a number")
        return answer

    def others(self, *used: str) -> dict[str, Any]:
        """Name → value, for all columns that are not in `used`."""
        return {name: value for name, value in self.columns.items() if name not in used}

    def value(self, column: str) -> Any:
        """The column's value. Raises: DataError if the row has no such column."""
        value = self.get(column, MISSING)
        if value is MISSING:
            raise DataError(
                f"{self.where}: no column {column!r}; expected one of"
                f" {', '.join(map(str, self.columns))}"
            )
        return value

    def get(self, column: str, default: object = None) -> Any:
        """Like `value`, but returns `default` if the row has no such column."""
        if column in self.columns:
            return self.columns[column]
        value: Any = self.columns
        for name in column.split("."):
            if not isinstance(value, Mapping) or name not in value:
                return default
            value = value[name]
        return value


def _texts(value: object) -> Iterator[str]:
    """All texts in a cell, however nested."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | Sequence):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)


def read_rows(
    source: str, split: str, *, names: Sequence[str] = (), revision: str | None = None
) -> list[Row]:
    """All rows of `split` (`train`, `dev` or `test`).

    `source` is one of these:

    - a file whose extension is in `READERS`
    - a folder of such files, or of Parquet shards
    - a Hub id, `owner/name[:config[:split]]`, which is read at `revision`

    In a folder, the first file of `names` that exists is read. If none exists, the file or the
    shards named after the split are read. Files other than Parquet may be gzipped. Raises:
    DataError if the source cannot be read or has no rows in the split.
    """
    path = _path(source)
    if path.is_dir():
        rows = [row for file in _files_of_split(path, split, names) for row in _rows_of(file)]
    elif path.is_file():
        rows = _rows_of(path)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:[^/:]*){0,2}", source) and ending(path) not in READERS:
        rows = _read_hub(source, split, revision)
    else:
        raise DataError(
            f"{source}: no such file or folder; expected one, or a Hub id like owner/name"
        )
    if not rows:
        raise DataError(f"{source}: no rows in the {split} split; expected at least one")
    return rows


def is_single_split(source: str) -> bool:
    """Whether `source` is a file, or a Hub id that names a split. Raises: DataError if the
    system rejects `source` as a path."""
    path = _path(source)
    return path.is_file() or (not path.exists() and _hub_parts(source)[2] != "")


def _path(source: str) -> Path:
    """The source as a path. Raises: DataError if the system rejects the path."""
    path = local_path(source)
    try:
        path.exists()
    except OSError as error:
        raise DataError(f"{shown(source)}: cannot be read: {error.strerror}") from None
    return path


def refuse_type_changes(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Check that each column has values of only one type. Null fits every type. Raises: DataError
    for the first row whose value differs in type from the values in earlier rows."""
    for column in columns:
        filled = [(row, value) for row in rows if (value := row.get(column)) is not None]
        for row, value in filled:
            if type_name(value) != (expected := type_name(filled[0][1])):
                raise DataError(
                    f"{row.where}: {column} is {shown(value)}, {type_name(value)}; "
                    f"expected {expected}, as in the earlier rows (from {filled[0][0].where} on)"
                )


def _rows_of(path: Path) -> list[Row]:
    stem = Path(path.name.removesuffix(".gz")).stem
    return [
        Row(where=where, id=f"{stem}-{number}", columns=plain(columns))
        for number, (where, columns) in enumerate(read_file(path), start=1)
    ]


def _files_of_split(folder: Path, split: str, names: Sequence[str]) -> list[Path]:
    stems = SPLIT_NAMES[split]
    files = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_file()}
    for name in names:
        if name.lower() in files:
            return [files[name.lower()]]
    for stem in stems:
        usual = [f"{stem}{kind}{zipped}" for kind, zipped in product(READERS, ("", ".gz"))]
        found = [files[name] for name in usual if name in files]
        if len(found) > 1:
            several = " and ".join(path.name for path in found)
            raise DataError(f"{folder}: {several} are both the {split} split; expected one file")
        if found:
            return found
    for place, stem in product(("", "data/"), stems):
        shards = sorted(folder.glob(f"{place}{stem}-*.parquet"))
        if shards:
            _refuse_missing(folder, shards)
            return shards
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    wanted = ", ".join([*names[:2], *(f"{stem}.jsonl" for stem in stems)])
    is_saved = any(folder.glob("*.arrow")) or (folder / "dataset_dict.json").is_file()
    hint = f" (instead of save_to_disk, use to_parquet('{stems[0]}.parquet'))" * is_saved
    raise DataError(
        f"{folder}: no file for the {split} split, found {there}; expected one like {wanted}{hint}"
    )


def _refuse_missing(folder: Path, shards: Sequence[Path]) -> None:
    """Raises: DataError if a shard is missing, as when `train-00000-of-00002` is the only one."""
    found = [match for path in shards if (match := _SHARD.search(path.stem)) is not None]
    for total, count in Counter(int(match[2]) for match in found).items():
        if count < total:
            raise DataError(
                f"{folder}: {count} of {total} files like {shards[0].name}; expected all of them,"
                " or the name of one file instead of the folder"
            )


def _hub_parts(source: str) -> tuple[str, str, str]:
    """Name, configuration and split of a Hub id. A part that the id omits is an empty string."""
    name, config, split = (*source.split(":"), "", "")[:3]
    return name, config, split


def _read_hub(source: str, split: str, revision: str | None) -> list[Row]:
    import datasets

    name, config, chosen = _hub_parts(source)
    chosen = chosen or ("validation" if split == "dev" else split)
    try:
        records = datasets.load_dataset(name, config or None, split=chosen, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source}: cannot load the {chosen} split from the Hub ({first_line(error)}), and"
            " there is no such file or folder"
        ) from None
    schema = records.features.arrow_schema
    where, stem = f"{source}: {chosen} row", f"{name.rpartition('/')[2]}-{chosen}"
    return [
        Row(where=f"{where} {number}", id=f"{stem}-{number}", columns=plain(record))
        for number, record in enumerate(as_written(records, schema), start=1)
    ]
