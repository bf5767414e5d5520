"""Combines several datasets into one. Each may have a fixed share of the training questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Self

from pydantic import Field, model_validator

from reftune.datasets import Splits, load_dataset
from reftune.datasets.reading.splits import draw_splits
from reftune.errors import DataError
from reftune.recipe import Component, Table, refusal
from reftune.recipe.kinds import component_field
from reftune.seeds import derive_seed
from reftune.types import Problem


class Part(Table):
    """One of the datasets of a mixture."""

    dataset: component_field("datasets")  # type: ignore[valid-type]
    """A table like the recipe's `dataset`."""
    share: float | None = Field(None, gt=0, le=1)
    """This dataset's share of the mixture's training rows. Set it either for every dataset, so
    that the shares add up to 1, or for none. By default, all training rows are used."""


class Mixture(Component):
    """Combines datasets. No question is in more than one split."""

    parts: dict[str, Part] = Field(min_length=2)
    """Maps names of your choice to datasets and their shares."""

    @model_validator(mode="after")
    def _shares_are_whole(self) -> Self:
        shares = [part.share for part in self.parts.values()]
        given = [share for share in shares if share is not None]
        if given and (len(given) < len(shares) or abs(sum(given) - 1) > 1e-6):
            raise refusal("shares", "shares: expected one for each part, with a sum of 1, or none")
        return self

    def load(self, *, seed: int) -> Splits:
        """The combined splits of all parts. Raises: as `Dataset.load`; also DataError if shares are
        set and problems of two parts get the same id. For example, problem `b/1` of part `a` and
        problem `1` of part `a/b` both get the id `a/b/1`."""
        parts = {name: load_dataset(part.dataset, seed=seed) for name, part in self.parts.items()}
        part_of: dict[str, str] = {}

        def named(split: str) -> Iterator[Problem]:
            for name, splits in parts.items():
                for problem in getattr(splits, split):
                    id = f"{name}/{problem.id}"
                    first = part_of.setdefault(id, name)
                    if first != name and self.parts[name].share is not None:
                        raise DataError(
                            f"dataset.parts: {first} and {name} both have a problem {id}; expected"
                            " other names"
                        )
                    yield replace(problem, id=id)

        mixed = draw_splits(
            train=named("train"),
            dev=named("dev"),
            test=named("test"),
            dev_size=None,
            seed=seed,
            several_rationales=True,
        )
        train = self._drawn(mixed.train, part_of, seed)
        counts: dict[str, int] = {}
        notes: list[str] = []
        for name, splits in parts.items():
            counts |= {f"{name}: {reason}": count for reason, count in splits.counts.items()}
            own = f" dataset.parts.{name}.dataset."
            notes += [note.replace(" dataset.", own) for note in splits.notes]
        counts |= mixed.counts
        if left := len(mixed.train) - len(train):
            counts["over_share"] = left
        return replace(mixed, train=train, counts=counts, notes=tuple(notes))

    def _drawn(
        self, train: Sequence[Problem], part_of: Mapping[str, str], seed: int
    ) -> tuple[Problem, ...]:
        """The largest selection from `train` in which each dataset has its share, up to rounding.
        `part_of` maps each problem's id to the name of its dataset. An id in `train` may have a
        suffix such as `-2`, which was added after `part_of` was made. The problems are drawn with
        `seed`. If no shares are set, all of `train` is returned."""
        shares = {name: part.share for name, part in self.parts.items() if part.share is not None}
        if not shares:
            return tuple(train)
        of: dict[str, list[Problem]] = {name: [] for name in shares}
        for problem in train:
            of[part_of.get(problem.id) or part_of[problem.id.rpartition("-")[0]]].append(problem)
        size = min(len(of[name]) / share for name, share in shares.items())
        chosen = {
            problem.id
            for name, share in shares.items()
            for problem in sorted(of[name], key=lambda p: derive_seed(seed, "mixture", p.id))[
                : round(size * share)
            ]
        }
        return tuple(problem for problem in train if problem.id in chosen)
