"""Where a run keeps its files. Every file name in a run folder is written here, and only here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`runs/NAME`; docs/design.md says what each file holds."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "env.json"

    @property
    def data(self) -> Path:
        return self.path / "data.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    def stage(self, method: str) -> StageFolder:
        """Folder of a stage, or of a snapshot that a stage leaves behind."""
        return StageFolder(self.path / "stages" / method)

    def evaluation(self, method: str) -> Path:
        return self.path / "eval" / f"{method}.jsonl"

    def choices(self, method: str) -> Path:
        return self.path / "eval" / "choices" / f"{method}.jsonl"

    def trained(self) -> list[str]:
        """Methods whose models are there, by name."""
        return sorted(path.parent.name for path in self.path.glob("stages/*/stage.json"))

    def newest_checkpoint(self) -> Path | None:
        """The last one written in any stage."""
        found = self.path.glob("stages/*/checkpoints/step-*")
        return max(found, key=lambda path: path.stat().st_mtime, default=None)


@dataclass(frozen=True, slots=True)
class StageFolder:
    """`stages/NAME`: the chosen model in Hugging Face format, and beside it"""

    path: Path

    @property
    def info(self) -> Path:
        return self.path / "stage.json"

    @property
    def is_done(self) -> bool:
        """`info` comes last."""
        return self.info.is_file()

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.path.parents[1])

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def drawn(self) -> Path:
        """Samples of the training problems, for self-training and reward models."""
        return self.path / "sampled.jsonl"

    @property
    def drawn_dev(self) -> Path:
        return self.path / "sampled_dev.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The best model on dev so far."""
        return self.checkpoints / "best"

    def nonfinite(self, step: int) -> Path:
        return self.path / f"nonfinite-{step:06d}.json"
