"""Run folders → tables, figures and one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reftune.report.figures import write_figures
from reftune.report.html import write_report
from reftune.report.summary import read_groups, score_table, summarize
from reftune.report.tables import render_table

__all__ = ["report_command", "summarize", "table_command", "write_figures", "write_report"]


def report_command(run_dirs: Sequence[Path | str], out: Path | str | None = None) -> Path:
    """`reftune report RUN…`: write the page, by default `report.html` in the first run's folder; return where it is.

    Raises: DataError.
    """
    return write_report(run_dirs, out if out is not None else Path(run_dirs[0]) / "report.html")


def table_command(run_dirs: Sequence[Path | str], fmt: str = "text", json: bool = False) -> str:
    """`reftune table RUN…`: the final evaluation as `text`, `markdown`, `latex` or, with `json`, one JSON document.

    Raises: DataError.
    """
    return render_table(score_table(read_groups(run_dirs)), "json" if json else fmt)
