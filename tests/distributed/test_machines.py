"""Jobs on clusters: the sbatch files with SLURM's commands faked and real processes, and two
torchrun agents in networks of their own as two machines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ranks
from crash import assert_same_outcome, outcome
from reftune.recipe import dump_recipe, shipped_recipes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SLURM = shipped_recipes() / "slurm"
STAGES = {"sft": None, "reft": {"init": "base", "steps": 4, "save_every_s": 0, "keep": 100}}
TIME_S = 500


def write(recipe):
    file = recipe.folder.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_recipe(recipe))
    return file


@pytest.fixture
def cluster(tmp_path):
    """A function that submits a job and returns it, ended."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("sbatch", "srun", "scontrol", "vllm"):
        (commands / name).symlink_to(Path(__file__).with_name("fake_slurm.py"))
    (commands / "reftune").write_text(f'#!/bin/sh\nexec {sys.executable} -m reftune "$@"\n')
    (commands / "reftune").chmod(0o755)

    def submit(*arguments, **environment):
        path = os.pathsep.join(
            [str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]
        )
        told = {"FAKE_SLURM": str(tmp_path), "PATH": path, "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(
            ["sbatch", *arguments],
            env={**os.environ, **told},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=TIME_S,
        )

    return submit


@pytest.mark.parametrize(
    ("script", "tasks", "how"), [("one-node", 2, "fsdp2"), ("two-nodes", 2, "2x2")]
)
def test_a_job_whose_time_is_over_queues_again_and_repeats_to_the_bit(
    script, tasks, how, cluster, steady_recipe, tmp_path
):
    changes = {"stages": STAGES, "evaluate": {"samples": 0}}
    straight = steady_recipe(tmp_path / "straight" / "run", **changes)
    num = tasks * (2 if script == "two-nodes" else 1)
    assert [end.status for end in ranks.run(straight, how=how, num=num, timeout_s=110)] == [0] * num
    stopped = steady_recipe(tmp_path / "run", **changes)
    first = stopped.folder / "stages" / "reft" / "checkpoints" / "step-000001"
    job = cluster(
        f"--ntasks-per-node={tasks}",
        str(SLURM / f"{script}.sbatch"),
        str(write(stopped)),
        FAKE_TERM=str(first),
    )
    assert job.returncode == 0, job
    assert job.stdout.count("queued again") == 1
    assert job.stderr.count("interrupted; checkpoint: ") == 1
    assert job.stderr.count("reft: resumed at step") == 1
    assert_same_outcome(stopped.folder, outcome(straight.folder))


def test_a_node_of_servers_samples_for_a_node_that_trains(cluster, steady_recipe, tmp_path):
    changes = {"stages": STAGES, "evaluate": {"samples": 0}}
    recipe = steady_recipe(tmp_path / "run", **changes)
    job = cluster(
        "--ntasks-per-node=2", str(SLURM / "trainer-and-vllm.sbatch"), str(write(recipe)), MODEL="m"
    )
    assert job.returncode == 0, job
    assert "2 processes, weights sharded (FSDP2)" in job.stderr
    assert (recipe.folder / "summary.json").is_file()
    assert '"engine/sync_bytes"' in (recipe.folder / "metrics.jsonl").read_text()
    assert not list(tmp_path.glob(".weights-*"))


def test_a_job_that_fails_does_not_queue_again(cluster, tmp_path):
    job = cluster(
        "--ntasks-per-node=1", str(SLURM / "one-node.sbatch"), str(tmp_path / "none.yaml")
    )
    assert job.returncode == 2 and "queued again" not in job.stdout
    assert "none.yaml" in job.stderr
