"""Exit statuses, one-line errors, and stdout against stderr. The run itself is a fake, so nothing
heavy is imported."""

import json
import os
import re
import resource
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from reftune.errors import DataError, RecipeError
from reftune.recipe import shipped_recipes
from reftune.storage.run_folder import RunFolder
from reftune.terminal.cli import find_recipe, main

RECIPE = """
name: tiny
model: {scratch: {}}
dataset: mine.py:Part
format: mine.py:Part
reward: mine.py:Part
engine: mine.py:Part
stages: {sft: mine.py:Part}
"""
PLUGIN = "from reftune.recipe import Component\nclass Part(Component):\n    init: str = 'base'\n"
PLUGIN += "    def load(self): ...\n    prompt = target = grade = __call__ = generate = load\n"
PLUGIN += "    run = cost = needs = produces = load\n"


class Interrupted(Exception):
    """Stands in for the trainer's exception."""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A working directory with a recipe, a fake `reftune.runs.run`, and the calls to it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "mine.py").write_text(PLUGIN)
    seen = SimpleNamespace(
        asked=[], error=None, summary={"name": "tiny", "methods": {}, "comparisons": []}
    )

    def act(*asked: Any) -> dict[str, Any]:
        seen.asked.append(asked)
        if seen.error is not None:
            raise seen.error
        return seen.summary

    def fake(name: str, **content: Any) -> None:
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)

    fake(
        "reftune.runs.run",
        run_recipe=lambda recipe, progress: act("run", recipe),
        run_stages=lambda recipe, kind, progress: act("stages", kind),
        evaluate_methods=lambda recipe, methods, progress: act("evaluate", methods),
    )
    fake("reftune.stages.loop", Interrupted=Interrupted, stop_signals=lambda handler: nullcontext())
    fake(
        "reftune.results",
        read_run=lambda folder: folder,
        remarks=lambda run: ["warmup was finished"],
        table_command=lambda runs, form, **options: (
            f"a {form} table of {[str(run) for run in runs]}"
        ),
        choices_table=lambda summary: "",
        report_command=lambda runs, out: out or runs[0] / "report.html",
        write_figures=lambda runs, folder: [folder / "accuracy.png", folder / "accuracy.svg"],
    )
    return seen


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_a_run_prints_its_table_as_the_only_result(
    calls: SimpleNamespace, capsys: pytest.CaptureFixture[str]
):
    assert status("run", "tiny.yaml", "seed=7", "lengths.max_new=5") == 0
    (_, recipe), *rest = calls.asked
    assert (recipe.seed, recipe.lengths.max_new, rest) == (7, 5, [])
    out, err = capsys.readouterr()
    assert out == f"a text table of ['{Path('runs/tiny')}']\n"
    assert err == f"warmup was finished\nreport: {Path('runs/tiny/report.html')}\n"


def test_json_is_one_document_on_stdout(calls: SimpleNamespace, capsys: pytest.CaptureFixture[str]):
    assert status("run", "tiny.yaml", "--json") == 0
    assert json.loads(capsys.readouterr().out) == calls.summary


@pytest.mark.parametrize("command", ["sft", "rl", "self-train", "reward-model"])
def test_the_stages_of_one_kind_give_a_document_if_asked_for(
    calls: SimpleNamespace, capsys: pytest.CaptureFixture[str], command: str
):
    assert status(command, "tiny.yaml") == 0
    assert capsys.readouterr().out == ""
    assert status(command, "tiny.yaml", "--json") == 0
    assert json.loads(capsys.readouterr().out) == calls.summary


@pytest.mark.parametrize(
    ("command", "kind"),
    [("sft", "sft"), ("rl", "rl"), ("self-train", "self_train"), ("reward-model", "reward_model")],
)
def test_a_stage_command_runs_the_stages_of_its_kind(
    calls: SimpleNamespace, command: str, kind: str
):
    assert status(command, "tiny.yaml") == 0
    assert calls.asked == [("stages", kind)]


def test_eval_takes_methods(calls: SimpleNamespace):
    assert status("eval", "tiny.yaml", "--method", "sft", "--method", "reft") == 0
    assert calls.asked == [("evaluate", ["sft", "reft"])]


def test_bad_input_is_one_line_and_status_2(
    calls: SimpleNamespace, capsys: pytest.CaptureFixture[str]
):
    calls.error = DataError("train.jsonl:3: no answer\nin the row")
    assert status("run", "tiny.yaml") == 2
    assert capsys.readouterr() == ("", "train.jsonl:3: no answer in the row\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "nope.yaml"], "nope.yaml: no such recipe"),
        (["run", "tiny.yaml", "seed=x"], "tiny.yaml: seed: input should be a valid integer"),
        (["run", "tiny.yaml", "sede=3"], "tiny.yaml: sede: unknown key; did you mean seed?"),
        (["run"], "Missing argument 'RECIPE'."),
        (["run", "tiny.yaml", "--jsn"], "No such option: --jsn"),
        (["frob"], "No such command 'frob'."),
        (["table"], "Missing argument 'RUN...'."),
        (["table", "runs/a", "--format", "pdf"], "Invalid value for '--format'"),
        (["sample", "tiny.yaml", "--num", "0"], "Invalid value for '--num'"),
    ],
)
def test_what_cannot_be_understood_is_one_line_and_status_2(
    calls: SimpleNamespace, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
):
    assert status(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(expected)
    assert len(err.splitlines()) == 1


def test_a_failure_of_ours_is_not_hidden(calls: SimpleNamespace):
    # an uncaught exception ends the interpreter with a traceback and status 1
    calls.error = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError):
        main(["run", "tiny.yaml"])


def test_an_interrupted_run_names_the_checkpoint_that_was_saved(
    calls: SimpleNamespace, capsys: pytest.CaptureFixture[str]
):
    calls.error = Interrupted("runs/tiny/stages/sft/checkpoints/step-000012")
    assert status("run", "tiny.yaml") == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert (
        err
        == "interrupted; checkpoint: runs/tiny/stages/sft/checkpoints/step-000012; the same command"
        " continues from there\n"
    )


def test_a_run_interrupted_at_once_names_the_newest_checkpoint(
    calls: SimpleNamespace, capsys: pytest.CaptureFixture[str]
):
    calls.error = KeyboardInterrupt()
    assert status("run", "tiny.yaml") == 130
    assert "checkpoint: none yet" in capsys.readouterr().err
    Path("runs/tiny/stages/sft/checkpoints/step-000003").mkdir(parents=True)
    assert status("run", "tiny.yaml") == 130
    assert (
        f"checkpoint: {Path('runs/tiny/stages/sft/checkpoints/step-000003')};"
        in capsys.readouterr().err
    )


def test_watching_ends_like_any_command_when_it_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(folder: Path) -> bool:
        raise KeyboardInterrupt

    (tmp_path / "recipe.yaml").write_text("stages: {}\n")
    monkeypatch.setattr("reftune.terminal.watch.is_alive", interrupt)
    assert status("watch", str(tmp_path)) == 130


@pytest.mark.parametrize("num", [1, 3000])  # fails when the buffer is emptied, and inside print
def test_output_that_finds_no_space_is_one_line_and_status_2(tmp_path: Path, num: int):
    row = json.dumps({"id": "a", "completion": "The answer is 4.", "answer": 4}) + "\n"
    (tmp_path / "rows.jsonl").write_text(row * num)
    command = [sys.executable, "-m", "reftune", "score", "rows.jsonl", "--format", "nl"]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (result.returncode, result.stderr) == (2, "output: No space left on device\n")


def test_half_a_surrogate_pair_from_a_users_grader_is_printed(tmp_path: Path):
    (tmp_path / "own.py").write_text(
        "import json\nfrom reftune.types import Graded, Verdict\n"
        "def grade(text, problem):\n"
        "    value = json.loads(text)['answer']\n"
        "    return Graded(verdict=Verdict.WRONG, value=value, reason=f'got {value}')\n"
    )
    row = {"id": "a", "completion": '{"answer": "é\\ud83d"}', "answer": 4}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    command = [sys.executable, "-m", "reftune", "score", "rows.jsonl", "--format", "nl"]
    command += ["--grading", "own.py:grade", "--json"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, check=False, encoding="utf-8"
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert r'"value": "é\ud83d"' in result.stdout, "the half is escaped"


def test_the_newest_checkpoint_is_by_time_not_by_number(tmp_path: Path):
    for seconds, name in (
        (100, "sft/checkpoints/step-000900"),
        (200, "reft/checkpoints/step-000001"),
    ):
        (tmp_path / "stages" / name).mkdir(parents=True)
        os.utime(tmp_path / "stages" / name, (seconds, seconds))
    assert (
        RunFolder(tmp_path).newest_checkpoint() == tmp_path / "stages/reft/checkpoints/step-000001"
    )


def test_table_and_report_take_several_runs(
    calls: SimpleNamespace, capsys: pytest.CaptureFixture[str]
):
    assert status("table", "runs/a", "runs/b", "--format", "markdown") == 0
    assert status("report", "runs/a", "--out", "page.html") == 0
    assert capsys.readouterr().out == "a markdown table of ['runs/a', 'runs/b']\npage.html\n"
    assert status("report", "runs/a", "--figures", "out") == 0
    assert capsys.readouterr().out == "runs/a/report.html\nout/accuracy.png\nout/accuracy.svg\n"


def test_version_and_help_are_results(capsys: pytest.CaptureFixture[str]):
    assert status("--version") == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert status() == 0
    out, err = capsys.readouterr()
    assert "reward-model" in out
    assert err == ""


def test_a_recipe_is_found_as_a_path_before_those_that_come_with_reftune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("reftune.recipe.shipped_recipes", lambda: tmp_path / "shipped")
    (tmp_path / "shipped" / "demo").mkdir(parents=True)
    (tmp_path / "shipped" / "demo" / "demo.yaml").write_text("")
    for name in ("demo/demo.yaml", "demo/demo", "recipes/demo/demo.yaml"):
        assert find_recipe(name) == tmp_path / "shipped" / "demo" / "demo.yaml"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "demo.yaml").write_text("")
    assert find_recipe("demo/demo.yaml") == Path("demo/demo.yaml")
    with pytest.raises(
        RecipeError,
        match=r"^nope: no such recipe; nearest of those that come with reftune: demo/demo\.yaml$",
    ):
        find_recipe("nope")


@pytest.mark.parametrize(
    "place", ["elsewhere/tiny", "exp #2/tiny", "2026-05-01", "a: b", "größer 😀"]
)
def test_a_run_folder_names_its_recipe_wherever_it_was_moved(calls: SimpleNamespace, place: str):
    moved = Path(place)
    moved.mkdir(parents=True)
    (moved / "recipe.yaml").write_text(f"{RECIPE}run_dir: runs/tiny\n")
    (moved / "env.json").write_text("{}")
    assert status("run", str(moved), "seed=3") == 0
    assert status("run", str(moved), "run_dir=runs/other") == 0
    (_, recipe), (_, other) = calls.asked
    assert (recipe.name, recipe.seed, recipe.folder) == ("tiny", 3, moved)
    assert other.folder == Path("runs/other")


def test_recipes_come_with_reftune():
    assert (shipped_recipes() / "demo").is_dir()


def test_help_starts_without_the_heavy_imports():
    code = (
        "import sys, atexit; atexit.register(lambda: print(*sys.modules)); from"
        " reftune.terminal.cli import main; main(['--help'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.split())
    assert "typer" in loaded
    assert not {"torch", "transformers", "pydantic", "yaml", "pandas"} & loaded


def test_help_answers_at_once():
    # 0.25 s measured, 0.5 s promised: CPU time, since a busy machine delays everything; the best of
    # three
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "reftune", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("init <&-", "2 --data is missing"),
        ("--version >&-", "0 "),
        (f"run {'x' * 300}", "2 xxx"),
        (f"table {'x' * 300} >&-", "2 xxx"),
    ],
)
def test_a_closed_stream_or_a_long_name_is_no_traceback(command: str, status: str):
    script = f"{sys.executable} -m reftune {command}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert f"{result.returncode} {result.stderr}".startswith(status)
    assert "Traceback" not in result.stderr


def test_half_a_surrogate_pair_is_escaped_in_json(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    line = {"id": ["\ud800", "😀"], "completion": "The answer is \ud83d", "answer": "x"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(line))
    with pytest.raises(SystemExit) as stop:
        main(["score", str(tmp_path / "rows.jsonl"), "--format", "nl", "--json"])
    out = capfd.readouterr().out
    assert (stop.value.code, json.loads(out)["id"]) == (0, line["id"])
    assert "\\ud800" in out
    assert "😀" in out
