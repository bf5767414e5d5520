"""What a stage is and what it works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from reftune.datasets import Splits
from reftune.model.policy import Policy
from reftune.recipe import Recipe
from reftune.seeds import derive_seed
from reftune.stages.progress import Progress
from reftune.stages.rollouts import Collector
from reftune.storage.json_lines import JsonLines


@dataclass(frozen=True, kw_only=True, slots=True)
class StageContext:
    """What a stage works with."""

    name: str
    recipe: Recipe
    policy: Policy
    """Initialised as the stage asks; trained in place."""
    splits: Splits
    collector: Collector
    folder: Path
    """`stages/NAME` of the run."""
    metrics: JsonLines
    progress: Progress
    load: Callable[[str], Policy]
    """The base model or an earlier method's chosen one, by name, for stages that need a second
    model."""

    def seed(self, *parts: int | str) -> int:
        return derive_seed(self.recipe.seed, self.name, *parts)


class Stage(Protocol):
    """A training. Stages are components; `init` names the method whose chosen model they start
    from, or `base`."""

    init: str

    @property
    def needs(self) -> tuple[str, ...]:
        """All methods whose models this stage reads, `init` among them."""

    @property
    def produces(self) -> tuple[str, ...]:
        """Further methods this stage leaves behind, as snapshots."""

    @property
    def is_method(self) -> bool:
        """Whether its model answers problems, and so is evaluated and can be built on."""

    def run(self, context: StageContext) -> None:
        """Train, then leave the chosen model and `stage.json` in `context.folder`."""
