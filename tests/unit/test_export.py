"""An exported model is a separate folder with a card; an unfinished run is rejected."""

import json
import socket
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from reftune.errors import CheckpointError, DataError, ModelError
from reftune.runs.export import export_model, push_model


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished stage of a run, whose weights are a few bytes."""
    run = tmp_path / "runs" / "tiny"
    stage = run / "stages" / "reft"
    (stage / "checkpoints" / "step-000004").mkdir(parents=True)
    for name in (
        "config.json",
        "tokenizer.json",
        "samples.jsonl",
        "sampled.jsonl",
        "nonfinite-000003.json",
    ):
        (stage / name).write_text(name)
    save_file({"weight": torch.zeros(8)}, stage / "model.safetensors")
    document = {
        "kind": "rl",
        "init": "warmup",
        "chosen_step": 40,
        "dev_accuracy": 0.625,
        "dev_n": 8,
        "looks": 3,
    }
    (stage / "stage.json").write_text(json.dumps(document))
    (run / "recipe.yaml").write_text(
        "name: tiny\nseed: 7\ndataset: {kind: jsonl, train: mine.csv}\nstages: {reft: rl}\n"
    )
    (run / "summary.json").write_text(
        json.dumps({"methods": {"reft": {"accuracy": 0.5, "ci95": [0.4, 0.6], "n": 100}}})
    )
    return run


def test_the_model_is_copied_without_what_training_left(run_folder: Path, tmp_path: Path):
    out = export_model(run_folder, "reft", tmp_path / "deep" / "model")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "reftune.json",
        "tokenizer.json",
    ]


def test_the_card_states_accuracy_choice_and_recipe(run_folder: Path, tmp_path: Path):
    card = (export_model(run_folder, "reft", tmp_path / "model") / "README.md").read_text()
    assert (
        "Its greedy accuracy on 100 test problems is 50.0% (95% interval 40.0% to 60.0%)." in card
    )
    assert "step 40, chosen as the best of 3 dev evaluations. The model solves\n62.5% of 8" in card
    assert "name: tiny\nseed: 7" in card
    assert "trained on\n`mine.csv` (`jsonl`)" in card


def test_the_card_states_the_dev_accuracy_once(run_folder: Path, tmp_path: Path):
    with (run_folder / "recipe.yaml").open("a") as recipe:
        recipe.write("evaluate: {split: dev}\n")
    info = run_folder / "stages" / "reft" / "stage.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"looks": 1}))
    card = (export_model(run_folder, "reft", tmp_path / "model") / "README.md").read_text()
    assert card.count("dev problems") == 1
    assert "Its greedy accuracy on 100 dev problems is 50.0%" in card
    assert "step 40, chosen as the best of 1 dev evaluation.\n" in card


def test_the_card_of_a_snapshot_does_not_claim_a_choice_on_dev(run_folder: Path, tmp_path: Path):
    info = run_folder / "stages" / "reft" / "stage.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"snapshot_of": "sft"}))
    card = (export_model(run_folder, "reft", tmp_path / "model") / "README.md").read_text()
    assert "The weights are those of step 40. The model solves\n62.5% of 8 dev problems." in card


def test_the_card_holds_nothing_that_the_model_wrote(run_folder: Path, tmp_path: Path):
    hostile = "<script>alert(1)</script>"
    (run_folder / "eval").mkdir()
    for path in (
        run_folder / "eval" / "reft.jsonl",
        run_folder / "stages" / "reft" / "samples.jsonl",
    ):
        path.write_text(json.dumps({"completion": hostile, "greedy": {"completion": hostile}}))
    assert (
        "<script>"
        not in (export_model(run_folder, "reft", tmp_path / "model") / "README.md").read_text()
    )


def test_the_card_states_that_a_model_was_not_evaluated(run_folder: Path, tmp_path: Path):
    (run_folder / "summary.json").unlink()
    assert (
        "Its final evaluation is not done."
        in (export_model(run_folder, "reft", tmp_path / "model") / "README.md").read_text()
    )


def test_an_unfinished_method_or_an_existing_folder_is_refused(run_folder: Path, tmp_path: Path):
    with pytest.raises(
        CheckpointError,
        match=r"stages/sft: not a finished method \(no stage\.json\); finished here: reft$",
    ):
        export_model(run_folder, "sft", tmp_path / "model")
    classifier = run_folder / "stages" / "reft" / "classifier.safetensors"
    classifier.touch()
    with pytest.raises(
        CheckpointError, match="reft: not a method, so its model answers no questions"
    ):
        export_model(run_folder, "reft", tmp_path / "model")
    classifier.unlink()
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match="model: exists already"):
        export_model(run_folder, "reft", tmp_path / "model")
    assert list((tmp_path / "model").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/a/model: cannot be written: Not a directory$"):
        export_model(run_folder, "reft", tmp_path / "file" / "a" / "model")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (b"name: [tiny", "not valid YAML"),
        (b"\x00", "not valid YAML"),
        (b"\xff", "cannot be read: .*utf-8"),
        (b"begun: 2026-13-01", "cannot be read: month must be in"),
        (b"- name: tiny", "not the recipe of a run: it has no stages"),
        (b"tiny", "not the recipe of a run: it has no stages"),
        (b"", "not the recipe of a run: it has no stages"),
        (b"name: tiny\nstages:", "not the recipe of a run: it has no stages"),
    ],
)
def test_a_run_with_a_damaged_recipe_is_not_exported(
    run_folder: Path, tmp_path: Path, recipe: bytes, message: str
):
    (run_folder / "recipe.yaml").write_bytes(recipe)
    with pytest.raises(DataError, match=rf"recipe\.yaml: {message}"):
        export_model(run_folder, "reft", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_weights_that_are_missing_or_incomplete_are_not_exported(run_folder: Path, tmp_path: Path):
    stage = run_folder / "stages" / "reft"
    whole = stage / "model.safetensors"
    data = whole.read_bytes()

    def refused() -> None:
        with pytest.raises(CheckpointError, match="stages/reft: cannot be exported: the weights"):
            export_model(run_folder, "reft", tmp_path / "model")
        assert not (tmp_path / "model").exists()

    whole.write_bytes(data[:-1])
    refused()
    whole.unlink()
    refused()
    files = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    (stage / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (stage / files["a"]).write_bytes(data)
    refused()
    (stage / files["b"]).write_bytes(data)
    assert {
        path.name for path in export_model(run_folder, "reft", tmp_path / "model").iterdir()
    } > {*files.values()}


class Hub:
    """Stands in for the Hub, and records the requests."""

    asked: ClassVar[list[tuple]] = []
    refuses: Exception | None = None

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> str:
        if self.refuses is not None:
            raise self.refuses
        self.asked.append((repository, private, exist_ok))
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, *, folder_path: Path, repo_id: str, commit_message: str) -> None:
        self.asked.append((repo_id, sorted(path.name for path in folder_path.iterdir())))


def test_push_uploads_the_exported_folder_privately(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    out = export_model(run_folder, "reft", tmp_path / "model")
    assert push_model(out, "me/mine") == "https://huggingface.co/me/mine"
    assert Hub.asked == [
        ("me/mine", True, True),
        (
            "me/mine",
            ["README.md", "config.json", "model.safetensors", "reftune.json", "tokenizer.json"],
        ),
    ]


def test_a_hub_that_refuses_is_one_line_and_the_folder_stays(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "refuses", OSError("401\nUnauthorized"))
    out = export_model(run_folder, "reft", tmp_path / "model")
    with pytest.raises(
        ModelError,
        match=r"^me/mine: cannot be pushed: 401 Unauthorized; the model stays in .*model \(to log",
    ):
        push_model(out, "me/mine")
    assert (out / "model.safetensors").exists()


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as closed:  # bound, but not listening
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.HfApi", partial(HfApi, endpoint=address))
        with pytest.raises(ModelError, match=r"^me/mine: cannot be pushed: .*refused"):
            push_model(tmp_path, "me/mine")
