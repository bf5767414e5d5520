"""Metrics in other tools, offline. A tool that is not installed is skipped."""

import json
import math
import re
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest

from reftune.errors import RecipeError
from reftune.recipe import parse_recipe
from reftune.stages.stage import Progress
from reftune.terminal import trackers
from reftune.terminal.trackers import TrackedProgress, tracked
from reftune.types import Answer, Completion, Graded, Problem, Solution, Verdict


@pytest.fixture
def recipe(make_recipe):
    def make(**keys):
        made = make_recipe()
        return made.model_copy(update=keys)

    return make


def log_two_stages(recipe) -> None:
    progress = tracked(Progress(), recipe)
    for stage in ("sft", "reft"):
        progress.stage(stage, 2)
        for step in (1, 2):
            progress.step(step, {"loss/total": step / 4, "grad/norm": math.nan})
    progress.close()
    progress.close()


def test_tensorboard_gets_every_finite_metric_by_stage_and_step(recipe, tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = recipe(run_dir=str(tmp_path / "run"))
    assert made.trackers is None, "the default"
    log_two_stages(made)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["reft/loss/total", "sft/loss/total"]
    assert [(event.step, event.value) for event in events.Scalars("reft/loss/total")] == [
        (1, 0.25),
        (2, 0.5),
    ]


def test_wandb_gets_them_offline(recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    made = recipe(run_dir=str(tmp_path / "run"), trackers=["wandb"])
    made.folder.mkdir()
    log_two_stages(made)
    import wandb

    wandb.teardown()  # its service writes the file when it ends
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    content = written.read_bytes()
    assert b"reft/loss/total" in content
    assert b"sft/step" in content
    assert b"grad/norm" not in content


def test_trackio_gets_them_offline(recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    log_two_stages(recipe(run_dir=str(tmp_path / "run"), trackers=["trackio"]))
    content = b"".join(
        path.read_bytes() for path in (tmp_path / "trackio").rglob("*") if path.is_file()
    )
    assert b"reft/loss/total" in content


def test_the_recipe_names_trackers_and_a_missing_one_is_rejected(
    recipe, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trackers, "find_spec", lambda package: package == "tensorboard")
    watched, silent = tracked(Progress(), recipe()), Progress()
    assert isinstance(watched, TrackedProgress) and watched._names == ["tensorboard"]
    assert tracked(silent, recipe(trackers=[])) is silent
    with pytest.raises(
        RecipeError, match=r"^trackers: wandb is not installed; pip install 'reftune\[tracking\]'$"
    ):
        tracked(Progress(), recipe(trackers=["wandb"]))
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    assert tracked(silent, recipe()) is silent


def test_a_tracker_that_cannot_start_is_one_line(recipe, monkeypatch: pytest.MonkeyPatch):
    class Broken:
        def __init__(self, **settings):
            raise ConnectionError("no\nnetwork")

    monkeypatch.setitem(
        __import__("accelerate.tracking").tracking.LOGGER_TYPE_TO_CLASS, "wandb", Broken
    )
    progress = TrackedProgress(Progress(), ["wandb"], recipe())
    with pytest.raises(
        RecipeError,
        match=r"^trackers: wandb cannot start: ConnectionError: no network; trackers=\[\] runs",
    ):
        progress.stage("sft", 1)


def test_a_tracker_that_cannot_start_when_a_run_is_continued_is_left_out(
    recipe, tmp_path, monkeypatch
):
    def open_one(name, recipe):
        if name == "wandb":
            raise RecipeError("trackers: wandb cannot start: no network")
        return name

    monkeypatch.setattr(trackers, "_open", open_one)
    made, progress, notes = recipe(run_dir=str(tmp_path / "run")), Progress(), []
    monkeypatch.setattr(progress, "note", notes.append)
    made.folder.mkdir()
    watched = TrackedProgress(progress, ["wandb", "tensorboard"], made)
    with pytest.raises(RecipeError, match="no network"):
        watched.stage("sft", 2)
    (made.folder / "metrics.jsonl").write_text("")
    watched = TrackedProgress(progress, ["wandb", "tensorboard"], made)
    watched.stage("sft", 2)
    assert watched._trackers == ["tensorboard"]
    assert notes == ["trackers: wandb cannot start: no network; the run continues without wandb"]


def test_a_continued_run_is_one_run_of_wandb(recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    runs = [recipe(run_dir=str(tmp_path / name)) for name in ("one", "other")]
    for number, made in enumerate(runs):
        assert "id" not in trackers._settings("wandb", made), "no run has begun"
        made.folder.mkdir()
        (made.folder / "env.json").write_text(json.dumps({"started": number}))
    first, again, other = (trackers._settings("wandb", made) for made in (runs[0], *runs))
    assert first == again and first["resume"] == "allow"
    assert first["id"] != other["id"] and re.fullmatch("[0-9a-f]{16}", first["id"])
    assert "id" not in trackers._settings("trackio", runs[0])
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert "id" not in trackers._settings("wandb", runs[0])


def test_the_default_may_be_switched_off_on_an_old_run(make_recipe):
    content = make_recipe().model_dump(mode="json")
    assert parse_recipe({**content, "trackers": []}).trackers == []
    from reftune.storage.run_folder import CHANGES_NO_RESULT, without

    own = without(content, CHANGES_NO_RESULT)
    assert without({**content, "trackers": []}, CHANGES_NO_RESULT) == own
    assert without({**content, "seed": 7}, CHANGES_NO_RESULT) != own


@pytest.mark.parametrize("fails", ["log", "finish"])
def test_a_tracker_that_fails_later_is_left_out_and_the_run_goes_on(
    recipe, monkeypatch: pytest.MonkeyPatch, fails: str
):
    notes, calls = [], []

    class Failing:
        name = "tensorboard"

        def log(self, values, step):
            self._call("log")

        def finish(self):
            self._call("finish")

        def _call(self, what):
            calls.append(what)
            if what == fails:
                raise OSError(28, "No space left on device", "events")

    monkeypatch.setattr(trackers, "_open", lambda name, recipe: Failing())
    progress = Progress()
    monkeypatch.setattr(progress, "note", notes.append)
    watched = TrackedProgress(progress, ["tensorboard"], recipe())
    watched.stage("sft", 2)
    for step in (1, 2):
        watched.step(step, {"loss/total": 1.0})
    watched.close()
    assert calls == (["log"] if fails == "log" else ["log", "log", "finish"])
    assert len(notes) == 1
    assert "No space left on device" in notes[0]
    assert notes[0].endswith("the run continues without it")


def some_solutions(count: int) -> list[Solution]:
    answer = Answer(kind="number", value=Fraction(5))
    return [
        Solution(
            problem=Problem(id=str(i), question="2 + 3?", answer=answer),
            prompt_ids=(1,),
            completion=Completion(token_ids=(2,), text="5", logprobs=(0.0,), finish_reason="eos"),
            graded=Graded(verdict=Verdict.CORRECT, value="5", reason=""),
            reward=1.0,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_sampled_solutions_are_a_table_if_a_tracker_has_tables(recipe, monkeypatch, name: str):
    logged = []

    class Tracker:
        def __init__(self):
            self.name = name

        def log(self, values, step=None):
            logged.append(values)

    class Table:
        def __init__(self, columns=None, data=None, dataframe=None):
            frame = dataframe
            self.columns = columns if frame is None else list(frame.columns)
            self.rows = data if frame is None else frame.values.tolist()

    stand_in = ModuleType(name)
    stand_in.Table = Table
    monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setattr(trackers, "_open", lambda name, recipe: Tracker())
    watched = TrackedProgress(Progress(), [name], recipe(tracker_rollouts=3))
    watched.stage("reft", 2)
    watched.solutions(2, some_solutions(5))
    watched.solutions(3, [])
    if name == "tensorboard":
        assert logged == []
        return
    (values,) = logged
    table = values["reft/rollouts"]
    assert values["reft/step"] == 2
    assert [row[table.columns.index("id")] for row in table.rows] == ["0", "1", "2"]
    assert table.rows[0][table.columns.index("completion")] == "5"


def test_no_table_is_logged_if_the_recipe_wants_none(recipe, monkeypatch):
    monkeypatch.setattr(trackers, "_table", lambda *arguments: pytest.fail("a table"))
    watched = TrackedProgress(Progress(), [], recipe(tracker_rollouts=0))
    watched.stage("reft", 1)
    watched.solutions(1, some_solutions(2))
