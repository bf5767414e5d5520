"""The base class of datasets in files or on the Hub. It also draws dev and counts unusable rows."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from reftune.datasets.reading.rationales import drop_contradictions
from reftune.datasets.reading.rows import Row, is_single_split, read_rows
from reftune.datasets.reading.splits import Key, Splits, draw_splits, question_key
from reftune.datasets.reading.validity import fault_of
from reftune.errors import DataError, ReftuneError
from reftune.recipe import Component
from reftune.text import brief
from reftune.types import Problem

Split = Literal["train", "dev", "test"]


class Unusable(Exception):
    """Raised by `FileDataset.problem` to leave a row out. For each message of this error, the rows
    left out are counted."""


class FileDataset(Component):
    """Base class of datasets that are read from files or from the Hub. To add a dataset of your
    own, write a subclass with a method `problem`, which turns a row into a problem."""

    train: str
    """Source of the training questions: a file, folder or Hub id; see
    [sources](datasets.md#sources)."""
    test: str | None = None
    """Source of the test questions. The default [depends](datasets.md#sources) on `train`."""
    dev: str | None = None
    """Source of the dev questions. By default, they are drawn from the training questions."""
    dev_size: int | None = Field(None, ge=0)
    """Number of training questions drawn for dev if `dev` is not set. Default: a tenth of them, at
    most 500."""
    revision: str | None = None
    """Branch, tag or commit, if the data is on the Hub."""

    key: ClassVar[Key] = staticmethod(question_key)
    """Computes the key of a problem. Problems with equal keys ask the same question."""
    several_rationales: ClassVar[bool] = False
    """Whether several rows may ask the same question, each with its own rationale."""

    @abstractmethod
    def problem(self, row: Row) -> Problem:
        """The problem in a row. Raises: Unusable if the row is to be left out; DataError if the row
        is invalid, with its location (`row.where`) in the message."""

    @classmethod
    def sample_row(cls, n: int) -> dict[str, Any]:
        """Row `n` of a made-up file of different questions, for tests of the built-in datasets."""
        raise NotImplementedError

    def problems(self, rows: Sequence[Row], split: Split, counts: Counter[str]) -> list[Problem]:
        """The problems in the rows of a split. Rows left out are counted in `counts`, by reason."""
        found = []
        for row in rows:
            try:
                problem = self.problem(row)
            except Unusable as reason:
                counts[str(reason)] += 1
                continue
            except ReftuneError:
                raise
            except Exception as error:  # a user's own class may raise anything on an odd row
                failure = f"{type(error).__name__}: {brief(error)}"
                raise DataError(f"{row.where}: {self.kind}: {failure}") from error
            fault = fault_of(problem)
            if fault is not None:
                hint = "; to leave a row out, raise Unusable" if problem is None else ""
                raise DataError(f"{row.where}: {self.kind}: {fault}{hint}")
            found.append(problem)
        return found

    def all_problems(
        self, rows: Mapping[Split, Sequence[Row]], counts: Mapping[Split, Counter[str]]
    ) -> tuple[dict[Split, list[Problem]], tuple[str, ...]]:
        """The problems of each split, and notes for the user (see `Splits.notes`). Rows that are
        left out are counted by reason in `counts[split]`."""
        return {split: self.problems(rows[split], split, counts[split]) for split in rows}, ()

    def trainable(self, splits: Splits) -> Splits:
        """`splits` without training problems that are unfit to learn from. By default, these are
        the problems whose rationale contradicts the gold answer."""
        return drop_contradictions(splits)

    def file_names(self) -> Mapping[str, Sequence[str]]:
        """Split → file names. In a folder, these names are tried before the usual names of the
        split's file."""
        return {}

    def load(self, *, seed: int) -> Splits:
        """The splits, cleaned as `draw_splits` and `trainable` describe. If the recipe names no
        source for dev, dev is drawn from train with `seed`. Raises: DataError if the data cannot be
        read, or if `dev_size` is too large."""
        has_test = self.test is not None or not is_single_split(self.train)
        test = self.test or self.train if has_test else None
        sources: dict[Split, str | None] = {"test": test, "dev": self.dev, "train": self.train}
        names = self.file_names()
        rows = {
            split: read_rows(source, split, names=names.get(split, ()), revision=self.revision)
            for split, source in sources.items()
            if source is not None
        }
        counts = {split: Counter[str]() for split in rows}
        problems, notes = self.all_problems(rows, counts)
        try:
            splits = draw_splits(
                train=problems["train"],
                dev=problems.get("dev"),
                test=problems.get("test", ()),
                dev_size=self.dev_size,
                seed=seed,
                key=type(self).key,
                several_rationales=self.several_rationales,
            )
        except DataError as error:
            raise DataError("; ".join([str(error), *notes])) from None
        of_test = {f"test_{name}": count for name, count in counts.pop("test", Counter()).items()}
        dropped = sum(counts.values(), Counter(of_test))
        return self.trainable(replace(splits, counts={**dropped, **splits.counts}, notes=notes))
