"""The default engine, which decodes in the training process with a key-value cache.

Each row of a batch is one solution. Finished rows leave the batch and waiting prompts take their
places, so one long solution does not hold up the others. Identical prompts that join at the same
time are prefilled only once. New keys and values go into reserved space, so the cache is copied
only when rows leave or join, or when this space is full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicLayer

from reftune.model.policy import Policy
from reftune.model.speed import llama
from reftune.recipe import Component
from reftune.seeds import generator
from reftune.types import Completion, SamplingParams

DROP_SHARE = 1 / 8
"""Finished rows are dropped once they make up this share of all rows. Dropping them earlier would
copy the cache of the other rows more often."""
ROOM = 64
"""Whenever a cache is created or copied, space is reserved for this many new tokens per row."""
BLOCK = 256
"""Number of vocabulary entries in a block of `_invert`."""


class Reader(NamedTuple):
    """The functions that decoding needs from a policy."""

    forward: Callable[[Tensor, Tensor, Any], Tensor]
    """Takes new tokens (B, S), the mask (B, T) of cached and new tokens, and the cache. Tokens and
    mask are padded on the left. Adds the new tokens' keys and values to the cache. Returns the
    hidden state of each row's last token, (B, H)."""
    head: Callable[[Tensor], Tensor]
    """Takes hidden states (B, H) and returns fp32 logits (B, V)."""


class Kv(Component):
    batch_size: PositiveInt | Literal["auto"] = "auto"
    """Solutions decoded at once. `auto` uses as many as fit in the device's memory, up to 256."""
    refill: float = Field(0.25, gt=0, le=1)
    """Waiting prompts join the batch once this share of its rows is free."""

    @property
    def rows(self) -> int:
        """Number of rows decoded at once. If `batch_size` is still `auto`, this is 128."""
        return 128 if self.batch_size == "auto" else self.batch_size

    @torch.no_grad()
    def generate(
        self, policy: Policy, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[Completion]:
        """See `reftune.engines.Engine`."""
        requests = [
            _Request(position=i, prompt=tuple(prompt))
            for i, prompt in enumerate(prompts, params.first_position)
        ]
        # sorted, so that prompts of similar length share a batch
        waiting = sorted(requests, key=lambda request: len(request.prompt))
        with reader(policy) as reads:
            decoder = _Decoder(policy, params, reads)
            while waiting or decoder.active:
                free = self.rows - len(decoder.active)
                if waiting and (free >= self.refill * self.rows or not decoder.active):
                    joining, waiting = waiting[-free:], waiting[:-free]
                    decoder.join(joining)
                decoder.step()
        return [policy.completion(request.token_ids, *request.scores) for request in requests]


@contextmanager
def reader(policy: Policy, *, copies: llama.Copies = "reordered") -> Iterator[Reader]:
    """A `Reader` for `policy`. It uses `model.speed.llama` if that supports the model, and
    transformers otherwise. `llama.Copies` explains the values of `copies`. If `copies` is
    `reordered`, `model.speed.llama` computes nothing for the padding of prompts except in
    attention. The reader then cannot run on PyTorch's fake tensors."""
    if llama.is_written_out(policy.model):
        decoder = llama.Decoder(policy.model, policy.compute_dtype, copies=copies)
        yield Reader(decoder, decoder.logits)
        return

    def forward(tokens: Tensor, mask: Tensor, cache: Any) -> Tensor:
        output = policy.base.base_model(
            input_ids=tokens,
            attention_mask=mask,
            # rows are padded on the left
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden

    reorders = copies == "reordered"
    packed = llama.packed_linears(policy.model, policy.compute_dtype) if reorders else nullcontext()
    with policy.decoding(), packed:
        yield Reader(forward, lambda hidden: policy.base.get_output_embeddings()(hidden).float())


@dataclass(slots=True)
class _Request:
    position: int
    prompt: tuple[int, ...]
    token_ids: list[int] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    """(K, tokens) This request's scores, copied from `_Rows.scores`."""


class _Decoder:
    """The rows being decoded: their cache, left-padded to a common length, and the tokens drawn so
    far."""

    def __init__(self, policy: Policy, params: SamplingParams, reads: Reader) -> None:
        self.policy, self.params, self.reads = policy, params, reads
        self.device = policy.device
        self.scores_as_trained = (
            policy.compute_dtype == torch.float32
            and policy.packs  # other models may score differently with a cache
            and policy.value_backbone is None
            and (params.temperature > 0 and params.top_k == 0 and params.top_p == 1)
        )
        """Whether the scores computed here equal the scores of `Policy.score` up to rounding. If
        so, the trainer need not compute them again."""
        self.eos_ids = torch.tensor(sorted(policy.eos_ids), device=self.device)
        self.active: list[_Request] = []
        self.cache: Any = None
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=self.device)
        """(B, T), 1 where the cache holds a token of the row's prompt or solution."""
        self.rows: _Rows

    def join(self, requests: list[_Request]) -> None:
        """Prefill each distinct prompt of `requests` once, and add the requests to the batch."""
        distinct = list(dict.fromkeys(request.prompt for request in requests))
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        cache, mask, hidden = self._prefill(distinct)
        rows = torch.tensor([row_of[r.prompt] for r in requests], device=self.device)
        cache.batch_select_indices(rows)
        mask = mask[rows]
        joining = _Rows.start(
            self._draw_uniforms(requests), hidden[rows], kinds=3 if self.scores_as_trained else 1
        )
        if self.active:
            length = max(mask.shape[1], self.mask.shape[1])
            _stack(self.cache, cache, length)
            self.mask = torch.cat([_pad_left(self.mask, length), _pad_left(mask, length)])
            self.rows = _Rows(*map(torch.cat, zip(self.rows, joining, strict=True)))
        else:
            self.cache, self.mask, self.rows = cache, mask, joining
        self.active = self.active + requests

    def _prefill(self, prompts: list[tuple[int, ...]]) -> tuple[Any, Tensor, Tensor]:
        """The cache of the prompts, its mask (B, T), and each prompt's last hidden state (B, H)."""
        longest = max(len(prompt) for prompt in prompts)
        tokens = torch.tensor(
            [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=self.device
        )
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        mask = (torch.arange(longest, device=self.device) >= longest - lengths[:, None]).long()
        # every layer keeps all columns, even if its attention has a sliding window
        cache = Cache(layer_class_to_replicate=_RoomyLayer)
        return cache, mask, self.reads.forward(tokens, mask, cache)

    def _draw_uniforms(self, requests: list[_Request]) -> Tensor:
        """Random numbers (B, M) in [0, 1), for up to M tokens per row. A row's numbers depend only
        on the seed and on the position of the row's prompt among all prompts. Greedy decoding needs
        no random numbers, so the result is all zeros."""
        shape = (len(requests), self.params.max_new_tokens)
        if self.params.temperature == 0:
            return torch.zeros(shape, dtype=widest(self.device), device=self.device)
        draws = [generator(self.params.seed, r.position).random(shape[1]) for r in requests]
        return torch.from_numpy(np.stack(draws)).to(widest(self.device)).to(self.device)

    def step(self) -> None:
        """Draw one token per row, drop finished rows if they are at least `DROP_SHARE` of all, and
        run the model on the new tokens."""
        rows, stop, last = self.rows, self.policy.stop, self.params.max_new_tokens - 1
        # Rows join at different times, so their next tokens go to different columns.
        places = rows.lengths.clamp(max=last)[:, None]
        uniforms = rows.uniforms.gather(1, places).squeeze(1)
        tokens, logprobs, entropies = draw_tokens(
            self.logits(), uniforms, self.params, with_entropy=self.scores_as_trained
        )
        scores = logprobs[:, None]
        if self.scores_as_trained:
            scores = torch.stack([logprobs, self.policy.values(rows.hidden), entropies], 1)
        places = torch.where(rows.done[:, None], last + 1, places)
        rows.tokens.scatter_(1, places, tokens[:, None])
        rows.scores.scatter_(2, places.expand_as(scores)[..., None], scores[..., None])
        rows.lengths.add_(~rows.done)
        rows.done.logical_or_(torch.isin(tokens, self.eos_ids)).logical_or_(rows.lengths > last)
        if stop.texts:
            written = zip(rows.lengths.tolist(), rows.tokens.tolist(), strict=True)
            met = [stop.is_met(ids[:length], self.policy.decode) for length, ids in written]
            rows.done.logical_or_(torch.tensor(met, device=self.device))
        num_done = int(rows.done.sum())
        if num_done and num_done >= DROP_SHARE * len(self.active):
            self._finish(rows.done.nonzero().squeeze(1))
            keep = (~rows.done).nonzero().squeeze(1)
            self._keep(keep)
            tokens = tokens[keep]
        if self.active:
            # a finished row that stays must not move on to positions beyond the model's context
            goes_on = (~self.rows.done).to(self.mask.dtype)
            self.mask = torch.cat([self.mask, goes_on[:, None]], dim=1)
            hidden = self.reads.forward(tokens[:, None], self.mask, self.cache)
            self.rows = self.rows._replace(hidden=hidden)

    def logits(self) -> Tensor:
        """The fp32 logits (B, V) of each row's next token."""
        return self.reads.head(self.rows.hidden)

    def _finish(self, done: Tensor) -> None:
        """Store the tokens and scores of the rows with indices `done` in their requests."""
        columns = (done, self.rows.lengths[done], self.rows.tokens[done], self.rows.scores[done])
        for row, length, tokens, scores in zip(*(c.tolist() for c in columns), strict=True):
            request = self.active[row]
            request.token_ids, request.scores = tokens[:length], [kind[:length] for kind in scores]

    def _keep(self, rows: Tensor) -> None:
        self.active = [self.active[row] for row in rows.tolist()]
        self.mask, self.rows = self.mask[rows], _Rows(*(part[rows] for part in self.rows))
        self.cache.batch_select_indices(rows)
        # leading columns that only finished rows needed
        unused = int((self.mask.sum(0) == 0).int().cumprod(0).sum()) if self.active else 0
        if unused:
            self.mask = self.mask[:, unused:]
            for layer in self.cache.layers:
                layer.keys = layer.keys[..., unused:, :]
                layer.values = layer.values[..., unused:, :]


class _Rows(NamedTuple):
    """The state of B rows, with at most M drawn tokens per row."""

    uniforms: Tensor
    """(B, M) One random number per token."""
    hidden: Tensor
    """(B, H) The hidden states that predict the next tokens."""
    tokens: Tensor
    """(B, M + 1) Token ids. Finished rows write to the last column, which is never read."""
    scores: Tensor
    """(B, K, M + 1) Log-probabilities and, if K = 3, values and entropies."""
    lengths: Tensor
    """(B,) Number of tokens so far."""
    done: Tensor
    """(B,) Whether the row has finished."""

    @classmethod
    def start(cls, uniforms: Tensor, hidden: Tensor, *, kinds: int) -> _Rows:
        """Rows before their first token, with room for `kinds` scores per token."""
        rows, width = uniforms.shape
        tokens = uniforms.new_zeros(rows, width + 1, dtype=torch.long)
        scores = uniforms.new_zeros(rows, kinds, width + 1, dtype=torch.float32)
        lengths = uniforms.new_zeros(rows, dtype=torch.long)
        return cls(uniforms, hidden, tokens, scores, lengths, lengths.bool())


class _RoomyLayer(DynamicLayer):
    """A layer's cache. Its tensors are views of larger tensors, so that new tokens are written in
    place."""

    seen: Tensor | None = None
    """The keys as last written. If `keys` is a different tensor, rows or columns have been added or
    removed since then."""
    room: tuple[Tensor, ...]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, heads, S, D), and return all keys and values so far."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.seen is None or self.keys is not self.seen or end > self.room[0].shape[-2]:
            self._move(key_states, value_states, start, end + ROOM)
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room.narrow(-2, start, end - start).copy_(states)
        self.keys, self.values = (room.narrow(-2, 0, end) for room in self.room)
        self.seen = self.keys
        return self.keys, self.values

    def _move(self, key_states: Tensor, value_states: Tensor, held: int, length: int) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.room = tuple(
            states.new_empty(*states.shape[:-2], length, states.shape[-1])
            for states in (key_states, value_states)
        )
        if held:
            assert self.keys is not None and self.values is not None
            self.room[0][..., :held, :], self.room[1][..., :held, :] = self.keys, self.values


class Drawn(NamedTuple):
    """One drawn token per row. All tensors are (B,)."""

    tokens: Tensor
    logprobs: Tensor
    """Log-probabilities of the tokens under the distributions that they were drawn from."""
    entropies: Tensor
    """Entropies, in nats, of the distributions that the tokens were drawn from."""


def draw_tokens(
    logits: Tensor, uniforms: Tensor, params: SamplingParams, *, with_entropy: bool = True
) -> Drawn:
    """Draw one token per row.

    `logits` are (B, V) in fp32. Sampling inverts the cumulative distribution at `uniforms`, which
    has shape (B,) and values in [0, 1). A row's token therefore depends only on the row's logits
    and uniform number. In greedy decoding, the log-probabilities are those at temperature 1, and
    the entropies are 0. In sampling, the entropies are NaN if `with_entropy` is False.
    """
    if params.temperature == 0:
        largest, tokens = logits.max(1)
        return Drawn(tokens, largest - logits.logsumexp(1), torch.zeros_like(largest))
    scores = _restrict(logits / params.temperature, params)
    scores -= scores.amax(1, keepdim=True)
    weights = scores.exp()
    tokens, total = _invert(weights, uniforms)
    log_total = total.log().float()
    logprobs = scores.gather(1, tokens[:, None]).squeeze(1) - log_total
    if not with_entropy:
        return Drawn(tokens, logprobs, torch.full_like(logprobs, torch.nan))
    means = scores.mul_(weights).nansum(1) / total  # 0 · -∞ counts as 0
    return Drawn(tokens, logprobs, log_total - means.float())


def _invert(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """For each row, the first token at which the running sum of `weights` (B, V) exceeds the row's
    entry in `uniforms` (B,) times the row's total. Returns these tokens (B,) and the totals (B,).
    The search first finds the block of `BLOCK` tokens that contains the token, and then looks only
    inside this block. It therefore reads the whole vocabulary only once.
    """
    blocks = functional.pad(weights, (0, -weights.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    sums = blocks.sum(2).to(widest(weights.device))
    total = sums.sum(1)
    threshold = uniforms * total
    block = _first_past(sums.cumsum(1), threshold)
    rows = torch.arange(len(weights), device=weights.device)
    before = sums.cumsum(1)[rows, block] - sums[rows, block]
    inside = blocks[rows, block].to(widest(weights.device)).cumsum(1)
    return block * BLOCK + _first_past(inside, threshold - before), total


def widest(device: torch.device) -> torch.dtype:
    """The dtype for random numbers and sums of probabilities: fp32 on Apple's GPUs, which lack
    fp64, and fp64 elsewhere."""
    return torch.float32 if device.type == "mps" else torch.float64


def _first_past(cumulative: Tensor, threshold: Tensor) -> Tensor:
    """For each row of the non-decreasing `cumulative` (B, N), the first column whose entry exceeds
    the row's `threshold` (B,). If rounding leaves no such column, the result is the last column at
    which the row increases."""
    found = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(1)
    return found.minimum((cumulative < cumulative[:, -1:]).sum(1))


def _restrict(scores: Tensor, params: SamplingParams) -> Tensor:
    """`scores`, with -inf for all tokens that must not be drawn. `top_k` keeps only the `top_k`
    likeliest tokens, and any that are exactly as likely as the last of these. The probabilities of
    the kept tokens are then renormalised, and `top_p` keeps the smallest set with a total
    probability of at least `top_p`."""
    if 0 < params.top_k < scores.shape[1]:
        kth = scores.topk(params.top_k, dim=1).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if params.top_p < 1:
        ordered, order = scores.softmax(1).sort(dim=1, descending=True)
        # the token with which the sum reaches `top_p` is kept
        outside = ordered.cumsum(1) - ordered >= params.top_p
        outside = torch.zeros_like(outside).scatter(1, order, outside)
        scores = scores.masked_fill(outside, -torch.inf)
    return scores


def _stack(cache: Any, joining: Any, length: int) -> None:
    """Append the rows of `joining` to `cache`. Both are padded on the left to `length`."""
    for layer, new in zip(cache.layers, joining.layers, strict=True):
        for name in ("keys", "values"):
            parts = [_pad_left(getattr(part, name), length, dim=-2) for part in (layer, new)]
            setattr(layer, name, torch.cat(parts))


def _pad_left(values: Tensor, length: int, *, dim: int = -1) -> Tensor:
    """`values`, padded with zeros to `length` in the dimension `dim`, which counts from the end."""
    missing = length - values.shape[dim]
    return functional.pad(values, (0, 0) * (-1 - dim) + (missing, 0)) if missing else values
