"""Bad input through the real command line: exit status 2, one line on stderr with the value, its
place and what was expected, and nothing left behind."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from reftune.terminal.cli import main

RECIPE = """
name: tiny
model: {scratch: {hidden_size: 16, layers: 1, heads: 2, context: 80}}
dataset: {kind: jsonl, train: train.jsonl, test: test.jsonl, dev_size: 2}
format: {kind: nl}
lengths: {max_new: 12}
stages:
  sft: {kind: sft, epochs: 1, batch_size: 4, optimizer: {learning_rate: 1.0e-3}}
"""
RL = "stages.reft={kind: rl, init: sft, steps: 1, prompts: 2, optimizer: {learning_rate: 1.0e-3}}"
RANKER = (
    "stages.ranker={kind: reward_model, init: sft, sampler: sft, samples: 2, epochs: 1,"
    " batch_size: 4, optimizer: {learning_rate: 1.0e-3}}"
)
FOLDER = ["model.scratch=null", "model.path=./model"]
ONE_LAYER = json.dumps(
    {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
)


def row(a: int, **changes: Any) -> str:
    solution = f"{a} + 1 = {a + 1} . The answer is {a + 1}"
    return json.dumps(
        {"question": f"What is {a} + 1 ?", "answer": str(a + 1), "rationale": solution, **changes}
    )


def rows(*last: str) -> str:
    """Three good rows, then the given ones."""
    return "\n".join([row(1), row(2), row(3), *last])


UNSOLVED = "\n".join(json.dumps({"question": f"What is {a} ?", "answer": str(a)}) for a in range(8))
PROGRAM = "def solution():\n    return 5"

ANYWHERE: dict[str, tuple[list[str], dict[str, str | bytes], str]] = {
    # overrides, files, text on stderr
    "unknown key": (
        ["lengths.max_nw=3"],
        {},
        r"recipe\.yaml: lengths\.max_nw: unknown key; did you mean max_new\?",
    ),
    "unknown key of a stage": (
        ["stages.sft.epoch=3"],
        {},
        r"stages\.sft\.epoch: unknown key; did you mean epochs\?",
    ),
    "unknown kind": (
        ["dataset.kind=jsonll"],
        {},
        r"dataset: jsonll: unknown kind; did you mean jsonl\?",
    ),
    "wrong type": (
        ["stages.sft.batch_size=many"],
        {},
        r"stages\.sft\.batch_size: input should be a valid integer.*'many'",
    ),
    "a number for a table": (
        ["lengths=5"],
        {},
        r"lengths: input should be a valid dictionary.*got 5",
    ),
    "out of range": (
        ["lengths.max_new=-3"],
        {},
        r"lengths\.max_new: input should be greater than 0, got -3",
    ),
    "a moment's decay of 1 or more": (
        ["stages.sft.optimizer.betas=[0.9, 1]"],
        {},
        r"stages\.sft\.optimizer\.betas\.1: input should be less than 1, got 1",
    ),
    "a plug-in that is not Python": (
        ["reward=train.jsonl:score"],
        {},
        r"reward: train\.jsonl: not a Python file; expected file\.py:name",
    ),
    "no stages": (["stages={}"], {}, r"stages: dictionary should have at least 1 item"),
    "an override without =": (["lengths.max_new"], {}, r"'lengths\.max_new': expected key=value"),
    "torn YAML": ([], {"recipe.yaml": "name: [tiny\n"}, r"recipe\.yaml:2: not valid YAML"),
    "not a mapping": (
        [],
        {"recipe.yaml": "- name\n"},
        r"recipe\.yaml: expected a mapping of recipe keys, got list",
    ),
    "rationales of the other kind": (
        ["dataset={kind: word_problems}"],
        {},
        (
            r"recipe\.yaml: dataset\.rationale: program rationales, but format\.kind is nl;"
            r" expected the same for both"
        ),
    ),
    "rationales of the other kind, reversed": (
        ["dataset={kind: word_problems, rationale: nl}", "format.kind=program"],
        {},
        (
            r"recipe\.yaml: dataset\.rationale: nl rationales, but format\.kind is program;"
            r" expected the same for both"
        ),
    ),
    "words for a program": (
        ["format.kind=program"],
        {},
        r"problem train-\d: its rationale is not a program .*format\.kind=nl",
    ),
    "a program for words": (
        [],
        {
            "train.jsonl": rows(
                *(row(a, rationale=f"def solution():\n    return {a + 1}") for a in (4, 5, 6))
            )
        },
        r"problem train-[456]: its rationale is a program; expected natural language, or",
    ),
    "missing file": (
        ["dataset.train=nope.jsonl"],
        {},
        r"nope\.jsonl: no such file or folder; expected one, or a Hub id",
    ),
    "folder without the split": (
        ["dataset.train=data"],
        {"data/notes.md": ""},
        r"data: no file for the train split, found notes\.md; expected one like",
    ),
    "empty file": (
        [],
        {"train.jsonl": ""},
        r"train\.jsonl: no rows in the train split; expected at least one",
    ),
    "torn row": (
        [],
        {"train.jsonl": rows('{"question": "What')},
        r"train\.jsonl:4: not valid JSON .*; expected one object",
    ),
    "row without answer": (
        [],
        {"train.jsonl": rows('{"question": "Why?"}')},
        r"train\.jsonl:4: no column 'answer'; expected one of question",
    ),
    "row that is a list": (
        [],
        {"train.jsonl": rows("[1]")},
        r"train\.jsonl:4: \[1\] is a list; expected an object",
    ),
    "bytes that are no text": (
        [],
        {"train.jsonl": b"{\x81}"},
        r"train\.jsonl:1: byte 0x81 is not UTF-8; expected UTF-8",
    ),
    "answer the grader cannot read": (
        ["dataset.answer_kind=number"],
        {"train.jsonl": rows(row(4, answer="a dozen"))},
        r"train\.jsonl:4: answer is 'a dozen'; expected a number",
    ),
    "choice the grader cannot read": (
        [],
        {"train.jsonl": rows(row(4)).replace('"rationale"', '"choices": ["1", "9"], "rationale"')},
        r"train\.jsonl:1: answer is '2'; expected a letter from a to b or the text of one option",
    ),
    "answer that is null": (
        [],
        {"train.jsonl": rows(row(4, answer=None))},
        r"train\.jsonl:4: answer is None; expected a",
    ),
    "all of train is asked in test": (
        [],
        {"train.jsonl": rows(), "test.jsonl": rows()},
        r"dev_size 2: only 0 training questions left \(dropped: \d+ leak\); expected a smaller",
    ),
    "no dev": (
        ["dataset.dev_size=0"],
        {},
        r"dataset: no dev problems .*; set dataset\.dev_size or a dev file",
    ),
    "model that is not there": (
        ["model.scratch=null", "model.path=./nope"],
        {},
        r"nope: no such model folder; expected one, or a Hub id",
    ),
    "model folder without config": (
        FOLDER,
        {"model/readme": ""},
        r"model: not a model folder: no config\.json in it",
    ),
    "model folder without weights": (
        FOLDER,
        {"model/config.json": ONE_LAYER},
        r"cannot be loaded as a causal .* model\.safetensors",
    ),
    "model folder with a torn config": (
        FOLDER,
        {"model/config.json": "{"},
        r"model: cannot be loaded as a causal language",
    ),
    "model that cannot be": (
        ["model.scratch.heads=3"],
        {},
        r"hidden_size: 16 must be a multiple of 2 × heads = 6",
    ),
    "adapters on layers there are not": (
        ["model.lora.target_modules=[nope]"],
        {},
        r"model\.lora\.target_modules: .*nope",
    ),
    "adapters of which one is on a layer there is not": (
        ["model.lora.target_modules=[o_proj, qkv_porj]"],
        {},
        r"model\.lora\.target_modules: qkv_porj: no such module; did you mean qkv_proj\?",
    ),
    "stage that starts from nothing": (
        ["stages.sft.init=nope"],
        {},
        r"stages\.sft\.init: nope is not an earlier method; known",
    ),
}
"""Cases that `run` and `check` reject in the same words."""

LIMITS: dict[str, tuple[list[str], dict[str, str], str, str]] = {
    # overrides, files, text of `run`, text of `check`
    "prompt longer than the context": (
        ["model.scratch.context=18"],
        {},
        r"problem train-\d: prompt of 7 tokens; at most 6 fit .*context of 18 less 12 new",
        r"prompt_length: 100\.0% of prompts are too long: .* at most 6 fit; raise"
        r" lengths\.max_prompt",
    ),
    "prompt over the recipe's limit": (
        ["lengths.max_prompt=3"],
        {},
        r"problem train-\d: prompt of 7 tokens; at most 3 fit .*lengths\.max_prompt",
        r"prompt_length: 100\.0% of prompts are too long: .* at most 3 fit",
    ),
    "training prompt too long to sample from": (
        [RL],
        {"train.jsonl": rows(row(4), row(5, question=" ".join(["What is 5 + 1 ?"] * 12)))},
        r"problem train-5: prompt of \d+ tokens; at most 68 fit",
        r"prompt_length: .* are too long: .* at most 68 fit",
    ),
    "no training row left: targets too long": (
        ["lengths.max_new=2"],
        {},
        (
            r"no training row can be used: 6 of 6 have a rationale, and none .* fits in"
            r" lengths\.max_new=2 "
        ),
        (
            r"target_length: 100\.0% of targets are too long and not trained on: .*;"
            r" lengths\.max_new=\d+ keeps all"
        ),
    ),
    "no training row left: no rationales": (
        [],
        {"train.jsonl": UNSOLVED},
        r"no training row can be used: 0 of 6 have a rationale",
        r"splits: .* 0 train rows with a rationale.*; supervised stages need rationales",
    ),
    "no test problems": (
        ["dataset.test=null"],
        {},
        r"evaluate\.split: the dataset has no test problems; expected some, or evaluate\.split=dev",
        r"splits: .* 0 test; .*; add test problems, or set evaluate\.split=dev",
    ),
}
"""Cases that `run` rejects at the first row concerned, and `check` with all of them."""

FOLDERS: dict[str, tuple[list[str], dict[str, str | bytes], str]] = {
    "file in the way": (
        [],
        {"runs/tiny": ""},
        r"runs/tiny: cannot be a run folder: a file is in its place",
    ),
    "file above": (
        ["run_dir=train.jsonl/run"],
        {},
        r"train\.jsonl/run: cannot be a run folder: a file is in its place",
    ),
    "unwritable": (["run_dir=/proc/reftune/run"], {}, r"/proc/reftune: cannot be written: "),
    "of another recipe": (
        [],
        {"runs/tiny/recipe.yaml": "name: other\n", "runs/tiny/env.json": "{}"},
        (
            r"runs/tiny: belongs to another recipe: name was 'other', now 'tiny'; choose another"
            r" run_dir"
        ),
    ),
    "whose recipe is torn": (
        [],
        {"runs/tiny/recipe.yaml": b"\xff[", "runs/tiny/env.json": "{}"},
        r"runs/tiny/recipe\.yaml: not the recipe of a run; ",
    ),
    "whose recipe no run has stored": (
        [],
        {"runs/tiny/recipe.yaml": "name: tiny\n"},
        r"runs/tiny: is not empty and not a run folder; choose another run_dir",
    ),
    "with something else in it": (
        [],
        {"runs/tiny/notes.txt": ""},
        r"runs/tiny: is not empty and not a run folder; choose",
    ),
}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a recipe and data that run."""
    import torch

    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    train, test = ("\n".join(map(row, numbers)) for numbers in (range(8), range(20, 23)))
    write({"recipe.yaml": RECIPE, "train.jsonl": train, "test.jsonl": test})


def write(files: dict[str, Any]) -> None:
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The text on stderr of a command that exits with 2 and leaves nothing behind."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert sorted(Path().rglob("*")) == before
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("case", ANYWHERE)
def test_what_cannot_be_run_is_refused_in_one_line(
    case: str, command: str, capsys: pytest.CaptureFixture[str]
):
    overrides, files, expected = ANYWHERE[case]
    write(files)
    assert re.search(expected, refused(capsys, command, "recipe.yaml", *overrides))


@pytest.mark.parametrize("case", LIMITS)
def test_what_does_not_fit_is_refused_before_the_run_folder_is_made(
    case: str, capsys: pytest.CaptureFixture[str]
):
    overrides, files, of_run, of_check = LIMITS[case]
    write(files)
    assert re.search(of_run, refused(capsys, "run", "recipe.yaml", *overrides))
    assert re.search(
        f"^check failed: .*{of_check}", refused(capsys, "check", "recipe.yaml", *overrides)
    )


@pytest.mark.parametrize("case", FOLDERS)
def test_a_run_folder_that_cannot_be_used_is_left_as_it_is(
    case: str, capsys: pytest.CaptureFixture[str]
):
    overrides, files, expected = FOLDERS[case]
    write(files)
    assert re.search(expected, refused(capsys, "run", "recipe.yaml", *overrides))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["rl", "recipe.yaml", RL],
            r"runs/tiny/stages/sft: not trained yet; `reftune run` trains it",
        ),
        (
            ["rl", "recipe.yaml", RL, "stages.reft.init=stf"],
            r"stages\.reft\.init: stf is not an earlier method; known here: base, sft",
        ),
        (["eval", "recipe.yaml", "--method", "sft"], r"runs/tiny/stages/sft: not trained yet"),
        (
            ["eval", "recipe.yaml", "--method", "runs/other/stages/sft"],
            r"tiny: does not evaluate runs/other/stages/sft; evaluate.stages allows sft",
        ),
        (["eval", "recipe.yaml"], r"runs/tiny/stages/sft: not trained yet"),
        (["sample", "recipe.yaml", "--method", "sft"], r"runs/tiny/stages/sft: not trained yet"),
        (
            ["sample", "recipe.yaml", RANKER, "--method", "ranker"],
            r"ranker: not a method, so its model answers no questions",
        ),
        (
            ["sample", "recipe.yaml", "--method", "stf"],
            r"stf: neither a method of this recipe \(sft\) nor a model folder",
        ),
        (
            ["sample", "recipe.yaml", "dataset.test=null", "--method", "base", "--split", "test"],
            r"--split: the dataset has no test problems; expected another split",
        ),
        (["self-train", "recipe.yaml"], r"tiny: no stage of kind self_train; it has sft"),
        (
            ["demo", "stages.reft.stpes=1"],
            r"demo\.yaml: stages\.reft\.stpes: unknown key; did you mean steps\?",
        ),
        (
            ["demo", "dataset.operations=[3, 1]"],
            r"dataset: operations: expected \[minimum, maximum\] from 0 to 6",
        ),
        (["run", "nope.yaml"], r"nope\.yaml: no such recipe; nearest"),
        (["table", "runs/nope"], r"runs/nope: no such run folder"),
        (["report", "runs/nope"], r"runs/nope: no such run folder"),
        (
            ["export", "runs/nope", "--out", "model", "--method", "sft"],
            r"runs/nope: not a run folder: it has no recipe\.yaml",
        ),
        (["score", "nope.jsonl", "--format", "nl"], r"nope\.jsonl: cannot be read"),
        (
            ["score", "test.jsonl", "--format", "nl"],
            r"test\.jsonl:1: .* is missing; expected id, completion and answer",
        ),
    ],
    ids=str,
)
def test_other_commands_refuse_in_one_line_too(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
):
    assert re.search(expected, refused(capsys, *arguments))
