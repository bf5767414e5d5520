"""Recipes are read, merged, overridden and rejected. The plug-ins are a user's own file, so nothing
heavy is imported."""

from pathlib import Path
from textwrap import dedent

import pytest
import yaml

from reftune.errors import RecipeError
from reftune.recipe import Recipe, dump_recipe, known_kinds, load_recipe, merge

PLUGINS = """
from __future__ import annotations
from pathlib import Path
from pydantic import Field
from reftune.recipe import Component

class Part(Component):
    size: int = Field(3, gt=0)
    folder: Path = Path()

    def load(self): ...
    prompt = target = grade = generate = __call__ = load

class Train(Component):
    init: str = "base"
    steps: int = 10
    rate: float = 0.1

    def run(self, context): ...
    cost = needs = produces = run

def pay(completions, **columns):
    return [1.0 for _ in completions]

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the test, with a user's plug-ins and a whole recipe in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(PLUGINS)
    recipe = """
        name: tiny
        model: {scratch: {hidden_size: 32}}
        dataset: {kind: "mine.py:Part", size: 5}
        format: mine.py:Part
        reward: mine.py:Part
        engine: mine.py:Part
        stages:
          sft: {kind: "mine.py:Train"}
          reft: {kind: "mine.py:Train", init: sft, rate: 1e-3}
    """
    (tmp_path / "tiny.yaml").write_text(dedent(recipe))
    return tmp_path


def refusal(*overrides: str, path: str = "tiny.yaml") -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, "a user's error is one line"
    return message


def test_a_users_own_file_gives_the_classes(folder: Path):
    recipe = load_recipe("tiny.yaml")
    assert recipe.dataset.size == 5
    assert recipe.format.size == 3
    assert type(recipe.dataset).__name__ == "Part"
    assert recipe.stages["reft"].rate == 0.001
    assert recipe.folder == Path("runs/tiny")


def test_a_dumped_recipe_reads_back_equal(folder: Path):
    recipe = load_recipe("tiny.yaml", ["stages.reft.steps=7", "model.lora.rank=4"])
    (folder / "dumped.yaml").write_text(dump_recipe(recipe))
    again = load_recipe("dumped.yaml")
    assert again.model_dump() == recipe.model_dump()
    assert dump_recipe(again) == dump_recipe(recipe)


def test_overrides_reach_any_depth_and_are_read_as_yaml(folder: Path):
    recipe = load_recipe(
        "tiny.yaml", ["stages.reft.steps=7", "lengths.max_new=9", "evaluate.stages=[sft]", "seed=3"]
    )
    assert (
        recipe.stages["reft"].steps,
        recipe.lengths.max_new,
        recipe.evaluate.stages,
        recipe.seed,
    ) == (7, 9, ["sft"], 3)


def test_an_override_changes_no_other_stage_that_shares_a_yaml_anchor(folder: Path):
    text = (folder / "tiny.yaml").read_text()
    shared = "  more: &table {kind: 'mine.py:Train', rate: 1}\n  reft: *table\n"
    (folder / "tiny.yaml").write_text(text.partition("  reft:")[0] + shared)
    stages = load_recipe("tiny.yaml", ["stages.reft.rate=5"]).stages
    assert (stages["more"].rate, stages["reft"].rate) == (1, 5)


def test_a_null_override_removes_a_table_but_sets_any_other_key(folder: Path):
    recipe = load_recipe("tiny.yaml", ["stages.reft=null", "run_dir=a", "run_dir=null"])
    assert [*recipe.stages] == ["sft"]
    assert recipe.run_dir is None


@pytest.mark.parametrize(
    "written", ["reward: mine.py:Part\n", "reward: {kind: 'mine.py:Part'}\n", "reward:\n", ""]
)
def test_null_restores_the_default_of_a_component_however_it_is_written(folder: Path, written: str):
    text = (folder / "tiny.yaml").read_text()
    (folder / "tiny.yaml").write_text(text.replace("reward: mine.py:Part\n", written))
    (folder / "child.yaml").write_text("extends: tiny.yaml\nreward: null\nengine: null")
    given = load_recipe("tiny.yaml", ["reward=null", "engine=null"])
    for recipe in (given, load_recipe("child.yaml")):
        assert (recipe.reward.kind, recipe.engine.kind) == ("outcome", "kv")


def test_null_removes_a_stage_that_is_written_as_a_kind(folder: Path):
    (folder / "base.yaml").write_text((folder / "tiny.yaml").read_text() + "  last: mine.py:Train")
    (folder / "child.yaml").write_text("extends: base.yaml\nstages: {last: null}")
    assert [*load_recipe("base.yaml").stages] == ["sft", "reft", "last"]
    for recipe in (load_recipe("base.yaml", ["stages.last=null"]), load_recipe("child.yaml")):
        assert [*recipe.stages] == ["sft", "reft"]
    with pytest.raises(RecipeError, match=r"stages\.other: expected a kind"):
        load_recipe("base.yaml", ["stages.other=null"])


def test_null_is_a_value_of_a_key_that_may_be_null(folder: Path):
    data = "dataset={kind: jsonl, train: a, columns: {rationale: solution, id: name}}"
    columns = load_recipe("tiny.yaml", [data, "dataset.columns.rationale=null"]).dataset.columns
    assert (columns.rationale, columns.id) == (None, "name")


@pytest.mark.parametrize(
    "text",
    [
        "Think. End with #### and 5.",
        "#1 only",
        "Be careful: exact",
        "Answer:",
        "a\t# b",
        '"A:" #### n',
    ],
)
def test_an_override_may_be_text_that_yaml_would_cut_off(folder: Path, text: str):
    assert load_recipe("tiny.yaml", [f"stages.reft.init={text}"]).stages["reft"].init == text


def test_an_override_may_be_a_mapping_in_braces_or_a_quoted_text(folder: Path):
    recipe = load_recipe("tiny.yaml", ["lengths={max_new: 9}", "stages.reft.init='a: #b'"])
    assert (recipe.lengths.max_new, recipe.stages["reft"].init) == (9, "a: #b")


def test_a_key_of_a_part_with_a_default_kind_needs_no_kind(folder: Path):
    text = (folder / "tiny.yaml").read_text()
    (folder / "tiny.yaml").write_text(
        text.replace("engine: mine.py:Part", "").replace("reward: mine.py:Part", "")
        + "  ppo: {kind: rl, init: sft, steps: 1, prompts: 1, optimizer: {learning_rate: 1}}\n"
    )
    recipe = load_recipe(
        "tiny.yaml", ["engine.batch_size=7", "reward.partial=0", "stages.ppo.algorithm.kl_coef=0.5"]
    )
    assert (recipe.engine.kind, recipe.engine.batch_size) == ("kv", 7)
    assert (recipe.reward.kind, recipe.reward.partial) == ("outcome", 0)
    algorithm = recipe.stages["ppo"].algorithm
    assert (algorithm.kind, algorithm.kl_coef) == ("ppo", 0.5)


def test_an_override_of_a_bare_kind_keeps_the_kind(folder: Path):
    assert load_recipe("tiny.yaml", ["format.size=8"]).format.size == 8


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lenghts.max_new=3", "tiny.yaml: lenghts: unknown key; did you mean lengths?"),
        ("stages.reft.step=3", "tiny.yaml: stages.reft.step: unknown key; did you mean steps?"),
        (
            "model.scratch.hiden_size=3",
            "tiny.yaml: model.scratch.hiden_size: unknown key; did you mean hidden_size?",
        ),
        ("zzz=3", "tiny.yaml: zzz: unknown key; known keys: name, seed"),
        (
            "seed=many",
            (
                "tiny.yaml: seed: input should be a valid integer, unable to parse string as an"
                " integer, got 'many'"
            ),
        ),
        ("dataset.size=-1", "tiny.yaml: dataset.size: input should be greater than 0, got -1"),
        ("name=../up", "tiny.yaml: name: string should match pattern"),
        ("model.path=gpt2", "tiny.yaml: model: set exactly one of path and scratch"),
        ("dataset=gsm8", "tiny.yaml: dataset: gsm8: unknown kind; "),
        ("dataset=5", "tiny.yaml: dataset: expected a kind ("),
        ("dataset={size: 5}", "tiny.yaml: dataset: expected a kind ("),
        ("dataset=other.py:Part", "tiny.yaml: dataset: other.py: no such file"),
        ("dataset=mine.py:Nothing", "tiny.yaml: dataset: mine.py has no Nothing; it defines "),
        (
            "dataset=mine.py:pay",
            (
                "tiny.yaml: dataset: mine.py:pay is a function; datasets are classes derived from"
                " Component"
            ),
        ),
        ("stages=[1]", "tiny.yaml: stages: input should be a valid dictionary"),
        ("seed", "'seed': expected key=value"),
        ("=3", "'=3': expected key=value"),
    ],
)
def test_a_wrong_key_or_value_is_refused_in_one_line_with_its_place(
    folder: Path, override: str, expected: str
):
    assert refusal(override).startswith(expected)


def test_an_unknown_kind_names_the_nearest_one(folder: Path):
    # word_problems differs from wordproblems by one character
    assert refusal("dataset=wordproblems").endswith(
        "wordproblems: unknown kind; did you mean word_problems?"
    )


def test_a_missing_key_is_named(folder: Path):
    assert refusal("model=null").startswith("tiny.yaml: model: field required")
    (folder / "short.yaml").write_text("{name: short, reward: mine.py:Part, engine: mine.py:Part}")
    assert refusal(path="short.yaml") == "short.yaml: model: field required"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "broken.yaml: expected a mapping of recipe keys, got NoneType"),
        ("- 1", "broken.yaml: expected a mapping of recipe keys, got list"),
        ("1: 2", "broken.yaml: expected keys that are text, got 1"),
        ("[1]: 2", "broken.yaml:1: not valid YAML: found unhashable key"),
        ("name: x\nmodel: {", "broken.yaml:2: not valid YAML: "),
        ("seed: 1\nname: x\nseed: 2", "broken.yaml:3: not valid YAML: the key seed occurs twice"),
        ("a: {b: 1,\n c: 2, b: 3}", "broken.yaml:2: not valid YAML: the key b occurs twice"),
        ("extends: broken.yaml", "broken.yaml: extends itself"),
        ("extends: nowhere.yaml", "nowhere.yaml: no such recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(folder: Path, text: str, expected: str):
    (folder / "broken.yaml").write_text(text)
    assert refusal(path="broken.yaml").startswith(expected)


def test_a_missing_folder_or_binary_file_is_refused(folder: Path):
    assert refusal(path="nope.yaml") == "nope.yaml: no such recipe"
    assert refusal(path=".").startswith(".: cannot be read: ")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert refusal(path="binary.yaml").startswith("binary.yaml: cannot be read: ")


def test_extends_merges_relative_to_the_file_that_has_it(folder: Path):
    (folder / "more").mkdir()
    (folder / "more" / "half.yaml").write_text("seed: 5\nlengths: {max_new: 11}")
    (folder / "more" / "child.yaml").write_text(
        "extends: [../tiny.yaml, half.yaml]\nname: child\nstages: {reft: {steps: 3}}"
    )
    recipe = load_recipe("more/child.yaml")
    assert (recipe.name, recipe.seed, recipe.lengths.max_new) == ("child", 5, 11)
    assert (recipe.stages["reft"].steps, recipe.stages["reft"].init) == (3, "sft")


def test_merge_replaces_a_table_of_another_kind_and_null_removes():
    base = {"reward": {"kind": "a", "x": 1}, "seed": 1, "check": {"waive": ["eos"]}}
    over = {"reward": {"kind": "b"}, "seed": None, "check": {"min_gold_correct": 0.5}}
    assert merge(base, over) == {
        "reward": {"kind": "b"},
        "check": {"waive": ["eos"], "min_gold_correct": 0.5},
    }


@pytest.mark.parametrize(
    ("base", "over", "expected"),
    [
        ({"kind": "a", "x": 1}, "a", {"kind": "a", "x": 1}),
        ({"kind": "a", "x": 1}, "b", {"kind": "b"}),
        ("a", {"x": 1}, {"kind": "a", "x": 1}),
        ("a", {"kind": "b", "x": 1}, {"kind": "b", "x": 1}),
        ("a", "b", "b"),
        ({"x": 1}, "a", {"kind": "a", "x": 1}),
        ({"x": 1}, {"kind": "a", "y": 2}, {"kind": "a", "x": 1, "y": 2}),
    ],
)
def test_merge_takes_a_bare_kind_for_a_table(base, over, expected):
    assert merge({"reward": base}, {"reward": over}) == {"reward": expected}


def test_the_dump_names_every_default(folder: Path):
    document = yaml.safe_load(dump_recipe(load_recipe("tiny.yaml")))
    assert set(document) == set(Recipe.model_fields)
    assert document["evaluate"]["split"] == "test"


def test_kinds_are_the_files_of_the_folder():
    assert "word_problems" in known_kinds("datasets")
    assert "sft" in known_kinds("stages")
    assert not any(kind.startswith("_") for kind in known_kinds("engines"))
