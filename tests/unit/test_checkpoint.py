"""Checkpoints are written whole or not at all, and the newest sound one is found."""

from __future__ import annotations

import ast
import contextlib
import errno
import hashlib
import json
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import reftune
from reftune.errors import CheckpointError
from reftune.storage.checkpoint import (
    load_latest,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from reftune.storage.files import link_files, replace_folder, restore_folder, write_atomically

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3.5)}


def save(folder: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(
        folder, step=step, tensors=TENSORS, state={"best": 0.1, "totals": {"x": 3}}, keep=keep
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_and_then_their_folder_reach_the_disk_before_the_rename(tmp_path: Path, monkeypatch):
    synced = []

    def record(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append(str(path.relative_to(tmp_path)))

    monkeypatch.setattr("os.fsync", record)
    save(tmp_path / "checkpoints", 3)
    partial = "checkpoints/.step-000003.partial"
    files = {f"{partial}/{name}" for name in ("manifest.json", "state.json", "tensors.safetensors")}
    assert set(synced[:3]) == files and synced[3:] == [partial, "checkpoints"]


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Let no file grow past 8 KiB: writing more fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_was_saved_is_loaded_to_the_bit(tmp_path):
    tensors = {
        **TENSORS,
        "transposed": torch.randn(4, 3).T,
        "step": torch.tensor(7, dtype=torch.int64),
    }
    path = save_checkpoint(
        tmp_path, step=12, tensors=tensors, state={"best_accuracy": 1 / 3, "looks": 2}
    )
    found = load_latest(tmp_path)
    assert found is not None and found.folder == path == tmp_path / "step-000012"
    assert found.step == 12
    assert found.state == {"step": 12, "best_accuracy": 1 / 3, "looks": 2}
    assert set(found.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert (
            torch.equal(found.tensors[name], tensor) and found.tensors[name].dtype == tensor.dtype
        )


def test_without_a_checkpoint_there_is_none(tmp_path):
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "absent") is None


def test_the_newest_is_found_and_only_so_many_are_kept(tmp_path):
    for step in (2, 10, 9, 1_000_000):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-000009", "step-1000000"]
    found = load_latest(tmp_path)
    assert found is not None and found.step == 1_000_000


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, 3)
    save_checkpoint(tmp_path, step=3, tensors={"a": torch.zeros(1)}, state={})
    found = load_latest(tmp_path)
    assert found is not None and found.tensors["a"].tolist() == [0]


def damaged(folder: Path, how: str) -> None:
    tensors = folder / "tensors.safetensors"
    if how == "one flipped bit":
        content = bytearray(tensors.read_bytes())
        content[-1] ^= 1
        tensors.write_bytes(bytes(content))
    elif how == "torn tensors":
        tensors.write_bytes(tensors.read_bytes()[:20])
    elif how == "no tensors":
        tensors.unlink()
    elif how == "changed state":
        (folder / "state.json").write_text("{}")
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "torn manifest":
        (folder / "manifest.json").write_text('{"tensors.sa')
    elif how == "empty manifest":
        (folder / "manifest.json").write_text("{}")
    elif how == "foreign manifest":
        (folder / "manifest.json").write_text("[]")


@pytest.mark.parametrize(
    "how",
    [
        "one flipped bit",
        "torn tensors",
        "no tensors",
        "changed state",
        "no manifest",
        "torn manifest",
        "empty manifest",
        "foreign manifest",
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, how):
    save(tmp_path, 1)
    damaged(save(tmp_path, 2), how)
    notes: list[str] = []
    found = load_latest(tmp_path, note=notes.append)
    assert found is not None and found.step == 1
    assert (
        len(notes) == 1
        and notes[0].startswith(f"{tmp_path / 'step-000002'}: ")
        and "\n" not in notes[0]
    )


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[1]", b"not JSON", b"\xff"])
def test_a_checkpoint_that_makes_no_sense_is_named_also_where_its_checksums_hold(tmp_path, content):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    (path / "state.json").write_bytes(content)
    sign(path)
    notes: list[str] = []
    found = load_latest(tmp_path, note=notes.append)
    assert found is not None and found.step == 1
    assert (
        len(notes) == 1
        and notes[0].startswith(f"{path}: incomplete or damaged: ")
        and "\n" not in notes[0]
    )


def sign(path: Path) -> None:
    """Write a manifest with the checksums of the present files."""
    manifest = {
        name: hashlib.sha256((path / name).read_bytes()).hexdigest()
        for name in ("state.json", "tensors.safetensors")
    }
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_pickle_in_the_place_of_weights_is_not_read(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    torch.save(TENSORS, path / "tensors.safetensors")
    sign(path)
    found = load_latest(tmp_path)
    assert found is not None and found.step == 1


def test_if_all_are_damaged_there_is_none(tmp_path):
    damaged(save(tmp_path, 1), "torn tensors")
    assert load_latest(tmp_path) is None


def test_a_damaged_later_checkpoint_does_not_push_out_sound_ones(tmp_path):
    save(tmp_path, 1)
    damaged(save(tmp_path, 5), "torn tensors")
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_what_a_killed_writer_left_is_no_checkpoint_and_is_cleared_away(tmp_path):
    (tmp_path / ".step-000007.partial").mkdir()
    (tmp_path / ".step-000007.partial" / "tensors.safetensors").write_bytes(b"torn")
    assert load_latest(tmp_path) is None
    save(tmp_path, 8)
    assert names(tmp_path) == ["step-000008"]


def test_what_a_process_left_that_was_killed_saving_a_step_again_is_cleared_away(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step-000001").rename(tmp_path / ".step-000001.old")  # its new folder is missing
    shutil.copytree(tmp_path / "step-000002", tmp_path / ".step-000002.old")
    assert load_latest(tmp_path).step == 2
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_a_full_disk_is_reported_in_one_line_and_spares_older_checkpoints(tmp_path):
    save(tmp_path, 1)
    with full_disk(), pytest.raises(CheckpointError) as error:
        save_checkpoint(tmp_path, step=2, tensors={"large": torch.zeros(10_000)}, state={})
    assert str(error.value).startswith(
        f"{tmp_path / 'step-000002'}: cannot be written: "
    ) and "\n" not in str(error.value)
    assert names(tmp_path) == ["step-000001"]
    found = load_latest(tmp_path)
    assert found is not None and found.step == 1


# --- single files and folders ---------------------------------------------------------------------


def test_a_file_is_replaced_whole(tmp_path):
    write_atomically(tmp_path / "sub" / "a.json", "old")
    write_atomically(tmp_path / "sub" / "a.json", "new")
    assert (tmp_path / "sub" / "a.json").read_text() == "new"
    assert names(tmp_path / "sub") == ["a.json"]


@pytest.mark.parametrize("place", [".", "..", "/", "", "sub", "new/.."])
def test_a_folder_is_not_replaced_by_a_file(tmp_path, monkeypatch, place):
    here = tmp_path / "deep" / "here"
    (here / "sub").mkdir(parents=True)
    monkeypatch.chdir(here)
    message = r"cannot be written: it is a folder; expected a file$"
    with pytest.raises(CheckpointError, match=message):
        write_atomically(Path(place), "text")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    write_atomically(tmp_path / "a.json", "old")
    with full_disk(), pytest.raises(CheckpointError, match=r"a\.json: cannot be written: "):
        write_atomically(tmp_path / "a.json", "x" * 20_000)
    assert (tmp_path / "a.json").read_text() == "old"


def fill(content: str):
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "file").write_text(content)

    return write


def test_a_folder_is_replaced_whole(tmp_path):
    replace_folder(tmp_path / "best", fill("old"))
    (tmp_path / "best" / "stale").touch()
    replace_folder(tmp_path / "best", fill("new"))
    assert (tmp_path / "best" / "file").read_text() == "new"
    assert names(tmp_path / "best") == ["file"]
    assert names(tmp_path) == ["best"]


def test_a_folder_whose_replacement_was_killed_is_the_old_one_again(tmp_path, monkeypatch):
    rename = Path.rename

    def killed(self: Path, target: Path) -> None:
        if self.name == ".best.partial":
            raise KeyboardInterrupt
        rename(self, target)

    replace_folder(tmp_path / "best", fill("old"))
    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(tmp_path / "best", fill("new"))
    monkeypatch.undo()
    assert not (tmp_path / "best").exists()
    restore_folder(tmp_path / "best")
    assert (tmp_path / "best" / "file").read_text() == "old"
    replace_folder(tmp_path / "best", fill("new"))
    fill("old")(tmp_path / ".best.old")  # as if killed after the second renaming
    restore_folder(tmp_path / "best")
    assert (tmp_path / "best" / "file").read_text() == "new"
    assert names(tmp_path) == ["best"]


def test_who_may_read_the_folder_may_read_its_files(tmp_path):
    def private(folder: Path) -> None:
        fill("weights")(folder)
        (folder / "file").chmod(0o600)
        folder.chmod(0o750)

    replace_folder(tmp_path / "best", private)
    assert (tmp_path / "best" / "file").stat().st_mode & 0o777 == 0o640


def test_a_folder_that_cannot_be_filled_leaves_the_old_one_and_nothing_else(tmp_path):
    replace_folder(tmp_path / "best", fill("old"))
    with full_disk(), pytest.raises(CheckpointError, match="best: cannot be written: "):
        replace_folder(tmp_path / "best", fill("x" * 20_000))
    assert (tmp_path / "best" / "file").read_text() == "old"
    assert names(tmp_path) == ["best"]


def test_a_folder_of_model_weights_on_a_full_disk_is_reported_in_one_line(tmp_path):
    from safetensors.torch import save_file

    def weights(folder: Path) -> None:
        folder.mkdir()
        save_file({"w": torch.zeros(10_000)}, folder / "model.safetensors")

    with full_disk(), pytest.raises(CheckpointError, match="best: cannot be written: "):
        replace_folder(tmp_path / "best", weights)


def test_a_tokenizer_on_a_full_disk_is_reported_in_one_line(tmp_path):
    from reftune.model.weights import word_tokenizer

    tokenizer = word_tokenizer(map(str, range(5_000)))
    with full_disk(), pytest.raises(CheckpointError, match=r"best: cannot be written: [^\n]+$"):
        replace_folder(tmp_path / "best", tokenizer.save_pretrained)
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [Exception("another"), RuntimeError("(os error 28)")])
def test_an_error_that_is_not_the_disk_s_stays_as_it_is(tmp_path, error):
    def fail(folder: Path) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        replace_folder(tmp_path / "best", fail)
    assert caught.value is error


def test_linked_files_replace_those_in_their_place(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    fill("new")(source)
    fill("old")(target)
    fill("new, deeper")(source / "folder")
    for _ in range(2):
        link_files(source, target)
    assert (target / "file").read_text() == "new"
    assert (target / "file").samefile(source / "file")
    assert (target / "folder" / "file").read_text() == "new, deeper"


def test_files_are_copied_where_the_disk_has_no_links(tmp_path, monkeypatch):
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    source, target = tmp_path / "source", tmp_path / "target"
    fill("new")(source)
    target.mkdir()
    link_files(source, target)
    assert (target / "file").read_text() == "new"


# --- optimizer ------------------------------------------------------------------------------------


def trained(
    steps: int,
    optimizer_state: dict[str, torch.Tensor] | None = None,
    weights: torch.Tensor | None = None,
):
    """A parameter and its AdamW after some steps on fixed gradients; a second parameter never has
    any."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 4) if weights is None else weights.clone())
    optimizer = torch.optim.AdamW(
        [{"params": [weight, torch.nn.Parameter(torch.ones(2))], "peak": 0.1}], lr=0.1, fused=True
    )
    if optimizer_state is not None:
        load_optimizer_tensors(optimizer, optimizer_state)
    for _ in range(steps):
        weight.grad = weight.detach() ** 2 - 0.3
        optimizer.step()
    return weight, optimizer


def test_an_optimizer_that_was_put_back_goes_on_to_the_bit(tmp_path):
    straight, _ = trained(5)
    half, optimizer = trained(3)
    save_checkpoint(tmp_path, step=3, tensors=optimizer_tensors(optimizer), state={})
    found = load_latest(tmp_path)
    assert found is not None
    resumed, again = trained(2, {**found.tensors, "policy.x": torch.ones(1)}, half.detach())
    assert torch.equal(resumed, straight)
    assert again.param_groups[0]["peak"] == 0.1


def test_a_fresh_optimizer_has_nothing_to_save():
    _, optimizer = trained(0)
    assert optimizer_tensors(optimizer) == {}
    load_optimizer_tensors(optimizer, {})
    assert optimizer.state_dict()["state"] == {}


def test_a_checkpoint_is_readable_without_us(tmp_path):
    path = save(tmp_path, 1)
    assert json.loads((path / "state.json").read_text()) == {
        "step": 1,
        "best": 0.1,
        "totals": {"x": 3},
    }
    assert sorted(json.loads((path / "manifest.json").read_text())) == [
        "state.json",
        "tensors.safetensors",
    ]


PICKLE = re.compile(
    r"\b(pickle|dill|joblib|shelve|marshal)\b|torch\.load\b|allow_pickle=True|weights_only=False|use_safetensors=False"
)


def test_nothing_that_is_loaded_can_run_code():
    for path in Path(reftune.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value = ""  # strings may name modules that the sandbox forbids
        assert PICKLE.search(ast.unparse(tree)) is None, path
