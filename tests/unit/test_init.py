"""`reftune init` turns a file of questions into a recipe that passes `reftune check`."""

import csv
import io
import json
import math
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError

from chat_families import save_model
from reftune.datasets import Splits
from reftune.datasets.jsonl import Jsonl
from reftune.errors import DataError
from reftune.recipe import known_kinds, load_recipe
from reftune.stages.plateau import LOOKS
from reftune.terminal.cli import find_recipe, main
from reftune.terminal.init import Wishes, default_out, guess_columns, guess_format

PROGRAM = "def solution():\n    a = {a}\n    b = {b}\n    return a + b"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_csv(
    path: Path, header: list[str], count: int = 40, rationale: str = "{a} + {b} = {c}."
) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for i in range(count):
            a, b = (
                10 + i % 8,
                20 + i // 8,
            )  # 40 questions of few numbers, so that train holds those of dev
            row = [
                f"Ann has {a} pens and finds {b}. How many?",
                str(a + b),
                rationale.format(a=a, b=b, c=a + b),
            ]
            writer.writerow(row[: len(header)])


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize("rationale", ["{a} + {b} = {c}.", PROGRAM])
def test_the_recipe_passes_check(here: Path, capsys: pytest.CaptureFixture[str], rationale: str):
    write_csv(here / "mine.csv", ["Prompt", "gold", "solution"], rationale=rationale)
    assert status("init", "--data", "mine.csv", "--model", "scratch") == 0
    out, err = capsys.readouterr()
    form = "program" if rationale is PROGRAM else "nl"
    assert out == "mine.yaml\n"
    assert err.splitlines() == [
        "columns: question is Prompt, answer is gold, rationale is solution",
        f"stdin is not a terminal, so the default is used: --format {form}",
        "golds  number 40: 30 → 30, 31 → 31, 32 → 32",
        "next: reftune check mine.yaml",
    ]
    recipe = load_recipe("mine.yaml")
    assert recipe.format.kind == form
    assert list(recipe.stages) == ["sft", "reft"]
    assert (here / "mine.yaml").read_text().count("#") > 10, "it explains itself"
    assert status("check", "mine.yaml", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert not [f for f in report["findings"] if f["level"] != "ok" and f["name"] != "splits"]
    assert report["preview"]["prompt"].startswith("Ann has")
    assert report["preview"]["target_tokens"][-1] == "<eos>"
    assert len(report["samples"]) == 3
    assert recipe.threads == 1
    assert all(sample["verdict"] and sample["reason"] for sample in report["samples"])


@pytest.mark.parametrize("name", ["2024", "2024-01-05", "null", "on"])
def test_a_name_that_yaml_reads_as_another_value_stays_a_name(here: Path, name: str):
    write_csv(here / f"{name}.csv", ["question", "answer", "rationale"])
    assert status("init", "--data", f"{name}.csv", "--model", "scratch") == 0
    assert load_recipe(f"{name}.yaml").name == name


def test_without_rationales_there_is_no_warm_up(here: Path, make_policy):
    policy = make_policy("llama")
    policy.model.save_pretrained(here / "model")
    policy.tokenizer.save_pretrained(here / "model")
    write_csv(here / "mine.csv", ["question", "answer"])
    assert status("init", "--data", "mine.csv", "--model", str(here / "model")) == 0
    recipe = load_recipe("mine.yaml")
    assert {name: stage.init for name, stage in recipe.stages.items()} == {"reft": "base"}
    assert recipe.model.path == str(here / "model")
    assert recipe.evaluate.split == "dev"
    assert recipe.methods_to_evaluate == ["base", "reft"], "the report shows what RL has gained"
    others = ", ".join(kind for kind in known_kinds("algorithms") if kind != "ppo")
    assert f"kl_coef: 0.01}}   # or {others}\n" in Path("mine.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("num_rows", [5, 13, 144, 160, 200, 7000])  # of rationales
@pytest.mark.parametrize("model", ["scratch", "model"])
def test_the_warm_up_has_enough_dev_evaluations_to_be_judged(
    here: Path, make_policy, model: str, num_rows: int
):
    policy = make_policy("llama")
    policy.model.save_pretrained(here / "model")
    policy.tokenizer.save_pretrained(here / "model")
    write_csv(here / "mine.csv", ["question", "answer", "rationale"])
    assert status("init", "--data", "mine.csv", "--model", model) == 0
    recipe = load_recipe("mine.yaml")
    sft = recipe.stages["sft"]
    assert recipe.stages["reft"].init == "warmup"
    assert recipe.evaluate.stages is None
    # the rule of `train_in_epochs`; five evaluations need five steps
    steps_per_epoch = max(5, math.ceil(num_rows / sft.batch_size))
    warmup, every = (round(e * steps_per_epoch) for e in (sft.snapshots["warmup"], sft.eval_every))
    assert warmup // max(1, every) >= LOOKS + 1


@pytest.mark.parametrize(("kind", "said"), [("nl", "The answer is"), ("program", "solution()")])
def test_an_instruct_model_is_asked_in_its_own_template(here: Path, kind: str, said: str):
    save_model("qwen2.5", here / "model")
    write_csv(here / "mine.csv", ["question", "answer"])
    told = ["--data", "mine.csv", "--model", str(here / "model"), "--format", kind]
    assert status("init", *told) == 0
    recipe = load_recipe("mine.yaml")
    assert (recipe.format.kind, recipe.format.style) == (kind, "chat")
    assert said in recipe.format.instruction
    assert {name: stage.init for name, stage in recipe.stages.items()} == {"reft": "base"}
    assert (
        "multiply each learning_rate below by about ten, but not value_learning_rate"
        in (here / "mine.yaml").read_text()
    )


@pytest.mark.parametrize(
    ("told", "is_kept"),
    [
        ("%s Put the final answer within \\boxed{}.", True),
        ('%s Output the final answer after "####".', True),
        ("The last line should be of the form Answer: $Answer.\n\n%s", True),
        ("%s Conclude with: The answer is X.", True),
        ("Answer the following question. %s", False),
        ("Question: %s\nAnswer:", False),
        ("Choose the correct answer: %s", False),
        ("#### Problem\n%s", False),
        ("Tom says the answer is 5. Is he right? %s", False),
        ("Think step by step. %s", False),
    ],
)
def test_no_instruction_is_added_to_questions_that_say_how_to_answer(
    here: Path, told: str, is_kept: bool
):
    save_model("qwen2.5", here / "model")
    questions = [told.replace("%s", f"How much is {n} + {n}?") for n in range(12, 24)]
    rows = [{"question": q, "answer": str(2 * n)} for n, q in enumerate(questions, 12)]
    (here / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert status("init", "--data", "mine.jsonl", "--model", str(here / "model")) == 0
    recipe = load_recipe("mine.yaml")
    assert recipe.format.style == "chat"
    assert (recipe.format.instruction is None) == is_kept
    assert ("already contain one" in (here / "mine.yaml").read_text()) == is_kept


def test_a_system_message_that_says_how_to_answer_is_the_only_instruction(here: Path):
    save_model("qwen2.5", here / "model")
    system = {"role": "system", "content": "Think, then answer within <answer> tags."}
    rows = [
        {"prompt": [system, {"role": "user", "content": f"How much is {n} + {n}?"}], "solution": n}
        for n in range(12, 24)
    ]
    (here / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert status("init", "--data", "mine.jsonl", "--model", str(here / "model")) == 0
    assert load_recipe("mine.yaml").format.instruction is None


def test_an_instruction_is_added_unless_all_questions_say_how_to_answer(here: Path):
    save_model("qwen2.5", here / "model")
    rows = [
        {"question": f"How much is {n} + {n}?" + " Use \\boxed{}." * (n > 12), "answer": 2 * n}
        for n in range(12, 24)
    ]
    (here / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert status("init", "--data", "mine.jsonl", "--model", str(here / "model")) == 0
    assert load_recipe("mine.yaml").format.instruction is not None


def test_adapters_are_trained_ten_times_as_fast_as_all_weights():
    whole, adapters = (load_recipe(find_recipe(f"instruct/{name}")) for name in ("rl", "lora"))
    rates = [recipe.stages["rl"].optimizer.learning_rate for recipe in (adapters, whole)]
    assert rates[0] == pytest.approx(10 * rates[1])
    assert whole.model.lora is None and adapters.model.lora is not None
    assert whole.format.style == adapters.format.style == "chat"


def test_test_questions_are_scored_if_there_are_any_and_dev_if_not(here: Path):
    write_csv(here / "mine.csv", ["question", "answer", "rationale"])
    write_csv(here / "test.csv", ["question", "answer", "rationale"], count=3)
    assert (
        status(
            "init",
            "--data",
            "mine.csv",
            "--model",
            "scratch",
            "--test",
            "test.csv",
            "--out",
            "with.yaml",
        )
        == 0
    )
    assert status("init", "--data", "mine.csv", "--model", "scratch", "--out", "without.yaml") == 0
    assert load_recipe("with.yaml").evaluate.split == "test"
    assert load_recipe("with.yaml").name == "with"
    assert load_recipe("without.yaml").evaluate.split == "dev"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--data is missing; it is required if stdin is not a terminal"),
        (["--data", "none.csv"], "none.csv: no such file or folder"),
        (
            ["--data", "odd.csv"],
            "odd.csv:2: no column for the question among foo, answer; set --question COLUMN",
        ),
        (["--data", "odd.csv", "--question", "fo"], "odd.csv:2: no column 'fo'"),
        (
            ["--data", "bare.csv", "--model", "scratch"],
            "learns from rationales, but the data has none; choose another --model",
        ),
        (
            ["--data", "bare.csv", "--model", "./nowhere"],
            "./nowhere: no such model folder; expected one",
        ),
        (
            ["--data", "bare.csv", "--model", "scratch", "--out", "bare.csv"],
            "bare.csv: exists already",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
):
    write_csv(here / "odd.csv", ["foo", "answer"])
    write_csv(here / "bare.csv", ["question", "answer"])
    assert status("init", *arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert expected in last
    assert sorted(path.name for path in here.iterdir()) == ["bare.csv", "odd.csv"]


def test_without_a_terminal_it_says_which_model_it_chose(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def refuse(wishes: Wishes, path: Path) -> None:
        raise DataError(wishes.model)  # the model itself is not needed here

    write_csv(here / "mine.csv", ["question", "answer", "rationale"])
    monkeypatch.setattr("reftune.terminal.init.write_recipe", refuse)
    assert status("init", "--data", "mine.csv", "--format", "nl") == 2
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "stdin is not a terminal, so the default is used: --model smollm2-135m",
        "smollm2-135m",
    ]


def test_on_a_terminal_it_asks_on_stderr(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    write_csv(here / "mine.csv", ["question", "answer", "rationale"])
    answers = iter(["mine.csv", "scratch", "nl"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("typer.prompt", lambda *_, err, **__: next(answers) if err else "")
    assert status("init") == 0
    assert capsys.readouterr().out == "mine.yaml\n"


@pytest.mark.parametrize(
    ("typed", "reason", "taken"),
    [
        (["text", "python", "nl"], "known: nl, program, or your own file.py:Name", "nl"),
        (["NL", "program "], "NL: unknown kind", "nl"),
        (["programm", "program"], "programm: unknown kind; did you mean program?", "program"),
        (["no.py:Own", "nl:", ""], "no.py: no such file", "nl"),
        (["own.py:Own"], "", "own.py:Own"),
    ],
)
def test_a_format_that_does_not_exist_is_asked_for_again(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    typed,
    reason,
    taken,
):
    write_csv(here / "mine.csv", ["question", "answer", "rationale"])
    (here / "own.py").write_text("from reftune.grading.formats.nl import Nl\nclass Own(Nl): ...\n")
    stdin = io.StringIO("\n".join([*typed, "", ""]))
    monkeypatch.setattr(stdin, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", stdin)
    chosen = []
    monkeypatch.setattr(
        "reftune.terminal.init.write_recipe",
        lambda wishes, _: chosen.append(wishes.format) or load_splits_of(here),
    )
    assert status("init", "--data", "mine.csv", "--model", "scratch") == 0
    assert chosen == [taken]
    assert reason in capsys.readouterr().err


def load_splits_of(folder: Path) -> Splits:
    """The splits of the file that `write_csv` wrote."""
    return Jsonl(kind="jsonl", train=str(folder / "mine.csv")).load(seed=0)


@pytest.mark.parametrize("auto", ["AutoTokenizer", "AutoConfig"])
@pytest.mark.parametrize(
    "error", [ImportError, KeyError, RuntimeError, StrictDataclassError, OSError, ValueError]
)
def test_a_model_that_transformers_cannot_read_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, auto, error
):
    def refuse(*_, **__):
        raise error("needs\nsentencepiece")

    save_model("qwen2.5", here / "model")
    write_csv(here / "mine.csv", ["question", "answer"])
    monkeypatch.setattr(f"transformers.{auto}.from_pretrained", refuse)
    told = ["--data", "mine.csv", "--model", str(here / "model"), "--format", "nl"]
    assert status("init", *told) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{here / 'model'}: ") and "sentencepiece" in last
    assert not (here / "mine.yaml").exists()


def test_columns_formats_and_names_are_guessed(here: Path):
    write_csv(here / "mine.csv", ["Problem", "Label", "CoT"], rationale=PROGRAM)
    columns = guess_columns("mine.csv").named
    assert columns == {"question": "Problem", "answer": "Label", "rationale": "CoT"}
    assert guess_format("mine.csv", columns) == "program"
    assert guess_columns("mine.csv", {"answer": "CoT"}).named["answer"] == "CoT"
    assert [
        str(default_out(data)) for data in ("a/my data.csv", "a/b", "owner/set:main:train")
    ] == ["my-data.yaml", "b.yaml", "set.yaml"]


def test_too_few_questions_are_refused(here: Path):
    write_csv(here / "one.csv", ["question", "answer", "rationale"], count=1)
    assert status("init", "--data", "one.csv", "--model", "scratch") == 2
    assert not (here / "one.yaml").exists()
    with pytest.raises(DataError):
        guess_columns("absent.csv")


@pytest.mark.parametrize("error", [KeyboardInterrupt, EOFError])
def test_ctrl_c_or_d_at_a_prompt_is_no_traceback(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error
):
    def interrupted(*_: object) -> str:
        raise error

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("sys.stdin.readline", interrupted)
    monkeypatch.setattr("builtins.input", interrupted)
    assert status("init") == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
