"""The kv engine with answers of given lengths; `reftune run` samples with it in the step
benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from benchmarks.forced import force_eos
from benchmarks.workload import read_workload
from torch import Tensor

from reftune.engines import kv
from reftune.engines.kv import Reader
from reftune.model.policy import Policy
from reftune.types import Completion, SamplingParams


class ForcedKv(kv.Kv):
    workload: Path

    def generate(
        self, policy: Policy, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[Completion]:
        lengths = read_workload(self.workload).lengths
        with patch.object(kv, "_Decoder", partial(ForcedDecoder, lengths=lengths)):
            completions = super().generate(policy, prompts, params)
        return [replace(c, text=program(i, params.seed)) for i, c in enumerate(completions)]


class ForcedDecoder(kv._Decoder):
    def __init__(
        self, policy: Policy, params: SamplingParams, reads: Reader, *, lengths: Sequence[int]
    ) -> None:
        super().__init__(policy, params, reads)
        self.lengths = lengths

    def logits(self) -> Tensor:
        logits = super().logits()
        wanted = [self.lengths[r.position % len(self.lengths)] for r in self.active]
        ends = self.rows.lengths == torch.tensor(wanted, device=logits.device) - 1
        own = int(self.policy.tokenizer.eos_token_id)
        logits[:, [id_ for id_ in self.policy.eos_ids if id_ != own]] = -torch.inf
        return force_eos(logits, ends, own)


def program(row: int, seed: int) -> str:
    """An ordinary program, different for each row and step. It gives the grader real work; the
    model itself writes no programs, because it was not trained on this task."""
    return (
        f"\n    apples = {row + 3}\n    boxes = {seed % 97 + 2}\n    total = apples * boxes\n   "
        " return total - 1\n"
    )
