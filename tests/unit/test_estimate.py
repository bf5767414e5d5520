"""Time estimates, recomputed by hand."""

from types import SimpleNamespace
from typing import Any

import pytest

from reftune.advice.check.model import num_answers
from reftune.advice.measured import BUDGET_S, Speed, _sample_speed, _train_speed, measure_speed
from reftune.engines.kv import Kv
from reftune.model.batch import token_batch
from reftune.recipe.schema import EvaluateTable
from reftune.stages.estimate import stage_costs
from reftune.stages.reward_model import RewardModel
from reftune.stages.rl import Rl
from reftune.stages.self_train import SelfTrain
from reftune.stages.sft import Sft
from reftune.stages.stage import Cost, Stage

SPLITS: Any = SimpleNamespace(train=range(100), dev=range(20), test=range(50))
PACE = Speed(train=400, sample=100).pace(prompt=30, response=10)
LOOK_S = 2.0
"""Seconds of a dev evaluation: 20 problems of 10 tokens at 100 tokens/s."""


def recipe(**stages: Any) -> Any:
    return SimpleNamespace(stages=stages, evaluate=EvaluateTable())


def seconds(**stages: Any) -> dict[str, float]:
    costs = stage_costs(recipe(**stages), num_train=100, num_dev=20)
    return {name: cost.seconds(PACE, num_dev=20) for name, cost in costs.items()}


def test_supervised_training_takes_only_the_rows_with_a_rationale():
    costs = stage_costs(recipe(sft=SFT, reft=RL), num_train=100, num_rationales=10)
    assert (costs["sft"].steps, costs["reft"].steps) == (4 * 10 / 8, 8)


OPTIMIZER = {"learning_rate": 1e-3}
SCHEDULE = {"epochs": 4, "batch_size": 8, "eval_every": 2, "optimizer": OPTIMIZER}
SFT = Sft(**SCHEDULE)
RL = Rl(steps=8, prompts=5, samples=2, updates=2, value_prefit=3, eval_every=4, optimizer=OPTIMIZER)


class Mine(Stage):
    kind: str = "mine.py:Mine"

    def run(self, context: Any) -> None:
        raise NotImplementedError


class Foretold(Mine):
    def cost(self, *, num_train: int, num_dev: int) -> Cost:
        return Cost(steps=num_train / 10, batch=10, looks=1)


def test_supervised_seconds_are_tokens_at_the_measured_speed_and_dev_evaluations():
    # 4 epochs of 100 rows of 40 tokens at 400 tokens/s are 40 s; a dev evaluation every 2 epochs
    # makes two of 2 s
    assert seconds(sft=SFT) == {"sft": pytest.approx(40 + 2 * LOOK_S)}


def test_rl_seconds_are_sampling_scoring_and_updates():
    # a step: 10 samples of 10 tokens at 100 tokens/s are 1 s; 10 sequences of 40 tokens are 1 s a
    # pass, with 2 updates and a third of a pass each for policy and reference: 2.667 s. 8 steps, 3
    # pre-fit rollouts, 2 dev evaluations
    expected = 8 * (1 + 2 + 2 / 3) + 3 * 1 + 2 * LOOK_S
    assert seconds(reft=RL) == {"reft": pytest.approx(expected)}


def test_only_an_algorithm_with_a_value_head_samples_before_the_first_step():
    def sampled_before(algorithm: str) -> int:
        rl = Rl.model_validate({**RL.model_dump(), "algorithm": algorithm})
        return rl.cost(num_train=100, num_dev=20).sampled_before

    assert sampled_before("ppo") == 3 * 5 * 2
    assert {sampled_before(algorithm) for algorithm in ("grpo", "rloo", "online_st")} == {0}


def test_self_training_counts_sampling_and_at_most_all_kept_rows():
    # 6 samples of 100 problems of 10 tokens: 60 s; 1 epoch of (1 + 4)·100 rows of 40 tokens: 50 s;
    # one dev evaluation
    stage = SelfTrain(samples=6, keep=4, sft={**SCHEDULE, "epochs": 1, "eval_every": 1})
    assert seconds(st=stage) == {"st": pytest.approx(60 + 50 + LOOK_S)}


def test_a_reward_model_counts_its_samples_of_train_and_dev():
    # 6 samples of 100 problems and 2 of 20 dev problems, of 10 tokens: 64 s; an epoch of 600 rows
    # of 40 tokens: 60 s; one evaluation
    stage = RewardModel(samples=6, dev_samples=2, **{**SCHEDULE, "epochs": 1, "eval_every": 1})
    assert seconds(judge=stage) == {"judge": pytest.approx(64 + 60 + LOOK_S)}


def test_a_users_own_stage_is_timed_by_its_own_cost_and_left_out_without_one():
    # 100 rows of 40 tokens at 400 tokens/s, one dev evaluation
    assert seconds(mine=Mine(), told=Foretold()) == {"told": pytest.approx(10 + LOOK_S)}


def test_evaluation_counts_methods_problems_and_samples():
    # 2 methods, 40 of the 50 problems, a greedy answer and 3 samples
    def answers(**keys: Any) -> int:
        table = EvaluateTable(limit=40, samples=3, **keys)
        recipe: Any = SimpleNamespace(evaluate=table, methods_to_evaluate=["sft", "reft"])
        return num_answers(SimpleNamespace(recipe=recipe, splits=SPLITS))

    assert answers() == 2 * 40 * 4
    assert answers(sampled=["reft"]) == 40 * (2 + 3)
    assert answers(sampled=["reft", "not evaluated"]) == 40 * (2 + 3)


class Clock:
    """A clock that only a test moves; the very first call is cold."""

    def __init__(self) -> None:
        self.now = 0.0
        self.cold = 100.0

    def spend(self, seconds: float) -> None:
        self.now += seconds + self.cold
        self.cold = 0.0


class TimedEngine:
    """Reads the prompts in a second, and writes one token per row in a tenth of a second."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def generate(self, policy: Any, prompts: list[list[int]], params: Any) -> list[Any]:
        self.clock.spend(1 + 0.1 * params.max_new_tokens)
        return [SimpleNamespace(token_ids=(0,) * params.max_new_tokens) for _ in prompts]


@pytest.mark.parametrize(
    ("length", "seconds"),
    [
        (20, 3),  # 1 s and 20 tokens of a tenth
        (12, 2.2),
        (5, 1.5),
        (
            100,
            11,
            # more than the budget of 8 s: 13 tokens are timed (1.2 s for 2 of them), and the rest
            # is extrapolated
        ),
    ],
)
def test_sampling_is_timed_after_a_warm_up_at_the_length_of_a_solution(
    length: int, seconds: float, monkeypatch: pytest.MonkeyPatch
):
    clock = Clock()
    monkeypatch.setattr("reftune.advice.measured.time.perf_counter", lambda: clock.now)
    engine: Any = TimedEngine(clock)
    assert _sample_speed(None, engine, [[1], [2], [3]], length) == pytest.approx(
        3 * length / seconds
    )  # type: ignore[arg-type]
    assert clock.now < 100 + 3 * BUDGET_S


def test_training_is_timed_after_a_warm_up_on_what_the_budget_allows(
    monkeypatch: pytest.MonkeyPatch,
):
    # 64 rows of 50 tokens; a pass takes .1 s and 10 ms a token. Few: 5 rows, 250 tokens, 2.6 s, so
    # 8 s allow for 769 tokens, or 15 rows: 750 tokens in 7.6 s
    clock, passes = Clock(), []

    def training_pass(policy: Any, batch: Any) -> None:
        passes.append(len(batch.lengths))
        clock.spend(0.1 + 0.01 * int(batch.lengths.sum()))

    monkeypatch.setattr("reftune.advice.measured.time.perf_counter", lambda: clock.now)
    monkeypatch.setattr("reftune.advice.measured._training_pass", training_pass)
    batch = token_batch([[5] * 40] * 64, [[6] * 10] * 64)
    assert _train_speed(None, batch, 10**6) == pytest.approx(750 / 7.6)  # type: ignore[arg-type]
    assert passes == [5, 5, 15]
    assert _train_speed(None, batch, 100) == pytest.approx(100 / 1.1), (
        "a micro-batch holds two rows"
    )  # type: ignore[arg-type]


class UnevenEngine(TimedEngine):
    """Writes two tokens in `short` seconds, and more tokens in `long` seconds."""

    def __init__(self, clock: Clock, short: float, long: float) -> None:
        super().__init__(clock)
        self.short, self.long = short, long

    def generate(self, policy: Any, prompts: list[list[int]], params: Any) -> list[Any]:
        self.clock.spend(self.short if params.max_new_tokens == 2 else self.long)
        return [SimpleNamespace(token_ids=(0,) * params.max_new_tokens) for _ in prompts]


@pytest.mark.parametrize(
    ("length", "short", "long", "seconds"),
    [
        # one token takes as long as two
        (1, 0.1, 30, 0.1),
        (1, 1.2, 2.2, 1.2),
        (2, 0.1, 30, 0.1),
        (5, 0.1, 30, 0.1 + 29.9 * 3 / 10),
        # the longer pass was the faster one
        (1, 3, 1, 1),
        (5, 3, 1, 1),
        (20, 3, 1, 1),
    ],
)
def test_the_speed_of_sampling_is_positive_however_uneven_the_timings_are(
    length: int, short: float, long: float, seconds: float, monkeypatch: pytest.MonkeyPatch
):
    clock = Clock()
    monkeypatch.setattr("reftune.advice.measured.time.perf_counter", lambda: clock.now)
    engine: Any = UnevenEngine(clock, short, long)
    speed = _sample_speed(None, engine, [[1], [2], [3]], length)  # type: ignore[arg-type]
    assert speed == pytest.approx(3 * length / seconds)


@pytest.mark.parametrize("length", [30, 24])
def test_sampling_is_timed_within_the_positions_of_the_model(length, make_policy):
    # 32 positions, but at least 12 tokens are sampled
    policy = make_policy("gpt2", n_positions=32)
    prompts, targets = [[4] * length, [5] * 3], [[1]] * 2
    speed = measure_speed(policy, Kv(kind="kv"), prompts, targets, rows=2, max_tokens=64)
    assert speed.sample > 0
