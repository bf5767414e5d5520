"""What every dataset keeps: splits that do not overlap, unique ids, golds, and a split that only
the seed changes."""

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
from reftune.recipe import component_class, known_kinds, load_component
from reftune.types import Problem

NUM_TRAIN, NUM_TEST = 40, 5


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def gsm8k(folder: Path) -> dict[str, Any]:
    def row(n: int) -> dict[str, Any]:
        return {
            "question": f"What is {n} and 1?",
            "answer": f"It is <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}",
        }

    _write(folder / "train.jsonl", [row(n) for n in range(NUM_TRAIN)])
    _write(folder / "test.jsonl", [row(n + 1000) for n in range(NUM_TEST)])
    return {"train": str(folder)}


def svamp(folder: Path) -> dict[str, Any]:
    def row(n: int) -> dict[str, Any]:
        return {
            "ID": f"s-{n}",
            "Body": f"Tom has {n} apples.",
            "Question": "And 1?",
            "Equation": f"( {n}.0 + 1.0 )",
            "Answer": n + 1,
        }

    _write(folder / "train.jsonl", [row(n) for n in range(NUM_TRAIN)])
    _write(folder / "test.jsonl", [row(n + 1000) for n in range(NUM_TEST)])
    return {"train": str(folder)}


def mathqa(folder: Path) -> dict[str, Any]:
    def row(n: int) -> dict[str, Any]:
        options = f"a ) {n} , b ) {n + 1} , c ) none"
        return {
            "Problem": f"{n} and 1 ?",
            "options": options,
            "correct": "b",
            "linear_formula": "add(n0,n1)|",
            "Rationale": "b",
        }

    _write(folder / "train.jsonl", [row(n) for n in range(200, 200 + NUM_TRAIN)])
    _write(folder / "test.jsonl", [row(n + 1000) for n in range(NUM_TEST)])
    return {"train": str(folder)}


def jsonl(folder: Path) -> dict[str, Any]:
    _write(
        folder / "train.jsonl",
        [{"question": f"What is {n}?", "answer": n} for n in range(NUM_TRAIN)],
    )
    _write(
        folder / "test.jsonl",
        [{"question": f"What is {n + 1000}?", "answer": n} for n in range(NUM_TEST)],
    )
    return {"train": str(folder)}


def mixture(folder: Path) -> dict[str, Any]:
    _write(folder / "b.jsonl", [{"question": f"And {n}?", "answer": n} for n in range(NUM_TRAIN)])
    parts = {"a": jsonl(folder), "b": {"train": str(folder / "b.jsonl")}}
    return {
        "parts": {
            name: {"dataset": {"kind": "jsonl", **keys}, "share": 0.5}
            for name, keys in parts.items()
        }
    }


FILES: dict[str, Callable[[Path], dict[str, Any]]] = {
    make.__name__: make for make in (gsm8k, svamp, mathqa, jsonl, mixture)
}
"""Kinds that read data, which only a person can write a sample of: sample files, and the keys that
name them."""
SIZES = {"train": NUM_TRAIN, "dev": 5, "test": NUM_TEST}
KEYS = {**SIZES, **{f"{split}_size": size for split, size in SIZES.items()}, "task": "chain_sum"}


def keys_of(kind: str, folder: Path) -> dict[str, Any]:
    """Sample files, or, for a kind that makes its problems up, small sizes."""
    if kind in FILES:
        return FILES[kind](folder)
    fields = component_class(kind, group="datasets").model_fields
    return {name: value for name, value in KEYS.items() if name in fields}


def test_a_dataset_that_reads_files_has_a_sample_of_them_here() -> None:
    reading = [
        kind
        for kind in known_kinds("datasets")
        if issubclass(component_class(kind, group="datasets"), FileDataset)
    ]
    assert set(reading) <= set(FILES)


@pytest.fixture(params=known_kinds("datasets"))
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], Splits]:
    kind: str = request.param
    if kind == "reasoning_gym" and importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("the extra reasoning-gym is not installed")
    keys = keys_of(kind, tmp_path)
    return lambda seed: load_component({"kind": kind, **keys}, group="datasets").load(seed=seed)


def everything(splits: Splits) -> list[Problem]:
    return [*splits.train, *splits.dev, *splits.test]


def test_no_split_is_empty_and_ids_are_unique(load: Callable[[int], Splits]) -> None:
    splits = load(0)
    assert splits.train and splits.dev and len(splits.test) == NUM_TEST
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
