"""The adapters of a chosen model in PEFT's own format, for the base model that a run began with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reftune.errors import CheckpointError
from reftune.model.policy import ADAPTERS
from reftune.model.weights import SMOLLM2, smollm2_folder

Adapters = Mapping[str, Tensor]
"""As PEFT names them: `….lora_A.weight` (r, inputs) and `….lora_B.weight` (outputs, r)."""


def export_adapters(stages: Path, method: str, model: Mapping[str, Any], folder: Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`.

    A stage trains fresh adapters on what the stage before left, merged; so those of all stages from
    the base on are put side by side (B = [B₁ B₂ …], A = [A₁; A₂; …]), which is their sum. The
    result is exact up to rounding if the stages were saved in fp32. Raises: CheckpointError.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    table, path = model.get("lora") or {}, model.get("path")
    rank, alpha = int(table.get("rank", 16)), int(table.get("alpha", 32))
    chain = _chain(stages, method, continued=model.get("quantize") is not None)
    joined = chain[0] if len(chain) == 1 else side_by_side(chain, scaling=alpha / rank)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank * len(chain),
        lora_alpha=alpha if len(chain) == 1 else rank * len(chain),
        target_modules=sorted({name.split(".lora_")[0].split(".")[-1] for name in joined}),
        base_model_name_or_path=str(smollm2_folder()) if path == SMOLLM2 else path,
        revision=model.get("revision"),
        inference_mode=True,
    )
    save_file({name: tensor.contiguous() for name, tensor in joined.items()}, folder / WEIGHTS)
    config.save_pretrained(str(folder))


WEIGHTS = "adapter_model.safetensors"


def side_by_side(chain: list[Adapters], *, scaling: float) -> dict[str, Tensor]:
    """One set of adapters, of scaling 1, for the sum of several of `scaling`."""
    joined = {}
    for name, first in chain[0].items():
        parts = [adapters[name] for adapters in chain]
        is_a = ".lora_A." in name
        joined[name] = torch.cat(parts, 0) if is_a else torch.cat(parts, 1) * scaling
        assert first.dim() == 2
    return joined


def _chain(stages: Path, method: str, *, continued: bool) -> list[Adapters]:
    """The adapters of the stages from the base to `method`; `continued`: each stage went on with
    those of the stage before, so that the last hold all."""
    from safetensors.torch import load_file

    chain: list[Adapters] = []
    while method != "base":
        path = stages / method / ADAPTERS
        if not path.is_file():
            raise CheckpointError(
                f"{path}: not there; --adapter expects a run with model.lora in all its stages"
            )
        tensors = load_file(path)
        chain.insert(0, {_peft_name(name): tensor for name, tensor in tensors.items()})
        stage = json.loads((stages / method / "stage.json").read_text(encoding="utf-8"))
        method = "base" if continued else stage["init"]
    return chain


def _peft_name(name: str) -> str:
    """Without the name of the adapter, which PEFT leaves out of its files."""
    return name.replace(".default.", ".")
