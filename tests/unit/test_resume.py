"""A run that was stopped, killed or damaged, and restarted, ends with the same bits as an
undisturbed run."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from crash import MORE_SFT, assert_same_outcome, outcome, run_all
from reftune.datasets import Splits
from reftune.errors import CheckpointError, DataError, RecipeError
from reftune.recipe import Recipe, dump_recipe
from reftune.runs.run import evaluate_methods, open_run, run_stages
from reftune.stages.stage import Progress
from reftune.storage.files import JsonLines
from reftune.storage.run_folder import RunFolder, refuse_foreign, split_hashes
from reftune.types import Answer, Message, Problem

MakeRecipe = Callable[..., Recipe]


class Noting(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


class Stopping(Noting):
    """Raises KeyboardInterrupt inside step `at` of a stage, after its metrics were written and
    before it is saved."""

    def __init__(self, stage: str, at: int) -> None:
        super().__init__()
        self.wanted, self.at, self.current = stage, at, ""

    def stage(self, name: str, total_steps: int, done_steps: int = 0) -> None:
        self.current = name

    def step(self, step: int, metrics: Any) -> None:
        if (self.current, step) == (self.wanted, self.at) and "dev/accuracy" not in metrics:
            raise KeyboardInterrupt


def test_stages_of_one_kind_run_alone_and_return_their_facts(make_recipe: MakeRecipe):
    recipe = make_recipe()
    facts = run_stages(recipe, kind="sft", progress=Progress())
    (name,) = facts
    path = recipe.folder / "stages" / name / "stage.json"
    assert facts[name] == json.loads(path.read_text()) and facts[name]["kind"] == "sft"
    assert not (recipe.folder / "stages" / "reft" / "stage.json").exists()
    assert run_stages(recipe, kind="sft", progress=Progress()) == facts, "nothing is trained again"


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    """The outcome of the undisturbed run, made once."""
    return {}


@pytest.fixture
def straight(kept: dict[str, Any], make_recipe: MakeRecipe, tmp_path: Path) -> dict[str, Any]:
    if not kept:
        run_all(make_recipe(run_dir=str(tmp_path / "straight")))
        kept["outcome"], kept["folder"] = outcome(tmp_path / "straight"), tmp_path / "straight"
    return dict(kept["outcome"])


def test_the_run_that_is_compared_with_has_everything(straight):
    # otherwise the tests below would show less than they claim
    assert {
        "stages/warmup/model.safetensors",
        "stages/sft/model.safetensors",
        "stages/reft/model.safetensors",
    } <= set(straight)
    assert {"stages/reft/value_head/model.safetensors", "stages/reft/samples.jsonl"} <= set(
        straight
    )
    assert {"eval/reft.jsonl", "eval/sft.jsonl"} <= set(straight)
    assert (
        len({straight[f"stages/{name}/model.safetensors"] for name in ("warmup", "sft", "reft")})
        == 3
    )
    rewards = {row["reward/mean"] for row in straight["metrics"] if "reward/mean" in row}
    assert len(rewards) > 1
    assert len(straight["eval/reft.jsonl"].splitlines()) == 10


def test_another_seed_is_another_run(straight, make_recipe):
    recipe = make_recipe(seed=1)
    with open_run(recipe, Progress()) as run:
        run.train("sft")
    assert (
        outcome(recipe.folder)["stages/sft/model.safetensors"]
        != straight["stages/sft/model.safetensors"]
    )


@pytest.mark.parametrize(("stage", "at"), [("sft", 5), ("reft", 3)])
def test_a_stage_stopped_before_it_was_saved_begins_again_to_the_same_bits(
    straight, make_recipe, stage, at
):
    recipe = make_recipe(stages={name: {"save_every_s": 1000} for name in ("sft", "reft")})
    with pytest.raises(KeyboardInterrupt):
        run_all(recipe, Stopping(stage, at))
    progress = Noting()
    run_all(recipe, progress)
    assert_same_outcome(recipe.folder, straight)
    assert not any("resumed" in note for note in progress.notes)


def test_a_run_stopped_inside_many_steps_goes_on_to_the_same_bits(straight, make_recipe):
    recipe, resumed = make_recipe(), []
    for stage, at in (("sft", 1), ("sft", 4), ("sft", 4), ("reft", 1), ("reft", 2), ("reft", 4)):
        progress = Stopping(stage, at)
        with pytest.raises(KeyboardInterrupt):
            run_all(recipe, progress)
        resumed += [note for note in progress.notes if "resumed" in note]
    progress = Noting()
    run_all(recipe, progress)
    assert_same_outcome(recipe.folder, straight)
    assert [*resumed, *progress.notes[:1]] == [  # a stage stopped in its first step begins again
        "sft: resumed at step 3 of 8",
        "sft: resumed at step 3 of 8",
        "reft: resumed at step 1 of 4",
        "reft: resumed at step 3 of 4",
    ]


def test_a_stage_that_goes_on_leaves_the_metrics_of_a_stage_that_ran_meanwhile(make_recipe):
    other = {**MORE_SFT, "init": "warmup", "batch_size": 8}
    recipe = make_recipe(stages={"reft": {"init": "warmup"}, "other": other})
    with pytest.raises(KeyboardInterrupt):
        run_all(recipe, Stopping("reft", 4))
    with open_run(recipe, Progress()) as run:
        run.train("other")
    run_all(recipe)
    rows = JsonLines(RunFolder(recipe.folder).metrics).rows()
    steps = {
        name: [row["step"] for row in rows if row["stage"] == name and "optim/lr" in row]
        for name in ("reft", "other")
    }
    assert steps == {"reft": [1, 2, 3, 4], "other": [1, 2, 3]}


def test_a_finished_run_does_nothing_when_started_again(make_recipe, straight, kept):
    recipe = make_recipe(run_dir=str(kept["folder"]))
    before = {
        path: path.stat().st_mtime_ns
        for path in recipe.folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    run_all(recipe)
    assert {
        path: path.stat().st_mtime_ns
        for path in recipe.folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    } == before


# --- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("whole_lines", "torn"), [(0, b'{"id"'), (3, b""), (4, b'{"id": "test-4", "que'), (9, b"")]
)
def test_an_evaluation_killed_anywhere_goes_on_to_the_same_lines(
    make_recipe, straight, kept, monkeypatch, whole_lines, torn
):
    # 10 problems in parts of 4: samples of a part share a seed, so a part that was cut is drawn
    # again
    monkeypatch.setattr("reftune.runs.evaluation.PROBLEMS_AT_ONCE", 4)
    recipe = make_recipe(run_dir=str(kept["folder"]))
    path = recipe.folder / "eval" / "sft.jsonl"
    original = path.read_bytes()
    try:
        with open_run(recipe, Progress()) as run:
            if "in parts of 4" not in kept:
                path.unlink()
                run.evaluation.answer("sft")
                kept["in parts of 4"] = path.read_bytes()
            path.write_bytes(
                b"".join(kept["in parts of 4"].splitlines(keepends=True)[:whole_lines]) + torn
            )
            run.evaluation.answer("sft")
        assert path.read_bytes() == kept["in parts of 4"]
    finally:
        path.write_bytes(original)


def test_a_method_is_evaluated_before_the_others_are_trained(make_recipe):
    recipe = make_recipe()
    run_stages(recipe, kind="sft", progress=Progress())
    summary = evaluate_methods(recipe, ["sft"], progress=Progress())
    assert list(summary["methods"]) == ["sft"]
    assert not (recipe.folder / "summary.json").exists(), "the run is not finished"
    with pytest.raises(
        RecipeError, match=r"tiny: does not evaluate warmup; evaluate.stages allows sft, reft"
    ):
        evaluate_methods(recipe, ["warmup"], progress=Progress())


# --- kill -9 --------------------------------------------------------------------------------------


def run_in_child(recipe: Recipe) -> int:
    """Run the recipe in a process of its own, forked because a fresh interpreter would spend its
    time on imports."""
    child = os.fork()
    if child == 0:
        try:
            run_all(recipe)
        finally:
            os._exit(0)
    return child


def rows_written(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_run_killed_at_random_moments_goes_on_to_the_same_bits(straight, make_recipe):
    recipe, rng, killed = make_recipe(), random.Random(0), 0
    for rows in sorted(rng.sample(range(1, len(straight["metrics"]) - 1), 3)):
        child = run_in_child(recipe)
        while rows_written(recipe.folder / "metrics.jsonl") < rows and os.waitpid(
            child, os.WNOHANG
        ) == (0, 0):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert killed == 3
    run_all(recipe)
    assert_same_outcome(recipe.folder, straight)


# --- damage ---------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(straight, make_recipe):
    recipe = make_recipe()
    with pytest.raises(KeyboardInterrupt):
        run_all(recipe, Stopping("reft", 4))
    newest = max((recipe.folder / "stages" / "reft" / "checkpoints").glob("step-*"))
    tensors = newest / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4] + b"\x7f\x7f\x7f\x7f")
    with (recipe.folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "reft", "step": 4, "torn')
    progress = Noting()
    run_all(recipe, progress)
    assert [note for note in progress.notes if note.startswith(f"{newest}: ")]
    assert "reft: resumed at step 2 of 4" in progress.notes
    assert_same_outcome(recipe.folder, straight)


# --- the run folder -------------------------------------------------------------------------------


def test_a_second_process_on_a_run_folder_is_refused(make_recipe):
    recipe = make_recipe()
    with (
        open_run(recipe, Progress()),
        pytest.raises(CheckpointError) as error,
        open_run(recipe, Progress()),
    ):
        pass
    assert str(error.value) == f"{recipe.folder}: another process is using this run folder"
    with open_run(recipe, Progress()):  # and free again
        pass


def test_the_lock_is_released_when_a_run_fails(make_recipe):
    recipe = make_recipe()
    with pytest.raises(KeyboardInterrupt), open_run(recipe, Progress()):
        raise KeyboardInterrupt
    with open_run(recipe, Progress()):
        pass


def refused(recipe: Recipe, error_class: type[Exception]) -> str:
    with pytest.raises(error_class) as error, open_run(recipe, Progress()):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_with_other_things_in_it_is_no_run_folder(make_recipe):
    recipe = make_recipe()
    recipe.folder.mkdir()
    (recipe.folder / "thesis.tex").touch()
    assert refused(recipe, CheckpointError).startswith(
        f"{recipe.folder}: is not empty and not a run folder"
    )


@pytest.mark.parametrize(
    "left", [[".recipe.yaml.partial"], ["env.json"], ["env.json", ".recipe.yaml.partial"]]
)
def test_a_run_killed_before_its_recipe_was_written_starts_again(make_recipe, left):
    recipe = make_recipe()
    recipe.folder.mkdir()
    for name in left:
        (recipe.folder / name).write_text("{")
    with open_run(recipe, Progress()):
        pass
    assert (recipe.folder / "env.json").read_text().startswith('{\n  "reftune": ')


def test_a_run_has_the_threads_of_its_recipe_and_leaves_them_as_they_were(make_recipe):
    before = torch.get_num_threads()
    with open_run(make_recipe(threads=before + 1), Progress()) as run:
        assert torch.get_num_threads() == before + 1
        assert json.loads((run.folder.environment).read_text())["threads"] == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("wanted", ["unsaid", "as they are"])
def test_threads_that_are_right_already_are_not_set_again(make_recipe, monkeypatch, wanted):
    # setting the number of threads, even to the same, makes decoding a quarter slower
    recipe = make_recipe(threads=None if wanted == "unsaid" else torch.get_num_threads())
    monkeypatch.setattr(torch, "set_num_threads", lambda number: pytest.fail(f"set to {number}"))
    with open_run(recipe, Progress()):
        pass


def test_the_checkpoint_of_another_model_is_refused_in_one_line(make_recipe):
    recipe = make_recipe(stages={"reft": None})
    with pytest.raises(KeyboardInterrupt):
        run_all(recipe, Stopping("sft", 4))
    shutil.copytree(recipe.folder / "stages", recipe.folder.with_name("other") / "stages")
    other = make_recipe(
        run_dir=str(recipe.folder.with_name("other")),
        model={"scratch": {"hidden_size": 32}},
        stages={"reft": None},
    )
    (other.folder / "recipe.yaml").write_text(dump_recipe(other))
    (other.folder / "env.json").write_text("{}")
    with pytest.raises(
        CheckpointError,
        match=r"step-000003: belongs to another model or reftune version: RuntimeError: .*; choose",
    ):
        run_all(other)


def test_the_folder_of_another_recipe_is_refused_with_the_key_that_differs(make_recipe):
    recipe = make_recipe()
    with open_run(recipe, Progress()):
        pass
    message = refused(make_recipe(stages={"reft": {"steps": 3}}), RecipeError)
    assert (
        message
        == f"{recipe.folder}: belongs to another recipe: stages.reft.steps was 4, now 3; choose"
        " another run_dir"
    )
    assert "seed was 0, now 7" in refused(make_recipe(seed=7), RecipeError)


def test_what_check_accepts_may_change_after_a_run_has_begun(make_recipe):
    with open_run(make_recipe(), Progress()):
        pass
    recipe = make_recipe(check={"min_gold_correct": 0.5, "waive": ["golds"]})
    with open_run(recipe, Progress()):
        pass
    assert "- golds" in recipe.folder.joinpath("recipe.yaml").read_text()


def assert_same_results(folder: Path, straight: dict[str, Any]) -> None:
    """Like `assert_same_outcome`, but for weights and evaluations only."""
    found = outcome(folder)
    names = [name for name in straight if name.endswith(".safetensors") or name.startswith("eval/")]
    assert len(names) > 3 and all(found[name] == straight[name] for name in names)


def test_keys_that_change_no_result_may_change_even_inside_stages(make_recipe, straight):
    free = {"save_every_s": 7, "keep": 5, "optimizer": {"on_nonfinite": "skip", "max_skipped": 3}}
    with pytest.raises(KeyboardInterrupt):
        run_all(make_recipe(), Stopping("reft", 3))
    run_all(make_recipe(stages={"sft": free, "reft": free}))
    assert_same_results(make_recipe().folder, straight)


def test_the_samples_that_self_training_keeps_may_not_change(make_recipe):
    def kept(number: int, checkpoints: int) -> Recipe:
        sft = {"epochs": 1, "batch_size": 5, "keep": checkpoints}
        sft["optimizer"] = {"learning_rate": 1e-3}
        return make_recipe(stages={"self": {"kind": "self_train", "keep": number, "sft": sft}})

    with open_run(kept(10, 2), Progress()):
        pass
    with open_run(kept(10, 3), Progress()):
        pass
    assert "stages.self.keep was 10, now 9" in refused(kept(9, 3), RecipeError)


def test_a_run_whose_initial_model_has_changed_is_not_continued(make_recipe, tmp_path):
    source = make_recipe(run_dir=str(tmp_path / "source"))
    with open_run(source, Progress()) as run:
        run.train("sft")
    init = run.folder.stage("sft").path
    recipe = make_recipe(
        run_dir=str(tmp_path / "run"), stages={"sft": None, "reft": {"init": str(init)}}
    )
    with pytest.raises(KeyboardInterrupt):
        run_all(recipe, Stopping("reft", 3))
    weights = init / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-4] + b"\0\0\x80?")  # the last weight is now 1
    with pytest.raises(CheckpointError, match=f"the model {init} has changed since this stage"):
        run_all(recipe)
    weights.write_bytes(before)  # with a new time
    with open_run(recipe, Progress()) as run:
        (newest,) = run.folder.stage("reft").checkpoints.glob("step-000002")
        state = json.loads((newest / "state.json").read_text())
        assert state.pop("initial")
        (newest / "state.json").write_text(json.dumps(state))  # of an earlier version
        manifest = json.loads((newest / "manifest.json").read_text())
        digest = hashlib.sha256((newest / "state.json").read_bytes()).hexdigest()
        (newest / "manifest.json").write_text(json.dumps({**manifest, "state.json": digest}))
        run.train("reft")


def test_a_resumed_run_says_if_its_gpu_is_gone_or_its_versions_are_others(make_recipe):
    def noted(**changes: Any) -> list[str]:
        with open_run(make_recipe(), progress := Noting()) as run:
            was = json.loads(run.folder.environment.read_text())
            run.folder.environment.write_text(json.dumps({**was, **changes}))
        return progress.notes

    assert noted() == noted(gpu="NVIDIA H100", torch="2.0", numpy="1.0") == []
    found = noted(gpu=None, torch=None)
    if not torch.cuda.is_available():
        assert found.pop(0).startswith("this run began on a machine with NVIDIA H100, but ")
    assert found == [f"torch was 2.0, now {torch.__version__}; from here on, results may differ"]
    assert noted() == []


def test_a_run_folder_on_a_file_system_without_locks_is_used_with_a_note(make_recipe, monkeypatch):
    def fail(number: int) -> None:
        def flock(*args: Any) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("fcntl.flock", flock)

    for number in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
        fail(number)
        with open_run(make_recipe(), progress := Noting()) as run:
            pass
        (note,) = progress.notes
        assert note.startswith(f"{run.folder.path}: this file system has no locks; make sure")
    fail(errno.EIO)
    assert "cannot be written: " in refused(make_recipe(), CheckpointError)


def test_a_run_starts_while_its_folder_is_locked_for_an_instant(make_recipe, monkeypatch):
    with open_run(make_recipe(), Progress()) as run:
        pass
    watching = run.folder.lock.open()
    fcntl.flock(watching, fcntl.LOCK_SH)
    monkeypatch.setattr("time.sleep", lambda seconds: watching.close())
    with open_run(make_recipe(), Progress()):
        pass


def test_other_servers_are_noted_because_they_may_round_differently(make_recipe):
    def notes(server: str | None, gpus: float = 0.3) -> list[str]:
        engine = {"kind": "vllm", "server": server, "memory": gpus}
        progress = Noting()
        with open_run(make_recipe(engine=engine), progress):
            return progress.notes

    assert notes("http://a:8000") == notes("http://a:8000") == []
    (note,) = notes("http://b:8000")
    assert note.startswith("engine.server was 'http://a:8000', now 'http://b:8000'; from here on,")


def test_the_servers_of_a_requeued_job_may_have_other_names(make_recipe):
    def served(node: str) -> Recipe:
        server = f"http://{node}:8000"
        return make_recipe(engine={"kind": "vllm", "server": server, "weights_dir": f"/{node}"})

    with open_run(make_recipe(), Progress()) as run:
        for node in ("node-1", "node-2"):
            run.folder.recipe.write_text(dump_recipe(served(node)))
            assert not refuse_foreign(run.folder, served("node-3"))


def test_a_run_that_ran_out_of_memory_goes_on_with_smaller_sizes_and_says_so(make_recipe):
    with pytest.raises(KeyboardInterrupt):
        run_all(make_recipe(), Stopping("reft", 3))
    smaller = make_recipe(model={"micro_batch_tokens": 64}, engine={"batch_size": 3})
    progress = Noting()
    run_all(smaller, progress)
    changed = [note for note in progress.notes if "from here on" in note]
    assert changed == [
        "model.micro_batch_tokens was 16384, now 64; from here on, results may differ by rounding",
        "engine.batch_size was 20, now 3; from here on, results may differ by rounding",
    ]
    run_all(smaller, again := Noting())
    assert not any("from here on" in note for note in again.notes)


def test_a_changed_evaluation_is_made_again_without_training(make_recipe, straight):
    run_all(make_recipe())
    progress = Noting()
    sampled = make_recipe(evaluate={"samples": 3, "limit": 7})
    summary = evaluate_methods(sampled, (), progress=progress)
    aside = sampled.folder / "eval.1"
    note = f"evaluate.samples was 2, now 3; the old evaluations are now in {aside}"
    assert note in progress.notes
    assert {path.name for path in aside.glob("*.jsonl")} >= {"sft.jsonl", "reft.jsonl"}
    for method in summary["methods"]:
        rows = JsonLines(sampled.folder / "eval" / f"{method}.jsonl").rows()
        assert [len(row["samples"]) for row in rows] == [3] * 7
    run_all(make_recipe())
    assert_same_results(sampled.folder, straight)


def test_a_stopped_evaluation_with_other_settings_keeps_no_row(make_recipe):
    recipe = make_recipe()
    run_all(recipe)
    path = recipe.folder / "eval" / "sft.jsonl"
    JsonLines(path).keep(4)
    with open_run(make_recipe(evaluate={"split": "dev"}), Progress()) as run:
        assert not path.exists() and not run.folder.summary.exists()


def test_the_evaluation_of_a_stage_that_gets_more_steps_is_kept(make_recipe):
    run_all(make_recipe())
    files = make_recipe().folder
    own, other = ((files / "eval" / f"{name}.jsonl").read_bytes() for name in ("reft", "sft"))
    (files / "eval" / "choices").mkdir()
    (files / "eval" / "choices" / "reft.jsonl").write_text("{}\n")
    for number, steps in ((1, 5), (2, 6)):
        progress = Noting()
        run_all(make_recipe(stages={"reft": {"steps": steps}}), progress)
        aside = files / f"eval.{number}"
        note = f"reft: trained further; its old evaluation is now in {aside}"
        assert [line for line in progress.notes if "old evaluation" in line] == [note]
    assert (files / "eval.1" / "reft.jsonl").read_bytes() == own
    assert (files / "eval.1" / "choices" / "reft.jsonl").read_text() == "{}\n"
    assert [path.name for path in (files / "eval.2").iterdir()] == ["reft.jsonl"]
    assert (files / "eval" / "sft.jsonl").read_bytes() == other, "only reft was trained further"


def test_a_stage_that_was_never_evaluated_gets_more_steps_without_a_note(make_recipe):
    with open_run(make_recipe(), Progress()) as run:
        run.train("sft")
    progress = Noting()
    with open_run(make_recipe(stages={"sft": {"epochs": 3}}), progress) as run:
        assert not any(run.folder.path.glob("eval.*"))
    assert not any("evaluation" in note for note in progress.notes)


def test_a_stage_that_gets_more_steps_and_another_evaluation_keeps_both_old_ones(make_recipe):
    run_all(make_recipe())
    changed = make_recipe(stages={"reft": {"steps": 5}}, evaluate={"samples": 3})
    with open_run(changed, Progress()) as run:
        kept = {
            path: sorted(p.name for p in path.iterdir()) for path in run.folder.path.glob("eval.*")
        }
    assert kept == {
        changed.folder / "eval.1": ["reft.jsonl"],
        changed.folder / "eval.2": ["sft.jsonl"],
    }


def test_a_stage_that_has_not_begun_may_be_lengthened(make_recipe):
    with open_run(make_recipe(), Progress()):
        pass
    recipe = make_recipe(stages={"sft": {"epochs": 9}, "reft": {"steps": 5}})
    with open_run(recipe, Progress()):
        pass
    assert (
        yaml.safe_load(recipe.folder.joinpath("recipe.yaml").read_text())["stages"]["reft"]["steps"]
        == 5
    )


def test_a_run_whose_data_have_changed_is_not_continued(tmp_path, make_recipe):
    path = tmp_path / "data.jsonl"

    def recipe_with(*answers: int) -> Recipe:
        rows = [
            {"question": f"{answer} + 0?", "answer": answer, "rationale": f"It is {answer} ."}
            for answer in answers
        ]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        dataset = {"kind": "jsonl", "train": str(path), "dev_size": 1}
        return make_recipe(dataset=dataset, format={"kind": "nl"}, evaluate={"split": "dev"})

    recipe = recipe_with(1, 2, 3)
    with open_run(recipe, Progress()):
        pass
    assert refused(recipe_with(1, 2, 3, 4), DataError) == (
        f"{recipe.folder}: the train problems have changed since this run began; expected the same"
        " data, or another run_dir"
    )
    (recipe.folder / "data.json").write_text('{"problems": {}}')  # from before there were hashes
    with open_run(recipe, Progress()):
        pass


def test_the_hash_of_a_split_covers_every_turn_of_a_conversation():
    def hashed(*turns: tuple[str, str]) -> str:
        messages = tuple(Message(role=role, content=content) for role, content in turns)
        answer = Answer(kind="number", value=Fraction(2))
        problem = Problem(id="1", question="1 + 1?", answer=answer, messages=messages)
        return split_hashes(Splits(train=(problem,), dev=(), test=()))["train"]

    asked = ("user", "1 + 1?")
    assert hashed(("system", "Add."), asked) != hashed(("system", "Think."), asked)


def test_a_run_from_before_a_recipe_key_existed_goes_on_where_the_key_has_its_default(make_recipe):
    recipe = make_recipe()
    with open_run(recipe, Progress()):
        pass
    path = recipe.folder / "recipe.yaml"
    stored = yaml.safe_load(path.read_text())
    assert stored["stages"]["reft"].pop("mismatch_cap", "") is None
    assert stored["engine"].pop("refill") == 0.25
    path.write_text(yaml.safe_dump(stored))
    with open_run(recipe, Progress()):
        pass
    message = refused(
        make_recipe(engine={"kind": "kv", "batch_size": 20, "refill": 0.5}), RecipeError
    )
    assert "engine.refill was 0.25, now 0.5" in message


def test_a_run_folder_may_be_moved(make_recipe, tmp_path):
    recipe = make_recipe()
    with open_run(recipe, Progress()):
        pass
    recipe.folder.rename(tmp_path / "moved")
    with open_run(make_recipe(run_dir=str(tmp_path / "moved")), Progress()):
        pass


def test_a_file_in_the_place_of_the_run_folder_is_reported(make_recipe, tmp_path):
    recipe = make_recipe()
    recipe.folder.touch()
    assert (
        refused(recipe, CheckpointError)
        == f"{recipe.folder}: cannot be a run folder: a file is in its place"
    )
    below = make_recipe(run_dir=str(recipe.folder / "below"))
    assert (
        refused(below, CheckpointError)
        == f"{below.folder}: cannot be a run folder: a file is in its place"
    )


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_place_that_cannot_be_written_is_reported(make_recipe, monkeypatch, number):
    recipe = make_recipe()

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert (
        refused(recipe, CheckpointError)
        == f"{recipe.folder}: cannot be written: {os.strerror(number)}"
    )


def test_errors_of_the_run_itself_are_not_taken_for_those_of_its_folder(make_recipe):
    with pytest.raises(PermissionError, match="secret"), open_run(make_recipe(), Progress()):
        raise PermissionError(errno.EACCES, "secret")


def test_a_stage_whose_start_is_not_trained_yet_is_refused(make_recipe):
    with (
        open_run(make_recipe(), Progress()) as run,
        pytest.raises(RecipeError, match="stages/warmup: not trained yet"),
    ):
        run.train("reft")
