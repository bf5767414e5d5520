"""Attention in fp32 on a processor: the same model, and the same in training as in sampling."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch.testing import assert_close

from reftune.model.batch import token_batch
from reftune.model.policy import Policy
from reftune.model.speed import linears
from reftune.model.speed.attention import ATTENTION, attend_our_way


@pytest.fixture
def batch():
    return token_batch([[3, 4, 5, 6], [7, 8]], [[10, 1], [11, 12, 13, 1]])


@pytest.mark.parametrize("architecture", ["llama", "phi3", "opt", "gpt2", "mistral, window of 5"])
def test_nothing_changes_but_the_precision(make_policy, batch, architecture):
    policy = make_policy(architecture).eval()
    expected = policy(batch)
    attend_our_way(policy.model)
    found = policy(batch)
    assert policy.model.config._attn_implementation == ATTENTION
    assert_close(found.logprobs, expected.logprobs, atol=1e-6, rtol=0)


def test_a_bf16_policy_attends_in_fp32_and_nothing_else_does(make_policy, batch, monkeypatch):
    seen: list[torch.dtype] = []
    from transformers.integrations import sdpa_attention

    original = sdpa_attention.sdpa_attention_forward

    def spy(module, query, *args, **options):
        seen.append(query.dtype)
        return original(module, query, *args, **options)

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", spy)
    plain = make_policy("llama")
    policy = Policy(plain.model, plain.tokenizer, dtype=torch.bfloat16)
    policy(batch).logprobs.sum().backward()
    assert set(seen) == {torch.float32}
    with policy.arithmetic():
        assert (
            policy.model(input_ids=batch.tokens).logits.dtype == torch.bfloat16
        )  # the products are in bf16 still


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bf16 products"
)
@pytest.mark.parametrize("architecture", ["llama", "phi3", "opt", "gpt2"])
def test_packed_layers_multiply_as_before_and_are_put_back(make_policy, architecture):
    model = make_policy(architecture, dtype=torch.bfloat16).model
    tokens = torch.tensor([[3, 4, 5], [7, 8, 9]])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(input_ids=tokens).logits
        with linears.packed_linears(model, torch.bfloat16):
            packed = [module for module in model.modules() if "forward" in vars(module)]
            assert (
                type(model.get_output_embeddings()) is torch.nn.Linear
                and model.get_output_embeddings() in packed
            )
            found = model(input_ids=tokens).logits
        assert found.dtype == expected.dtype
        assert_close(found, expected, atol=0.02 * float(expected.abs().max()), rtol=0)
        assert not any("forward" in vars(module) for module in model.modules())


def test_nothing_is_packed_in_fp32(make_policy):
    model = make_policy("llama").model
    with linears.packed_linears(model, torch.float32):
        assert not any("forward" in vars(module) for module in model.modules())


def test_the_allocator_takes_every_option():
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        pytest.skip("the C library is not glibc")
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            linears.ctypes,
            "CDLL",
            lambda name: type("C", (), {"mallopt": lambda self, *a: taken.append(mallopt(*a))})(),
        )
        linears.keep_freed_memory()
    assert taken == [1, 1, 1]
