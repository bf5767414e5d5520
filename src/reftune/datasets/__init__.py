"""The datasets, which supply the problems of a run. Each has its own module."""

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
        """All splits. Random choices, such as which questions become dev, depend on `seed`. Raises:
        DataError for unusable data, with its source and, if possible, the line."""


def load_dataset(dataset: Dataset, *, seed: int) -> Splits:
    """The splits of a dataset, without training problems whose rationale contradicts the gold
    answer.

    Raises: as `Dataset.load`.
    """
    splits = dataset.load(seed=seed)
    is_ours = type(dataset).__module__.startswith("reftune.")
    if is_ours or isinstance(dataset, FileDataset):  # these drop such problems themselves
        return splits
    return drop_contradictions(splits)
