"""The tables of a recipe and their defaults."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field, PositiveInt, model_validator

from reftune.recipe.kinds import Table, component_field, refusal
from reftune.types import Problem

if TYPE_CHECKING:
    from reftune.datasets import Splits


class LoraTable(Table):
    """Train low-rank adapters instead of all weights."""

    rank: int = Field(16, gt=0)
    alpha: int = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


class ScratchTable(Table):
    """An untrained, Llama-like model whose vocabulary comes from the training data."""

    hidden_size: int = Field(64, gt=0)
    layers: int = Field(3, gt=0)
    heads: int = Field(4, gt=0)
    context: int = Field(256, gt=0)
    """Context length in tokens."""
    dropout: float = Field(0.1, ge=0, lt=1)


class ModelTable(Table):
    """Set either `path` or `scratch`."""

    path: str | None = None
    """A model folder, a Hugging Face Hub id, or `smollm2-135m`, whose weights come in a Python
    package."""
    revision: str | None = None
    """Branch, tag or commit of `path` on the Hub."""
    scratch: ScratchTable | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of forward and backward passes. `auto` is bfloat16 if the device supports it at
    full speed, and float32 otherwise. During training, trainable weights are always float32."""
    device: str = Field("auto", pattern=r"^[a-z]+$")
    """`auto` is CUDA if available, and the CPU otherwise. `mps` and `xpu` are untested."""
    lora: LoraTable | None = None
    quantize: Literal["nf4"] | None = None
    """Store the base model's linear layers in 4 bits, which saves memory but slows decoding. This
    needs `lora`."""
    micro_batch_tokens: PositiveInt | Literal["auto"] = "auto"
    """Maximum number of tokens in a forward and backward pass. `auto` uses as many as fit in the
    device's memory, up to 16,384."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which saves a lot of memory but lengthens updates
    by about a third."""
    compile: bool = False
    """Use torch.compile, except for generation. This needs a C++ compiler."""
    save_dtype: Literal["base", "float32", "bfloat16", "float16"] | None = None
    """Precision in which weights are saved. The final evaluation uses the saved weights. `base` is
    the precision of the files at `path`. Default: `base` with `lora`, and float32 otherwise."""
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> ModelTable:
        if (self.path is None) == (self.scratch is None):
            raise refusal("model_source", "set exactly one of path and scratch")
        if self.quantize is not None and self.lora is None:
            raise refusal(
                "quantize", "quantize: weights in 4 bits cannot be trained; expected model.lora"
            )
        return self

    @property
    def max_tokens(self) -> int:
        """`micro_batch_tokens` as a number. If the key is `auto`, the largest number that `auto`
        can choose."""
        return 16384 if self.micro_batch_tokens == "auto" else self.micro_batch_tokens


class LengthTable(Table):
    """Length limits in tokens."""

    max_prompt: int | None = Field(None, gt=0)
    """Maximum length of a prompt. Default: the model's context length minus `max_new`."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """`refuse` stops with an error if a prompt is too long. With `drop`, a question whose prompt is
    too long is not used for training; in dev and test, it counts as unanswered."""
    max_new: int = Field(256, gt=0)
    """Maximum length of a sampled solution. Longer gold solutions are not used for training."""


class EvaluateTable(Table):
    """The final evaluation of the methods."""

    split: Literal["test", "dev"] = "test"
    samples: int = Field(0, ge=0)
    """Number of solutions to sample per problem, for voting, reranking and pass@k."""
    sampled: list[str] | None = None
    """Methods from which solutions are sampled. Default: all methods that are evaluated."""
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0)
    """Sample only from the `top_k` most likely tokens. With 0, sample from all tokens."""
    rerank: str | None = None
    """Reward model that scores the samples: a stage's name, or another run's stage folder."""
    stages: list[str] | None = None
    """Methods to evaluate. `base`, the model before training, is allowed if it is pretrained.
    Default: all methods except `base`."""
    limit: int | None = Field(None, gt=0)
    """Evaluate only the first `limit` problems of the split."""

    @model_validator(mode="after")
    def _samples_to_rerank(self) -> EvaluateTable:
        if self.rerank is not None and self.samples == 0:
            raise refusal("rerank", "rerank: expected samples > 0, because samples are reranked")
        return self

    def problems(self, splits: Splits) -> Sequence[Problem]:
        """The problems on which every method is evaluated."""
        problems: Sequence[Problem] = getattr(splits, self.split)
        return problems[: self.limit]

    def num_samples(self, method: str) -> int:
        """Number of samples to draw per problem from a method's model."""
        return self.samples if self.sampled is None or method in self.sampled else 0


class CheckTable(Table):
    """What `reftune check` tolerates."""

    min_gold_correct: float = Field(0.99, ge=0, le=1)
    """At least this share of gold answers, and of gold rationales, must be graded correct."""
    waive: list[str] = Field(default_factory=list)
    """Names of checks that warn instead of failing."""


TrackerName = Literal["tensorboard", "wandb", "trackio"]


DEFAULT: Any = Field(default_factory=dict, validate_default=True)
"""The default of a key whose value is a plug-in: the default kind, with no other keys set."""


class Recipe(Table):
    """All settings of a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = 0
    """Every stage draws its random numbers from this seed and the stage's name. Under another name,
    the same stage therefore ends with other weights."""
    run_dir: str | None = None
    """The run's folder. Default: `runs/NAME`."""
    threads: int | None = Field(None, gt=0)
    """Number of CPU threads. With 1, results do not depend on the number of cores. Default:
    PyTorch's choice."""
    model: ModelTable
    dataset: component_field("datasets")  # type: ignore[valid-type]
    format: component_field("formats")  # type: ignore[valid-type]
    reward: component_field("rewards", default="outcome") = DEFAULT  # type: ignore[valid-type]
    engine: component_field("engines", default="kv") = DEFAULT  # type: ignore[valid-type]
    lengths: LengthTable = LengthTable()
    stages: dict[str, component_field("stages")] = Field(min_length=1)  # type: ignore[valid-type]
    """Maps names to stages, which run in the order listed."""
    evaluate: EvaluateTable = EvaluateTable()
    check: CheckTable = CheckTable()
    trackers: list[TrackerName] | None = None
    """Any of `tensorboard`, `wandb` and `trackio`. Default: TensorBoard, if installed."""
    tracker_rollouts: int = Field(16, ge=0)
    """Number of sampled solutions per step to show in wandb and Trackio."""

    @model_validator(mode="after")
    def _rationales_fit_the_format(self) -> Recipe:
        written, read = getattr(self.dataset, "rationale", None), self.format.kind
        if (written, read) in (("nl", "program"), ("program", "nl")):
            raise refusal(
                "rationale_kind",
                f"dataset.rationale: {written} rationales, but format.kind is {read}; expected the"
                " same for both",
            )
        return self

    @property
    def folder(self) -> Path:
        return local_path(self.run_dir) if self.run_dir is not None else Path("runs") / self.name

    def saved_by(self, stage: str) -> tuple[str, ...]:
        """The names of the models that a stage saves. The snapshots come first, in the recipe's
        order. The final model, which has the stage's name, comes last."""
        return (*self.stages[stage].produces, stage)

    def methods_of(self, stage: str) -> tuple[str, ...]:
        """The names of the stage's saved models that count as methods. Every saved model counts,
        except a final model that does not solve problems, such as a reward model (`is_method` is
        false)."""
        saved = self.saved_by(stage)
        return saved if self.stages[stage].is_method else saved[:-1]

    @property
    def methods(self) -> list[str]:
        """The names of all methods, in training order."""
        return [method for stage in self.stages for method in self.methods_of(stage)]

    @property
    def methods_to_evaluate(self) -> list[str]:
        """The names of the methods to evaluate, in training order. `base` comes first, if it is to
        be evaluated."""
        wanted = self.evaluate.stages
        if wanted is None:
            return self.methods
        return [method for method in ("base", *self.methods) if method in wanted]


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, which `load_recipe` reads back as an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def local_path(path: str) -> Path:
    """The path, with `~` or `~USER` at its start replaced by the home folder of a known user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  (which raises if the user is unknown)
