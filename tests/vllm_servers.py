"""Real `vllm serve` processes, for the tests of `make test-vllm`."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from ranks import free_port

START_S = 600
SERVE = "vllm.entrypoints.openai.api_server"
"""The module that `vllm serve` runs; the CPU build has no such command."""
VARIABLES = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
TRAINING = "--dtype float32 --logprobs-mode processed_logprobs --enable-lora --max-lora-rank 8"
"""Options of a server that a run samples from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RealServer:
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until_healthy(self) -> None:
        for _ in range(START_S):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        raise AssertionError(self.log.read_text()[-3000:])

    def kill(self) -> None:
        """Kill the server as if its machine were lost: the engine's process dies too."""
        os.killpg(self.process.pid, 9)
        self.process.wait(60)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            if self.process.poll() is None:
                self.kill()


def start(
    command: str, log: Path, *, folder: Path | None = None, port: int | None = None
) -> RealServer:
    """Start `vllm serve …` in a folder, on a free port unless one is given."""
    port = free_port() if port is None else port
    program, serve, model, *options = shlex.split(command)
    assert (program, serve) == ("vllm", "serve")
    where = f"--model {model} --host 127.0.0.1 --port {port} --enforce-eager"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", SERVE, *shlex.split(where), *options],
            env={**os.environ, **VARIABLES},
            cwd=folder,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    return RealServer(process=process, port=port, log=log)
