"""Rows of a data source: a local file, a folder with one file a split, or a Hub dataset.

Every row knows where it stands (`file:line`), so that whatever is wrong with it can be said in one
line.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from reftune.errors import DataError

SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "dev": ("dev", "validation", "valid", "val"),
    "test": ("test",),
}
"""What a split's file may be called in a folder, first choice first. On the Hub, dev is
`validation`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One record of a data source."""

    where: str
    """`file:line`, or the source and the row's number where there are no lines."""
    id: str
    """`FILE-NUMBER`, for data without ids of its own."""
    columns: Mapping[str, Any]

    def text(self, column: str) -> str:
        """The column's text. Raises: DataError where it is missing, empty or something else."""
        value = self.value(column)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{self.where}: {column} is {shown(value)}; expected text")
        if not _is_unicode(value):
            raise DataError(
                f"{self.where}: {column} is {shown(value)}, which holds half a character; expected"
                " text"
            )
        return value.strip()

    def optional_text(self, column: str) -> str | None:
        """As `text`, but None where the column is missing, null or empty."""
        value = self.columns.get(column)
        return None if value is None or value == "" else self.text(column)

    def number(self, column: str) -> Fraction:
        """The column's number, written as one or as text. Raises: DataError."""
        value = self.value(column)
        number = read_value(value)
        if number is None:
            raise DataError(f"{self.where}: {column} is {shown(value)}; expected a number")
        return number

    def others(self, *used: str) -> dict[str, Any]:
        """The columns that are not in `used`."""
        return {name: value for name, value in self.columns.items() if name not in used}

    def value(self, column: str) -> Any:
        """Raises: DataError where the row has no such column."""
        if column not in self.columns:
            raise DataError(
                f"{self.where}: no column {column!r}; expected one among"
                f" {', '.join(map(str, self.columns))}"
            )
        return self.columns[column]


def read_rows(source: str, split: str, *, names: Sequence[str] = ()) -> list[Row]:
    """All rows of `split` (`train`, `dev` or `test`).

    `source` is a .jsonl, .json, .csv, .tsv or .parquet file; a folder of such files called after
    their splits, or as in `names`, which are looked for first; or a Hub id,
    `owner/name[:config[:split]]`.
    Raises: DataError.
    """
    path = _path(source)
    if path.is_dir():
        rows = [row for file in _files_of_split(path, split, names) for row in _read_file(file)]
    elif path.is_file():
        rows = _read_file(path)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:[^/:]*){0,2}", source) and path.suffix not in READERS:
        rows = _read_hub(source, split)
    else:
        raise DataError(
            f"{source}: no such file or folder; expected one, or a Hub id like owner/name"
        )
    if not rows:
        raise DataError(f"{source}: no rows in the {split} split; expected at least one")
    return rows


def is_single_file(source: str) -> bool:
    """Whether `source` holds one split only. Raises: DataError."""
    return _path(source).is_file()


def _path(source: str) -> Path:
    """The source as a path; `~` of a user whom the system does not know stands for itself. Raises:
    DataError."""
    try:
        path = Path(source).expanduser()
    except RuntimeError:
        path = Path(source)
    try:
        path.exists()
    except OSError as error:
        raise DataError(f"{shown(source)}: cannot be read: {error.strerror}") from None
    return path


def refuse_type_changes(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Raises: DataError at the first row whose value is of another type than in the rows before;
    null is of any type."""
    for column in columns:
        first: Row | None = None
        for row in rows:
            value = row.columns.get(column)
            if value is None:
                continue
            if first is None:
                first = row
            elif _type_name(value) != (expected := _type_name(first.columns[column])):
                raise DataError(
                    f"{row.where}: {column} is {shown(value)}, {_type_name(value)}; "
                    f"expected {expected} as in the rows before (from {first.where})"
                )


def read_value(value: object) -> Fraction | None:
    """The number that came as data or out of a program: an int, a finite float, or text that says
    one."""
    from reftune.grading.numbers import read_number

    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return Fraction(value)
    if isinstance(value, float):
        return Fraction(repr(value)) if math.isfinite(value) else None
    return read_number(value) if isinstance(value, str) else None


def shown(value: object) -> str:
    """A value for an error message: one short line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _type_name(value: object) -> str:
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "text"
    return (
        "a list"
        if isinstance(value, Sequence)
        else "a mapping"
        if isinstance(value, Mapping)
        else "of another type"
    )


# --- local files ----------------------------------------------------------------------------------


def _files_of_split(folder: Path, split: str, names: Sequence[str]) -> list[Path]:
    for name in (*names, *(stem + suffix for stem in SPLIT_NAMES[split] for suffix in READERS)):
        if (folder / name).is_file():
            return [folder / name]
    for stem in SPLIT_NAMES[split]:
        shards = sorted(folder.glob(f"{stem}-*.parquet")) or sorted(
            folder.glob(f"data/{stem}-*.parquet")
        )
        if shards:
            return shards
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    wanted = ", ".join([*names[:2], *(f"{stem}.jsonl" for stem in SPLIT_NAMES[split])])
    raise DataError(
        f"{folder}: no file of the {split} split, found {found}; expected one like {wanted}"
    )


def _read_file(path: Path) -> list[Row]:
    reader = READERS.get(path.suffix)
    if reader is None:
        raise DataError(
            f"{path}: cannot read {path.suffix or 'a file without ending'}; expected"
            f" {', '.join(READERS)}"
        )
    return [
        Row(where=where, id=f"{path.stem}-{number}", columns=columns)
        for number, (where, columns) in enumerate(reader(path), start=1)
    ]


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte {data[error.start]:#04x} is not UTF-8; expected UTF-8 text"
        ) from None


_Records = Iterator[tuple[str, Mapping[str, Any]]]


def _read_json(path: Path) -> _Records:
    """A list of objects, or one object a line: both are found under this ending."""
    text = _read_text(path)
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    decoder = json.JSONDecoder()
    position, line, counted = _skip_space(text, text.index("[") + 1), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{error.lineno}: not valid JSON ({error.msg}); expected a list of objects"
            ) from None
        except (RecursionError, ValueError) as error:
            raise DataError(
                f"{path}:{line}: not valid JSON ({error}); expected a list of objects"
            ) from None
        yield f"{path}:{line}", _mapping(value, f"{path}:{line}")
        position = _skip_space(text, position)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            raise DataError(
                f"{path}:{line}: the list breaks off; expected a comma or a closing bracket"
            )


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\n", "\r", "\t"):
        position += 1
    return position


def _read_jsonl(path: Path) -> _Records:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(
                f"{where}: not valid JSON ({reason}); expected one object a line"
            ) from None
        yield where, _mapping(value, where)


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where}: {shown(value)} is {_type_name(value)}; expected an object with named columns"
        )
    return value


def _read_csv(path: Path) -> _Records:
    """Comma-separated, or tab-separated where the ending is .tsv; the first line names the columns;
    empty is null."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            if fields and header is None:
                header = fields
                if len(set(header)) < len(header) or not all(header):
                    raise DataError(f"{path}:{line}: columns {header}; expected names, each once")
            elif fields and header is not None:
                if len(fields) != len(header):
                    raise DataError(
                        f"{path}:{line}: {len(fields)} fields; expected {len(header)} as in the"
                        " first line"
                    )
                yield (
                    f"{path}:{line}",
                    {name: field or None for name, field in zip(header, fields, strict=True)},
                )
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{line}: not valid CSV ({error}); expected rows as the first line names them"
        ) from None


def _read_parquet(path: Path) -> _Records:
    import pyarrow
    from pyarrow import parquet

    try:
        records = parquet.read_table(path).to_pylist()
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        OverflowError,
    ) as error:  # of a text that is not UTF-8, a date too far
        raise DataError(f"{path}: not a readable parquet file ({_first_line(error)})") from None
    for number, record in enumerate(records, start=1):
        yield f"{path}: row {number}", record


READERS: Mapping[str, Callable[[Path], _Records]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


# --- the Hub --------------------------------------------------------------------------------------


def _read_hub(source: str, split: str) -> list[Row]:
    import datasets

    name, config, chosen = (*source.split(":"), "", "")[:3]
    chosen = chosen or ("validation" if split == "dev" else split)
    try:
        records = datasets.load_dataset(name, config or None, split=chosen)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = _first_line(error)
        raise DataError(
            f"{source}: cannot load the {chosen} split from the Hub ({reason}), and no such file or"
            " folder"
        ) from None
    stem = name.rpartition("/")[2]
    return [
        Row(
            where=f"{source}: {chosen} row {number}", id=f"{stem}-{chosen}-{number}", columns=record
        )
        for number, record in enumerate(records, start=1)
    ]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
