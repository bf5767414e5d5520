"""The AdamW optimizer of a stage, with its learning-rate schedule. If a loss or gradient is not
finite, the run ends or the step is skipped, as the recipe says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import nn

from reftune.algorithms.base import LossTerms
from reftune.errors import NonFiniteError, RecipeError
from reftune.model.batch import TokenBatch, own_micro_batches
from reftune.processes import sharding, world
from reftune.processes.sharding import assign, whole_tensor
from reftune.recipe import Table

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerTable(Table):
    """Settings of AdamW."""

    learning_rate: float = Field(gt=0)
    value_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the value head. Default: `learning_rate`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """`linear` and `cosine` lower the learning rate to 0 by the last step. If a stage has only one
    step, the rate is not lowered."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """At the start of a stage, the learning rate rises from 0 over this share of the steps."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay is not applied to biases, norms or the value head."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    state_bits: Literal[32, 8] = 32
    """Precision of AdamW's moments. 8 bits need a quarter of the memory of 32 bits."""
    max_grad_norm: float = Field(1.0, gt=0)
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """If a loss or gradient is not finite, `stop` ends the run with an error, and `skip` skips the
    step."""
    max_skipped: int = Field(10, gt=0)
    """Maximum number of skipped steps per stage."""


class Trained(Protocol):
    """A module that can be trained and saved: a policy, or a classifier built on one."""

    @property
    def packs(self) -> bool: ...

    @property
    def max_tokens(self) -> int: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def train(self) -> Any: ...

    def save(self, folder: Path) -> None: ...


def trainable(model: Trained) -> dict[str, torch.Tensor]:
    """The parameters that training changes, keyed by `policy.NAME`."""
    return {
        f"policy.{name}": value for name, value in model.named_parameters() if value.requires_grad
    }


@torch.no_grad()
def load_trainable(model: Trained, tensors: Mapping[str, torch.Tensor]) -> None:
    """Restore the tensors that `trainable` returned."""
    for name, parameter in trainable(model).items():
        assign(parameter, tensors[name])


def make_optimizer(model: Trained, table: OptimizerTable) -> torch.optim.Optimizer:
    """AdamW for the trainable parameters of a model that `Sharding.distribute` has prepared. There
    are up to three parameter groups: the matrices, the vectors and the value head. Raises:
    RecipeError if 8-bit state is requested but not available."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if name.startswith("value_head.")]
    body = [p for name, p in trained.items() if not name.startswith("value_head.")]
    matrices, vectors = [p for p in body if p.dim() > 1], [p for p in body if p.dim() <= 1]
    peak, value_peak = table.learning_rate, table.value_learning_rate or table.learning_rate
    groups = [
        {"params": matrices, "weight_decay": table.weight_decay, "peak": peak},
        {"params": vectors, "weight_decay": 0.0, "peak": peak},
        {"params": head, "weight_decay": 0.0, "peak": value_peak},
    ]
    return _adamw([group for group in groups if group["params"]], table)


def _adamw(groups: list[dict[str, Any]], table: OptimizerTable) -> torch.optim.Optimizer:
    rates: dict[str, Any] = {"lr": table.learning_rate, "betas": table.betas, "eps": 1e-8}
    if table.state_bits == 32:
        return torch.optim.AdamW(groups, **rates, fused=True)
    if sharding.current.splits:
        raise RecipeError("optimizer.state_bits: 8 needs unsharded weights (DDP); expected 32")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise RecipeError(
            "optimizer.state_bits: bitsandbytes is not installed; run pip install"
            " 'reftune[quantize]'"
        ) from None
    adamw: torch.optim.Optimizer = AdamW8bit(groups, **rates)
    return adamw


def rate(table: OptimizerTable, *, step: int, total_steps: int) -> float:
    """The learning rate at `step` (counted from 1) as a share of its peak. If a stage has only one
    step, the share is 1, because `linear` and `cosine` would give this step a share of 0."""
    if total_steps == 1:
        return 1.0
    warmup_steps = round(table.warmup * total_steps)
    if step <= warmup_steps:
        return step / warmup_steps
    remaining = (total_steps - step) / max(1, total_steps - warmup_steps)
    if table.schedule == "linear":
        return remaining
    if table.schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * remaining))
    return 1.0


def optimizer_step(
    model: Trained, optimizer: torch.optim.Optimizer, *, share: float, max_grad_norm: float
) -> float:
    """Clip the gradient, take a step and clear the gradient. Return the norm that the gradient had
    before clipping. Each parameter group's learning rate is set to its peak times `share`. Raises:
    NonFiniteError, before any weight changes, if the gradient is not finite."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = whole_tensor(nn.utils.get_total_norm(gradients.values()))
    if not torch.isfinite(norm):
        first = next(
            (f"the gradient of {name}" for name, g in gradients.items() if not is_finite(g)),
            "the sum of squares",
        )
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(f"gradient norm is {float(norm)}: {first} is not finite")
    kept = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients.values():
        gradient.mul_(kept)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


def accumulate_gradient(
    model: Trained, batch: TokenBatch, loss: Callable[[torch.Tensor], LossTerms]
) -> dict[str, float]:
    """Accumulate the gradient of a minibatch over micro-batches, which are divided among the
    processes. `loss(rows)` returns the part of the loss that comes from the sequences with indices
    `rows`.

    Returns: `loss/total` and the loss's metrics, combined over all rows as `LossTerms` describes.
    Raises: NonFiniteError, before the gradient is used, if the loss is not finite.
    """
    totals: dict[str, float] = {}
    failed: NonFiniteError | None = None
    even = sharding.current.is_split(model)
    for rows, counts in own_micro_batches(
        batch, max_tokens=model.max_tokens, packed=model.packs, even=even
    ):
        terms = loss(rows)
        if counts:
            failed = failed or _not_finite(terms.total, rows)
            _add_metrics(totals, {"loss/total": terms.total.detach(), **terms.metrics})
        (terms.total if counts else terms.total * 0).backward()
    world.raise_together(failed)
    sharding.current.add_up_gradients(model)
    together: dict[str, float] = {}
    for of_process in world.gather(totals):
        _add_metrics(together, of_process)
    return together


def _add_metrics(totals: dict[str, float], metrics: Mapping[str, float | torch.Tensor]) -> None:
    for name, value in metrics.items():
        add = max if name.endswith("_max") else float.__add__
        totals[name] = add(totals.get(name, 0.0), float(value))


def _not_finite(loss: torch.Tensor, rows: torch.Tensor) -> NonFiniteError | None:
    """An error that names the `rows` of a non-finite `loss`; None if the loss is finite."""
    if torch.isfinite(loss):
        return None
    concerned = ", ".join(map(str, sorted(rows.tolist())[:8])) + (" …" if len(rows) > 8 else "")
    return NonFiniteError(f"loss is {float(loss.detach())} in rows {concerned}")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every number in a tensor is finite, in all processes."""
    return not any(world.any_of(not whole_tensor(tensor).isfinite().all()))
