"""The folder that exists only for speed: without it, the same results up to rounding."""

from __future__ import annotations

import ctypes
import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from reftune.model.batch import TokenBatch, token_batch
from reftune.model.policy import Policy
from reftune.model.speed import allocator, attention, llama
from reftune.recipe import Recipe
from reftune.runs.run import open_run
from reftune.stages.stage import Progress


@pytest.fixture
def batch():
    return token_batch([[3, 4, 5, 6], [7, 8]], [[10, 1], [11, 12, 13, 1]])


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
        )  # the products are still in bf16


NO_BF16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bf16 products"
)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "opt", "gpt2"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), pytest.param(torch.bfloat16, 0.02, marks=NO_BF16)],
)
def test_packed_layers_multiply_as_before_and_are_put_back(
    make_policy, architecture, dtype, tolerance, monkeypatch
):
    monkeypatch.setattr(llama, "LARGE", 1)
    policy = make_policy(architecture, dtype=dtype)
    model, tokens = policy.model, torch.tensor([[3, 4, 5], [7, 8, 9]])
    with torch.no_grad(), policy.arithmetic():
        expected = model(input_ids=tokens).logits
        with llama.packed_linears(model, dtype):
            packed = [module for module in model.modules() if "forward" in vars(module)]
            assert (
                type(model.get_output_embeddings()) is torch.nn.Linear
                and model.get_output_embeddings() in packed
            )
            found = model(input_ids=tokens).logits
        assert found.dtype == expected.dtype
        assert_close(found, expected, atol=tolerance * float(expected.abs().max()), rtol=0)
        assert not any("forward" in vars(module) for module in model.modules())


def test_small_layers_are_not_packed_in_fp32(make_policy):
    model = make_policy("llama").model
    with llama.packed_linears(model, torch.float32):
        assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("variables", "expected"), [({}, [1, 1, 1]), ({"MALLOC_ARENA_MAX": "2"}, [])]
)
def test_the_allocator_takes_every_option_unless_the_environment_gives_some(variables, expected):
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        pytest.skip("the C library is not glibc")
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocator.os, "environ", variables)
        patch.setattr(
            allocator.ctypes,
            "CDLL",
            lambda name: type("C", (), {"mallopt": lambda self, *a: taken.append(mallopt(*a))})(),
        )
        allocator.keep_freed_memory()
    assert taken == expected


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3, tied", "gpt2", "opt", "codegen"])
def test_a_prompt_read_once_for_several_samples_gets_the_gradient_of_all(
    make_policy, family, recompute, monkeypatch
):
    long, short = [3, 4, 5, 6, 7], [8, 9]
    prompts = [long, short, long, [4], long, short, *([i, i + 1] for i in range(4))]
    responses = [[10 + i] * (1 + 5 * i % 4) + [1] for i in range(len(prompts))]
    batch = token_batch(prompts, responses)
    weights = torch.linspace(-1, 2, batch.response_mask.numel()).view(batch.response_mask.shape)
    found = []
    for is_shared in (True, False):
        if not is_shared:
            monkeypatch.setattr(TokenBatch, "owners", lambda self: torch.arange(len(self)))
        assert (len(batch.packed().tokens) < int(batch.lengths.sum())) == is_shared
        policy = make_policy(family)
        if recompute:
            policy.recompute_blocks()
        scores = policy(batch)
        ((scores.logprobs + scores.values) * weights).sum().backward()
        gradients = {name: p.grad for name, p in policy.named_parameters()}
        found.append((scores.logprobs, scores.values, policy.score(batch).entropy, gradients))
    for shared, alone in zip(found[0], found[1], strict=True):
        assert_close(shared, alone, atol=1e-4, rtol=1e-4)


# --- without the folder ---------------------------------------------------------------------------

NO_DROPOUT = {
    "scratch": {"hidden_size": 16, "layers": 1, "heads": 2, "context": 80, "dropout": 0.0}
}
CALM = {"optimizer": {"learning_rate": 0.003}}


def switch_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Act as if the folder were deleted, in the way that its docstring describes."""

    def deleted(*args: object, **options: object) -> None:
        raise AssertionError("the folder was to be switched off")

    monkeypatch.setattr(attention, "attend_our_way", lambda model: None)
    monkeypatch.setattr(attention, "takes_packing", lambda model: False)
    monkeypatch.setattr(llama, "is_written_out", lambda model: False)
    for module, names in (
        (attention, ("read_packed", "attend_in_groups", "unpad")),
        (llama, ("read_packed", "Decoder", "product")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, deleted)
    monkeypatch.setattr(llama, "packed_linears", lambda model, dtype: nullcontext())


def train(recipe: Recipe) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The metrics of a whole run, and its last chosen weights."""
    with open_run(recipe, Progress()) as run:
        for name in recipe.stages:
            run.train(name)
    rows = [json.loads(line) for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [
        {key: row[key] for key in row if not key.startswith(("time", "stage"))} for row in rows
    ]
    return numbers, load_file(recipe.folder / "stages" / "reft" / "model.safetensors")


def test_without_the_folder_a_run_is_the_same_up_to_rounding(make_recipe, tmp_path, monkeypatch):
    stages = {"sft": CALM, "reft": {**CALM, "algorithm": {"kind": "ppo"}}}
    runs = []
    for name in ("with", "without"):
        if name == "without":
            switch_off(monkeypatch)
        changes = {"run_dir": str(tmp_path / name), "model": NO_DROPOUT, "stages": stages}
        runs.append(train(make_recipe(**changes)))
    (rows, weights), (plain_rows, plain_weights) = runs
    assert len(rows) > 10
    for row, plain in zip(rows, plain_rows, strict=True):
        # without it, no engine scores what it samples
        assert row.keys() == plain.keys() - {"kl/mismatch"}
        for key, value in row.items():
            assert value == pytest.approx(plain[key], rel=1e-3, abs=1e-4), key
    assert rows != plain_rows, "the folder was not used"
    for name, weight in weights.items():
        assert_close(weight, plain_weights[name], atol=1e-4, rtol=1e-3)
