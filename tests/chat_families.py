"""Chat templates like those of well-known families, and a tiny tokenizer and model for each.

The templates are written for these tests: token names, order, spaces and errors are those of the
families; tools and images are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reftune.datasets import Splits
from reftune.recipe import Component, parse_recipe
from reftune.types import Answer, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""The pattern by which Llama-3 and Qwen split words, shortened; line breaks stay together."""
MAX_NEW = 24
OPTIMIZER = {"learning_rate": 3e-3}
CORPUS = [
    "Kofi has 3 figs and gets 10 more. How many figs does Kofi have?\n\n",
    "3 + 10 = 13.\nThe answer is 13\n\n12 - 7 = 5\n\nThe answer is 5",
    "You solve word problems step by step.\n\nLet me think.\n<think>\n\n</think>\n\nThe answer",
    "user assistant system model\n\n answer is, the 0 1 2 3 4 5 6 7 8 9",
]


@dataclass(frozen=True, kw_only=True)
class Family:
    """The peculiarities of a family's tokenizer and generation config."""

    template: str
    special: tuple[str, ...]
    eos: str
    ends: tuple[str, ...]
    """All tokens at which generation stops, by its generation config."""
    end_of_turn: str
    bos: str | None = None
    """The BOS token, which both the tokenizer and the template write."""
    takes_system: bool = True
    plain: tuple[str, ...] = ()
    """Added tokens that are not special, such as Qwen3's `<think>`."""
    template_args: dict[str, Any] = field(default_factory=dict)


LLAMA3 = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN25 = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
QWEN3 = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}"
    "{%- if message.role != 'assistant' %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- else %}"
    "{%- set content = message.content %}{%- set thought = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
    "{{- content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'system' %}{{ content }}"
    "{% elif message['role'] == 'user' %}{{ '<|User|>' + content }}"
    "{% else %}{{ '<|Assistant|>' + content.split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FAMILIES = {
    "llama3": Family(
        template=LLAMA3,
        special=(
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
        ),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        ends=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        end_of_turn="<|eot_id|>",
    ),
    "qwen2.5": Family(
        template=QWEN25,
        special=CHATML,
        eos="<|im_end|>",
        ends=("<|im_end|>", "<|endoftext|>"),
        end_of_turn="<|im_end|>",
    ),
    "qwen3, thinking": Family(
        template=QWEN3,
        special=CHATML,
        plain=("<think>", "</think>"),
        eos="<|im_end|>",
        ends=("<|im_end|>", "<|endoftext|>"),
        end_of_turn="<|im_end|>",
    ),
    "qwen3, not thinking": Family(
        template=QWEN3,
        special=CHATML,
        plain=("<think>", "</think>"),
        eos="<|im_end|>",
        ends=("<|im_end|>", "<|endoftext|>"),
        end_of_turn="<|im_end|>",
        template_args={"enable_thinking": False},
    ),
    "gemma": Family(
        template=GEMMA,
        special=("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        ends=("<eos>", "<end_of_turn>"),
        end_of_turn="<end_of_turn>",
        takes_system=False,
    ),
    "mistral": Family(
        template=MISTRAL,
        special=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        bos="<s>",
        eos="</s>",
        ends=("</s>",),
        end_of_turn="</s>",
        takes_system=False,
    ),
    "phi3": Family(
        template=PHI3,
        special=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|endoftext|>",
        ends=("<|endoftext|>", "<|assistant|>", "<|end|>"),
        end_of_turn="<|end|>",
    ),
    "r1": Family(
        template=R1,
        special=("<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"),
        plain=("<think>", "</think>"),
        bos="<|begin|>",
        eos="<|end|>",
        ends=("<|end|>",),
        end_of_turn="<|end|>",
    ),
}


def make_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes, some merges of bytes (and of line breaks), and the
    family's own tokens."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(family.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken(token, normalized=False) for token in family.plain])
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if family.bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A",
            special_tokens=[(family.bos, backend.token_to_id(family.bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        additional_special_tokens=[t for t in family.special if t not in (family.bos, family.eos)],
        chat_template=family.template,
    )


def save_model(
    name: str,
    folder: Path,
    *,
    dtype: str = "float32",
    config_eos: int | None = None,
    heads: int = 2,
) -> Path:
    """Save a tiny random instruct model of a family. `config_eos` is the eos in its config, by
    default the tokenizer's."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    family = FAMILIES[name]
    tokenizer = make_tokenizer(family)
    ends = [int(tokenizer.convert_tokens_to_ids(token)) for token in family.ends]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if config_eos is None else config_eos,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(
        eos_token_id=ends, do_sample=True, temperature=0.7, top_p=0.8, repetition_penalty=1.05
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Figs(Component):
    """A few sums with rationales."""

    def load(self, *, seed: int) -> Splits:
        def figs(split: str, i: int) -> Problem:
            a, b = i % 5 + 2, i % 3 + 1
            return Problem(
                id=f"{split}-{i}",
                question=f"Kofi has {a} figs and gets {b} more. How many figs?",
                answer=Answer(kind="number", value=Fraction(a + b)),
                rationale=f"{a} + {b} = {a + b}.",
            )

        return Splits(
            train=tuple(figs("train", i) for i in range(4)),
            dev=tuple(figs("dev", i) for i in range(9, 13)),
            test=tuple(figs("test", i) for i in range(4, 9)),
        )


def run_of(tmp_path: Path, name: str, *, format_keys: dict[str, Any], **model: Any) -> Path:
    """Run SFT and RL on a family's model, and return the run folder. Batch sizes are given, so that
    nothing is traced."""
    content = {
        "name": "tiny",
        "run_dir": str(tmp_path / "run"),
        "threads": 1,
        "model": {
            "path": str(tmp_path / "base"),
            "dtype": "float32",
            "micro_batch_tokens": 4096,
            **model,
        },
        "engine": {"kind": "kv", "batch_size": 32},
        "dataset": {"kind": f"{__file__}:Figs"},
        "format": {"kind": "nl", **format_keys},
        "lengths": {"max_new": MAX_NEW},
        "trackers": [],
        "stages": {
            "sft": {"kind": "sft", "epochs": 6, "batch_size": 4, "optimizer": OPTIMIZER},
            "reft": {
                "kind": "rl",
                "init": "sft",
                "steps": 2,
                "prompts": 2,
                "samples": 2,
                "eval_every": 1,
                "optimizer": OPTIMIZER,
            },
        },
    }
    from reftune.runs.run import run_recipe
    from reftune.stages.stage import Progress

    if not (tmp_path / "base").exists():
        save_model(name, tmp_path / "base")
    run_recipe(parse_recipe(content), progress=Progress())
    return tmp_path / "run"
