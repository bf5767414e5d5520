"""The parts that training stages share: learning rate, optimizer, the step that rejects non-finite
numbers, the loop, examples."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from reftune.algorithms.base import LossTerms
from reftune.errors import DataError, EngineError, NonFiniteError, RecipeError, RewardError
from reftune.model.batch import token_batch
from reftune.model.encoder import Encoder
from reftune.recipe import LengthTable, load_component
from reftune.runs.run import open_run
from reftune.stages.loop import Interrupted, Look
from reftune.stages.optimizer import (
    OptimizerTable,
    load_trainable,
    make_optimizer,
    optimizer_step,
    rate,
    trainable,
)
from reftune.stages.rl import rollout_batch
from reftune.stages.rollouts import Collector, rewards_of
from reftune.stages.sft import Sft, accumulate_nll, gold_examples
from reftune.stages.stage import Progress
from reftune.types import Answer, Completion, Problem, SamplingParams


def table(**settings) -> OptimizerTable:
    return OptimizerTable(**{"learning_rate": 1e-3, **settings})


def rates(total_steps: int, **settings) -> list[float]:
    return [
        rate(table(**settings), step=step, total_steps=total_steps)
        for step in range(1, total_steps + 1)
    ]


# --- learning rate --------------------------------------------------------------------------------


def test_a_constant_rate_is_constant_from_the_first_step():
    assert rates(4) == [1, 1, 1, 1]


def test_the_rate_rises_in_equal_steps_to_its_peak():
    assert rates(10, warmup=0.5)[:6] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]


def test_a_linear_rate_falls_to_zero_at_the_last_step():
    # 2 of 10 steps rise; then 8 equal falls from 1 to 0
    assert rates(10, warmup=0.2, schedule="linear") == pytest.approx(
        [0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]
    )


def test_a_cosine_rate_falls_to_zero_along_half_a_wave():
    expected = [0.5, 1, *(0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(1, 9))]
    assert rates(10, warmup=0.2, schedule="cosine") == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.9])
def test_a_stage_s_only_step_trains_at_the_full_rate(schedule, warmup):
    assert rates(1, schedule=schedule, warmup=warmup) == [1.0]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("total_steps", [1, 2, 3, 7, 100])
def test_a_rate_is_a_share_of_the_peak(schedule, total_steps):
    assert all(0 <= share <= 1 for share in rates(total_steps, schedule=schedule, warmup=0.1))


# --- optimizer ------------------------------------------------------------------------------------


def test_every_trainable_parameter_is_in_one_group(make_policy):
    policy = make_policy("qwen2, tied")
    grouped = [p for group in make_optimizer(policy, table()).param_groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in policy.parameters()}


def test_only_matrices_decay_and_never_the_value_head(make_policy):
    policy = make_policy("gpt2")
    optimizer = make_optimizer(policy, table(weight_decay=0.1, value_learning_rate=0.5))
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    peak = {id(p): group["peak"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in policy.named_parameters():
        is_head = name.startswith("value_head")
        assert decay[id(parameter)] == (0.1 if parameter.dim() > 1 and not is_head else 0.0), name
        assert peak[id(parameter)] == (0.5 if is_head else 1e-3), name


def with_gradients(policy, value: float = 1.0) -> None:
    for parameter in policy.parameters():
        parameter.grad = torch.full_like(parameter, value)


def test_a_step_moves_each_group_at_its_own_rate(make_policy):
    policy = make_policy()
    optimizer = make_optimizer(policy, table(learning_rate=1e-3, value_learning_rate=0.1))
    body, head = policy.model.lm_head.weight, policy.value_head.weight
    before = body.detach().clone(), head.detach().clone()
    with_gradients(policy)
    optimizer_step(policy, optimizer, share=0.5, max_grad_norm=1e9)
    # the first step of Adam is lr · sign(gradient)
    assert_close(before[0] - body.detach(), torch.full_like(body, 0.5e-3), atol=1e-6, rtol=0)
    assert_close(before[1] - head.detach(), torch.full_like(head, 0.05), atol=1e-6, rtol=0)


def test_a_step_returns_the_norm_before_clipping_and_clears_the_gradient(make_policy):
    policy = make_policy()
    optimizer = make_optimizer(policy, table())
    with_gradients(policy, 2.0)
    count = sum(p.numel() for p in policy.parameters())
    norm = optimizer_step(policy, optimizer, share=1.0, max_grad_norm=1.0)
    assert norm == pytest.approx(2 * math.sqrt(count), rel=1e-5)
    assert all(p.grad is None for p in policy.parameters())
    # Adam's first moment shows its gradient: .1 · 2 / norm
    moment = optimizer.state[policy.value_head.weight]["exp_avg"]
    assert_close(moment, torch.full_like(moment, 0.1 * 2 / norm))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_never_steps(make_policy, poison):
    policy = make_policy()
    optimizer = make_optimizer(policy, table(weight_decay=0.1))
    with_gradients(policy)
    optimizer_step(policy, optimizer, share=1.0, max_grad_norm=1.0)
    before = {
        name: value.clone() for name, value in {**policy.state_dict(), **flat(optimizer)}.items()
    }
    with_gradients(policy)
    policy.value_head.weight.grad[0, 3] = poison
    with pytest.raises(
        NonFiniteError, match=r"^gradient norm is (nan|inf): the gradient of value_head\.weight is"
    ):
        optimizer_step(policy, optimizer, share=1.0, max_grad_norm=1.0)
    after = {**policy.state_dict(), **flat(optimizer)}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None for p in policy.parameters())


def flat(optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{i}.{key}": value
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def test_trainable_parameters_are_put_back_as_they_were(make_policy):
    policy, other = make_policy(seed=0), make_policy(seed=1)
    load_trainable(other, {name: value.clone() for name, value in trainable(policy).items()})
    assert all(
        torch.equal(value, other.state_dict()[name]) for name, value in policy.state_dict().items()
    )


# --- supervised loss ------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_never_reaches_the_weights(make_policy):
    policy = make_policy()
    with torch.no_grad():
        policy.model.lm_head.weight[5] = math.inf
    with pytest.raises(NonFiniteError, match=r"^loss is (nan|inf) in rows 0$"):
        accumulate_nll(policy, token_batch([[3]], [[4, 1]]))


def problem(i: int, rationale: str | None) -> Problem:
    return Problem(
        id=str(i), question="w" * i, answer=Answer(kind="text", value="x"), rationale=rationale
    )


class Spelled:
    """Uses prompt and target as they stand in the problem."""

    def prompt(self, problem: Problem) -> str:
        return " ".join(problem.question)

    def target(self, problem: Problem) -> str:
        assert problem.rationale is not None
        return problem.rationale


def test_rows_without_a_rationale_or_too_long_are_left_out(tokenizer):
    problems = (problem(1, "1"), problem(2, None), problem(3, "123 4"), problem(9, "1"))
    # targets with eos: 2, -, 4 (123 is unknown, blank, 4, eos), 2; prompts: 1, -, 3, 9
    team = collector(tokenizer, max_new=3)
    found = gold_examples(problems, team, SimpleNamespace(context=8))
    assert [(len(e.prompt), len(e.target)) for e in found] == [(1, 2)]
    endless = SimpleNamespace(context=None)
    assert len(gold_examples(problems, collector(tokenizer, max_new=4), endless)) == 3
    assert found[0].target == [*team.encoder.encode("1"), 1]


def test_no_training_row_at_all_is_refused(tokenizer):
    with pytest.raises(
        DataError,
        match="no training row can be used: 1 of 1 have a rationale, and none of these fits",
    ):
        gold_examples(
            (problem(1, "1 2 3"),), collector(tokenizer, max_new=2), SimpleNamespace(context=None)
        )


def test_a_snapshot_that_the_run_never_passes_is_refused():
    settings = {"epochs": 2, "batch_size": 4, "optimizer": {"learning_rate": 1e-3}}
    assert Sft(**settings, snapshots={"warmup": 2}).produces == ("warmup",)
    for epoch in (0, -1, 2.5):
        expected = rf"snapshots\.warmup: {epoch}; expected an epoch above 0 and up to epochs=2"
        with pytest.raises(ValueError, match=expected):
            Sft(**settings, snapshots={"warmup": epoch})


@pytest.mark.parametrize("key", ["epochs", "eval_every"])
def test_a_number_of_epochs_is_finite(key):
    settings = {"epochs": 2, "batch_size": 4, "optimizer": {"learning_rate": 1e-3}}
    with pytest.raises(ValueError, match="should be a finite number"):
        Sft(**{**settings, key: math.inf})


# --- collecting -----------------------------------------------------------------------------------


@dataclasses.dataclass
class FakeEngine:
    """Answers every prompt but the last `missing` with one word."""

    missing: int = 0

    def generate(self, policy, prompts, params):
        from reftune.engines.scripted import Scripted

        return Scripted(texts=["wa"]).generate(policy, prompts, params)[
            : len(prompts) - self.missing
        ]


class Judge(Spelled):
    def grade(self, problems, completions):
        from reftune.types import Graded, Verdict

        return [Graded(verdict=Verdict.CORRECT, value=text, reason="") for text in completions]


def collector(tokenizer, *, engine=None, rewards=(), max_new=10, **lengths) -> Collector:
    return Collector(
        engine=engine or FakeEngine(),
        encoder=Encoder(tokenizer, Judge()),
        reward=lambda problems, completions, graded: list(rewards),
        lengths=LengthTable(max_new=max_new, **lengths),
    )


@pytest.mark.parametrize("limit", [None, 40])
def test_an_engine_is_told_how_long_prompts_can_be(make_policy, tokenizer, monkeypatch, limit):
    told = []

    class Recording(FakeEngine):
        def generate(self, policy, prompts, params):
            told.append((params.max_prompt_tokens, params.max_new_tokens))
            return super().generate(policy, prompts, params)

    team = collector(tokenizer, engine=Recording(), max_prompt=limit)
    team.solve(make_policy(), [problem(1, None)])
    assert told == [(limit, 10)]


def test_rollouts_without_a_reward_are_left_out(make_policy, tokenizer):
    problems = [problem(1, None), problem(2, None), problem(3, None)]
    team = collector(tokenizer, rewards=[0.5, None, 1])
    solutions = team.rewarded(team.solve(make_policy(), problems))
    assert [(r.problem.id, r.reward) for r in solutions] == [("1", 0.5), ("3", 1.0)]
    assert solutions[1].prompt_ids == tuple(team.encoder.prompt(problems[2]))


def test_a_reward_that_is_no_number_names_its_problem(make_policy, tokenizer):
    team = collector(tokenizer, rewards=[math.nan])
    with pytest.raises(RewardError, match="sample 3: expected a finite number or None, got nan"):
        team.rewarded(team.solve(make_policy(), [problem(3, None)]))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("return [1 / (c.text != 'b') for c in completions]", "sample 2: ZeroDivisionError: divis"),
        ("raise KeyError(len(problems) > 1)", "sample 1: KeyError: False"),
        ("raise SystemExit('over')", "sample 1: SystemExit: over"),
        ("return None", "expected a list of 2 rewards, got NoneType"),
        ("return [1.0]", "expected a list of 2 rewards, got 1"),
        ("return [1.0, 'x']", "sample 2: expected a finite number or None, got 'x'"),
        ("return [10 ** 400, 1.0]", "sample 1: expected a finite number or None, got 1000"),
    ],
)
def test_a_reward_class_that_fails_is_one_line_as_a_function_is(tmp_path, source, message):
    file = tmp_path / "own.py"
    file.write_text(
        "from reftune.recipe import Component\n"
        "class Own(Component):\n"
        "    def __call__(self, problems, completions, graded):\n"
        f"        {source}\n"
    )
    reward = load_component(f"{file}:Own", group="rewards")
    written = [
        Completion(token_ids=(1,), text=text, logprobs=(0.0,), finish_reason="eos") for text in "ab"
    ]
    with pytest.raises(RewardError) as error:
        rewards_of(reward, [problem(1, None), problem(2, None)], written, [None, None])
    assert str(error.value).startswith(f"reward {file}:Own: {message}")


def test_an_engine_that_loses_a_prompt_is_reported(make_policy, tokenizer):
    with pytest.raises(EngineError, match="returned 1 completion for 2 prompts"):
        collector(tokenizer, engine=FakeEngine(missing=1)).solve(
            make_policy(), [problem(1, None)] * 2
        )


def test_a_prompt_over_the_limit_names_its_problem(make_policy, tokenizer):
    # the context of 64 less 10 new tokens leaves 54
    policy = make_policy()
    with pytest.raises(DataError, match="problem 55: prompt of 55 tokens; at most 54 fit"):
        collector(tokenizer).solve(policy, [problem(54, None), problem(55, None)])
    with pytest.raises(DataError, match="problem 7: prompt of 7 tokens; at most 6 fit"):
        collector(tokenizer, max_prompt=6).solve(policy, [problem(7, None)])


def test_a_dropped_prompt_leaves_the_other_samples_as_they_are(make_policy, tokenizer):
    policy, kv = make_policy(), load_component("kv", group="engines")
    team = collector(tokenizer, engine=kv, too_long="drop")
    first, long, last = problem(3, None), problem(60, None), problem(4, None)
    solved = team.solve(policy, [first, long, last], temperature=1.0).completions
    assert (solved[1].text, solved[1].finish_reason) == ("", "length")
    for position, asked in ((0, first), (2, last)):
        params = SamplingParams(max_new_tokens=10, first_position=position)
        (alone,) = kv.generate(policy, [team.encoder.prompt(asked)], params)
        assert alone.token_ids == solved[position].token_ids


# --- the loop -------------------------------------------------------------------------------------


class Signalling(Progress):
    """Sends this process a signal when a step is reported."""

    def __init__(self, at: int) -> None:
        self.at, self.notes, self.seen = at, [], []

    def step(self, step, metrics):
        self.seen.append(step)
        if step == self.at and "loss/sft" in metrics:
            os.kill(os.getpid(), signal.SIGTERM)

    def note(self, message):
        self.notes.append(message)


def test_a_signal_stops_after_the_step_with_a_checkpoint(make_recipe):
    recipe, progress = make_recipe(stages={"sft": {"save_every_s": 1000}}), Signalling(at=3)
    before = signal.getsignal(signal.SIGTERM)
    with open_run(recipe, progress) as run, pytest.raises(Interrupted) as stop:
        run.train("sft")
    assert str(stop.value).endswith("step-000003")
    assert max(progress.seen) == 3
    assert progress.notes == ["stopping after this step; interrupt again to stop at once"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_in_the_last_step_finishes_the_stage_but_does_not_start_another(make_recipe):
    recipe = make_recipe()
    with open_run(recipe, Signalling(at=8)) as run, pytest.raises(Interrupted):
        run.train("sft")
    assert json.loads((recipe.folder / "stages" / "sft" / "stage.json").read_text())["steps"] == 8


def test_the_stage_keeps_the_model_that_was_best_on_dev_and_the_earlier_of_equals(
    make_recipe, monkeypatch
):
    scores = iter([0.2, 0.5, 0.5, 0.4])
    monkeypatch.setattr(
        "reftune.stages.loop.look_at_dev",
        lambda context, **_: Look(metrics={"dev/accuracy": next(scores)}),
    )
    recipe = make_recipe(stages={"sft": {"epochs": 4, "snapshots": None}, "reft": None})
    seen = {}

    class Watching(Progress):
        def step(self, step, metrics):
            if "dev/accuracy" in metrics:
                seen[step] = run_weights(recipe)

    with open_run(recipe, Watching()) as run:
        run.train("sft")
    document = json.loads((recipe.folder / "stages" / "sft" / "stage.json").read_text())
    # 24 examples, 6 per step, 4 steps per epoch, one dev evaluation per epoch
    assert (document["chosen_step"], document["dev_accuracy"], document["looks"]) == (8, 0.5, 4)
    rows = [row for row in rows_of(recipe) if "dev/accuracy" in row]
    assert [row["step"] for row in rows] == [4, 8, 12, 16]
    chosen = (recipe.folder / "stages" / "sft" / "model.safetensors").read_bytes()
    assert (
        chosen
        == (
            recipe.folder / "stages" / "sft" / "checkpoints" / "best" / "model.safetensors"
        ).read_bytes()
    )
    assert chosen == seen[12] != seen[8]  # seen[n] is the best model before evaluation n


@pytest.mark.parametrize(
    ("killed_in", "chosen"),
    [("step 13", (12, 0.9)), ("the replacement of the model of step 8", (8, 0.5))],
)
def test_the_best_model_keeps_its_step_if_the_stage_is_killed_before_the_next_checkpoint(
    make_recipe, monkeypatch, killed_in, chosen
):
    # 4 steps per epoch. The first attempt is killed after its third dev evaluation, and the only
    # checkpoint is that of step 0. On a GPU, the repeated steps may differ; here they score lower.
    scores = iter([0.2, 0.5, 0.9, *[0.2, 0.4, 0.4, 0.3]])
    rename, seen = Path.rename, {}
    monkeypatch.setattr(
        "reftune.stages.loop.look_at_dev",
        lambda context, **_: Look(metrics={"dev/accuracy": next(scores)}),
    )
    settings = {"epochs": 4, "snapshots": None, "save_every_s": 1000}
    recipe = make_recipe(stages={"sft": settings, "reft": None})

    class Killed(Progress):
        def step(self, step, metrics):
            seen[step] = run_weights(recipe)
            if step == 13:
                raise KeyboardInterrupt

    def killed(self: Path, target: Path) -> None:
        if self.name == ".best.partial" and killed_in != "step 13" and 12 in seen:
            raise KeyboardInterrupt
        rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt), open_run(recipe, Killed()) as run:
            run.train("sft")
    with open_run(recipe, Progress()) as run:
        run.train("sft")
    folder = recipe.folder / "stages" / "sft"
    document = json.loads((folder / "stage.json").read_text())
    # seen[n] is the best model before evaluation n
    assert (folder / "model.safetensors").read_bytes() == seen[13 if chosen[0] == 12 else 12]
    assert (document["chosen_step"], document["dev_accuracy"]) == chosen
    assert not (folder / "best.json").exists()  # it belongs to the checkpoints


def run_weights(recipe) -> bytes | None:
    path = recipe.folder / "stages" / "sft" / "checkpoints" / "best" / "model.safetensors"
    return path.read_bytes() if path.exists() else None


def rows_of(recipe) -> list[dict]:
    return [json.loads(line) for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]


def test_a_snapshot_is_the_model_of_that_very_step(make_recipe):
    # the snapshot at epoch ¾ of 2 is step 3 of 8: it has the weights of the same run stopped there
    recipe = make_recipe()
    with open_run(recipe, Progress()) as run:
        run.train("sft")
        warmup = run.models.load("warmup")
    assert (
        json.loads((recipe.folder / "stages" / "warmup" / "stage.json").read_text())["chosen_step"]
        == 3
    )
    stopped = make_recipe(run_dir=str(recipe.folder) + "2")
    with open_run(stopped, Signalling(at=3)) as run, pytest.raises(Interrupted):
        run.train("sft")
    from reftune.storage.checkpoint import load_latest

    found = load_latest(stopped.folder / "stages" / "sft" / "checkpoints")
    assert found is not None and found.step == 3
    for name, value in trainable(warmup).items():
        assert torch.equal(value, found.tensors[name]), name


@pytest.mark.parametrize(("epoch", "evaluations"), [(1, 2), (0.75, 3)])
def test_a_snapshot_at_a_dev_evaluation_needs_no_other(
    make_recipe, monkeypatch, epoch, evaluations
):
    from reftune.stages.loop import look_at_dev

    seen = []
    monkeypatch.setattr(
        "reftune.stages.loop.look_at_dev",
        lambda context, **keys: seen.append(look_at_dev(context, **keys)) or seen[-1],
    )
    recipe = make_recipe(stages={"sft": {"epochs": 2, "snapshots": {"warmup": epoch}}})
    with open_run(recipe, Progress()) as run:
        run.train("sft")
    stage = json.loads((recipe.folder / "stages" / "sft" / "stage.json").read_text())
    snapshot = json.loads((recipe.folder / "stages" / "warmup" / "stage.json").read_text())
    assert len(seen) == stage["looks"] == evaluations
    first = seen[0].metrics["dev/accuracy"]  # epoch 1, or the snapshot's own before it
    assert (snapshot["dev_accuracy"], snapshot["looks"]) == (first, 1)


# --- reinforcement --------------------------------------------------------------------------------


def test_a_rollout_without_a_reward_is_reported(trainer):
    notes = []
    progress = SimpleNamespace(note=notes.append, solutions=lambda step, solutions: None)
    collector = replace(trainer.context.collector, reward=lambda *samples: [None] * len(samples[0]))
    trainer.context = replace(trainer.context, progress=progress, collector=collector)
    solutions, _ = trainer.sample(3, "rollout")
    assert solutions == []
    assert notes == ["reft rollout 3: every reward is None, so there is nothing to train on"]


def test_a_rollout_whose_loss_is_not_finite_is_saved_and_named(trainer, monkeypatch):
    solutions, _ = trainer.sample(1, "rollout")
    batch, _ = trainer.score(solutions)
    before = {name: value.clone() for name, value in trainer.policy.state_dict().items()}
    ppo = type(trainer.algorithm)
    monkeypatch.setattr(
        ppo, "loss", lambda self, scores, rows: LossTerms(total=scores.logprobs.sum() * math.nan)
    )
    with pytest.raises(NonFiniteError) as error:
        trainer.update(trainer.algorithm.credit(batch), 5)
    path = trainer.context.folder.path / "nonfinite-000005.json"
    assert (
        str(error.value)
        == "reft step 5: loss is nan in rows 0, 1, 2, 3, 4, 5, 6, 7; the weights were not changed;"
        f" look at the samples in {path}"
    )
    rows = json.loads(path.read_text())["rows"]
    assert [row["tokens"] for row in rows] == [
        [*r.prompt_ids, *r.completion.token_ids] for r in solutions
    ]
    assert [row["rewards"] for row in rows] == pytest.approx([r.reward for r in solutions])
    assert all(
        len(row["advantages"]) == len(r.completion.token_ids)
        for row, r in zip(rows, solutions, strict=True)
    )
    assert all(
        torch.equal(value, before[name]) for name, value in trainer.policy.state_dict().items()
    )


def test_a_rollout_that_no_reward_applies_to_trains_nothing(trainer, monkeypatch):
    monkeypatch.setattr(
        type(trainer.context.collector.reward),
        "__call__",
        lambda self, problems, completions, graded: [None] * len(problems),
    )
    before = {name: value.clone() for name, value in trainer.policy.state_dict().items()}
    metrics = trainer.step(1)
    assert metrics["reward/mean"] == 0
    assert all(
        torch.equal(value, before[name]) for name, value in trainer.policy.state_dict().items()
    )


def test_updates_are_made_without_dropout(make_trainer):
    # with next to no learning rate nothing but dropout could move a ratio from 1
    trainer = make_trainer({"optimizer": {"learning_rate": 1e-9}})
    solutions, _ = trainer.sample(1, "rollout")
    batch, _ = trainer.score(solutions)
    trainer.policy.train()
    metrics = trainer.update(trainer.algorithm.credit(batch), 1)
    assert metrics["policy/ratio_max"] == pytest.approx(1, abs=1e-4)


def test_minibatches_are_equal_parts_that_each_pass_draws_anew(make_trainer):
    # 8 samples in 4 steps a pass, 2 passes: 8 steps of 2 samples, each sample once in a pass
    trainer = make_trainer({"minibatches": 4, "updates": 2})
    solutions, _ = trainer.sample(1, "rollout")
    batch = trainer.algorithm.credit(trainer.score(solutions)[0])
    batch = replace(batch, rewards=torch.arange(8.0))
    parts = list(trainer.parts(batch, 1))
    first, second = ([p.rewards.tolist() for p in parts[i : i + 4]] for i in (0, 4))
    assert [len(part) for part in first] == [2, 2, 2, 2]
    assert sorted(i for part in first for i in part) == list(range(8))
    assert sorted(i for part in second for i in part) == list(range(8))
    assert first != second
    assert all(float(part.weights.sum()) == pytest.approx(1) for part in parts)
    assert [p.rewards.tolist() for p in trainer.parts(batch, 1)] == first + second  # resumes
    assert trainer.update(batch, 1)["compute/sequence_passes"] == 2 * 8


def test_more_minibatches_than_samples_are_refused(make_recipe):
    with pytest.raises(RecipeError, match=r"minibatches: expected at most prompts × samples = 8"):
        make_recipe(stages={"reft": {"minibatches": 9}})


def test_samples_that_were_cut_off_are_no_part_of_the_loss(make_trainer, monkeypatch):
    trainer = make_trainer({"mask_truncated": True, "algorithm": {"kind": "grpo"}, "samples": 4})
    solutions, _ = trainer.sample(1, "rollout")
    cut = {id(r.completion) for r in solutions if r.completion.finish_reason == "length"}
    whole = [r for r in solutions if id(r.completion) not in cut]
    assert cut and whole, "the case needs both"
    seen = []
    update = trainer.update
    monkeypatch.setattr(trainer, "sample", lambda n, purpose: (solutions, {}))
    monkeypatch.setattr(trainer, "update", lambda batch, n: seen.append(batch) or update(batch, n))
    trainer.step(1)
    (batch,) = seen
    credited = trainer.algorithm.credit(rollout_batch(solutions, device="cpu"))
    kept = [i for i, r in enumerate(solutions) if r in whole]
    lengths = [len(r.completion.token_ids) for r in whole]
    assert batch.tokens.response_lengths.tolist() == lengths
    # the baseline is still that of all samples of the problem
    assert torch.equal(batch.advantages[:, 0], credited.advantages[kept, 0])


def test_a_rollout_that_was_cut_off_throughout_trains_nothing(make_trainer, monkeypatch):
    trainer = make_trainer({"mask_truncated": True})
    solutions = [
        replace(r, completion=replace(r.completion, finish_reason="length"))
        for r in trainer.sample(1, "rollout")[0]
    ]
    monkeypatch.setattr(trainer, "sample", lambda n, purpose: (solutions, {}))
    before = trainer.policy.value_head.weight.clone()
    assert "grad/norm" not in trainer.step(1)
    assert torch.equal(before, trainer.policy.value_head.weight)


def test_samples_of_one_problem_are_one_group(trainer):
    solutions, _ = trainer.sample(1, "rollout")
    batch, _ = trainer.score(solutions)
    assert batch.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [r.problem.id for r in solutions[::2]] == [r.problem.id for r in solutions[1::2]]


def test_rollouts_go_through_the_training_problems_epoch_by_epoch(trainer):
    # 24 problems, 4 a rollout: 6 rollouts are an epoch
    seen = [r.problem.id for n in range(1, 7) for r in trainer.sample(n, "rollout")[0][::2]]
    assert sorted(seen) == sorted(p.id for p in trainer.context.splits.train)


def test_a_stage_that_starts_from_no_earlier_method_is_refused(make_recipe):
    recipe = make_recipe(stages={"reft": {"init": "wramup"}})
    with (
        pytest.raises(
            RecipeError,
            match=r"stages\.reft\.init: wramup is not an earlier method; known here: base, warmup",
        ),
        open_run(recipe, Progress()),
    ):
        pass


@pytest.mark.parametrize("method", ["../up", "a/b", "", "..", "base"])
def test_a_method_whose_name_cannot_be_a_folder_is_refused(make_recipe, method):
    recipe = make_recipe(stages={"sft": {"snapshots": {method: 1}}})
    with (
        pytest.raises(RecipeError, match=r"stages\.sft: cannot save a method called "),
        open_run(recipe, Progress()),
    ):
        pass


def test_a_method_that_is_made_twice_is_refused(make_recipe):
    recipe = make_recipe(stages={"sft": {"snapshots": {"sft": 1}}, "reft": {"init": "sft"}})
    with (
        pytest.raises(RecipeError, match="another stage or snapshot is already called sft"),
        open_run(recipe, Progress()),
    ):
        pass


def test_a_metric_in_some_minibatches_only_is_averaged_over_these(trainer, monkeypatch):
    steps = iter([{"loss/a": 1.0}, {"loss/a": 3.0, "loss/b": 5.0}, {"loss/b": 6.0}])
    monkeypatch.setattr(trainer, "parts", lambda batch, n: [batch] * 3)
    monkeypatch.setattr(trainer.loop, "descend", lambda *_: next(steps))
    batch, _ = trainer.score(trainer.sample(1, "rollout")[0])
    metrics = trainer.update(batch, 1)
    assert (metrics["loss/a"], metrics["loss/b"]) == (2, 5.5)
