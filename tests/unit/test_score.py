"""Files of completions become lines of verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chat_families import FAMILIES, make_tokenizer
from reftune.errors import DataError, RecipeError, RewardError
from reftune.recipe import load_recipe
from reftune.terminal.score import problem_of, score_as_recipe, score_file

TRIGGER = "\nTherefore, the answer is: "


def scored(
    folder: Path, *rows: object, kind: Any = "nl", grading: Any = "robust"
) -> list[dict[str, Any]]:
    file = folder / "completions.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return list(score_file(file, kind, grading=grading))


def row(completion: str, answer: object, **others: object) -> dict[str, object]:
    return {"id": 7, "completion": completion, "answer": answer, **others}


def test_a_line_becomes_a_line_with_its_own_id(tmp_path: Path) -> None:
    first, second = scored(tmp_path, row("The answer is 5", 5), {**row("42", 42), "id": "b"})
    assert first == {
        "id": 7,
        "verdict": "correct",
        "value": "5",
        "reward": 1.0,
        "reason": "5 is the gold answer 5",
    }
    assert (second["id"], second["verdict"], second["value"], second["reward"]) == (
        "b",
        "no_answer",
        None,
        0.0,
    )


@pytest.mark.parametrize("answer", [18, 18.0, "18", "$18.00", "9 + 9 = 18\n#### 18", "36/2"])
def test_a_gold_number_may_be_spelled_in_any_way(tmp_path: Path, answer: object) -> None:
    assert scored(tmp_path, row("The answer is 18", answer))[0]["verdict"] == "correct"


@pytest.mark.parametrize("answer", ["b", "B", "(b)", "20", 20])
def test_a_gold_choice_may_be_a_letter_or_a_value(tmp_path: Path, answer: object) -> None:
    assert (
        scored(tmp_path, row("The answer is b", answer, choices=["10", 20]))[0]["verdict"]
        == "correct"
    )


@pytest.mark.parametrize("kind", [{}, {"answer_kind": "choice"}])
def test_a_gold_letter_without_options_accepts_the_letter_in_brackets(
    tmp_path: Path, kind: dict[str, str]
) -> None:
    line = {**row("The answer is (B)", "b"), **kind}
    assert scored(tmp_path, line)[0]["verdict"] == "correct"


def test_a_gold_text_is_compared_as_text(tmp_path: Path) -> None:
    assert [
        r["verdict"]
        for r in scored(tmp_path, row("#### paris.", "Paris"), row("#### Rome", "Paris"))
    ] == ["correct", "wrong"]


def test_programs_are_run(tmp_path: Path) -> None:
    results = scored(
        tmp_path,
        row("def solution():\n    return 5", 5),
        row("def solution():\n    return 4", 5),
        kind="program",
    )
    assert [(r["verdict"], r["reward"]) for r in results] == [("correct", 1.0), ("wrong", 0.1)]


def test_paper_grading_rewards_a_wrong_choice_too(tmp_path: Path) -> None:
    item = row(f"so{TRIGGER}a", "b", choices=["10", "20"])
    assert scored(tmp_path, item, grading="paper")[0]["reward"] == 0.1
    assert scored(tmp_path, item)[0]["reward"] == 0.0


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    assert len(scored(tmp_path, "\ufeff" + json.dumps(row("", 5)), "", row("", 5), "")) == 2


def test_more_lines_than_a_batch_keep_their_order(tmp_path: Path) -> None:
    rows = [{**row(f"The answer is {number}", number), "id": number} for number in range(600)]
    assert [result["id"] for result in scored(tmp_path, *rows)] == list(range(600))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "2: not valid JSON"),
        ("[1]", r"2: \[1\] is a list; expected an object with named columns"),
        ({"id": 1, "completion": "x"}, "2: answer is missing"),
        ({"id": 1, "answer": 5}, "2: completion is missing"),
        ({"completion": "x", "answer": 5}, "2: id is missing"),
        ({"id": 1, "completion": 5, "answer": 5}, "2: completion: expected a string, got int"),
        (
            {"id": 1, "completion": "x", "answer": [5]},
            r"2: answer is \[5\], a list; expected a number, text or a letter",
        ),
        # JSON's NaN is a missing value, as in any other data file
        ({"id": 1, "completion": "x", "answer": float("nan")}, "2: answer is missing"),
        (
            {"id": 1, "completion": "x", "answer": float("inf")},
            "2: answer is inf; expected a number, text or a letter",
        ),
        (
            {"id": 1, "completion": "x", "answer": " "},
            "2: answer is ''; expected a number, text or a letter",
        ),
        (
            {"id": 1, "completion": "x", "answer": "c", "choices": ["1", "2"]},
            "2: answer is 'c'; expected a letter from a to b or the text of one option",
        ),
        (
            {"id": 1, "completion": "x", "answer": "a", "choices": "1 or 2"},
            "2: choices is '1 or 2'; expected a list",
        ),
    ],
)
def test_a_bad_line_is_named_before_anything_is_graded(
    tmp_path: Path, line: object, message: str
) -> None:
    with pytest.raises(DataError, match=f"completions.jsonl:{message}"):
        scored(tmp_path, row("The answer is 5", 5), line)


def test_an_empty_or_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"completions\.jsonl: empty"):
        scored(tmp_path, "")
    with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot be read"):
        score_file(tmp_path / "nowhere.jsonl", "nl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xffx")
    with pytest.raises(DataError, match=r"bytes\.jsonl:1: byte 0xff is not UTF-8"):
        score_file(tmp_path / "bytes.jsonl", "nl")


RECIPE = """
name: own
model: {{scratch: {{hidden_size: 8, layers: 1, heads: 1}}}}
dataset: {{kind: jsonl, train: nowhere.jsonl, answer_kind: {kind}}}
format: {format}
stages: {{sft: {{kind: sft, epochs: 1, batch_size: 4, optimizer: {{learning_rate: 1.0e-3}}}}}}
reward: {{kind: outcome, partial: 0.25}}
"""


def as_recipe(folder: Path, *rows: object, kind: str, format: str) -> list[dict[str, Any]]:
    recipe, file = folder / "own.yaml", folder / "completions.jsonl"
    recipe.write_text(RECIPE.format(kind=kind, format=format))
    file.write_text("\n".join(map(json.dumps, rows)))
    return list(score_as_recipe(file, load_recipe(recipe)))


def test_a_recipe_scores_with_its_own_format_and_reward(tmp_path: Path) -> None:
    rows = [row("print(2 + 3)", 5), row("print(2 + 2)", 5), row("return 5", 5)]
    scored = as_recipe(tmp_path, *rows, kind="auto", format="{kind: program, scripts: read}")
    assert [each["reward"] for each in scored] == [1.0, 0.25, 1.0]
    plain = as_recipe(tmp_path, *rows, kind="auto", format="{kind: program}")
    assert [each["verdict"] for each in plain] == ["no_answer", "no_answer", "correct"]


def test_a_reward_class_of_a_recipe_that_fails_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from reftune.recipe import Component\n"
        "class Mine(Component):\n"
        "    def __call__(self, problems, completions, graded):\n"
        "        return [1 / (c.text != '5') for c in completions]\n"
    )
    file, recipe = tmp_path / "completions.jsonl", tmp_path / "own.yaml"
    file.write_text("\n".join(json.dumps(row(text, 5, id=text)) for text in ("4", "5")))
    recipe.write_text(RECIPE.format(kind="auto", format="{kind: nl}"))
    loaded = load_recipe(recipe, [f"reward={tmp_path / 'mine.py'}:Mine"])
    with pytest.raises(RewardError, match=r"mine\.py:Mine: sample 5: ZeroDivisionError: division"):
        list(score_as_recipe(file, loaded))


def test_a_recipe_scores_with_its_own_answer_kind_and_a_line_may_have_another(
    tmp_path: Path,
) -> None:
    rows = [
        row("The answer is b, a", ["a", "b"]),
        row("The answer is b, a", ["a", "b"], answer_kind="list"),
        row("The answer is b", ["a", "b"], answer_kind="any_of"),
    ]
    scored = as_recipe(tmp_path, *rows, kind="set", format="nl")
    assert [each["verdict"] for each in scored] == ["correct", "wrong", "correct"]


def test_a_recipe_with_decimal_commas_reads_them_in_golds_answers_and_parts(tmp_path: Path) -> None:
    rows = [
        row("The answer is 3,5", "3,5"),
        row("The answer is 4,5; 3,5", ["3,5", "4,5"], answer_kind="set"),
        row("The answer is 45; 35", ["3,5", "4,5"], answer_kind="set"),
    ]
    scored = as_recipe(tmp_path, *rows, kind="auto", format='{kind: nl, decimal: ","}')
    assert [each["verdict"] for each in scored] == ["correct", "correct", "wrong"]


@pytest.mark.parametrize("style", ["chat", "compact"])
@pytest.mark.parametrize("name", ["r1", "llama3"])
def test_a_completion_that_ends_inside_the_thought_of_the_chat_template_has_no_answer(
    tmp_path: Path, name: str, style: str
) -> None:
    make_tokenizer(FAMILIES[name]).save_pretrained(tmp_path / "model")
    (tmp_path / "completions.jsonl").write_text(
        "\n".join(
            json.dumps(row(text, 5))
            for text in (
                "so the answer is 5. Wait, let me recheck",
                "is the answer 6?\n</think>\n\nThe answer is 5",
            )
        )
    )
    (tmp_path / "own.yaml").write_text(
        RECIPE.format(kind="auto", format=f"{{kind: nl, style: {style}}}")
    )
    path = tmp_path / "model"
    recipe = load_recipe(tmp_path / "own.yaml", ["model.scratch=null", f"model.path={path}"])
    scored = score_as_recipe(tmp_path / "completions.jsonl", recipe)
    cut = "no_answer" if (name, style) == ("r1", "chat") else "correct"
    assert [each["verdict"] for each in scored] == [cut, "correct"]


def test_a_chat_recipe_without_its_tokenizer_still_scores_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "completions.jsonl").write_text(json.dumps(row("The answer is 5", 5)))
    (tmp_path / "own.yaml").write_text(RECIPE.format(kind="auto", format="{kind: nl, style: chat}"))
    recipe = load_recipe(tmp_path / "own.yaml", ["model.scratch=null", "model.path=./nowhere"])
    (scored,) = score_as_recipe(tmp_path / "completions.jsonl", recipe)
    assert scored["verdict"] == "correct"
    assert (
        "did not begin a thought (such as <think>): ./nowhere: no such model folder" in caplog.text
    )


def test_an_unknown_answer_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="answer_kind: 'sets'; expected one of auto, number"):
        scored(tmp_path, row("x", 5, answer_kind="sets"))


def test_unknown_grading_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="robist: unknown rules"):
        scored(tmp_path, row("x", 5), grading="robist")


def test_options_with_letters_are_options_without_them(tmp_path: Path) -> None:
    choices = ["a ) 38", "b ) 12", "c ) 30"]
    result = scored(tmp_path, row("The answer is 30", "c", choices=choices))
    assert result[0]["verdict"] == "correct"
    assert scored(tmp_path, row("The answer is c", "30", choices=choices))[0]["value"] == "c"


def test_null_counts_as_not_set(tmp_path: Path) -> None:
    line = row("The answer is 5", 5, answer_kind=None, choices=None, question=None)
    assert scored(tmp_path, line)[0]["verdict"] == "correct"
    assert problem_of(line, "here").question == ""
