"""Files as they occur: Excel's tables, compressed files, other endings, lists inside objects."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import openpyxl
import pyarrow
import pytest
from pyarrow import parquet

from reftune.datasets.reading.rows import Row, read_rows
from reftune.errors import DataError

ROWS = [
    {"question": "A pen is £2.\nTwo pens?", "answer": "007"},
    {"question": 'She said "NA", they left', "answer": "NA"},
]


def table(rows: Sequence[dict[str, str]], delimiter: str, extra: str = "") -> str:
    """A table with every cell quoted, as Excel quotes cells that need it."""
    lines = [delimiter.join(rows[0]) + extra]
    for row in rows:
        cells = ['"' + cell.replace('"', '""') + '"' for cell in row.values()]
        lines.append(delimiter.join(cells) + extra)
    return "\r\n".join(lines) + "\r\n"


def read(path: Path, data: str | bytes) -> list[Row]:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return read_rows(str(path), "train")


def columns(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [dict(row.columns) for row in rows]


@pytest.mark.parametrize("delimiter", list(",;\t|"))
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_a_table_is_read_whatever_its_delimiter_and_encoding(
    tmp_path: Path, delimiter: str, encoding: str
) -> None:
    rows = read(tmp_path / "data.csv", table(ROWS, delimiter).encode(encoding))
    assert columns(rows) == ROWS, "007 and NA stay as they were written"
    assert [row.where.rpartition(":")[2] for row in rows] == ["2", "4"]


def test_tabs_separate_the_columns_of_a_tsv_file(tmp_path: Path) -> None:
    (row,) = read(tmp_path / "data.tsv", "question, as asked, in full\tanswer\nWho?\tTom\n")
    assert row.columns == {"question, as asked, in full": "Who?", "answer": "Tom"}


def test_quotation_marks_in_the_text_of_a_tsv_file_do_not_join_its_lines(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"data\.tsv:3: a quotation mark joins this line .* up to line 5;"
    ):
        read(tmp_path / "data.tsv", 'q\ta\nr\t1\n"Yes\t2\ns\t3\nIt is 12"\t4\nt\t5\n')
    (row,) = read(tmp_path / "data.tsv", 'q\ta\n"Ann\nhas\t3"\t4\n')
    assert row.columns == {"q": "Ann\nhas\t3", "a": "4"}


def test_numbers_of_32_bits_are_read_as_they_were_written(tmp_path: Path) -> None:
    path, numbers = tmp_path / "data.parquet", pyarrow.array([0.1, None, 2.5], pyarrow.float32())
    parquet.write_table(pyarrow.table({"answer": numbers}), path)
    assert [row.get("answer") for row in read_rows(str(path), "train")] == [0.1, None, 2.5]


def test_dates_and_times_in_parquet_are_the_text_that_excel_s_are(tmp_path: Path) -> None:
    moments = [datetime(2021, 3, 5), datetime(2021, 3, 5, 7, 30), date(2021, 3, 5), time(7, 30)]
    path = tmp_path / "data.parquet"
    cells = {str(i): pyarrow.array([moment]) for i, moment in enumerate(moments)}
    parquet.write_table(pyarrow.table({**cells, "list": [[moments[0]]]}), path)
    book = openpyxl.Workbook()
    book.active.append([*cells])
    book.active.append(moments)
    book.save(tmp_path / "data.xlsx")
    (found,) = columns(read_rows(str(path), "train"))
    assert found.pop("list") == ["2021-03-05"]
    assert [*found.values()] == ["2021-03-05", "2021-03-05 07:30:00", "2021-03-05", "07:30:00"]
    assert columns(read_rows(str(tmp_path / "data.xlsx"), "train")) == [found]


def test_short_numbers_in_lists_and_mappings_are_read_as_they_were_written(tmp_path: Path) -> None:
    half, single = pyarrow.float16(), pyarrow.float32()
    pairs = pyarrow.struct([("x", single), ("y", pyarrow.large_list(half))])
    row = {"halves": 0.1, "list": [0.1, None], "pairs": [{"x": 0.1, "y": [0.3]}], "none": None}
    types = [half, pyarrow.list_(single), pyarrow.list_(pairs), pyarrow.list_(single)]
    schema = pyarrow.schema(zip(row, types, strict=True))
    parquet.write_table(pyarrow.Table.from_pylist([row], schema), tmp_path / "data.parquet")
    assert columns(read_rows(str(tmp_path / "data.parquet"), "train")) == [row]


def test_two_files_of_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("train.csv", "train.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"train\.jsonl and train\.csv are both the train split"):
        read_rows(str(tmp_path), "train")


def test_a_line_that_names_the_delimiter_is_no_row_and_counts_as_a_line(tmp_path: Path) -> None:
    rows = read(tmp_path / "data.csv", "sep=;\r\n" + table(ROWS, ";"))
    assert columns(rows) == ROWS
    assert rows[0].where.endswith(":3")


def test_reading_as_windows_1252_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read(tmp_path / "data.csv", table(ROWS, ",").encode("cp1252"))
    assert "data.csv:2: byte 0xa3 is not UTF-8; read as cp1252" in caplog.text


def test_bytes_of_no_encoding_are_refused_with_their_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.csv:2: byte 0x81 is not UTF-8; expected UTF-8 text"):
        read(tmp_path / "data.csv", b"question,answer\n\x81,3\n")


def test_empty_rows_and_columns_are_no_data(tmp_path: Path) -> None:
    text = table(ROWS, ",", extra=",,") + ",,,\r\n ,,,\r\n\r\n"
    assert columns(read(tmp_path / "data.csv", text)) == ROWS


def test_a_first_column_without_a_name_is_an_index(tmp_path: Path) -> None:
    rows = read(tmp_path / "data.csv", ",question,answer\n0,q,3\n1,r,4\n")
    assert columns(rows) == [{"question": "q", "answer": "3"}, {"question": "r", "answer": "4"}]


def test_a_value_in_another_column_without_a_name_is_refused(tmp_path: Path) -> None:
    # the comma in the question was not quoted, so the gold answer moved one column to the right
    with pytest.raises(DataError, match=r"data.csv:2: '7' is in a column without a name"):
        read(tmp_path / "data.csv", "question,answer,\nAnn has 3, how many?,7\n")
    with pytest.raises(DataError, match=r"data.csv:2: 3 fields; expected 2"):
        read(tmp_path / "data.csv", "question,answer\nAnn has 3, how many?,7\n")


def test_a_cell_of_a_million_characters_is_read(tmp_path: Path) -> None:
    (row,) = read(tmp_path / "data.csv", "question,answer\n" + "x" * 10**6 + ",3\n")
    assert len(row.columns["question"]) == 10**6


def test_the_first_sheet_of_an_excel_file(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.append([None, None, None])
    book.active.append(["question", "answer", None])
    book.active.append(["q", 13, None])
    book.active.append([None, None, None])
    book.active.append(["r", 0.5, None])
    book.active.append(["s", datetime(2021, 3, 5), None])
    book.active.append(["t", "007", None])
    book.create_sheet("notes").append(["nothing"])
    book.save(tmp_path / "Data.XLSX")
    rows = read_rows(str(tmp_path / "Data.XLSX"), "train")
    assert [row.columns["answer"] for row in rows] == ["13", "0.5", "2021-03-05", "007"]
    assert [row.where.rpartition(":")[2] for row in rows] == ["3", "5", "6", "7"]


JSON_ROWS = [{"question": "q", "answer": 3}, {"question": "r", "answer": 4}]
LINES = "".join(json.dumps(row) + "\n" for row in JSON_ROWS)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.ndjson", LINES.encode()),
        ("A.JSONL", LINES.encode()),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.JSON.GZ", gzip.compress(json.dumps(JSON_ROWS).encode(), mtime=0)),
        ("a.csv.gz", gzip.compress(b"question,answer\nq,3\nr,4\n", mtime=0)),
        ("a.json", json.dumps({"data": JSON_ROWS}).encode()),
        ("a.json", json.dumps({"version": 1, "tags": ["x"], "rows": JSON_ROWS}, indent=1).encode()),
        ("a.jsonl", LINES.encode("utf-16")),
    ],
)
def test_json_in_its_usual_wrappings(tmp_path: Path, name: str, data: bytes) -> None:
    rows = read(tmp_path / name, data)
    assert [int(row.columns["answer"]) for row in rows] == [3, 4]
    assert all(row.where.startswith(f"{tmp_path / name}:") for row in rows)


def test_a_list_in_an_object_has_the_lines_of_the_file(tmp_path: Path) -> None:
    text = '{\n "data": [\n  {"q": 1},\n  {"q": 2}\n ]\n}'
    assert [row.where[-2:] for row in read(tmp_path / "a.json", text)] == [":3", ":4"]
    with pytest.raises(DataError, match=r"a.json:4: 7 is a number; expected an object"):
        read(tmp_path / "a.json", text.replace('{"q": 2}', "7"))


def test_one_conversation_is_one_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "q"}]}
    assert columns(read(tmp_path / "a.json", json.dumps(row))) == [row]


@pytest.mark.parametrize("data", [b"not packed", gzip.compress(LINES.encode(), mtime=0)[:20]])
def test_a_damaged_packed_file_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(DataError, match=r"a.jsonl.gz: cannot be read"):
        read(tmp_path / "a.jsonl.gz", data)


def test_a_folder_holds_such_files_too(tmp_path: Path) -> None:
    read(tmp_path / "Train.JSONL.gz", gzip.compress(LINES.encode(), mtime=0))
    assert len(read_rows(str(tmp_path), "train")) == 2


def test_a_path_leads_into_a_column_and_a_column_of_that_name_comes_first() -> None:
    row = Row(where="f:1", id="", columns={"a": {"b": {"c": 5}}, "a.b": 6})
    assert (row.value("a.b.c"), row.value("a.b"), row.get("a.x.c")) == (5, 6, None)
    with pytest.raises(DataError, match=r"f:1: no column 'a.x'; expected one of a, a.b"):
        row.value("a.x")


def test_a_table_with_the_line_ends_of_an_old_mac_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mac.csv"
    rows = read(path, b"question,answer\rWhat is 1 + 1?,2\rWhat is 2 + 2?,4\r")
    assert [row.columns["answer"] for row in rows] == ["2", "4"]
    assert [row.where for row in rows] == [f"{path}:2", f"{path}:3"]


def test_a_table_may_mix_line_endings(tmp_path: Path) -> None:
    text = b'question,answer\r"What is\n1 + 1?",2\r"What is\n2 + 2?",4\r'
    rows = read(tmp_path / "data.csv", text)
    assert [row.columns["answer"] for row in rows] == ["2", "4"]


def test_utf_16_without_its_mark_is_refused_with_the_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"bare.csv:1: contains a NUL; expected UTF-8"):
        read(tmp_path / "bare.csv", "question,answer\n1 + 1?,2\n".encode("utf-16-le"))


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl"])
def test_a_file_with_a_mark_of_utf_8_is_never_read_in_another_encoding(
    tmp_path: Path, name: str
) -> None:
    text = b"\xef\xbb\xbfid,question\n1,\xe2\x82\xac\n2,\xff\n"
    with pytest.raises(DataError, match=rf"{name}:3: byte 0xff is not UTF-8"):
        read(tmp_path / name, text)


def test_a_damaged_sheet_is_refused_in_a_line(tmp_path: Path) -> None:
    book, rng = openpyxl.Workbook(), random.Random(0)
    book.active.append(["question", "answer"])
    book.save(tmp_path / "whole.xlsx")
    whole, num_refused = (tmp_path / "whole.xlsx").read_bytes(), 0
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.sample(range(len(whole)), 3):
            damaged[place] = rng.randrange(256)
        (tmp_path / "data.xlsx").write_bytes(damaged)
        try:
            read_rows(str(tmp_path / "data.xlsx"), "train")
        except DataError as error:
            num_refused += "not a readable Excel file" in str(error)
    assert num_refused > 10


def test_line_breaks_of_excel_are_line_breaks(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for cells in (["question", "answer"], ["one_x000D_\ntwo?", "3_x000D_"]):
        book.active.append(cells)
    book.save(tmp_path / "data.xlsx")
    (row,) = columns(read_rows(str(tmp_path / "data.xlsx"), "train"))
    assert row["question"] == "one\ntwo?"


@pytest.mark.parametrize("size", ["A1:B2", "A1", "A1:F9", None])
def test_a_sheet_is_read_whole_whatever_size_it_states(tmp_path: Path, size: str | None) -> None:
    book = openpyxl.Workbook()
    for cells in (["question", "answer", "rationale"], ["1 + 1?", 2, "Two."], ["2 + 1?", 3]):
        book.active.append(cells)
    book.save(tmp_path / "whole.xlsx")
    stated = b"" if size is None else f'<dimension ref="{size}"/>'.encode()
    with ZipFile(tmp_path / "whole.xlsx") as old, ZipFile(tmp_path / "data.xlsx", "w") as new:
        for name in old.namelist():
            new.writestr(name, re.sub(rb"<dimension[^>]*/>", stated, old.read(name)))
    rows = columns(read_rows(str(tmp_path / "data.xlsx"), "train"))
    assert [row["answer"] for row in rows] == ["2", "3"]
    assert [row["rationale"] for row in rows] == ["Two.", None]


def test_percentages_of_excel_are_read_as_they_are_shown(tmp_path: Path) -> None:
    # the cell holds 0.25 and shows 25%; a quoted sign is only decoration, and 25 shows 25%
    from openpyxl import Workbook

    book = Workbook()
    sheet = book.worksheets[0]
    sheet.append(["question", "answer"])
    cells = [(0.25, "0%"), (0.125, "0.00%"), (0.07, "0%"), (-0.5, "0%;[Red]-0%"), (1, "0%")]
    cells += [(25, '0"%"'), (0.25, "0.00"), ("5%", "@"), (1250, "#,##0")]
    for number, (value, shown_as) in enumerate(cells, start=2):
        sheet.append([f"q{number}", value])
        sheet.cell(number, 2).number_format = shown_as
    book.save(tmp_path / "data.xlsx")
    golds = [row.columns["answer"] for row in read_rows(str(tmp_path / "data.xlsx"), "train")]
    assert golds == ["25%", "12.5%", "7%", "-50%", "100%", "25", "0.25", "5%", "1250"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"meta": {"data": [1, 2]}, "data": [{"q": "one"}]}', ": data, item 1"),
        ('{"größe": [{"q": "one"}]}', ":1"),
        ('{"gr\\u00f6\\u00dfe": [{"q": "one"}]}', ": größe, item 1"),
    ],
)
def test_the_only_list_of_objects_in_a_json_object_holds_the_rows(
    tmp_path: Path, text: str, place: str
) -> None:
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    (row,) = read_rows(str(path), "train")
    assert (row.columns, row.where) == ({"q": "one"}, f"{path}{place}")
