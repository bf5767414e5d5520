"""vLLM, beside the trainer (colocated: a process of its own that we start) or as a server that
somebody else started.

Each call first hands over the policy's weights as they are, LoRA merged, through a folder in
memory. The tokens are drawn by vLLM's kernels, whose log-probabilities differ a little from the
trainer's; `mismatch_cap` of an RL stage corrects for that.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field

from reftune.errors import EngineError, RecipeError
from reftune.model.frozen import plain_state
from reftune.model.policy import Policy
from reftune.recipe import Component
from reftune.seeds import derive_seed
from reftune.types import Completion, SamplingParams

SHARED_MEMORY = Path("/dev/shm")
TIMEOUT_S = 3600.0
"""Longest wait for one answer of a server."""

Sampled = tuple[list[int], list[float]]
"""Token ids and their log-probabilities."""


class Vllm(Component):
    kind: str = "vllm"
    server: str | None = None
    """Address of a running server (`http://host:8000`), started as docs/engines.md says; None:
    colocated."""
    weights_dir: str | None = None
    """Folder through which weights travel; a server must see it under the same path. None: in
    memory, on this machine."""
    batch_size: int = Field(256, gt=0)
    """Requests in flight."""
    memory: float = Field(0.3, gt=0, le=1)
    """Share of the device's memory for a colocated engine's weights and cache."""
    eager: bool = False
    """Colocated: no compilation and no CUDA graphs. Starts sooner, runs slower."""

    def generate(
        self, policy: Policy, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[Completion]:
        """One completion a prompt, in order; see `reftune.engines.Engine`. Raises: EngineError,
        RecipeError."""
        if not prompts:
            return []
        requests = [
            request(policy, params, position)
            for position, _ in enumerate(prompts, params.first_position)
        ]
        with self._weights(policy) as folder:
            client = (
                Server(self.server, self.batch_size)
                if self.server is not None
                else self._colocated(policy, folder)
            )
            client.load(folder)
        sampled = client.sample([list(prompt) for prompt in prompts], requests)
        return [policy.completion(tokens, logprobs) for tokens, logprobs in sampled]

    @contextlib.contextmanager
    def _weights(self, policy: Policy) -> Iterator[Path]:
        """A folder that holds the policy's weights in Hugging Face format, as long as the block
        runs."""
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise RecipeError(
                "engine vllm: expected one training process; use engine=kv with several"
            )
        parent = self.weights_dir or (SHARED_MEMORY if SHARED_MEMORY.is_dir() else None)
        with tempfile.TemporaryDirectory(prefix="reftune-weights-", dir=parent) as name:
            folder = Path(name)
            folder.chmod(0o755)  # for a server that another user runs
            save_weights(policy, folder)
            yield folder

    def _colocated(self, policy: Policy, folder: Path) -> Colocated:
        """The engine that runs, if it fits; otherwise a new one, which takes seconds to minutes to
        start."""
        key = (self, str(policy.compute_dtype), (folder / "config.json").read_text())
        if _running and key not in _running:
            stop_engines()
        if key not in _running:
            _running[key] = Colocated(self, policy, folder)
        return _running[key]


_running: dict[Any, Colocated] = {}
"""The colocated engine of this process: one at most, as each holds its share of the device."""


@atexit.register
def stop_engines() -> None:
    """End the colocated engine and give its memory back."""
    while _running:
        _running.popitem()[1].stop()


class Client(Protocol):
    """A vLLM engine, wherever it runs."""

    def load(self, folder: Path) -> None:
        """Take the weights in `folder`, and forget what was computed with others."""

    def sample(
        self, prompts: Sequence[list[int]], requests: Sequence[dict[str, Any]]
    ) -> list[Sampled]:
        """A response a prompt, in order."""


class Colocated:
    """An engine in a process of its own, so that it shares no generator, thread pool or process
    group with the trainer."""

    def __init__(self, settings: Vllm, policy: Policy, folder: Path) -> None:
        quiet = {
            "VLLM_LOGGING_STREAM": "ext://sys.stderr",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        }
        for name, value in {**quiet, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}.items():
            os.environ.setdefault(name, value)
        with torch.random.fork_rng([]):
            vllm = _vllm()
            try:
                self.engine: Any = vllm.LLM(
                    model=str(folder),
                    skip_tokenizer_init=True,
                    dtype=str(policy.compute_dtype).removeprefix("torch."),
                    max_model_len=policy.context,
                    max_num_seqs=settings.batch_size,
                    gpu_memory_utilization=settings.memory,
                    enforce_eager=settings.eager,
                    logprobs_mode="processed_logprobs",
                    generation_config="vllm",
                    use_tqdm_on_load=False,
                    worker_extension_cls="reftune.engines._vllm_worker.Repacking",
                )
            except Exception as error:  # noqa: BLE001 - whatever vLLM makes of the model or the device
                reason = " ".join(str(error).split())[:300]
                raise EngineError(
                    f"engine vllm: did not start: {reason}; VLLM_LOGGING_LEVEL=INFO tells more"
                ) from None

    def load(self, folder: Path) -> None:
        self.engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self.engine.collective_rpc("repack")
        self.engine.reset_prefix_cache()

    def sample(
        self, prompts: Sequence[list[int]], requests: Sequence[dict[str, Any]]
    ) -> list[Sampled]:
        outputs = self.engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [_vllm().SamplingParams(**request, detokenize=False) for request in requests],
            use_tqdm=False,
        )
        return [_sampled(output.outputs[0]) for output in outputs]

    def stop(self) -> None:
        self.engine.llm_engine.engine_core.shutdown()


class Server:
    """A server that was started with `VLLM_SERVER_DEV_MODE=1 vllm serve … --logprobs-mode
    processed_logprobs`."""

    def __init__(self, address: str, connections: int) -> None:
        self.address, self.connections = address.rstrip("/"), connections

    def load(self, folder: Path) -> None:
        self.post(
            "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        )
        self.post("/reset_prefix_cache", {})

    def sample(
        self, prompts: Sequence[list[int]], requests: Sequence[dict[str, Any]]
    ) -> list[Sampled]:
        with ThreadPoolExecutor(min(self.connections, len(prompts))) as pool:
            return list(pool.map(self._complete, prompts, requests))

    def _complete(self, prompt: list[int], request: dict[str, Any]) -> Sampled:
        answer = self.post(
            "/v1/completions", {"prompt": prompt, "return_token_ids": True, **request}
        )
        choice = answer["choices"][0]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to a JSON request. Raises: EngineError."""
        url = self.address + path
        query = urllib.request.Request(
            url, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(query, timeout=TIMEOUT_S) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            reason = " ".join(error.read().decode(errors="replace").split())[:200]
            hint = (
                "; expected VLLM_SERVER_DEV_MODE=1 in the server's environment"
                if error.code == 404
                else ""
            )
            raise EngineError(f"engine vllm: {url} answered {error.code}: {reason}{hint}") from None
        except (OSError, ValueError) as error:
            raise EngineError(f"engine vllm: no answer from {url}: {error}") from None
        return json.loads(text) if text else None


def _vllm() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError:
        expected = "pip install 'reftune[vllm]', or engine.server"
        raise RecipeError(f"engine vllm: vllm is not installed; expected {expected}") from None


def request(policy: Policy, params: SamplingParams, position: int) -> dict[str, Any]:
    """What vLLM is asked for at one position; every field is said, so that no default of a model or
    server enters."""
    return {
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": derive_seed(params.seed, position),
        "logprobs": 0,  # of the sampled token only
        "ignore_eos": True,  # the model's own idea of it; ours follows
        "stop_token_ids": sorted(policy.eos_ids),
    }


@torch.no_grad()
def save_weights(policy: Policy, folder: Path) -> None:
    """The policy's weights in its compute dtype, LoRA merged in fp32, and its config, as
    `from_pretrained` reads them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = policy.model.get_base_model() if policy.is_lora else policy.model
    model.save_pretrained(folder, state_dict=plain_state(policy.model, policy.compute_dtype))


def _sampled(output: Any) -> Sampled:
    tokens = list(output.token_ids)
    return tokens, [
        step[token].logprob for token, step in zip(tokens, output.logprobs, strict=True)
    ]
