"""Saves and loads checkpoints. A checkpoint contains everything that changes during a stage and
affects the stage's later steps.

A checkpoint is a folder of safetensors and JSON files. Loading these files cannot run code. The
folder gets its name, such as `step-000120`, only once it is complete. The tensors are whole, even
if each process held only a part of every tensor, so any number of processes can continue from a
checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from reftune.errors import CheckpointError
from reftune.processes.sharding import part_of
from reftune.processes.world import is_main
from reftune.storage.files import replace_folder
from reftune.text import brief

if TYPE_CHECKING:
    import torch

MANIFEST, TENSORS, STATE = "manifest.json", "tensors.safetensors", "state.json"
FILES = (TENSORS, STATE)
"""The files whose checksums are in the manifest."""
_STEP = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A loaded checkpoint."""

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    folder: Path


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `step`, completely or not at all. Then keep this checkpoint and the
    latest `keep` - 1 from earlier steps, and delete all others. Return the path `folder/step-…`.
    Raises: CheckpointError for a disk error; older checkpoints then remain."""
    from safetensors.torch import save_file

    def fill(partial: Path) -> None:
        partial.mkdir()
        whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(whole, partial / TENSORS)
        (partial / STATE).write_text(json.dumps({"step": step, **state}), encoding="utf-8")
        checksums = {name: _sha256(partial / name) for name in FILES}
        (partial / MANIFEST).write_text(json.dumps(checksums), encoding="utf-8")

    final = folder / f"step-{step:06d}"
    if not is_main():
        return final
    for torn in folder.glob(".step-*.partial"):  # left by a process that was killed
        shutil.rmtree(torn, ignore_errors=True)
    replace_folder(final, fill)
    # any checkpoints of later steps must be damaged: `load_latest` skipped them
    newest = [path for number, path in _found(folder) if number <= step][-keep:]
    # `.old`: left by a process that was killed while it saved a step again
    outdated = [path for _, path in _found(folder) if path not in newest]
    for path in (*outdated, *folder.glob(".step-*.old")):
        shutil.rmtree(path, ignore_errors=True)
    return final


def load_latest(folder: Path, note: Any = None) -> Checkpoint | None:
    """The latest checkpoint in `folder` whose checksums match; None if there is none. Damaged
    checkpoints are skipped and, if `note` is given, reported through `note(message)`."""
    for step, path in reversed(_found(folder)):
        try:
            return _read(path, step)
        except CheckpointError as damage:
            if note is not None:
                note(f"{damage}; skipping this checkpoint")
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state, keyed by `optimizer.INDEX.KEY`. INDEX is the parameter's index, and
    KEY is the name of one of the parameter's state tensors, such as `exp_avg`. Learning rates are
    left out, because they depend only on the step."""
    import torch

    states = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{key}": torch.as_tensor(value)
        for index, state in states.items()
        for key, value in _flat(state).items()
    }


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """One parameter's optimizer state, with the tensors of nested dicts moved to the top level.
    bitsandbytes nests its quantized state, but can load the flat form too. Its `qmap…` tables are
    copied, because all parameters share them, and safetensors rejects shared tensors."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        flat |= value if isinstance(value, Mapping) else {key: value}
    return {k: v.clone() if k.startswith("qmap") else v for k, v in flat.items()}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Restore the state that `optimizer_tensors` returned. The tensors are whole, even if the
    parameters are sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor | int]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            stored: torch.Tensor | int = value
            if value.dim() > 0:
                stored = part_of(value, parameters[int(index)])
            elif not value.is_floating_point():
                stored = int(value)  # as the optimizer had it
            state.setdefault(int(index), {})[key] = stored
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _found(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = [(_STEP.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in matches if match is not None)


def _read(path: Path, step: int) -> Checkpoint:
    """Load a checkpoint. Raises: CheckpointError if it is incomplete or damaged."""
    from safetensors.torch import load_file

    try:
        checksums = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        changed = [name for name in FILES if _sha256(path / name) != checksums[name]]
        if changed:
            raise CheckpointError(
                f"{path}: damaged: the checksum of {' and '.join(changed)} does not match"
            )
        state = dict(json.loads((path / STATE).read_text(encoding="utf-8")))
        return Checkpoint(step=step, tensors=load_file(path / TENSORS), state=state, folder=path)
    except (OSError, ValueError, LookupError, TypeError, RecursionError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {brief(error)}"
        raise CheckpointError(f"{path}: incomplete or damaged: {reason}") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
