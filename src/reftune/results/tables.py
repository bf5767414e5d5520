"""Describes the final evaluation in sentences, and as a table in text, Markdown, LaTeX or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reftune.errors import DataError
from reftune.results.metrics import HACKING
from reftune.results.records import RunResults
from reftune.results.stats import Comparison
from reftune.results.summary import (
    GREEDY,
    Handover,
    MethodScore,
    Reranker,
    Score,
    ScoreTable,
    handovers,
    leader,
    rerankers,
)
from reftune.stages.plateau import LOOKS, NEEDED_ACCURACY, Rise

Row = list[str]

NOT_SIGNIFICANT = "n.s."
NEEDED = (
    f"RL needs about {NEEDED_ACCURACY:.0%} correct on dev; train the warm-up longer, add questions"
    " with rationales, or start from a pretrained model"
)


# --- sentences ------------------------------------------------------------------------------------


_LABELS = {
    "base": "Base model",
    "warmup": "Warm-up",
    "sft": "SFT",
    "offline_st": "Offline self-training",
    "online_st": "Online self-training",
    "reft": "ReFT",
    "reft_modern": "ReFT modern",
    "reft_tuned": "ReFT tuned",
    "reft_tuned_2_updates": "ReFT tuned, two updates",
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "rloo": "RLOO",
    "reward_model": "Reward model",
}


def display(label: str) -> str:
    """A label in the form that readers see. Any group or decision rule in the label is kept:
    `run/reft maj@8` → `run: ReFT maj@8`."""
    group, _, method = label.rpartition("/")
    name, _, rule = method.partition(" ")
    words = " ".join(part for part in (_LABELS.get(name, name.replace("_", " ")), rule) if part)
    return f"{group}: {words}" if group else words


def percent(share: float) -> str:
    """A share in percent, such as `62.4%`."""
    return f"{100 * share:.1f}%"


def points(difference: float) -> str:
    """A difference in percentage points, with a plus sign or a true minus sign: `+0.8`, `−1.5`."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def problems(number: int, split: str = "") -> str:
    """A number of problems, such as `1 dev problem` or `1,000 problems`."""
    return f"{number:,} {split} problem{'s' * (number != 1)}".replace("  ", " ")


def p_text(p: float) -> str:
    """A p-value as text: `p = 0.031` or `p < 0.001`. A value that rounds to 0.050 is
    shown with five decimals, so that readers see on which side of 0.05 it is."""
    text = f"{p:.3f}"
    return "p < 0.001" if p < 0.001 else f"p = {text if text != '0.050' else f'{p:.5f}'}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Headline:
    """The main result in sentences."""

    title: str
    text: str
    chosen: str
    """A sentence on how the models were chosen: on which split, and from how many evaluations."""


def headline(table: ScoreTable) -> Headline:
    """Compares the best method with the baseline, and states the evidence and the runner-up."""
    if not table.methods:
        text = "The final evaluation of a method comes after its stage."
        return Headline(title="Nothing evaluated yet", text=text, chosen="")
    best, base, chosen = leader(table), table.method(table.baseline), _chosen_sentence(table)
    against = None if best is None else table.between(best.label, base.label)
    base_solves = f"{display(base.label)} solves {percent(base.greedy.accuracy)}"
    if best is None or against is None:
        return Headline(title=base_solves, text=f"{_solves(base, table)}.", chosen=chosen)
    (low, high), p = against.ci95, against.p_value
    text = (
        f"{_solves(best, table)}, and {base_solves} (95% interval of the difference {points(low)}"
        f" to {points(high)} points{'' if p is None else f'; {p_text(p)}'})."
    )
    text += _runner_up(best, base, table)
    return Headline(title=_title(against), text=text, chosen=chosen)


def _title(against: Comparison) -> str:
    a, b = display(against.a), display(against.b)
    if not against.significant:
        return f"{a} and {b} are too close to call"
    outcome = f"{a} beats {b}" if against.difference > 0 else f"{b} stays ahead of {a}"
    return f"{outcome} by {abs(100 * against.difference):.1f} points"


def _solves(method: MethodScore, table: ScoreTable) -> str:
    seeds = f", on average over {table.num_seeds} seeds," if table.num_seeds > 1 else ""
    return (
        f"{display(method.label)}{seeds} solves {percent(method.greedy.accuracy)} of"
        f" {problems(method.greedy.n, table.split)}"
    )


def _runner_up(best: MethodScore, base: MethodScore, table: ScoreTable) -> str:
    seen = {best.label, base.label} | table.starts
    others = [m for m in table.methods if m.group is best.group and m.label not in seen]
    other = max(others, key=lambda method: method.greedy.accuracy, default=None)
    if other is None:
        return ""
    against = table.between(best.label, other.label)
    doubt = "" if against is None or against.significant else ", not significantly lower"
    return f" Next is {display(other.label)} with {percent(other.greedy.accuracy)}{doubt}."


def _chosen_sentence(table: ScoreTable) -> str:
    looks = [
        f"{display(m.label)} {m.looks}"
        for m in table.methods
        if m.looks is not None and not m.stage.info.get("snapshot_of")
    ]
    if not looks:
        return ""
    apart = f"; {table.split} problems played no part in this choice"
    scored = apart if table.split != "dev" else ", so these dev accuracies tend to be too high"
    return f"Models were chosen by dev accuracy (dev evaluations: {', '.join(looks)}){scored}."


def rise_line(rise: Rise, accuracy: float) -> str:
    """A line that states whether RL or more SFT should follow. `accuracy` is the dev accuracy after
    the rise."""
    text = _rise_text(rise)
    if rise.is_beyond_chance:
        return (
            f"dev accuracy is still rising by {100 * rise.value / LOOKS:.1f} points per evaluation"
            f" ({text}): more SFT may teach more than RL"
        )
    if accuracy < NEEDED_ACCURACY:
        return f"dev accuracy is not rising, at {percent(accuracy)} ({text}): {NEEDED}"
    if rise.is_uncertain:
        return f"dev has too few problems to tell whether dev accuracy is still rising ({text})"
    return f"dev accuracy is no longer rising ({text}): RL can take over"


def _rise_text(rise: Rise) -> str:
    return f"{points(rise.value)} ± {100 * rise.margin:.1f} points over {LOOKS} evaluations"


def remarks(run: RunResults) -> list[str]:
    """Remarks on three points: whether dev accuracy had levelled off before each RL stage, which
    methods ended with the same model, and whether each reward model is better than chance at
    picking correct samples."""
    rankings = map(reranker_sentence, rerankers(run))
    return [*map(sentence, handovers(run)), *same_models(run), *rankings]


def same_models(run: RunResults) -> list[str]:
    """A sentence about each evaluated method that shares its model with another method."""
    lines = []
    for name in run.evals:
        stage = run.stage(name)
        if stage.chosen_step == 0:
            lines.append(f"{name} never beat {stage.init} on dev, so they are the same model")
        if whole := run.whole_of(stage):
            lines.append(
                f"{whole.name} was best on dev when {name} was saved: they are the same model"
            )
    return lines


def sentence(handover: Handover) -> str:
    """A line that states whether the warm-up was finished when the RL stage began."""
    init, began = handover.init, f"when {handover.stage} began"
    rise, accuracy = _rise_text(handover.rise), handover.accuracy
    if handover.rise.is_beyond_chance:
        return (
            f"{init} was not finished {began}: dev accuracy was still rising ({rise}); more SFT"
            " may teach more than RL"
        )
    if accuracy < NEEDED_ACCURACY:
        return f"{init} was flat at {percent(accuracy)} on dev {began} ({rise}): {NEEDED}"
    if handover.rise.is_uncertain:
        return f"dev has too few problems to tell whether {init} was finished {began} ({rise})"
    return f"{init} was finished {began}: dev accuracy had changed by {rise}"


def reranker_sentence(found: Reranker) -> str:
    """A line that states whether a reward model beats a random choice among the samples of a dev
    problem."""
    gain = f"{points(found.accuracy - found.chance)} ± {100 * found.margin:.1f} points"
    verdict = "better" if found.beats_chance else "no better"
    advice = "" if found.beats_chance else "; do not rerank with it"
    return (
        f"{found.stage}'s choice among {found.num_samples} samples is {verdict} than a random one"
        f" on dev: {percent(found.accuracy)} against {percent(found.chance)}, {gain}{advice}"
    )


# --- the table ------------------------------------------------------------------------------------


def rows(table: ScoreTable) -> tuple[Row, list[Row]]:
    """The table's header row, and one row per method. A row contains the method's score under each
    decision rule, its gain over the baseline, its dev accuracy and its number of dev
    evaluations."""
    rules = list(dict.fromkeys(rule for method in table.methods for rule in method.scores))
    names = ["Greedy" if rule == GREEDY else rule for rule in rules]
    head = ["Method", *names, f"vs {display(table.baseline)}", "Paired test", "Dev", "Dev evals"]
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
    return f"{100 * score.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _gain_cells(method: MethodScore, table: ScoreTable) -> Row:
    against = table.between(method.label, table.baseline)
    if against is None:
        return ["–", ""]
    low, high = against.ci95
    evidence = "" if against.p_value is None else p_text(against.p_value)
    doubt = NOT_SIGNIFICANT if not against.significant else "" if evidence else "sig."
    gain = f"{points(against.difference)} [{points(low)}, {points(high)}]"
    return [gain, " ".join(part for part in (evidence, doubt) if part)]


def caption(table: ScoreTable) -> str:
    """A caption that explains the table's numbers."""
    sizes = [solved.size for method in table.methods[:1] for solved in method.outcomes[GREEDY]]
    low, high = min(sizes, default=0), max(sizes, default=0)
    n = "" if low == high else f"{low:,}–"
    seeds = f", mean over {table.num_seeds} seeds" if table.num_seeds > 1 else ""
    is_single = table.num_seeds == 1
    interval = "Wilson" if is_single else "Student's t over seeds"
    limits = " With one seed, intervals and tests do not cover chance in training." * is_single
    apart = "; ".join(f"{name} {', '.join(map(str, n))}" for name, n in table.seeds_apart.items())
    unpaired = f" Groups with different seeds are not compared (seeds: {apart})." if apart else ""
    return (
        f"Accuracy in percent on {n}{problems(high, table.split)}{seeds}, 95% interval"
        f" ({interval}); differences paired by problem; {NOT_SIGNIFICANT}: the interval contains 0."
        f" Intervals are not corrected for several comparisons.{limits}{unpaired}"
    )


# --- formats --------------------------------------------------------------------------------------


def render_table(table: ScoreTable, fmt: str) -> str:
    """The table as `text`, `markdown`, `latex` or `json`. In JSON, numbers are not rounded. Raises:
    DataError for an unknown format."""
    if fmt != "json":
        return grid(*rows(table), fmt, note=caption(table))
    document = {
        "split": table.split,
        "seeds": table.num_seeds,
        "seeds_apart": table.seeds_apart,
        "baseline": table.baseline,
        "methods": {
            method.label: {
                "group": method.group.label,
                "method": method.method,
                "scores": {rule: asdict(score) for rule, score in method.scores.items()},
                "dev_accuracy": method.dev_accuracy,
                "looks": method.looks,
            }
            for method in table.methods
        },
        "comparisons": [found.to_row() for found in table.comparisons],
    }
    return json.dumps(document, indent=2)


def grid(head: Row, body: Sequence[Row], fmt: str, *, title: str = "", note: str) -> str:
    """Any table as `text`, `markdown` or `latex`. Raises: DataError for an unknown format."""
    if fmt == "text":
        return "\n".join([*filter(None, [title]), *_aligned(head, body), "", note]).rstrip("\n")
    if fmt == "markdown":
        above = f"**{title}**\n\n" if title else ""
        ruler = ["---", *["---:"] * (len(head) - 1)]
        lines = [*map(_markdown_line, [head, ruler, *body]), "", note]
        return above + "\n".join(lines).rstrip("\n")
    if fmt == "latex":
        return _latex_float(head, body, f"{title}. {note}".strip() if title else note)
    raise DataError(f"{fmt}: unknown table format; expected one of text, markdown, latex, json")


def _aligned(head: Row, body: Sequence[Row]) -> list[str]:
    """Head, ruler and body as lines. The first column is aligned on the left, and all other columns
    are aligned on the right."""
    widths = [max(len(row[column]) for row in [head, *body]) for column in range(len(head))]

    def line(row: Row) -> str:
        _, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return "  ".join([row[0].ljust(widths[0]), *others]).rstrip()

    return [line(head), "  ".join("─" * width for width in widths), *map(line, body)]


def choices_table(summary: Mapping[str, Any]) -> str:
    """A table of the warning signs of reward hacking on multiple-choice questions, from a run's
    summary. If the run has no such questions, the result is an empty string."""
    methods = summary["methods"].items()
    found = {name: scores["choices"] for name, scores in methods if "choices" in scores}
    if not found:
        return ""
    counts = sorted({count for signs in found.values() for count in signs["by_options"]}, key=int)
    head = [
        "Multiple choice",
        *(metric.title for metric in HACKING),
        *(f"Above chance, {count} options" for count in counts),
    ]
    body = []
    for name, signs in found.items():
        shares = [signs.get(metric.key.removeprefix("choices/")) for metric in HACKING]
        shares += [signs["by_options"].get(count, {}).get("above_chance") for count in counts]
        body.append([display(name), *map(_share_cell, shares)])
    return "\n".join(_aligned(head, body))


def _share_cell(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _markdown_line(row: Row) -> str:
    cells = [cell.replace("|", r"\|") for cell in row]
    return f"| {' | '.join(cells)} |"


def _latex_float(head: Row, body: Sequence[Row], note: str) -> str:
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
