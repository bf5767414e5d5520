"""Whether a warm-up was finished when RL started from it: more SFT, or RL?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reftune.results.records import RunResults, StageResults


@dataclass(frozen=True, kw_only=True, slots=True)
class Handover:
    """The point where a stage that samples took over, and how dev had risen until then."""

    stage: str
    init: str
    rise: float
    """Change in dev accuracy over the four looks before, share of problems."""
    margin: float
    """Half the width of its paired 95 % interval."""

    @property
    def is_ready(self) -> bool:
        """Whether dev had stopped rising, within its margin."""
        return self.rise <= self.margin

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Handover:
        """What `to_row` wrote."""
        return cls(**{key: row[key] for key in ("stage", "init", "rise", "margin")})

    def to_row(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "init": self.init,
            "rise": self.rise,
            "margin": self.margin,
            "ready": self.is_ready,
        }


def handovers(run: RunResults) -> list[Handover]:
    """One for each stage that samples and starts from a supervised method with logged looks."""
    return [
        Handover(stage=name, init=stage.init, rise=found[0], margin=found[1])
        for name, stage in run.stages.items()
        if _samples(stage) and (found := last_rise(run, stage.init)) is not None
    ]


def last_rise(run: RunResults, method: str) -> tuple[float, float] | None:
    """How dev had risen over the last four looks at a supervised method, and the margin; None for
    other methods, and with fewer looks."""
    source = _source(run, method)
    if source is None or _samples(source[0]):
        return None
    supervised, step = source
    looks = [row.values for row in supervised.metrics if row.step <= step]
    last: Mapping[str, float] = next((v for v in reversed(looks) if "dev/rise" in v), {})
    return (last["dev/rise"], last["dev/rise_margin"]) if last else None


def rise_line(rise: float, margin: float, num_looks: int) -> str:
    """Whether RL or more SFT comes next, by how dev rose over the last looks."""
    points = f"{100 * rise:+.1f} ± {100 * margin:.1f} points over {num_looks} looks"
    if rise <= margin:
        return f"dev no longer rises ({points}): RL can take over"
    return (
        f"dev still rises {100 * rise / num_looks:.1f} points a look ({points}): SFT will teach"
        " more than RL"
    )


def sentence(handover: Handover) -> str:
    """Whether to train on, in one line of text."""
    rise = f"{100 * handover.rise:+.1f} ± {100 * handover.margin:.1f} points over four looks"
    if handover.is_ready:
        return f"{handover.init} was finished when {handover.stage} began: dev {rise}"
    return (
        f"{handover.init} was not finished when {handover.stage} began: dev still rose, {rise};"
        " more SFT may teach more than RL"
    )


def _source(run: RunResults, method: str) -> tuple[StageResults, int] | None:
    """The stage whose training made `method`, and the step it was left at."""
    found = run.stages.get(method)
    if found is None or "chosen_step" not in found.info:
        return None
    parent = found.info.get("snapshot_of")
    return run.stages[parent] if parent else found, int(found.info["chosen_step"])


def _samples(stage: StageResults) -> bool:
    return any("reward/mean" in row.values for row in stage.metrics)
