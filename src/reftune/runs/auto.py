"""Chooses values for the keys that a recipe sets to `auto`. The device is chosen whenever a run
starts or resumes: CUDA if available, otherwise the CPU. The other values are chosen once, when the
run first starts."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml

from reftune.errors import RecipeError
from reftune.processes import sharding, world
from reftune.recipe import Recipe, ScratchTable, parse_recipe
from reftune.stages.estimate import ROWS as LARGEST_ROWS
from reftune.stages.estimate import TOKENS as LARGEST_TOKENS
from reftune.stages.estimate import Sizes, estimates
from reftune.stages.outline import outline_of
from reftune.storage.run_folder import RunFolder

Dtype = Literal["float32", "bfloat16"]
SIZES = (256, 1024)
"""Sizes of the square matrices that are multiplied to choose the dtype. The small size quickly
rules out a CPU that emulates bf16; the large size keeps all cores busy."""
EMULATED = 4.0
"""bf16 counts as emulated if a product takes more than this many times as long as in fp32."""
Key = tuple[str, str]
"""The name of a table in the recipe, and the name of a key in that table."""
Values = dict[Key, Any]
DTYPE, TOKENS, ROWS = KEYS = (
    ("model", "dtype"),
    ("model", "micro_batch_tokens"),
    ("engine", "batch_size"),
)
ROWS_UNFORESEEN = 32
"""Number of rows decoded at once if no stage predicts its cost."""
VOCABULARY = 4096
"""Assumed vocabulary size of a from-scratch model."""


def settled(recipe: Recipe) -> Recipe:
    """A copy of `recipe` in which every key in `KEYS` that is set to `auto` gets a value. If the
    run folder's recipe has a value for the key, that value is used. If not, a value is chosen for
    this machine. All processes use the main process's values."""
    if not _open_keys(recipe):
        return recipe
    return _with(recipe, world.from_main(lambda: _choices(recipe)))


def _choices(recipe: Recipe) -> Values:
    chosen, device = _stored(recipe), choose_device(recipe.model.device)
    if DTYPE in _open_keys(_with(recipe, chosen)):
        chosen[DTYPE] = fastest_dtype(device)
    recipe = _with(recipe, chosen)
    if remaining := _open_keys(recipe):
        sizes = _sizes(recipe, device)
        suited = {TOKENS: sizes.tokens, ROWS: sizes.rows}
        chosen |= {key: suited[key] for key in remaining}
    return chosen


def _sizes(recipe: Recipe, device: torch.device) -> Sizes:
    """The largest sizes with which every stage that predicts its cost fits in the device's
    memory."""
    if recipe.model.scratch is not None and _is_tiny(recipe.model.scratch, total_bytes(device)):
        return Sizes(tokens=LARGEST_TOKENS[0], rows=LARGEST_ROWS[0])
    texts = map(str, range(VOCABULARY))
    outline = outline_of(recipe.model, texts, device=device.type)
    found = [
        replace(
            made,
            sharding="fsdp2" if sharding.current.splits else "ddp",
            devices=world.world_size(),
            replicas=getattr(sharding.current, "replicas", 1),
            device_bytes=total_bytes(device),
        ).fitting
        for made in estimates(recipe, outline).values()
    ]
    return Sizes(
        tokens=min([sizes.tokens for sizes in found], default=recipe.model.max_tokens),
        rows=min([sizes.rows for sizes in found], default=ROWS_UNFORESEEN),
    )


def _is_tiny(scratch: ScratchTable, room: float) -> bool:
    """Whether even the largest micro-batch of a from-scratch model fills less than a quarter of
    `room` bytes. A layer is assumed to keep at most 400 bytes per token and hidden unit."""
    return bool(LARGEST_TOKENS[0] * scratch.layers * scratch.hidden_size * 400 < room / 4)


def _open_keys(recipe: Recipe) -> list[Key]:
    return [key for key in KEYS if _value(recipe, key) == "auto"]


def _value(recipe: Recipe, key: Key) -> Any:
    table, name = key
    return getattr(getattr(recipe, table), name, None)


def _with(recipe: Recipe, values: Values) -> Recipe:
    for (table, name), value in values.items():
        changed = getattr(recipe, table).model_copy(update={name: value})
        recipe = recipe.model_copy(update={table: changed})
    return recipe


def _stored(recipe: Recipe) -> Values:
    """The values in the run folder's recipe, if any, of the keys that are `auto` in `recipe`."""
    try:
        stored = parse_recipe(yaml.safe_load(RunFolder(recipe.folder).recipe.read_bytes()))
    except (OSError, ValueError, TypeError, yaml.YAMLError, RecipeError):
        return {}
    found = {key: _value(stored, key) for key in _open_keys(recipe)}
    return {key: value for key, value in found.items() if value not in (None, "auto")}


# --- this machine ---------------------------------------------------------------------------------


def choose_device(wanted: str) -> torch.device:
    """The device that this process uses if the recipe's `model.device` is `wanted`. Raises:
    RecipeError if this machine has no such device."""
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise RecipeError("model.device: cuda, but torch finds no GPU; expected auto or cpu here")
    if wanted in ("auto", "cuda"):
        return torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, NotImplementedError, AssertionError):
        raise RecipeError(
            f"model.device: {wanted}, but torch has no such device here; expected auto or cpu"
        ) from None


def total_bytes(device: torch.device) -> float:
    """Total memory of a CUDA device, in bytes. For any other device, this process's share of the
    memory of the machine or container."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    size = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdecimal():
        size = min(size, float(text))
    return size / world.local_size()


@cache
def fastest_dtype(device: torch.device) -> Dtype:
    """The dtype that `auto` chooses for a device. A CUDA GPU gets bfloat16 if it supports bfloat16
    natively. A device of another kind gets bfloat16 if its matrix products are at least as fast in
    bfloat16 as in float32. In all other cases, the dtype is float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float32"
    ratio = 0.0
    for size in SIZES:
        rates = product_rates(device, (size, size, size), seconds=0.05)
        ratio = rates["bfloat16"] / rates["float32"]
        if ratio < 1 / EMULATED:
            break
    return "bfloat16" if ratio >= 1 else "float32"


def product_rates(
    device: torch.device, shape: tuple[int, int, int], *, seconds: float
) -> dict[str, float]:
    """Dtype → FLOP/s of an (M, K) × (K, N) product, where `shape` is (M, K, N). The product is
    repeated for about `seconds` per dtype, and the rate is that of the fastest repetition."""
    rows, inner, columns = shape
    rates = {}
    for name in get_args(Dtype):
        dtype = getattr(torch, name)
        left = torch.ones(rows, inner, device=device, dtype=dtype)
        right = torch.ones(columns, inner, device=device, dtype=dtype)
        torch.nn.functional.linear(left[:1], right)  # the first call chooses kernels
        best, end = float("inf"), time.perf_counter() + seconds
        while best == float("inf") or time.perf_counter() < end:
            started = time.perf_counter()
            torch.nn.functional.linear(left, right)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - started)
        rates[name] = 2 * rows * inner * columns / best
    return rates
