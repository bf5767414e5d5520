"""Every random number in a run is a function of a seed and of what the number is used for, so a
checkpoint need not contain the state of a generator."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed derived from `parts`, such as `(recipe.seed, "reft", "rollout", step)`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str) -> np.random.Generator:
    """A numpy generator seeded from `parts`."""
    return np.random.Generator(np.random.Philox(derive_seed(*parts)))


def endless_indices(num_items: int, *, start: int, count: int, seed: int) -> list[int]:
    """`count` indices from an endless sequence, beginning at its zero-based position `start`. The
    sequence consists of epochs: each contains the indices of all `num_items` items in a new random
    order."""
    first, offset = divmod(start, num_items)
    indices = itertools.chain.from_iterable(
        generator(seed, "epoch", epoch).permutation(num_items).tolist()
        for epoch in itertools.count(first)
    )
    return list(itertools.islice(indices, offset, offset + count))
