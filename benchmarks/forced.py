"""Forces answers to have given lengths. Contestants of the step benchmark use this if they sample
with transformers' `generate`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor


class ForcedLengths(LogitsProcessor):
    """Forbids eos before the last token of a row, and forces it as the last token."""

    def __init__(self, lengths: Sequence[int], prompt_length: int, eos_id: int) -> None:
        self.last = torch.tensor(lengths) - 1
        self.prompt_length, self.eos_id = prompt_length, eos_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return force_eos(scores, self.last == input_ids.shape[1] - self.prompt_length, self.eos_id)


def force_eos(scores: Tensor, ends: Tensor, eos_id: int) -> Tensor:
    """Change `scores` (B, V) in place: rows in `ends` (B,) can only draw eos, and other rows cannot
    draw it."""
    ends = ends.to(scores.device)
    scores[ends] = -torch.inf
    scores[:, eos_id] = torch.where(ends, 0.0, -torch.inf)
    return scores
