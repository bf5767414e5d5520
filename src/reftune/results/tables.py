"""The final evaluation as a table: text, Markdown, LaTeX or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from reftune.errors import DataError
from reftune.results.metrics import HACKING
from reftune.results.summary import (
    GREEDY,
    MethodScore,
    Score,
    ScoreTable,
    comparison_json,
    display,
    p_text,
    points,
)

Row = list[str]

NOT_SIGNIFICANT = "n.s."


def rows(table: ScoreTable) -> tuple[Row, list[Row]]:
    """Head and body: one row per method, with its score under each rule and its gain over the
    baseline."""
    rules = list(dict.fromkeys(rule for method in table.methods for rule in method.scores))
    names = ["Greedy" if rule == GREEDY else rule for rule in rules]
    head = ["Method", *names, f"vs {display(table.baseline)}", "Test", "Dev", "Looks"]
    body = [
        [
            display(method.label),
            *(_score_cell(method.scores.get(rule)) for rule in rules),
            *_gain_cells(method, table),
            _share_cell(method.dev_accuracy),
            "–" if method.looks is None else str(method.looks),
        ]
        for method in table.methods
    ]
    return head, body


def _score_cell(score: Score | None) -> str:
    if score is None:
        return "–"
    low, high = score.ci95
    return f"{100 * score.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _gain_cells(method: MethodScore, table: ScoreTable) -> Row:
    against = table.between(method.label, table.baseline)
    if against is None:
        return ["–", ""]
    low, high = against.ci95
    evidence = "" if against.p_mcnemar is None else p_text(against.p_mcnemar)
    doubt = NOT_SIGNIFICANT if not against.significant else "" if evidence else "sig."
    gain = f"{points(against.difference)} [{points(low)}, {points(high)}]"
    return [gain, " ".join(part for part in (evidence, doubt) if part)]


def caption(table: ScoreTable) -> str:
    """What the numbers are, in one line."""
    n = table.methods[0].greedy.n if table.methods else 0
    seeds = f", mean over {table.num_seeds} seeds" if table.num_seeds > 1 else ""
    interval = "bootstrap over seeds and problems" if table.num_seeds > 1 else "Wilson"
    test = (
        "its interval holds 0"
        if table.num_seeds > 1
        else "exact McNemar p ≥ 0.05, not corrected for several comparisons"
    )
    return (
        f"Accuracy in percent on {n:,} {table.split} problems{seeds}, 95 % interval ({interval}); "
        f"differences paired by problem, bootstrap; {NOT_SIGNIFICANT}: {test}."
    )


# --- formats --------------------------------------------------------------------------------------


def render_table(table: ScoreTable, fmt: str) -> str:
    """The table as `text`, `markdown`, `latex` or `json`, which rounds nothing. Raises: DataError
    for an unknown format."""
    if fmt != "json":
        return grid(*rows(table), fmt, note=caption(table))
    methods = {
        method.label: {
            "group": method.group.label,
            "method": method.method,
            "scores": {rule: score.to_row() for rule, score in method.scores.items()},
            "dev_accuracy": method.dev_accuracy,
            "looks": method.looks,
        }
        for method in table.methods
    }
    document = {
        "split": table.split,
        "seeds": table.num_seeds,
        "baseline": table.baseline,
        "methods": methods,
        "comparisons": [comparison_json(comparison) for comparison in table.comparisons],
    }
    return json.dumps(document, indent=2)


def grid(head: Row, body: Sequence[Row], fmt: str, *, title: str = "", note: str) -> str:
    """Any table as `text`, `markdown` or `latex`. Raises: DataError for an unknown format."""
    if fmt == "text":
        return "\n".join([*filter(None, [title]), *_aligned(head, body), "", note])
    if fmt == "markdown":
        above = f"**{title}**\n\n" if title else ""
        ruler = ["---", *["---:"] * (len(head) - 1)]
        return above + "\n".join([*map(_markdown_line, [head, ruler, *body]), "", note])
    if fmt == "latex":
        return _latex_float(head, body, f"{title}. {note}" if title else note)
    raise DataError(f"{fmt}: unknown table format; expected one of text, markdown, latex, json")


def _aligned(head: Row, body: Sequence[Row]) -> list[str]:
    """Head, ruler and body as lines, numbers to the right."""
    widths = [max(len(row[column]) for row in [head, *body]) for column in range(len(head))]

    def line(row: Row) -> str:
        first, *others = (
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return [line(head), "  ".join("─" * width for width in widths), *map(line, body)]


def choices_table(summary: Mapping[str, Any]) -> str:
    """The signs of reward hacking in a run's summary; empty if it has no multiple choice."""
    found = {
        name: scores["choices"]
        for name, scores in summary["methods"].items()
        if "choices" in scores
    }
    if not found:
        return ""
    counts = sorted({count for signs in found.values() for count in signs["by_options"]}, key=int)
    head = [
        "Multiple choice",
        *(metric.title for metric in HACKING),
        *(f"Above chance, {count} options" for count in counts),
    ]
    body = [
        [
            display(name),
            *(_share_cell(signs.get(metric.key.removeprefix("choices/"))) for metric in HACKING),
            *(
                _share_cell(signs["by_options"].get(count, {}).get("above_chance"))
                for count in counts
            ),
        ]
        for name, signs in found.items()
    ]
    return "\n".join(_aligned(head, body))


def _share_cell(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _markdown_line(row: Row) -> str:
    cells = [cell.replace("|", r"\|") for cell in row]
    return f"| {' | '.join(cells)} |"


def _latex_float(head: Row, body: Sequence[Row], note: str) -> str:
    """A booktabs tabular in a table float."""
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            r"\toprule",
            _latex_line(head),
            r"\midrule",
            *map(_latex_line, body),
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{_latex(note)}}}",
            r"\end{table}",
        ]
    )


def _latex_line(row: Row) -> str:
    return " & ".join(map(_latex, row)) + r" \\"


_LATEX = {
    "\\": r"\textbackslash{}",
    "−": "$-$",
    "±": r"$\pm$",
    "–": "--",
    "≥": r"$\geq$",
    "<": "$<$",
    ">": "$>$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
