"""Combines several datasets into one. Each may have a fixed share of the training questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from pydantic import Field, model_validator

from reftune.datasets import Splits, load_dataset
from reftune.datasets.reading.splits import draw_splits
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
    """Maps names of your choice to datasets and their shares. If shares are set, no name may begin
    with another name and a slash, such as `a/b` beside `a`."""

    @model_validator(mode="after")
    def _shares_are_whole(self) -> Self:
        shares = [part.share for part in self.parts.values()]
        given = [share for share in shares if share is not None]
        if given and (len(given) < len(shares) or abs(sum(given) - 1) > 1e-6):
            raise refusal("shares", "shares: expected one for each part, with a sum of 1, or none")
        for name in self.parts if given else ():
            if any(other.startswith(f"{name}/") for other in self.parts):
                raise refusal("parts", f"parts: a name begins with {name}/; expected another name")
        return self

    def load(self, *, seed: int) -> Splits:
        """The combined splits of all parts. Raises: as `Dataset.load`."""
        parts = {name: load_dataset(part.dataset, seed=seed) for name, part in self.parts.items()}

        def named(split: str) -> list[Problem]:
            return [
                replace(problem, id=f"{name}/{problem.id}")
                for name, splits in parts.items()
                for problem in getattr(splits, split)
            ]

        mixed = draw_splits(
            train=named("train"),
            dev=named("dev"),
            test=named("test"),
            dev_size=None,
            seed=seed,
            several_rationales=True,
        )
        train = self._drawn(mixed.train, seed)
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

    def _drawn(self, train: Sequence[Problem], seed: int) -> tuple[Problem, ...]:
        """The largest selection from `train` in which each dataset has its share, up to rounding.
        The problems are drawn with `seed`. If no shares are set, all of `train` is returned."""
        of = {
            name: [problem for problem in train if problem.id.startswith(f"{name}/")]
            for name in self.parts
        }
        shares = {name: part.share for name, part in self.parts.items() if part.share is not None}
        if not shares:
            return tuple(train)
        size = min(len(of[name]) / share for name, share in shares.items())
        chosen = {
            problem.id
            for name, share in shares.items()
            for problem in sorted(of[name], key=lambda p: derive_seed(seed, "mixture", p.id))[
                : round(size * share)
            ]
        }
        return tuple(problem for problem in train if problem.id in chosen)
