"""The memory of training: parts recomputed by hand, the trace against real tensors, the whole
against real runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reftune.advice.measured import available_bytes
from reftune.engines.vllm import Vllm
from reftune.model.batch import token_batch
from reftune.model.logprobs import token_logprobs
from reftune.model.speed import llama
from reftune.processes import world
from reftune.recipe import LoraTable, ModelTable
from reftune.runs.auto import total_bytes
from reftune.stages.estimate import DRAWING, Estimate, Memory
from reftune.stages.outline import Outline, _LiveBytes
from reftune.stages.stage import Cost

ROOT = Path(__file__).parents[2]
SFT = Cost(steps=1, batch=8, looks=1)


def rl(**changes: Any) -> Cost:
    return replace(SFT, scored=2, sampled=8, prompts=8, **{"reference": True, **changes})


@pytest.fixture(scope="module")
def outline(make_model):
    def make(family: str = "llama", device: str = "cpu", **table: Any) -> Outline:
        return Outline(
            lambda: make_model(family),
            ModelTable(path="unread", **{"dtype": "float32", **table}),
            device=device,
        )

    return make


def estimate(
    outline: Outline,
    cost: Cost,
    *,
    tokens: Any = 48,
    engine: Any = SimpleNamespace(batch_size=5),  # noqa: B008  nothing changes it
    **changes: Any,
) -> Estimate:
    """Prompts of 9 and responses of 7 tokens, 3 sequences in a pass, 5 rows."""
    model, lengths = SimpleNamespace(micro_batch_tokens=tokens), SimpleNamespace(max_new=7)
    recipe: Any = SimpleNamespace(model=model, lengths=lengths, engine=engine)
    return Estimate(recipe=recipe, cost=cost, outline=outline, prompt=9, **changes)


def memory_of(outline: Outline, cost: Cost, **changes: Any) -> Memory:
    return estimate(outline, cost, **changes).memory


def numel(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("family", ["llama", "llama, tied", "gpt2", "qwen3, tied"])
def test_sizes_are_those_of_the_model(family, outline, make_model):
    model, made = make_model(family), outline(family)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (made.total, made.trained) == (numel(model), numel(model) + 32 + 1), (
        "the value head is trained too"
    )
    assert made.ends == (embedding.numel() if embedding is head else 2 * embedding.numel())
    assert made.vocabulary == head.shape[0] and made.weights == 4 * made.total
    # keys and values, fp32, of every layer: 2 of llama's 4 heads of 8, all 4 of gpt2's
    assert made.cache_bytes == 4 * 2 * 2 * (4 if family == "gpt2" else 2) * 8


def test_held_parts_are_the_weights_times_their_copies(outline):
    made = outline()
    memory, total = memory_of(made, rl()), made.total
    assert memory.held == {
        "weights": 4 * total,
        "optimizer": 8 * made.trained,
        "reference": 4 * total,
    }
    assert memory.phases["update"]["gradients"] == 4 * made.trained
    generate = memory.phases["generate"]
    # 5 rows of 9 + 7 tokens, and 64 more that the cache grows by
    assert generate["KV cache"] == made.cache_bytes * 5 * (9 + 7 + 64)
    assert generate["drawing tokens"] == DRAWING * 4 * 5 * made.vocabulary
    for cost in (SFT, rl(reference=False)):
        assert memory_of(made, cost).held["reference"] == 0
    eighth = memory_of(made, replace(SFT, state_bits=8)).held["optimizer"]
    # one byte per moment, and 4 for the scale of every 256
    assert eighth == (2 + 8 / 256) * made.trained


def test_what_is_never_trained_is_counted_as_it_is_held(outline, make_model):
    model = make_model("llama")
    inner = sum(p.numel() for n, p in model.named_parameters() if "_proj" in n)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    ends = numel(model) - inner - vectors
    made = outline(lora=LoraTable(rank=4), dtype="bfloat16")
    adapters = made.trained - 33
    assert made.weights == 2 * (inner + ends) + 4 * (vectors + adapters)
    # the reference of a trained model keeps fp32 embeddings, which bf16 would round
    assert outline(dtype="bfloat16").reference == 2 * (inner + ends / 2) + 4 * (ends / 2 + vectors)
    quantized = outline(lora=LoraTable(rank=4), dtype="bfloat16", quantize="nf4")
    assert quantized.weights == (0.5 + 4 / 64) * inner + 2 * ends + 4 * (vectors + adapters)


def test_the_weights_of_an_outline_are_those_of_a_policy(outline, make_model, tokenizer):
    from reftune.model.policy import Policy

    for quantize in (None, "nf4"):
        policy = Policy(
            make_model("llama"),
            tokenizer,
            dtype=torch.bfloat16,
            lora=LoraTable(),
            quantize=quantize,
        )
        held = sum(p.nbytes for p in policy.model.parameters())
        held += sum(
            p.quant_state.absmax.nbytes
            for p in policy.model.parameters()
            if hasattr(p, "quant_state")
        )
        found = outline(lora=LoraTable(), dtype="bfloat16", quantize=quantize).weights
        assert found == pytest.approx(held, rel=0.01)


def test_checkpointing_keeps_what_enters_a_block(make_model):
    def update(batch: int, **table: Any) -> Any:
        make = lambda: make_model("llama", num_hidden_layers=8)  # noqa: E731
        made = Outline(make, ModelTable(path="x", dtype="float32", **table), device="cpu")
        return made.update(9, 7, batch)

    plain, saving = (update(64, gradient_checkpointing=flag) for flag in (False, True))
    # 8 inputs of 64 · 16 tokens of 32 numbers, and one block's temporary tensors
    kept = 8 * 64 * 16 * 32 * 4
    assert kept <= saving.kept and saving.kept + saving.momentary < plain.kept / 2
    assert saving.forward_flops == plain.forward_flops
    # three passes' worth of products, and one more for the recomputation
    assert plain.flops / plain.forward_flops == pytest.approx(3, rel=0.05)
    assert saving.flops / saving.forward_flops == pytest.approx(4, rel=0.05)


def test_operations_are_those_of_the_products(outline, make_model):
    model, found = make_model("llama"), outline().update(9, 7, 3)
    inner = sum(p.numel() for n, p in model.named_parameters() if "_proj" in n)
    head = model.get_output_embeddings().weight.numel()
    tokens = 3 * 16
    attention = 2 * 2 * 3 * 4 * 16 * 16 * (8 + 8)  # layers, products, rows, heads, tokens², sizes
    expected = 2 * inner * tokens + 2 * head * 3 * 7 + attention // 1
    assert found.forward_flops == pytest.approx(expected, rel=0.02)


def test_the_largest_sizes_that_fit_are_chosen(outline):
    made = outline()

    def chosen(room: float) -> tuple[int, int]:
        engine = SimpleNamespace(batch_size="auto")
        cost = replace(rl(), batch=10**6)
        made_for = {"tokens": "auto", "engine": engine, "device_bytes": room / 0.9}
        sizes = estimate(made, cost, **made_for).sizes
        return sizes.tokens, sizes.rows

    assert chosen(1e12) == (16384, 256)
    assert chosen(1) == (512, 1)
    tokens, rows = 2048, 64
    engine = SimpleNamespace(batch_size=rows)
    memory = memory_of(made, replace(rl(), batch=10**6), tokens=tokens, engine=engine)
    for phase, place in (("update", 0), ("generate", 1)):
        need = memory.of(phase)
        assert chosen(1.05 * need)[place] == (tokens, rows)[place]
        assert chosen(0.9 * need)[place] == (tokens, rows)[place] // 2


def test_a_pass_holds_the_tokens_of_its_sequences_and_no_padding(outline):
    made = estimate(outline(), replace(rl(), batch=12), devices=2)
    assert made.micro_batch(40) == 40 / 16 and made.micro_batch(1) == 1, "one sequence at least"
    assert made.micro_batch(10**6) == 6, "a process has half of the batch"
    # sequences of 12 tokens on average, four of which are three of the longest
    shorter = replace(made, mean_prompt=5)
    assert shorter.micro_batch(10**6) == 6 * 12 / 16
    made.outline.policy.packs = False
    assert shorter.micro_batch(10**6) == 6, "padded to the longest"


def test_gradients_of_a_single_pass_come_as_activations_go(outline, make_policy):
    # 8 sequences of 16 tokens, in one pass or in two
    made = outline()
    one, two = (memory_of(made, rl(), tokens=tokens).phases["update"] for tokens in (128, 127))
    assert two["gradients"] == 4 * made.trained
    assert sum(one.values()) == max(4 * made.trained, one["activations"])
    policy = make_policy()
    batch = token_batch([[i] * 9 for i in range(8)], [[0] * 7] * 8)
    with _LiveBytes(policy) as live:
        logprobs = policy(batch).logprobs
        for expected in (one, two):
            live.peak = live.now
            logprobs.sum().backward()
            assert live.peak == pytest.approx(sum(expected.values()), rel=0.03)
            logprobs = policy(batch).logprobs


def test_the_processes_of_a_machine_share_its_memory():
    everything = total_bytes(torch.device("cpu"))
    assert 2**28 < everything < 2**45
    with world.inhabited(world.World(size=8, local_size=4)):
        assert total_bytes(torch.device("cpu")) == everything / 4
        assert 0 < available_bytes(torch.device("cpu")) <= everything / 4


def test_sampling_and_updating_take_turns(outline):
    memory = memory_of(outline(), rl())
    phases = {name: sum(parts.values()) for name, parts in memory.phases.items()}
    assert memory.peak == sum(memory.held.values()) + max(phases.values())
    assert memory.busiest == max(phases, key=phases.__getitem__)


def test_a_group_of_devices_holds_one_copy_of_a_split_model(outline):
    made = outline()
    groups = memory_of(made, rl(), sharding="fsdp2", devices=4, replicas=2)
    assert groups.held == memory_of(made, rl(), sharding="fsdp2", devices=2).held


def drawing(outline: Outline, **changes: Any) -> float:
    """Bytes in use while another model draws samples, without the cache and temporary tensors."""
    memory = memory_of(outline, replace(SFT, sampler=True), **changes)
    passing = ("KV cache", "reading prompts", "drawing tokens")
    return memory.of("draw") - sum(memory.phases["draw"].get(name, 0) for name in passing)


def test_a_sampler_draws_before_policy_and_optimizer_exist(outline):
    made = outline()
    alone, sampled = (memory_of(made, replace(SFT, sampler=flag)) for flag in (False, True))
    assert "draw" not in alone.phases and sampled.of("generate") == alone.of("generate")
    assert sampled.of("draw") < sampled.of("generate"), "the optimizer takes more than a copy"
    # with adapters, the optimizer is small, and the sampler is a frozen model
    adapters = outline(lora=LoraTable(rank=1))
    assert drawing(adapters) >= adapters.reference


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_sampler_is_whole_on_every_device_with_the_copies_that_decoding_makes(
    dtype, checkpointing, outline, make_model, tokenizer
):
    from transformers.cache_utils import Cache

    from reftune.engines.kv import _RoomyLayer, reader
    from reftune.model.policy import Policy

    # 16 devices hold so little of the policy that the sampler needs more
    made = outline(dtype=dtype, gradient_checkpointing=checkpointing)
    found = drawing(made, sharding="fsdp2", devices=16)
    settings = {"dtype": getattr(torch, dtype), "trained": not checkpointing}
    sampler = Policy(make_model("llama"), tokenizer, **settings)
    tokens = torch.zeros(1, 1, dtype=torch.long)
    past: Any = Cache(layer_class_to_replicate=_RoomyLayer)
    with (
        torch.no_grad(),
        sampler.inference(),
        _LiveBytes(sampler) as live,
        reader(sampler, copies="ordinary") as reads,
    ):
        reads.head(reads.forward(tokens, torch.ones_like(tokens), past))
        states = [states for layer in past.layers for states in (layer.keys, layer.values)]
        copies = live.now - sum(tensor.untyped_storage().nbytes() for tensor in states)
    real = sum(p.nbytes for p in sampler.model.parameters()) + copies
    assert found == pytest.approx(real, rel=0.02)


def test_a_sampler_is_counted_beside_the_share_of_a_colocated_vllm(outline):
    made, share = outline(), 300.0
    engine = {"engine": Vllm(), "device_bytes": 1000}
    found = drawing(made, sharding="fsdp2", devices=16, **engine)
    assert found == pytest.approx(made.weights + share)


def test_a_value_model_of_its_own_is_held_trained_and_passed_through(outline):
    made = outline()
    shared, separate = (memory_of(made, rl(value_model=flag)) for flag in (False, True))
    backbone = made.backbone
    assert backbone == made.total - made.ends / 2, "all but the output head, which is not tied here"
    assert separate.held["weights"] - shared.held["weights"] == 4 * backbone
    assert separate.held["optimizer"] - shared.held["optimizer"] == 8 * backbone
    assert separate.parts["gradients"] - shared.parts["gradients"] == 4 * backbone
    # each keeps its own tensors for the backward pass, which needs no more temporary ones
    kept = made.update(9, 7, 3).kept
    assert separate.parts["activations"] - shared.parts["activations"] == kept > 0


def test_a_split_value_model_is_gathered_to_score_and_to_sample(outline):
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        made = outline(dtype=dtype)
        shared, separate = (
            memory_of(made, rl(value_model=flag), sharding="fsdp2", devices=2).phases
            for flag in (False, True)
        )
        # the blocks in the compute dtype; the embedding in fp32, and no output head
        blocks = width * 2 * made.layer
        extra = pytest.approx(blocks + 4 * (made.backbone - 2 * made.layer), rel=0.01)
        for phase, part in (("generate", "engine's copy"), ("score", "gathered to score")):
            assert separate[phase][part] - shared[phase][part] == extra, phase


def test_adapters_need_no_reference_and_hardly_any_optimizer(outline):
    whole, adapters = (memory_of(outline(lora=lora), rl()) for lora in (None, LoraTable(rank=1)))
    assert adapters.held["reference"] == 0
    assert adapters.held["optimizer"] < whole.held["optimizer"] / 4


def test_ddp_holds_all_and_fsdp2_a_part_but_whole_weights_to_sample_with(outline):
    made = outline()
    one, ddp, fsdp2 = (
        memory_of(made, rl(batch=32), sharding=way, devices=4) for way in ("one", "ddp", "fsdp2")
    )
    assert ddp == one
    assert fsdp2.held == {name: size / 4 for name, size in one.held.items()}
    assert fsdp2.parts["gradients"] == one.parts["gradients"] / 4
    assert fsdp2.phases["save"]["gathered to save"] == 4 * made.total
    # at the start weights and reference are whole; the parts held later count as part of them
    assert sum(fsdp2.held.values()) + fsdp2.phases["start"]["loading"] == pytest.approx(
        2 * 4 * made.total
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_split_weights_are_gathered_in_the_compute_dtype_and_merged_to_sample(
    dtype, outline, make_model
):
    made, model = outline(dtype=dtype), make_model("llama")
    named = dict(model.named_parameters())
    inner = sum(p.numel() for name, p in named.items() if "_proj" in name)
    merged = sum(p.numel() for name, p in named.items() if re.search("(q|k|v|gate|up)_proj", name))
    width = 2 if dtype == "bfloat16" else 4
    if dtype == "bfloat16" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        merged = inner  # such a CPU has a layout of its own for every matrix
    phases = memory_of(made, rl(), sharding="fsdp2", devices=2).phases
    whole = width * inner + 4 * (made.total - inner)
    assert phases["score"] == {"gathered to score": whole}
    # query, key and value as one matrix, gate and up as another; in bf16 the head is cast too
    cast_head = 2 * made.ends / 2 if dtype == "bfloat16" else 0
    copies = width * merged + cast_head
    assert phases["generate"]["engine's copy"] == pytest.approx(whole + copies, rel=0.01)
    # nothing of it stays: the outline is unchanged
    assert made.weights == 4 * made.total and made.trained == made.total + 33


def test_a_colocated_vllm_takes_its_share_and_a_server_nothing(outline):
    made = outline()
    for server, share in ((None, 300.0), ("http://host:8000", 0.0)):
        memory = memory_of(made, rl(), engine=Vllm(server=server), device_bytes=1000)
        assert memory.held["engine's copy"] == share and "generate" not in memory.phases


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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, LoraTable()])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_trace_takes_what_real_tensors_take(dtype, lora, checkpointing, outline, make_policy):
    # 4 · 16 tokens: in bf16 a real batch is filled up to a multiple of 64
    traced = outline(dtype=dtype, lora=lora, gradient_checkpointing=checkpointing).update(9, 7, 4)
    policy = make_policy(dtype=getattr(torch, dtype), lora=lora)
    if checkpointing:
        policy.recompute_blocks()
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    batch = token_batch([[i] * 9 for i in range(4)], [[0] * 7] * 4)
    with policy.arithmetic(), _LiveBytes(policy) as live:
        hidden = policy.hidden_states(batch)
        token_logprobs(
            policy.base.get_output_embeddings(), hidden, batch.response_tokens()
        ).sum().backward()
    assert traced.kept + traced.momentary == pytest.approx(live.peak, rel=0.05)


def test_sampling_keeps_a_copy_of_the_weights_in_the_arithmetic(outline, make_model):
    least = {"prompt": 1, "rows": 1}
    wide, narrow = outline().prefill(**least), outline(dtype="bfloat16").prefill(**least)
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
    assert narrow.momentary < narrow.casts / 2, "the copies are not counted a second time"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_for_a_gpu_does_not_depend_on_the_cpu_that_makes_it(dtype, outline, monkeypatch):
    def copies(device: str, *, packs: bool) -> float:
        monkeypatch.setattr(llama, "_can_be_packed", lambda weight, dtype: packs)
        return outline(dtype=dtype, device=device).gathered_copies

    assert copies("cuda", packs=True) == copies("cuda", packs=False)
    assert copies("cpu", packs=True) > copies("cpu", packs=False)


def test_sampling_keeps_casts_of_other_models_too(outline, make_model):
    least = {"prompt": 1, "rows": 1}
    wide, narrow = (
        outline("phi3", dtype=dtype).prefill(**least) for dtype in ("float32", "bfloat16")
    )
    model = make_model("phi3")
    matrices = (
        sum(p.numel() for p in model.parameters() if p.dim() == 2)
        - model.get_input_embeddings().weight.numel()
    )
    assert narrow.casts == pytest.approx(wide.casts + 2 * matrices, rel=0.02)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", ["wide, value model", "deep, adapters"])
def test_the_prediction_is_within_15_percent_of_a_measured_run(case):
    # a process of its own: the peak of a child is at least that of the process that started it
    command = [sys.executable, "-m", "benchmarks.plan_accuracy", "--only", case]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    document = json.loads(run.stdout.splitlines()[-1])
    assert abs(document["rows"][0]["error"]) <= document["tolerance"] == 0.15, run.stdout
