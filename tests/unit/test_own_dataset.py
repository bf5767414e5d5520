"""A dataset of one's own that is not read from files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from reftune.datasets import Splits, load_dataset
from reftune.datasets.jsonl import Jsonl
from reftune.errors import DataError
from reftune.recipe import Component
from reftune.types import Answer, Message, Problem


def problem(number: int, *, gold: int, returns: int) -> Problem:
    return Problem(
        id=str(number),
        question=f"What is {gold}?",
        answer=Answer(kind="number", value=Fraction(gold)),
        rationale=f"def solution():\n    return {returns}",
    )


class Own(Component):
    def load(self, *, seed: int) -> Splits:
        return Splits(
            train=(problem(0, gold=5, returns=6), problem(1, gold=2, returns=2)),
            dev=(problem(0, gold=7, returns=7), problem(1, gold=8, returns=9)),
            test=(problem(0, gold=3, returns=3),),
        )


def test_problems_of_an_own_dataset_get_unique_ids_so_that_each_keeps_its_own_grade() -> None:
    splits = load_dataset(Own(kind="own"), seed=0)
    assert [each.question for each in splits.train] == ["What is 2?"]
    assert [each.rationale is None for each in splits.dev] == [False, True]
    ids = [each.id for split in (splits.test, splits.dev, splits.train) for each in split]
    assert ids == ["0", "0-2", "1", "1-2"]


def numbered(*numbers: int) -> tuple[Problem, ...]:
    return tuple(problem(number, gold=number, returns=number) for number in numbers)


class Given(Component):
    """Returns what it is given, whatever it is."""

    made: Any

    def load(self, *, seed: int) -> Any:
        return self.made


def load(**splits: Any) -> Splits:
    return load_dataset(Given(kind="given", made=Splits(**splits)), seed=0)


def golds(problems: Sequence[Problem]) -> list[str]:
    return [str(problem.answer) for problem in problems]


def test_questions_that_an_own_dataset_puts_in_two_splits_are_dropped_as_leaks() -> None:
    # of train, 2 is in dev and 3 in test; of dev, 3 is in test
    splits = load(train=numbered(1, 2, 3, 4), dev=numbered(2, 3, 5), test=numbered(3, 6))
    assert [golds(split) for split in (splits.train, splits.dev, splits.test)] == [
        ["1", "4"],
        ["2", "5"],
        ["3", "6"],
    ]
    assert splits.counts == {"leak": 3}


def test_questions_that_differ_at_all_are_no_leaks() -> None:
    mazes = [
        replace(each, question=f"The shortest path?\n{maze}")
        for each, maze in zip(numbered(1, 2), (".#.", "#.."), strict=True)
    ]
    assert len(load(train=mazes[:1], dev=mazes[1:], test=()).train) == 1
    shown = [
        replace(each, question="Solve it.", messages=(Message(role="user", content=str(n)),))
        for n, each in enumerate(numbered(1, 2))
    ]
    assert len(load(train=shown[:1], dev=shown[1:], test=()).train) == 1
    whole = load(train=numbered(1, 1, 2), dev=numbered(4), test=(), counts={"odd": 2})
    assert (golds(whole.train), whole.counts) == (["1", "1", "2"], {"odd": 2})


def test_lists_and_generators_are_splits_too() -> None:
    splits = load(train=list(numbered(1, 2)), dev=iter(numbered(3)), test=(p for p in numbered(4)))
    assert [golds(split) for split in (splits.train, splits.dev, splits.test)] == [
        ["1", "2"],
        ["3"],
        ["4"],
    ]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ((1, 2, 3), r"load returned \(1, 2, 3\); expected Splits"),
        ({"train": ()}, r"load returned \{'train': \(\)\}; expected Splits"),
        (None, "load returned None"),
        (Splits(train=None, dev=(), test=()), "train is None; expected Problems"),  # type: ignore[arg-type]
        (Splits(train=(*numbered(1), None), dev=(), test=()), "train, problem 2: expected a Prob"),  # type: ignore[arg-type]
        (Splits(train=(), dev=({},), test=()), "dev, problem 1: expected a Problem"),  # type: ignore[arg-type]
    ],
)
def test_what_an_own_dataset_returns_instead_of_splits_is_named(made: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"^dataset given: {message}"):
        load_dataset(Given(kind="given", made=made), seed=0)


def answer(kind: Any, value: Any, **more: Any) -> dict[str, Any]:
    return {"answer": Answer(kind=kind, value=value, **more)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "a"}, "answer: expected an Answer, got 'a'"),
        ({"answer": 5}, "answer: expected an Answer, got 5"),
        ({"question": 5}, "question: expected text, got 5"),
        ({"rationale": 5}, "rationale: expected text or None, got 5"),
        ({"choices": "ab"}, "choices: expected a tuple of texts, got 'ab'"),
        (answer("number", 5), "answer.value: expected a Fraction, got 5"),
        (answer("number", 2.5), "answer.value: expected a Fraction, got 2.5"),
        (answer("number", "5"), "answer.value: expected a Fraction, got '5'"),
        (answer("text", Fraction(5)), r"answer.value: expected text, got Fraction\(5, 1\)"),
        (answer("float", "5"), "answer.kind: expected number, choice, .*, got 'float'"),
        (answer("choice", "B"), "answer.value: expected a letter from a to z, got 'B'"),
        (answer("choice", "ab"), "answer.value: expected a letter from a to z, got 'ab'"),
        (
            {"choices": ("x", "y"), **answer("choice", "c")},
            "answer.value: expected a letter from a to b, got 'c'",
        ),
        (answer("any_of", "a"), "answer.items: expected the items of kind any_of, got none"),
        (
            answer("set", "1, 2", items=(1, 2)),
            r"answer.items: expected a tuple of texts, got \(1, 2\)",
        ),
        (answer("any_of", "ab", items="ab"), "answer.items: expected a tuple of texts, got 'ab'"),
        (answer("regex", "("), r"answer.value: expected a regular expression, got '\(' \(.*\)"),
        (answer("regex", "[a"), r"answer.value: expected a regular expression, got '\[a' \(.*\)"),
        ({"choices": (1, 2)}, r"choices: expected a tuple of texts, got \(1, 2\)"),
        ({"choices": ["a", None]}, r"choices: expected a tuple of texts, got \['a', None\]"),
        ({"messages": None}, "messages: expected a tuple of Messages, got None"),
        (
            {"messages": ({"role": "user", "content": "1?"},)},
            r"messages: expected Messages whose content is text, got \{'role': 'user', .*\}",
        ),
        (
            {"messages": (Message(role="user", content=5),)},  # type: ignore[arg-type]
            r"messages: expected Messages whose content is text, got Message\(.*\)",
        ),
        ({"id": None}, "id: expected text or a number, got None"),
    ],
)
def test_a_value_of_the_wrong_type_names_the_problem(changes: Any, message: str) -> None:
    odd = replace(numbered(2)[0], **changes)
    with pytest.raises(DataError, match=f"^dataset given: train, problem 2: {message}$"):
        load(train=(*numbered(1), odd), dev=(), test=())


@pytest.mark.parametrize(
    "changes",
    [
        answer("number", Fraction(1, 3)),
        answer("text", "five"),
        answer("regex", "a.*"),
        {"choices": ("x", "y"), **answer("choice", "b")},
        {"choices": ["x", "y"], **answer("choice", "a")},
        {"messages": [Message(role="user", content="2?")]},
        {"id": 7},
        answer("set", '["a", "b"]', items=("a", "b")),
        {"rationale": "def solution():\n    return 2"},
    ],
)
def test_problems_of_the_right_types_pass(changes: Any) -> None:
    made = replace(numbered(2)[0], **{"rationale": None, **changes})
    assert load(train=(made,), dev=(), test=()).train == (made,)


# --- classes derived from a built-in dataset ------------------------------------------------------

ROWS = [
    {"id": f"{n}", "question": f"{n}?", "answer": "1.250", "rationale": f"{n}. The answer is 1.250"}
    for n in range(20)
]


def derived(folder: Path, load: Any) -> Splits:
    """The splits of a class derived from `Jsonl` with this `load`."""
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    keys = {"kind": "own.py:Own", "train": str(path), "dev_size": 2, "decimal": ","}
    return load_dataset(type("Own", (Jsonl,), {"load": load}).model_validate(keys), seed=0)


def test_a_derived_dataset_with_its_own_load_is_checked(tmp_path: Path) -> None:
    def load(self: Jsonl, *, seed: int) -> Splits:
        splits = Jsonl.load(self, seed=seed)
        return replace(splits, test=splits.train[:5])

    splits = derived(tmp_path, load)
    assert [len(split) for split in (splits.train, splits.dev, splits.test)] == [13, 2, 5]
    assert splits.counts == {"leak": 5}, (
        "1.250 is read with a decimal comma and contradicts nothing"
    )


def test_a_derived_dataset_loses_the_contradictions_of_its_own_load(tmp_path: Path) -> None:
    def load(self: Jsonl, *, seed: int) -> Splits:
        first, *rest = Jsonl.load(self, seed=seed).train
        wrong = replace(first, rationale="The answer is 1,25")
        return Splits(train=(wrong, *rest), dev=(), test=(), counts={"rationale_disagrees": 1})

    splits = derived(tmp_path, load)
    assert (len(splits.train), splits.counts) == (17, {"rationale_disagrees": 2})
    with pytest.raises(
        DataError, match=r"^dataset own\.py:Own: load returned None; expected Split"
    ):
        derived(tmp_path, lambda self, seed: None)


def test_a_derived_dataset_without_its_own_load_is_left_alone(tmp_path: Path) -> None:
    assert len(derived(tmp_path, Jsonl.load).train) == 18
