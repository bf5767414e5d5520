"""The contract of every dataset: splits that do not overlap, unique ids, gold answers, and a split
that only the seed changes. A new file in src/reftune/datasets joins automatically; a dataset that
reads files defines `sample_row`."""

from __future__ import annotations

import importlib.util
import json
import string
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from reftune.datasets import Splits
from reftune.datasets.reading.file_dataset import FileDataset
from reftune.datasets.reading.splits import question_key
from reftune.recipe import Component, component_class, known_kinds, load_component
from reftune.types import Problem

KINDS = known_kinds("datasets")
SIZES = {"train": 40, "dev": 5, "test": 5}
KEYS = {**SIZES, **{f"{split}_size": size for split, size in SIZES.items()}, "task": "chain_sum"}
"""Small sizes for a kind that generates its problems."""


def dataset_class(kind: str) -> type[Component]:
    return component_class(kind, group="datasets")


def files_of(kind: type[FileDataset], folder: Path) -> dict[str, Any]:
    """A training and a test file of the dataset's own sample rows."""
    for split, start in (("train", 200), ("test", 1000)):
        rows = [kind.sample_row(start + n) for n in range(SIZES[split])]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train": str(folder)}


def keys_of(kind: str, folder: Path) -> dict[str, Any]:
    """The recipe keys of a small dataset of this kind."""
    found = dataset_class(kind)
    folder = folder / kind
    folder.mkdir()
    if issubclass(found, FileDataset):
        return {"kind": kind, **files_of(found, folder)}
    if "parts" in found.model_fields:
        parts = {part: keys_of(part, folder) for part in ("jsonl", "gsm8k")}
        parts["gsm8k"]["train"] += "/train.jsonl"  # one file has no test split
        shares = {part: {"dataset": keys, "share": 0.5} for part, keys in parts.items()}
        return {"kind": kind, "parts": shares}
    return {"kind": kind, **{key: KEYS[key] for key in KEYS if key in found.model_fields}}


def test_the_suite_finds_the_datasets_by_their_files() -> None:
    assert {"gsm8k", "svamp", "mathqa", "jsonl", "mixture", "word_problems"} <= set(KINDS)


def test_rows_of_a_dataset_in_files_ask_different_questions() -> None:
    for kind in filter(lambda kind: issubclass(dataset_class(kind), FileDataset), KINDS):
        rows = [dataset_class(kind).sample_row(n) for n in (1, 2)]  # type: ignore[attr-defined]
        assert rows[0].keys() == rows[1].keys() and rows[0] != rows[1], kind


@pytest.fixture(params=KINDS)
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], Splits]:
    kind: str = request.param
    if kind == "reasoning_gym" and importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("the extra reasoning-gym is not installed")
    keys = keys_of(kind, tmp_path)
    return lambda seed: load_component(keys, group="datasets").load(seed=seed)


def everything(splits: Splits) -> list[Problem]:
    return [*splits.train, *splits.dev, *splits.test]


def test_no_split_is_empty_and_ids_are_unique(load: Callable[[int], Splits]) -> None:
    splits = load(0)
    assert splits.train and splits.dev and len(splits.test) == SIZES["test"]
    ids = [problem.id for problem in everything(splits)]
    assert len(set(ids)) == len(ids)


def test_no_question_is_in_two_splits(load: Callable[[int], Splits]) -> None:
    splits = load(0)
    train, dev, test = (
        {question_key(problem) for problem in split}
        for split in (splits.train, splits.dev, splits.test)
    )
    assert not train & dev and not train & test and not dev & test


def test_every_problem_has_a_question_and_a_gold_of_its_kind(load: Callable[[int], Splits]) -> None:
    for problem in everything(load(0)):
        assert problem.question.strip() == problem.question != ""
        answer = problem.answer
        assert isinstance(answer.value, Fraction) == (answer.kind == "number")
        if answer.kind == "choice":
            assert str(answer.value) in string.ascii_lowercase[: len(problem.choices)]


def test_the_same_seed_gives_the_same_splits_and_another_seed_another_dev(
    load: Callable[[int], Splits],
) -> None:
    first, again, other = ([p.question for p in load(seed).dev] for seed in (1, 1, 2))
    assert first == again
    assert set(first) != set(other)


def test_counts_are_positive(load: Callable[[int], Splits]) -> None:
    assert all(count > 0 for count in load(0).counts.values())
