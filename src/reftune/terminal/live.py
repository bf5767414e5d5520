"""Shows a run in progress on stderr: live on a terminal, as plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from reftune.stages.stage import Progress
from reftune.text import clock, printable
from reftune.types import Solution, Verdict

SHOWN = (
    ("loss/sft", "loss", ".3f"),
    ("reward/mean", "reward", ".2f"),
    ("reward/correct", "correct", ".0%"),
    ("dev/accuracy", "dev", ".1%"),
    ("kl/reference", "KL", ".2f"),
    ("policy/entropy", "entropy", ".2f"),
    ("value/explained_variance", "value EV", ".2f"),
    ("response/length", "length", ".0f"),
    ("response/truncated", "truncated", ".0%"),
)
"""Metric, label and number format, in the order in which the numbers are shown. Metrics that a
stage does not log are left out."""

LINE_EVERY_S = 5.0
TOKEN_COUNTS = ("compute/train_tokens", "compute/sampled_tokens")
MAX_SAMPLE_LINES = 14
MAX_SAMPLE_CHARACTERS = 1200


def make_progress(*, quiet: bool = False, time_s: Callable[[], float] = time.monotonic) -> Progress:
    """A view of the run's progress: live if stderr is a terminal that supports this, and plain
    lines if not. With `quiet`, the view shows nothing."""
    if quiet:
        return Progress()
    console = Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return RichProgress(console, time_s=time_s)
    return LineProgress(time_s=time_s)


@dataclass(slots=True)
class StageView:
    """The state of the running stage."""

    name: str
    total_steps: int
    first_step: int
    started_s: float
    step: int
    numbers: dict[str, float] = field(default_factory=dict)
    """The latest value of every metric."""
    dev_step: int = 0
    """The step at which dev accuracy was last measured."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Phase of a step (`generate`, `update`, …) → total seconds that the phase took in all recorded
    steps except the first."""
    num_tokens: float = 0.0
    """Number of tokens trained on and sampled in the steps that `phase_seconds` covers."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step. An evaluation at the same step adds its own metrics."""
        grown = [
            metrics[name] - self.numbers[name]
            for name in TOKEN_COUNTS
            if name in metrics and name in self.numbers
        ]
        if grown:
            self.num_tokens += sum(grown)
            sums = dict(self.phase_seconds)  # a copy, because another thread may read the old one
            for name, seconds in metrics.items():
                if name.startswith("time/"):
                    phase = name.removeprefix("time/").removesuffix("_s")
                    sums[phase] = sums.get(phase, 0.0) + seconds
            self.phase_seconds = sums
        if "dev/accuracy" in metrics:
            self.dev_step = step
        self.step = step
        self.numbers.update(metrics)

    def position(self, now_s: float) -> str:
        """The stage's position and time: `40/150  0:31, 1:02 left`."""
        elapsed_s = now_s - self.started_s
        done, left = self.step - self.first_step, self.total_steps - self.step
        eta = f", {clock(elapsed_s / done * left)} left" if done > 0 and left > 0 else ""
        return f"{self.step}/{self.total_steps}  {clock(elapsed_s)}{eta}"

    def line(self, now_s: float) -> str:
        return "  ".join([self.name, self.position(now_s), *self.facts()])

    def facts(self) -> list[str]:
        """The latest numbers: `reward 0.62`, `correct 61%`, …, `1,234 tok/s`."""
        facts = [
            f"{label} {self.numbers[name]:{style}}" + self._origin(name)
            for name, label, style in SHOWN
            if name in self.numbers
        ]
        seconds = sum(self.phase_seconds.values())
        return [*facts, f"{self.num_tokens / seconds:,.0f} tok/s"] if seconds > 0 else facts

    def _origin(self, name: str) -> str:
        """The step of a dev accuracy that was measured before the current step: ` at step 20`."""
        is_old = name == "dev/accuracy" and self.dev_step != self.step
        return f" at step {self.dev_step}" if is_old else ""

    def split(self) -> list[str]:
        """Each phase's share of the steps' time, largest first: `update 71%`, `generate 22%`, …"""
        seconds = sum(self.phase_seconds.values())
        if seconds == 0 or len(self.phase_seconds) < 2:
            return []
        phases = sorted(self.phase_seconds.items(), key=lambda item: -item[1])
        return [f"{name} {value / seconds:.0%}" for name, value in phases]


class LineProgress(Progress):
    """Prints a plain line every `LINE_EVERY_S` seconds, and a last line at the end of each
    stage."""

    def __init__(
        self, stream: TextIO | None = None, *, time_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream, self._time_s = stream, time_s
        self._view: StageView | None = None
        self._last_s = float("-inf")
        self._pending = False

    def stage(self, name: str, total_steps: int, done_steps: int = 0) -> None:
        self.close()
        self._view = StageView(name, total_steps, done_steps, self._time_s(), done_steps)
        self._last_s = float("-inf")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        assert self._view is not None, "step before stage"
        self._view.update(step, metrics)
        self._pending = True
        if self._time_s() - self._last_s >= LINE_EVERY_S:
            self._print_view()

    def note(self, message: str) -> None:
        self.close()  # the note may be about a later event than the steps not yet shown
        self._write(printable(message))

    def close(self) -> None:
        if self._pending:
            self._print_view()

    def _print_view(self) -> None:
        assert self._view is not None
        self._last_s, self._pending = self._time_s(), False
        self._write(self._view.line(self._last_s))

    def _write(self, line: str) -> None:
        target = self._stream or sys.stderr  # the current stderr, which may have been replaced
        target.write(f"{line}\n")
        target.flush()


class RichProgress(Progress):
    """The live view: a bar, numbers, each phase's share of the time and a recently sampled
    solution. When a stage ends, or when its dev accuracy levels off, the view prints a line that
    stays on the screen."""

    def __init__(self, console: Console, *, time_s: Callable[[], float] = time.monotonic) -> None:
        self._console, self._time_s = console, time_s
        self._view: StageView | None = None
        self._sample: Solution | None = None
        self._live = Live(
            get_renderable=self.render, console=console, refresh_per_second=4, transient=True
        )

    def stage(self, name: str, total_steps: int, done_steps: int = 0) -> None:
        self._leave_line()
        self._view = StageView(name, total_steps, done_steps, self._time_s(), done_steps)
        self._sample = None
        self._live.start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        assert self._view is not None, "step before stage"
        self._view.update(step, metrics)

    def solutions(self, step: int, solutions: Sequence[Solution]) -> None:
        """Show the first of `solutions` until the next call."""
        self._sample = solutions[0]

    def note(self, message: str) -> None:
        self._console.print(printable(message), markup=False, highlight=False)

    def close(self) -> None:
        self._live.stop()
        self._leave_line()

    def render(self) -> RenderableType:
        view, last_sample = self._view, self._sample  # read once: another thread may end the stage
        if view is None:
            return Text("")
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(view.name, style="bold"),
            ProgressBar(total=view.total_steps, completed=view.step, width=40),
            Text(view.position(self._time_s())),
        )
        lines = [Text("   ".join(view.facts())), Text("   ".join(view.split()), style="dim")]
        sample = [] if last_sample is None else [sample_panel(last_sample)]
        return Group(head, *(Padding(line, (0, 0, 0, 2)) for line in lines if line.plain), *sample)

    def _leave_line(self) -> None:
        if self._view is not None:
            self._console.print(self._view.line(self._time_s()), markup=False, highlight=False)
            self._view = None


def sample_panel(solution: Solution) -> RenderableType:
    """A solution with its question, verdict and reason, shortened to fit on a screen. Any markup in
    these texts is shown as text."""
    colour = "green" if solution.graded.verdict is Verdict.CORRECT else "red"
    text = printable(solution.completion.text)[:MAX_SAMPLE_CHARACTERS]
    lines = text.splitlines()
    if len(lines) > MAX_SAMPLE_LINES:
        lines = [*lines[:MAX_SAMPLE_LINES], "…"]
    question = printable(solution.problem.question)[:MAX_SAMPLE_CHARACTERS]
    return Panel(
        Group(Text(question, style="dim"), Text("\n".join(lines))),
        title=Text(f"{solution.graded.verdict.value}, reward {solution.reward:g}", style=colour),
        subtitle=Text(printable(solution.graded.reason), style="dim"),
        title_align="left",
        subtitle_align="left",
        border_style=colour,
    )
