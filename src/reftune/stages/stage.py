"""The interface of a stage, the context in which it runs, and the events that it reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from reftune.recipe import Component, Recipe
from reftune.seeds import derive_seed

if TYPE_CHECKING:  # the live view reads `Progress` without torch
    from reftune.datasets import Splits
    from reftune.model.policy import Policy
    from reftune.stages.rollouts import Collector
    from reftune.storage.files import JsonLines
    from reftune.storage.run_folder import StageFolder
    from reftune.types import Solution


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """The objects that a stage works with."""

    name: str
    stage: Stage
    recipe: Recipe
    splits: Splits
    collector: Collector
    folder: StageFolder
    metrics: JsonLines
    progress: Progress
    load: Callable[[str], Policy]
    """Loads another model by name, such as `base` or an earlier method."""
    take: Callable[[str], Policy]
    """Loads a model to train, and frees the memory of the model that was loaded last."""

    @cached_property
    def policy(self) -> Policy:
        """The model that the stage trains in place. It is loaded from `init` on first use. Any
        other model that the stage used earlier is first removed from memory."""
        return self.take(self.stage.init)

    def seed(self, *parts: int | str) -> int:
        return derive_seed(self.recipe.seed, self.name, *parts)


class Progress:
    """Receives the events that a stage reports. The methods do nothing here; subclasses override
    them."""

    def stage(self, name: str, total_steps: int, done_steps: int = 0) -> None:
        """A stage begins, resumes after `done_steps` steps, or gets a new `total_steps`."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done; its metrics are named `group/name`."""

    def solutions(self, step: int, solutions: Sequence[Solution]) -> None:
        """A step has sampled these solutions. `solutions` is not empty."""

    def note(self, message: str) -> None:
        """A message for the user, which stays on the screen."""

    def close(self) -> None:
        """No more events follow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """Average seconds per sequence, if all devices work in parallel."""

    generate: float
    """Time to sample the response."""
    score: float
    """Time of a forward pass without gradients."""
    update: float
    """Time of a forward and backward pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """The numbers from which a stage's memory (`estimate.Estimate`) and time (`seconds`) are
    estimated."""

    steps: float
    batch: int
    """Sequences in a step."""
    updates: int = 1
    """Forward and backward passes over the batch in a step."""
    scored: int = 0
    """Maximum number of times that a step runs a forward pass without gradients over the batch. If
    the engine scores its own samples, fewer passes are needed."""
    sampled: int = 0
    """Solutions sampled in a step."""
    sampled_before: int = 0
    """Solutions sampled before the first step."""
    looks: float
    """Number of dev evaluations."""
    prompts: int = 0
    """Distinct prompts in a step."""
    sampler: bool = False
    """Whether another model samples before the first step."""
    reference: bool = False
    """Whether the initial policy is kept as a reference."""
    value_model: bool = False
    """Whether a second transformer is trained to predict the values."""
    state_bits: Literal[32, 8] = 32
    """Bits per element of the optimizer's moments."""

    def phases(self, pace: Pace) -> dict[str, float]:
        """The time of each phase of a step, in seconds."""
        return {
            "generate": self.sampled * pace.generate,
            "score": self.batch * self.scored * pace.score,
            "update": self.batch * self.updates * pace.update,
        }

    def seconds(self, pace: Pace, *, num_dev: int) -> float:
        """Time of the whole stage in seconds, including dev evaluations."""
        others = self.sampled_before + self.looks * num_dev
        return self.steps * sum(self.phases(pace).values()) + others * pace.generate


FACTS = ("kind", "init", "steps", "chosen_step", "dev_accuracy", "dev_n", "looks")
"""The keys that every `stage.json` needs: the stage's kind and its initial model, the number of
steps, the step of the chosen model with its accuracy on `dev_n` dev problems, and the number of dev
evaluations."""


class Stage(Component, ABC):
    """The base class of every stage. `check`, `plan` and runs use only this interface, so they
    treat your own stage like a built-in stage."""

    init: str = "base"
    """Model to start from: `base` (the recipe's `model`), an earlier method, a folder of LoRA
    adapters, or another run's stage folder (`runs/RUN/stages/STAGE`)."""

    is_method: ClassVar[bool] = True
    """Whether the stage's model solves problems. If not, the model is neither evaluated as a method
    nor used by later stages."""
    reads_rationales: ClassVar[bool] = False
    """Whether the stage needs gold rationales."""
    reads_questions: ClassVar[bool] = False
    """Whether the stage samples solutions to the training problems."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of all methods whose models this stage reads, including `init`."""
        return (self.init,)

    @property
    def produces(self) -> tuple[str, ...]:
        """The names of the methods that this stage saves as snapshots."""
        return ()

    def line(self) -> str:
        """The stage's line in the schedule that `check` prints."""
        return f"from {self.init}"

    def cost(self, *, num_train: int, num_dev: int) -> Cost | None:
        """The stage's cost with `num_train` training and `num_dev` dev problems. None if the cost
        cannot be predicted."""
        return None

    @abstractmethod
    def run(self, context: StageContext) -> None:
        """Train, then save the chosen model and `stage.json` in `context.folder`. `stage.json`
        needs the keys in `FACTS`. If the model, such as a reward model, is not meant to solve
        problems, `stage.json` also needs `is_method: false`."""
