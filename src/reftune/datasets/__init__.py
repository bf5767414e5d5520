"""The datasets, which supply the problems of a run. Each kind has its own module."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from reftune.datasets.reading.file_dataset import FileDataset
from reftune.datasets.reading.golds import GoldReader
from reftune.datasets.reading.rationales import drop_contradictions
from reftune.datasets.reading.rows import Row
from reftune.datasets.reading.splits import Splits, dropped_text, with_unique_ids, without_leaks
from reftune.datasets.reading.validity import checked_splits
from reftune.errors import DataError
from reftune.grading.markers import DEFAULT
from reftune.recipe import Recipe
from reftune.seeds import derive_seed

__all__ = ["Dataset", "FileDataset", "Row", "Splits", "load_dataset", "load_splits"]


class Dataset(Protocol):
    """The interface of every dataset."""

    def load(self, *, seed: int) -> Splits:
        """The train, dev and test splits. Random choices, such as which questions are drawn for
        dev, depend on `seed`. Raises: DataError if the data is unusable. The message names the
        source and, if known, the line."""


def load_dataset(dataset: Dataset, *, seed: int) -> Splits:
    """The splits of a dataset, with unique ids. No question is in more than one split, and no
    training problem has a rationale that contradicts its gold answer. Raises: as `Dataset.load`;
    also DataError if a user's own dataset returns something other than splits of problems."""
    splits = dataset.load(seed=seed)
    source = type(dataset).load if isinstance(dataset, FileDataset) else type(dataset)
    if source.__module__.startswith("reftune."):  # `load` already does the rest
        return splits
    splits = without_leaks(checked_splits(splits, getattr(dataset, "kind", type(dataset).__name__)))
    test, dev, train = with_unique_ids(splits.test, splits.dev, splits.train)
    golds = getattr(dataset, "golds", None)
    reading = golds.reading if isinstance(golds, GoldReader) else DEFAULT
    return drop_contradictions(replace(splits, train=train, dev=dev, test=test), reading)


def load_splits(recipe: Recipe) -> Splits:
    """The splits of the recipe's dataset. Raises: as `Dataset.load`; also DataError if there are
    no training rows or no dev problems."""
    splits = load_dataset(recipe.dataset, seed=derive_seed(recipe.seed, "data"))
    if splits.train and splits.dev:
        return splits
    dropped = f"(dropped: {dropped_text(splits.counts)})"
    message = f"dataset: no training row is left {dropped}"
    if splits.train:
        at = "dataset.parts.NAME.dataset" if recipe.dataset.kind == "mixture" else "dataset"
        message = (
            f"dataset: no dev problems {dropped}, but models are chosen on dev; set"
            f" {at}.dev_size or a dev file"
        )
    raise DataError("; ".join([message, *splits.notes]))
