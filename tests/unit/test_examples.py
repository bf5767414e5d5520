"""The files of examples/: each plug-in works as documented, and one recipe combines most."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from reftune.errors import DataError, RewardError
from reftune.grading.voting import majority_curve
from reftune.model.batch import RolloutBatch, token_batch
from reftune.model.policy import TokenScores
from reftune.recipe import load_component, load_recipe
from reftune.runs.run import run_recipe
from reftune.stages.stage import Progress
from reftune.types import Answer, Completion, Graded, Problem, SamplingParams, Verdict

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def example(name: str, group: str, **keys):
    return load_component({"kind": f"{EXAMPLES / name}", **keys}, group=group)


def sums(**keys):
    return example("dataset.py:Sums", "datasets", train=str(EXAMPLES / "sums"), **keys)


def test_the_dataset_gives_disjoint_splits_of_a_seed():
    # 6 × 6 × 6 sums in two files, 30 of them for test
    splits = sums(dev_size=5).load(seed=3)
    assert [len(splits.train), len(splits.dev), len(splits.test)] == [181, 5, 30]
    assert len({p.question for p in (*splits.train, *splits.dev, *splits.test)}) == 216
    assert splits == sums(dev_size=5).load(seed=3) != sums(dev_size=5).load(seed=4)
    first = splits.train[0]
    assert all(str(first.answer) in text for text in (first.rationale, str(first.answer.value)))


def test_a_wrong_row_of_the_dataset_is_named(tmp_path: Path):
    (tmp_path / "train.csv").write_text("a,b,c\n1,2,3\n1,x,3\n")
    with pytest.raises(DataError, match=r"train\.csv:3: b is 'x'; expected a number"):
        example("dataset.py:Sums", "datasets", train=str(tmp_path / "train.csv")).load(seed=0)


def test_the_format_grades_its_own_targets_and_refuses_a_text_without_tags():
    format, problems = example("format.py:Tagged", "formats"), sums().load(seed=0).train[:5]
    texts = [format.target(problem) for problem in problems]
    assert [grade.verdict for grade in format.grade(problems, texts)] == [Verdict.CORRECT] * 5
    assert format.grade(problems[:1], [str(problems[0].answer)])[0].verdict is Verdict.NO_ANSWER


def test_the_grader_decides_for_format_reward_and_votes():
    format = load_component(
        {"kind": "nl", "grading": f"{EXAMPLES / 'grader.py'}:same_length"}, group="formats"
    )
    problem = Problem(id="a", question="?", answer=Answer(kind="text", value="2.5 km"))
    texts = ["2500 m", "2.5 km", "3 km", "far"]
    graded = format.grade([problem] * 4, [f"The answer is {text}." for text in texts])
    assert [grade.verdict for grade in graded] == [
        Verdict.CORRECT,
        Verdict.CORRECT,
        Verdict.WRONG,
        Verdict.NO_ANSWER,
    ]
    assert graded[0].value == graded[1].value
    assert majority_curve(graded)[-1] == graded[0]


def test_the_reward_takes_columns_of_the_data_by_name():
    reward = example("reward.py:right_and_shown", "rewards")
    problem = Problem(
        id="a", question="?", answer=Answer(kind="text", value="x"), columns={"num_steps": 2}
    )
    texts = ["1 + 1 = 2 , 2 + 1 = 3", "= 3", "= = 4"]
    completions = [
        Completion(token_ids=(1,), text=text, logprobs=(0.0,), finish_reason="eos")
        for text in texts
    ]
    verdicts = [Verdict.CORRECT, Verdict.CORRECT, Verdict.WRONG]
    graded = [Graded(verdict=verdict, value=None, reason="") for verdict in verdicts]
    assert reward([problem] * 3, completions, graded) == [1.0, 0.5, 0.0]
    with pytest.raises(RewardError, match="num_steps"):
        reward([Problem(id="b", question="?", answer=problem.answer)], completions[:1], graded[:1])


@pytest.mark.parametrize(
    ("baseline", "advantages"), [(True, [0.75, -0.25, -0.25, -0.25]), (False, [1.0, 0, 0, 0])]
)
def test_the_algorithm_pushes_by_reward_less_the_mean(baseline: bool, advantages: list[float]):
    # rewards 1 0 0 0 have the mean ¼; one token each, so each weighs ¼: L = −Σ A log π / 4, and
    # dL/dlog π = −A / 4
    algorithm = example("algorithm.py:Reinforce", "algorithms", baseline=baseline)
    tokens = token_batch([[1]] * 4, [[2]] * 4, device=torch.device("cpu"))
    flat = torch.zeros(4, 1)
    batch = algorithm.credit(
        RolloutBatch(
            tokens=tokens,
            rewards=torch.tensor([1.0, 0, 0, 0]),
            groups=torch.arange(4),
            gold=torch.zeros(4, dtype=torch.bool),
            sampling_logprobs=flat,
            logprobs=flat,
        )
    )
    assert_close(batch.advantages, torch.tensor(advantages)[:, None])
    logprobs = torch.full((4, 1), -1.0, requires_grad=True)
    terms = algorithm.loss(
        TokenScores(logprobs=logprobs, values=flat),
        replace(batch, weights=algorithm.weights(batch)),
    )
    terms.total.backward()
    assert_close(logprobs.grad[:, 0], -torch.tensor(advantages) / 4)


def test_the_engine_agrees_with_the_policy_and_repeats_itself(make_policy):
    engine, policy, prompts = (
        example("engine.py:OneByOne", "engines"),
        make_policy("llama"),
        [[3, 4, 5], [12, 13], [3, 4, 5]],
    )
    greedy = SamplingParams(max_new_tokens=6, temperature=0)
    kv = load_component("kv", group="engines")
    assert [c.token_ids for c in engine.generate(policy, prompts, greedy)] == [
        c.token_ids for c in kv.generate(policy, prompts, greedy)
    ]
    params = SamplingParams(max_new_tokens=6, temperature=0.7, seed=5)
    drawn = engine.generate(policy, prompts, params)
    torch.manual_seed(1)
    assert drawn == engine.generate(policy, prompts, params)
    assert drawn[0].token_ids != drawn[2].token_ids, "equal prompts are drawn apart"
    assert drawn != engine.generate(policy, prompts, replace(params, seed=6))
    assert engine.generate(policy, prompts[:1], params) == drawn[:1], (
        "a completion does not depend on its neighbours"
    )
    later = replace(params, first_position=1)
    assert engine.generate(policy, prompts[1:], later) == drawn[1:], "nor on the process"
    batch = token_batch(prompts, [c.token_ids for c in drawn], device=policy.device)
    scored = policy.score(batch, temperature=0.7).logprobs[batch.response_mask]
    assert_close(
        torch.tensor([logprob for c in drawn for logprob in c.logprobs]),
        scored,
        atol=1e-5,
        rtol=1e-5,
    )


def test_a_recipe_runs_with_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)  # the recipe's paths are relative to it
    smaller = [
        "model.scratch.hidden_size=16",
        "model.scratch.layers=1",
        "evaluate.limit=3",
        "dataset.dev_size=3",
        "lengths.max_new=24",
        "stages.warmup.epochs=1",
        "stages.warmup.eval_every=1",
        "stages.reft.steps=1",
        "stages.reft.prompts=2",
        "stages.reft.eval_every=1",
    ]
    recipe = load_recipe(EXAMPLES / "own.yaml", [*smaller, f"run_dir={tmp_path / 'own'}"])
    summary = run_recipe(recipe, progress=Progress())
    assert summary["methods"]["reft"]["n"] == 3
    rows = [
        json.loads(line)
        for line in (
            (tmp_path / "own" / "stages" / "reft" / "samples.jsonl").read_text().splitlines()
        )
    ]
    assert len(rows) == 4
    assert {row["reward"] for row in rows} <= {0.0, 0.5, 1.0}
