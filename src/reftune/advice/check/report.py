"""The result of a check, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from reftune.advice.golds import GoldKind, golds_text
from reftune.runs.sample import solution_text
from reftune.text import counted, printable

Level = Literal["ok", "warn", "fail"]
MAX_LISTED = 5
"""Maximum number of rows named under a finding."""
BOUNDARY_TOKENS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of one check."""

    level: Level
    message: str
    """The result in one line."""
    remedy: str = ""
    """How to fix the problem; empty if there is no problem."""
    rows: tuple[str, ...] = ()
    """Details, such as some of the affected rows, one line each."""
    name: str = ""
    """Name of the check, filled in after the check has run."""
    samples: tuple[dict[str, Any], ...] = ()
    """Solutions shown after the findings."""


def ok(message: str) -> Finding:
    """A finding that reports no problem."""
    return Finding(level="ok", message=message)


def warn(message: str, remedy: str, rows: Sequence[str] = ()) -> Finding:
    """A finding about a problem that does not prevent the run."""
    return Finding(level="warn", message=message, remedy=remedy, rows=tuple(rows[:MAX_LISTED]))


def fail(message: str, remedy: str, rows: Sequence[str] = ()) -> Finding:
    """A finding about a problem that would make the run worthless."""
    return Finding(level="fail", message=message, remedy=remedy, rows=tuple(rows[:MAX_LISTED]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """One training row as the model sees it."""

    id: str
    prompt: str
    target: str
    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    prompt_tokens: tuple[str, ...]
    target_tokens: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckReport:
    """All findings on a recipe."""

    recipe: str
    findings: tuple[Finding, ...]
    golds: tuple[GoldKind, ...]
    """The kinds of gold answer in the data, with examples."""
    preview: Preview | None = None
    method: str = "base"
    """The method whose samples are shown; see `Subject.method`."""
    samples: tuple[dict[str, Any], ...] = ()

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "fail"]

    def to_json(self) -> str:
        document = {**asdict(self), "ok": not self.failed}
        for finding in document["findings"]:
            del finding["samples"]
        return json.dumps(document, indent=2, ensure_ascii=False)

    def to_text(self) -> str:
        parts = [
            "\n".join(_finding_text(finding) for finding in self.findings),
            golds_text(self.golds),
            "" if self.preview is None else _preview_text(self.preview),
            *(f"--- sampled by {self.method} ---\n{solution_text(row)}" for row in self.samples),
        ]
        return "\n\n".join(filter(None, parts))


def _finding_text(finding: Finding) -> str:
    lines = [f"{finding.level:<4}  {finding.name:<15}  {finding.message}"]
    lines += [f"      {'':<15}    {row}" for row in finding.rows]
    if finding.remedy:
        lines.append(f"      {'':<15}  → {finding.remedy}")
    return printable("\n".join(lines))


def _preview_text(preview: Preview) -> str:
    before = " ".join(repr(piece) for piece in preview.prompt_tokens[-BOUNDARY_TOKENS:])
    after = " ".join(repr(piece) for piece in preview.target_tokens[:BOUNDARY_TOKENS])
    sizes = counted(len(preview.prompt_tokens), "prompt token")
    if preview.target_tokens:
        sizes += f", {counted(len(preview.target_tokens), 'target token')}"
    return printable(
        f"--- {preview.id}: {sizes}; ┃ marks where the model continues"
        f" ---\n{preview.prompt}┃{preview.target}\n\n… {before} ┃ {after + ' …' * bool(after)}\n"
        f"{' '.join(map(str, preview.prompt_ids))} ┃ {' '.join(map(str, preview.target_ids))}"
    )
