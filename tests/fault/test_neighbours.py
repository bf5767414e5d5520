"""Any fault in a reward, an engine or data has a defined outcome, and the run continues once the
fault is fixed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from crash import assert_same_outcome, outcome, run_all
from reftune.errors import DataError, EngineError, ReftuneError, RewardError
from reftune.recipe import Recipe
from reftune.runs.run import open_run
from reftune.stages.stage import Progress

pytestmark = pytest.mark.fault

MakeRecipe = Callable[..., Recipe]

SOUND = "return [float(len(c) % 2) for c in completions]"
REWARDS = {
    "raises": ("raise ZeroDivisionError('oops')", "ZeroDivisionError: oops"),
    "exits": ("raise SystemExit(0)", "SystemExit: 0"),
    "hangs": ("while True: pass", "took more than timeout_s=0.5"),
    "wrong length": ("return [1.0]", "expected 8 rewards, got 1"),
    "nan": (
        "return [float('nan') for _ in completions]",
        "expected a finite number or None, got nan",
    ),
    "nothing": ("return None", "expected a list of 8 numbers, got NoneType"),
    "a tensor of no list": (
        "import torch; return torch.tensor(1.0)",
        "expected a list of 8 numbers, got Tensor",
    ),
}


def reward_file(folder: Path, body: str) -> Path:
    """A reward function that runs `body` from its third call on."""
    lines = [
        "calls = []",
        "def score(completions, **_):",
        "    calls.append(1)",
        "    if len(calls) > 2:",
        f"        {body}",
        f"    {SOUND}",
    ]
    (folder / "mine.py").write_text("\n".join(lines) + "\n")
    return folder / "mine.py"


@pytest.mark.parametrize("name", REWARDS)
def test_a_bad_reward_stops_the_run_with_one_line(make_recipe, tmp_path, name):
    body, expected = REWARDS[name]
    file = reward_file(tmp_path, body)
    recipe = make_recipe(
        reward={"kind": f"{file}:score", "timeout_s": 0.5},
        stages={"reft": {"init": "base", "value_prefit": 0}},
    )
    with open_run(recipe, Progress()) as run, pytest.raises(RewardError) as error:
        run.train("reft")
    assert (
        expected in str(error.value)
        and "mine.py:score" in str(error.value)
        and "\n" not in str(error.value)
    )
    assert (recipe.folder / "stages" / "reft" / "checkpoints" / "step-000002").is_dir()


def test_a_tensor_of_rewards_is_as_good_as_a_list(make_recipe, tmp_path):
    folders = []
    for name, body in (
        ("list", SOUND),
        ("tensor", f"import torch; {SOUND.replace('return ', 'return torch.tensor(')})"),
    ):
        (tmp_path / name).mkdir()
        file = reward_file(tmp_path / name, body)
        recipe = make_recipe(
            run_dir=str(tmp_path / name / "run"),
            reward={"kind": f"{file}:score"},
            stages={"reft": {"init": "base"}},
        )
        with open_run(recipe, Progress()) as run:
            run.train("reft")
        folders.append(recipe.folder)
    assert_same_outcome(folders[1], outcome(folders[0]))


ENGINES = {
    "nothing": ("None", "returned NoneType; expected a list of Completions"),
    "no completions": ("[]", "returned 0 completions for"),
    "one too few": ("answers[:-1]", "completions for"),
    "no tokens": (
        "[*answers[:-1], dataclasses.replace(answers[-1], token_ids=(), logprobs=())]",
        "0 tokens with 0 log-probabilities; expected at least one token",
    ),
    "no log-probabilities": (
        "[dataclasses.replace(a, logprobs=()) for a in answers]",
        "tokens with 0 log-probabilities",
    ),
}


def engine_file(folder: Path, returned: str) -> Path:
    """The default engine, whose sampled answers become `returned`."""
    (folder / "engine.py").write_text(
        "import dataclasses\nfrom reftune.engines.kv import Kv\n\n\nclass Broken(Kv):\n"
        "    def generate(self, policy, prompts, params):\n"
        "        answers = super().generate(policy, prompts, params)\n"
        f"        return answers if params.temperature == 0 else {returned}\n"
    )
    return folder / "engine.py"


@pytest.mark.parametrize("name", ENGINES)
def test_a_bad_engine_stops_the_run_with_one_line(make_recipe, tmp_path, name):
    returned, expected = ENGINES[name]
    recipe = make_recipe(
        engine={"kind": f"{engine_file(tmp_path, returned)}:Broken"},
        stages={"reft": {"init": "base"}},
    )
    with open_run(recipe, Progress()) as run, pytest.raises(EngineError) as error:
        run.train("reft")
    assert (
        str(error.value).startswith("engine Broken: ")
        and expected in str(error.value)
        and "\n" not in str(error.value)
    )


def test_a_row_that_changes_type_mid_file_is_refused_before_anything_is_written(
    make_recipe, tmp_path
):
    rows = [
        '{"question": "1 + 1?", "answer": 2}',
        '{"question": "1 + 2?", "answer": 3}',
        '{"question": "2 + 2?", "answer": [4]}',
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    recipe = make_recipe()
    data = {"kind": "jsonl", "train": str(tmp_path / "rows.jsonl"), "dev_size": 1}
    recipe = type(recipe).model_validate({**recipe.model_dump(), "dataset": data})
    with (
        pytest.raises(
            DataError, match=r"rows\.jsonl:3: answer is \[4\], a list; expected a number"
        ),
        open_run(recipe, Progress()),
    ):
        pass
    assert not recipe.folder.exists()


def test_a_run_continues_once_the_reward_is_fixed(make_recipe, tmp_path):
    straight = make_recipe(
        run_dir=str(tmp_path / "straight"), reward={"kind": f"{reward_file(tmp_path, SOUND)}:score"}
    )
    run_all(straight)
    (tmp_path / "other").mkdir()
    file = reward_file(tmp_path / "other", "raise OSError")
    recipe = make_recipe(reward={"kind": f"{file}:score"})
    with pytest.raises(ReftuneError):
        run_all(recipe)
    from reftune.grading.rewards.function import _function

    reward_file(tmp_path / "other", SOUND)
    _function.cache_clear()
    run_all(recipe)
    assert_same_outcome(recipe.folder, outcome(straight.folder))
