"""The default engine: cached decoding with plain transformers, in the training process, on the training weights.

Rows that finish leave the batch, so one long solution does not hold up the others, and waiting prompts take their place.
Equal prompts are read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers import DynamicCache

from reftune.policy import Policy
from reftune.recipe import Component
from reftune.seeds import generator
from reftune.types import Completion, SamplingParams


class Kv(Component):
    kind: str = "kv"
    batch_size: int = Field(128, gt=0)
    """Rows decoded at once."""
    refill: float = Field(0.25, gt=0, le=1)
    """Share of the rows that must be free before waiting prompts join."""

    @torch.no_grad()
    def generate(self, policy: Policy, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Completion]:
        """One completion a prompt, in order; see `reftune.engines.Engine`."""
        requests = [_Request(position=i, prompt=list(prompt)) for i, prompt in enumerate(prompts)]
        waiting = sorted(requests, key=lambda request: len(request.prompt))  # similar lengths share a batch
        with policy.inference():
            decoder = _Decoder(policy, params)
            while waiting or decoder.active:
                free = self.batch_size - len(decoder.active)
                if waiting and (free >= self.refill * self.batch_size or not decoder.active):
                    joining, waiting = waiting[-free:], waiting[:-free]
                    decoder.join(joining)
                decoder.step()
        return [_completion(request, policy) for request in requests]


@dataclass(slots=True)
class _Request:
    position: int
    prompt: list[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class _Decoder:
    """Rows that are being decoded: their cache, left-padded to one length, and the logits of each row's next token."""

    def __init__(self, policy: Policy, params: SamplingParams) -> None:
        self.policy, self.params = policy, params
        self.eos_ids = policy.eos_ids
        self.active: list[_Request] = []
        self.cache: Any = None
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=policy.device)  # (B, T), 1 where the cache holds a token
        self.logits = torch.zeros(0, 0, device=policy.device)  # (B, V), fp32
        self.uniforms = torch.zeros(0, params.max_new_tokens, dtype=torch.float64, device=policy.device)

    def join(self, requests: list[_Request]) -> None:
        """Prefill `requests`, each distinct prompt once, and append them to the batch."""
        distinct = {tuple(request.prompt): i for i, request in reversed(list(enumerate(requests)))}
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        cache, mask, logits = self._prefill(list(distinct))
        rows = torch.tensor([row_of[tuple(request.prompt)] for request in requests], device=self.policy.device)
        cache.batch_select_indices(rows)
        mask, logits = mask[rows], logits[rows]
        if self.active:
            length = max(mask.shape[1], self.mask.shape[1])
            _stack(self.cache, cache, length)
            self.mask = torch.cat([_pad_left(self.mask, length), _pad_left(mask, length)])
            self.logits = torch.cat([self.logits, logits])
        else:
            self.cache, self.mask, self.logits = cache, mask, logits
        self.active = self.active + requests
        self.uniforms = torch.cat([self.uniforms, self._draw_uniforms(requests)])

    def _prefill(self, prompts: list[tuple[int, ...]]) -> tuple[Any, Tensor, Tensor]:
        longest = max(len(prompt) for prompt in prompts)
        device = self.policy.device
        tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        mask = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
        cache = DynamicCache()  # without the config: every layer keeps all columns, also those with a sliding window
        return cache, mask, self._forward(tokens, mask, cache)

    def _forward(self, tokens: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """Logits (B, V), fp32, after the last of `tokens` (B, S)."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = self.policy.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _draw_uniforms(self, requests: list[_Request]) -> Tensor:
        """One number a token and row, a function of the seed and the row's position only."""
        draws = [generator(self.params.seed, r.position).random(self.params.max_new_tokens) for r in requests]
        return torch.from_numpy(np.stack(draws)).to(self.policy.device)

    def step(self) -> None:
        """Draw one token a row, drop the rows that are done, and read the new tokens."""
        # Rows join at different times: each takes the number of its own step.
        steps = torch.tensor([len(request.token_ids) for request in self.active], device=self.policy.device)
        uniforms = self.uniforms.gather(1, steps[:, None]).squeeze(1)
        tokens, logprobs = draw_tokens(self.logits, uniforms, self.params)
        self._record(tokens.tolist(), logprobs.tolist())
        keep = [row for row, request in enumerate(self.active) if not self._done(request)]
        if len(keep) < len(self.active):
            self._keep(torch.tensor(keep, dtype=torch.long, device=self.policy.device))
            tokens = tokens[keep]
        if self.active:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
            self.logits = self._forward(tokens[:, None], self.mask, self.cache)

    def _record(self, tokens: list[int], logprobs: list[float]) -> None:
        for request, token, logprob in zip(self.active, tokens, logprobs, strict=True):
            request.token_ids.append(token)
            request.logprobs.append(logprob)

    def _done(self, request: _Request) -> bool:
        return request.token_ids[-1] in self.eos_ids or len(request.token_ids) >= self.params.max_new_tokens

    def _keep(self, rows: Tensor) -> None:
        self.active = [self.active[row] for row in rows.tolist()]
        self.mask, self.uniforms = self.mask[rows], self.uniforms[rows]
        self.cache.batch_select_indices(rows)
        if self.active:
            unused = int((self.mask.sum(0) == 0).int().cumprod(0).sum())  # leading columns that only rows now gone needed
            if unused:
                self.mask = self.mask[:, unused:]
                for layer in self.cache.layers:
                    layer.keys, layer.values = layer.keys[..., unused:, :], layer.values[..., unused:, :]


def draw_tokens(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Tokens (B,) and their log-probabilities (B,) under the distribution they were drawn from.

    Sampling inverts the cumulative distribution at `uniforms` (B,) in [0, 1), so a row's token depends on nothing but its
    own logits and number. Greedy tokens get the log-probability of the untempered distribution. `logits` (B, V), fp32.
    """
    if params.temperature == 0:
        tokens = logits.argmax(1)
        return tokens, logits.log_softmax(1).gather(1, tokens[:, None]).squeeze(1)
    scores = _restrict(logits / params.temperature, params).log_softmax(1)
    cumulative = scores.double().exp().cumsum(1)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
    return tokens, scores.gather(1, tokens[:, None]).squeeze(1)


def _restrict(scores: Tensor, params: SamplingParams) -> Tensor:
    """-inf outside the `top_k` likeliest tokens and outside the smallest set that holds `top_p` of the probability."""
    if 0 < params.top_k < scores.shape[1]:
        kth = scores.topk(params.top_k, dim=1).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if params.top_p < 1:
        ordered, order = scores.softmax(1).sort(dim=1, descending=True)
        outside = ordered.cumsum(1) - ordered >= params.top_p  # the token that crosses the bound stays
        scores = scores.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)
    return scores


def _stack(cache: Any, joining: Any, length: int) -> None:
    """Append the rows of `joining` to `cache`, both left-padded to `length`."""
    for layer, new in zip(cache.layers, joining.layers, strict=True):
        layer.keys = torch.cat([_pad_left(layer.keys, length, dim=-2), _pad_left(new.keys, length, dim=-2)])
        layer.values = torch.cat([_pad_left(layer.values, length, dim=-2), _pad_left(new.values, length, dim=-2)])


def _pad_left(values: Tensor, length: int, *, dim: int = -1) -> Tensor:
    missing = length - values.shape[dim]
    if missing == 0:
        return values
    shape = list(values.shape)
    shape[dim] = missing
    return torch.cat([values.new_zeros(shape), values], dim=dim)


def _completion(request: _Request, policy: Policy) -> Completion:
    return Completion(
        token_ids=tuple(request.token_ids),
        text=policy.decode(request.token_ids),
        logprobs=tuple(request.logprobs),
        finish_reason="eos" if request.token_ids[-1] in policy.eos_ids else "length",
    )
