"""A small model made from scratch, with a word-level vocabulary of the training texts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from reftune.errors import ModelError
from reftune.recipe import ScratchTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

WORD_PATTERN = r"\d+|\n *| ?[A-Za-z_]+(?: (?=\d))?| ?[^\sA-Za-z_\d]+(?: (?=\d))?| "
"""Pieces of the from-scratch vocabulary. Numbers are always bare, so that copying one needs a
single embedding: the blank before a number belongs to the word or operator before it. A newline
takes its indent along."""


def make_scratch(
    table: ScratchTable, texts: Iterable[str], *, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A small Llama-like model (Phi-3's architecture, which brings dropout) with random weights and
    a word vocabulary."""
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
    """One token a word or whole number of `texts`, in order of first appearance; all else is
    `<unk>`."""
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
