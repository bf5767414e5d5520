"""Jobs on clusters: the sbatch files, with fake SLURM commands and real processes, and two torchrun
agents in separate networks as two machines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
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
    """A function that submits a job and returns it once it has ended."""
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
    assert [end.status for end in ranks.run(straight, how=how, num=num)] == [0] * num
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


ADDRESSES = ("10.77.0.1", "10.77.0.2")


@pytest.fixture
def machines():
    """Command prefixes that run a program in one of two networks, which reach each other and
    nothing else."""
    names = [f"reftune{os.getpid()}{letter}" for letter in "ab"]
    if subprocess.run(["ip", "netns", "add", names[0]], capture_output=True).returncode:
        pytest.skip("networks of their own are not permitted here (ip netns add)")
    inside = [["ip", "netns", "exec", name] for name in names]
    try:
        links = [f"rt{os.getpid() % 10**6}{letter}" for letter in "ab"]
        commands = [
            ["ip", "netns", "add", names[1]],
            ["ip", "link", "add", links[0], "type", "veth", "peer", "name", links[1]],
        ]
        for name, link, address, own in zip(names, links, ADDRESSES, inside, strict=True):
            commands += [
                ["ip", "link", "set", link, "netns", name],
                [*own, "ip", "link", "set", link, "name", "net0"],
                [*own, "ip", "address", "add", f"{address}/24", "dev", "net0"],
                [*own, "ip", "link", "set", "net0", "up"],
                [*own, "ip", "link", "set", "lo", "up"],
            ]
        for command in commands:
            subprocess.run(command, check=True, capture_output=True)
        yield inside
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def kill_all(machine):
    """Kill a machine's processes, as if it were switched off."""
    found = subprocess.run(["ip", "netns", "pids", machine], capture_output=True, text=True)
    for pid in map(int, found.stdout.split()):
        os.kill(pid, signal.SIGKILL)


def test_a_machine_that_is_killed_and_started_again_repeats_to_the_bit(
    machines, steady_recipe, tmp_path
):
    changes = {"stages": STAGES, "evaluate": {"samples": 0}}
    straight = steady_recipe(tmp_path / "straight" / "run", **changes)
    assert [end.status for end in ranks.run(straight)] == [0, 0]
    killed = steady_recipe(tmp_path / "run", **changes)
    file, first = write(killed), killed.folder / "stages/reft/checkpoints/step-000001"

    def start(rank):
        agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        where = ["--node_rank", str(rank), "--master_addr", ADDRESSES[0], "--master_port", "29411"]
        with (tmp_path / f"machine{rank}.txt").open("a") as told:
            return subprocess.Popen(
                [*machines[rank], *agent, *where, "-m", "reftune", "run", str(file)],
                env={**os.environ, "GLOO_SOCKET_IFNAME": "net0", "OMP_NUM_THREADS": "1"},
                stdout=told,
                stderr=told,
            )

    agents = [start(rank) for rank in (0, 1)]
    try:
        while not first.exists():
            assert [agent.poll() for agent in agents] == [None, None], agents
            time.sleep(0.05)
        kill_all(machines[1][-1])
        assert agents[0].wait(TIME_S) != 0
        agents = [start(rank) for rank in (0, 1)]
        assert [agent.wait(TIME_S) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            agent.kill()
    told = (tmp_path / "machine0.txt").read_text()
    assert "process 0 of 2: process 1 ended without an error" in told
    assert told.count("reft: resumed at step") == 1
    assert_same_outcome(killed.folder, outcome(straight.folder))
