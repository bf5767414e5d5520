"""Checks of data, grader and reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean

from reftune.advice.check.report import Finding, fail, ok, warn
from reftune.advice.check.subject import Row, Subject
from reftune.datasets import Dataset, Splits
from reftune.datasets.mixture import Mixture
from reftune.datasets.reading.splits import dropped_text
from reftune.errors import CheckpointError, DataError, RecipeError
from reftune.grading.formats import grades_of
from reftune.grading.formats.nl import DEFINITION, Nl
from reftune.grading.formats.program import Program, programs_in
from reftune.grading.perturbed import PRINTED, right_solutions, wrong_solutions
from reftune.grading.sandbox import Sandbox, SandboxLimits
from reftune.grading.sandbox.gaps import gap, missing_package
from reftune.recipe import Recipe
from reftune.results.stats import wilson
from reftune.stages.rollouts import rewards_of
from reftune.storage.run_folder import (
    RunFolder,
    readable_errors,
    refuse_changed_data,
    refuse_foreign,
)
from reftune.text import counted
from reftune.types import ANY_ANSWER, Answer, Completion, Graded, Problem, Verdict

Written = tuple[Problem, str]
"""A problem and the text of a solution."""
SMALL_DEV = 100
"""With fewer dev problems than this, the choice of a model is mostly luck: at 50% accuracy, the 95%
interval is about ± 10 percentage points or wider."""
NUM_REWARDED = 64
"""Maximum number of training rows on which the reward is tested."""
MAX_FALSE_POSITIVES = 0.05
"""The check fails if more than this share of wrong solutions is rewarded."""


def check_run_folder(subject: Subject) -> Finding:
    """Check that the run folder is new, or belongs to this recipe and these problems."""
    problem = run_folder_problem(subject.recipe, subject.splits)
    if not problem:
        return ok(str(subject.recipe.folder))
    message, _, remedy = problem.partition("; ")
    return fail(message, remedy or "choose another run_dir")


def run_folder_problem(recipe: Recipe, splits: Splits) -> str:
    """Why a run of this recipe could not use the recipe's run folder. Empty if the run could use
    the folder."""
    folder = RunFolder(recipe.folder)
    try:
        with readable_errors(folder):
            if not refuse_foreign(folder, recipe):
                refuse_changed_data(folder, splits)
    except (CheckpointError, DataError, RecipeError) as error:
        return str(error)
    return ""


def check_splits(subject: Subject) -> Finding:
    """Check that supervised stages have rationales, that there are test problems, and that there
    are enough dev problems to choose a model."""
    splits = subject.splits
    message = (
        f"{len(splits.train)} train, {len(splits.dev)} dev, {len(splits.test)} test; "
        f"{counted(len(subject.rows), 'train row')} with a rationale; "
        f"dropped: {dropped_text(splits.counts)}"
    )
    if not subject.rows and subject.learns_from_rationales:
        return fail(message, "supervised stages need rationales")
    if not splits.test and subject.recipe.evaluate.split == "test":
        return fail(message, "add test problems, or set evaluate.split=dev")
    if len(splits.dev) < SMALL_DEV:
        keys = " and ".join(_dev_keys(subject.recipe.dataset))
        remedy = f"models are chosen on dev: use {SMALL_DEV} dev problems or more"
        return warn(message, f"{remedy} ({keys})" if keys else remedy)
    return ok(message)


def _dev_keys(dataset: Dataset, at: str = "dataset") -> list[str]:
    """The recipe keys that determine the dev problems. A user's own dataset may have no such
    keys."""
    if isinstance(dataset, Mixture):
        parts = dataset.parts.items()
        return [
            key for name, p in parts for key in _dev_keys(p.dataset, f"{at}.parts.{name}.dataset")
        ]
    names = ("dev", "dev_size") if getattr(dataset, "dev", None) else ("dev_size", "dev")
    return [f"{at}.{name}" for name in names if hasattr(dataset, name)][:1]


def check_columns(subject: Subject) -> Finding:
    """Check that no unused column of the data seems to belong to the question."""
    if not (notes := subject.splits.notes):
        return ok("no unused column seems to belong to the question")
    message, _, remedy = notes[0].partition("; ")
    return warn(message, remedy, notes[1:])


def check_gold_answers(subject: Subject) -> Finding:
    """Check that a solution is graded correct if it states the gold answer and nothing else. Gold
    answers of the kind `regex` are left out, because a pattern is not an answer."""
    format = subject.recipe.format
    is_program = isinstance(format, Program)
    if not isinstance(format, Program | Nl):  # for a user's own format, look at the rationales
        is_program = any(DEFINITION.search(row.problem.rationale or "") for row in subject.rows)
    problems = [
        replace(each, rationale=_shortest_program(each.answer) if is_program else str(each.answer))
        for each in subject.problems
        if each.answer != ANY_ANSWER and each.answer.kind != "regex"
    ]
    graded = grades_of(format, problems, [format.target(problem) for problem in problems])
    return _gold_finding(subject, "gold answers", problems, graded)


def check_gold_rationales(subject: Subject) -> Finding:
    """Check that gold rationales are graded correct after they are encoded to tokens and decoded
    again."""
    problems = [row.problem for row in subject.rows]
    texts = [subject.encoder.decode(row.target_ids) for row in subject.rows]
    graded = subject.encoder.grade(problems, texts)
    return _gold_finding(subject, "gold rationales", problems, graded)


def check_sandbox(subject: Subject) -> Finding:
    """Count the gold programs that the sandbox `monty` cannot run."""
    format = subject.recipe.format
    if not isinstance(format, Program):
        return ok("no programs are run")
    firsts = (source for row in subject.rows for source in programs_in(row.target)[:1])
    sources = list(dict.fromkeys(firsts))
    limits = SandboxLimits(timeout_s=format.timeout_s, memory_mib=format.memory_mib)
    with Sandbox(limits, backend="monty") as monty:
        results = monty.run(sources)
    gaps = Counter(filter(None, map(gap, results)))
    packages = Counter(filter(None, map(missing_package, results)))
    if not gaps and not packages:
        return ok(f"monty runs all gold programs ({len(sources)})")
    listed = ", ".join(f"{name} ({count})" for name, count in (gaps + packages).most_common())
    message = (
        f"gold programs that only the subprocess sandbox runs: {gaps.total() + packages.total()} of"
        f" {len(sources)}, because of {listed}"
    )
    if format.sandbox == "subprocess" or (format.sandbox == "auto" and not packages):
        return ok(f"{message}; format.sandbox={format.sandbox} uses this sandbox")
    return warn(message, f"set format.sandbox={'subprocess' if packages else 'auto'}")


def _shortest_program(answer: Answer) -> str:
    literal = repr(answer.value) if isinstance(answer.value, str) else str(answer)
    return f"def solution():\n    return {literal}"


def _gold_finding(
    subject: Subject, what: str, problems: Sequence[Problem], graded: Sequence[Graded]
) -> Finding:
    if not problems:
        return ok(f"there are no {what}")
    wrong = [
        f"{problem.id}: {grade.verdict.value}: {grade.reason}"
        for problem, grade in zip(problems, graded, strict=True)
        if grade.verdict is not Verdict.CORRECT
    ]
    share, least = 1 - len(wrong) / len(problems), subject.recipe.check.min_gold_correct
    message = f"{share:.2%} of {len(problems)} {what} are graded correct"
    if share < least:
        remedy = "fix the rows, choose a format that fits them, or waive this check"
        return fail(
            f"{message}, below {least:.0%}: the reward would punish right solutions", remedy, wrong
        )
    return warn(message, "fix or drop these rows", wrong) if wrong else ok(message)


def check_grader_refuses(subject: Subject) -> Finding:
    """Check that empty completions, bare answers and solutions to other problems are not graded
    correct."""
    problems = [row.problem for row in subject.rows]
    tried = {
        "an empty completion": [(problem, "") for problem in problems],
        "the bare answer": [(problem, str(problem.answer)) for problem in problems],
        "another problem's solution": _other_solutions(subject.rows),
    }
    accepted = {
        what: sum(grade.verdict is Verdict.CORRECT for grade in _grades(subject, pairs))
        for what, pairs in tried.items()
    }
    found = [f"{what} ({count})" for what, count in accepted.items() if count]
    if not found:
        return ok("empty completions, bare answers and other problems' solutions are all rejected")
    message = (
        f"{counted(len(problems), 'problem')}; graded correct although they solve nothing:"
        f" {', '.join(found)}"
    )
    robust = "" if _is_robust(subject) else "format.grading=robust, and "
    remedy = f"a model may learn to write just that; use {robust}rows whose answers differ"
    return fail(message, remedy) if accepted["an empty completion"] else warn(message, remedy)


def _is_robust(subject: Subject) -> bool:
    """Whether grading is `robust`. A format without the setting `grading` counts as robust."""
    return bool(getattr(subject.recipe.format, "grading", "robust") == "robust")


def _other_solutions(rows: Sequence[Row]) -> list[Written]:
    """Each problem with the solution to the next row's problem, if the two problems have different
    answers."""
    return [
        (a.problem, b.target) for a, b in pairwise(rows) if a.problem.answer != b.problem.answer
    ]


def check_reward(subject: Subject) -> Finding:
    """For each of up to `NUM_REWARDED` problems, compute the rewards of its own gold solution, of
    another problem's gold solution and of an empty completion. Check that the problems' own gold
    solutions have the highest mean reward. Raises: RewardError if the reward function fails."""
    rows = subject.rows[:NUM_REWARDED]
    if not rows:
        return ok("not checked, because there are no gold solutions")
    solutions = {
        "a gold solution": [(row.problem, row.target) for row in rows],
        "another problem's solution": _other_solutions(subject.rows)[:NUM_REWARDED],
        "an empty completion": [(row.problem, "") for row in rows],
    }
    earned = {what: fmean(_rewards(subject, pairs)) for what, pairs in solutions.items() if pairs}
    gold, *others = earned.values()
    message = ", ".join(f"{what} earns {reward:.3g}" for what, reward in earned.items())
    if gold > max(others):
        return ok(message)
    return fail(message, "fix the reward: there is nothing to learn from it")


def check_reward_errors(subject: Subject) -> Finding:
    """Change gold solutions so that they are certainly wrong or certainly still right, and check
    how often the reward misjudges these variants. Wrong variants with a high reward are false
    positives; right variants with a low reward are false negatives. A reward is high if it is
    above the midpoint between the mean reward of gold solutions and that of empty completions.
    Raises: RewardError if the reward function fails."""
    rows = [row for row in subject.rows[:NUM_REWARDED] if row.problem.scorer is None]
    decimal = getattr(subject.recipe.format, "gold_decimal", ".")
    wrong, right = (
        [(row.problem, x) for row in rows for x in change(row.problem, row.target, decimal)]
        for change in (wrong_solutions, right_solutions)
    )
    if getattr(subject.recipe.format, "scripts", "") == "read":
        wrong = [(problem, x) for problem, x in wrong if x.kind != PRINTED]
    changed = {"positive": wrong, "negative": right}
    if not any(changed.values()):
        return ok("no gold solution has a variant that is certainly right or certainly wrong")
    gold = fmean(_rewards(subject, [(row.problem, row.target) for row in rows]))
    nothing = fmean(_rewards(subject, [(row.problem, "") for row in rows]))
    rewards = {
        kind: _rewards(subject, [(problem, x.text) for problem, x in cases])
        for kind, cases in changed.items()
    }
    if gold <= nothing:
        return ok("not measured: gold solutions earn no more than empty completions")
    rates, listed = [], []
    errors: dict[str, Counter[str]] = {}
    for kind, cases in changed.items():
        errors[kind] = Counter(
            x.kind
            for (_, x), reward in zip(cases, rewards[kind], strict=True)
            if (reward > (gold + nothing) / 2) == (kind == "positive")
        )
        totals = Counter(x.kind for _, x in cases)
        rates.append(_error_rate(kind, errors[kind].total(), len(cases)))
        listed += [
            f"false {kind}: {what}: {count} of {totals[what]}"
            for what, count in errors[kind].most_common()
        ]
    message = ", ".join(rates)
    if errors["positive"].total() > MAX_FALSE_POSITIVES * len(wrong):
        robust = "" if _is_robust(subject) else " or choose format.grading=robust"
        return fail(message, f"this reward accepts wrong answers: fix it{robust}", listed)
    if listed:
        robust = "" if _is_robust(subject) else "; format.grading=robust reads most spellings"
        remedy = f"these wrong answers earn too much, or these right ones too little{robust}"
        return warn(message, remedy, listed)
    return ok(message)


def _error_rate(kind: str, count: int, total: int) -> str:
    """An error rate as text: `false positives 3 of 384 (0.8%, 95% interval up to 2.3%)`."""
    if total == 0:
        return f"false {kind}s not tested"
    return (
        f"false {kind}s {count} of {total} ({count / total:.1%}, 95% interval up to"
        f" {wilson(count, total)[1]:.1%})"
    )


def _grades(subject: Subject, written: Sequence[Written]) -> list[Graded]:
    problems, texts = [problem for problem, _ in written], [text for _, text in written]
    return grades_of(subject.encoder.format, problems, texts)


def _rewards(subject: Subject, written: Sequence[Written]) -> list[float]:
    """The reward of each solution, or 0 if the reward function returns None for it."""
    completions = []
    for problem, text in written:
        ids = tuple(subject.encoder.continuation(problem, text))
        logprobs = (0.0,) * len(ids)
        completions.append(
            Completion(token_ids=ids, text=text, logprobs=logprobs, finish_reason="eos")
        )
    problems = [problem for problem, _ in written]
    graded = _grades(subject, written)
    return [r or 0.0 for r in rewards_of(subject.recipe.reward, problems, completions, graded)]
