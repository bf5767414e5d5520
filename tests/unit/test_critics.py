"""The critics of recipes/demo/critics.py against numbers computed by hand; the contract of
algorithms covers them too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from reftune.algorithms.ppo import Ppo
from reftune.model.batch import RolloutBatch, token_batch
from reftune.model.policy import TokenScores
from reftune.recipe import load_component
from reftune.recipe.kinds import component_class
from reftune.stages.rl import Rl
from reftune.types import Problem


def component(name: str, group: str = "algorithms", **keys: Any) -> Any:
    return load_component({"kind": f"demo/critics.py:{name}", **keys}, group=group)


def batch(rewards: list[float], values: list[list[float]]) -> RolloutBatch:
    """Samples with one-token prompts and as many response tokens as values, without a reference."""
    tokens = token_batch([[5]] * len(rewards), [[6] * len(row) for row in values])
    logprobs = -tokens.response_mask.float()
    return RolloutBatch(
        tokens=tokens,
        rewards=torch.tensor(rewards),
        groups=torch.arange(len(rewards)),
        gold=torch.zeros(len(tokens), dtype=torch.bool),
        sampling_logprobs=logprobs,
        logprobs=logprobs,
        values=tokens.unflatten(torch.tensor([value for row in values for value in row])),
    )


def test_lambda_depends_on_the_length_of_each_response():
    # V = 0, so G_t = A_t = λ^(L-1-t); for L = 2, λ = ½^½ = .7071; for L = 4, λ = ½^¼ = .8409, whose
    # powers are .7071 and .5946
    found = component("LambdaByLength").credit(batch([1.0, 1.0], [[0.0] * 2, [0.0] * 4]))
    expected = torch.tensor([[0.7071, 1.0, 0.0, 0.0], [0.5946, 0.7071, 0.8409, 1.0]])
    assert_close(found.returns, expected, atol=1e-4, rtol=0)
    # whitened: equal estimates stay equal
    assert found.advantages[0, 0] == pytest.approx(float(found.advantages[1, 1]), abs=1e-5)


def test_a_critic_that_explains_variance_is_used():
    # errors .1, -.1, 0 against returns 1, 0, 0
    rollout = batch([1.0, 0.0, 0.0], [[0.9], [0.1], [0.0]])
    assert_close(component("Evpo").credit(rollout).advantages, Ppo().credit(rollout).advantages)


def test_without_explained_variance_the_baseline_is_the_mean_return():
    # errors .9, -.9, -.5 vary more than the returns 1, 0, 0, whose mean is ⅓ and whose unbiased
    # variance is (4/9 + 1/9 + 1/9) / 2 = ⅓: (1 - ⅓) · √3 = 1.1547 and -⅓ · √3 = -.5774
    rollout = batch([1.0, 0.0, 0.0], [[0.1], [0.9], [0.5]])
    found = component("Evpo").credit(rollout)
    expected = torch.tensor([[1.1547], [-0.5774], [-0.5774]])
    assert_close(found.advantages, expected, atol=1e-4, rtol=0)
    assert_close(found.returns, Ppo().credit(rollout).returns)


def test_a_bounded_critic_and_its_plain_advantages():
    # V = clip(3, 0, 1) = 1 and the reward is 0, so δ = (0, 0, 0, 0, -1); λ = 1 - 1/(.4 · 5) = ½:
    # A_t = -½^(4-t); with λ = 1, A_t = -1, so G = -1 + 1 = 0
    found = component("Bpco").credit(batch([0.0], [[3.0] * 5]))
    assert_close(found.advantages, -torch.tensor([[0.0625, 0.125, 0.25, 0.5, 1.0]]))
    assert_close(found.returns, torch.zeros(1, 5))
    assert_close(found.values, torch.ones(1, 5))


def test_a_bounded_critic_is_not_pushed_further_out():
    # G = 0: the first value is 1 after clipping and has no gradient; the second has V - G = ½
    algorithm = component("Bpco", value_coef=1.0, value_clip=9.0)
    credited = algorithm.credit(batch([0.0], [[3.0, 0.5]]))
    weighted = replace(credited, weights=torch.ones(1, 2))
    values = torch.tensor([[3.0, 0.5]], requires_grad=True)
    loss = algorithm.loss(TokenScores(weighted.logprobs, values), weighted)
    loss.total.backward()
    assert values.grad.tolist() == [[0.0, 0.5]]
    assert float(loss.metrics["value/loss"]) == pytest.approx(0.5 * (1 + 0.25))


def test_a_detached_head_learns_without_the_transformer(
    make_policy: Any, monkeypatch: pytest.MonkeyPatch
):
    policy = make_policy()

    def moved(_: object = None, __: object = None) -> set[str]:
        policy.zero_grad(set_to_none=True)
        policy(token_batch([[5, 6]], [[7, 8, 1]])).values.sum().backward()
        return {name.split(".")[0] for name, p in policy.named_parameters() if p.grad is not None}

    during: list[set[str]] = []
    monkeypatch.setattr(Rl, "run", lambda *_: during.append(moved()))
    component("Detached", "stages", steps=1, prompts=1, optimizer={"learning_rate": 0.1}).run(
        SimpleNamespace(policy=policy)
    )
    assert during == [{"value_head"}]
    assert moved() == {"value_head", "model"}  # as before the stage


def prefix_trainer(make_trainer: Any, *, max_new: int = 25, **changes: Any) -> Any:
    keys = {"init": "base", "steps": 8, "prompts": 6, "optimizer": {"learning_rate": 0.1}}
    plain = make_trainer(keys, lengths={"max_new": max_new}, **changes)
    trainer = component_class("demo/critics.py:PrefixTrainer", group="stages")
    return trainer(component("Prefixes", "stages", **keys), plain.context)


def gold_prefix(trainer: Any, problem: Problem, share: float) -> list[int]:
    gold = trainer.context.collector.encoder.target(problem)[:-1]
    return gold[: int(share * len(gold))]


def test_prefixes_shrink_to_nothing_in_the_first_half_of_the_steps(make_trainer: Any):
    # 8 steps: .8 · (1, ¾, ½, ¼, 0, …)
    trainer = prefix_trainer(make_trainer)
    prompt = trainer.context.collector.encoder.prompt
    for n, share in ((1, 0.8), (3, 0.4), (5, 0.0), (8, 0.0)):
        for solution in trainer.sample(n, "rollout")[0]:
            prefix = gold_prefix(trainer, solution.problem, share)
            assert list(solution.prompt_ids) == [*prompt(solution.problem), *prefix]


def test_the_value_head_is_fitted_to_samples_without_prefixes(make_trainer: Any):
    trainer = prefix_trainer(make_trainer)
    for solution in trainer.sample(1, "prefit")[0]:
        prompt = trainer.context.collector.encoder.prompt(solution.problem)
        assert list(solution.prompt_ids) == prompt


def test_prefix_and_completion_are_graded_together(make_trainer: Any):
    trainer = prefix_trainer(make_trainer)
    encoder = trainer.context.collector.encoder
    for solution in trainer.sample(1, "rollout")[0]:
        prefix = gold_prefix(trainer, solution.problem, 0.8)
        whole = encoder.decode(prefix) + solution.completion.text
        assert [solution.graded] == encoder.format.grade([solution.problem], [whole])


def test_a_prefix_does_not_make_its_prompt_too_long(make_trainer: Any, tmp_path: Path):
    """The longest prompt just fits without a prefix, and all are sampled with one."""
    context = prefix_trainer(make_trainer).context
    longest = max(len(context.collector.encoder.prompt(each)) for each in context.splits.train)
    trainer = prefix_trainer(
        make_trainer,
        max_new=40,
        model={"scratch": {"context": longest + 40}},
        run_dir=str(tmp_path / "other"),
    )
    solutions, _ = trainer.sample(1, "rollout")
    assert max(len(solution.prompt_ids) for solution in solutions) > longest
    assert all(s.completion.logprobs != (0.0,) for s in solutions)  # none was left out
