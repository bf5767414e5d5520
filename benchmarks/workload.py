"""The work of each program that the step benchmark compares (docs/performance.md): prompts, and the
lengths of their answers.

The lengths are 16 quantiles of the lengths of SVAMP's compact programs in SmolLM2 tokens. Their
order is random but fixed, so that short and long solutions share a batch, as in a run.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path

LENGTHS = (36, 42, 46, 49, 51, 54, 56, 58, 60, 62, 66, 69, 73, 77, 85, 103)
MAX_NEW = 150


@dataclass(frozen=True, slots=True)
class Workload:
    """The work of one step."""

    model: str
    """Folder of the model."""
    prompts: list[str]
    lengths: list[int]
    """Number of tokens in each answer, including eos."""
    rewards: list[float]
    max_new: int = MAX_NEW
    device: str = "cpu"
    """Device of all programs except reftune, whose recipe sets the device."""


def make_workload(model: Path, questions: list[str], samples: int, *, shorter: int = 1) -> Workload:
    """`samples` prompts with one answer each. The lengths of answers are divided by `shorter`."""
    draw = random.Random(0)
    lengths = [LENGTHS[i % len(LENGTHS)] // shorter for i in range(samples)]
    draw.shuffle(lengths)
    prompts = [questions[i % len(questions)] for i in range(samples)]
    return Workload(
        str(model), prompts, lengths, [float(draw.random() < 0.5) for _ in range(samples)]
    )


def first(workload: Workload, samples: int) -> Workload:
    """A workload of the first `samples` prompts and answers, to warm up on."""
    part = slice(samples)
    return replace(
        workload,
        prompts=workload.prompts[part],
        lengths=workload.lengths[part],
        rewards=workload.rewards[part],
    )


def write_workload(workload: Workload, path: Path) -> None:
    path.write_text(json.dumps(asdict(workload)), encoding="utf-8")


def read_workload(path: str | Path) -> Workload:
    return Workload(**json.loads(Path(path).read_text(encoding="utf-8")))
