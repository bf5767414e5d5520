"""Reads the records of local files and notes the location of each record. CSV is read with the
standard library, because pandas would lose line numbers and change cells such as `007` and `NA`."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import logging
import math
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path, PurePath
from typing import Any

from reftune.errors import DataError
from reftune.text import counted, shown

LOG = logging.getLogger(__name__)
Records = Iterator[tuple[str, Mapping[str, Any]]]
"""(location, columns) of each record. The location is `file:line` or, in Parquet, `file: row n`."""
Line = tuple[str, Sequence[str | None]]
"""(`file:line`, cells) of a line of a table."""
DELIMITERS = ",;\t|"
"""Possible delimiters of CSV. The delimiter that splits the first line into the most columns is
used. In a tie, the delimiter listed first here wins."""
TYPE_NAMES: Mapping[type, str] = {
    bool: "a truth value",
    int: "a number",
    float: "a number",
    str: "text",
    Sequence: "a list",
    Mapping: "a mapping",
}
JSON = json.JSONDecoder(parse_constant=lambda name: None if name == "NaN" else float(name))
"""Reads NaN, which pandas writes for a missing value, as null."""


def ending(path: PurePath) -> str:
    """A file name's extension in lower case, ignoring `.gz`: `.csv` for `Data.CSV.gz`."""
    return PurePath(path.name.lower().removesuffix(".gz")).suffix


def read_file(path: Path) -> Records:
    """The records of a file. The extension indicates the format. Raises: DataError if the file
    cannot be read. If possible, the message names the line."""
    reader = READERS.get(ending(path))
    if reader is None:
        raise DataError(
            f"{path}: cannot read {ending(path) or 'a file without an extension'}; expected"
            f" {', '.join(READERS)}"
        )
    return reader(path)


def type_name(value: object) -> str:
    """The name of a value's type in error messages."""
    names = (name for kind, name in TYPE_NAMES.items() if isinstance(value, kind))
    return next(names, "of another type")


# --- text -----------------------------------------------------------------------------------------


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.name.lower().endswith(".gz") else data
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}") from None


def read_text(path: Path, *, fallback: str | None = None) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark. Any other file is read in
    the encoding `fallback`, if given. Raises: DataError if the file cannot be read or decoded."""
    data = _read_bytes(path)
    is_utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    mark = codecs.BOM_UTF8 * data.startswith(codecs.BOM_UTF8)
    try:
        return data.decode("utf-16") if is_utf16 else data.removeprefix(mark).decode()
    except UnicodeDecodeError as error:
        place = error.start + len(mark)
        line, byte = data.count(b"\n", 0, place) + 1, data[place]
        name = "UTF-16" if is_utf16 else "UTF-8"
    if fallback is not None and not is_utf16 and not mark:
        with suppress(UnicodeDecodeError):
            text = data.decode(fallback)
            LOG.warning("%s:%d: byte %#04x is not UTF-8; read as %s", path, line, byte, fallback)
            return text
    raise DataError(f"{path}:{line}: byte {byte:#04x} is not {name}; expected {name} text")


# --- JSON -----------------------------------------------------------------------------------------


def _read_json(path: Path) -> Records:
    """The records of a file that contains a JSON list of records, a JSON object with one such list,
    or JSON lines."""
    text = read_text(path)
    try:
        whole = JSON.decode(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise DataError(
                f"{path}:{getattr(error, 'lineno', 1)}: not valid JSON"
                f" ({getattr(error, 'msg', error)}); expected a list of objects"
            ) from None
        whole = None
    if isinstance(whole, list):
        return _json_list(path, text, text.index("[") + 1)
    items = whole.items() if isinstance(whole, dict) else ()
    tables = [key for key, value in items if _is_table(value)]
    if len(tables) != 1:
        return json_lines(path, text.split("\n"))
    key = tables[0]
    places = [*re.finditer(rf"{re.escape(json.dumps(key, ensure_ascii=False))}\s*:\s*\[", text)]
    if len(places) == 1:
        return _json_list(path, text, places[0].end())
    where, items = f"{path}: {key}, item", whole[key]
    return ((f"{where} {n}", _mapping(item, f"{where} {n}")) for n, item in enumerate(items, 1))


def _read_jsonl(path: Path) -> Records:
    return json_lines(path, read_text(path).split("\n"))


def _is_table(value: object) -> bool:
    """Whether a value is a list of objects that are not the turns of a conversation."""
    return isinstance(value, list) and any(
        isinstance(item, dict) and not {"role", "from"} & set(item) for item in value
    )


def _json_list(path: Path, text: str, position: int) -> Records:
    """The objects in a valid JSON list, whose content begins at index `position` in `text`."""
    item, line, counted = re.compile(r"[\s,]*(?=[^\s,\]])"), 1, 0
    while begins := item.match(text, position):
        line, counted = line + text.count("\n", counted, begins.end()), begins.end()
        value, position = JSON.raw_decode(text, begins.end())
        yield f"{path}:{line}", _mapping(value, f"{path}:{line}")


def json_lines(name: object, lines: Iterable[str]) -> Records:
    """The JSON objects in `lines`, one per line. Empty lines are skipped. Raises: DataError, with
    `name` and the line's number in the message, for a line that is not a JSON object."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            value = json.loads(line, parse_constant=JSON.parse_constant)  # its error names a BOM
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise DataError(
                f"{where}: not valid JSON ({reason}); expected one object per line"
            ) from None
        yield where, _mapping(value, where)


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where}: {shown(value)} is {type_name(value)}; expected an object with named columns"
        )
    return value


# --- tables ---------------------------------------------------------------------------------------


def _read_csv(path: Path) -> Records:
    """The rows of a table in UTF-8, UTF-16 or Windows-1252 (which Excel still writes). A first line
    such as `sep=;` sets the delimiter. Without such a line, a `.tsv` file is split at tabs if there
    is a tab in its first line. In all other cases, the delimiter is whichever of `DELIMITERS`
    splits the first line into the most columns."""
    text = read_text(path, fallback="cp1252")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            f"{path}:{line}: contains a NUL; expected UTF-8, or UTF-16 with a byte order mark"
        )
    if "\n" not in text:  # line endings of old Macs
        text = text.replace("\r", "\n")
    separator = re.match(r"sep=(.)\r?\n", text)  # Excel understands such a line
    body = text if separator is None else text[separator.end() :]
    delimiter = _delimiter(path, body) if separator is None else separator[1]
    return _table(_csv_lines(path, body, delimiter, 1 if separator is None else 2))


def _delimiter(path: Path, text: str) -> str:
    first = re.split(r"[\r\n]", text.lstrip(), maxsplit=1)[0]
    if ending(path) == ".tsv" and "\t" in first:
        return "\t"
    return max(
        DELIMITERS, key=lambda delimiter: len(next(csv.reader([first], delimiter=delimiter), []))
    )


def _csv_lines(path: Path, text: str, delimiter: str, first: int) -> Iterator[Line]:
    csv.field_size_limit(sys.maxsize)  # long cells are handled later, when tokens are counted
    lines = list(io.StringIO(text, newline=""))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    line = first
    try:
        for cells in reader:
            joined = lines[line - first : reader.line_num]
            are_rows = len(joined) > 1 and all(x.count("\t") == len(cells) - 1 for x in joined)
            if delimiter == "\t" and are_rows:
                raise DataError(
                    f"{path}:{line}: a quotation mark joins this line and the next ones, up to line"
                    f" {first + reader.line_num - 1}; expected one row per line (if the mark is"
                    " text, double it and put the cell in quotation marks, or use JSONL)"
                )
            yield f"{path}:{line}", cells
            line = first + reader.line_num
    except csv.Error as error:
        raise DataError(
            f"{path}:{line}: not valid CSV ({error}); expected cells that are quoted correctly"
        ) from None


def _read_xlsx(path: Path) -> Records:
    """The rows of the first sheet, with formulas replaced by their saved values."""
    import openpyxl

    try:
        book = openpyxl.load_workbook(io.BytesIO(_read_bytes(path)), read_only=True, data_only=True)
        sheet = book.worksheets[0]
        sheet.reset_dimensions()  # the stored size may be out of date
        rows = [list(map(_cell, row)) for row in sheet.iter_rows()]
    except _DAMAGED as error:
        raise DataError(f"{path}: not a readable Excel file ({first_line(error)})") from None
    width = max(map(len, rows), default=0)  # a row may lack empty cells at its end
    whole = ([*row, *[None] * (width - len(row))] for row in rows)
    return _table((f"{path}:{n}", row) for n, row in enumerate(whole, start=1))


_DAMAGED: tuple[type[Exception], ...] = (zipfile.BadZipFile, zlib.error, OSError, EOFError)
_DAMAGED += (LookupError, ValueError, TypeError, AttributeError, SyntaxError, NotImplementedError)
"""The errors that openpyxl raises for a damaged file."""


def _cell(cell: Any) -> str | None:
    """A cell of a spreadsheet as text, such as `13`, `0.5` or `2021-03-05`. If the cell shows a
    percentage, so does the text: 0.25 becomes `25%`."""
    value, shown_as = cell.value, re.sub(r'"[^"]*"|\\.', "", cell.number_format or "")
    if value is None:
        return None
    if "%" in shown_as and isinstance(value, int | float) and not isinstance(value, bool):
        return f"{(Decimal(repr(value)) * 100).normalize():f}%"
    if isinstance(value, str):  # Excel writes a carriage return as _x000D_
        value = value.replace("_x000D_", "\r")
    return str(plain(value))


def _table(lines: Iterable[Line]) -> Records:
    """The records of a table. The first line that is not empty names the columns. Empty cells
    become null, and empty lines are skipped. A first column without a name is skipped too, because
    that is how pandas writes its index. Any other column without a name must be empty. Raises:
    DataError if a column's name is repeated, or if a line does not fit the header."""
    filled = (line for line in lines if any(cell is not None and cell.strip() for cell in line[1]))
    where, first = next(filled, ("", ()))
    header = [(cell or "").strip() for cell in first]
    named = [name for name in header if name]
    if len(set(named)) < len(named):
        raise DataError(f"{where}: columns {header}; expected unique names")
    for where, cells in filled:
        if len(cells) < len(header) or any(cells[len(header) :]):
            raise DataError(
                f"{where}: {counted(len(cells), 'field')}; expected {len(header)} as in the first"
                " line"
            )
        pairs = list(zip(header, cells, strict=False))
        if nameless := [cell for name, cell in pairs[1:] if not name and cell]:
            raise DataError(
                f"{where}: {shown(nameless[0])} is in a column without a name; expected a name in"
                " the first line"
            )
        yield where, {name: cell or None for name, cell in pairs if name}


def _read_parquet(path: Path) -> Records:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
        records = table.to_pylist()
    # ValueError: text that is not UTF-8; OverflowError: a date out of range
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: not a readable parquet file ({first_line(error)})") from None
    for number, record in enumerate(as_written(records, table.schema), start=1):
        yield f"{path}: row {number}", record


def as_written(records: Iterable[dict[str, Any]], schema: Any) -> Iterator[dict[str, Any]]:
    """The records of an Arrow table, with 16-bit and 32-bit floats as they were written: 0.1, not
    0.10000000149011612."""
    fields = [field for field in schema if "float" in str(field.type)]
    return ({**record, **_as_written(record, fields)} for record in records)


def _as_written(value: Any, kind: Any) -> Any:
    if isinstance(value, dict):
        return {field.name: _as_written(value[field.name], field.type) for field in kind}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_as_written(each, kind.value_type) for each in value]
    is_short = isinstance(value, float) and kind in ("float16", "float32")
    return float(str(kind.to_pandas_dtype()(value))) if is_short else value


def plain(value: Any) -> Any:
    """The plain form of a value. Line breaks become Unix line breaks. A `Decimal` becomes an int if
    it is whole, and a float if not. Dates and times become text such as `2021-03-05`. NaN becomes
    null."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, str) and "\r" in value:
        return value.replace("\r\n", "\n").replace("\r", "\n")
    if isinstance(value, date | time | timedelta):
        return str(value).removesuffix(" 00:00:00")
    if isinstance(value, Decimal):
        value = int(value) if value == value.to_integral_value() else float(value)
    return None if isinstance(value, float) and math.isnan(value) else value


def first_line(error: Exception) -> str:
    """The first line of an error's message or, without a message, the name of the error's type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


READERS: Mapping[str, Callable[[Path], Records]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".xlsx": _read_xlsx,
    ".parquet": _read_parquet,
}
