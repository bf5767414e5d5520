"""Samples with vLLM, either in a process that reftune starts (colocated) or on servers that you
start.

Each call of `generate` first passes the policy's current weights to vLLM through a folder, which is
in memory by default. With LoRA, servers that already have the base model get only the adapter. A
colocated engine always gets the merged weights. vLLM's log-probabilities differ slightly from the
trainer's. An RL stage's `mismatch_cap` can correct for the difference.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import importlib
import importlib.util
import itertools
import json
import os
import tempfile
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError

from reftune.engines import traffic
from reftune.errors import EngineError, RecipeError
from reftune.model.layers import plain_state
from reftune.model.policy import Policy
from reftune.processes import world
from reftune.recipe import Component, local_path
from reftune.seeds import derive_seed
from reftune.storage.files import make_readable
from reftune.text import counted, shown
from reftune.types import Completion, SamplingParams

SHARED_MEMORY = Path("/dev/shm")
TIMEOUT_S = 3600.0
"""Longest wait for a server's answer."""

Sampled = tuple[list[int], list[float]]
"""Token ids and their log-probabilities."""


class Vllm(Component):
    server: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """URL of a [running server](engines.md#vllm-as-servers), or a list of such URLs. By default,
    vLLM is colocated."""
    weights_dir: str | None = None
    """Folder through which weights are passed to vLLM. Default: `/dev/shm` (in memory) if it
    exists, otherwise the system's temporary folder."""
    batch_size: int = Field(256, gt=0)
    """Maximum number of solutions decoded at once. With servers, this limits both the requests that
    a training process has open at once and the solutions per request."""
    memory: float = Field(0.3, gt=0, le=1)
    """Share of the device's memory that colocated vLLM uses."""
    eager: bool = False
    """Skip compilation. Colocated vLLM then starts sooner but runs slower."""

    @property
    def device_share(self) -> float:
        """Share of the device's memory that vLLM uses for its copy of the weights and its cache.
        With servers, this is 0."""
        return 0.0 if self.server else self.memory

    @property
    def servers(self) -> list[Server]:
        addresses = [self.server] if isinstance(self.server, str) else self.server or ()
        return [
            Server(address.rstrip("/").removesuffix("/v1").rstrip("/")) for address in addresses
        ]

    def verify(self) -> None:
        """See `reftune.engines.Engine`. Raises: RecipeError if the engine is colocated and either
        vLLM is not installed or several processes train."""
        if self.servers:
            return
        if world.world_size() > 1:
            raise RecipeError(
                "engine vllm: a colocated engine serves only one training process; expected"
                " engine.server, or engine=kv"
            )
        if importlib.util.find_spec("vllm") is None:
            raise RecipeError(
                "engine vllm: vllm is not installed; run pip install 'reftune[vllm]', or set"
                " engine.server"
            )

    def generate(
        self, policy: Policy, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[Completion]:
        """See `reftune.engines.Engine`. Raises: EngineError if vLLM or a server fails, or if the
        weights cannot be written; the errors of `verify`."""
        if not any(world.any_of(len(prompts) > 0)):
            return []
        sample = self._by_servers if self.servers else self._colocated
        sampled = sample(policy, [list(prompt) for prompt in prompts], params)
        return [policy.completion(tokens, logprobs) for tokens, logprobs in sampled]

    # --- servers ---

    def _by_servers(
        self, policy: Policy, prompts: Sequence[list[int]], params: SamplingParams
    ) -> list[Sampled]:
        """Sample on this process's servers. All processes must call this."""
        adapter = self._hand_over(policy)
        own = own_servers(self.servers)
        jobs = requests(prompts, params, self.batch_size)

        def ask(server: Server, job: slice) -> list[Sampled]:
            body = request(policy, params, params.first_position + job.start)
            return server.complete(prompts[job], {**body, "model": adapter} if adapter else body)

        traffic["requests"] += len(jobs)
        with ThreadPoolExecutor(max(1, min(self.batch_size, len(jobs)))) as pool:
            answers = pool.map(ask, itertools.cycle(own), jobs)
            return [sampled for answer in answers for sampled in answer]

    def _hand_over(self, policy: Policy) -> str | None:
        """Let the main process save the weights once and load them on every server. Returns: the
        name of the adapter to request if LoRA is used; None otherwise.

        Raises: EngineError in all processes if a server fails or the weights cannot be written.
        """
        adapter = None
        with world.together(EngineError):
            if world.is_main():
                before = _served.pop(self.server, None)
                if not policy.is_lora:
                    self._send(policy, save_whole, Server.load)
                else:
                    if not self._have_base(policy, before):
                        self._send(policy, save_base, Server.load)
                    adapter = self._send(policy, save_adapter, Server.load_adapter)
                    _served[self.server] = weakref.ref(policy), adapter
        return world.from_main(lambda: adapter)

    def _have_base(self, policy: Policy, before: _Served | None) -> bool:
        """Whether all servers still have the base model of `policy`. `before` holds the policy
        whose weights the servers loaded last, and the name of that policy's adapter. The result is
        False if `before` is None or holds another policy. In all other cases, this method unloads
        the adapter from every server. If a server has no adapter to unload, it must have been
        restarted and so has lost the base model too; the result is then False."""
        if before is None or before[0]() is not policy:
            return False
        with ThreadPoolExecutor(len(self.servers)) as pool:
            had = pool.map(Server.unload_adapter, self.servers, itertools.repeat(before[1]))
        return all(list(had))

    def _send(
        self,
        policy: Policy,
        save: Callable[[Policy, Path], None],
        load: Callable[[Server, Path], None],
    ) -> str:
        """Call `save` to write the weights to a new folder, and `load` to load them on every
        server. Returns: the folder's name."""
        servers = self.servers
        with self._folder(policy, save) as folder, ThreadPoolExecutor(len(servers)) as pool:
            list(pool.map(load, servers, itertools.repeat(folder)))
        return folder.name

    @contextlib.contextmanager
    def _folder(self, policy: Policy, save: Callable[[Policy, Path], None]) -> Iterator[Path]:
        """A new folder, filled by `save` and deleted when the block ends."""
        shared = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        parent = local_path(self.weights_dir) if self.weights_dir else shared
        with contextlib.ExitStack() as stack:
            try:
                made = tempfile.TemporaryDirectory(prefix="reftune-weights-", dir=parent)
                folder = Path(stack.enter_context(made))
                folder.chmod(0o755)  # another user may run the server
                save(policy, folder)
                make_readable(folder)
            except (OSError, SafetensorError) as error:
                raise EngineError(
                    f"engine vllm: {parent or 'the temporary folder'}: cannot be written: {error};"
                    " engine.weights_dir sets another place"
                ) from None
            # a resumed run sends the base again; counting it would change this step's metrics
            if save is not save_base:
                files = [path for path in folder.rglob("*") if path.is_file()]
                traffic["sync_bytes"] += sum(path.stat().st_size for path in files)
            yield folder

    # --- colocated ---

    def _colocated(
        self, policy: Policy, prompts: Sequence[list[int]], params: SamplingParams
    ) -> list[Sampled]:
        self.verify()
        with self._folder(policy, save_whole) as folder:
            engine = self._started(policy, folder, longest_sequence(policy, params))
            engine.load(folder)
        traffic["requests"] += len(prompts)
        positions = range(params.first_position, params.first_position + len(prompts))
        return engine.sample(prompts, [request(policy, params, position) for position in positions])

    def _started(self, policy: Policy, folder: Path, longest: int | None) -> Colocated:
        """The running engine if it was started with the current settings, the dtype of `policy` and
        the configuration in `folder`, and if it can decode sequences of `longest` tokens.
        Otherwise, any running engine is stopped, and a new one is started, which takes seconds to
        minutes."""
        key = (self, str(policy.compute_dtype), (folder / "config.json").read_text())
        if key not in _running or not _running[key].takes(longest):
            stop_engines()
            _running[key] = Colocated(self, policy, folder, longest)
        return _running[key]


_running: dict[Any, Colocated] = {}
"""Settings, dtype and model configuration → the colocated engine that has them. There is at most
one engine, because each reserves device memory."""


@atexit.register
def stop_engines() -> None:
    """Stop the colocated engine and free its memory."""
    while _running:
        _running.popitem()[1].stop()


class Colocated:
    """vLLM in its own process, which shares no random generator, threads or process group with the
    trainer."""

    def __init__(self, settings: Vllm, policy: Policy, folder: Path, longest: int | None) -> None:
        """`longest` is the maximum length of a sequence in tokens; None leaves it to vLLM."""
        self.longest = longest
        defaults = {
            "VLLM_LOGGING_STREAM": "ext://sys.stderr",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        }
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
        with torch.random.fork_rng([]):
            told = f"did not start with max_model_len {longest} (lengths.max_prompt can lower it)"
            with _engine_errors("cannot be imported"):
                vllm = importlib.import_module("vllm")
            with _engine_errors(told):
                self.settings_of = vllm.SamplingParams
                self.engine: Any = vllm.LLM(
                    model=str(folder),
                    skip_tokenizer_init=True,
                    dtype=str(policy.compute_dtype).removeprefix("torch."),
                    max_model_len=longest,
                    max_num_seqs=settings.batch_size,
                    gpu_memory_utilization=settings.memory,
                    enforce_eager=settings.eager,
                    logprobs_mode="processed_logprobs",
                    generation_config="vllm",
                    use_tqdm_on_load=False,
                    worker_extension_cls="reftune.engines._vllm_worker.Repacking",
                )

    def takes(self, longest: int | None) -> bool:
        """Whether the engine can sample sequences of `longest` tokens."""
        return self.longest is None or (longest is not None and longest <= self.longest)

    def load(self, folder: Path) -> None:
        with _engine_errors("weights were not loaded"):
            self.engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            self.engine.collective_rpc("repack")
            self.engine.reset_prefix_cache()

    def sample(
        self, prompts: Sequence[list[int]], requests: Sequence[dict[str, Any]]
    ) -> list[Sampled]:
        with _engine_errors("sampling failed"):
            outputs = self.engine.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                [self.settings_of(**request, detokenize=False) for request in requests],
                use_tqdm=False,
            )
        found = [output.outputs[0] for output in outputs]
        _require_ended([output.finish_reason for output in found], "vLLM")
        return [_sampled(output) for output in found]

    def stop(self) -> None:
        self.engine.llm_engine.engine_core.shutdown()


@contextlib.contextmanager
def _engine_errors(what: str) -> Iterator[None]:
    """Turn any exception that vLLM raises inside the block into an EngineError, whose message
    contains `what`."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - vLLM may fail on a model or device in any way
        reason = " ".join(str(error).split())[:300]
        raise EngineError(
            f"engine vllm: {what}: {reason}; VLLM_LOGGING_LEVEL=INFO shows more"
        ) from None


@dataclass(frozen=True, slots=True)
class Server:
    """A vLLM server, started as docs/engines.md describes."""

    address: str

    def load(self, folder: Path) -> None:
        """Load the weights in `folder`, and clear the prefix cache of the old weights."""
        arguments = {"weights_path": str(folder)}
        self.post("/collective_rpc", {"method": "reload_weights", "kwargs": arguments})
        self.post("/reset_prefix_cache", {})

    def load_adapter(self, folder: Path) -> None:
        """Load the LoRA adapter in `folder` under the folder's name."""
        body = {"lora_name": folder.name, "lora_path": str(folder)}
        self.post("/v1/load_lora_adapter", body)

    def unload_adapter(self, name: str) -> bool:
        """Unload an adapter, and return whether the server had it."""
        try:
            self.post("/v1/unload_lora_adapter", {"lora_name": name})
        except NotFoundError:
            return False
        return True

    def complete(self, prompts: Sequence[list[int]], body: dict[str, Any]) -> list[Sampled]:
        """One completion per prompt, in the order of the prompts. If the temperature is above 0,
        all prompts must be equal; see `requests`."""
        asked = (
            {"prompt": prompts[0], "n": len(prompts)}
            if body["temperature"] > 0
            else {"prompt": list(prompts)}
        )
        answer = self.post("/v1/completions", {**asked, "return_token_ids": True, **body})
        try:
            choices = sorted(json.loads(answer)["choices"], key=lambda choice: choice["index"])
            found = [
                (list(choice["token_ids"]), list(choice["logprobs"]["token_logprobs"]))
                for choice in choices
            ]
            reasons = [choice["finish_reason"] for choice in choices]
        except (ValueError, LookupError, TypeError):
            raise EngineError(
                f"engine vllm: {self.address} answered {shown(answer.decode(errors='replace'))};"
                " expected choices with token_ids, logprobs and finish_reason, as vLLM returns"
            ) from None
        _require_ended(reasons, self.address)
        if len(found) != len(prompts):
            raise EngineError(
                f"engine vllm: {self.address} returned {counted(len(found), 'completion')} for"
                f" {counted(len(prompts), 'prompt')}"
            )
        return found

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        """The answer to a JSON request. Raises: EngineError if the server does not answer, or
        answers with an error."""
        url = self.address + path
        try:
            query = urllib.request.Request(
                url, json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(query, timeout=TIMEOUT_S) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            reason = " ".join(error.read().decode(errors="replace").split())[:200]
            message = f"engine vllm: {url} answered {error.code}: {reason}"
            if error.code == 404:
                hint = HINTS.get(path, "is it a vLLM server?")
                raise NotFoundError(f"{message}; {hint}") from None
            raise EngineError(message) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise EngineError(
                f"engine vllm: no answer from {url}: {error}; the same command continues from the"
                " last checkpoint"
            ) from None


class NotFoundError(EngineError):
    """The server does not have what was requested."""


HINTS = {
    "/collective_rpc": "expected VLLM_SERVER_DEV_MODE=1 in the server's environment",
    "/v1/load_lora_adapter": (
        "expected VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in the server's environment, and --enable-lora"
    ),
}
"""Path of a request → a hint on how to start a server that supports such requests."""


_Served = tuple[weakref.ref[Policy], str]
"""A LoRA policy whose base model some servers have loaded, and the name of its adapter there. The
adapter gets a new name each time it is sent, because vLLM caches adapters by name."""
_served: dict[Any, _Served] = {}
"""Value of `engine.server` → what these servers have loaded. Only the main process fills this."""


def own_servers(servers: Sequence[Server]) -> list[Server]:
    """The servers that this process uses. This is one server, or possibly several if there are more
    servers than processes."""
    return list(servers[world.rank() % len(servers) :: world.world_size()])


def requests(prompts: Sequence[Any], params: SamplingParams, at_most: int) -> list[slice]:
    """Slices of up to `at_most` consecutive prompts, one slice per request. A greedy request may
    contain any prompts. A request that samples contains only copies of one prompt, and asks vLLM
    for one sample per copy. It has a single seed: vLLM draws the first sample with this seed, the
    second with seed + 1, and so on."""
    starts = [0] if prompts else []
    for position in range(1, len(prompts)):
        is_full = position - starts[-1] == at_most
        is_other = params.temperature > 0 and prompts[position] != prompts[starts[-1]]
        if is_full or is_other:
            starts.append(position)
    return [slice(*pair) for pair in itertools.pairwise([*starts, len(prompts)])]


def longest_sequence(policy: Policy, params: SamplingParams) -> int | None:
    """Maximum length of a prompt with its completion, in tokens; None if it is unknown. vLLM does
    not start if its cache has no room for a sequence of this length."""
    limit = policy.context
    if params.max_prompt_tokens is not None:
        wanted = params.max_prompt_tokens + params.max_new_tokens
        limit = wanted if limit is None else min(wanted, limit)
    return limit


def request(policy: Policy, params: SamplingParams, position: int) -> dict[str, Any]:
    """vLLM's sampling parameters for the prompt at `position`. A model's generation config can
    change vLLM's defaults, so the result includes every parameter that such a config could
    change. Consecutive positions get consecutive seeds, just as vLLM gives consecutive seeds to
    the samples of a prompt."""
    return {
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": derive_seed(params.seed) // 2 + position,
        "logprobs": 0,  # for the sampled token only
        "ignore_eos": True,  # ignores the model's own end tokens; the next line has the policy's
        "stop_token_ids": sorted(policy.eos_ids),
    }


def save_whole(policy: Policy, folder: Path, *, merged: bool = True) -> None:
    """Save the policy in its compute dtype, in a form that `from_pretrained` can load. LoRA
    adapters are merged in fp32 or, if `merged` is False, left out."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    state = plain_state(policy.model, policy.compute_dtype, merged=merged)
    policy.base.save_pretrained(folder, state_dict=state)


def save_base(policy: Policy, folder: Path) -> None:
    """Save the policy without its LoRA adapter."""
    save_whole(policy, folder, merged=False)


@torch.no_grad()
def save_adapter(policy: Policy, folder: Path) -> None:
    """Save the LoRA adapter in PEFT's format and in the compute dtype."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = get_peft_model_state_dict(policy.model, save_embedding_layers=False)
    cast = {
        name: tensor.to("cpu", policy.compute_dtype).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(cast, folder / "adapter_model.safetensors")
    policy.model.active_peft_config.save_pretrained(folder)


def _require_ended(reasons: Sequence[str | None], sampler: str) -> None:
    """Check that every completion has ended, at a stop token or at the length limit. If vLLM is
    interrupted, it returns unfinished completions. Raises: EngineError if a completion is
    unfinished."""
    for reason in reasons:
        if reason not in ("stop", "length"):
            raise EngineError(
                f"engine vllm: {sampler} ended a completion early (finish_reason {reason}), as vLLM"
                " does when it is stopped; run the same command again to continue from the last"
                " checkpoint"
            )


def _sampled(output: Any) -> Sampled:
    tokens = list(output.token_ids)
    return tokens, [
        step[token].logprob for token, step in zip(tokens, output.logprobs, strict=True)
    ]
