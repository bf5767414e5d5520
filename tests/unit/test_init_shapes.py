"""`reftune init` never writes a recipe that fails `reftune check`, whatever the rows are like."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checking import UNMEASURED, check_only
from reftune.advice.check import check_recipe
from reftune.errors import ReftuneError
from reftune.recipe import load_recipe
from reftune.terminal.init import Wishes, guess_columns, guess_format, write_recipe

LONG = "The weather was fine. " * 2000


def told(a: int, b: int, gold: str) -> str:
    return f"{a} + {b} = {gold}. The answer is {gold}."


def turns(question: str, *reply: str) -> list[dict[str, str]]:
    roles = ("system", "user", "assistant")
    return [
        {"role": role, "content": text}
        for role, text in zip(roles, ("Think.", question, *reply), strict=False)
    ]


def options(a: int, b: int) -> list[str]:
    return [str(a + b + slip) for slip in (-1, 0, 1, 2)]


SIZES = ["model.dtype=float32", "model.micro_batch_tokens=1024", "engine.batch_size=32"]
"""Given, so that nothing is measured."""
MEASURED_SHAPES = ("program", "trl")
"""Shapes for which memory and time are checked too: a model from scratch, and one in a folder."""
Make = Callable[[str, int, int, str], dict[str, Any]]
SHAPES: dict[str, Make] = {
    # (question, two numbers, the gold's spelling) → a row
    "plain": lambda q, a, b, g: {"question": q, "answer": g, "rationale": f"{a} + {b}."},
    "program": lambda q, a, b, g: {
        "question": q,
        "answer": g,
        "program": f"def solution():\n    return {a} + {b}",
    },
    "no rationale": lambda q, a, b, g: {"question": q, "answer": g},
    "alpaca": lambda q, a, b, g: {"instruction": "Add.", "input": q, "output": told(a, b, g)},
    "gsm8k": lambda q, a, b, g: {"question": q, "answer": f"<<{a}+{b}={a + b}>>\n#### {g}"},
    "math": lambda q, a, b, g: {"problem": q, "solution": f"So $\\boxed{{{g}}}$."},
    "messages": lambda q, a, b, g: {"messages": turns(q, told(a, b, g))},
    "trl": lambda q, a, b, g: {"prompt": turns(q), "solution": g},
    "verl": lambda q, a, b, g: {"prompt": turns(q), "reward_model": {"ground_truth": g}},
    "arc": lambda q, a, b, g: {
        "question": q,
        "choices": {"text": options(a, b), "label": list("ABCD")},
        "answerKey": "B",
    },
    "columns": lambda q, a, b, g: {
        "question": q,
        **dict(zip("ABCD", options(a, b), strict=True)),
        "answer": "B",
    },
}
SPELLINGS: dict[str, Callable[[int, random.Random], str]] = {
    "numbers": lambda n, rng: rng.choice([f"{n}", f"${n}", f"{n} pens", f"{n}.0", f"{n}/1"]),
    "words": lambda n, rng: f"{rng.choice(['about', 'red', 'Paris'])} {chr(97 + n % 26)}x",
    "mixed": lambda n, rng: rng.choice([f"{n}", f"\\sqrt{{{n}}}", f"({n}, {n + 1})", f"{n} May"]),
}


@pytest.fixture(scope="module")
def model(make_policy, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with a context of 64 tokens."""
    folder, policy = tmp_path_factory.mktemp("model"), make_policy("llama")
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return str(folder)


CASES = [
    *((shape, "numbers", bool(i % 2)) for i, shape in enumerate(SHAPES)),
    *(
        pytest.param(shape, spelling, False, marks=pytest.mark.slow)
        for shape in ("plain", "alpaca")
        for spelling in ("words", "mixed")
    ),
]


@pytest.mark.parametrize(("shape", "spelling", "one_is_long"), CASES)
def test_recipes_that_init_writes_pass_check(
    shape: str,
    spelling: str,
    one_is_long: bool,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = random.Random(f"{shape} {spelling} {one_is_long}")
    rows = []
    for i in range(24):
        a, b = 10 + i % 8, 20 + i // 8
        question = f"{LONG if one_is_long and i == 5 else ''}{a} and {b}?"
        rows.append(SHAPES[shape](question, a, b, SPELLINGS[spelling](a + b, rng)))
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = guess_columns("data.jsonl").named
    wishes = Wishes(
        data="data.jsonl",
        model="scratch" if columns.get("rationale") else model,
        format=guess_format("data.jsonl", columns),
        columns=columns,
    )
    refusal = ""
    try:
        write_recipe(wishes, Path("data.yaml"))
    except ReftuneError as error:
        refusal = str(error)
    assert Path("data.yaml").exists() == (not refusal)
    if refusal:
        assert spelling != "numbers", f"these golds can be read: {refusal}"
        return
    if shape in MEASURED_SHAPES:
        failed = check_recipe(load_recipe("data.yaml")).failed
    else:
        failed = check_only(load_recipe("data.yaml", SIZES), UNMEASURED).failed
    assert not failed, failed
