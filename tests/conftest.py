"""Tiny models and recipes that the tests of the training core share. Heavy imports wait until a
test needs them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from reftune.model.policy import Policy
    from reftune.recipe import Recipe
    from reftune.stages.rl import Trainer

COMPONENTS = Path(__file__).parent / "components.py"

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama, tied": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "phi3": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {**LLAMA, "original_max_position_embeddings": 64, "sliding_window": None},
    ),
    "mistral, window of 5": ("MistralForCausalLM", "MistralConfig", {**LLAMA, "sliding_window": 5}),
    "qwen2, untied": ("Qwen2ForCausalLM", "Qwen2Config", {**LLAMA, "tie_word_embeddings": False}),
    "qwen2, tied": ("Qwen2ForCausalLM", "Qwen2Config", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3, tied": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**LLAMA, "head_dim": 8, "tie_word_embeddings": True},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "codegen": ("CodeGenForCausalLM", "CodeGenConfig", {**GPT, "rotary_dim": 4}),
    "gptneox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    "opt, narrow embeddings": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
        },
    ),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**LLAMA, "head_dim": 8}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**LLAMA, "logits_scaling": 2.0}),
}


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """The tests kill processes but cut no power, so what they write need not reach the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def build_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Fills a folder once for all workers of pytest-xdist: `build_once(name, fill)` returns the
    folder and calls `fill` with it only if no worker has done so."""
    from filelock import FileLock

    own = tmp_path_factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def build(name: str, fill: Callable[[Path], object]) -> Path:
        folder, is_built = root / name, root / f"{name}.built"
        with FileLock(root / f"{name}.lock"):
            if not is_built.exists():
                shutil.rmtree(folder, ignore_errors=True)  # a worker failed halfway
                folder.mkdir()
                fill(folder)
                is_built.touch()
        return folder

    return build


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Ten digits, twenty words and three special tokens: `<pad>` 0, `<eos>` 1, `<unk>` 2."""
    import torch

    from reftune.model.weights import word_tokenizer

    torch.set_num_threads(1)
    return word_tokenizer(
        [" ".join(f"w{letter}" for letter in "abcdefghijklmnopqrst"), *"0123456789"]
    )


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedModel]:
    """A tiny model of a family without dropout, with random weights large enough for confident
    predictions."""
    import torch
    import transformers

    def make(
        family: str, *, seed: int = 0, sharpness: float = 4.0, **changes: Any
    ) -> PreTrainedModel:
        model_class, config_class, settings = FAMILIES[family]
        special = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
        config = getattr(transformers, config_class)(
            **special, **{"vocab_size": len(tokenizer), **settings, **changes}
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = getattr(transformers, model_class)(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.mul_(sharpness)
        return model

    return make


@pytest.fixture(scope="session")
def make_policy(
    make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Policy]:
    """A policy on a tiny model; its value head is random, so that values differ."""
    from reftune.model.policy import Policy

    def make(
        family: str = "llama", *, seed: int = 0, lora: Any = None, dtype: Any = None, **changes: Any
    ) -> Policy:
        import torch

        model = make_model(family, seed=seed, **changes)
        policy = Policy(model, tokenizer, lora=lora, dtype=dtype or torch.float32)
        policy.reset_value_head(seed)
        return policy.eval()

    return make


@pytest.fixture
def make_recipe(make_recipe_in: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    """`make_recipe_in` for the test's own folder."""
    return partial(make_recipe_in, tmp_path)


@pytest.fixture(scope="session")
def make_recipe_in() -> Callable[..., Recipe]:
    """A recipe that runs in about a second: SFT with a warm-up snapshot, then PPO from it.
    `changes` are recipe overrides; the run is below `folder` unless they name another."""
    import torch

    from reftune.recipe import merge, parse_recipe

    torch.set_num_threads(1)
    optimizer = {"learning_rate": 0.1, "max_grad_norm": 1.0}
    base = {
        "name": "tiny",
        "model": {
            "scratch": {"hidden_size": 16, "layers": 1, "heads": 2, "context": 80, "dropout": 0.1},
            "dtype": "float32",
            "micro_batch_tokens": 16384,
        },
        "dataset": {
            "kind": "word_problems",
            "train": 24,
            "dev": 8,
            "test": 10,
            "operations": [0, 1],
            "people": 2,
            "distractors": 0,
        },
        "format": {"kind": f"{COMPONENTS}:Tossed"},
        "reward": {"kind": f"{COMPONENTS}:ByVerdict"},
        "engine": {"kind": "kv", "batch_size": 20},
        "lengths": {"max_new": 17},
        "evaluate": {"samples": 2, "stages": ["sft", "reft"]},
        "stages": {
            "sft": {
                "kind": "sft",
                "epochs": 2,
                "batch_size": 6,
                "snapshots": {"warmup": 0.75},
                "save_every_s": 0,
                "optimizer": {
                    **optimizer,
                    "schedule": "linear",
                    "warmup": 0.2,
                    "weight_decay": 0.1,
                },
            },
            "reft": {
                "kind": "rl",
                "init": "warmup",
                "steps": 4,
                "prompts": 4,
                "samples": 2,
                "value_prefit": 2,
                "eval_every": 2,
                "save_every_s": 0,
                "optimizer": optimizer,
            },
        },
    }

    def make(folder: Path, **changes: Any) -> Recipe:
        merged = merge({**base, "run_dir": str(folder / "run")}, changes)
        if "stages" in merged["evaluate"]:
            methods = [m for m in merged["evaluate"]["stages"] if m in merged["stages"]]
            merged["evaluate"] = {**merged["evaluate"], "stages": methods}
        return parse_recipe(merged)

    return make


@pytest.fixture
def make_trainer(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Trainer]:
    """The trainer of an RL stage that starts from the base model, before its first step."""
    from reftune.runs.run import open_run
    from reftune.stages.rl import Rl, Trainer
    from reftune.stages.stage import Progress

    def make(stage: dict[str, Any] | None = None, **changes: Any) -> Trainer:
        contexts: list[Any] = []
        recipe = make_recipe(stages={"reft": {"init": "base", **(stage or {})}}, **changes)
        with monkeypatch.context() as patch, open_run(recipe, Progress()) as run:
            patch.setattr(Rl, "run", lambda self, context: contexts.append(context))
            run.train("reft")
        return Trainer(recipe.stages["reft"], contexts[0])

    return make


@pytest.fixture
def trainer(make_trainer: Callable[..., Trainer]) -> Trainer:
    """A trainer with the recipe's own settings."""
    return make_trainer()


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of benchmarks/, which is not part of the package, for the duration of a
    test."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    yield lambda name: import_module(f"benchmarks.{name}")
    for name in [
        name for name in sys.modules if name == "benchmarks" or name.startswith("benchmarks.")
    ]:
        del sys.modules[name]
