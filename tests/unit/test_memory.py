"""What training takes in memory: parts redone by hand, the trace against real tensors, the whole
against real runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reftune.advice.memory import DRAWING, Outline, Work, _LiveBytes, training_memory
from reftune.model.logprobs import token_logprobs
from reftune.recipe import LoraTable, ModelTable

ROOT = Path(__file__).parents[2]
WORK = Work(prompt=9, response=7, batch=3, rows=5)
KV: Any = SimpleNamespace(kind="kv")
SFT: Any = SimpleNamespace(batch_size=8)


def rl(*, needs_reference: bool = True, value_model: str = "shared") -> Any:
    return SimpleNamespace(
        kind="rl",
        value_model=value_model,
        algorithm=SimpleNamespace(needs_reference=needs_reference),
    )


@pytest.fixture(scope="module")
def outline(make_model):
    def make(family: str = "llama", **table: Any) -> Outline:
        return Outline(lambda: make_model(family), ModelTable(path="unread", **table), device="cpu")

    return make


def numel(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("family", ["llama", "llama, tied", "gpt2", "qwen3, tied"])
def test_sizes_are_those_of_the_model(family, outline, make_model):
    model, sizes = make_model(family), outline(family).sizes
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (sizes.total, sizes.trained) == (numel(model), numel(model) + 32 + 1), (
        "the value head is trained too"
    )
    assert sizes.ends == (embedding.numel() if embedding is head else 2 * embedding.numel())
    assert (sizes.layers, sizes.hidden) == (2, 32)
    # keys and values, fp32, of every layer: 2 of llama's 4 heads of 8, all 4 of gpt2's
    assert sizes.cache_bytes == 4 * 2 * 2 * (4 if family == "gpt2" else 2) * 8


def test_held_parts_are_the_weights_times_their_copies(outline):
    made = outline()
    memory, total = training_memory(made, rl(), KV, WORK), made.sizes.total
    assert memory.held == {
        "weights": 4 * total,
        "optimizer": 8 * made.sizes.trained,
        "reference": 4 * total,
        "value model": 0,
    }
    assert memory.phases["update"]["gradients"] == 4 * made.sizes.trained
    generate = memory.phases["generate"]
    # 5 rows of 9 + 7 tokens, and 64 more that the cache grows by
    assert generate["KV cache"] == made.sizes.cache_bytes * 5 * (9 + 7 + 64)
    assert generate["drawing tokens"] == DRAWING * 4 * 5 * made.sizes.vocabulary
    for stage in (SFT, rl(needs_reference=False)):
        assert training_memory(made, stage, KV, WORK).held["reference"] == 0


def test_sampling_and_updating_take_turns(outline):
    memory = training_memory(outline(), rl(), KV, WORK)
    phases = {name: sum(parts.values()) for name, parts in memory.phases.items()}
    assert memory.peak == sum(memory.held.values()) + max(phases.values())
    assert memory.busiest == max(phases, key=phases.__getitem__)


def test_a_value_model_of_its_own_is_held_trained_and_passed_through(outline):
    made = outline()
    shared, separate = (
        training_memory(made, rl(value_model=kind), KV, WORK) for kind in ("shared", "separate")
    )
    backbone = made.sizes.backbone
    assert backbone == made.sizes.total - made.sizes.ends / 2, (
        "all but the output head, which is not tied here"
    )
    assert separate.held["value model"] == 12 * backbone, "weights and two moments"
    assert separate.parts["gradients"] - shared.parts["gradients"] == 4 * backbone
    assert separate.parts["activations"] == 2 * shared.parts["activations"]


def test_adapters_need_no_reference_and_hardly_any_optimizer(outline):
    whole, adapters = (
        training_memory(outline(lora=lora), rl(), KV, WORK) for lora in (None, LoraTable(rank=1))
    )
    assert adapters.held["reference"] == 0
    assert adapters.held["optimizer"] < whole.held["optimizer"] / 4


def test_ddp_holds_all_and_fsdp2_a_part_but_whole_weights_to_sample_with(outline):
    made = outline()
    one, ddp, fsdp2 = (
        training_memory(made, rl(), KV, WORK, sharding=way, gpus=4)
        for way in ("one", "ddp", "fsdp2")
    )
    assert ddp == one
    assert fsdp2.held == {name: size / 4 for name, size in one.held.items()}
    assert fsdp2.parts["gradients"] == one.parts["gradients"] / 4
    assert fsdp2.phases["generate"]["engine's copy"] == 4 * made.sizes.total
    # at the start weights and reference are whole; what is held then counts as part of them
    assert sum(fsdp2.held.values()) + fsdp2.phases["start"]["loading"] == pytest.approx(
        2 * 4 * made.sizes.total
    )


def test_a_colocated_vllm_takes_its_share_and_a_server_nothing(outline):
    made = outline()
    for server, share in ((None, 300.0), ("http://host:8000", 0.0)):
        engine: Any = SimpleNamespace(kind="vllm", server=server, memory=0.3)
        assert (
            training_memory(made, rl(), engine, WORK, device_bytes=1000).held["engine's copy"]
            == share
        )


def test_live_bytes_count_storages_once_and_as_long_as_they_live():
    with _LiveBytes(torch.nn.Linear(1, 1)) as live:
        first = torch.zeros(1000)
        view = first[:10]
        assert live.now == 4000
        second = torch.zeros(500)
        assert live.now == 6000
        del second, first
        assert live.now == 4000, "the view still holds the first"
        del view
    assert (live.now, live.peak) == (0, 6000)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_trace_takes_what_real_tensors_take(dtype, outline, make_policy):
    traced = outline(dtype=dtype).trace(WORK)
    policy = make_policy(dtype=getattr(torch, dtype))
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.zeros(3, 16, dtype=torch.long)
    with policy.arithmetic(), _LiveBytes(policy) as live:
        hidden = (
            policy.model.base_model(input_ids=tokens, use_cache=False)
            .last_hidden_state[:, -7:]
            .flatten(0, 1)
        )
        token_logprobs(policy.model.lm_head, hidden, tokens[:, -7:].flatten()).sum().backward()
    assert traced.activations + traced.logits == pytest.approx(live.peak, rel=0.05)


def test_sampling_keeps_a_copy_of_the_weights_in_the_arithmetic(outline, make_model):
    least = Work(prompt=1, response=1, batch=1, rows=1)
    wide, narrow = outline().trace(least), outline(dtype="bfloat16").trace(least)
    model = make_model("llama")
    merged = sum(
        p.numel() for name, p in model.named_parameters() if re.search("(q|k|v|gate|up)_proj", name)
    )
    matrices = (
        sum(p.numel() for p in model.parameters() if p.dim() == 2)
        - model.get_input_embeddings().weight.numel()
    )
    assert wide.casts == pytest.approx(4 * merged, rel=0.02), (
        "in fp32 only what is multiplied at once"
    )
    assert narrow.casts == pytest.approx(2 * matrices, rel=0.02)
    assert narrow.prefill < narrow.casts / 2, "the copies are not counted a second time"


def test_sampling_keeps_casts_of_other_models_too(outline, make_model):
    least = Work(prompt=1, response=1, batch=1, rows=1)
    wide, narrow = outline("phi3").trace(least), outline("phi3", dtype="bfloat16").trace(least)
    model = make_model("phi3")
    matrices = (
        sum(p.numel() for p in model.parameters() if p.dim() == 2)
        - model.get_input_embeddings().weight.numel()
    )
    assert narrow.casts == pytest.approx(wide.casts + 2 * matrices, rel=0.02)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", ["deep", "wide, value model", "smollm2"])
def test_the_prediction_is_within_15_percent_of_a_measured_run(case, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.plan_accuracy import TOLERANCE, baseline, compare

    try:
        row = compare(case, baseline())
    finally:
        for name in [
            name for name in sys.modules if name == "benchmarks" or name.startswith("benchmarks.")
        ]:
            del sys.modules[name]
    assert abs(row["error"]) <= TOLERANCE == 0.15, row
