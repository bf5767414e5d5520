"""Fixtures that several unit tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of benchmarks/, which is not part of the package, for the duration of a
    test."""
    monkeypatch.syspath_prepend(str(ROOT))
    yield lambda name: import_module(f"benchmarks.{name}")
    for name in [
        name for name in sys.modules if name == "benchmarks" or name.startswith("benchmarks.")
    ]:
        del sys.modules[name]
