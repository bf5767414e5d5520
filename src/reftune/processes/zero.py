"""DeepSpeed's ZeRO as an optimizer, for `distributed` alone: to the rest it is AdamW over the
parameters of the model.

Stage 1 splits the optimizer's state over the processes, stage 2 gradients too, stage 3 weights too.
DeepSpeed wants model and optimizer together, adds gradients up while they are made, and keeps a
process's shares in flat buffers, one a group.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 50_000_000
"""Numbers that are sent at once: 200 MB."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, besides the count of steps."""


class ZeroOptimizer(torch.optim.Optimizer):
    """`optimizer`, which all processes have alike, with its state split, and `model` with it from
    stage 3 on.

    It must be kept as long as `model` is trained. A backward pass of the model goes through
    `backward`.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, stage: int) -> None:
        super().__init__([dict(group) for group in optimizer.param_groups], {})
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._adamw = optimizer
        self._engine = _initialize(model, optimizer, stage)
        self._zero = self._engine.optimizer
        for flat, _ in self._flats():  # else it finds the state of the first group only
            moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **moments}
        if stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()
        weakref.finalize(self, _release, self._engine).atexit = False

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradient of `loss`, summed over all processes; after the `is_last` of a step it
        can be used."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * dist.get_world_size())  # it takes the mean
        # stage 3 would take the next micro-batch for the first one
        self._zero.clear_backward_seen_flag()

    def gradients(self) -> dict[str, Tensor]:
        """By parameter, what of its gradient is this process's; changing that changes the step."""
        parts = dict(self._gradients())
        of_nobody = torch.empty(0, device=next(iter(self._adamw.state)).device)
        return {self._names[id(p)]: parts.get(id(p), of_nobody) for p in self._parameters()}

    def _gradients(self) -> Iterator[tuple[int, Tensor]]:
        if self._zero_holds_weights():
            from deepspeed.utils import safe_get_local_grad

            yield from ((id(p), safe_get_local_grad(p)) for p in self._parameters())
            return
        for group, parameters in enumerate(self._zero.params_in_partition):
            found = [
                g
                for g in self._zero.averaged_gradients[group]
                if not getattr(g, "_zero_padding", False)
            ]
            yield from ((id(p), gradient) for p, gradient in zip(parameters, found, strict=False))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One of AdamW, then the weights are gathered. The gradient must be finite."""
        for ours, theirs in zip(self.param_groups, self._adamw.param_groups, strict=True):
            theirs["lr"] = ours["lr"]
        self._engine.step()
        assert self._engine.was_step_applied(), (
            "DeepSpeed has left out a step with a finite gradient"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradient, also one that no step has used."""
        self._zero.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, whole and on the CPU; in the main process only, though all must take part."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[int, dict[str, Tensor]] = {}
        index = {id(parameter): i for i, parameter in enumerate(self._parameters())}
        for flat, parameters in self._flats():
            if not self._had_gradient(flat):
                continue  # torch keeps no state either, as of a value head in supervised training
            for parameter in parameters:
                moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
                if dist.get_rank() == 0:
                    step = self._adamw.state[flat]["step"].cpu().clone()
                    state[index[id(parameter)]] = {
                        "step": step,
                        **{key: value.cpu() for key, value in moments.items()},
                    }
        return {"state": state, "param_groups": super().state_dict()["param_groups"]}

    def _had_gradient(self, flat: Tensor) -> bool:
        found = self._adamw.state[flat]["exp_avg_sq"].any().float()
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` gave, which every process has whole. Raises: ValueError where
        ZeRO cannot hold it."""
        states = {
            id(p): state_dict["state"].get(index, {}) for index, p in enumerate(self._parameters())
        }
        for flat, parameters in self._flats():
            steps = {float(states[id(p)]["step"]) for p in parameters if states[id(p)]}
            if len(steps) > 1:
                raise ValueError(
                    f"parameters of a group have taken {sorted(steps)} steps; expected one number"
                    " with ZeRO"
                )
            self._adamw.state[flat]["step"].fill_(*steps or (0,))
            for p in parameters:
                for key in MOMENTS:
                    self._set_moment(p, key, states[id(p)].get(key))

    def _set_moment(self, parameter: Any, key: str, whole: Tensor | None) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        shape = parameter.ds_shape if self._zero_holds_weights() else parameter.shape
        value = torch.zeros(shape) if whole is None else whole
        if value.shape != shape:
            raise ValueError(
                f"{self._names[id(parameter)]}: {key} has the shape {list(value.shape)}; expected"
                f" {list(shape)}"
            )
        if self._zero_holds_weights():
            safe_set_local_optimizer_state(parameter, own_part(value, parameter), key)
        else:
            safe_set_full_optimizer_state(parameter, value.to(parameter), key)

    def _parameters(self) -> Iterator[Tensor]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    def _flats(self) -> list[tuple[Tensor, list[Tensor]]]:
        """The buffers that AdamW steps, with the parameters that have a part in each."""
        if self._zero_holds_weights():
            return list(
                zip(self._zero.fp32_partitioned_groups_flat, self._zero.fp16_groups, strict=True)
            )
        return list(
            zip(self._zero.single_partition_of_fp32_groups, self._zero.bit16_groups, strict=True)
        )

    def _zero_holds_weights(self) -> bool:
        return bool(self._engine.zero_optimization_partition_weights())


# --- parameters -----------------------------------------------------------------------------------


def is_split(parameter: Tensor) -> bool:
    """Whether each process has a part of it only."""
    return hasattr(parameter, "ds_id")


def whole_parameter(parameter: Tensor) -> Tensor:
    """A copy of what the processes hold in parts; all must take part."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def assign(parameter: Any, value: Tensor) -> bool:
    """Set `parameter` to the whole `value`, which every process has; False, and nothing done, where
    ZeRO does not hold it."""
    if is_split(parameter):
        from deepspeed.utils import safe_set_local_fp32_param

        part = own_part(value, parameter)
        parameter.ds_tensor.copy_(part)
        safe_set_local_fp32_param(parameter, part)
    elif hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param

        parameter.copy_(value)
        safe_set_full_fp32_param(parameter, parameter.detach())
    else:
        return False
    return True


def own_part(value: Tensor, parameter: Any) -> Tensor:
    """What of the whole `value` is this process's where stage 3 has split `parameter`: equal parts,
    the last ones padded."""
    held: Tensor = parameter.ds_tensor
    size, start = held.numel(), held.numel() * dist.get_rank()
    part = value.flatten()[start : start + size].to(held)
    return nn.functional.pad(part, (0, size - part.numel()))


# --- DeepSpeed ------------------------------------------------------------------------------------


def _initialize(model: nn.Module, optimizer: torch.optim.Optimizer, stage: int) -> Any:
    """DeepSpeed's engine around both."""
    os.environ["DS_ACCELERATOR"] = next(model.parameters()).device.type
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # it divides by nothing but this
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": 0,  # small ones are split as well
        },
    }
    import deepspeed

    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)  # stdout has the results
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="torch.distributed"
    )  # names that it calls
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # on a CPU it would be compiled now, for inference
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def _release(engine: Any) -> None:
    """Let go of what DeepSpeed would keep until the process ends: hooks, and of stage 3 a stack and
    a cache of modules."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    engine.destroy()
    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not engine.module]
    for function in vars(PartitionedParameterCoordinator).values():
        for cell in (
            getattr(function, "__closure__", None) or ()
        ):  # the cache is under a wrapper that does not tell of it
            getattr(cell.cell_contents, "cache_clear", lambda: None)()
