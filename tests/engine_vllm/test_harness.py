"""lm-evaluation-harness, with the command of docs/instruct.md and the task file of examples/, gives
the evaluated answers.

`make test-vllm`, whose environment has the harness, runs this file.
"""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from chat_families import MAX_NEW, run_of
from reftune import api
from reftune.datasets import load_splits
from reftune.recipe import parse_recipe
from reftune.runs.export import export_model

pytest.importorskip("lm_eval")

ROOT = Path(__file__).parents[2]
CASES = [
    pytest.param("llama3", {"style": "chat", "system": "Add up."}, id="chat"),
    pytest.param(
        "qwen3, not thinking",
        {"style": "chat", "template_args": {"enable_thinking": False}},
        id="template arguments",
    ),
    pytest.param("gemma", {"style": "compact"}, id="text after BOS"),
    pytest.param("gemma", {"style": "paper"}, id="no BOS"),
]


def documented() -> tuple[dict, list[str]]:
    """The documented task file, and the command's words."""
    task = yaml.safe_load((ROOT / "examples" / "lm_eval.yaml").read_text())
    page = (ROOT / "docs" / "instruct.md").read_text()
    command = re.search(r"```bash\n(lm_eval .*?)```", page, re.DOTALL)
    assert command
    return task, shlex.split(command[1].replace("\\\n", ""))


@pytest.mark.parametrize(("name", "format_keys"), CASES)
def test_the_documented_command_writes_what_was_evaluated(tmp_path, name, format_keys):
    run = run_of(tmp_path, name, format_keys=format_keys)
    out = export_model(run, "reft", tmp_path / "my-model")
    recipe = parse_recipe(yaml.safe_load((run / "recipe.yaml").read_text()))
    problems = load_splits(recipe).test
    with (tmp_path / "mine.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerows([["question", "answer"], *((p.question, p.answer) for p in problems)])
    task, words = documented()
    task["generation_kwargs"]["max_gen_toks"] = MAX_NEW
    if format_keys["style"] != "chat":
        words.remove("--apply_chat_template")
        prompt = recipe.format.prompt(problems[0])
        task["doc_to_text"] = prompt.replace(problems[0].question, "{{question}}")
    system = words.index("--system_instruction")
    if format_keys.get("system"):
        words[system + 1] = format_keys["system"]
    else:
        del words[system : system + 2]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=tmp_path,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = tmp_path.glob("results/**/samples_mine_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    found = {row["doc"]["question"]: row["resps"][0][0] for row in rows}
    expected = api.evaluate(run / "stages" / "reft", problems)
    assert found == {
        p.question: c.text for p, c in zip(problems, expected.completions, strict=True)
    }
    assert out.is_dir()
