"""The model being trained: a causal LM with a value head. It computes log-probabilities and values
of response tokens, and creates the frozen reference."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reftune.errors import ModelError
from reftune.model import layers
from reftune.model.batch import PackedTokens, TokenBatch, own_micro_batches
from reftune.model.encoder import decode, stop_rule
from reftune.model.logprobs import logprobs_and_entropy, token_logprobs
from reftune.model.speed import attention, llama
from reftune.processes import sharding, world
from reftune.processes.sharding import transformer_blocks
from reftune.recipe import LoraTable
from reftune.text import brief, did_you_mean
from reftune.types import Completion

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

VALUE_HEAD = Path("value_head", "model.safetensors")
"""Path of the value head's file in a model's folder. It is in a subfolder because vLLM would load
any safetensors file next to the weights."""
ADAPTERS = Path("adapters", "model.safetensors")
"""Path of the adapters' file in the merged model's folder. With a 4-bit base, a later stage
continues training these adapters, because quantizing the merged model would round away what they
have learned."""

PEFT_ADAPTERS = "adapter_model.safetensors"
"""Name of the adapters' file in PEFT's format; see `peft_name`."""


class TokenScores(NamedTuple):
    """The policy's log-probabilities, values and entropies for the response tokens of a batch. Each
    tensor is (B, R), in fp32, and 0 outside the responses. This class is a tuple because older
    versions of FSDP2 do not find tensors in dataclasses."""

    logprobs: Tensor
    values: Tensor
    entropy: Tensor | None = None


class Policy(nn.Module):
    """A causal LM with a value head on its last hidden state."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: torch.dtype = torch.float32,
        lora: LoraTable | None = None,
        stop: Sequence[str] = (),
        quantize: Literal["nf4"] | None = None,
        trained: bool = True,
    ) -> None:
        """`dtype` is the dtype of forward passes and of frozen matrices. With `lora`, the base is
        frozen. Without `lora`, the whole model is frozen if `trained` is False. With `quantize`,
        the matrices of linear layers except the output head are kept in 4 bits. `stop` lists
        strings that end a completion, in addition to the end tokens that `stop_rule` finds."""
        super().__init__()
        self.stop = stop_rule(model, tokenizer, stop)
        if quantize is not None:
            layers.quantize(model, dtype)
        self.model: Any = _with_lora(model, lora) if lora is not None else model
        if lora is not None:
            layers.narrow(self.model, dtype, embeddings="all")
        elif not trained:
            layers.narrow(self.model.requires_grad_(False), dtype, embeddings="exact")
        self.tokenizer = tokenizer
        self.compute_dtype = dtype
        self.saved_dtype = torch.float32
        """Dtype to which `save` rounds the weights."""
        layers.use_cheap_dropout(model)
        attention.attend_our_way(model)
        self.packs = attention.takes_packing(model)
        """Whether the model can read whole sequences without padding between them."""
        self.max_tokens = 16384
        """Maximum number of tokens in one pass; see `model.micro_batch_tokens`."""
        self.is_written_out = dtype == torch.float32 and llama.is_written_out(self.model)
        """Whether `speed.llama` rather than transformers may process whole sequences."""
        self.is_lora = lora is not None
        self.value_head = nn.Linear(model.get_output_embeddings().weight.shape[1], 1)
        """The head starts at zero, so that the first values are not random. `reset_value_head`
        draws weights from PyTorch's default distribution, as ReFT's code does."""
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.value_backbone: nn.Module | None = None
        """The value head's own transformer; None if the head uses the policy's transformer."""
        self.is_compiled = self.recomputes = False
        self.continues_adapters = False
        """Whether the adapters had already been trained when they were loaded. If so, the policy
        without adapters is not the initial policy."""

    @property
    def device(self) -> torch.device:
        return self.value_head.weight.device

    @property
    def eos_ids(self) -> frozenset[int]:
        """The ids of the tokens that end a completion."""
        return self.stop.ids

    @property
    def context(self) -> int | None:
        """Maximum length of a sequence, in tokens; None if the config does not state it. With RoPE
        of type `longrope`, this is the maximum before the context was extended, because a single
        longer sequence would change the position embeddings of its whole batch."""
        rope = getattr(self.model.config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            return int(rope["original_max_position_embeddings"])
        return getattr(self.model.config, "max_position_embeddings", None)

    def require_known(self, sequences: Iterable[Sequence[int]]) -> None:
        """Check that the model has an embedding for every token of `sequences`. Raises: ModelError
        if a token has no embedding."""
        size = self.base.get_input_embeddings().weight.shape[0]
        largest = max(map(max, sequences))
        if largest >= size:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise ModelError(
                f"the tokenizer's token {token} has the id {largest}, but the model has only"
                f" {size} embeddings; expected the model's own tokenizer or, for added tokens,"
                " resized embeddings"
            )

    def decode(self, token_ids: Sequence[int]) -> str:
        return decode(self.tokenizer, token_ids)

    def completion(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        values: Sequence[float] = (),
        entropies: Sequence[float] = (),
    ) -> Completion:
        """The completion that `token_ids` and their scores form, cut off at the end that the
        policy's `StopRule` finds."""
        end = self.stop.length(token_ids, self.decode)
        tokens = tuple(token_ids[:end])
        is_ended = bool(tokens) and tokens[-1] in self.stop.ids
        text = self.decode(tokens[:-1] if is_ended else tokens)
        cut = self.stop.text_end(text)
        return Completion(
            token_ids=tokens,
            text=text[:cut],
            logprobs=tuple(logprobs[:end]),
            values=tuple(values[:end]),
            entropies=tuple(entropies[:end]),
            finish_reason="stop" if cut is not None else "length" if end is None else "eos",
        )

    def reset_value_head(self, seed: int) -> None:
        """Draw the value head's weight and bias uniformly from [-1/√H, 1/√H], as `nn.Linear` and
        TRL's value head do."""
        bound = self.value_head.in_features**-0.5
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in (self.value_head.weight, self.value_head.bias):
                drawn = torch.empty(parameter.shape, device="cpu")
                parameter.copy_(drawn.uniform_(-bound, bound, generator=draw))

    def separate_value_model(self) -> None:
        """Give the value head its own copy of the policy's transformer. `save` omits the copy.
        Raises: ModelError if the policy uses LoRA."""
        if self.is_lora:
            raise ModelError(
                "value_model: separate: the value model is trained in full; expected a recipe"
                " without model.lora"
            )
        self.value_backbone = copy.deepcopy(self.base.base_model)
        if self.is_compiled:
            self.compile_blocks()

    def recompute_blocks(self) -> None:
        """Apply `layers.recompute` to every transformer block."""
        self.recomputes = True
        for block in transformer_blocks(self):
            layers.recompute(block)

    def compile_blocks(self) -> None:
        """Compile the transformer blocks. This fuses their small operations. Decoding with a cache
        does not use the compiled blocks. If a compiled block is copied, the copy runs uncompiled.
        Raises: ModelError if there is no C++ compiler."""
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise ModelError(
                f"model.compile: needs a C++ compiler, and {compiler} was not found; install one"
                " or set CXX"
            )
        self.is_compiled = True
        for block in transformer_blocks(self):
            block.compile(dynamic=True)

    def arithmetic(self) -> contextlib.AbstractContextManager[None]:
        """Inside the `with` block, run forward passes in the compute dtype. The weights keep their
        own dtype."""
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Inside the `with` block, run forward passes without dropout, in the compute dtype and
        with unsharded weights. At the end, training mode is restored if it was on."""
        training = self.training
        with sharding.current.whole(self, self.compute_dtype), self.arithmetic():
            self.eval()
            try:
                yield
            finally:
                self.train(training)

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """Like `inference`, but without compilation, because decoding with a cache would compile
        every block separately."""
        with self.inference(), torch.compiler.set_stance("force_eager"):
            yield

    def hidden_states(self, batch: TokenBatch, backbone: Any = None) -> Tensor:
        """(N, H) The final hidden states that predict the response tokens, in row-major order.
        `backbone` computes them; by default, it is the policy's own transformer."""
        backbone = self.base.base_model if backbone is None else backbone
        if self.packs:
            full = batch if self.compute_dtype == torch.float32 else batch.filled_up()
            return self.read(backbone, full.packed())
        states: Tensor = backbone(input_ids=batch.tokens, use_cache=False).last_hidden_state
        return states[batch.predictor_index()]

    def read(self, backbone: Any, packed: PackedTokens) -> Tensor:
        """(N, H) The `hidden_states` of a packed batch."""
        # compiled and split modules rely on hooks of their forward methods
        as_modules = self.is_compiled or sharding.current.is_split(self)
        if self.is_written_out and not as_modules:
            states = llama.read_packed(backbone, packed, recompute=self.recomputes)
        else:
            states = attention.read_packed(backbone, packed)
        return states[packed.predictors]

    @property
    def base(self) -> Any:
        """The causal LM itself, without PEFT's wrapper."""
        return self.model.get_base_model() if self.is_lora else self.model

    def forward(self, batch: TokenBatch, *, temperature: float = 1.0) -> TokenScores:
        """Log-probabilities and values of the response tokens. If gradients are off, entropies are
        computed too."""
        with self.arithmetic():
            hidden = self.hidden_states(batch)
            head, tokens = self.base.get_output_embeddings(), batch.response_tokens()
            entropy = None
            if torch.is_grad_enabled():
                logprobs = token_logprobs(head, hidden, tokens, temperature)
            else:
                logprobs, entropy = logprobs_and_entropy(head, hidden, tokens, temperature)
            if self.value_backbone is not None:
                hidden = self.hidden_states(batch, self.value_backbone)
            values = self.values(hidden)
        return TokenScores(
            logprobs=batch.unflatten(logprobs),
            values=batch.unflatten(values),
            entropy=None if entropy is None else batch.unflatten(entropy),
        )

    def values(self, hidden: Tensor) -> Tensor:
        """(N,) Values of hidden states (N, H), computed in fp32 even under autocast."""
        with torch.autocast(self.device.type, enabled=False):
            result: Tensor = self.value_head(hidden.float()).squeeze(-1)
        return result

    @torch.no_grad()
    def score(self, batch: TokenBatch, *, temperature: float = 1.0) -> TokenScores:
        """Log-probabilities, values and entropies, without gradients or dropout. Each process
        scores a part of the rows, and every process gets all scores."""
        shape = batch.response_mask.shape
        found = [torch.zeros(shape, device=self.device) for _ in TokenScores._fields]
        with self.inference():
            for index in self._micro_batches(batch):
                scores = self.forward(batch.rows(index), temperature=temperature)
                for whole, values in zip(found, scores, strict=True):
                    assert values is not None
                    whole[index, : values.shape[1]] = values
        world.add_up(*found)  # the rows of other processes are 0
        return TokenScores(*found)

    def _micro_batches(self, batch: TokenBatch) -> list[Tensor]:
        parts = own_micro_batches(batch, max_tokens=self.max_tokens, packed=self.packs)
        return [index for index, counts in parts if counts]

    @torch.no_grad()
    def features(self, batch: TokenBatch) -> Tensor:
        """(N, H) The inputs of the value head for the response tokens, in row-major order. They are
        computed without dropout and returned in fp32."""
        row_of, _ = batch.response_index()
        features = torch.zeros(len(row_of), self.value_head.in_features, device=self.device)
        with self.inference():
            for index in self._micro_batches(batch):
                found = self.hidden_states(batch.rows(index), self.value_backbone)
                places = torch.cat([(row_of == row).nonzero().squeeze(1) for row in index])
                features[places] = found.float()
        world.add_up(features)
        return features

    def verify_head(self) -> None:
        """Check that the model's logits are just its last hidden state times its output embedding.
        Raises: ModelError if they are not, for example because the model caps or scales them."""
        tokens = torch.arange(8, device=self.device).unsqueeze(0) % self.model.config.vocab_size
        training = self.training
        self.eval()
        with torch.no_grad(), self.arithmetic():
            expected = self.model(input_ids=tokens, use_cache=False).logits
            found = self.base.get_output_embeddings()(
                self.base.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            )
        self.train(training)
        if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
            raise ModelError(
                f"{type(self.model).__name__}: its logits are not its output embedding × last"
                " hidden state; such models are not supported"
            )

    def make_reference(self) -> Policy | AdapterReference:
        """A frozen copy of the current policy, called the reference. Without LoRA, its matrices are
        in the compute dtype, except embeddings that this dtype does not represent exactly. With
        LoRA, the reference shares the policy's base and has a copy of the adapters. If the adapters
        are new and therefore have no effect yet, the reference has no adapters."""
        if self.is_lora:
            own = {name: p.detach().clone() for name, p in self._adapters().items()}
            return AdapterReference(self, own if self.continues_adapters else None)
        matrices = layers.narrowable(self.model, self.compute_dtype, embeddings="exact")
        memo: dict[int, Any] = {
            key: nn.Parameter(p.detach().to(self.compute_dtype, copy=True), requires_grad=False)
            for key, p in matrices.items()
        }
        if self.value_backbone is not None:
            memo[id(self.value_backbone)] = None
        copied = copy.deepcopy(self, memo).eval().requires_grad_(False)
        layers.narrow(copied.model, self.compute_dtype, embeddings="exact")
        if self.is_compiled:
            copied.compile_blocks()
        sharding.current.distribute(copied)
        return copied

    def _adapters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if "lora_" in name}

    @contextlib.contextmanager
    def with_adapters(self, adapters: dict[str, Tensor] | None) -> Iterator[None]:
        """Inside the `with` block, use `adapters` in place of the policy's own adapters. If
        `adapters` is None, use no adapters."""
        if adapters is None:
            with self.model.disable_adapter():
                yield
            return
        own = [(name, p, p.data) for name, p in self._adapters().items()]
        try:
            for name, parameter, _ in own:
                parameter.data = adapters[name]
            yield
        finally:
            for _, parameter, data in own:
                parameter.data = data

    def save(self, folder: Path) -> None:
        """Write the model and the tokenizer so that plain `from_pretrained` can load them. LoRA is
        merged into the model. The model's config and generation config list the end tokens. The
        adapters are written too, and so is the value head unless the value model is separate."""
        from transformers.utils import logging

        logging.disable_progress_bar()  # the run shows its own progress bar
        with sharding.current.whole(self):
            if not world.is_main():
                return
            folder.mkdir(parents=True, exist_ok=True)
            model, state = self.base, layers.plain_state(self.model, self.saved_dtype)
            own, model.generation_config = model.generation_config, self._generation_config()
            model.save_pretrained(folder, state_dict=state)
            config = copy.deepcopy(model.config)
            config.dtype = self.saved_dtype
            config.eos_token_id = model.generation_config.eos_token_id
            config.save_pretrained(folder)
            model.generation_config = own
            if self.is_lora:
                _save_apart(self._adapters(), folder / ADAPTERS)
            self.tokenizer.save_pretrained(folder)
            if self.value_backbone is None:  # a separate value model's head does not fit the policy
                head = dict(self.value_head.named_parameters("value_head"))
                _save_apart(head, folder / VALUE_HEAD)

    def _generation_config(self) -> GenerationConfig:
        """A greedy generation config that lists all end tokens, beginning with the tokenizer's
        eos."""
        from transformers import GenerationConfig

        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        ends = sorted(self.stop.ids, key=lambda id_: (id_ != eos, id_))
        return GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=ends if len(ends) != 1 else ends[0],
            pad_token_id=ends[0] if pad is None else pad,
            do_sample=False,
        )

    def load_adapters(self, folder: Path) -> None:
        """Load the adapters that `save` or PEFT wrote, for further training. Raises: ModelError if
        they are missing or do not fit."""
        path = folder / ADAPTERS if (folder / ADAPTERS).is_file() else folder / PEFT_ADAPTERS
        try:
            saved = {peft_name(name): tensor for name, tensor in load_file(path).items()}
            own = {peft_name(name): parameter for name, parameter in self._adapters().items()}
            strange = sorted(saved.keys() ^ own.keys())
            if strange:
                raise KeyError(f"{strange[0]} is in the file or in the model, but not in both")
            with torch.no_grad():
                for name, parameter in own.items():
                    if saved[name].shape != parameter.shape:
                        sizes = f"{tuple(saved[name].shape)}, expected {tuple(parameter.shape)}"
                        raise ValueError(f"{name} has the size {sizes}")
                    parameter.copy_(saved[name])
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise ModelError(f"{path}: not the adapters of this recipe: {error}") from None
        self.continues_adapters = True

    def load_value_head(self, folder: Path) -> None:
        """Load the value head that `save` wrote. If there is none, keep the current value head."""
        if (folder / VALUE_HEAD).is_file():
            tensors = load_file(folder / VALUE_HEAD)
            self.value_head.load_state_dict(
                {name.removeprefix("value_head."): value for name, value in tensors.items()}
            )


class AdapterReference:
    """An earlier state of a policy that uses LoRA. It shares the policy's base, and has either a
    copy of the earlier adapters or no adapters."""

    def __init__(self, policy: Policy, adapters: dict[str, Tensor] | None) -> None:
        self._policy, self._adapters = policy, adapters

    def score(self, batch: TokenBatch, *, temperature: float = 1.0) -> TokenScores:
        """The scores of the earlier policy; see `Policy.score`."""
        whole = sharding.current.whole(self._policy, self._policy.compute_dtype)
        with whole, self._policy.with_adapters(self._adapters):
            return self._policy.score(batch, temperature=temperature)


def peft_name(name: str) -> str:
    """The name that an adapter's tensor has in PEFT's files, which leave out the adapter's own
    name, `default`."""
    return name.replace(".default.", ".").removesuffix(".default")


def _save_apart(tensors: Mapping[str, Tensor], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file({name: p.detach().cpu().contiguous() for name, p in tensors.items()}, path)


def _require_modules(model: PreTrainedModel, targets: str | Sequence[str]) -> None:
    """Check that each name in a list of targets matches a module. PEFT only checks that at least
    one name matches. Raises: ModelError if a name matches no module."""
    names = {f".{name}" for name, _ in model.named_modules()}
    for target in targets if not isinstance(targets, str) else ():
        if not any(name.endswith(f".{target}") for name in names):
            linear = {name.rpartition(".")[2] for name in names}
            hint = did_you_mean(target, linear) or "expected the name of a linear layer"
            raise ModelError(f"model.lora.target_modules: {target}: no such module; {hint}")


def _with_lora(model: PreTrainedModel, table: LoraTable) -> Any:
    from peft import LoraConfig, get_peft_model

    _require_modules(model, table.target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=table.rank,
        lora_alpha=table.alpha,
        lora_dropout=table.dropout,
        target_modules=table.target_modules,
    )
    try:
        with warnings.catch_warnings():  # peft uses a name that transformers will remove
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"model.lora.target_modules: {brief(error)}") from None
    _require_own_weights(adapted)
    return adapted


def _require_own_weights(adapted: Any) -> None:
    """Check that no layer with an adapter shares its weight with another layer, as a tied embedding
    does. Merging the adapter would change the other layer too. Raises: ModelError if a layer with
    an adapter shares its weight."""
    layers: dict[int, list[str]] = {}
    for name, parameter in adapted.get_base_model().named_parameters(remove_duplicate=False):
        layers.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    for names in layers.values():
        own = [name for name in names if name.endswith(".base_layer")]
        if own and len(names) > 1:
            first = own[0].removesuffix(".base_layer")
            others = ", ".join(name.removesuffix(".base_layer") for name in names if name != own[0])
            raise ModelError(
                f"model.lora.target_modules: {first} shares its weight with {others}, so its"
                " adapter could not be merged; expected other layers"
            )
