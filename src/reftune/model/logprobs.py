"""Computes the log-probabilities of response tokens from hidden states, without keeping all logits
in memory at once.

Logits are computed in tiles. A tile covers some of the tokens and a part of the vocabulary. At most
`LOGITS_KEPT` logits are kept, and the backward pass recomputes the others. The memory for logits is
therefore bounded. A tile is small enough for the CPU's cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGIT_ELEMENTS = 2**21
"""Maximum number of logits (tokens × vocabulary) in a tile: 8 MiB in fp32."""
LOGITS_KEPT = 2**26
"""Maximum number of logits kept for the backward pass: 256 MiB in fp32."""
TOKENS_AT_ONCE = 2**11
"""Number of tokens in a tile, unless the vocabulary is so small that a tile has room for more. With
fewer tokens per tile, training would be slower, because each group of tokens requires a pass over
the gradient of the head's whole weight."""


def token_logprobs(
    head: nn.Module, hidden: Tensor, tokens: Tensor, temperature: float = 1.0
) -> Tensor:
    """The log-probability (N,) of each token under the softmax of `head(hidden)` / `temperature`,
    in fp32 and with gradients. `hidden` is (N, H), and `tokens` (N,) contains ids."""
    if type(head) is nn.Linear:
        logprobs: Tensor = _LinearLogprobs.apply(
            hidden, head.weight, head.bias, tokens, temperature
        )  # type: ignore[no-untyped-call]
        return logprobs
    # any other head, such as an output embedding with an adapter
    return torch.cat(
        [
            checkpoint(_plain_logprobs, head, h, t, temperature, use_reentrant=False)
            for h, t in _chunks(head, hidden, tokens)
        ]
    )


@torch.no_grad()
def logprobs_and_entropy(
    head: nn.Module, hidden: Tensor, tokens: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The result of `token_logprobs`, and the entropy in nats of the distribution from which each
    token is drawn. Both are (N,) and have no gradients."""
    if type(head) is nn.Linear:
        softmax = _softmax(_cast(hidden), head.weight, head.bias, tokens, temperature, means=True)
        return (
            softmax.picked - softmax.largest - softmax.log_totals,
            softmax.log_totals - softmax.means,
        )
    logprobs, entropies = [], []
    for some, their_tokens in _chunks(head, hidden, tokens):
        logits = head(some).float()
        logits.div_(temperature).sub_(logits.amax(1, keepdim=True))
        picked, exponentials = logits.gather(1, their_tokens[:, None]).squeeze(1), logits.exp()
        total = exponentials.sum(1)
        logprobs.append(picked - total.log())
        entropies.append(total.log() - exponentials.mul_(logits).sum(1) / total)
    return torch.cat(logprobs), torch.cat(entropies)


class _LinearLogprobs(torch.autograd.Function):
    """`token_logprobs` for a linear head. It computes the logits in tiles. Each tile covers some of
    the tokens and a part of the vocabulary. The forward pass saves the hidden states, one
    normaliser per token and the logits of the first tiles. The backward pass recomputes the other
    logits. Values are cast as autocast would cast them, but the weight's gradient is summed in
    fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
    ) -> Tensor:
        ctx.wide, ctx.temperature = hidden.dtype, temperature
        hidden = _cast(hidden)
        kept: list[Tensor] = []
        softmax = _softmax(hidden, weight, bias, tokens, temperature, kept=kept)
        normalisers = softmax.log_totals + softmax.largest
        ctx.save_for_backward(hidden, weight, bias, tokens, normalisers, *kept)
        return softmax.picked - normalisers

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        """d logprob / d logits = (onehot(token) - softmax) / temperature."""
        hidden, weight, bias, tokens, normalisers, *kept = ctx.saved_tensors
        grad = grads[0] / ctx.temperature
        _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.zeros(hidden.shape, device=hidden.device)
        grad_weight = torch.empty(weight.shape, device=weight.device) if wants_weight else None
        grad_bias = torch.zeros(bias.shape, device=bias.device) if wants_bias else None
        for tile in _tiles(hidden, weight, bias, tokens, ctx.temperature, kept):
            rows, columns = tile.rows, tile.columns
            logits = tile.logits - normalisers[rows, None]
            logits.exp_().mul_(-grad[rows, None])
            logits.scatter_add_(1, tile.tokens[:, None], (grad[rows] * tile.is_inside)[:, None])
            grad_logits = logits.to(hidden.dtype)
            grad_hidden[rows] += grad_logits @ tile.weight
            if grad_weight is not None:
                product = grad_logits.T @ hidden[rows]
                grad_weight[columns] = (
                    product if rows.start == 0 else grad_weight[columns] + product
                )
            if grad_bias is not None:
                grad_bias[columns] += logits.sum(0)
        return grad_hidden.to(ctx.wide), grad_weight, grad_bias, None, None


class _Softmax(NamedTuple):
    """Statistics of each row's softmax, from which log-probabilities and entropies are computed.
    Each tensor is (N,) and in fp32."""

    picked: Tensor
    """The logit of the row's token."""
    largest: Tensor
    log_totals: Tensor
    """log Σ exp(logit - largest)"""
    means: Tensor
    """Σ probability · (logit - largest); 0 if not requested."""


def _softmax(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float,
    *,
    means: bool = False,
    kept: list[Tensor] | None = None,
) -> _Softmax:
    """Statistics of each row's softmax, accumulated tile by tile. Exponentials are relative to the
    row's largest logit so far, and sums are rescaled when a larger logit appears. If the list
    `kept` is given, the logits of the first tiles are appended to it."""
    picked, totals, weighted = (torch.zeros(len(hidden), device=hidden.device) for _ in range(3))
    largest = torch.full_like(totals, torch.finfo(torch.float32).min / 2)
    for tile in _tiles(hidden, weight, bias, tokens, temperature):
        rows, logits = tile.rows, tile.logits
        picked[rows] += logits.gather(1, tile.tokens[:, None]).squeeze(1) * tile.is_inside
        larger = largest[rows].maximum(logits.amax(1))
        shift = largest[rows] - larger
        if kept is not None and (len(kept) + 1) * LOGIT_ELEMENTS <= LOGITS_KEPT:
            kept.append(logits)
            logits = logits - larger[:, None]
        else:
            logits.sub_(larger[:, None])
        exponentials = logits.exp() if means else logits.exp_()
        sums = exponentials.sum(1)
        if means:
            weighted[rows] = (
                weighted[rows] + shift * totals[rows]
            ) * shift.exp() + exponentials.mul_(logits).sum(1)
        totals[rows] = totals[rows] * shift.exp() + sums
        largest[rows] = larger
    return _Softmax(picked, largest, totals.log(), weighted / totals)


class _Tile(NamedTuple):
    rows: slice
    """The tile's n tokens."""
    columns: slice
    """The tile's C vocabulary entries."""
    logits: Tensor
    """(n, C) Logits divided by the temperature, in fp32."""
    weight: Tensor
    """(C, H) The weight's rows for these vocabulary entries, in the dtype of the product."""
    tokens: Tensor
    """(n,) For each row, the column of its token in the tile; arbitrary if the token is not in the
    tile."""
    is_inside: Tensor
    """(n,) Whether the row's token is in the tile."""


def _tiles(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float,
    kept: Iterable[Tensor] = (),
) -> Iterator[_Tile]:
    """All tiles of the logits, in order: by group of rows, then from left to right within each
    group. `kept` contains the logits of the first tiles, which are not computed again."""
    known = iter(kept)
    vocabulary = len(weight)
    height = max(TOKENS_AT_ONCE, LOGIT_ELEMENTS // vocabulary)
    for first in range(0, max(1, len(hidden)), height):
        rows = slice(first, min(first + height, len(hidden)))
        width = max(1, LOGIT_ELEMENTS // max(1, rows.stop - rows.start))
        for left in range(0, vocabulary, width):
            columns = slice(left, min(left + width, vocabulary))
            part = weight[columns].to(hidden.dtype)
            logits = next(known, None)
            if logits is None:
                logits = (hidden[rows] @ part.T).float()
                if bias is not None:
                    logits += bias[columns]
                if temperature != 1:
                    logits /= temperature
            inside = (tokens[rows] >= columns.start) & (tokens[rows] < columns.stop)
            local = (tokens[rows] - columns.start).clamp(0, columns.stop - columns.start - 1)
            yield _Tile(rows, columns, logits, part, local, inside)


def _chunks(head: Any, hidden: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, LOGIT_ELEMENTS // int(head.out_features))
    return zip(hidden.split(rows), tokens.split(rows), strict=True)


def _plain_logprobs(head: nn.Module, hidden: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    logits: Tensor = head(hidden).float() / temperature
    return logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(1)


def _cast(values: Tensor) -> Tensor:
    """`values`, cast as autocast would cast an operand of a product."""
    device = values.device.type
    return (
        values.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else values
    )
