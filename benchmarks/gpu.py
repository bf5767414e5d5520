"""Measures a ReFT step on one GPU: how closely it matches the CPU, how fast each phase is and, if
TRL is installed, how fast TRL's GRPO is.

    python -m benchmarks.gpu --folder F [--model FOLDER] [--minutes 9]
    python -m benchmarks.gpu --folder F --device cpu --tiny

The benchmark consists of sections (`SECTIONS`). They run one after the other, each in its own
process, and write F/SECTION.json. If time runs out before all sections are done, call again: a call
skips sections that already have a file. FOLDER contains SmolLM2-135M or another causal LM in
Hugging Face format. Without --model, the model has random weights, and as many layers as
SmolLM2-135M, of the same width; with --tiny, it is much smaller. Nothing is downloaded. The last
line of the output is one JSON document.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from benchmarks.step import ROOT, UPDATES, forward_flops, prompt_texts, recipe, step_seconds
from benchmarks.workload import Workload, make_workload, write_workload
from torch import Tensor
from transformers import StaticCache

from reftune.algorithms.base import masked_mean
from reftune.engines.kv import Kv
from reftune.model.batch import TokenBatch, token_batch
from reftune.model.encoder import StopRule
from reftune.model.policy import Policy
from reftune.model.weights import load_model, make_scratch
from reftune.recipe import ModelTable, ScratchTable
from reftune.types import SamplingParams

BOUNDS = {
    "float32": {"logprobs_max": 1e-3, "loss": 1e-4, "gradient": 1e-3, "sampling_mean": 1e-4},
    "bfloat16": {"logprobs_mean": 0.05, "loss": 0.05, "gradient": 0.1, "sampling_mean": 0.05},
}
"""Dtype → largest accepted differences. `sampling_mean` compares log-probabilities from sampling
with recomputed ones; the others compare with fp32 on the CPU. All are in nats, except `gradient`,
which is a share of the gradient's norm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """The model, device and amount of work to measure."""

    folder: str
    model: str
    device: str
    samples: int
    repeats: int
    rows: int
    """Rows decoded at once when ways to decode are compared."""
    new_tokens: int
    matrix: int
    """Rows of the square matrices that are multiplied to measure the machine's peak FLOP/s."""
    micro_batch_tokens: int


FULL = {
    "samples": 128,
    "repeats": 5,
    "rows": 128,
    "new_tokens": 128,
    "matrix": 8192,
    "micro_batch_tokens": 32768,
}
TINY = {
    "samples": 4,
    "repeats": 1,
    "rows": 4,
    "new_tokens": 8,
    "matrix": 256,
    "micro_batch_tokens": 1024,
}
SCRATCH = {
    False: ScratchTable(hidden_size=576, layers=30, heads=9, context=512, dropout=0.0),
    True: ScratchTable(hidden_size=32, layers=2, heads=2, context=512, dropout=0.0),
}
"""Whether the setting is tiny → the model with random weights. The larger model has as many layers
as SmolLM2-135M, of the same width, but its vocabulary contains only the words of the prompts."""


def scratch_model(folder: Path, *, tiny: bool) -> Path:
    """Save a model with random weights in Hugging Face format, unless `folder` already has a
    model. Returns `folder`."""
    if not (folder / "config.json").is_file():
        model, tokenizer = make_scratch(SCRATCH[tiny], prompt_texts(200), seed=0)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], device: str, *, repeats: int = 5) -> float:
    """Median seconds of `repeats` calls, which follow a first call that does not count."""
    taken = []
    for _ in range(repeats + 1):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


# --- sections -------------------------------------------------------------------------------------


def machine(setting: Setting) -> dict[str, Any]:
    """The machine's limits: FLOP/s of bf16 matmuls, and bytes per second that a copy reads and
    writes."""
    size, device = setting.matrix, setting.device
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(size * size // 4, 16, device=device)
    target = torch.empty_like(source)
    return {
        "name": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "matmul_flops": 2 * size**3 / seconds(lambda: a @ b, device),
        "bytes_s": 2 * source.nbytes / seconds(lambda: target.copy_(source), device),
    }


def correctness(setting: Setting, dtype: str) -> dict[str, Any]:
    """Compare log-probabilities, loss and gradient with their values in fp32 on the CPU. Also
    compare the log-probabilities recorded during sampling with recomputed log-probabilities."""
    expected = scores_of(load_policy(setting, "cpu", "float32"), "cpu")
    policy = load_policy(setting, setting.device, dtype)
    found = scores_of(policy, setting.device)
    difference = (found["logprobs"] - expected["logprobs"]).abs()
    sampling = sampling_difference(policy, setting)
    errors = {
        "logprobs_max": float(difference.max()),
        "logprobs_mean": float(difference.mean()),
        "loss": abs(found["loss"] - expected["loss"]),
        "gradient": float(
            (found["gradient"] - expected["gradient"]).norm() / expected["gradient"].norm()
        ),
        "sampling_max": float(sampling.max()),
        "sampling_mean": float(sampling.mean()),
    }
    bounds = BOUNDS[dtype]
    return {
        **errors,
        "bounds": bounds,
        "ok": all(errors[name] <= bound for name, bound in bounds.items()),
    }


def load_policy(setting: Setting, device: str, dtype: str) -> Policy:
    model, tokenizer = load_model(ModelTable(path=setting.model))
    policy = Policy(model, tokenizer, dtype=getattr(torch, dtype))
    policy.reset_value_head(0)
    return policy.to(device).eval()


def some_batch(policy: Policy, device: str) -> TokenBatch:
    encoded = [
        policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompt_texts(4)
    ]
    return token_batch(
        [ids[: len(ids) // 2] for ids in encoded],
        [ids[len(ids) // 2 :] for ids in encoded],
        device=device,
    )


def scores_of(policy: Policy, device: str) -> dict[str, Any]:
    batch = some_batch(policy, device)
    scores = policy(batch)
    loss = masked_mean(0.1 * scores.values - scores.logprobs, batch.response_mask)
    loss.backward()
    gradient = torch.cat(
        [p.grad.flatten().double().cpu() for p in policy.parameters() if p.grad is not None]
    )
    return {
        "logprobs": scores.logprobs[batch.response_mask].detach().cpu(),
        "loss": float(loss.detach()),
        "gradient": gradient,
    }


def sampling_difference(policy: Policy, setting: Setting) -> Tensor:
    asked = [
        policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompt_texts(4)
    ]
    completions = Kv(kind="kv").generate(
        policy, asked, SamplingParams(max_new_tokens=setting.new_tokens, seed=0)
    )
    batch = token_batch(
        asked, [completion.token_ids for completion in completions], device=setting.device
    )
    policy.max_tokens = setting.micro_batch_tokens
    scored = policy.score(batch).logprobs[batch.response_mask].cpu()
    return (
        scored
        - torch.tensor([logprob for completion in completions for logprob in completion.logprobs])
    ).abs()


def step_reftune(setting: Setting, *, compiled: bool = False) -> dict[str, Any]:
    """Time a whole step of `reftune rl` in bf16, by phase."""
    workload, path = the_workload(setting)
    folder = Path(setting.folder) / ("run_compiled" if compiled else "run")
    described = recipe(
        path, setting.samples, setting.repeats + 2, folder, dtype="bfloat16", recompute=False
    )
    described["model"] |= {
        "path": setting.model,
        "device": setting.device,
        "micro_batch_tokens": setting.micro_batch_tokens,
        "compile": compiled,
    }
    described["engine"]["batch_size"] = setting.samples
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(described), encoding="utf-8")
    peak = run_watched(
        [sys.executable, "-m", "reftune", "rl", str(file), "--quiet"], setting.device
    )
    steps = step_seconds(folder)[-setting.repeats :]
    medians = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    return {**medians, **work_of(setting, workload, medians), "peak_bytes": peak}


def work_of(setting: Setting, workload: Workload, medians: dict[str, float]) -> dict[str, float]:
    """Tokens per second and FLOP/s by phase."""
    model, tokenizer = load_model(ModelTable(path=setting.model))
    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().get_parameter("weight")
    ends = {id(p): p.numel() for p in (head, embedding)}
    trunk = sum(p.numel() for p in model.parameters()) - sum(ends.values())
    asked = [
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in workload.prompts
    ]
    answered = workload.lengths
    tokens = sum(asked) + sum(answered)
    forward = forward_flops(
        trunk, head.numel(), model.config.num_hidden_layers, head.shape[1], answered, asked
    )
    return {
        "sampled_tokens_s": sum(answered) / medians["generate_s"],
        "scored_tokens_s": 2 * tokens / medians["score_s"],
        "updated_tokens_s": UPDATES * tokens / medians["update_s"],
        "score_flops": 2 * forward / medians["score_s"],
        "update_flops": UPDATES * 3 * forward / medians["update_s"],
    }


def step_plain(setting: Setting) -> dict[str, Any]:
    """Time benchmarks/step_plain.py in bf16."""
    _, path = the_workload(setting)
    command = [
        sys.executable,
        "-m",
        "benchmarks.step_plain",
        str(path),
        "bfloat16",
        str(setting.repeats),
    ]
    return contestant(command, setting)


def step_trl(setting: Setting) -> dict[str, Any]:
    """Time TRL's GRPO on the same work."""
    if importlib.util.find_spec("trl") is None:
        return {"missing": "trl is not installed"}
    _, path = the_workload(setting)
    return contestant(
        [sys.executable, "-m", "benchmarks.step_trl", str(path), str(setting.repeats)], setting
    )


def contestant(command: list[str], setting: Setting) -> dict[str, Any]:
    output = Path(setting.folder) / "contestant.txt"
    with output.open("w", encoding="utf-8") as file:
        peak = run_watched(command, setting.device, stdout=file)
    steps = json.loads(output.read_text(encoding="utf-8").strip().splitlines()[-1])["steps"]
    return {
        **{name: statistics.median(step[name] for step in steps) for name in steps[0]},
        "peak_bytes": peak,
    }


def the_workload(setting: Setting) -> tuple[Workload, Path]:
    workload = make_workload(Path(setting.model), prompt_texts(setting.samples), setting.samples)
    workload = replace(workload, device=setting.device)
    path = Path(setting.folder) / "workload.json"
    write_workload(workload, path)
    return workload, path


def run_watched(command: list[str], device: str, stdout: Any = subprocess.DEVNULL) -> int:
    """Run a command and return its peak bytes of GPU memory or, on a CPU, of resident memory.
    Raises: CalledProcessError."""
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=stdout) as process:
        with gpu_peak(device) as peak:
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak[0] if device == "cuda" else usage.ru_maxrss * 1024


def environment() -> dict[str, str]:
    """Environment variables for a process that imports this folder and must download nothing."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


@contextmanager
def gpu_peak(device: str) -> Iterator[list[int]]:
    """Yields a list of one number: the largest number of GPU bytes that other processes use while
    the block runs. Their memory is measured 50 times a second."""
    most, over = [0], threading.Event()

    def watch() -> None:
        before = torch.cuda.mem_get_info()[0]
        while not over.wait(0.02):
            most[0] = max(most[0], before - torch.cuda.mem_get_info()[0])

    watcher = threading.Thread(target=watch if device == "cuda" else over.wait, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()


# --- ways to decode -------------------------------------------------------------------------------


def decoding(setting: Setting, way: str) -> dict[str, Any]:
    """Seconds, and tokens per second, of greedy decoding for rows of equal length. If `way` is
    `kv`, reftune's engine decodes. If not, a `FixedDecoder` does: `compile` compiles its step,
    `graph` records the step as a CUDA graph, and `fixed` does neither."""
    if way == "graph" and setting.device != "cuda":
        return {"missing": "CUDA graphs need a GPU"}
    policy = load_policy(setting, setting.device, "bfloat16")
    asked = rows_of_one_length(policy, setting.rows)
    if way == "kv":
        engine = Kv(kind="kv", batch_size=setting.rows)
        params = SamplingParams(max_new_tokens=setting.new_tokens, temperature=0)
        policy.stop = StopRule(ids=frozenset())  # so that all rows are equally long
        taken = seconds(lambda: engine.generate(policy, asked, params), setting.device, repeats=2)
    else:
        decoder = FixedDecoder(
            policy, torch.tensor(asked, device=setting.device), setting.new_tokens, way
        )
        taken = seconds(decoder.decode, setting.device, repeats=2)
    return {"seconds": taken, "tokens_s": setting.rows * setting.new_tokens / taken}


def rows_of_one_length(policy: Policy, rows: int) -> list[list[int]]:
    encoded = [
        policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompt_texts(rows)
    ]
    length = min(map(len, encoded))
    return [ids[:length] for ids in encoded]


class FixedDecoder:
    """Greedy decoding with bf16 weights and a cache of fixed size, so that every token needs
    the same work in the same memory."""

    def __init__(self, policy: Policy, prompt: Tensor, new_tokens: int, way: str) -> None:
        self.model: Any = copy.deepcopy(policy.model).to(torch.bfloat16).eval()
        self.prompt, self.new_tokens = prompt, new_tokens
        self.cache = StaticCache(
            config=self.model.config, max_cache_len=prompt.shape[1] + new_tokens
        )
        self.tokens = torch.zeros(len(prompt), 1, dtype=torch.long, device=prompt.device)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=prompt.device)
        self.step: Callable[[], None] = self.next
        if way == "compile":
            self.step = torch.compile(self.next)
        if way == "graph":
            self.capture()

    @torch.no_grad()
    def next(self) -> None:
        """Read one token per row, and write the likeliest next token in its place."""
        output = self.model(
            input_ids=self.tokens,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.tokens.copy_(output.logits[:, -1].argmax(-1, keepdim=True))
        self.position.add_(1)

    @torch.no_grad()
    def start(self) -> None:
        self.cache.reset()
        output = self.model(
            input_ids=self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        self.tokens.copy_(output.logits[:, -1].argmax(-1, keepdim=True))
        self.position.fill_(self.prompt.shape[1])

    def capture(self) -> None:
        self.start()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.next()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.next()
        self.step = graph.replay

    def decode(self) -> Tensor:
        """The new tokens, (rows, tokens)."""
        self.start()
        drawn = [self.tokens.clone()]
        for _ in range(self.new_tokens - 1):
            self.step()
            drawn.append(self.tokens.clone())
        return torch.cat(drawn, 1)


# --- all of it ------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "machine": machine,
    "correctness_float32": lambda setting: correctness(setting, "float32"),
    "correctness_bfloat16": lambda setting: correctness(setting, "bfloat16"),
    "step_reftune": step_reftune,
    "step_trl": step_trl,
    "step_compiled": lambda setting: step_reftune(setting, compiled=True),
    "decode_kv": lambda setting: decoding(setting, "kv"),
    "decode_fixed": lambda setting: decoding(setting, "fixed"),
    "decode_graph": lambda setting: decoding(setting, "graph"),
    "step_plain": step_plain,
    "decode_compile": lambda setting: decoding(setting, "compile"),
}
"""The sections. The most valuable come first, in case the time runs out."""
UNFINISHED = {"missing": "time ran out"}


def run_section(name: str, setting: Setting, left_s: float) -> dict[str, Any]:
    """Run a section in its own process, so that an error, such as a lack of GPU memory, affects no
    other section. Returns: its results, or `UNFINISHED` if they take more than `left_s` seconds."""
    path = Path(setting.folder) / f"{name}.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--section",
        name,
        "--setting",
        json.dumps(asdict(setting)),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        process.wait(left_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return UNFINISHED
    found: dict[str, Any] = (
        json.loads(path.read_text(encoding="utf-8"))
        if path.is_file()
        else {"error": "its process died"}
    )
    return found


def write_section(name: str, setting: Setting) -> None:
    try:
        found = SECTIONS[name](setting)
    except Exception:  # noqa: BLE001 - an error on a GPU is a result too
        found = {"error": traceback.format_exc()[-2000:]}
    (Path(setting.folder) / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")


def document(results: dict[str, dict[str, Any]], setting: Setting) -> dict[str, Any]:
    """The results of all sections, and the figures that compare them."""
    ours, peak = results.get("step_reftune", {}), results.get("machine", {}).get("matmul_flops")
    figures: dict[str, Any] = {}
    for key, name in (("ratio_to_trl", "step_trl"), ("ratio_to_plain_bf16", "step_plain")):
        if "step_s" in results.get(name, {}) and "step_s" in ours:
            figures[key] = results[name]["step_s"] / ours["step_s"]
    if "step_s" in results.get("step_compiled", {}) and "step_s" in ours:
        figures["compile_speedup"] = ours["step_s"] / results["step_compiled"]["step_s"]
    if peak and "update_flops" in ours:
        figures |= {
            "update_mfu": ours["update_flops"] / peak,
            "score_mfu": ours["score_flops"] / peak,
        }
        figures["peak_bytes"] = ours["peak_bytes"]
    for way in ("graph", "compile"):
        before, after = (results.get(f"decode_{w}", {}).get("tokens_s") for w in ("fixed", way))
        if before and after:
            figures[f"decode_{way}_speedup"] = after / before
    correct = [results[name].get("ok", False) for name in results if name.startswith("correctness")]
    unfinished = [
        name
        for name in SECTIONS
        if results.get(name, UNFINISHED).get("missing") == UNFINISHED["missing"]
    ]
    return {
        "correct": bool(correct) and all(correct),
        **figures,
        "unfinished": unfinished,
        "setting": asdict(setting),
        **results,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="folder for the results")
    parser.add_argument(
        "--model", type=Path, help="folder of a causal LM; default: one with random weights"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="run a small version of every section")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        metavar="SECTION",
        help=", ".join(SECTIONS),
    )
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--setting", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.section:
        write_section(asked.section, Setting(**asked.setting))
        return
    if asked.folder is None:
        parser.error("--folder: expected a folder for the results")
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU; expected --device cpu here")
    end = time.monotonic() + 60 * asked.minutes
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = (
        asked.model.resolve() if asked.model else scratch_model(folder / "model", tiny=asked.tiny)
    )
    setting = Setting(
        folder=str(folder), model=str(model), device=asked.device, **(TINY if asked.tiny else FULL)
    )
    results = {}
    for name in asked.only:
        path = folder / f"{name}.json"
        if path.is_file():
            results[name] = json.loads(path.read_text(encoding="utf-8"))
        elif (left := end - time.monotonic()) > 0:
            results[name] = run_section(name, setting, left)
            print(f"{name}: {json.dumps(results[name])[:300]}", file=sys.stderr, flush=True)
    print(json.dumps(document(results, setting)))


if __name__ == "__main__":
    main()
