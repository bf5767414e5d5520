"""Each check finds the problem that it is for, in a few rows and a from-scratch model."""

import json
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checking import UNMEASURED, check_only
from reftune.advice.check import (
    CHECKS,
    MODEL_CHECKS,
    CheckReport,
    check_offline,
    check_recipe,
    data,
)
from reftune.advice.check.model import requests_at_once
from reftune.advice.check.tokens import check_vocabulary
from reftune.datasets import Splits, load_splits
from reftune.engines.kv import Kv
from reftune.engines.scripted import Scripted
from reftune.engines.vllm import Vllm
from reftune.errors import DataError, RecipeError, RewardError
from reftune.grading.formats.nl import Nl
from reftune.grading.formats.program import Program
from reftune.model.policy import Policy
from reftune.model.weights import load_model
from reftune.recipe import (
    Component,
    Recipe,
    ScratchTable,
    load_recipe,
    parse_recipe,
    shipped_recipes,
)
from reftune.runs.run import open_run
from reftune.stages.rollouts import collector_of
from reftune.stages.stage import Progress
from reftune.terminal.cli import main
from reftune.types import ANY_ANSWER, Answer, Completion, Graded, Problem, Verdict

MARKER = "The answer is"


class Sums(Component):
    """Sums of two one-digit numbers."""

    kind: str = "sums"
    num_train: int = 12
    num_dev: int = 3
    edit: Any = None
    """A function that changes problem number i of train."""

    def load(self, *, seed: int) -> Splits:
        train = tuple(self._edited(i, addition(i)) for i in range(self.num_train))
        return Splits(
            train=train,
            dev=tuple(replace(addition(20 + i % 12), id=f"dev-{i}") for i in range(self.num_dev)),
            test=(replace(addition(32), id="test-32"),),
            counts={"duplicate": 2},
        )

    def _edited(self, i: int, problem: Problem) -> Problem:
        return problem if self.edit is None else self.edit(i, problem)


def addition(i: int) -> Problem:
    a, b = i % 7, i % 5
    answer = Answer(kind="number", value=Fraction(a + b))
    return Problem(
        id=f"sum-{i}",
        question=f"What is {a} + {b} ?",
        answer=answer,
        rationale=f"{a} + {b} = {a + b} .",
    )


class Words(Component):
    """A natural-language format with a one-line grader."""

    kind: str = "words"
    marker_needed: bool = True

    def prompt(self, problem: Problem) -> str:
        return f"{problem.question}\n"

    def target(self, problem: Problem) -> str:
        rationale = str(problem.rationale)
        return rationale if MARKER in rationale else f"{rationale} {MARKER} {problem.answer}"

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Graded]:
        return [
            self._graded(problem, text) for problem, text in zip(problems, completions, strict=True)
        ]

    def _graded(self, problem: Problem, text: str) -> Graded:
        _, marker, value = text.rpartition(MARKER)
        if self.marker_needed and not marker:
            return Graded(verdict=Verdict.NO_ANSWER, value=None, reason="no marker")
        right = value.strip() == str(problem.answer)
        return Graded(
            verdict=Verdict.CORRECT if right else Verdict.WRONG,
            value=value.strip(),
            reason=f"{value.strip()!r}",
        )


class Pay(Component):
    kind: str = "pay"
    right: Any = 1.0
    wrong: float = 0.1
    broken: bool = False

    def __call__(
        self,
        problems: Sequence[Problem],
        completions: Sequence[Completion],
        graded: Sequence[Graded],
    ) -> list[float | None]:
        if self.broken:
            raise RewardError("problem sum-0: score: division by zero")
        prices = {Verdict.CORRECT: self.right, Verdict.WRONG: self.wrong}
        return [prices.get(grade.verdict, 0.0) for grade in graded]


MODEL = {"scratch": ScratchTable(hidden_size=32, layers=1, heads=2, context=64), "dtype": "float32"}


def one_step_from(init: str) -> dict[str, Any]:
    optimizer = {"learning_rate": 1e-3}
    return {"kind": "rl", "init": init, "steps": 1, "prompts": 2, "optimizer": optimizer}


def recipe(**changes: Any) -> Recipe:
    stages = {
        "sft": {"kind": "sft", "epochs": 1, "batch_size": 4, "optimizer": {"learning_rate": 1e-3}}
    }
    tables = {
        "name": "tiny",
        "run_dir": "/nonexistent",
        "model": MODEL,
        "engine": {"kind": "kv", "batch_size": 128},
        "lengths": {"max_new": 24},
        "dataset": Sums(kind="sums"),
        "format": Words(kind="words"),
        "reward": Pay(kind="pay"),
        "stages": stages,
    }
    return Recipe.model_validate({**tables, **changes})


def checked(**changes: Any) -> CheckReport:
    return check_recipe(recipe(**changes))


def finding(name: str, **changes: Any) -> Any:
    """The finding of one check; the others are not run."""
    (found,) = check_only(recipe(**changes), {name}).findings
    return found


@pytest.fixture(autouse=True)
def product_rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The matmul rates that `check` measures on this machine, without measuring."""
    rates = {"float32": 1e11, "bfloat16": 1e11}
    monkeypatch.setattr(
        "reftune.advice.check.model.product_rates", lambda *args, **kwargs: dict(rates)
    )
    return rates


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    """Use one thread: models this small gain nothing from a second."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def sound() -> CheckReport:
    return checked()


def test_a_sound_recipe_passes_every_check(sound: CheckReport):
    # only two findings: three dev problems are too few to choose a model, and the one-line grader
    # reads few spellings
    levels = {found.name: found.level for found in sound.findings if found.level != "ok"}
    assert levels == {"splits": "warn", "reward_errors": "warn"}
    assert [found.name for found in sound.findings] == [*CHECKS, *MODEL_CHECKS]
    assert not sound.failed


def test_the_report_shows_the_boundary_and_sampled_solutions(sound: CheckReport):
    assert sound.preview is not None
    assert (sound.preview.prompt, sound.preview.target) == (
        "What is 0 + 0 ?\n",
        "0 + 0 = 0 . The answer is 0",
    )
    assert sound.preview.target_tokens[-1] == "<eos>"
    text = sound.to_text()
    assert "What is 0 + 0 ?\n┃0 + 0 = 0 . The answer is 0" in text
    assert text.count("--- sampled by base ---") == 3
    assert sound.samples[0]["verdict"] in {verdict.value for verdict in Verdict}


def test_the_kinds_of_gold_are_listed_with_examples(sound: CheckReport):
    (numbers,) = sound.golds
    assert (numbers.kind, numbers.count) == ("number", 16)
    assert len(numbers.examples) == 3
    document = json.loads(sound.to_json())
    assert document["golds"][0]["examples"][0] == {"raw": "0", "read": "0"}
    assert "golds  number 16: 0 → 0, 2 → 2" in sound.to_text()


def test_a_gold_that_was_read_as_something_else_is_shown_first():
    def spelled(i: int, problem: Problem) -> Problem:
        return replace(problem, gold_text=f"{problem.answer}.0 apples" if i == 9 else "")

    (numbers,) = check_only(recipe(dataset=Sums(edit=spelled)), ()).golds
    assert (numbers.examples[0].raw, numbers.examples[0].read) == ("6.0 apples", "6")


def test_the_start_model_is_sampled_and_a_weak_one_is_reported():
    rl = {"kind": "rl", "init": "base", "steps": 1, "prompts": 2, "samples": 2}
    stages = {"reft": {**rl, "optimizer": {"learning_rate": 1e-3}}}
    found = finding("accuracy", dataset=Sums(num_dev=40), stages=stages)
    assert found.message.startswith(
        "at temperature 1 the initial model solves 0 of 32 dev questions"
    )
    assert found.level == "warn", "0 of 32 is below 20% with 95% certainty: at most 11%"
    control = {"sft": recipe().stages["sft"], **stages}
    assert finding("accuracy", dataset=Sums(num_dev=40), stages=control).level == "warn"
    warmed = finding("accuracy", dataset=Sums(num_dev=40))
    assert warmed.level == "ok"
    assert warmed.message.endswith("a warm-up comes first")


def test_without_a_correct_solution_even_few_questions_are_a_warning():
    # 0 of 7 may be up to 35%: the interval alone would not warn
    stages = {"reft": one_step_from("base")}
    found = finding("accuracy", dataset=Sums(num_train=4), stages=stages)
    assert "solves 0 of 7 dev and training questions (0%, 95% interval 0% to 35%)" in found.message
    assert found.level == "warn"


@pytest.mark.parametrize(
    ("format", "text", "remedy"),
    [
        (Words(kind="words"), "15", "show its form with an example in the prompt"),
        (Nl(style="plain"), "15", "show its form with an example in format.examples"),
        (Words(kind="words"), " The answer is 0", "start RL from a warm-up"),
    ],
)
def test_the_remedy_for_solutions_without_an_answer_is_an_example(format, text, remedy):
    engine = {"kind": "scripted", "texts": [text]}
    stages = {"reft": one_step_from("base")}
    dataset = Sums(num_dev=32)  # none of whose sums is 0
    found = finding("accuracy", dataset=dataset, format=format, engine=engine, stages=stages)
    assert remedy in found.remedy.removeprefix("most solutions state no answer: ").split(";")[0]


def test_questions_that_are_too_long_to_be_asked_are_not_sampled():
    class LongDev(Sums):
        def load(self, *, seed: int) -> Splits:
            splits = super().load(seed=seed)
            dev = tuple(replace(p, question=p.question * 9) for p in splits.dev)
            return replace(splits, dev=dev)

    lengths = {"max_new": 10, "max_prompt": 20, "too_long": "drop"}
    stages = {"reft": one_step_from("base")}
    found = finding("accuracy", dataset=LongDev(num_train=4), stages=stages, lengths=lengths)
    assert "solves 0 of 4 training questions" in found.message


def test_the_json_report_has_the_same_content(sound: CheckReport):
    document = json.loads(sound.to_json())
    assert document["ok"] is True
    assert [found["name"] for found in document["findings"]] == [
        found.name for found in sound.findings
    ]
    assert len(document["samples"]) == 3


def test_targets_that_state_another_answer_than_the_gold_are_listed_and_refused():
    class Slipping(Words):
        def target(self, problem: Problem) -> str:
            text = super().target(problem)
            return text.replace("The answer is 2", "The answer is 9") if "1 + 1" in text else text

    # one of 12 states 9 while its gold is 2: 11/12 = 91.67% are right, below 99%
    found = finding("gold_rationales", format=Slipping(kind="words"))
    assert found.level == "fail"
    assert found.message.startswith("91.67% of 12 gold rationales are graded correct, below 99%")
    assert found.rows == ("sum-1: wrong: '9'",)


@pytest.mark.parametrize(
    ("rationale", "reason"),
    [
        ("1 + 1 = 9 . The answer is 9", "rationale_disagrees"),
        ("def solution():\n    return 9", "program_disagrees"),
    ],
)
def test_rationales_of_ones_own_dataset_that_contradict_their_gold_are_dropped(
    rationale: str, reason: str
):
    def contradict(i: int, problem: Problem) -> Problem:
        return replace(problem, rationale=rationale) if i == 1 else problem

    splits = load_splits(recipe(dataset=Sums(kind="sums", edit=contradict)))
    assert "sum-1" not in [problem.id for problem in splits.train]
    assert len(splits.train) == 11
    assert splits.counts == {"duplicate": 2, reason: 1}


def test_a_waived_check_only_warns():
    class Deaf(Words):
        def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Graded]:
            return [Graded(verdict=Verdict.WRONG, value=None, reason="deaf") for _ in problems]

    failing, deaf = {"gold_answers", "gold_rationales", "reward"}, Deaf(kind="words")
    assert {f.name for f in check_only(recipe(format=deaf), UNMEASURED).failed} == failing
    waiving = recipe(format=deaf, check={"waive": ["gold_answers", "gold_rationales"]})
    report = check_only(waiving, failing)
    assert [f.name for f in report.failed] == ["reward"]
    assert next(f for f in report.findings if f.name == "gold_answers").message.endswith("(waived)")


def test_an_unknown_waiver_is_refused_with_the_nearest_name():
    with pytest.raises(
        RecipeError,
        match=r"check\.waive: gold_rational: no such check; did you mean gold_rationales\?",
    ):
        checked(check={"waive": ["gold_rational"]})


def test_a_grader_that_accepts_a_bare_answer_is_reported():
    # twelve golds stated without any reasoning are accepted, since no marker is required; an empty
    # text is not
    found = finding("grader_refuses", format=Words(kind="words", marker_needed=False))
    assert found.level == "warn"
    assert "the bare answer (12)" in found.message


def test_a_constant_or_failing_reward_is_rejected():
    assert finding("reward", reward=Pay(kind="pay", wrong=1.0)).level == "fail"
    found = finding("reward", reward=Pay(kind="pay", broken=True))
    assert (found.level, found.message) == ("fail", "problem sum-0: score: division by zero")
    found = finding("reward", reward=Pay(kind="pay", right="1"))
    assert (found.level, found.remedy) == ("fail", "fix the reward function")
    assert found.message == "reward pay: sample sum-0: expected a finite number or None, got '1'"
    # 12 gold solutions earn 1; shifted by one, only neighbours with equal answers are right
    assert finding("reward").message.startswith(
        "a gold solution earns 1, another problem's solution earns 0.1"
    )


def test_prompts_over_the_limit_are_refused_and_the_model_is_not_run():
    # "What is 0 + 0 ?\n" is What, is, 0, +, 0, ?, newline: seven tokens and more than the five
    # allowed
    report = checked(lengths={"max_prompt": 5, "max_new": 24})
    found = next(f for f in report.findings if f.name == "prompt_length")
    assert found.level == "fail"
    assert found.rows[0].startswith("train sum-0: ")
    assert report.samples == ()
    assert not {f.name for f in report.findings} & set(MODEL_CHECKS)


def test_the_context_limits_prompts_too():
    # a context of 64 leaves 2 tokens for the prompt before 62 new ones
    assert finding("prompt_length", lengths={"max_new": 62}).level == "fail"


def test_targets_over_the_limit_are_counted_with_the_limit_that_would_keep_them():
    found = finding("target_length", lengths={"max_new": 3})
    assert found.level == "fail"
    assert found.message.startswith("100.0% of targets are too long")
    (longest,) = {int(row.split()[1]) for row in found.rows}
    assert found.remedy == f"lengths.max_new={longest} keeps all"


def test_an_eos_inside_a_target_is_found():
    def inject(i: int, problem: Problem) -> Problem:
        return replace(problem, rationale=f"{problem.rationale} <eos>") if i == 2 else problem

    found = finding("eos", dataset=Sums(kind="sums", edit=inject))
    assert (found.level, found.rows) == ("fail", ("sum-2",))


def test_words_of_dev_that_the_vocabulary_lacks_are_found():
    class Foreign(Sums):
        def load(self, *, seed: int) -> Splits:
            splits = super().load(seed=seed)
            return replace(
                splits,
                dev=(*splits.dev, replace(addition(1), id="odd", question="Combien font 1 + 1 ?")),
            )

    found = finding("vocabulary", dataset=Foreign(kind="sums"))
    assert (found.level, found.rows) == ("warn", ("dev odd",))


def test_a_tokenizer_that_calls_its_end_token_unknown_knows_every_word():
    class Tokens(list):  # GPT2Tokenizer: unk, bos and eos are all <|endoftext|>
        unk_token_id = bos_token_id = 1

    embeddings = SimpleNamespace(weight=torch.zeros(9, 1))
    policy = SimpleNamespace(
        tokenizer=Tokens("abcdefghi"),
        stop=SimpleNamespace(ids=frozenset([1])),
        model=SimpleNamespace(get_input_embeddings=lambda: embeddings),
    )
    row = SimpleNamespace(problem=addition(0), ids=[1, 4, 5, 1], target_ids=[5, 1])
    subject: Any = SimpleNamespace(policy=policy, rows=[row], prompts={"dev": {"a": [1, 4]}})
    assert check_vocabulary(subject).level == "ok"


def test_rows_with_equal_answers_do_not_blame_the_reward():
    def same(i: int, problem: Problem) -> Problem:
        return replace(addition(0), id=problem.id)

    found = finding("reward", dataset=Sums(kind="sums", edit=same))
    assert (found.level, found.message) == (
        "ok",
        "a gold solution earns 1, an empty completion earns 0",
    )


def test_a_colocated_engines_share_counts_as_used_memory():
    whole = Vllm(kind="vllm", memory=0.9)
    found = finding("memory", engine=whole)
    assert found.message.endswith("the largest part for engine's copy")


def test_without_rationales_the_report_shows_a_prompt():
    def strip(i: int, problem: Problem) -> Problem:
        return replace(problem, rationale=None)

    stages = {"reft": one_step_from("base")}
    report = checked(dataset=Sums(kind="sums", edit=strip), stages=stages)
    messages = {found.name: found.message for found in report.findings}
    assert messages["target_length"] == "there are no targets"
    assert messages["time"].startswith("about 0:0")
    assert messages["time"].endswith("solutions stay as long as those of the initial model")
    assert report.preview.prompt == "What is 0 + 0 ?\n" and not report.preview.target_ids
    assert "; ┃ marks where the model continues ---\nWhat is 0 + 0 ?\n┃\n" in report.to_text()


def test_supervised_stages_without_rationales_are_refused():
    def strip(i: int, problem: Problem) -> Problem:
        return replace(problem, rationale=None)

    found = finding("splits", dataset=Sums(kind="sums", edit=strip))
    assert (found.level, found.remedy) == ("fail", "supervised stages need rationales")


GENERATED = {"kind": "word_problems", "rationale": "nl", "train": 20, "dev": 5, "test": 5}
READ = {"kind": "jsonl", "train": "questions.jsonl", "test": "questions.jsonl"}


@pytest.mark.parametrize(
    ("dataset", "keys"),
    [
        (GENERATED, " (dataset.dev)"),
        (READ, " (dataset.dev_size)"),
        ({**READ, "dev": "dev.jsonl"}, " (dataset.dev)"),
        (
            {"kind": "mixture", "parts": {"a": {"dataset": READ}, "b": {"dataset": GENERATED}}},
            " (dataset.parts.a.dataset.dev_size and dataset.parts.b.dataset.dev)",
        ),
        (Sums(kind="sums"), ""),
    ],
)
def test_few_dev_problems_are_a_warning_that_names_the_keys(dataset, keys):
    few = Sums(kind="sums").load(seed=0)
    subject = SimpleNamespace(splits=few, rows=few.train, recipe=recipe(dataset=dataset))
    found = data.check_splits(subject)
    remedy = f"models are chosen on dev: use 100 dev problems or more{keys}"
    assert (found.level, found.remedy) == ("warn", remedy)


def test_an_engine_that_does_not_sample_from_the_policy_is_found():
    # the scripted engine claims log-probabilities of 0; a fresh model gives each of ~30 words about
    # ln 30 = 3.4 nats
    found = finding("logprobs", engine={"kind": "scripted", "texts": ["The answer is 3"]})
    assert found.level == "fail"


def test_memory_that_the_machine_does_not_have_is_refused(monkeypatch):
    assert finding("memory").level == "ok"
    monkeypatch.setattr("reftune.advice.check.model.available_bytes", lambda device: 1e5)
    found = finding("memory")
    assert found.level == "fail"
    assert "the largest part for activations" in found.message


def test_memory_counts_every_sample_of_a_problem():
    rl = {"kind": "rl", "init": "sft", "steps": 1, "prompts": 4, "samples": 6, "value_prefit": 9}
    rl["optimizer"] = {"learning_rate": 1e-3}
    plain, sampling = recipe(), recipe(evaluate={"samples": 5})
    learning = recipe(stages={"sft": plain.stages["sft"].model_dump(), "reft": rl})
    splits = load_splits(plain)  # 3 dev problems, 1 test problem
    asked = [requests_at_once(each, splits) for each in (plain, sampling, learning)]
    assert asked == [3, 5, 24]


def test_tasks_that_state_no_gold_have_none_to_grade():
    # three dev problems and one test problem keep their gold; the twelve of train have none
    def untold(i: int, problem: Problem) -> Problem:
        return replace(
            problem, answer=ANY_ANSWER, rationale=None, scorer=lambda answer: float(answer == "5")
        )

    tables = {"dataset": Sums(kind="sums", edit=untold), "stages": {"reft": one_step_from("base")}}
    report = check_only(recipe(**tables), UNMEASURED)
    messages = {found.name: found.message for found in report.findings}
    assert messages["gold_answers"] == "100.00% of 4 gold answers are graded correct"
    assert messages["gold_rationales"] == "there are no gold rationales"
    assert not report.failed


@pytest.mark.parametrize("kind", ["nl", "program"])
def test_gold_answers_are_stated_as_the_format_reads_them(kind: str):
    dataset = {
        "kind": "word_problems",
        "rationale": kind,
        "train": 20,
        "dev": 5,
        "test": 5,
        "operations": [0, 1],
    }
    found = finding(
        "gold_answers", dataset=dataset, format={"kind": kind}, reward={"kind": "outcome"}
    )
    assert found.message == "100.00% of 30 gold answers are graded correct"


def test_the_command_exits_with_2_if_a_check_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, sound: CheckReport
):
    monkeypatch.setattr("reftune.terminal.cli._load", lambda name, overrides: recipe())
    failed = replace(sound.findings[0], level="fail", message="0 train", remedy="give some")
    reports = [sound, replace(sound, findings=(failed, *sound.findings[1:]))]
    monkeypatch.setattr("reftune.advice.check.check_recipe", lambda recipe: reports.pop())
    for status, err in ((2, f"check failed: {failed.name}: 0 train; give some\n"), (0, "")):
        with pytest.raises(SystemExit) as caught:
            main(["check", "tiny.yaml", "--json"])
        assert caught.value.code == status
        captured = capsys.readouterr()
        assert captured.err == err
        assert json.loads(captured.out)["ok"] is (status == 0)


def test_every_finding_is_one_line(sound: CheckReport):
    assert all(len(found.message.splitlines()) == 1 for found in sound.findings)


class PaysTheWord(Component):
    """Rewards every text that contains the word "answer"."""

    kind: str = "word"

    def __call__(
        self,
        problems: Sequence[Problem],
        completions: Sequence[Completion],
        graded: Sequence[Graded],
    ) -> list[float | None]:
        return [float("answer" in completion.text) for completion in completions]


def test_a_reward_is_tested_on_gold_solutions_made_wrong_and_rewritten():
    # Words reads only its own spelling: 12 rows × full stop, bold, currency, unit, decimal
    found = finding("reward_errors")
    assert found.level == "warn"
    assert "false positives 0 of" in found.message and "false negatives 60 of 60" in found.message
    assert "false negative: a unit: 12 of 12" in found.rows
    robust = finding("reward_errors", format={"kind": "nl"})
    assert (
        robust.level == "ok"
        and "false negatives 0 of 60 (0.0%, 95% interval up to 6.0%)" in robust.message
    )


def test_a_reward_for_wrong_answers_is_rejected():
    found = finding("reward_errors", format={"kind": "nl"}, reward=PaysTheWord(kind="word"))
    assert found.level == "fail" and found.message.startswith("false positives")
    assert "false positive: off by one: 12 of 12" in found.rows


@pytest.mark.parametrize(("grading", "robust"), [("robust", False), ("paper", True)])
def test_the_remedy_for_a_reward_is_no_grading_that_the_recipe_has(grading: str, robust: bool):
    format = {"kind": "nl", "grading": grading}
    found = finding("reward_errors", format=format, reward=PaysTheWord(kind="word"))
    assert found.level == "fail" and found.remedy.startswith("this reward accepts wrong answers")
    assert ("choose format.grading=robust" in found.remedy) is robust


@pytest.mark.parametrize(("chosen", "other"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_dtype_many_times_slower_than_the_other_is_refused_and_the_model_not_run(
    chosen, other, product_rates
):
    product_rates[chosen], product_rates[other] = 1.2e9, 150e9
    model = {**MODEL, "dtype": chosen}
    report = check_only(recipe(model=model), {"dtype", *MODEL_CHECKS} - {"time"})
    (found,) = [f for f in report.findings if f.name == "dtype"]
    assert (
        found.level == "fail" and f"{chosen} take 125 times as long as in {other}" in found.message
    )
    assert f"model.dtype={other}" in found.remedy
    assert report.samples == () and "logprobs" not in {f.name for f in report.findings}
    waived = check_only(recipe(model=model, check={"waive": ["dtype"]}), {"dtype", "accuracy"})
    (found,) = [f for f in waived.findings if f.name == "dtype"]
    assert found.level == "warn" and found.message.endswith("(waived)") and len(waived.samples) == 3


def test_a_dtype_a_few_times_slower_is_left_to_the_user(product_rates):
    product_rates["float32"] = 7 * product_rates["bfloat16"]
    assert finding("dtype", model={**MODEL, "dtype": "bfloat16"}).level == "ok"


def test_the_folder_of_another_recipe_fails_and_its_models_are_not_checked(tmp_path):
    # the folder has a finished warm-up, but of a recipe with another model
    def folder_of(hidden_size: int) -> Recipe:
        shape = ScratchTable(hidden_size=hidden_size, layers=1, heads=2, context=64)
        return recipe(
            run_dir=str(tmp_path / "run"),
            model={"scratch": shape, "dtype": "float32", "micro_batch_tokens": 512},
            stages={**recipe().stages, "reft": one_step_from("sft")},
        )

    own, other = folder_of(32), folder_of(16)
    with open_run(own, Progress()) as run:
        run.train("sft")
    checked = check_only(own, {"run_folder"})
    assert (checked.method, [found.level for found in checked.findings]) == ("sft", ["ok"])
    checked = check_only(other, {"run_folder"})
    assert checked.method == "base"
    (found,) = checked.failed
    assert found.message == (
        f"{tmp_path / 'run'}: belongs to another recipe: model.scratch.hidden_size was 32, now 16"
    )
    assert found.remedy == "choose another run_dir"


def test_a_run_folder_with_other_problems_fails(tmp_path):
    own = recipe(run_dir=str(tmp_path / "run"))
    with open_run(own, Progress()) as run:
        hashes = json.loads(run.folder.data.read_text())["hashes"]
    run.folder.data.write_text(json.dumps({"hashes": {**hashes, "dev": "of others"}}))
    (found,) = check_only(own, {"run_folder"}).failed
    changed = "the dev problems have changed since this run began"
    assert found.message == f"{tmp_path / 'run'}: {changed}"
    assert found.remedy == "expected the same data, or another run_dir"


def test_a_file_in_place_of_the_run_folder_fails(tmp_path):
    (tmp_path / "run").touch()
    (found,) = check_only(recipe(run_dir=str(tmp_path / "run")), {"run_folder"}).failed
    assert found.message == f"{tmp_path / 'run'}: cannot be a run folder: a file is in its place"
    assert found.remedy == "choose another run_dir"


# --- instruct models ------------------------------------------------------------------------------


def asking(tmp_path, name: str, **format_keys) -> Recipe:
    """A run of a family's model with a few questions in words."""
    from chat_families import save_model

    content = {
        "name": "chat",
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(save_model(name, tmp_path / "model"))},
        "dataset": {"kind": f"{__file__}:Sums"},
        "format": {"kind": "nl", **format_keys},
        "lengths": {"max_new": 64},
        "stages": {"reft": one_step_from("base")},
    }
    return parse_recipe(content)


def finding_on(tmp_path, name: str, check: str, **format_keys) -> Any:
    """The finding of one check on such a run, whose sizes are given so that nothing is traced."""
    plain = asking(tmp_path, name, **format_keys)
    model = plain.model.model_copy(update={"micro_batch_tokens": 512, "dtype": "float32"})
    given = plain.model_copy(update={"model": model, "engine": Kv(batch_size=8)})
    (found,) = check_only(given, {check}).findings
    return found


def named(report: CheckReport, name: str) -> Any:
    return next(found for found in report.findings if found.name == name)


def test_raw_text_to_a_tokenizer_with_a_template_is_a_warning(tmp_path):
    prompt = finding_on(tmp_path, "qwen2.5", "prompt")
    assert prompt.level == "warn" and "the model gets raw text" in prompt.message


@pytest.mark.parametrize("mark", ["<|im_start|>user\n", "[INST] ", "<|end_of_text|>"])
def test_questions_with_tokens_of_a_chat_template_are_a_warning(tmp_path, mark):
    def templated(i: int, problem: Problem) -> Problem:
        return replace(problem, question=f"{mark}{problem.question}") if i else problem

    def found(style: str) -> Any:
        run = asking(tmp_path / style, "llama3", style=style)
        model = run.model.model_copy(update={"micro_batch_tokens": 512, "dtype": "float32"})
        changes = {"model": model, "engine": Kv(batch_size=8), "dataset": Sums(edit=templated)}
        return check_only(run.model_copy(update=changes), {"prompt"}).findings[0]

    assert found("chat").level == "warn"
    assert found("chat").message.startswith("11 questions with special tokens")
    assert "the model gets raw text" not in found("plain").message


def test_the_report_holds_the_exact_ids_of_a_chat_prompt_and_target(tmp_path):
    report = check_recipe(asking(tmp_path, "llama3", style="chat", system="Add."))
    assert named(report, "prompt").level == named(report, "boundary").level == "ok"
    shown = report.preview
    assert shown.prompt.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>")
    assert "".join(shown.prompt_tokens) == shown.prompt
    assert shown.target == "0 + 0 = 0 .\nThe answer is 0<|eot_id|>"
    assert " ┃ ".join(" ".join(map(str, ids)) for ids in (shown.prompt_ids, shown.target_ids)) in (
        report.to_text()
    )
    stops = named(report, "eos").message
    assert all(f"'{token}'" in stops for token in ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"))


def test_the_report_shows_that_a_thought_opened_by_the_prompt_is_closed(tmp_path):
    report = check_recipe(asking(tmp_path, "r1", style="chat"))
    assert report.preview.prompt.endswith("<|Assistant|><think>\n")
    assert report.preview.target == "\n</think>\n\n0 + 0 = 0 .\nThe answer is 0<|end|>"
    assert named(report, "prompt").level == named(report, "gold_rationales").level == "ok"


def test_a_solution_inside_the_prompt_s_thought_is_no_answer_and_is_kept_as_it_is(tmp_path):
    recipe = asking(tmp_path, "r1", style="chat")
    policy = Policy(*load_model(recipe.model))
    inside, after = "The answer is 0", "\n</think>\n\nThe answer is 0"
    recipe = recipe.model_copy(update={"engine": Scripted(texts=[inside, after])})
    solved = collector_of(recipe, policy).solve(policy, [addition(0)] * 2)
    assert [completion.text for completion in solved.completions] == [inside, after]
    assert [graded.verdict for graded in solved.graded] == [Verdict.NO_ANSWER, Verdict.CORRECT]


def test_bos_that_is_doubled_or_missing_is_a_warning(tmp_path):
    from chat_families import FAMILIES

    paper = finding_on(tmp_path / "1", "gemma", "prompt", style="paper")
    assert paper.level == "warn"
    template = FAMILIES["gemma"].template
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "gemma", replace(FAMILIES["gemma"], template="<bos>" + template))
        doubled = finding_on(tmp_path / "2", "gemma", "prompt", style="chat")
        assert (doubled.level, doubled.message) == ("warn", "prompts begin with two BOS tokens")
        silent = template.removeprefix("{{ bos_token }}")
        patch.setitem(FAMILIES, "gemma", replace(FAMILIES["gemma"], template=silent))
        missing = finding_on(tmp_path / "3", "gemma", "prompt", style="chat")
        assert missing.level == "warn"
        assert "adds '<bos>' at the start, but the chat template does not" in missing.message


def test_a_template_without_a_generation_prompt_is_a_warning(tmp_path):
    from chat_families import FAMILIES

    family = FAMILIES["qwen2.5"]
    without = family.template.partition("{%- if add_generation_prompt %}")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "qwen2.5", replace(family, template=without))
        prompt = finding_on(tmp_path / "1", "qwen2.5", "prompt", style="chat")
    assert prompt.level == "warn"
    assert "the model must write '<|im_start|>assistant\\n' itself" in prompt.message
    # Mistral's template has none either, but writes nothing there
    assert finding_on(tmp_path / "2", "mistral", "prompt", style="chat").level == "ok"


def test_an_end_token_that_is_an_ordinary_word_is_a_warning(tmp_path):
    from chat_families import FAMILIES

    with pytest.MonkeyPatch.context() as patch:
        family = FAMILIES["qwen2.5"]
        patch.setitem(FAMILIES, "qwen2.5", replace(family, ends=(*family.ends, "a")))
        eos = finding_on(tmp_path, "qwen2.5", "eos", style="chat")
    assert eos.level == "warn" and "stops at 'a', which is not a special token" in eos.message


class Own(Nl):
    """Worked solutions in words, as a person derives a format from ours."""

    kind: str = "own"


def test_a_format_derived_from_words_is_checked_as_words() -> None:
    for name in ("gold_answers", "gold_rationales"):
        assert finding(name, format=Own(kind="own")).level == "ok"


def programs(*bodies: str) -> Any:
    def edit(i: int, problem: Problem) -> Problem:
        code = bodies[i % len(bodies)].format(problem.answer)
        return replace(problem, rationale=code)

    return edit


PLAIN = "def solution():\n    return {}"
YIELDS = "def solution():\n    def parts():\n        yield {}\n    return sum(parts())"
NUMPY = "import numpy as np\ndef solution():\n    return int(np.sum([{}]))"


@pytest.mark.parametrize(
    ("bodies", "sandbox", "level", "told"),
    [
        ((PLAIN,), "monty", "ok", "monty runs all"),
        ((PLAIN, YIELDS), "monty", "warn", "yield expressions"),
        ((PLAIN, YIELDS), "auto", "ok", "yield expressions"),
        ((PLAIN, NUMPY), "auto", "warn", "numpy"),
        ((PLAIN, NUMPY), "subprocess", "ok", "numpy"),
    ],
)
def test_gold_programs_that_need_the_subprocess_are_counted(
    bodies: tuple[str, ...], sandbox: str, level: str, told: str
) -> None:
    format = Program(sandbox=sandbox, allow_unisolated=True)  # type: ignore[arg-type]
    dataset = Sums(kind="sums", edit=programs(*bodies))
    found = finding("sandbox", dataset=dataset, format=format, lengths={"max_new": 60})
    assert found.level == level
    assert told in found.message
    if level == "warn":
        assert found.remedy == f"set format.sandbox={'subprocess' if told == 'numpy' else 'auto'}"


def test_a_recipe_in_chat_style_is_checked_without_its_model():
    thinking = ["format.template_args={enable_thinking: false}"]
    recipe = load_recipe(shipped_recipes() / "instruct" / "lora.yaml", thinking)
    assert check_offline(recipe).failed == []


EXAMPLES = shipped_recipes() / "paper" / "examples"
OWN = {"kind": "gsm8k", "rationale": "nl", "train": str(EXAMPLES / "gsm8k"), "dev_size": 2}


LEFT_OUT = "is not on this machine, and is left out"
REPLACED = "is not on this machine; 10 examples that come with reftune replace it"


@pytest.mark.parametrize(
    ("dataset", "missing"),
    [
        ({**OWN, "dev": "no/dev"}, f"no/dev {LEFT_OUT}"),
        ({**OWN, "test": "no/test", "dev": "no/dev"}, f"no/dev {LEFT_OUT}; no/test {LEFT_OUT}"),
        (
            {
                "kind": "mixture",
                "parts": {
                    "a": {"dataset": {**OWN, "train": "no/a"}},
                    "b": {"dataset": OWN},
                    "c": {"dataset": {"kind": "svamp", "rationale": "nl", "train": "no/c"}},
                },
            },
            f"no/a {REPLACED}; no/c {REPLACED}",
        ),
        (
            {
                "kind": "mixture",
                "parts": {name: {"dataset": {**OWN, "train": name}, "share": 0.5} for name in "ab"},
            },
            f"a {REPLACED}; b {REPLACED}",
        ),
        ({**OWN, "train": "x", "test": "x", "dev": "y"}, f"x {REPLACED}; y {LEFT_OUT}"),
        (OWN, "the recipe's own data"),
    ],
)
def test_the_offline_check_downloads_no_dataset(dataset, missing, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("a download"))
    recipe = load_recipe(shipped_recipes() / "instruct" / "lora.yaml")
    recipe = parse_recipe({**json.loads(recipe.model_dump_json()), "dataset": dataset})
    report = check_offline(recipe)
    assert report.findings[0].message == missing


def test_the_offline_check_reads_training_data_on_this_machine_whatever_else_is_missing(tmp_path):
    rows = [{"question": f"{n} + 1?", "answer": n + 1, "rationale": f"{n}."} for n in range(90)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = {"kind": "jsonl", "train": str(tmp_path / "own.jsonl"), "dev_size": 8}
    recipe = load_recipe(shipped_recipes() / "instruct" / "lora.yaml")
    dumped = json.loads(recipe.model_dump_json())
    recipe = parse_recipe({**dumped, "dataset": {**dataset, "test": "owner/name"}})
    report = check_offline(recipe)
    assert report.findings[0].message.startswith("owner/name is not on this machine")
    gold = next(found for found in report.findings if found.name == "gold_answers")
    assert "90" in gold.message, gold.message
    with pytest.raises(DataError, match="no such file"):
        check_offline(parse_recipe({**dumped, "dataset": {**dataset, "test": "./tset.jsonl"}}))


def test_the_offline_check_names_the_source_that_has_no_examples():
    dataset = {"a": {"dataset": OWN}, "b": {"dataset": {"kind": "jsonl", "train": "no/b"}}}
    recipe = load_recipe(shipped_recipes() / "instruct" / "lora.yaml")
    dumped = json.loads(recipe.model_dump_json())
    recipe = parse_recipe({**dumped, "dataset": {"kind": "mixture", "parts": dataset}})
    with pytest.raises(DataError, match=r"^dataset\.parts\.b\.dataset\.train: no/b is not on this"):
        check_offline(recipe)
