"""Exports a method's adapters in PEFT's format, and loads adapters from a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reftune.errors import CheckpointError, ModelError
from reftune.model.policy import ADAPTERS, PEFT_ADAPTERS
from reftune.model.weights import ADAPTER_CONFIG, SMOLLM2, is_adapter_folder, smollm2_folder
from reftune.recipe import ModelTable
from reftune.storage.run_folder import RunFolder
from reftune.text import brief

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Adapters = Mapping[str, Tensor]
"""Tensors, keyed by their names in PEFT: `….lora_A.weight` is (r, inputs), and `….lora_B.weight` is
(outputs, r)."""


def export_adapters(run: RunFolder, method: str, model: Mapping[str, Any], folder: Path) -> None:
    """Write the adapters of `method` to `folder`, in PEFT's format. `model` is the recipe's table
    of this name.

    Unless the base is quantized, each stage trains new adapters on the merged model that it starts
    from. Concatenating the adapters of all stages that lead to `method`, B = [B₁ B₂ …] and
    A = [A₁; A₂; …], sums their products B A. If the stages were saved in fp32, adding the sum to
    the base gives the model of `method` up to rounding. Raises: CheckpointError if a stage saved no
    adapters; ModelError if the adapters that the first stage starts from cannot be read.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    chain = _chain(run, method, model)
    joined = side_by_side(chain)
    rank = sum(len(_rows_of_a(adapters)) for adapters, _ in chain)
    path = model.get("path")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank if len(chain) > 1 else round(chain[0][1] * rank),
        target_modules=sorted({name.split(".lora_")[0].split(".")[-1] for name in joined}),
        base_model_name_or_path=str(smollm2_folder()) if path == SMOLLM2 else path,
        revision=model.get("revision"),
        inference_mode=True,
    )
    save_file(
        {name: tensor.contiguous() for name, tensor in joined.items()}, folder / PEFT_ADAPTERS
    )
    config.save_pretrained(str(folder))


Scaled = tuple[Adapters, float]
"""Adapters and their scaling, which is alpha / rank or, for rsLoRA, alpha / √rank."""


def with_adapters(model: PreTrainedModel, folder: Path, *, base: str | None) -> PreTrainedModel:
    """The base model `model`, with the adapters in `folder` merged into it.

    Raises: ModelError unless they are LoRA adapters of the model named `base`, stored as
    safetensors.
    """
    from peft import PeftModel

    adapters, _ = read_adapters(folder)
    _require_base(folder, base)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
        found = {_peft_name(name) for name, _ in adapted.named_parameters() if ".lora_" in name}
        strange = sorted(set(adapters) ^ found)
        if strange:
            raise ValueError(f"{strange[0]} is only in the file or only in the model")
        merged: PreTrainedModel = adapted.merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{folder}: not the adapters of this model: {brief(error)}") from None
    return merged


def read_adapters(folder: Path) -> Scaled:
    """The LoRA adapters in a folder in PEFT's format, and their scaling. Raises: ModelError if they
    cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if config.get("peft_type") != "LORA":
            raise ValueError(f"peft_type is {config.get('peft_type')}; expected LORA")
        rank = config["r"] ** (0.5 if config.get("use_rslora") else 1)
        return load_file(folder / PEFT_ADAPTERS), config["lora_alpha"] / rank
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise ModelError(f"{folder}: adapters cannot be read: {error}") from None


def require_continuable(folder: Path, table: ModelTable) -> None:
    """Check that a run can continue training the adapters in `folder`. Raises: ModelError if they
    cannot be read, or if their base model or scaling differs from the run's."""
    _, scaling = read_adapters(folder)
    _require_base(folder, table.path)
    wanted = table.lora and table.lora.alpha / table.lora.rank
    if scaling != wanted:
        raise ModelError(
            f"{folder}: adapters with alpha / rank = {scaling}; expected {wanted}, as in model.lora"
        )


def _require_base(folder: Path, base: str | None) -> None:
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    trained_on = config.get("base_model_name_or_path")
    if base and trained_on and Path(base).name != Path(trained_on).name:
        raise ModelError(
            f"{folder}: adapters of {trained_on}; expected those of model.path {base} (if both"
            f" are the same model, set base_model_name_or_path in its {ADAPTER_CONFIG})"
        )


def side_by_side(chain: Sequence[Scaled]) -> dict[str, Tensor]:
    """The sum of several sets of adapters, as one set with scaling 1. A single set keeps its own
    scaling."""
    if len(chain) == 1:
        return dict(chain[0][0])
    return {
        name: torch.cat([adapters[name] for adapters, _ in chain], 0)
        if ".lora_A." in name
        else torch.cat([adapters[name] * scaling for adapters, scaling in chain], 1)
        for name in chain[0][0]
    }


def _rows_of_a(adapters: Adapters) -> Tensor:
    return next(tensor for name, tensor in adapters.items() if ".lora_A." in name)


def _chain(run: RunFolder, method: str, model: Mapping[str, Any]) -> list[Scaled]:
    """The sets of adapters whose sum turns the base into `method`, oldest first: the initial set,
    if there is one, then one per stage. With a 4-bit base, each stage continues training the set of
    the stage that it starts from, so the last set is enough.
    """
    from safetensors.torch import load_file

    table = model.get("lora") or {}
    scaling = int(table.get("alpha", 32)) / int(table.get("rank", 16))
    chain: list[Scaled] = []
    while method != "base":
        if is_adapter_folder(Path(method)):
            return [read_adapters(Path(method)), *chain]
        path = run.stage(method).path / ADAPTERS
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; --adapter expects a run with model.lora")
        tensors = load_file(path)
        chain.insert(0, ({_peft_name(name): t for name, t in tensors.items()}, scaling))
        stage = run.stage(method).facts()
        method = "base" if model.get("quantize") is not None else stage["init"]
    return chain


def _peft_name(name: str) -> str:
    """The tensor's name in PEFT's files, which omit the adapter's name."""
    return name.replace(".default.", ".")
