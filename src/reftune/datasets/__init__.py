"""Datasets turn files, Hub ids or generators into problems. Each has its own file."""

from __future__ import annotations

from typing import Protocol

from reftune.datasets.reading.file_dataset import FileDataset
from reftune.datasets.reading.rationales import drop_contradictions
from reftune.datasets.reading.rows import Row
from reftune.datasets.reading.splits import Splits

__all__ = ["Dataset", "FileDataset", "Row", "Splits", "load_dataset"]


class Dataset(Protocol):
    """The interface of every dataset."""

    def load(self, *, seed: int) -> Splits:
        """All splits. `seed` determines what is drawn at random, such as dev. Raises: DataError if
        the data cannot be used, with file and line if these are known."""


def load_dataset(dataset: Dataset, *, seed: int) -> Splits:
    """The splits of a dataset, without training problems whose rationale contradicts the gold
    answer.

    Raises: as `Dataset.load`.
    """
    splits = dataset.load(seed=seed)
    is_ours = type(dataset).__module__.startswith("reftune.")
    if is_ours or isinstance(dataset, FileDataset):  # they drop these problems themselves
        return splits
    return drop_contradictions(splits)
