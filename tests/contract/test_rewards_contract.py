"""The contract of every reward. Each file of `grading/rewards` is found and tested
automatically."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from reftune.grading.formats.nl import Nl
from reftune.grading.golds import read_gold
from reftune.grading.rewards import Reward
from reftune.recipe import known_kinds, load_component
from reftune.types import Answer, Completion, Graded, Problem, Verdict


def function(folder: Path) -> dict[str, Any]:
    file = folder / "mine.py"
    file.write_text(
        "def score(verdicts, **kwargs):\n    return [float(v == 'correct') for v in verdicts]\n"
    )
    return {"kind": f"{file}:score"}


SPECS: dict[str, Callable[[Path], dict[str, Any]]] = {"function": function}
"""Kind → its spec in a recipe; a kind that is not listed needs no keys."""


@pytest.fixture(params=known_kinds("rewards"))
def reward(request: pytest.FixtureRequest, tmp_path: Path) -> Reward:
    spec = SPECS.get(request.param, lambda _: {"kind": request.param})(tmp_path)
    loaded: Reward = load_component(spec, group="rewards")
    return loaded


def answers() -> list[Answer]:
    """One gold answer of each kind that needs no further package."""
    told = [
        read_gold(["Accra", "Akkra"], "any_of"),
        read_gold([1, 2, 3], "list"),
        read_gold(["red", "blue"], "set"),
        read_gold(r"[A-Z]\d", "regex"),
    ]
    return [
        Answer(kind="number", value=Fraction(7, 2)),
        Answer(kind="choice", value="b"),
        Answer(kind="text", value="Paris"),
        *(answer for answer in told if answer is not None),
    ]


def samples() -> tuple[list[Problem], list[Completion], list[Graded]]:
    """A right answer, a wrong answer and no answer for each kind of gold answer."""
    problems, texts = [], []
    for index, answer in enumerate(answers()):
        choices = ("4", "5", "6") if answer.kind == "choice" else ()
        problem = Problem(id=str(index), question="?", answer=answer, choices=choices)
        right = "A7" if answer.kind == "regex" else str(answer)
        wrong = {"number": "9", "choice": "c", "list": "1, 2, 4"}.get(answer.kind, "London")
        problems += [problem] * 3
        texts += [f"The answer is {right}", f"The answer is {wrong}", "I do not know"]
    completions = [
        Completion(token_ids=(1, 2), text=text, logprobs=(-1.0, -1.0), finish_reason="eos")
        for text in texts
    ]
    return problems, completions, Nl().grade(problems, texts)


def test_the_samples_are_what_they_claim() -> None:
    _, _, graded = samples()
    assert all(grade.verdict is Verdict.CORRECT for grade in graded[::3])
    assert all(grade.verdict is not Verdict.CORRECT for grade in graded[1::3])
    assert all(grade.verdict is Verdict.NO_ANSWER for grade in graded[2::3])


def test_each_completion_gets_one_finite_number_or_none(reward: Reward) -> None:
    rewards = reward(*samples())
    assert len(rewards) == len(samples()[0])
    assert all(each is None or math.isfinite(each) for each in rewards)
    assert all(each is None or type(each) is float for each in rewards)


def test_no_completions_get_no_rewards(reward: Reward) -> None:
    assert reward([], [], []) == []


def test_a_right_answer_earns_more_than_a_wrong_one_and_that_no_less_than_none(
    reward: Reward,
) -> None:
    rewards = reward(*samples())
    for right, wrong, none in zip(rewards[::3], rewards[1::3], rewards[2::3], strict=True):
        assert right is not None and wrong is not None and none is not None
        assert right > wrong >= none


def test_a_reward_depends_on_its_own_sample_alone(reward: Reward) -> None:
    together = reward(*samples())
    assert together == [
        reward([problem], [completion], [grade])[0]
        for problem, completion, grade in zip(*samples(), strict=True)
    ]
    assert together == list(reversed(reward(*map(_reversed, samples()))))


def _reversed(items: Sequence[Any]) -> list[Any]:
    return list(reversed(items))


@pytest.mark.parametrize("verdict", list(Verdict))
def test_every_verdict_has_a_reward(reward: Reward, verdict: Verdict) -> None:
    problems, completions, _ = samples()
    graded = [Graded(verdict=verdict, value=None, reason="") for _ in problems]
    assert len(reward(problems, completions, graded)) == len(problems)
