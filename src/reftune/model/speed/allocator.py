"""Lets this process keep the host memory that PyTorch frees, so that later steps need not request
it from the operating system again."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Constants from glibc's malloc.h."""
LARGEST_KEPT = 32 * 2**20
"""Freed blocks of more than this many bytes go back to the operating system. This is the largest
value that glibc accepts."""


def keep_freed_memory() -> None:
    """Let glibc keep blocks of up to `LARGEST_KEPT` bytes that any thread frees, so that later
    steps need not request zeroed pages from the operating system. Nothing changes if the C library
    is not glibc, or if environment variables (`MALLOC_…`) configure its allocator."""
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
