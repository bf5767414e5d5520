"""Repeats the paper's comparison, compares our settings with the authors', and writes two pages.

python benchmarks/reproduce.py 0 --only comparison        # run or resume one recipe with one seed
python benchmarks/reproduce.py 0 1 2 3 4 --publish        # `make reproduce`: all, to docs/
python benchmarks/reproduce.py --page                     # only write the pages again

The pages are docs/results.md and docs/experiments/modern.md. Unless --publish or --page is set, all
tables and pages are written to runs/reproduce.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reftune.results import table_command
from reftune.results.tables import display
from reftune.terminal.cli import main as reftune

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "results.md"
MODERN_PAGE = ROOT / "docs" / "experiments" / "modern.md"
OWN = Path("runs") / "reproduce"
"""Folder of tables and pages that are not published."""
TITLES = {
    "comparison": "Solutions are programs",
    "comparison-nl": "Solutions are in words",
    "reranking": "Reranking by likelihood and classifier",
    "reranking-nl": "Reranking by likelihood and classifier, in words",
    "classifier-nl": "Reranking by the paper's classifier, in words",
    "modern": "All parts of `modern` against the authors' settings",
    "tuned": "Our own PPO against the authors' settings",
}
"""Recipe in recipes/demo → heading of its section."""
WITHOUT_SECTION = ("reranking", "reranking-nl", "classifier-nl", "modern")
"""Recipes without a section on the results page. The recipes that rerank have rows in the table of
findings, and `modern` has its own page."""
RERANKED = {
    "comparison": ("comparison", "reranking"),
    "comparison-nl": ("classifier-nl", "reranking-nl"),
}
"""Comparison → two recipes. The first reranks by the paper's classifier, the second by likelihood
and classifier."""
AGAINST_PAPER = ("modern", "tuned")
"""Recipes in which `reft` uses the authors' settings. In these, the other methods are also compared
with `reft`."""
ABLATION_SEEDS = 3
"""Number of seeds for `modern`, which has eight RL stages."""
TUNED_SEEDS = [str(seed) for seed in range(3, 13)]
"""Seeds for `tuned`, which do not depend on the seeds given for other recipes. Seeds 0 to 2 are
excluded, because the recipe's settings were chosen by dev accuracy on these seeds."""
NOTES = {
    "comparison": (
        "Reranking uses the paper's classifier, trained on 20 samples per question from the "
        "warm-up model. If the classifier chooses from more than 8 samples, its choices get "
        "[worse](experiments/reranking.md), because it overrates some wrong solutions that the "
        "model rarely samples. "
        "[Our reward model](algorithms.md#loss) adds the solution's likelihood to the classifier's "
        "output. In [five other runs](experiments/reranking.md#five-seeds-on-test), reranking "
        "SFT's samples with our reward model beats greedy decoding by 10.5 points [5.1, 15.9] and "
        "voting by 6.1 points [1.4, 10.8]; for ReFT, neither difference is significant.\n\n"
        "After a run of this recipe (or of `modern` or `tuned`, which extend it), reftune may "
        "report that dev accuracy was still rising when ReFT began. During the warm-up, the recipe "
        "evaluates on dev only every five epochs. The [rule behind this report](handover.md) "
        "therefore compares the end of the warm-up (epoch 32) with an evaluation as early as epoch "
        "15. After epoch 32, another 35 epochs of SFT raise test accuracy from 75.4 to 75.8, n.s. "
        "In [other runs](handover.md#what-was-compared), with 600 questions solved by programs, "
        "ReFT beats SFT after a warm-up that reached 75.3 on test (hand-over at epoch 40), but not "
        "after one that reached 64.4 (epoch 20)."
    ),
    "modern": (
        "*ReFT* is PPO with the coefficients and value head of the authors' code. *ReFT modern* "
        "starts the value head at zero and makes eight more changes, most of which come from later "
        "papers. The [last table](#what-each-part-of-modern-contributes) shows what each of the "
        "eight contributes; [another log](critic.md#what-the-parts-of-modern-contribute) explains "
        "their names. Two of the eight changes, decoupled lambda and positive nll, have since been "
        "removed from reftune. *ReFT* and *ReFT modern* sample the same number of solutions."
    ),
    "tuned": (
        "*ReFT* is PPO with the coefficients and value head of the authors' code. *ReFT tuned* "
        "uses smaller rollouts, and makes four passes over each rollout instead of two. It starts "
        "the value head at zero, fits it before PPO starts, gives it less weight in the loss, and "
        "doubles the KL coefficient. *ReFT tuned, two updates* differs from *ReFT tuned* only in "
        "making two passes (updates). The tuned settings were chosen on other seeds. Over "
        "a whole run, each of the three methods samples the same number of solutions."
    ),
    "comparison-nl": (
        "All methods except offline self-training start from the same warm-up: 20 epochs over "
        "3,000 questions, or 60,000 gradient passes, each over one solution. By the end of the "
        "warm-up, dev accuracy has [levelled off](handover.md). SFT, ReFT and online "
        "self-training then take 11,192 to 11,600 more passes. For ReFT and online self-training, "
        "the first 3,000 of these are a supervised [cooldown](handover.md#what-was-compared); the "
        "row *Warm-up* shows the model after this cooldown. Offline self-training starts from the "
        "base model, as in the paper. It takes 54,000 passes, a quarter fewer than the warm-up "
        "and SFT together.\n\n"
        "Voting adds 7.3 points to SFT but none to ReFT, probably because ReFT's samples vary "
        "less. When training started from an [unfinished "
        "warm-up](experiments/handover.md#first-attempts), no method beat SFT.\n\n"
        "In [five other runs](experiments/reranking.md#five-seeds-on-test-in-words), reranking "
        "with our reward model beats greedy decoding by 8.8 points [5.6, 12.0] for SFT. For ReFT, "
        "the gain is not significant, and with this reranking, ReFT is not better than SFT. In the "
        "same runs, reranking with the paper's classifier is worse than greedy decoding, by 11.5 "
        "points [5.9, 17.0] for SFT and by 25.1 points [21.2, 29.1] for ReFT."
    ),
}
"""Recipe → text above its table."""
ONE_SEED = " With one seed, intervals do not cover chance in training, so no finding is decided."
SETTINGS = (
    "In this table, ReFT does not use the authors' settings: it draws four samples per question, "
    "fits the value head before PPO, decays the learning rate, and sets `value_coef: 1.0` and "
    "`kl_coef: 0.02`. With the coefficients and value head of the authors' code, we tested only "
    "*ReFT beats SFT*, and only for programs. This finding holds with those settings, too "
    "([results](#our-own-ppo-against-the-authors-settings))."
)
"""Text below the table of findings."""
OPEN = [
    "**Only one pretrained model** finished RL with more than two seeds: SmolLM2-135M-Instruct. "
    "On generated questions that need one arithmetic step (three seeds), GRPO gains 9.9 points "
    "[3.6, 16.2] over a short warm-up, but further SFT with about as many gradient passes is 12.1 "
    "points [5.7, 18.5] better than GRPO (an unpaired comparison). After a longer warm-up, GRPO "
    "gains 1.7 points [−4.8, 8.1] over that warm-up, n.s. In another experiment (five seeds), "
    "questions need two steps, and half of the training solutions omit the working. There, GRPO "
    "and further SFT start from a model that was trained by a warm-up and then by a longer SFT "
    "stage. GRPO ends 14.6 points [9.4, 19.8] above further SFT "
    "([log](experiments/smollm2-instruct.md)).",
    "**On real data** (SVAMP programs, the same model), ReFT shows no gain if all training "
    "questions have solutions (one seed): after a warm-up whose dev accuracy had [levelled "
    "off](handover.md), ReFT − SFT is −1.3 points [−3.8, +1.2], n.s. ReFT had little to learn "
    "from: after the warm-up, 90% of the solutions that the model sampled for training questions "
    "were already correct. If only 500 of about 2,500 questions have solutions, ReFT shows no "
    "gain either: over three seeds, ReFT − SFT is +1.1 points [−4.3, +6.5], n.s. "
    "([log](experiments/smollm2-svamp.md)).",
    "**With solutions of 66 tokens on average** (generated questions, a model trained from "
    "scratch), the value head explains hardly any of the reward's variance. Over five seeds, "
    "after warm-ups that had levelled off, no RL method differs significantly from another or "
    "from further SFT (for example, RLOO − PPO is +1.1 points [−0.1, 2.4]). We tried four changes "
    "to how PPO fits the value head or computes advantages. We also started samples from prefixes "
    "of the gold solution. None of this made a significant difference "
    "([log](experiments/critic.md)).",
    "**PPO with changes from later papers** (`modern`) shows no gain over PPO, either on the "
    "[demo's questions](experiments/modern.md) (three seeds) or with [longer "
    "solutions](experiments/critic.md#what-the-parts-of-modern-contribute) (five seeds). No "
    "single change shows a gain either.",
    "**Skipping [questions that are solved every "
    "time](experiments/demo-search.md#solved-questions-that-rest)** brought no gain on three "
    "tuning seeds and was not tried on other seeds.",
]
FINDINGS = [
    ("ReFT beats supervised fine-tuning (SFT)", "reft", "sft"),
    ("ReFT beats offline self-training", "reft", "offline_st"),
    ("ReFT beats online self-training", "reft", "online_st"),
    ("Offline self-training beats SFT", "offline_st", "sft"),
    ("Online self-training beats SFT", "online_st", "sft"),
    ("With voting, ReFT beats SFT", "reft maj", "sft maj"),
]
"""Findings of the paper (Tables 2 and 4), each with the better and the worse method. `maj` is a
vote over any number of samples."""


def run_all(recipes: Sequence[str], seeds: Sequence[str], overrides: Sequence[str]) -> None:
    """Run all recipes, seed by seed, so that an interruption leaves complete seeds."""
    for seed in dict.fromkeys([*seeds, *TUNED_SEEDS]):
        for recipe in (recipe for recipe in recipes if seed in seeds_of(recipe, seeds)):
            path, folder = ROOT / "recipes" / "demo" / f"{recipe}.yaml", folder_of(recipe, seed)
            keys = [f"name={folder.name}", f"run_dir={folder}", f"seed={seed}", *overrides]
            call(["run", str(path), *keys])


def seeds_of(recipe: str, seeds: Sequence[str]) -> Sequence[str]:
    """The seeds for which a recipe is run."""
    if recipe == "tuned":
        return TUNED_SEEDS
    return seeds[:ABLATION_SEEDS] if recipe == "modern" else seeds


def folder_of(recipe: str, seed: str) -> Path:
    return Path("runs") / f"{recipe}-seed{seed}"


def write_tables(recipes: Sequence[str], seeds: Sequence[str], results: Path) -> None:
    """Write a JSON file per recipe, with the output of `reftune table --json` and the current
    commit."""
    results.mkdir(parents=True, exist_ok=True)
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    for recipe in recipes:
        folders = [folder_of(recipe, seed) for seed in seeds_of(recipe, seeds)]
        table = {"commit": commit, **json.loads(table_command(folders, "json"))}
        write(results / f"reproduce-{recipe}.json", json.dumps(table, indent=2))


def call(arguments: Sequence[str]) -> None:
    """Call `reftune …`, and exit with its status if that is not 0."""
    try:
        reftune(arguments)
    except SystemExit as end:
        if end.code:
            raise


def write(path: Path, text: str) -> None:
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


# --- the page -------------------------------------------------------------------------------------


def page(tables: Mapping[str, Mapping[str, Any]], *, ours: bool) -> str:
    """The text of the results page. With `ours`, it includes the fixed texts, which describe our
    published results. Everything else depends only on `tables` (recipe → its table)."""
    parts = [
        "# Results\n\n"
        "This page reports which findings of the ReFT paper (arXiv:2401.08967) hold on small "
        "generated tasks. `make reproduce` trains all models, which takes roughly seven hours on "
        "two CPU cores. It then overwrites two pages, this one and [PPO with changes from later "
        "papers](experiments/modern.md), and also their tables in `docs/results/`. "
        "To write to `runs/reproduce` instead, run "
        "`python benchmarks/reproduce.py 0 1 2 3 4`. "
        "Accuracies are in percent. Differences are in percentage points and paired by problem. "
        "Brackets contain 95% confidence intervals over seeds and problems; *n.s.* and *undecided* "
        'both stand for "not significant". Models are chosen on dev and scored once on test. '
        "On a CPU with a different instruction set, such as AVX512 instead of AVX2, the same seed "
        "gives [different accuracies](experiments/demo-search.md#the-demos-seeds). "
        f"[Metrics](metrics.md#results) defines the columns.{limits(*tables.values())}",
        "## Which of the paper's findings hold here\n\n" + findings_table(tables),
    ]
    if ours:
        parts.append(SETTINGS)
        parts.append("Limits and negative results:\n\n" + "\n".join(f"- {line}" for line in OPEN))
    for recipe, table in tables.items():
        if recipe not in WITHOUT_SECTION:
            parts += [f"## {TITLES[recipe]}", *section(recipe, table, ours=ours)]
    return "\n\n".join(parts) + "\n"


def modern_page(table: Mapping[str, Any], *, ours: bool) -> str:
    """The text of the page on `modern`. With `ours`, it includes the fixed text, which describes
    our published results."""
    parts = [
        f"# {TITLES['modern']}",
        "Accuracies are in percent. Differences are in percentage points and paired by problem. "
        "Brackets contain 95% confidence intervals over seeds and problems, and n.s. means not "
        f"significant.{limits(table)}",
        *section("modern", table, ours=ours),
        "## What each part of `modern` contributes",
        "A positive difference means that the part helps.",
        ablation_table(table),
    ]
    return "\n\n".join(parts) + "\n"


def limits(*tables: Mapping[str, Any]) -> str:
    """`ONE_SEED` if one of the tables has only one seed, else nothing."""
    return ONE_SEED if any(table["seeds"] == 1 for table in tables) else ""


def section(recipe: str, table: Mapping[str, Any], *, ours: bool) -> list[str]:
    """The paragraphs of a recipe's section: with `ours`, its fixed text (if it has one); then a
    line that names the runs of its table, and the table."""
    measured = (
        f"Over {table['seeds']} seed{'s' * (table['seeds'] != 1)} of"
        f" `recipes/demo/{recipe}.yaml` at commit {table['commit']}:"
    )
    rivals = [table["baseline"], *["reft"] * (recipe in AGAINST_PAPER)]
    notes = [NOTES[recipe]] if ours and recipe in NOTES else []
    return [*notes, measured, methods_table(table, rivals)]


def findings_table(tables: Mapping[str, Mapping[str, Any]]) -> str:
    recipes = [recipe for recipe in ("comparison", "comparison-nl") if recipe in tables]
    lines = [
        f"| {claim} | "
        + " | ".join(judged(tables[recipe], better, worse) for recipe in recipes)
        + " |"
        for claim, better, worse in FINDINGS
    ]
    for number, ranker in enumerate(("the paper's classifier", "likelihood and classifier")):
        ranked = [tables.get(RERANKED[recipe][number]) for recipe in recipes]
        cells = [judged(table, "reft rerank", "sft rerank") for table in ranked]
        lines.append(f"| With reranking by {ranker}, ReFT beats SFT | {' | '.join(cells)} |")
    head = (
        "| the paper's finding | " + " | ".join(TITLES[recipe].lower() for recipe in recipes) + " |"
    )
    return "\n".join([head, "|---" * (len(recipes) + 1) + "|", *lines])


def difference(table: Mapping[str, Any], a: str, b: str) -> Mapping[str, Any] | None:
    """The comparison `a` minus `b`. If the table has only `b` minus `a`, this is reversed. None if
    the table has neither."""
    found: Mapping[str, Any]
    for found in table["comparisons"]:
        pair = found["a"].partition("@")[0], found["b"].partition("@")[0]
        if pair == (a, b):
            return found
        if pair == (b, a):
            low, high = found["ci95"]
            return {
                **found,
                "difference": 0.0 - found["difference"],
                "ci95": [0.0 - high, 0.0 - low],
            }
    return None


def judged(table: Mapping[str, Any] | None, better: str, worse: str) -> str:
    found = table and difference(table, better, worse)
    if not (table and found):
        return "not run"
    verdict = (
        "one seed"
        if table["seeds"] == 1
        else "undecided"
        if not found["significant"]
        else "holds"
        if found["difference"] > 0
        else "the opposite holds"
    )
    return f"{verdict}: {points(found)}"


def points(found: Mapping[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{100 * found['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]".replace(
        "-", "−"
    )


def methods_table(table: Mapping[str, Any], rivals: Sequence[str]) -> str:
    rules = list(
        dict.fromkeys(rule for method in table["methods"].values() for rule in method["scores"])
    )
    lines = []
    for name, method in table["methods"].items():
        if name.startswith("no_"):
            continue
        cells = [accuracy(method["scores"].get(rule)) for rule in rules]
        cells += [points_or_dash(difference(table, name, rival)) for rival in rivals]
        lines.append(f"| {display(name)} | " + " | ".join(cells) + " |")
    columns = [*rules, *(f"greedy vs {display(rival)}" for rival in rivals)]
    head = "| method | " + " | ".join(columns) + " |"
    return "\n".join([head, "|---" + "|---:" * len(columns) + "|", *lines])


def accuracy(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "–"
    low, high = score["ci95"]
    return f"{100 * score['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def ablation_table(table: Mapping[str, Any]) -> str:
    parts = [name for name in table["methods"] if name.startswith("no_")]
    found = {name: difference(table, "reft_modern", name) for name in parts}
    lines = [
        f"| {display(name).removeprefix('no ')} | {points_or_dash(found[name])} |" for name in parts
    ]
    return "\n".join(["| part | `modern` minus `modern` without it |", "|---|---:|", *lines])


def points_or_dash(found: Mapping[str, Any] | None) -> str:
    return "–" if found is None else points(found) + " n.s." * (not found["significant"])


def write_pages(results: Path, out: Path, modern_out: Path) -> None:
    paths = {recipe: results / f"reproduce-{recipe}.json" for recipe in TITLES}
    measured = {recipe: path for recipe, path in paths.items() if path.is_file()}
    tables = {recipe: json.loads(path.read_text("utf-8")) for recipe, path in measured.items()}
    ours = out == PAGE
    write(out, page(tables, ours=ours))
    if "modern" in tables:
        write(modern_out, modern_page(tables["modern"], ours=ours))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("seeds", nargs="*")
    parser.add_argument("--only", choices=TITLES, help="run only this recipe")
    parser.add_argument("--page", action="store_true", help="only write the pages")
    parser.add_argument("--publish", action="store_true", help="write to docs/, not runs/reproduce")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="set recipe keys")
    options = parser.parse_args(arguments)
    if not (options.seeds or options.page):
        parser.error("expected seeds, or --page")
    is_published = options.page or options.publish
    results, out, modern_out = (
        (RESULTS, PAGE, MODERN_PAGE)
        if is_published
        else (OWN, OWN / "results.md", OWN / "modern.md")
    )
    if not options.page:
        recipes = [options.only] if options.only else list(TITLES)
        run_all(recipes, options.seeds, options.set)
        write_tables(recipes, options.seeds, results)
    write_pages(results, out, modern_out)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
