"""The models that a run reads by name: `base`, saved methods, and folders of models or adapters."""

from __future__ import annotations

import gc
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from reftune.datasets import Splits
from reftune.errors import RecipeError
from reftune.model.adapters import require_continuable, with_adapters
from reftune.model.encoder import stop_texts
from reftune.model.policy import Policy
from reftune.model.weights import is_adapter_folder, load_model, saved_dtype, scratch_texts
from reftune.processes import sharding
from reftune.recipe import Recipe, local_path
from reftune.runs.auto import choose_device
from reftune.seeds import derive_seed
from reftune.stages.reward_model import WEIGHTS
from reftune.storage.run_folder import RunFolder, StageFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Models:
    """Loads a recipe's models as policies, and keeps in memory the policy that was loaded last."""

    def __init__(self, recipe: Recipe, splits: Splits) -> None:
        self.recipe, self.splits = recipe, splits
        self.kept: dict[tuple[str, bool], Policy] = {}
        """Contains at most one policy. Its key consists of the model's name, and of whether the
        policy was built for training with adapters or gradient checkpointing."""

    def load(self, name: str, *, trained: bool = False) -> Policy:
        """The model `name` as a policy. With `trained`, the policy is built for training. If the
        recipe also sets `lora`, the policy has adapters to train. These are new, except when the
        base model is quantized to 4 bits and `name` is not `base`. In that case, they are the
        adapters saved with `name`. The policy is kept for later calls, so the caller must not
        change it, even with `trained`. To get a policy that may be changed, call `take`.
        Raises: RecipeError if the model has not been trained yet, or if this machine or FSDP2 does
        not support a setting; ModelError if the model cannot be used."""
        table = self.recipe.model
        is_other = table.lora is not None or table.gradient_checkpointing
        key = (name, trained and is_other)
        if key not in self.kept:
            self.release()
            # unless `is_other`, always build for training, because `take` may need the policy later
            self.kept[key] = self._restored(name, trained=trained or not is_other)
        return self.kept[key]

    def release(self) -> None:
        """Free the memory of the policy that was loaded last, and of policies no longer used."""
        self.kept.clear()
        if self.recipe.model.gradient_checkpointing:  # which leaves policies in reference cycles
            gc.collect()

    def take(self, name: str) -> Policy:
        """The model `name` as a policy to train. It is not kept, because training changes it."""
        policy = self.load(name, trained=True)
        self.kept.clear()
        return policy

    def _restored(self, name: str, *, trained: bool) -> Policy:
        """The model `name` as a policy, with its value head and the recipe's settings, on the
        recipe's device. For training on a 4-bit base, the base is loaded with the model's own
        adapters, or with new ones if the model is the base itself. In all other cases, the model's
        full weights are loaded, and training with `lora` adds new adapters."""
        table = self.recipe.model
        require_trained(self.recipe, [name])
        continues = trained and table.quantize is not None
        if continues and sharding.current.splits:
            raise RecipeError("model.quantize: FSDP2 cannot split 4-bit weights; expected DDP")
        torch.manual_seed(derive_seed(self.recipe.seed, "adapters"))
        folder = stage_folder(self.recipe, name).path
        as_stored = not trained or table.lora is not None
        policy = Policy(
            *self._read("base" if continues else name, as_stored=as_stored),
            dtype=getattr(torch, table.dtype),
            lora=table.lora if trained else None,
            quantize=table.quantize if trained else None,
            trained=trained,
            stop=stop_texts(self.recipe.format),
        ).to(choose_device(table.device))
        policy.saved_dtype, policy.max_tokens = saved_dtype(table), table.max_tokens
        if continues and name != "base":
            if is_adapter_folder(folder):
                require_continuable(folder, table)
            policy.load_adapters(folder)
        policy.load_value_head(folder)
        policy.verify_head()
        if trained and table.gradient_checkpointing:
            policy.recompute_blocks()
        if table.compile:
            policy.compile_blocks()
        return policy

    def _read(
        self, name: str, *, as_stored: bool
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A model and its tokenizer, without the value head. Adapters are merged into the base."""
        table = self.recipe.model
        if name == "base":
            is_scratch = table.scratch is not None
            texts = scratch_texts(self.recipe.format, self.splits) if is_scratch else ()
            seed = derive_seed(self.recipe.seed, "base")
            return load_model(table, texts=texts, seed=seed, as_stored=as_stored)
        folder = stage_folder(self.recipe, name).path
        if is_adapter_folder(folder):
            model, tokenizer = self._read("base", as_stored=as_stored)
            return with_adapters(model, folder, base=table.path), tokenizer
        path = str(folder.absolute())  # ./smollm2-135m is not the packaged model
        table = table.model_copy(update={"path": path, "revision": None, "scratch": None})
        return load_model(table, as_stored=as_stored)


# --- the names in a recipe ------------------------------------------------------------------------


def check_stage_graph(recipe: Recipe) -> None:
    """Check that each stage uses only `base`, earlier methods and model folders; that no stage
    saves a model under an invalid or taken name; and that `evaluate` names only known methods and
    reward models. Raises: RecipeError if not."""
    known, made = ["base"], {"base"}
    for name, stage in recipe.stages.items():
        for method in stage.needs:
            if method not in known and not is_model_folder(method):
                keys = [key for key in type(stage).model_fields if getattr(stage, key) == method]
                raise RecipeError(
                    f"{'.'.join(['stages', name, *keys[:1]])}: {method} is not an earlier method;"
                    f" known here: {', '.join(known)}"
                )
        for method in recipe.saved_by(name):
            if Path(method).name != method or method.startswith(".") or method in ("", "base"):
                raise RecipeError(
                    f"stages.{name}: cannot save a method called {method!r}; expected a valid"
                    " name of a folder other than base, which is the model before training"
                )
            if method in made:
                raise RecipeError(
                    f"stages.{name}: another stage or snapshot is already called {method}"
                )
            made.add(method)
        known += recipe.methods_of(name)
    methods = known if recipe.model.path is not None else known[1:]  # omits an untrained base
    for key in ("stages", "sampled"):
        for method in getattr(recipe.evaluate, key) or ():
            if method not in methods:
                raise RecipeError(
                    f"evaluate.{key}: {method} is not a method; known: {', '.join(methods)}"
                )
    rerankers = [name for name, stage in recipe.stages.items() if not stage.is_method]
    rerank = recipe.evaluate.rerank
    if not (rerank is None or rerank in rerankers or (local_path(rerank) / WEIGHTS).is_file()):
        raise RecipeError(
            f"evaluate.rerank: {rerank} is not a reward model: neither one of this recipe's"
            f" ({', '.join(rerankers) or 'it has none'}) nor a folder with a {WEIGHTS}"
        )


def require_trained(recipe: Recipe, names: Collection[str]) -> None:
    """Check that each of `names` is `base`, a trained method or reward model, or the path of a
    model folder. Raises: RecipeError if not, or if a folder belongs to an unfinished stage."""
    for name in names:
        folder = RunFolder(recipe.folder).stage(name)
        if not (name == "base" or folder.is_done or is_model_folder(name)):
            if name not in recipe.methods and name not in recipe.stages:
                raise RecipeError(
                    f"{name}: neither a method of this recipe ({', '.join(recipe.methods)}) nor a"
                    " model folder"
                )
            raise RecipeError(f"{folder.path}: not trained yet; `reftune run` trains it")
        other = StageFolder(local_path(name))
        if not folder.is_done and not other.is_done and other.has_begun:
            raise RecipeError(
                f"{name}: this stage is not finished; `reftune run` with its recipe continues it"
            )


def stage_folder(recipe: Recipe, name: str) -> StageFolder:
    """The folder of the model `name` inside the run folder. If `name` is neither `base` nor a model
    that the recipe saves, `name` is itself the path of the folder."""
    own = {"base", *(saved for stage in recipe.stages for saved in recipe.saved_by(stage))}
    return RunFolder(recipe.folder).stage(name) if name in own else StageFolder(local_path(name))


def is_model_folder(name: str) -> bool:
    """Whether `name` is the path of a folder that contains a model or adapters."""
    folder = local_path(name)
    return (folder / "config.json").is_file() or is_adapter_folder(folder)
