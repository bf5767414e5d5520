"""What would spoil a run, found before it starts, each with its remedy; and what the model will
see."""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from reftune.advice.measured import (
    Lengths,
    available_bytes,
    evaluation_seconds,
    measure_speed,
    stage_seconds,
)
from reftune.advice.memory import Outline, training_memory
from reftune.advice.plan import stage_work, trainings
from reftune.datasets import Splits
from reftune.errors import DataError, RecipeError, RewardError
from reftune.grading.formats._source import programs_in
from reftune.grading.formats.nl import DEFINITION, Nl
from reftune.grading.formats.program import Program
from reftune.grading.perturbed import PRINTED, right_solutions, wrong_solutions
from reftune.grading.sandbox import Sandbox, SandboxLimits
from reftune.grading.sandbox.gaps import gap, missing_package
from reftune.model.batch import token_batch
from reftune.model.encoder import Encoder, bos_of
from reftune.model.policy import Policy
from reftune.model.precision import product_rates
from reftune.recipe import Component, ModelTable, Recipe, ScratchTable, shipped_recipes
from reftune.results.stats import wilson
from reftune.runs.auto import settled
from reftune.runs.run import Run, check_stage_graph, load_splits, methods_to_evaluate, threads_of
from reftune.runs.sample import sample_rows, solution_text
from reftune.stages.progress import SilentProgress
from reftune.stages.rollouts import Collector
from reftune.storage.run_folder import RunFolder
from reftune.text import clock, printable
from reftune.types import (
    ANY_ANSWER,
    Answer,
    Completion,
    Conversation,
    Problem,
    SamplingParams,
    Verdict,
)

Level = Literal["ok", "warn", "fail"]

MAX_LISTED = 5
"""Rows named under a finding."""
MAX_LONG_TARGETS = 0.1
"""Share of training rows that may be lost for their length before the check fails."""
SMALL_DEV = 100
"""Dev problems below which the choice of a model is mostly luck: an accuracy of 50 % is then ± 10
points or worse."""
NUM_REWARDED = 64
"""Rows whose gold solution, a wrong one and an empty text are paid, to see that the reward tells
them apart."""
MAX_FALSE_POSITIVES = 0.05
"""Share of wrong solutions that may be paid before the check fails."""
NUM_TIMED = 512
"""Rows whose lengths and tokens stand for all when the time is estimated."""
MEASURED_ROWS = 64
"""Trained on and sampled at once to learn the speed, where the recipe does not tell."""
NUM_SAMPLES = 3
OFFLINE = ("gold_answers", "gold_rationales", "grader_refuses", "reward", "reward_errors")
"""Checks that say something without the recipe's own model and data."""
EXAMPLES = "paper/examples"
UNSAFE = ("vocabulary", "prompt_length", "memory", "dtype")
"""If one of these fails, the model is not run: it would crash, or crawl."""
MAX_SLOWDOWN = 8.0
"""Times as long as in the other dtype that products may take before the check fails."""
PRODUCT = 1024
"""Rows and columns at most of the weight whose product is timed."""
BOUNDARY_TOKENS = 6
MAX_MISMATCH = {"float32": 0.01, "bfloat16": 0.1}
"""Nats a token between the engine's log-probabilities and the policy's."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of one check."""

    level: Level
    message: str
    """One line."""
    remedy: str = ""
    """What to do about it; empty where all is well."""
    rows: tuple[str, ...] = ()
    """Some of the rows concerned, one line each."""
    name: str = ""
    """Of the check; `check_recipe` fills it in."""


def ok(message: str) -> Finding:
    """All is well."""
    return Finding(level="ok", message=message)


def warn(message: str, remedy: str, rows: Sequence[str] = ()) -> Finding:
    """Worth knowing; the run may go on."""
    return Finding(level="warn", message=message, remedy=remedy, rows=tuple(rows[:MAX_LISTED]))


def fail(message: str, remedy: str, rows: Sequence[str] = ()) -> Finding:
    """The run would be spoilt."""
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
    preview: Preview | None
    method: str
    """Whose samples are shown: what RL starts from once it is trained, the base model before."""
    samples: tuple[dict[str, Any], ...]

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "fail"]

    def to_json(self) -> str:
        """One JSON document."""
        return json.dumps({**asdict(self), "ok": not self.failed}, indent=2, ensure_ascii=False)

    def to_text(self) -> str:
        """For a person."""
        parts = ["\n".join(_finding_text(finding) for finding in self.findings)]
        if self.preview is not None:
            parts.append(_preview_text(self.preview))
        parts += [f"--- sampled by {self.method} ---\n{solution_text(row)}" for row in self.samples]
        return "\n\n".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A training problem with its rationale, as text and as tokens."""

    problem: Problem
    prompt: str
    target: str
    """What the model should say; see `reply`."""
    reply: str
    """What follows the prompt, with all that a chat template adds to `target`."""
    prompt_ids: list[int]
    target_ids: list[int]

    @property
    def ids(self) -> list[int]:
        """With the end token."""
        return [*self.prompt_ids, *self.target_ids]


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is checked."""

    recipe: Recipe
    splits: Splits
    policy: Policy
    collector: Collector
    rows: list[Row]
    prompts: dict[str, dict[str, list[int]]]
    """Split → problem id → prompt ids."""
    num_methods: int
    """To be evaluated in the end."""

    @property
    def encoder(self) -> Encoder:
        return self.collector.encoder

    @property
    def problems(self) -> list[Problem]:
        return [*self.splits.train, *self.splits.dev, *self.splits.test]

    @property
    def prompt_limit(self) -> float:
        """Most tokens of a prompt; infinite if nothing limits them."""
        lengths, context = self.recipe.lengths, self.policy.context
        room = math.inf if context is None else context - lengths.max_new
        return max(0, min(room, lengths.max_prompt or math.inf))

    @property
    def fitting(self) -> dict[str, list[list[int]]]:
        """Split → prompt ids that are not too long."""
        return {
            split: [ids for ids in prompts.values() if len(ids) <= self.prompt_limit]
            for split, prompts in self.prompts.items()
        }

    @property
    def fitting_rows(self) -> list[Row]:
        """Those that are trained on: neither prompt nor target is too long."""
        most = self.recipe.lengths.max_new
        return [
            row
            for row in self.rows
            if len(row.prompt_ids) <= self.prompt_limit and len(row.target_ids) <= most
        ]


def check_recipe(recipe: Recipe) -> CheckReport:
    """Load data and model, run every check, sample a few solutions. Nothing is written.

    Raises: ReftuneError where there is nothing to check: data or a model that cannot be loaded, a
    stage graph that is wrong.
    """
    _refuse_unknown_waivers(recipe.check.waive)
    check_stage_graph(recipe)
    recipe = settled(recipe)
    run = Run(
        recipe=recipe,
        splits=load_splits(recipe),
        folder=RunFolder(recipe.folder),
        progress=SilentProgress(),
    )
    method = _starting_method(run)
    samples: list[dict[str, Any]] = []
    with threads_of(recipe):
        subject = _subject(run, run.load_policy(method, trained=True))
        findings = _findings(subject, CHECKS)
        if not any(finding.level == "fail" and finding.name in UNSAFE for finding in findings):
            samples = sample_rows(
                subject.policy,
                subject.collector,
                subject.splits.dev[:NUM_SAMPLES],
                recipe,
                temperature=1.0,
            )
            findings += _findings(subject, MODEL_CHECKS)
    return CheckReport(
        recipe=recipe.name,
        findings=tuple(findings),
        preview=_preview(subject),
        method=method,
        samples=tuple(samples),
    )


def check_offline(recipe: Recipe) -> CheckReport:
    """The checks that take neither weights nor a download. Data that are not here are stood for by
    examples of their format that come with reftune, the tokenizer by the words of the training
    texts.

    Raises: ReftuneError as `check_recipe`, and where there are no such examples.
    """
    _refuse_unknown_waivers(recipe.check.waive)
    check_stage_graph(recipe)
    dataset, data = _offline_dataset(recipe)
    shape = ScratchTable(hidden_size=8, layers=1, heads=1, context=8192)  # type: ignore[call-arg]
    scratch = ModelTable(scratch=shape, dtype="float32")  # type: ignore[call-arg]
    stand_in = recipe.model_copy(update={"dataset": dataset, "model": scratch})
    run = Run(
        recipe=stand_in,
        splits=load_splits(stand_in),
        folder=RunFolder(recipe.folder),
        progress=SilentProgress(),
    )
    subject = _subject(run, run.load_policy("base"))
    findings = [replace(data, name="data"), replace(_schedule(recipe), name="schedule")]
    findings += _findings(subject, {name: CHECKS[name] for name in OFFLINE})
    return CheckReport(
        recipe=recipe.name, findings=tuple(findings), preview=None, method="base", samples=()
    )


def _offline_dataset(recipe: Recipe) -> tuple[Component, Finding]:
    """The recipe's dataset, or one on examples where its source is not on this machine. Raises:
    DataError."""
    dataset: Component = recipe.dataset
    source = getattr(dataset, "train", None)
    if not isinstance(source, str) or Path(source).expanduser().exists():
        return dataset, ok("the recipe's own")
    folder = shipped_recipes() / EXAMPLES / dataset.kind
    if not folder.is_dir():
        raise DataError(
            f"dataset.train: {source} is not on this machine, and reftune has no examples of kind"
            f" {dataset.kind}"
        )
    examples = dataset.model_copy(
        update={"train": str(folder), "dev": None, "test": None, "dev_size": 2}
    )
    return examples, ok(
        f"{source} is not here; examples of its format that come with reftune stand for it"
    )


def _schedule(recipe: Recipe) -> Finding:
    """What each stage will do, in one line each."""
    lines = tuple(f"{name}: {stage.line()}" for name, stage in recipe.stages.items())
    return replace(ok(f"{len(lines)} stages"), rows=lines)


def _findings(subject: Subject, checks: Mapping[str, Check]) -> list[Finding]:
    """In order; a failed one that the recipe waives only warns."""
    findings = [replace(check(subject), name=name) for name, check in checks.items()]
    waive = subject.recipe.check.waive
    return [
        (
            replace(f, level="warn", message=f"{f.message} (waived)")
            if f.level == "fail" and f.name in waive
            else f
        )
        for f in findings
    ]


def _starting_method(run: Run) -> str:
    costs = [(s.init, s.cost(num_train=0, num_dev=0)) for s in run.recipe.stages.values()]
    inits = [init for init, cost in costs if cost is not None and cost.sampled > 0]
    trained = [method for method in inits if run.folder.stage(method).is_done]
    return trained[0] if trained else "base"


def _subject(run: Run, policy: Policy) -> Subject:
    collector = run.collector(policy)
    encoder = collector.encoder
    splits = {"train": run.splits.train, "dev": run.splits.dev, "test": run.splits.test}
    prompts = {
        name: {problem.id: encoder.prompt(problem) for problem in problems}
        for name, problems in splits.items()
    }
    rows = [
        _row(problem, encoder, prompts["train"][problem.id])
        for problem in run.splits.train
        if problem.rationale is not None
    ]
    return Subject(
        recipe=run.recipe,
        splits=run.splits,
        policy=policy,
        collector=collector,
        rows=rows,
        prompts=prompts,
        num_methods=len(methods_to_evaluate(run.recipe)),
    )


def _row(problem: Problem, encoder: Encoder, prompt_ids: list[int]) -> Row:
    prompt, target = encoder.format.prompt(problem), encoder.format.target(problem)
    return Row(
        problem=problem,
        prompt=encoder.text_of(prompt),
        target=target,
        reply=encoder.text_after(prompt, target),
        prompt_ids=prompt_ids,
        target_ids=encoder.continuation(problem, target),
    )


def _refuse_unknown_waivers(names: Sequence[str]) -> None:
    known = [*CHECKS, *MODEL_CHECKS]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise RecipeError(
                f"check.waive: {name}: no such check;"
                f" {f'did you mean {near[0]}?' if near else ', '.join(known)}"
            )


def _learns_from_rationales(subject: Subject) -> bool:
    return any(stage.reads_rationales for stage in subject.recipe.stages.values())


# --- data and grader ------------------------------------------------------------------------------


def check_splits(subject: Subject) -> Finding:
    """Enough problems to train on and to choose by."""
    splits = subject.splits
    dropped = (
        ", ".join(f"{count} {reason}" for reason, count in splits.counts.items() if count)
        or "nothing"
    )
    message = (
        f"{len(splits.train)} train, {len(splits.dev)} dev, {len(splits.test)} test; "
        f"{len(subject.rows)} train rows have a rationale; dropped: {dropped}"
    )
    if not subject.rows and _learns_from_rationales(subject):
        return fail(message, "supervised stages need rationales")
    if not splits.test and subject.recipe.evaluate.split == "test":
        return fail(message, "give test problems, or set evaluate.split=dev")
    if len(splits.dev) < SMALL_DEV:
        return warn(message, f"models are chosen on dev: give it {SMALL_DEV} problems or more")
    return ok(message)


def check_gold_answers(subject: Subject) -> Finding:
    """Every gold answer, stated by the shortest solution there is, is graded correct."""
    shortest = _shortest_program if _writes_programs(subject) else _shortest_words
    stated = [
        problem
        for problem in subject.problems
        if problem.answer != ANY_ANSWER and problem.answer.kind != "regex"
    ]
    problems = [replace(problem, rationale=shortest(problem.answer)) for problem in stated]
    return _gold_finding(
        subject,
        "gold answers",
        problems,
        [subject.encoder.format.target(problem) for problem in problems],
    )


def check_gold_rationales(subject: Subject) -> Finding:
    """Gold rationales, encoded and decoded as a model would write them, are graded correct."""
    texts = [subject.encoder.decode(row.target_ids) for row in subject.rows]
    return _gold_finding(subject, "gold rationales", [row.problem for row in subject.rows], texts)


def check_sandbox(subject: Subject) -> Finding:
    """How many gold programs need more than the interpreter of the default sandbox."""
    format = subject.recipe.format
    if not isinstance(format, Program):
        return ok("no programs are run")
    programs = [programs_in(row.target)[:1] for row in subject.rows]
    sources = list(dict.fromkeys(source for group in programs for source in group))
    limits = SandboxLimits(timeout_s=format.timeout_s, memory_mib=format.memory_mib)
    with Sandbox(limits, backend="monty") as monty:
        results = monty.run(sources)
    gaps = Counter(filter(None, map(gap, results)))
    packages = Counter(filter(None, map(missing_package, results)))
    if not gaps and not packages:
        return ok(f"monty runs all of {len(sources)} gold programs")
    listed = ", ".join(f"{name} ({count})" for name, count in (gaps + packages).most_common())
    message = (
        f"{gaps.total() + packages.total()} of {len(sources)} gold programs need the subprocess"
        f" sandbox: {listed}"
    )
    if format.sandbox == "subprocess" or (format.sandbox == "auto" and not packages):
        return ok(f"{message}; format.sandbox={format.sandbox} gives it to them")
    return warn(message, f"set format.sandbox={'subprocess' if packages else 'auto'}")


def _writes_programs(subject: Subject) -> bool:
    """Whether solutions are programs: by the format, or of a person's own format by the data."""
    if isinstance(subject.recipe.format, (Program, Nl)):
        return isinstance(subject.recipe.format, Program)
    return any(DEFINITION.search(row.problem.rationale or "") for row in subject.rows)


def _shortest_words(answer: Answer) -> str:
    return str(answer)


def _shortest_program(answer: Answer) -> str:
    literal = repr(answer.value) if isinstance(answer.value, str) else str(answer)
    return f"def solution():\n    return {literal}"


def _gold_finding(
    subject: Subject, what: str, problems: Sequence[Problem], texts: Sequence[str]
) -> Finding:
    if not problems:
        return ok(f"there are no {what}")
    graded = subject.encoder.format.grade(problems, texts)
    wrong = [
        f"{problem.id}: {grade.verdict.value}: {grade.reason}"
        for problem, grade in zip(problems, graded, strict=True)
        if grade.verdict is not Verdict.CORRECT
    ]
    share, least = 1 - len(wrong) / len(problems), subject.recipe.check.min_gold_correct
    message = f"{share:.2%} of {len(problems)} {what} are graded correct"
    if share < least:
        remedy = "mend the rows, choose the format that fits them, or waive this check"
        return fail(
            f"{message}, below {least:.0%}: the reward would punish right solutions", remedy, wrong
        )
    return warn(message, "mend or drop these rows", wrong) if wrong else ok(message)


def check_grader_refuses(subject: Subject) -> Finding:
    """An empty text, a bare answer and another problem's solution are not correct."""
    problems = [row.problem for row in subject.rows]
    pairs = [
        (a.problem, b.target)
        for a, b in pairwise(subject.rows)
        if a.problem.answer != b.problem.answer
    ]
    accepted = {
        "an empty text": _num_correct(subject, problems, [""] * len(problems)),
        "the bare answer": _num_correct(
            subject, problems, [str(problem.answer) for problem in problems]
        ),
        "another problem's solution": _num_correct(
            subject, [problem for problem, _ in pairs], [text for _, text in pairs]
        ),
    }
    found = [f"{what} ({count})" for what, count in accepted.items() if count]
    if not found:
        return ok(f"none of {', '.join(accepted)} is graded correct")
    message = f"of {len(problems)} graded correct though nothing was solved: {', '.join(found)}"
    remedy = (
        "a model may learn to write just that; prefer grading=robust, and rows whose answers differ"
    )
    return fail(message, remedy) if accepted["an empty text"] else warn(message, remedy)


def _num_correct(subject: Subject, problems: Sequence[Problem], texts: Sequence[str]) -> int:
    return sum(
        graded.verdict is Verdict.CORRECT
        for graded in subject.encoder.format.grade(problems, texts)
    )


def check_reward(subject: Subject) -> Finding:
    """A gold solution earns more than a wrong one and than nothing."""
    rows = subject.rows[:NUM_REWARDED]
    if not rows:
        return ok("there is no gold solution to pay")
    texts = {
        "a gold solution": [row.target for row in rows],
        "another problem's": [row.target for row in (*rows[1:], rows[0])],
        "an empty text": [""] * len(rows),
    }
    try:
        paid = {
            what: _mean_reward(subject, [row.problem for row in rows], written)
            for what, written in texts.items()
        }
    except RewardError as error:
        return fail(str(error), "mend the reward function")
    gold, *others = paid.values()
    message = ", ".join(f"{what} earns {reward:.3g}" for what, reward in paid.items())
    return (
        ok(message)
        if gold > max(others)
        else fail(message, "there is nothing to learn from this reward")
    )


def check_reward_errors(subject: Subject) -> Finding:
    """Gold solutions made wrong earn little (else: a false positive), rewritten ones as much as
    before (else: a negative).

    "Little" and "much" part halfway between what gold solutions and empty texts earn on average.
    """
    rows = [row for row in subject.rows[:NUM_REWARDED] if row.problem.scorer is None]
    problems, golds = [row.problem for row in rows], [row.target for row in rows]
    changed = {
        "positive": [
            (p, x)
            for p, gold in zip(problems, golds, strict=True)
            for x in wrong_solutions(p, gold)
            if x.kind != PRINTED or getattr(subject.recipe.format, "scripts", "") != "read"
        ],
        "negative": [
            (p, x)
            for p, gold in zip(problems, golds, strict=True)
            for x in right_solutions(p, gold)
        ],
    }
    if not any(changed.values()):
        return ok("there is no gold solution that can be changed with certainty")
    try:
        gold, nothing = (
            _mean_reward(subject, problems, golds),
            _mean_reward(subject, problems, [""] * len(rows)),
        )
        paid = {
            kind: _rewards(subject, [p for p, _ in cases], [x.text for _, x in cases])
            for kind, cases in changed.items()
        }
    except RewardError as error:
        return fail(str(error), "mend the reward function")
    if gold <= nothing:
        return ok("not told: gold solutions earn no more than empty texts")
    much = (gold + nothing) / 2
    errors = {
        kind: Counter(
            x.kind
            for (_, x), reward in zip(changed[kind], rewards, strict=True)
            if (reward > much) == (kind == "positive")
        )
        for kind, rewards in paid.items()
    }
    message = ", ".join(
        _error_rate(kind, errors[kind].total(), len(changed[kind])) for kind in errors
    )
    totals = {kind: Counter(x.kind for _, x in cases) for kind, cases in changed.items()}
    listed = [
        f"false {kind}: {what}: {count} of {totals[kind][what]}"
        for kind in errors
        for what, count in errors[kind].most_common()
    ]
    if errors["positive"].total() > MAX_FALSE_POSITIVES * len(changed["positive"]):
        return fail(
            message, "this reward pays for wrong answers: mend it or choose grading=robust", listed
        )
    if listed:
        return warn(
            message,
            "what a model is paid for, or is not, beside the right answer; grading=robust reads"
            " most",
            listed,
        )
    return ok(message)


def _error_rate(kind: str, count: int, total: int) -> str:
    """`false positives 3 of 384 (0.8 %, at most 2.3 %)`; the bound is that of the 95 % interval."""
    if total == 0:
        return f"no case of a false {kind}"
    return (
        f"false {kind}s {count} of {total} ({count / total:.1%}, at most"
        f" {wilson(count, total)[1]:.1%})"
    )


def _mean_reward(subject: Subject, problems: Sequence[Problem], texts: Sequence[str]) -> float:
    return _mean(_rewards(subject, problems, texts) or [0.0])


def _rewards(subject: Subject, problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
    """0 where the reward does not apply."""
    graded = subject.encoder.format.grade(problems, texts)
    written = [
        _as_sampled(subject, problem, text) for problem, text in zip(problems, texts, strict=True)
    ]
    rewards = subject.recipe.reward(problems, written, graded)
    return [reward or 0.0 for reward in rewards]


def _as_sampled(subject: Subject, problem: Problem, text: str) -> Completion:
    token_ids = tuple(subject.encoder.continuation(problem, text))
    return Completion(
        token_ids=token_ids, text=text, logprobs=(0.0,) * len(token_ids), finish_reason="eos"
    )


# --- tokens ---------------------------------------------------------------------------------------


def check_boundary(subject: Subject) -> Finding:
    """Prompt and target, as trained on, decode to their texts put together."""
    tokenizer, rows = subject.policy.tokenizer, subject.rows
    bos = bos_of(tokenizer)
    empty = [row.problem.id for row in rows if not row.prompt_ids or len(row.target_ids) < 2]
    if empty:
        return fail(f"{len(empty)} rows have an empty prompt or target", "drop them", empty)
    decoded = [
        tokenizer.decode(row.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for row in rows
    ]
    lost = [
        row.problem.id
        for row, text in zip(rows, decoded, strict=True)
        if not _spells(str(text), row, tokenizer)
    ]
    if lost:
        remedy = "the model learns, and is graded on, the decoded text; look at the tokens below"
        return warn(
            f"{_share(lost, rows)} of the rows do not decode to the text that was encoded",
            remedy,
            lost,
        )
    wholes = [subject.encoder.encode(row.prompt + row.reply) for row in rows]
    moved = [
        row
        for row, ids in zip(rows, wholes, strict=True)
        if row.ids[: len(ids)] != ids and row.ids[len(bos) : len(bos) + len(ids)] != ids
    ]
    note = (
        f"; {_share(moved, rows)} would split differently if encoded as one text" if moved else ""
    )
    message = f"prompt and target meet at the same token in every stage{note}"
    if moved and not _learns_from_rationales(subject):
        return warn(message, "no supervised stage teaches the model this split")
    return ok(message)


def _spells(decoded: str, row: Row, tokenizer: Any) -> bool:
    """Whether `decoded` is a row's text, apart from BOS before it and an end token after it."""
    before, found, after = decoded.partition(row.prompt + row.reply)
    bos, end = (tokenizer.decode(ids) for ids in (bos_of(tokenizer), row.target_ids[-1:]))
    return found != "" and before in ("", bos) and after in ("", end)


def check_prompt(subject: Subject) -> Finding:
    """The prompt is what the model was made for: its chat template if it has one, one BOS if its
    tokenizer adds one."""
    tokenizer, format_ = subject.policy.tokenizer, subject.encoder.format
    problem = subject.problems[0]
    prompt, bos = format_.prompt(problem), bos_of(tokenizer)
    ids = subject.prompts["train"][problem.id]
    is_chat = isinstance(prompt, Conversation)
    if tokenizer.chat_template and not is_chat:
        return warn(
            "the tokenizer has a chat template, and the model is given raw text",
            "format.style=chat, if this is an instruct model",
        )
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        return warn("prompts begin with two BOS tokens", "take it out of the template or the data")
    if ids[: len(bos)] != bos:
        writer = "the chat template" if is_chat else "this format"
        return warn(
            f"the tokenizer begins a text with {tokenizer.decode(bos)!r}, and {writer} does not",
            "none if the model was trained so; style: compact and plain begin with it",
        )
    if is_chat and "strftime_now" in tokenizer.get_chat_template():
        return warn(
            "the chat template may write today's date, so a prompt is another one tomorrow",
            "if the prompt below holds a date, fix it in format.template_args",
        )
    return ok(f"{'the chat template' if is_chat else 'raw text'}, {len(bos)} tokens for BOS")


def check_prompt_length(subject: Subject) -> Finding:
    """Every prompt fits, with `max_new` tokens after it."""
    limit, prompts = subject.prompt_limit, subject.prompts
    sizes = {split: {id_: len(ids) for id_, ids in of.items()} for split, of in prompts.items()}
    long = {
        split: [f"{split} {id_}: {size} tokens" for id_, size in of.items() if size > limit]
        for split, of in sizes.items()
    }
    rows = [line for lines in long.values() for line in lines]
    every = [size for of in sizes.values() for size in of.values()]
    message = (
        f"prompts have {_spread(every)} tokens,"
        f" {'any number fits' if limit == math.inf else f'at most {limit} fit'}"
    )
    if not rows:
        return ok(message)
    if subject.recipe.lengths.too_long == "drop" and len(long["train"]) < len(sizes["train"]):
        return warn(
            f"{len(long['train'])} of {len(sizes['train'])} training prompts are too long and left"
            f" out, {len(long['dev'])} of dev and {len(long['test'])} of test count as not"
            f" answered: {message}",
            "raise lengths.max_prompt or lower lengths.max_new",
            rows,
        )
    return fail(
        f"{_share(rows, every)} are too long: {message}",
        "raise lengths.max_prompt, lower lengths.max_new, or leave them out: lengths.too_long=drop",
        rows,
    )


def check_target_length(subject: Subject) -> Finding:
    """Gold rationales with their eos fit in `max_new` tokens; those that do not are left out of
    training."""
    sizes = {row.problem.id: len(row.target_ids) for row in subject.rows}
    limit = subject.recipe.lengths.max_new
    message = f"targets have {_spread(sizes.values())} tokens with eos, at most {limit} fit"
    long = [f"{id_}: {size} tokens" for id_, size in sizes.items() if size > limit]
    if not long:
        return ok(message)
    report = fail if len(long) > MAX_LONG_TARGETS * len(sizes) else warn
    remedy = f"lengths.max_new={max(sizes.values())} keeps all"
    return report(f"{_share(long, sizes)} are too long and not trained on: {message}", remedy, long)


def check_vocabulary(subject: Subject) -> Finding:
    """The tokenizer's ids exist in the model, and it knows every word of the data."""
    size, unknown = (
        subject.policy.model.get_input_embeddings().weight.shape[0],
        subject.policy.tokenizer.unk_token_id,
    )
    outside = [row.problem.id for row in subject.rows if max(row.ids) >= size]
    if outside:
        remedy = "use the tokenizer that belongs to the model"
        return fail(
            f"{len(outside)} rows have token ids beyond the model's {size}", remedy, outside
        )
    unwritable = [row.problem.id for row in subject.rows if unknown in row.target_ids]
    if unwritable:
        return fail(
            f"{len(unwritable)} targets hold words unknown to the tokenizer",
            "the model could not write them",
            unwritable,
        )
    prompts = {
        f"{split} {id_}": ids
        for split, prompts in subject.prompts.items()
        for id_, ids in prompts.items()
    }
    unread = [name for name, ids in prompts.items() if unknown in ids]
    if unread:
        return warn(
            f"{len(unread)} prompts hold words unknown to the tokenizer",
            "the model cannot tell them apart",
            unread,
        )
    return ok(f"{len(subject.policy.tokenizer)} tokens cover prompts and targets")


def check_eos(subject: Subject) -> Finding:
    """Every target ends where sampling stops, and not before; the model can write its end token."""
    tokenizer, stop = subject.policy.tokenizer, subject.policy.stop
    end = subject.encoder.end_of(subject.encoder.format.prompt(subject.problems[0]))
    stops = ", ".join(
        [f"{tokenizer.decode([id_])!r} (id {id_})" for id_ in sorted(stop.ids)]
        + [repr(text) for text in stop.texts]
    )
    if end not in stop.ids:
        return fail(
            f"targets end in {tokenizer.decode([end])!r} (id {end}), sampling stops at {stops}",
            "use one tokenizer for both",
        )
    bad = [
        row.problem.id
        for row in subject.rows
        if stop.length(row.target_ids[:-1], subject.policy.decode) is not None
    ]
    if bad:
        return fail(
            f"{len(bad)} targets hold one of {stops} before their end",
            "take it out of the data, or out of format.stop",
            bad,
        )
    ordinary = [id_ for id_ in stop.ids if id_ not in tokenizer.all_special_ids]
    if ordinary:
        return warn(
            f"sampling stops at {tokenizer.decode(ordinary)!r}, which is no special token",
            "mend eos_token_id in the model's config or generation config",
        )
    pad = {None: "there is no pad", end: "pad is the end token"}.get(
        tokenizer.pad_token_id, f"pad is {tokenizer.pad_token!r}"
    )
    return ok(
        f"targets end in {tokenizer.decode([end])!r}, which is learned; sampling stops at {stops};"
        f" {pad}, which is never attended to or learned"
    )


# --- the model on this machine --------------------------------------------------------------------


def check_memory(subject: Subject) -> Finding:
    """Training fits in memory, as far as the model's shape tells."""
    policy, recipe = subject.policy, subject.recipe
    longest = max((len(ids) for of in subject.fitting.values() for ids in of), default=1)
    model = policy.model.get_base_model() if policy.is_lora else policy.model
    outline = Outline(
        lambda: type(model)(copy.deepcopy(model.config)), recipe.model, device=policy.device.type
    )
    problems = max(
        len(getattr(subject.splits, recipe.evaluate.split)), *map(len, subject.prompts.values())
    )
    planned = [
        training_memory(
            outline,
            stage,
            recipe.engine,
            stage_work(
                stage, recipe, prompt=longest, response=recipe.lengths.max_new, problems=problems
            ),
        )
        for stage in trainings(recipe).values()
    ]
    if not planned:
        return ok("cannot be told of stages that are not reftune's")
    memory = max(planned, key=lambda memory: memory.peak)
    parts, need, free = (
        memory.parts,
        memory.peak,
        available_bytes(policy.device) + memory.held["weights"],
    )
    message = (
        f"about {need / GIB:.1f} GiB of {free / GIB:.1f} free, most of it"
        f" {max(parts, key=lambda name: parts[name])}"
    )
    if need <= free:
        return ok(message)
    return fail(
        message,
        "lower model.micro_batch_tokens or engine.batch_size, or train adapters:"
        " model.lora.rank=16",
    )


def check_dtype(subject: Subject) -> Finding:
    """Products in the recipe's dtype are not many times slower here than in the other one."""
    policy, chosen = subject.policy, subject.recipe.model.dtype
    weight = max((p for p in policy.model.parameters() if p.dim() == 2), key=lambda p: p.numel())
    columns, inner = (min(size, PRODUCT) for size in weight.shape)
    rates = product_rates(policy.device, (PRODUCT // 4, inner, columns), seconds=0.5)
    (other,) = rates.keys() - {chosen}
    slowdown = rates[other] / rates[chosen]
    message = ", ".join(f"{name} {rate / 1e9:,.1f} GFLOP/s" for name, rate in rates.items())
    if slowdown <= MAX_SLOWDOWN:
        return ok(f"{chosen}; products here: {message}")
    return fail(
        f"products in {chosen} take {slowdown:,.0f} times as long as in {other} here: {message}",
        f"model.dtype={other}, or auto, which chooses it here",
    )


def check_logprobs(subject: Subject) -> Finding:
    """What the engine says of its samples is what the policy says of them."""
    prompts = (subject.fitting["dev"] or subject.fitting["train"])[:NUM_SAMPLES]
    params = SamplingParams(max_new_tokens=min(32, subject.recipe.lengths.max_new))
    completions = subject.recipe.engine.generate(subject.policy, prompts, params)
    batch = token_batch(
        prompts, [completion.token_ids for completion in completions], device=subject.policy.device
    )
    scored = subject.policy.score(
        batch, max_tokens=subject.recipe.model.micro_batch_tokens
    ).logprobs[batch.response_mask]
    sampled = [logprob for completion in completions for logprob in completion.logprobs]
    mismatch = _mean([abs(a - b) for a, b in zip(sampled, scored.tolist(), strict=True)])
    message = f"the engine's differ from the policy's by {mismatch:.2g} nats a token"
    if mismatch <= MAX_MISMATCH[subject.recipe.model.dtype]:
        return ok(message)
    return fail(message, "the engine does not sample from the policy; use engine=kv")


def check_time(subject: Subject) -> Finding:
    """How long the run will take on this machine, from a short measurement."""
    rows = subject.fitting_rows[:NUM_TIMED]
    if not rows:
        return ok("not known without rationales that fit")
    prompts, targets = [row.prompt_ids for row in rows], [row.target_ids for row in rows]
    speed = measure_speed(
        subject.policy,
        subject.recipe.engine,
        prompts,
        targets,
        rows=_rows_at_once(subject.recipe),
        max_tokens=subject.recipe.model.micro_batch_tokens,
    )
    lengths = Lengths(
        prompt=_mean([len(ids) for ids in prompts]), target=_mean([len(ids) for ids in targets])
    )
    seconds = stage_seconds(subject.recipe, subject.splits, lengths, speed)
    stages = [
        f"{name} {clock(seconds[name])}" if name in seconds else f"{name} not told"
        for name in subject.recipe.stages
    ]
    evaluation_s = evaluation_seconds(
        subject.recipe, subject.splits, subject.num_methods, lengths, speed
    )
    return ok(
        f"about {clock(sum(seconds.values()) + evaluation_s)}: {', '.join(stages)}, evaluation"
        f" {clock(evaluation_s)} ({speed.train:,.0f} tokens/s trained, {speed.sample:,.0f} sampled)"
    )


def _rows_at_once(recipe: Recipe) -> int:
    """In the largest step of a stage, and that the engine holds."""
    costs = [stage.cost(num_train=0, num_dev=0) for stage in recipe.stages.values()]
    sizes = [cost.batch for cost in costs if cost is not None]
    return min(
        [max(sizes, default=MEASURED_ROWS), getattr(recipe.engine, "batch_size", MEASURED_ROWS)]
    )


Check = Callable[[Subject], Finding]
CHECKS: dict[str, Check] = {
    "splits": check_splits,
    "gold_answers": check_gold_answers,
    "gold_rationales": check_gold_rationales,
    "sandbox": check_sandbox,
    "grader_refuses": check_grader_refuses,
    "reward": check_reward,
    "reward_errors": check_reward_errors,
    "prompt": check_prompt,
    "boundary": check_boundary,
    "prompt_length": check_prompt_length,
    "target_length": check_target_length,
    "vocabulary": check_vocabulary,
    "eos": check_eos,
    "memory": check_memory,
    "dtype": check_dtype,
}
MODEL_CHECKS: dict[str, Check] = {"logprobs": check_logprobs, "time": check_time}
"""Those that run the model; not run where it would crash."""


# --- what a person sees ---------------------------------------------------------------------------


def _preview(subject: Subject) -> Preview | None:
    if not subject.rows:
        return None
    row = subject.rows[0]

    def pieces(ids: Iterable[int]) -> tuple[str, ...]:
        return tuple(
            str(subject.policy.tokenizer.decode([id_], clean_up_tokenization_spaces=False))
            for id_ in ids
        )

    return Preview(
        id=row.problem.id,
        prompt=row.prompt,
        target=row.reply,
        prompt_ids=tuple(row.prompt_ids),
        target_ids=tuple(row.target_ids),
        prompt_tokens=pieces(row.prompt_ids),
        target_tokens=pieces(row.target_ids),
    )


def _finding_text(finding: Finding) -> str:
    lines = [f"{finding.level:<4}  {finding.name:<15}  {finding.message}"]
    lines += [f"      {'':<15}    {row}" for row in finding.rows]
    if finding.remedy:
        lines.append(f"      {'':<15}  → {finding.remedy}")
    return printable("\n".join(lines))


def _preview_text(preview: Preview) -> str:
    before = " ".join(repr(piece) for piece in preview.prompt_tokens[-BOUNDARY_TOKENS:])
    after = " ".join(repr(piece) for piece in preview.target_tokens[:BOUNDARY_TOKENS])
    return printable(
        f"--- {preview.id}: {len(preview.prompt_tokens)} prompt tokens,"
        f" {len(preview.target_tokens)} target tokens; ┃ is where the model goes on"
        f" ---\n{preview.prompt}┃{preview.target}\n\n… {before} ┃ {after} …\n"
        f"{' '.join(map(str, preview.prompt_ids))} ┃ {' '.join(map(str, preview.target_ids))}"
    )


def _share(part: Sized, whole: Sized) -> str:
    return f"{len(part) / len(whole):.1%}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(sizes: Iterable[int]) -> str:
    """`12 to 96 (median 31)`"""
    ordered = sorted(sizes)
    return (
        f"{ordered[0]} to {ordered[-1]} (median {ordered[len(ordered) // 2]})" if ordered else "no"
    )
