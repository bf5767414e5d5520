"""Datasets: files, Hub ids or generators → problems. One file per dataset."""

from __future__ import annotations

from typing import Protocol

from reftune.datasets.reading.file_dataset import FileDataset
from reftune.datasets.reading.rows import Row
from reftune.datasets.reading.splits import Splits

__all__ = ["Dataset", "FileDataset", "Row", "Splits"]


class Dataset(Protocol):
    """The interface of every dataset."""

    def load(self, *, seed: int) -> Splits:
        """Read everything; `seed` draws the dev split. Raises: DataError with file and line."""
