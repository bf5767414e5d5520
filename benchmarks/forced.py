"""Forces answers to have given lengths. In the step benchmark, the programs that sample with
transformers' `generate` use this."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor


class ForcedLengths(LogitsProcessor):
    """Forbids eos before the last token of each row's answer, and forces eos as that token."""

    def __init__(self, lengths: Sequence[int], prompt_length: int, eos_id: int) -> None:
        self.last = torch.tensor(lengths) - 1
        self.prompt_length, self.eos_id = prompt_length, eos_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return force_eos(scores, self.last == input_ids.shape[1] - self.prompt_length, self.eos_id)


def force_eos(scores: Tensor, ends: Tensor, eos_id: int) -> Tensor:
    """Change `scores` (B, V) in place: rows for which `ends` (B,) is True can only draw eos, and
    other rows cannot draw it."""
    ends = ends.to(scores.device)
    scores[ends] = -torch.inf
    scores[:, eos_id] = torch.where(ends, 0.0, -torch.inf)
    return scores
