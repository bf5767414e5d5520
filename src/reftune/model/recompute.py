"""Gradient checkpointing (arXiv:1604.06174): only the input of each block is kept; the backward
pass recomputes its activations, to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`forward(*args, **kwargs)`, whose activations the backward pass computes again."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def recompute(block: nn.Module) -> None:
    """Have `block`, and copies of it, compute its activations again."""
    # a partial and no closure: `deepcopy` gives the copy its own block's forward
    block.forward = partial(recomputed, block.forward)
