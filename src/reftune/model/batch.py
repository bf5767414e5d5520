"""Token batches, and the positions that predict the response tokens.

docs/algorithms.md explains the letters in shapes: B, L, R, N and T.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from reftune.processes import world

GROUPS = 4
"""Attention divides sequences into this many groups of similar length. Fewer than 2 × `GROUPS`
sequences form a single group."""
MULTIPLE = 64
"""`filled_up` rounds the number of packed tokens up to a multiple of this, because each distinct
number of tokens needs its own kernels and memory blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """Prompts followed by their responses, padded on the right so that causal attention needs no
    padding mask."""

    tokens: Tensor
    """(B, L) token ids."""
    prompt_lengths: Tensor
    """(B,)"""
    response_lengths: Tensor
    """(B,) Lengths, including the end token if there is one."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Tensor:
        return self.prompt_lengths + self.response_lengths

    @property
    def response_mask(self) -> Tensor:
        """(B, R), True on response tokens."""
        return (
            torch.arange(int(self.response_lengths.max()), device=self.tokens.device)
            < self.response_lengths[:, None]
        )

    def response_index(self) -> tuple[Tensor, Tensor]:
        """The row and the column in `tokens` of each response token, in row-major order. Both
        tensors are (N,)."""
        rows, steps = self.response_mask.nonzero(as_tuple=True)
        return rows, self.prompt_lengths[rows] + steps

    def predictor_index(self) -> tuple[Tensor, Tensor]:
        """Like `response_index`, but for each response token's predictor, the token to its left."""
        rows, columns = self.response_index()
        return rows, columns - 1

    def response_tokens(self) -> Tensor:
        """(N,) ids of all response tokens, in row-major order."""
        return self.tokens[self.response_index()]

    def unflatten(self, values: Tensor) -> Tensor:
        """A (B, R) tensor that contains `values` (N,), one for each response token in row-major
        order. All other entries are 0."""
        mask = self.response_mask
        return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(
            mask, values
        )

    def owners(self) -> Tensor:
        """(B,) For each sequence, the index of the first sequence with the same prompt."""
        firsts: dict[tuple[int, ...], int] = {}
        rows = zip(self.tokens.tolist(), self.prompt_lengths.tolist(), strict=True)
        return torch.tensor(
            [firsts.setdefault(tuple(row[:length]), i) for i, (row, length) in enumerate(rows)],
            device=self.tokens.device,
        )

    def _is_read(self, owners: Tensor) -> Tensor:
        """(B, L), True on the tokens that the model reads. These are all tokens except padding and
        prompts that an earlier sequence already contains."""
        steps = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        is_owner = owners == torch.arange(len(owners), device=owners.device)
        starts = self.prompt_lengths * ~is_owner
        return (steps >= starts[:, None]) & (steps < self.lengths[:, None])

    def filled_up(self) -> TokenBatch:
        """This batch plus, if needed, a sequence without a response, so that the number of packed
        tokens is a multiple of `MULTIPLE`."""
        missing = -int(self._is_read(self.owners()).sum()) % MULTIPLE
        if not missing:
            return self
        width = max(missing, self.tokens.shape[1])
        return TokenBatch(
            tokens=functional.pad(self.tokens, (0, width - self.tokens.shape[1], 0, 1)),
            prompt_lengths=functional.pad(self.prompt_lengths, (0, 1), value=missing),
            response_lengths=functional.pad(self.response_lengths, (0, 1)),
        )

    def packed(self) -> PackedTokens:
        """The sequences, one after another, without padding. A prompt that several sequences share
        appears only in the first of them."""
        owners = self.owners()
        is_read = self._is_read(owners)
        places = is_read.flatten().cumsum(0).view_as(is_read) - 1
        # a repeated prompt has the places of its first copy; the places of padding are never used
        places = places.where(is_read, places[owners])
        steps = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return PackedTokens(
            tokens=self.tokens[is_read],
            positions=steps.expand_as(is_read)[is_read],
            predictors=places[self.predictor_index()],
            packing=_packing(self.lengths, owners, places, is_read),
        )

    def rows(self, index: Tensor) -> TokenBatch:
        """The sequences at `index`, padded only to the longest of them."""
        lengths = self.lengths[index]
        return TokenBatch(
            tokens=self.tokens[index, : int(lengths.max())],
            prompt_lengths=self.prompt_lengths[index],
            response_lengths=self.response_lengths[index],
        )


class Packing(NamedTuple):
    """The layout of T packed tokens in S slots during attention. A slot holds a token or padding.
    Sequences are grouped by length, and padded on the right to the longest in their group."""

    slots: Tensor
    """(S,) The index, from 0 to T - 1, of each slot's token; arbitrary if the slot is empty."""
    is_read: Tensor
    """(S,) Whether the token in the slot uses the slot's output; True for one slot per token."""
    order: Tensor
    """(T,) The index of the slot whose output each token uses."""
    sizes: tuple[tuple[int, int], ...]
    """For each group, the number of sequences and the number of slots per sequence."""
    repeats: tuple[Tensor, ...]
    """Pairs of tensors, one pair after another. A pair contains the indices of tokens in shared
    prompts, and the indices of slots that hold copies of these tokens. The first pair is for the
    second sequence with each prompt, the next pair for the third sequence, and so on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedTokens:
    """A `TokenBatch` without padding: T tokens, some of which predict the N response tokens."""

    tokens: Tensor
    """(T,) Token ids."""
    positions: Tensor
    """(T,) Position of each token in its sequence."""
    predictors: Tensor
    """(N,) For each response token, the index of its predictor among the T tokens."""
    packing: Packing


def _packing(lengths: Tensor, owners: Tensor, places: Tensor, is_read: Tensor) -> Packing:
    """The packing of the sequences. `places` (B, L) contains each token's index among the packed
    tokens."""
    first_slots, slots, chosen, sizes, start = torch.empty_like(lengths), [], [], [], 0
    steps = torch.arange(is_read.shape[1], device=lengths.device)
    is_token = steps < lengths[:, None]
    groups = lengths.argsort(stable=True).tensor_split(GROUPS if len(lengths) >= 2 * GROUPS else 1)
    for rows in groups:
        longest = int(lengths[rows].max())
        chosen.append(is_read[rows, :longest].flatten())
        slots.append((places[rows, :longest] * is_token[rows, :longest]).flatten())
        first_slots[rows] = start + torch.arange(len(rows), device=lengths.device) * longest
        sizes.append((len(rows), longest))
        start += len(rows) * longest
    slot_of = first_slots[:, None] + steps
    turns = (owners[:, None] == owners).tril(-1).sum(1)  # number of earlier rows with this prompt
    repeats: list[Tensor] = []
    for turn in range(1, int(turns.max()) + 1):
        repeated = is_token & ~is_read & (turns == turn)[:, None]
        repeats += [places[repeated], slot_of[repeated]]
    return Packing(
        torch.cat(slots), torch.cat(chosen), slot_of[is_read], tuple(sizes), tuple(repeats)
    )


def token_batch(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    device: torch.device | str = "cpu",
) -> TokenBatch:
    """A batch of prompts and their responses, padded on the right with id 0, so that no real token
    attends to the padding."""
    assert all(prompts), (
        "a prompt must contain at least one token: its last token predicts the first response token"
    )
    sequences = [
        torch.tensor([*prompt, *response], device="cpu")
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    return TokenBatch(
        tokens=torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(device),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts], device=device),
        response_lengths=torch.tensor([len(response) for response in responses], device=device),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutBatch:
    """Solutions as tensors. Per-token tensors are (B, R) and 0 outside the responses. Per-sample
    tensors are (B,)."""

    tokens: TokenBatch
    rewards: Tensor
    """(B,)"""
    groups: Tensor
    """(B,) Samples of the same problem have the same integer."""
    gold: Tensor
    """(B,) True for gold rationales, which the policy did not sample."""
    sampling_logprobs: Tensor
    """Log-probabilities reported by the engine."""
    logprobs: Tensor
    """Log-probabilities under the policy that drew the samples, as computed by the trainer. If the
    trainer does not compute them, they come from the engine."""
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    weights: Tensor | None = None
    """Weight of each token in the loss of its minibatch; see `Algorithm.weights`."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def response_mask(self) -> Tensor:
        return self.tokens.response_mask

    @property
    def sampled_mask(self) -> Tensor:
        """(B, R), True on response tokens that the policy sampled."""
        return self.response_mask & ~self.gold[:, None]

    def rows(self, index: Tensor) -> RolloutBatch:
        """The samples at `index`, padded only to the longest response among them."""
        tokens = self.tokens.rows(index)
        longest = int(tokens.response_lengths.max())
        changed: dict[str, object] = {"tokens": tokens}
        for name in (f.name for f in fields(self) if f.name != "tokens"):
            value = getattr(self, name)
            if value is not None:
                changed[name] = value[index, :longest] if value.dim() == 2 else value[index]
        return replace(self, **changed)  # type: ignore[arg-type]


def micro_batches(
    lengths: Tensor, *, max_tokens: int, packed: bool = False, order: Tensor | None = None
) -> Iterator[Tensor]:
    """Yields groups of sequence indices with at most `max_tokens` tokens per group. A sequence with
    more tokens forms a group of its own. If `packed` is False, padding counts as tokens too.

    `order` lists the indices of the sequences to group. By default, it lists all sequences by
    increasing length. If `packed` is False, lengths must not decrease along `order`.
    """
    order = torch.argsort(lengths, stable=True) if order is None else order
    ordered = lengths[order].tolist()
    start, tokens = 0, 0
    for end in range(1, len(ordered) + 1):
        tokens += ordered[end - 1]
        one_more = ordered[end] if end < len(ordered) else 0
        size = tokens + one_more if packed else (end - start + 1) * one_more
        if end == len(ordered) or size > max_tokens:
            yield order[start:end]
            start, tokens = end, 0


def own_micro_batches(
    batch: TokenBatch, *, max_tokens: int, packed: bool = False, even: bool = False
) -> Iterator[tuple[Tensor, bool]]:
    """Yields, for each micro-batch of this process, the indices of its sequences and whether its
    results are to be used. If they are not, the micro-batch is a filler.

    Apart from fillers, the micro-batches of all processes together contain each sequence once. A
    process without any micro-batch gets a filler. With `even`, processes get fillers until all have
    the same number of micro-batches. A filler contains only the batch's first sequence.
    """
    rank, size = world.rank(), world.world_size()
    lengths = batch.lengths
    order = _by_prompt(lengths, batch.owners()) if packed else torch.argsort(lengths, stable=True)
    batches = [
        [*micro_batches(lengths, max_tokens=max_tokens, packed=packed, order=order[first::size])]
        for first in (range(size) if even else [rank])
    ]
    own, most = batches[rank if even else 0], max(1, *map(len, batches))
    yield from ((index, True) for index in own)
    yield from ((order[:1] * 0, False) for _ in range(most - len(own)))


def _by_prompt(lengths: Tensor, owners: Tensor) -> Tensor:
    """The indices of the sequences, sorted by increasing length. Sequences with the same prompt
    stay together, at the place of the longest of them."""
    longest = torch.zeros_like(lengths).scatter_reduce(0, owners, lengths, "amax")[owners]
    order = torch.argsort(owners, stable=True)
    return order[torch.argsort(longest[order], stable=True)]
