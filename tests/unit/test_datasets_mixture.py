"""A mixture: shares, ids, and no question in two splits of different parts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from reftune.datasets import Splits, load_splits
from reftune.datasets.mixture import Mixture
from reftune.errors import DataError


def part(folder: Path, name: str, numbers: range, tested: range = range(0)) -> dict[str, Any]:
    for split, asked in (("train", numbers), ("test", tested)):
        lines = [json.dumps({"question": f"What is {n}?", "answer": n}) for n in asked]
        (folder / f"{name}-{split}.jsonl").write_text("\n".join(lines))
    test = {"test": str(folder / f"{name}-test.jsonl")} if tested else {}
    return {"kind": "jsonl", "train": str(folder / f"{name}-train.jsonl"), "dev_size": 2, **test}


def mixture(first: Any, second: Any, shares: Any = (None, None)) -> Mixture:
    parts = {
        "a": {"dataset": first, "share": shares[0]},
        "b": {"dataset": second, "share": shares[1]},
    }
    return Mixture.model_validate({"kind": "mixture", "parts": parts})


def sizes(splits: Splits) -> Counter[str]:
    return Counter(problem.id.partition("/")[0] for problem in splits.train)


def test_without_shares_every_question_is_taken(tmp_path: Path):
    mixed = mixture(part(tmp_path, "a", range(20)), part(tmp_path, "b", range(100, 150)))
    splits = mixed.load(seed=0)
    assert sizes(splits) == {"a": 18, "b": 48}, "two of each are dev"
    assert sizes(Splits(train=splits.dev, dev=(), test=())) == {"a": 2, "b": 2}


def test_the_part_that_runs_out_first_limits_the_size(tmp_path: Path):
    # 18 of a are three quarters of 24, so b gives 6 of its 48
    mixed = mixture(
        part(tmp_path, "a", range(20)), part(tmp_path, "b", range(100, 150)), (0.75, 0.25)
    )
    first, again, other = mixed.load(seed=0), mixed.load(seed=0), mixed.load(seed=1)
    assert sizes(first) == {"a": 18, "b": 6}
    assert first.counts == {"over_share": 42}
    assert first == again
    assert {p.id for p in first.train if p.id[0] == "b"} != {
        p.id for p in other.train if p.id[0] == "b"
    }


def test_a_test_question_of_one_part_is_not_trained_on_in_another(tmp_path: Path):
    mixed = mixture(
        part(tmp_path, "a", range(20), tested=range(100, 110)), part(tmp_path, "b", range(100, 150))
    )
    splits = mixed.load(seed=0)
    asked = {problem.question for problem in splits.test}
    assert len(asked) == 10
    assert not asked & {problem.question for problem in (*splits.train, *splits.dev)}
    assert splits.counts["leak"] == 10


@pytest.mark.parametrize("shares", [(0.5, 0.4), (0.5, None), (1.0, 0.5)])
def test_shares_are_given_for_all_parts_and_sum_to_one(tmp_path: Path, shares: Any):
    with pytest.raises(ValidationError, match="expected one for each part, with a sum of 1"):
        mixture(part(tmp_path, "a", range(9)), part(tmp_path, "b", range(9)), shares)


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a"), ("a", "a/")])
@pytest.mark.parametrize("share", [0.5, None])
def test_a_name_may_begin_with_another_and_a_slash(tmp_path: Path, names: Any, share: Any):
    # 18 of the first part's 20 questions are not dev, so the second gives 18 of its 48
    parts = {
        name: {"dataset": part(tmp_path, f"{n}", asked), "share": share}
        for n, (name, asked) in enumerate(zip(names, (range(20), range(100, 150)), strict=True))
    }
    train = Mixture.model_validate({"kind": "mixture", "parts": parts}).load(seed=0).train
    of_second = [int(problem.answer.value) >= 100 for problem in train]
    assert (of_second.count(False), of_second.count(True)) == (18, 48 if share is None else 18)
    assert len({problem.id for problem in train}) == len(train)


@pytest.mark.parametrize("split", ["train", "test"])
def test_with_shares_no_two_parts_have_a_problem_of_the_same_id(tmp_path: Path, split: str):
    # the problem b/1 of a, and the problem 1 of a/b
    def source(split: str, *ids: str) -> str:
        path = tmp_path / f"{split}-{len(ids[0])}.jsonl"
        rows = ({"id": id, "question": f"{path.stem} {id}?", "answer": 1} for id in ids)
        path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)

    in_a = {"train": source("train", "b/1", "b/2", "b/3"), "test": source("test", "b/8")}
    in_ab = {"train": source("train", "1" if split == "train" else "8", "6", "7"), "dev_size": 0}

    def named(share: float | None) -> Mixture:
        datasets = {"a": {**in_a, "dev_size": 0}, "a/b": in_ab}
        parts = {
            name: {"dataset": {"kind": "jsonl", **keys}, "share": share}
            for name, keys in datasets.items()
        }
        return Mixture.model_validate({"kind": "mixture", "parts": parts})

    id = "a/b/1" if split == "train" else "a/b/8"
    with pytest.raises(DataError, match=f"a and a/b both have a problem {id}; expected other"):
        named(0.5).load(seed=0)
    splits = named(None).load(seed=0)
    assert {id, f"{id}-2"} <= {problem.id for problem in (*splits.train, *splits.test)}


def test_names_with_a_slash_or_a_common_beginning_keep_their_shares(tmp_path: Path):
    sources = part(tmp_path, "x", range(20)), part(tmp_path, "y", range(100, 150))
    parts = {n: {"dataset": d, "share": 0.5} for n, d in zip(("a/b", "a/bc"), sources, strict=True)}
    splits = Mixture.model_validate({"kind": "mixture", "parts": parts}).load(seed=0)
    found = Counter(problem.id.rpartition("/")[0] for problem in splits.train)
    assert found == {"a/b": 18, "a/bc": 18}


def test_if_no_dev_problems_are_left_the_key_of_a_part_is_named(tmp_path: Path, make_recipe):
    first, second = (
        {**part(tmp_path, name, range(n, n + 5)), "dev_size": 0} for n, name in enumerate("ab")
    )
    recipe = make_recipe().model_copy(update={"dataset": mixture(first, second)})
    key = r"dataset\.parts\.NAME\.dataset\.dev_size"
    with pytest.raises(DataError, match=rf"no dev problems .*; set {key} or a dev file$"):
        load_splits(recipe)


def test_a_part_keeps_rationales_that_are_right_by_its_own_decimal_separator(
    tmp_path: Path, make_recipe
):
    # 1.250 is 1250 with a decimal comma; by a point it would be 1.25 and contradict the gold
    def row(n: int) -> dict[str, Any]:
        return {"question": f"{n}?", "answer": "1.250", "rationale": f"{n}. The answer is 1.250"}

    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(json.dumps(row(n)) for n in range(20)))
    comma = {"kind": "jsonl", "train": str(path), "dev_size": 2, "decimal": ","}
    parts = {"a": {"dataset": part(tmp_path, "a", range(100, 120))}, "c": {"dataset": comma}}
    recipe = make_recipe()
    dataset = Mixture.model_validate({"kind": "mixture", "parts": parts})
    splits = load_splits(recipe.model_copy(update={"dataset": dataset}))
    assert sizes(splits) == {"a": 18, "c": 18}
    assert splits.counts == {}


OWN = """
from fractions import Fraction
from reftune.datasets import Splits
from reftune.recipe import Component
from reftune.types import Answer, Problem

def problem(n):
    said = 9 if n == 1 else n  # problem 1 contradicts its gold answer
    gold = Answer(kind="number", value=Fraction(n))
    return Problem(id=f"{n}", question=f"{n}?", answer=gold, rationale=f"The answer is {said}")

class Own(Component):
    def load(self, *, seed):
        return Splits(train=tuple(map(problem, range(6))), dev=(), test=(), counts={})
"""


def test_a_part_of_ones_own_loses_rationales_that_contradict_their_gold(tmp_path: Path):
    (tmp_path / "own.py").write_text(OWN)
    splits = mixture(part(tmp_path, "a", range(100, 120)), f"{tmp_path}/own.py:Own").load(seed=0)
    assert sizes(splits) == {"a": 18, "b": 5}
    assert splits.counts == {"b: rationale_disagrees": 1}


def test_ids_that_are_the_same_as_text_keep_their_part(tmp_path: Path):
    own = OWN.replace('id=f"{n}"', 'id=2 if n == 3 else f"{n}"')  # 2 and "2"
    (tmp_path / "own.py").write_text(own)
    first = part(tmp_path, "a", range(100, 120))
    splits = mixture(first, f"{tmp_path}/own.py:Own", (0.5, 0.5)).load(seed=0)
    assert sizes(splits) == {"a": 5, "b": 5}
    assert len({problem.id for problem in splits.train}) == 10
