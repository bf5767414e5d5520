"""The base class of the paper's datasets. Each dataset is read either from its original, published
files or from the JSON files of ReFT's authors. A row of the authors' files has the columns item_id,
question, answer_value and, except in test, answer_cot."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from reftune.datasets.reading.file_dataset import FileDataset
from reftune.datasets.reading.rationales import drop_wrong_programs
from reftune.datasets.reading.rows import Row
from reftune.datasets.reading.splits import Splits
from reftune.errors import DataError
from reftune.types import Problem

Rationale = Literal["nl", "program"]
COLUMNS = ("item_id", "question", "answer_cot", "answer_value")


class PaperDataset(FileDataset):
    """Base class of GSM8K, SVAMP and MathQA."""

    rationale: Rationale = "program"
    """Whether rationales are programs or natural language (`nl`)."""

    authors_name: ClassVar[str]
    """The prefix of the authors' file names."""

    @abstractmethod
    def published_problem(self, row: Row) -> Problem:
        """The problem in a row of the published files. Raises: as `FileDataset.problem`."""

    def problem(self, row: Row) -> Problem:
        """The problem in a row of the authors' files or of the published files."""
        return self.authors_problem(row) if is_authors(row) else self.published_problem(row)

    def authors_problem(self, row: Row) -> Problem:
        return Problem(
            id=row.text("item_id"),
            question=row.text("question"),
            answer=row.number_gold("answer_value"),
            gold_text=str(row.value("answer_value")),
            rationale=authors_rationale(row, self.rationale),
            columns=row.others(*COLUMNS),
        )

    def file_names(self) -> Mapping[str, Sequence[str]]:
        """Split → the name of the authors' file. For train, the name depends on `rationale`."""
        ending = "nl" if self.rationale == "nl" else "python_sdp"
        return {
            "train": [f"{self.authors_name}_{ending}.json"],
            "test": [f"{self.authors_name}_test_set.json"],
        }

    def trainable(self, splits: Splits) -> Splits:
        """`splits` without the training problems whose rationale contradicts the gold answer. If
        rationales are programs, a problem is kept only if it has a program that returns the gold
        answer. If they are prose, a problem is removed only if its rationale states a different
        answer."""
        if self.rationale == "program":
            return drop_wrong_programs(splits)
        return super().trainable(splits)


def is_authors(row: Row) -> bool:
    """Whether `row` comes from the authors' files."""
    return "answer_value" in row.columns


def authors_rationale(row: Row, kind: Rationale) -> str | None:
    """The row's `answer_cot`; None if it is empty. Raises: DataError if its kind is not `kind`."""
    text = row.optional_text("answer_cot")
    if text is None or ("def solution" in text) == (kind == "program"):
        return text
    found, other = ("not a program", "nl") if kind == "program" else ("a program", "program")
    raise DataError(
        f"{row.where}: answer_cot is {found}; expected a rationale of kind {kind} (or"
        f" set dataset.rationale={other})"
    )
