"""The fastest dtype of a device, measured if no interface reports it."""

from __future__ import annotations

import time
from functools import cache
from typing import Literal

import torch

Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
SIZES = (256, 1024)
"""Sizes of the square products that choose a dtype: the small one rules out a CPU that emulates
bf16 without waiting for it, the large one keeps all its cores busy."""
EMULATED = 4.0
"""Times as slow: bf16 is emulated."""


@cache
def fastest_dtype(device: torch.device) -> Dtype:
    """bfloat16 if the device multiplies it natively and at least as fast as fp32, else float32."""
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
    """FLOP/s of (M, K) × (K, N) products in each dtype, the best of about `seconds` each;
    `shape` is (M, K, N)."""
    return {dtype: _rate(device, getattr(torch, dtype), shape, seconds) for dtype in DTYPES}


def _rate(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], seconds: float
) -> float:
    rows, inner, columns = shape
    left = torch.ones(rows, inner, device=device, dtype=dtype)
    right = torch.ones(columns, inner, device=device, dtype=dtype)
    torch.nn.functional.linear(left[:1], right)  # chooses kernels
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        started = time.perf_counter()
        torch.nn.functional.linear(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * rows * inner * columns / best
