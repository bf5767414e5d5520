"""Turns run folders into tables, figures and an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from reftune.results import paper
from reftune.results.page.figures import write_figures
from reftune.results.page.html import write_report
from reftune.results.records import read_run, read_runs
from reftune.results.summary import comparable_groups, read_groups, score_table, summarize
from reftune.results.tables import choices_table, remarks, render_table
from reftune.storage.run_folder import RunFolder

__all__ = [
    "choices_table",
    "read_groups",
    "read_run",
    "remarks",
    "report_command",
    "summarize",
    "table_command",
    "write_figures",
    "write_report",
]


def report_command(run_dirs: Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Write the HTML page of `reftune report RUN…` to `out` or, by default, to `report.html` in the
    first run's folder. Runs may be unfinished. Returns: the page's path. Raises: DataError if a run
    is missing or damaged, or if runs are not comparable; CheckpointError if the page cannot be
    written."""
    path = Path(out or RunFolder(Path(run_dirs[0])).report)
    write_report(read_groups(run_dirs, finished=False), path)
    return path


def table_command(
    run_dirs: Sequence[Path | str],
    fmt: str = "text",
    *,
    layout: Literal["auto", "methods", "paper"] = "auto",
    k: int | None = None,
    finished: bool = True,
) -> str:
    """The output of `reftune table RUN…`: the results of the final evaluation, formatted as `text`,
    `markdown`, `latex` or `json`.

    In the `methods` layout, one table compares all methods on the same problems. The `paper` layout
    follows the paper's tables. `auto` chooses `paper` if the runs differ in task or kind of
    rationale, and `methods` if not. Votes use the first `k` samples of each problem, or all samples
    if `k` is None. With `finished`, unfinished runs are refused. Raises: DataError if a run is
    missing, damaged or refused, if runs are not comparable, if there are fewer than `k` samples per
    problem, or if `fmt` is unknown.
    """
    runs = read_runs(run_dirs, finished=finished)
    if layout == "paper" or (layout == "auto" and paper.is_several_tasks(runs)):
        return paper.render(paper.cells(runs, k=k), fmt)
    return render_table(score_table(comparable_groups(runs), k=k), fmt)
