"""The rewards of rollouts."""

from __future__ import annotations

import json
import math
import pickle
import signal
from fractions import Fraction
from pathlib import Path

import pytest
from pydantic import ValidationError

from reftune.errors import RewardError
from reftune.grading.rewards import Reward
from reftune.grading.rewards.outcome import Outcome
from reftune.recipe import load_component
from reftune.types import Answer, Completion, Graded, Problem, Verdict

FIVE = Answer(kind="number", value=Fraction(5))


def problem(id: str, answer: Answer = FIVE, **columns: object) -> Problem:
    return Problem(id=id, question=f"question {id}", answer=answer, columns=columns)


def completion(text: str) -> Completion:
    return Completion(token_ids=(1, 2), text=text, logprobs=(-1.0, -1.0), finish_reason="eos")


def graded(verdict: Verdict, value: str | None = None) -> Graded:
    return Graded(verdict=verdict, value=value, reason="because")


def paid(reward: Reward, *problems: Problem) -> list[float | None]:
    """Rewards of one completion per problem, "text ID", all graded WRONG."""
    completions = [completion(f"text {each.id}") for each in problems]
    return reward(problems, completions, [graded(Verdict.WRONG, "4")] * len(problems))


# --- outcome --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "reward"),
    [
        (Verdict.CORRECT, 1.0),
        (Verdict.WRONG, 0.1),
        (Verdict.NO_ANSWER, 0.0),
        (Verdict.ERROR, 0.0),
        (Verdict.TIMEOUT, 0.0),
        (Verdict.MEMORY, 0.0),
        (Verdict.FORBIDDEN, 0.0),
    ],
)
def test_a_verdict_is_rewarded_as_in_the_paper(verdict: Verdict, reward: float) -> None:
    assert Outcome()([problem("a")], [completion("")], [graded(verdict)]) == [reward]


def test_a_wrong_choice_earns_its_part_only_where_asked() -> None:
    item = problem("a", Answer(kind="choice", value="c"))
    assert paid(Outcome(), item) == [0.0]
    assert paid(Outcome(partial_on_choices=True), item) == [0.1]


def test_the_prices_are_recipe_keys() -> None:
    reward = load_component(
        {"kind": "outcome", "correct": 2, "partial": 0, "wrong": -1}, group="rewards"
    )
    grades = [graded(Verdict.CORRECT), graded(Verdict.WRONG), graded(Verdict.ERROR)]
    assert reward([problem("a")] * 3, [completion("")] * 3, grades) == [2.0, 0.0, -1.0]


# --- a user's function ----------------------------------------------------------------------------


def reward_from(folder: Path, source: str) -> Reward:
    file = folder / "my_reward.py"
    file.write_text(source)
    reward: Reward = load_component(f"{file}:score", group="rewards")
    return reward


def test_a_function_gets_everything_by_name_as_lists(tmp_path: Path) -> None:
    reward = reward_from(
        tmp_path,
        "def score(prompts, completions, completion_ids, level, answer, golds, verdicts, values,"
        " reasons, **others):\n    assert golds == ['5', '5']\n    assert prompts =="
        " ['question a', 'question b'], prompts\n    assert"
        " completions == ['text a', 'text b'], completions\n    assert completion_ids == [[1, 2],"
        " [1, 2]], completion_ids\n    assert level == [1, None] and answer == ['5', '5']\n   "
        " assert verdicts == ['wrong', 'wrong'] and values == ['4', '4'] and reasons == ['because',"
        " 'because']\n    assert others == {'topic': [None, 'shop']}, others\n    return [1,"
        " 0.5]\n",
    )
    assert paid(reward, problem("a", level=1), problem("b", topic="shop")) == [1.0, 0.5]


def test_a_function_gets_only_what_it_names(tmp_path: Path) -> None:
    reward = reward_from(
        tmp_path,
        "def score(completions, weight=3):\n    return [weight * len(c) for c in completions]\n",
    )
    assert paid(reward, problem("a")) == [18.0]  # 3 times "text a"


def test_a_column_of_the_data_hides_ours_of_the_same_name(tmp_path: Path) -> None:
    reward = reward_from(
        tmp_path, "def score(answer, **_):\n    return [float(a) for a in answer]\n"
    )
    assert paid(reward, problem("a", answer="7")) == [7.0]


def test_gold_answers_have_the_spelling_of_the_data_and_ours(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(
        '{"question": "How many?", "answer": "1,250 apples"}\n'
        '{"question": "Which?", "answer": "B", "choices": ["red", "blue"]}\n'
    )
    splits = load_component(
        {"kind": "jsonl", "train": str(tmp_path / "train.jsonl"), "dev_size": 0}, group="datasets"
    ).load(seed=0)
    source = (
        "def score(completions, answer, golds):\n    assert sorted(answer) == ['1,250 apples', 'B']"
        "\n    assert sorted(golds) == ['1250', 'b']\n    return [1.0] * len(completions)\n"
    )
    assert paid(reward_from(tmp_path, source), *splits.train) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("row", "source"),
    [
        (
            {"prompt": "1 + 4?", "ground_truth": "5"},
            "def score(completions, ground_truth, **_):\n    return [float(ground_truth[0])]\n",
        ),
        (
            {"problem": "1 + 4?", "solution": "So $\\boxed{5}$.", "level": 2},
            "def score(solution, problem, level):\n    assert problem == ['1 + 4?']\n"
            "    return [5.0 * ('boxed{5}' in solution[0])]\n",
        ),
        (
            {"question": "1 + 4?", "answer": "So it is.\n#### 5", "id": "x"},
            "def score(answer, question, id):\n    assert id == ['x']\n"
            "    return [float(answer[0])]\n",
        ),
    ],
)
def test_columns_that_are_read_are_passed_too_except_under_our_names(
    tmp_path: Path, row: dict[str, object], source: str
) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    dataset = {"kind": "jsonl", "train": str(tmp_path / "train.jsonl"), "dev_size": 0}
    (read,) = load_component(dataset, group="datasets").load(seed=0).train
    assert paid(reward_from(tmp_path, source), read) == [5.0]


def test_a_function_may_be_async(tmp_path: Path) -> None:
    source = (
        "import asyncio\nasync def score(completions):\n    await asyncio.sleep(0)\n    return [2]"
        " * len(completions)\n"
    )
    assert paid(reward_from(tmp_path, source), problem("a")) == [2.0]


def test_none_means_that_the_reward_does_not_apply(tmp_path: Path) -> None:
    reward = reward_from(tmp_path, "def score(completions):\n    return [None, True, 0]\n")
    assert paid(reward, problem("a"), problem("b"), problem("c")) == [None, 1.0, 0.0]


PARTS = "{'right': 1.0, 'short': 0.25}"


@pytest.mark.parametrize(
    "value",
    [f"[{PARTS}, {PARTS}]", "{'right': [1.0, 1.0], 'short': [0.25, 0.25]}"],
    ids=["by sample", "by part"],
)
def test_parts_of_a_reward_add_up_and_keep_their_names(tmp_path: Path, value: str) -> None:
    reward = reward_from(tmp_path, f"def score(prompts):\n    return {value}\n")
    rewards = paid(reward, problem("a"), problem("b"))
    assert rewards == [1.25, 1.25]
    travelled = pickle.loads(pickle.dumps(rewards[0]))
    assert travelled == 1.25 and travelled.parts == {"right": 1.0, "short": 0.25}


@pytest.mark.parametrize("value", ["{}", "{'right': None}", "{'right': 'x'}"])
def test_a_part_that_is_no_number_names_the_sample(tmp_path: Path, value: str) -> None:
    reward = reward_from(
        tmp_path, f"def score(prompts):\n    return [1.0, {value}][: len(prompts)]\n"
    )
    with pytest.raises(RewardError, match="sample b: expected"):
        paid(reward, problem("a"), problem("b"))


def test_numpy_rewards_are_numbers(tmp_path: Path) -> None:
    reward = reward_from(
        tmp_path, "import numpy\ndef score(completions):\n    return numpy.array([0.5, 1.5])\n"
    )
    assert paid(reward, problem("a"), problem("b")) == [0.5, 1.5]


def test_an_exception_names_the_sample_that_causes_it(tmp_path: Path) -> None:
    reward = reward_from(
        tmp_path, "def score(completions):\n    return [1 / (c != 'text b') for c in completions]\n"
    )
    with pytest.raises(
        RewardError, match=r"my_reward.py:score: sample b: ZeroDivisionError: division by zero$"
    ):
        paid(reward, problem("a"), problem("b"), problem("c"))


def test_an_exception_of_the_batch_alone_names_the_batch(tmp_path: Path) -> None:
    reward = reward_from(
        tmp_path,
        "def score(completions):\n    if len(completions) > 1:\n        raise OSError('full')\n   "
        " return [1]\n",
    )
    with pytest.raises(RewardError, match=r"the batch a … c: OSError: full$"):
        paid(reward, problem("a"), problem("b"), problem("c"))


@pytest.mark.parametrize(
    "value", ["float('nan')", "float('inf')", "'1'", "[1]", "10 ** 400", "object()"]
)
def test_a_reward_that_is_no_finite_number_names_the_sample(tmp_path: Path, value: str) -> None:
    reward = reward_from(tmp_path, f"def score(completions):\n    return [0.5, {value}]\n")
    with pytest.raises(RewardError, match="sample b: expected a finite number or None, got"):
        paid(reward, problem("a"), problem("b"))


@pytest.mark.parametrize("value", ["None", "float('nan')", "'1'"])
def test_a_part_that_is_no_finite_number_is_named(tmp_path: Path, value: str) -> None:
    parts = f"{{'correct': [1.0, 0.0], 'short': [0.5, {value}]}}"
    reward = reward_from(tmp_path, f"def score(completions):\n    return {parts}\n")
    message = "sample b: expected a finite number for the part short, got"
    with pytest.raises(RewardError, match=message):
        paid(reward, problem("a"), problem("b"))


@pytest.mark.parametrize("value", ["[1]", "[]", "[1, 2, 3]"])
def test_a_wrong_number_of_rewards_is_refused(tmp_path: Path, value: str) -> None:
    reward = reward_from(tmp_path, f"def score(completions):\n    return {value}\n")
    with pytest.raises(RewardError, match="expected 2 rewards, got"):
        paid(reward, problem("a"), problem("b"))


def test_tensor_rewards_are_numbers(tmp_path: Path) -> None:
    source = "import torch\ndef score(completions):\n    return torch.tensor([0.5, 1.5])\n"
    assert paid(reward_from(tmp_path, source), problem("a"), problem("b")) == [0.5, 1.5]


def test_a_tensor_with_a_row_a_sample_names_the_sample(tmp_path: Path) -> None:
    reward = reward_from(
        tmp_path, "import torch\ndef score(completions):\n    return torch.ones(2, 3)\n"
    )
    with pytest.raises(RewardError, match="sample a: expected a finite number or None, got tensor"):
        paid(reward, problem("a"), problem("b"))


@pytest.mark.parametrize(
    "hang",
    [
        "time.sleep(60)",
        "[None for _ in iter(int, 1)]",
        "exec('try:\\n  time.sleep(60)\\nexcept Exception: pass')",
    ],
)
def test_a_function_that_hangs_is_stopped_and_named(tmp_path: Path, hang: str) -> None:
    (tmp_path / "slow.py").write_text(
        f"import time\ndef score(completions):\n    {hang}\n    return [1, 1]\n"
    )
    reward = load_component(
        {"kind": f"{tmp_path / 'slow.py'}:score", "timeout_s": 0.2}, group="rewards"
    )
    with pytest.raises(
        RewardError, match=r"slow.py:score: took more than timeout_s=0.2 for the batch a … b$"
    ):
        paid(reward, problem("a"), problem("b"))


def test_the_time_of_a_function_is_finite(tmp_path: Path) -> None:
    reward = reward_from(tmp_path, "def score(completions):\n    return [1]\n")
    settings = {"kind": reward.kind, "timeout_s": math.inf}
    with pytest.raises(ValueError, match="should be a finite number"):
        load_component(settings, group="rewards")


def test_an_alarm_that_was_set_before_is_set_again(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGALRM)
    rest = signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        paid(reward_from(tmp_path, "def score(completions):\n    return [1]\n"), problem("a"))
        assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
        assert signal.getsignal(signal.SIGALRM) == before
    finally:
        signal.setitimer(signal.ITIMER_REAL, *rest)


def test_a_function_that_exits_names_the_sample_and_does_not_end_the_run_unseen(
    tmp_path: Path,
) -> None:
    reward = reward_from(tmp_path, "import sys\ndef score(completions):\n    sys.exit(0)\n")
    with pytest.raises(RewardError, match=r"sample a: SystemExit: 0$"):
        paid(reward, problem("a"), problem("b"))


@pytest.mark.parametrize(
    "value", ["1.0", "None", "'ab'", "{0: 1, 1: 2}", "__import__('torch').tensor(1.0)"]
)
def test_rewards_that_are_no_list_are_rejected(tmp_path: Path, value: str) -> None:
    reward = reward_from(tmp_path, f"def score(completions):\n    return {value}\n")
    with pytest.raises(RewardError, match="expected a list of 2 numbers, got"):
        paid(reward, problem("a"), problem("b"))


def test_a_name_that_is_not_offered_is_refused_with_those_that_are(tmp_path: Path) -> None:
    reward = reward_from(
        tmp_path, "def score(completions, difficulty):\n    return [1] * len(completions)\n"
    )
    with pytest.raises(
        RewardError,
        match="has the argument difficulty, which is not among answer, completion_ids, completions",
    ):
        paid(reward, problem("a"))


def test_without_samples_the_function_is_not_called(tmp_path: Path) -> None:
    reward = reward_from(tmp_path, "def score(completions):\n    raise OSError\n")
    assert reward([], [], []) == []


def test_a_recipe_read_twice_holds_equal_rewards(tmp_path: Path) -> None:
    source = "def score(completions):\n    return [1]\n"
    assert reward_from(tmp_path, source) == reward_from(tmp_path, source)


def test_function_is_no_kind_of_its_own() -> None:
    with pytest.raises(ValidationError, match="expected your own function"):
        load_component("function", group="rewards")


def test_rewards_are_finite_by_construction() -> None:
    with pytest.raises(ValidationError):
        Outcome(correct=math.nan)
