#!/usr/bin/env python3
"""SLURM's commands and `vllm serve` for a machine that has neither; they start real processes.

Each is called by the name of a link to this file. FAKE_SLURM is a folder through which the commands
communicate; FAKE_TERM is a file whose appearance ends the job's time, once.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["FAKE_SLURM"])
REQUEUED = FOLDER / "requeued"
HOSTS = ("127.0.0.1", "localhost")


def sbatch(arguments: list[str]) -> int:
    """Run the script at once, and again each time it is requeued."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("job-name", "time", "signal", "open-mode"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--requeue", action="store_true")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    given = parser.parse_args(arguments)
    script, *rest = given.rest
    lines = Path(script).read_text().splitlines()
    settings = parser.parse_args([line.split()[1] for line in lines if line.startswith("#SBATCH")])
    for name, value in vars(given).items():
        if value:
            setattr(settings, name, value)
    assert settings.signal == "B:TERM@300" and settings.requeue
    environment = {
        **os.environ,
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": ",".join(HOSTS[: settings.nodes]),
        "SLURM_NNODES": str(settings.nodes),
        "SLURM_NTASKS": str(settings.nodes * settings.ntasks_per_node),
    }
    while True:
        job = subprocess.Popen(["bash", script, *rest], env=environment)
        end = Path(os.environ.get("FAKE_TERM", "never"))
        while job.poll() is None:
            if end.exists() and not (FOLDER / "ended").exists():
                (FOLDER / "ended").touch()
                job.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        if not REQUEUED.exists():
            return job.returncode
        REQUEUED.unlink()
        os.write(1, b"queued again\n")


def srun(arguments: list[str]) -> int:
    """Run the tasks, pass TERM on to them, and return their highest status."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--nodes", type=int, default=int(os.environ["SLURM_NNODES"]))
    parser.add_argument("--ntasks", type=int, default=int(os.environ["SLURM_NTASKS"]))
    parser.add_argument("--nodelist")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    step = parser.parse_args(arguments)
    each = step.ntasks // step.nodes
    tasks = [
        subprocess.Popen(
            step.command,
            env={
                **os.environ,
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank % each),
                "SLURM_NODEID": str(rank // each),
            },
        )
        for rank in range(step.ntasks)
    ]
    signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
    return max(abs(task.wait()) for task in tasks)


def scontrol(arguments: list[str]) -> int:
    if arguments[0] == "requeue":
        REQUEUED.touch()
    else:
        assert arguments[:2] == ["show", "hostnames"]
        sys.stdout.write(arguments[2].replace(",", "\n") + "\n")
    return 0


def vllm(arguments: list[str]) -> int:
    """Run a stub of `vllm serve`."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from stub_vllm import StubVllm

    assert arguments[0] == "serve"
    StubVllm(int(arguments[arguments.index("--port") + 1])).serve_forever()
    return 0


if __name__ == "__main__":
    commands = {command.__name__: command for command in (sbatch, srun, scontrol, vllm)}
    sys.exit(commands[Path(sys.argv[0]).name](sys.argv[1:]))
