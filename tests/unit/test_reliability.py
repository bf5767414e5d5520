"""A test keeps every promise of docs/reliability.md and every mode of docs/distributed.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_, MODES = (DOCS / "distributed.md").read_text(encoding="utf-8").split("\n## What is tested\n")
PROMISES = (DOCS / "reliability.md").read_text(encoding="utf-8") + MODES
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PROMISES)))


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_a_test_that_keeps_a_promise_exists(file: str, test: str):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_its_test():
    rows = [
        line for line in PROMISES.splitlines() if line.startswith("| ") and "tested by" not in line
    ]
    assert [row for row in rows if "::test_" not in row] == []
    assert len(rows) >= 45
