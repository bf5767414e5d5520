"""Exports a trained model's LoRA adapters in PEFT's format, and loads adapters from a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from reftune.errors import CheckpointError, ModelError
from reftune.model.policy import ADAPTERS, PEFT_ADAPTERS, peft_name
from reftune.model.weights import ADAPTER_CONFIG, SMOLLM2, is_adapter_folder, smollm2_folder
from reftune.recipe import LoraTable, ModelTable, local_path
from reftune.storage.run_folder import RunFolder
from reftune.text import brief

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Adapter(NamedTuple):
    """The adapter of one layer, which adds `scaling` · B A to the layer's weight."""

    a: Tensor
    """(r, inputs)"""
    b: Tensor
    """(outputs, r)"""
    scaling: float
    """alpha / r, or alpha / √r for rsLoRA."""


Adapters = Mapping[str, Adapter]
"""Adapters by name. An adapter's name is the name that its matrix A has in PEFT's files."""
_A = re.compile(r"_A(?=(\.weight)?$)")
"""Matches the `_A` in the name of a matrix A. The name of the layer's B has `_B` instead."""


def export_adapters(run: RunFolder, method: str, model: Mapping[str, Any], folder: Path) -> None:
    """Write the adapters of the trained model `method`, such as `reft`, to `folder`, in PEFT's
    format. `model` is the recipe's `model` table.

    If the base model is not quantized, each stage trains new adapters on a model into which all
    earlier adapters have been merged. In this case, the function writes the sum of the adapters of
    `method` and of all stages that led to it, including any adapters from which the run started. If
    the stages were saved in fp32, adding this sum to the base model gives the trained model, up to
    rounding.

    If the base model is quantized, each stage continues to train the adapters of the model from
    which it starts. In this case, the function writes only the adapters of `method`.

    Raises: CheckpointError if a stage saved no adapters or belongs to another run; ModelError if
    the adapters from which the run started cannot be read.
    """
    from peft import LoraConfig

    adapters = side_by_side(_chain(run, method, model))
    first = next(iter(adapters.values()))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=len(first.a),
        lora_alpha=round(first.scaling * len(first.a)),
        target_modules=sorted({name.split(".lora_")[0].split(".")[-1] for name in adapters}),
        base_model_name_or_path=_base_of(model.get("path")),
        revision=model.get("revision"),
        inference_mode=True,
    )
    tensors = {name: adapter.a for name, adapter in adapters.items()}
    tensors |= {_A.sub("_B", name): adapter.b for name, adapter in adapters.items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / PEFT_ADAPTERS)
    config.save_pretrained(str(folder))


def _base_of(path: str | None) -> str | None:
    """`model.path` as adapters record it: the absolute path of a folder, a Hub id, or None for a
    from-scratch model."""
    if path is None or path == SMOLLM2:
        return path and str(smollm2_folder())
    folder = local_path(path)
    return str(folder.absolute()) if folder.exists() else path


def with_adapters(model: PreTrainedModel, folder: Path, *, base: str | None) -> PreTrainedModel:
    """The base model `model`, with the adapters in `folder` merged into it. Raises: ModelError if
    `folder` does not contain LoRA adapters stored as safetensors, if they do not fit `model`, or if
    they name a base model other than `base` (see `_read`)."""
    from peft import PeftModel

    _, tensors = _read(folder, base)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
        found = {peft_name(name) for name, _ in adapted.named_parameters() if ".lora_" in name}
        strange = sorted(tensors.keys() ^ found)
        if strange:
            raise ValueError(f"{strange[0]} is in the file or in the model, but not in both")
        merged: PreTrainedModel = adapted.merge_and_unload()
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}: not the adapters of this model: {brief(error)}") from None
    return merged


def read_adapters(folder: Path, *, base: str | None = None) -> Adapters:
    """The LoRA adapters that `folder` contains in PEFT's format. Raises: ModelError if they cannot
    be read, contain tensors other than LoRA's matrices, or name a base model other than `base`."""
    config, tensors = _read(folder, base)
    with _readable(folder):
        return _paired(tensors, config)


def _read(folder: Path, base: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of the LoRA adapters in `folder`. Raises: ModelError if
    they cannot be read, or if the configuration names a base model other than `base`. Either name
    may be a path, so only the last components of the two are compared."""
    with _readable(folder):
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"{ADAPTER_CONFIG} holds no JSON object")
        if config.get("peft_type") != "LORA":
            raise ValueError(f"peft_type is {config.get('peft_type')}; expected LORA")
        tensors = load_file(folder / PEFT_ADAPTERS)
    trained_on = config.get("base_model_name_or_path")
    if base and trained_on and Path(base).name != Path(str(trained_on)).name:
        raise ModelError(
            f"{folder}: adapters of {trained_on}; expected those of model.path {base} (if both are"
            f" the same model, set base_model_name_or_path in {ADAPTER_CONFIG} to {base})"
        )
    return config, tensors


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise ModelError(f"{folder}: adapters cannot be read: {brief(error)}") from None


def _paired(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Adapter]:
    """The LoRA adapters whose matrices A and B are in `tensors`. `config` is their configuration in
    PEFT's format. Raises: ValueError if a tensor is neither an A nor a B, or if a B has no A;
    KeyError if an A has no B."""
    from peft.utils.other import get_pattern_key

    firsts = [name for name in tensors if _A.search(name)]
    strange = sorted(tensors.keys() - {*firsts, *(_A.sub("_B", name) for name in firsts)})
    if strange:
        raise ValueError(f"{strange[0]} is not a LoRA matrix; expected A and B only")
    alphas = config.get("alpha_pattern") or {}
    adapters = {}
    for name in firsts:
        a, b = tensors[name], tensors[_A.sub("_B", name)]
        module = name.split(".lora_")[0].removeprefix("base_model.model.")
        alpha = alphas.get(get_pattern_key([*alphas], module), config["lora_alpha"])
        scaling = alpha / len(a) ** (0.5 if config.get("use_rslora") else 1)
        adapters[name] = Adapter(a, b, float(scaling))
    return adapters


def require_continuable(folder: Path, table: ModelTable) -> None:
    """Check that a run with the model settings `table` can continue training the adapters in
    `folder`. Raises: ModelError if the adapters cannot be read, or if their base model (see
    `_read`) or scaling differs from the run's."""
    adapters = read_adapters(folder, base=table.path).values()
    found = sorted({adapter.scaling for adapter in adapters})
    wanted = table.lora and table.lora.alpha / table.lora.rank
    if found != [wanted]:
        raise ModelError(
            f"{folder}: adapters with alpha / rank = {', '.join(map(str, found))}; expected"
            f" {wanted}, as in model.lora"
        )


def side_by_side(chain: Sequence[Adapters]) -> dict[str, Adapter]:
    """One set of adapters that has the same effect as all sets in `chain` together. Its adapters
    have scaling 1 and are padded with zeros, so that they all have the same rank. If `chain`
    contains a single set, that set is returned unchanged. Set i adds sᵢ Bᵢ Aᵢ to a layer's weight;
    the result adds B A:

        Σ sᵢ Bᵢ Aᵢ = B A,    B = [s₁ B₁  s₂ B₂ …  0],    A = [A₁; A₂; …; 0]
    """
    if len(chain) == 1:
        return dict(chain[0])
    summed: dict[str, Adapter] = {}
    for name in dict.fromkeys(name for adapters in chain for name in adapters):
        parts = [adapters[name] for adapters in chain if name in adapters]
        a = torch.cat([part.a for part in parts])
        b = torch.cat([part.b * part.scaling for part in parts], 1)
        summed[name] = Adapter(a, b, 1.0)
    rank = max(len(adapter.a) for adapter in summed.values())
    return {
        name: Adapter(pad(a, (0, 0, 0, rank - len(a))), pad(b, (0, rank - len(a))), scaling)
        for name, (a, b, scaling) in summed.items()
    }


def _chain(run: RunFolder, method: str, model: Mapping[str, Any]) -> list[Adapters]:
    """The sets of adapters that turn the base into the model of the stage `method`, oldest first.
    If the run began with adapters, they are the first set. The stages on the way to `method`, and
    `method` itself, each add one set. With a 4-bit base, however, a stage continues training the
    adapters of the model that it starts from, so only the last set is returned."""
    table = LoraTable(**(model.get("lora") or {}))
    chain: list[Adapters] = []
    while method != "base":
        stage = run.stage(method)
        if not stage.is_done and is_adapter_folder(local_path(method)):
            return [read_adapters(local_path(method)), *chain]
        if stage.run.path != run.path:
            raise CheckpointError(
                f"{method}: not a stage of {run.path}; with --adapter, all stages between the base"
                " and the exported model must belong to this run"
            )
        path = stage.path / ADAPTERS
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; --adapter expects a run with model.lora")
        tensors = {peft_name(name): tensor for name, tensor in load_file(path).items()}
        chain.insert(0, _paired(tensors, {"lora_alpha": table.alpha}))
        method = "base" if model.get("quantize") is not None else stage.facts()["init"]
    return chain
