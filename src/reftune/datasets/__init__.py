"""Datasets: files, Hub ids or generators → problems. One file a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from reftune.types import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """Problems by use. No question is in two of them."""

    train: tuple[Problem, ...]
    dev: tuple[Problem, ...]
    test: tuple[Problem, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    """What was dropped and why, for the log: `duplicate`, `program_disagrees`, …"""


class Dataset(Protocol):
    """What every dataset offers."""

    def load(self, *, seed: int) -> Splits:
        """Read everything; `seed` draws the dev split. Raises: DataError with file and line."""
