"""Rows of files, folders and the Hub, and the errors for rows that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset

from reftune.datasets.jsonl import Jsonl
from reftune.datasets.reading.rows import Row, read_rows, refuse_type_changes
from reftune.errors import DataError

ROWS = [{"question": "1 + 1?", "answer": 2}, {"question": "2 + 2?", "answer": 4}]


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def columns(rows: list[Row]) -> list[Mapping[str, Any]]:
    return [row.columns for row in rows]


def test_jsonl_rows_know_their_lines_and_blank_lines_count(tmp_path: Path) -> None:
    source = write(
        tmp_path / "data.jsonl", json.dumps(ROWS[0]) + "\n\n" + json.dumps(ROWS[1]) + "\n"
    )
    rows = read_rows(source, "train")
    assert columns(rows) == ROWS
    assert [row.where for row in rows] == [f"{source}:1", f"{source}:3"]
    assert [row.id for row in rows] == ["data-1", "data-2"]


def test_json_list_rows_know_their_lines(tmp_path: Path) -> None:
    # indent=1 writes "[", then each row over four lines: the rows start in lines 2 and 6
    source = write(tmp_path / "data.json", json.dumps(ROWS, indent=1))
    rows = read_rows(source, "train")
    assert columns(rows) == ROWS
    assert [row.where for row in rows] == [f"{source}:2", f"{source}:6"]


def test_a_json_file_may_hold_one_object_a_line(tmp_path: Path) -> None:
    source = write(tmp_path / "data.json", "\n".join(map(json.dumps, ROWS)))
    assert columns(read_rows(source, "train")) == ROWS


def test_csv_rows_know_the_line_they_start_in(tmp_path: Path) -> None:
    source = write(
        tmp_path / "data.csv", 'question,answer\r\n"two\r\nlines, one comma",3\r\nplain,\r\n'
    )
    rows = read_rows(source, "train")
    assert columns(rows) == [
        {"question": "two\nlines, one comma", "answer": "3"},
        {"question": "plain", "answer": None},
    ]
    assert [row.where for row in rows] == [f"{source}:2", f"{source}:4"]


def test_tsv_is_split_at_tabs(tmp_path: Path) -> None:
    source = write(tmp_path / "data.tsv", "question\tanswer\na, b\t3\n")
    assert columns(read_rows(source, "train")) == [{"question": "a, b", "answer": "3"}]


def test_parquet_rows_have_numbers(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "data.parquet")
    rows = read_rows(str(tmp_path / "data.parquet"), "train")
    assert columns(rows) == ROWS
    assert rows[1].where == f"{tmp_path / 'data.parquet'}: row 2"


def test_decimals_of_parquet_are_numbers_and_nan_is_missing(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "data.parquet"
    values = {
        "answer": [Decimal("1.50"), Decimal("2.00")],
        "steps": [1.0, float("nan")],
        "choices": [[Decimal("1.50"), Decimal("3.00")], None],
    }
    parquet.write_table(pyarrow.table(values), path)
    rows = columns(read_rows(str(path), "train"))
    assert rows == [
        {"answer": 1.5, "steps": 1.0, "choices": [1.5, 3]},
        {"answer": 2, "steps": None, "choices": None},
    ]
    assert "Decimal" not in str(rows), "Decimal('1.50') == 1.5"


def test_line_breaks_of_windows_are_unix_line_breaks(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "3", "turns": [{"role": "user", "content": "a\r\nb\rc"}]}
    source = write(tmp_path / "data.jsonl", json.dumps(row))
    (read,) = columns(read_rows(source, "train"))
    assert read["turns"][0]["content"] == "a\nb\nc"


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    source = write(tmp_path / "data.csv", b"\xef\xbb\xbfquestion,answer\nq,3\n")
    assert columns(read_rows(source, "train")) == [{"question": "q", "answer": "3"}]


def test_a_folder_has_one_file_a_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", json.dumps(ROWS[0]))
    write(tmp_path / "validation.csv", "question,answer\nq,3\n")
    write(tmp_path / "test.json", json.dumps(ROWS))
    assert len(read_rows(str(tmp_path), "train")) == 1
    assert read_rows(str(tmp_path), "dev")[0].columns["question"] == "q"
    assert len(read_rows(str(tmp_path), "test")) == 2


def test_names_of_a_data_set_come_before_the_usual_ones(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", json.dumps(ROWS[0]))
    write(tmp_path / "special.json", json.dumps(ROWS))
    assert len(read_rows(str(tmp_path), "train", names=["special.json"])) == 2


def test_a_folder_may_hold_parquet_shards(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "data").mkdir()
    for shard, row in enumerate(ROWS):
        table = pyarrow.Table.from_pylist([row])
        parquet.write_table(table, tmp_path / "data" / f"train-0000{shard}-of-00002.parquet")
    assert columns(read_rows(str(tmp_path), "train")) == ROWS


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["train-00000-of-00004"], "1 of 4"),
        (["train-00000-of-00003", "train-00002-of-00003"], "2 of 3"),
        (["train-1-of-2"], "1 of 2"),
        (["train-00001-of-00002-ab12cd"], "1 of 2"),
        (["train-00000-of-00001", "train-00000-of-00002"], "1 of 2"),
    ],
)
@pytest.mark.parametrize("folder", [".", "data"])
def test_a_folder_in_which_shards_are_missing_is_refused(
    tmp_path: Path, names: list[str], found: str, folder: str
) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    for name in names:
        (tmp_path / folder / f"{name}.parquet").touch()
    with pytest.raises(DataError, match=f"{found} files like train-"):
        read_rows(str(tmp_path), "train")


@pytest.mark.parametrize(
    "names", [["train-1-of-2", "train-2-of-2"], ["train-a", "train-b"], ["train-0-of-1-ab"]]
)
def test_shards_may_be_counted_from_one_or_not_at_all(tmp_path: Path, names: list[str]) -> None:
    import pyarrow
    from pyarrow import parquet

    for name in names:
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / f"{name}.parquet")
    assert columns(read_rows(str(tmp_path), "train")) == ROWS * len(names)


@pytest.mark.parametrize("name", ["dataset_dict.json", "data-00000-of-00001.arrow"])
def test_a_folder_of_save_to_disk_is_named_with_the_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"instead of save_to_disk, use to_parquet\('dev.parquet'"):
        read_rows(str(tmp_path), "dev")
    (tmp_path / name).rename(tmp_path / "other.txt")
    with pytest.raises(DataError) as error:
        read_rows(str(tmp_path), "dev")
    assert "to_parquet" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"q": 1}\n{"q": \n',
            ":2: not valid JSON (Expecting value); expected one object per line",
        ),
        ("a.jsonl", '{"q": 1}\n[1]\n', ":2: [1] is a list; expected an object with named columns"),
        ("a.jsonl", "", "no rows in the train split; expected at least one"),
        ("a.jsonl", "\n \n", "no rows in the train split; expected at least one"),
        (
            "a.jsonl",
            b'{"q": 1}\n{"q": "\xff"}\n',
            ":2: byte 0xff is not UTF-8; expected UTF-8 text",
        ),
        ("a.jsonl", '{"q": 1}\n' + "[" * 100_000, ":2: not valid JSON ("),
        (
            "a.json",
            '[\n {"q": 1},\n {"q": }\n]',
            ":3: not valid JSON (Expecting value); expected a list of objects",
        ),
        (
            "a.json",
            '[\n {"q": 1}\n {"q": 2}\n]',
            ":3: not valid JSON (Expecting ',' delimiter); expected a list of objects",
        ),
        (
            "a.json",
            '[\n {"q": 1},\n {"q": 2}\n',
            ":4: not valid JSON (Expecting ',' delimiter); expected a list of objects",
        ),
        (
            "a.json",
            '[\n {"q": 1},\n 7\n]',
            ":3: 7 is a number; expected an object with named columns",
        ),
        ("a.json", "[]", "no rows in the train split; expected at least one"),
        ("a.json", '{\n "data": []\n}', ":1: not valid JSON"),
        ("a.csv", "q,a\n1,2\n1,2,3\n", ":3: 3 fields; expected 2 as in the first line"),
        ("a.csv", "q,q\n1,2\n", ":1: columns ['q', 'q']; expected unique names"),
        ("a.csv", 'q,a\n"1"x,2\n', ":2: not valid CSV ("),
        ("a.csv", "q,a\n", "no rows in the train split; expected at least one"),
        ("a.parquet", "PAR", ": not a readable parquet file ("),
        ("a.xlsx", "x", ": not a readable Excel file (File is not a zip file)"),
        (
            "a.xls",
            "x",
            ": cannot read .xls; expected .jsonl, .json, .ndjson, .csv, .tsv, .xlsx, .parquet",
        ),
    ],
)
def test_unreadable_input_is_reported_in_one_line_with_file_and_line(
    tmp_path: Path, name: str, text: str | bytes, message: str
) -> None:
    source = write(tmp_path / name, text)
    with pytest.raises(DataError) as error:
        read_rows(source, "train")
    assert str(error.value).startswith(source)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source", ["missing.jsonl", "./no/such/folder", "data/missing.json", "a b", "x/y/z"]
)
def test_a_missing_file_is_reported_and_never_looked_for_on_the_hub(source: str) -> None:
    with pytest.raises(DataError, match="no such file or folder; expected one, or a Hub id"):
        read_rows(source, "train")


def test_a_folder_without_the_split_lists_what_it_has(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(
        DataError,
        match=r"no file for the test split, found train.jsonl; expected one like test.jsonl",
    ):
        read_rows(str(tmp_path), "test")


class FakeHub:
    """Stands in for `datasets.load_dataset`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str | None, str]] = []
        self.failure: Exception | None = None

    def __call__(
        self, name: str, config: str | None, *, split: str, revision: str | None = None
    ) -> Dataset:
        self.calls.append((name, config, split))
        self.revision = revision
        if self.failure is not None:
            raise self.failure
        return Dataset.from_list(ROWS)


def test_decimals_and_nan_of_the_hub_are_read_as_those_of_parquet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = {"answer": Decimal("1.50"), "steps": float("nan"), "short": 0.1}
    types = [pyarrow.decimal128(3, 2), pyarrow.float64(), pyarrow.float32()]
    table = pyarrow.Table.from_pylist([row], pyarrow.schema(zip(row, types, strict=True)))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Dataset(table))
    assert columns(read_rows("owner/name", "train")) == [
        {"answer": 1.5, "steps": None, "short": 0.1}
    ]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr("datasets.load_dataset", fake)
    return fake


def test_a_hub_id_may_name_a_configuration_and_a_split(hub: FakeHub) -> None:
    rows = read_rows("owner/name", "dev")
    read_rows("owner/name:main", "train")
    read_rows("owner/name:main:extra", "test")
    read_rows("owner/name::extra", "test")
    assert hub.calls == [
        ("owner/name", None, "validation"),
        ("owner/name", "main", "train"),
        ("owner/name", "main", "extra"),
        ("owner/name", None, "extra"),
    ]
    assert columns(rows) == ROWS
    assert [row.id for row in rows] == ["name-validation-1", "name-validation-2"]
    assert rows[1].where == "owner/name: validation row 2"


@pytest.mark.parametrize(
    ("train", "splits"),
    [
        ("owner/name", ["test", "train"]),
        ("owner/name:main", ["test", "train"]),
        ("owner/name:main:train", ["train"]),
    ],
)
def test_without_test_the_hub_s_test_split_is_read_unless_train_names_a_split(
    hub: FakeHub, train: str, splits: list[str]
) -> None:
    Jsonl(kind="jsonl", train=train).load(seed=0)
    assert [split for _, _, split in hub.calls] == splits


def test_a_revision_of_hub_data_is_asked_for(hub: FakeHub) -> None:
    read_rows("owner/name", "train", revision="v1.2")
    assert hub.revision == "v1.2"


@pytest.mark.parametrize(
    "failure",
    [ConnectionError("offline\nlong story"), ValueError("Unknown split"), RuntimeError("script")],
)
def test_an_error_of_the_hub_becomes_one_line(hub: FakeHub, failure: Exception) -> None:
    hub.failure = failure
    with pytest.raises(DataError) as error:
        read_rows("owner/name", "train")
    first_line = str(failure).splitlines()[0]
    assert (
        str(error.value)
        == f"owner/name: cannot load the train split from the Hub ({first_line}), and there is no"
        " such file or folder"
    )


def row(**columns: Any) -> Row:
    return Row(where="data.jsonl:7", id="data-7", columns=columns)


def test_numbers_are_read_exactly() -> None:
    assert row(a=0.1).number_gold("a").value == Fraction(1, 10)
    assert row(a=3).number_gold("a").value == 3
    assert row(a="1,234.5").number_gold("a").value == Fraction(2469, 2)


@pytest.mark.parametrize(
    "value", [None, True, float("nan"), float("inf"), "many", "", [3], {"a": 3}]
)
def test_a_value_that_is_no_number_is_rejected(value: object) -> None:
    with pytest.raises(DataError, match=r"data.jsonl:7: a is .*; expected a number"):
        row(a=value).number_gold("a")


@pytest.mark.parametrize("value", [None, "", "  \n", 3, ["a"], "half a surrogate pair \ud800"])
def test_a_value_that_is_no_text_is_rejected(value: object) -> None:
    with pytest.raises(DataError, match=r"data.jsonl:7: q is .*; expected text"):
        row(q=value).text("q")


def test_a_missing_column_is_named_with_those_there_are() -> None:
    with pytest.raises(
        DataError, match=r"data.jsonl:7: no column 'q'; expected one of question, answer"
    ):
        row(question="a", answer=1).text("q")


def test_a_column_that_changes_its_type_is_refused_at_the_row_where_it_does() -> None:
    rows = [
        Row(where=f"f:{n}", id="", columns={"answer": value})
        for n, value in enumerate([None, "3", "4", 5, "6"], start=1)
    ]
    with pytest.raises(
        DataError,
        match=r"f:4: answer is 5, a number; expected text, as in the earlier rows \(from f:2 on\)",
    ):
        refuse_type_changes(rows, ["answer"])


def test_whole_numbers_and_decimals_are_one_type_and_null_is_any() -> None:
    refuse_type_changes([row(a=value) for value in (3, 2.5, None, 4)], ["a", "not there"])
