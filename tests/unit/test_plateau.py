"""The rule for when a warm-up is finished."""

from __future__ import annotations

import json
import math

import pytest

from reftune.errors import RecipeError
from reftune.runs.run import open_run
from reftune.stages import loop as loop_module
from reftune.stages.loop import Look
from reftune.stages.plateau import History, rise
from reftune.stages.stage import Progress
from reftune.storage.files import JsonLines
from reftune.storage.run_folder import StageFolder


def solved(number: int, of: int = 100) -> list[bool]:
    return [i < number for i in range(of)]


def test_a_rise_and_its_paired_interval_match_hand_computation():
    # of 10 problems 1 is lost and 4 are won: d = .3, variance 1 + 4 − 9/10 = 4.1
    before = [True, True, False, False, False, False, False, False, False, False]
    after = [False, True, True, True, True, True, False, False, False, False]
    found = rise(before, after)
    assert found.value == pytest.approx(0.3)
    assert found.margin == pytest.approx(1.959964 * math.sqrt(4.1) / 10)
    assert not found.is_beyond_chance


def test_the_same_answers_are_no_rise():
    found = rise(solved(40), solved(40))
    assert (found.value, found.margin, found.is_beyond_chance) == (0, 0, False)


def history(*looks: int) -> History:
    found = History()
    for number in looks:
        found.add(solved(number))
    return found


@pytest.mark.parametrize(
    ("looks", "flat"),
    [
        ((0, 0, 0, 0, 0, 0), False),  # has not begun
        ((0, 10, 10, 10, 10, 10, 10), False),  # has hardly begun
        ((0, 20, 20, 20, 20, 20, 20), True),
        ((0, 20, 40, 60, 80, 99), False),  # rises
        ((0, 40, 60, 60, 61, 61), False),  # rose four evaluations ago
        ((0, 40, 60, 60, 61, 61, 61), True),
        ((0, 70, 65, 72, 70, 71), True),
        ((0, 80, 80), False),  # too few evaluations
    ],
)
def test_dev_is_flat_once_it_has_risen_and_stopped(looks, flat):
    assert history(*looks).is_flat() is flat


@pytest.fixture
def flat_from_look(monkeypatch):
    """Makes dev accuracy rise until a given evaluation, and then stay."""

    def look(number: int) -> None:
        state = {"looks": 0}

        def answer(context, **_):
            state["looks"] += 1
            correct = tuple(solved(min(state["looks"], number), of=number))
            return Look(metrics={"dev/accuracy": sum(correct) / number}, correct=correct)

        monkeypatch.setattr(loop_module, "look_at_dev", answer)

    return look


UNTIL = {
    "until": "plateau",
    "epochs": 20,
    "batch_size": 8,
    "eval_every": 1,
    "snapshots": None,
    "optimizer": {"schedule": "constant", "warmup": 0.0},
}


def test_a_stage_ends_at_the_plateau_after_a_cooldown(make_recipe, flat_from_look):
    # 24 rows in batches of 8: an epoch has 3 steps and 1 dev evaluation. Evaluation k solves k of
    # 10 problems, and 10 from k = 10 on. At k = 11, 3 more in four evaluations beat chance: .3 >
    # 1.96 √(3 − .9) / 10 = .284. At k = 12, 2 more are not: .2 < .248. So dev is flat at step 36,
    # and the cooldown is a tenth of it: 3 steps
    flat_from_look(10)
    recipe = make_recipe(stages={"sft": UNTIL, "reft": None})
    shown: list[tuple[int, int]] = []
    progress = Progress()
    progress.stage = lambda name, total_steps, done_steps=0: shown.append((done_steps, total_steps))
    with open_run(recipe, progress) as run:
        run.train("sft")
        info = json.loads(run.folder.stage("sft").info.read_text())
        rows = JsonLines(run.folder.metrics).rows()
    assert info["steps"] == 39
    assert shown == [(0, 60), (36, 39)]
    rates = [row["optim/lr"] for row in rows if "optim/lr" in row]
    peak = recipe.stages["sft"].optimizer.learning_rate
    assert rates[:36] == [peak] * 36
    assert rates[36:] == pytest.approx([peak * 2 / 3, peak / 3, 0])
    rises = [row["dev/rise"] for row in rows if "dev/rise" in row]
    assert rises == pytest.approx([0.4] * 6 + [0.3, 0.2]), "none after the plateau"


def trained_for(epochs: int, make_recipe) -> tuple[StageFolder, list[str]]:
    """The folder of `sft` after at most `epochs` epochs, and the notes of this part of the run."""
    notes: list[str] = []
    progress = Progress()
    progress.note = notes.append
    recipe = make_recipe(stages={"sft": {**UNTIL, "epochs": epochs}, "reft": None})
    with open_run(recipe, progress) as run:
        run.train("sft")
        return run.folder.stage("sft"), notes


def test_a_stage_that_ended_at_its_plateau_says_so_if_it_gets_more_epochs(
    make_recipe, flat_from_look
):
    flat_from_look(10)
    for epochs in (20, 30):
        folder, notes = trained_for(epochs, make_recipe)
    assert folder.facts()["steps"] == 39
    assert notes == [
        "sft: ended at its plateau, at step 39, and is not trained further; to start another run"
        f" from its model, set init: {folder.path}"
    ]


def test_a_plateau_at_the_last_step_leaves_the_stage_open_for_more_epochs(
    make_recipe, flat_from_look
):
    # dev is flat at step 36, where 12 epochs end. With 20 epochs, it is flat again at the next
    # evaluation, at step 39; the cooldown is a tenth of it: 3 steps
    flat_from_look(10)
    for epochs, steps in ((12, 36), (20, 42)):
        folder, notes = trained_for(epochs, make_recipe)
        assert folder.facts()["steps"] == steps
        cooling = [note.rpartition(" until ")[2] for note in notes if "cooling down" in note]
        assert cooling == (["step 42"] if epochs == 20 else [])


def test_a_snapshot_due_after_the_plateau_is_the_model_of_the_last_step(
    make_recipe, flat_from_look
):
    # the stage ends at step 39, in epoch 13; other stages may start from the snapshot
    flat_from_look(10)
    snapshots = {"early": 2, "warmup": 15}
    recipe = make_recipe(stages={"sft": {**UNTIL, "snapshots": snapshots}, "reft": {"steps": 1}})
    with open_run(recipe, Progress()) as run:
        run.train("sft")
        assert run.is_trained("sft")
        chosen = [run.folder.stage(m).facts()["chosen_step"] for m in ("early", "warmup")]
        run.train("reft")
    assert chosen == [6, 39]


def test_a_stage_that_never_flattens_runs_all_its_epochs(make_recipe, flat_from_look):
    flat_from_look(1000)
    recipe = make_recipe(stages={"sft": {**UNTIL, "epochs": 4}, "reft": None})
    with open_run(recipe, Progress()) as run:
        run.train("sft")
        assert json.loads(run.folder.stage("sft").info.read_text())["steps"] == 12


def test_a_plateau_needs_a_constant_rate(make_recipe):
    with pytest.raises(RecipeError, match=r"until: plateau needs optimizer.schedule: constant"):
        make_recipe(stages={"sft": {"until": "plateau"}})
