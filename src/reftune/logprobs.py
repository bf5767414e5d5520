"""Log-probabilities of response tokens from hidden states, without ever holding the logits of all of them.

Logits are made for some tokens at a time, in two buffers that every chunk uses again, and made once more in the backward
pass. Memory therefore does not grow with vocabulary × length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGIT_ELEMENTS = 2**24
"""Most logits (tokens × vocabulary) held at once: 64 MiB in fp32."""


def token_logprobs(head: nn.Module, hidden: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """fp32 log-probability of each token under the tempered softmax of `head(hidden)`, (N,), with gradients.

    `hidden` (N, H), `tokens` (N,) ids. The products are in the autocast dtype where autocast is on.
    """
    if type(head) is nn.Linear:
        logprobs: Tensor = _LinearLogprobs.apply(hidden, head.weight, head.bias, tokens, temperature)  # type: ignore[no-untyped-call]
        return logprobs
    rows = _rows_at_once(head)  # such as an output embedding with an adapter
    chunks = zip(hidden.split(rows), tokens.split(rows), strict=True)
    return torch.cat([checkpoint(_plain_logprobs, head, h, t, temperature, use_reentrant=False) for h, t in chunks])


@torch.no_grad()
def logprobs_and_entropy(head: nn.Module, hidden: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """As `token_logprobs`, without gradients, and the entropy (nats) of the distributions; each (N,)."""
    logprobs, entropy = hidden.new_empty(len(hidden), dtype=torch.float32), hidden.new_empty(len(hidden), dtype=torch.float32)
    rows = _rows_at_once(head)
    for start in range(0, len(hidden), rows):
        chunk = slice(start, start + rows)
        logits = head(hidden[chunk]).float()
        logits.div_(temperature).sub_(logits.amax(1, keepdim=True))
        picked, exponentials = logits.gather(1, tokens[chunk, None]).squeeze(1), logits.exp()
        total = exponentials.sum(1)
        logprobs[chunk] = picked - total.log()
        entropy[chunk] = total.log() - exponentials.mul_(logits).sum(1) / total
    return logprobs, entropy


class _LinearLogprobs(torch.autograd.Function):
    """Saves the hidden states and one normaliser a token; the backward pass makes the logits again.

    It casts for autocast itself, so that the gradient of the weight is summed in fp32 and never leaves it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float) -> Tensor:
        ctx.wide = hidden.dtype
        hidden, weight = _cast(hidden), _cast(weight)
        logprobs = torch.empty(len(hidden), device=hidden.device)
        normalisers = torch.empty_like(logprobs)
        for chunk, logits in _logit_chunks(hidden, weight, bias, temperature):
            picked, largest = logits.gather(1, tokens[chunk, None]).squeeze(1), logits.amax(1)
            normalisers[chunk] = logits.sub_(largest[:, None]).exp_().sum(1).log_().add_(largest)
            logprobs[chunk] = picked - normalisers[chunk]
        ctx.save_for_backward(hidden, weight, bias, tokens, normalisers)
        ctx.temperature = temperature
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        """d logprob / d logits = onehot(token) - softmax, over the temperature."""
        hidden, weight, bias, tokens, normalisers = ctx.saved_tensors
        grad = grads[0] / ctx.temperature
        _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, device=weight.device) if wants_weight else None
        grad_bias = torch.zeros(bias.shape, device=bias.device) if wants_bias else None
        for chunk, logits in _logit_chunks(hidden, weight, bias, ctx.temperature):
            logits.sub_(normalisers[chunk, None]).exp_().mul_(-grad[chunk, None])
            logits.scatter_add_(1, tokens[chunk, None], grad[chunk, None])
            grad_logits = logits.to(hidden.dtype)
            grad_hidden[chunk] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[chunk]
            if grad_bias is not None:
                grad_bias += logits.sum(0)
        return grad_hidden.to(ctx.wide), grad_weight, grad_bias, None, None


def _logit_chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their tempered logits, fp32; the caller may change them, the next chunk takes their place."""
    rows = max(1, LOGIT_ELEMENTS // len(weight))
    products = torch.empty(min(rows, len(hidden)), len(weight), dtype=hidden.dtype, device=hidden.device)
    buffer = products if hidden.dtype == torch.float32 else torch.empty_like(products, dtype=torch.float32)
    for start in range(0, len(hidden), rows):
        chunk = slice(start, min(start + rows, len(hidden)))
        size = chunk.stop - chunk.start
        torch.mm(hidden[chunk], weight.T, out=products[:size])
        logits = buffer[:size] if buffer is products else buffer[:size].copy_(products[:size])
        if bias is not None:
            logits += bias
        yield chunk, logits if temperature == 1 else logits.div_(temperature)


def _rows_at_once(head: Any) -> int:
    return max(1, LOGIT_ELEMENTS // int(head.out_features))


def _plain_logprobs(head: nn.Module, hidden: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    logits: Tensor = head(hidden).float() / temperature
    return logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(1)


def _cast(values: Tensor) -> Tensor:
    """What autocast would do to an operand of a product."""
    device = values.device.type
    return values.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else values
