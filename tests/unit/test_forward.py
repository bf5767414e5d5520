"""Our forward pass of Llama-like models against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers.cache_utils import Cache, DynamicCache

from reftune.engines.kv import _RoomyLayer
from reftune.model.speed import llama
from reftune.model.speed.llama import FAMILIES, Decoder, is_written_out
from reftune.recipe import LoraTable

ROWS = [[3, 4, 5, 6, 7, 8], [9, 10], [11, 12, 13, 14]]
LATER = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])


def prompts() -> tuple[Tensor, Tensor]:
    """Prompts padded on the left, and the mask of real tokens."""
    longest = max(map(len, ROWS))
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ROWS])
    return torch.tensor([[0] * (longest - len(row)) + row for row in ROWS]), mask


def by_transformers(model: Any, steps: list[Tensor], mask: Tensor) -> list[Tensor]:
    """Logits after each of `steps`, tokens (B, S)."""
    cache, found = DynamicCache(config=model.config), []
    for tokens in steps:
        mask = mask if not found else torch.cat([mask, torch.ones_like(tokens)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        found.append(output.logits[:, -1].float())
    return found


def written_out(model: Any, steps: list[Tensor], mask: Tensor, dtype: torch.dtype) -> list[Tensor]:
    decoder, cache, found = (
        Decoder(model, dtype, copies="reordered"),
        Cache(layer_class_to_replicate=_RoomyLayer),
        [],
    )
    for tokens in steps:
        mask = mask if not found else torch.cat([mask, torch.ones_like(tokens)], 1)
        found.append(decoder.logits(decoder(tokens, mask, cache)))
    return found


@pytest.mark.parametrize("large", [1, llama.LARGE], ids=["packed", "not packed"])
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "llama, tied",
        "phi3",
        "qwen2, untied",
        "qwen2, tied",
        "qwen3, tied",
        "mistral",
        "biased",
    ],
)
@torch.no_grad()
def test_it_is_the_model(make_model, family, large, monkeypatch):
    monkeypatch.setattr(llama, "LARGE", large)
    changes: dict[str, Any] = {
        "mistral": {"sliding_window": None},
        "biased": {"attention_bias": True, "mlp_bias": True},
    }.get(family, {})
    model = make_model(
        {"mistral": "mistral, window of 5", "biased": "llama"}.get(family, family), **changes
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()).reshape(parameter.shape))
    assert is_written_out(model)
    tokens, mask = prompts()
    steps = [tokens, *LATER.split(1, dim=1)]
    for found, expected in zip(
        written_out(model, steps, mask, torch.float32),
        by_transformers(model, steps, mask),
        strict=True,
    ):
        assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_bfloat16_rounds_as_autocast_does(make_model):
    model = make_model("llama", sharpness=2.0)
    tokens, mask = prompts()
    steps = [tokens, *LATER.split(1, dim=1)]
    exact = by_transformers(model, steps, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = by_transformers(model, steps, mask)
        ours = written_out(model, steps, mask, torch.bfloat16)
    error = max(float((t - e).abs().max()) for t, e in zip(theirs, exact, strict=True))
    assert 0 < max(float((o - e).abs().max()) for o, e in zip(ours, exact, strict=True)) < 2 * error


@torch.no_grad()
def test_several_tokens_may_follow_a_cache(make_model):
    model = make_model("llama")
    tokens, mask = prompts()
    (_, at_once), (_, *in_turn) = (
        written_out(model, [tokens, *later], mask, torch.float32)
        for later in ([LATER], LATER.split(1, dim=1))
    )
    assert_close(at_once, in_turn[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["mistral, window of 5", "gpt2", "opt", "granite"])
def test_other_models_are_left_to_transformers(make_model, family):
    assert not is_written_out(make_model(family))


def test_a_window_that_is_not_used_is_none(make_model):
    assert is_written_out(make_model("qwen2, tied", sliding_window=5, use_sliding_window=False))
    assert not is_written_out(
        make_model("qwen2, tied", sliding_window=5, use_sliding_window=True, max_window_layers=1)
    )


def test_adapters_are_left_to_transformers(make_policy):
    for targets in ("all-linear", ["v_proj"], ["lm_head"]):
        policy = make_policy("llama", lora=LoraTable(rank=2, alpha=2.0, target_modules=targets))
        assert not is_written_out(policy.model)


def test_every_class_of_the_list_is_tested(make_model):
    assert {
        type(make_model(f)).__name__
        for f in ("llama", "mistral, window of 5", "phi3", "qwen2, tied", "qwen3, tied")
    } == set(FAMILIES)
