"""The package keeps its shape: few names at the top, imports in one direction, no cycle, and a
short way through the smallest run. Ruff checks its width. `make house` prints the figures."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

OPEN = ("formats", "rewards", "sandbox", "speed", "check")
"""Folders inside a room whose files the design page names too."""


@pytest.fixture
def house(benchmark_module) -> Any:
    return benchmark_module("house")


def test_there_are_at_most_20_names_at_the_top_and_each_has_its_place(house) -> None:
    names = house.names_at_top()
    assert len(names) <= 20
    assert sorted(house.ROOMS) == names, "a new room needs a place in ROOMS and in docs/design.md"


def test_the_page_on_design_names_every_file_of_a_room(house) -> None:
    page = (Path(__file__).parents[2] / "docs/design.md").read_text(encoding="utf-8")
    words = set(re.findall(r"[a-z0-9_]+", page.partition("```text")[2].partition("```")[0]))
    files = (path.relative_to(house.SOURCE).with_suffix("").parts for path in house.python_files())
    named = [parts for parts in files if len(parts) < 3 or parts[1] in OPEN]
    missing = {parts[-1] for parts in named if not parts[-1].startswith("_")} - words
    assert not missing, f"docs/design.md, The package: add {missing}"


def test_rooms_import_only_from_rooms_above_them(house) -> None:
    assert house.against_the_order(house.import_graph()) == []


def test_no_modules_import_each_other(house) -> None:
    assert house.cycles(house.import_graph()) == []


def test_the_smallest_run_enters_few_files_and_its_step_crosses_few(house) -> None:
    watch = house.watched_run()
    assert 30 < len(watch.files) <= 45
    assert 50 < len(watch.pairs) <= 110


def test_cycles_are_found(house) -> None:
    # b → c → d → b is a cycle; a leads into it, and e stands alone
    graph = {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}, "e": set()}
    assert house.cycles(graph) == [{"b", "c", "d"}]


def test_an_import_against_the_order_is_found(house) -> None:
    graph = {"model.policy": {"stages.rl", "errors"}, "stages.rl": {"model.policy"}}
    assert house.against_the_order(graph) == [("model.policy", "stages.rl")]


def test_imports_are_found_in_functions_and_not_under_type_checking(house) -> None:
    code = """
from reftune.errors import DataError
from reftune.grading import voting
if TYPE_CHECKING:
    from reftune.terminal.cli import app
def late():
    import reftune.model.policy
"""
    found = set(house.imported(ast.parse(code)))
    assert found == {"errors.DataError", "grading.voting", "model.policy"}
