"""Memory savers change nothing else: a base in the compute dtype or in 4 bits, recomputed blocks,
optimizer state in 8 bits; each alone and in pairs."""

from __future__ import annotations

import copy
import weakref
from itertools import combinations
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from reftune.engines.kv import Kv
from reftune.errors import ModelError, RecipeError
from reftune.model import layers
from reftune.model.batch import token_batch
from reftune.model.policy import Policy
from reftune.recipe import LoraTable, ModelTable, parse_recipe
from reftune.runs.run import open_run
from reftune.stages.optimizer import OptimizerTable, make_optimizer
from reftune.stages.stage import Progress
from reftune.storage.files import JsonLines
from reftune.types import SamplingParams

LORA = LoraTable(rank=4, alpha=8)
BATCH = token_batch([[3, 4, 5], [6]], [[7, 8, 1], [9, 10, 11, 1]])
FAMILIES = ["llama", "llama, tied", "phi3", "gpt2", "opt", "gptneox"]
BF16 = torch.bfloat16


def rounded(model: Any) -> Any:
    """The model with weights as read from a bf16 checkpoint into fp32."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(BF16).float())
    return model


def moved(policy: Policy) -> Policy:
    """The policy with adapters that have an effect."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    policy.reset_value_head(3)
    return policy.eval()


def scores_and_gradients(policy: Policy) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    scores = policy(BATCH)
    (scores.logprobs.sum() + scores.values.square().sum()).backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert any("value_head" in name for name in gradients) and len(gradients) > 2
    return {"logprobs": scores.logprobs, "values": scores.values, **gradients}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# --- in the compute dtype -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_in_bf16_gives_the_bits_of_one_in_fp32(family, make_model, tokenizer, monkeypatch):
    model = rounded(make_model(family))
    narrow = moved(Policy(copy.deepcopy(model), tokenizer, dtype=BF16, lora=LORA))
    monkeypatch.setattr(layers, "narrow", lambda *args, **kwargs: None)
    wide = moved(Policy(model, tokenizer, dtype=BF16, lora=LORA))
    assert_same(scores_and_gradients(narrow), scores_and_gradients(wide))
    matrices = {p.dtype for name, p in narrow.named_parameters() if "base_layer.weight" in name}
    assert matrices == {BF16}
    vectors = [p.dtype for p in narrow.model.parameters() if p.dim() == 1]
    assert {*vectors, *(p.dtype for p in narrow.parameters() if p.requires_grad)} == {torch.float32}
    held = sum(p.nbytes for p in narrow.model.parameters())
    assert held < 0.75 * sum(p.nbytes for p in wide.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_reference_in_the_compute_dtype_agrees_with_the_policy(family, dtype, make_policy):
    policy = make_policy(family, dtype=dtype)
    reference = policy.make_reference()
    expected = policy.score(BATCH).logprobs
    assert torch.equal(reference.score(BATCH).logprobs, expected)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in policy.parameters())
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.neg_()
    assert torch.equal(reference.score(BATCH).logprobs, expected), "a copy"
    held = reference.model
    assert not any(p.requires_grad for p in held.parameters())
    if dtype == BF16:
        assert held.get_input_embeddings().weight.dtype == torch.float32, "bf16 would round it"
        assert sum(p.dtype == BF16 for p in held.parameters()) >= 8


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_only_answers_is_held_in_bf16_and_answers_alike(family, make_model, tokenizer):
    wide = Policy(make_model(family), tokenizer, dtype=BF16).eval()
    narrow = Policy(make_model(family), tokenizer, dtype=BF16, trained=False).eval()
    params = SamplingParams(max_new_tokens=8, seed=1)
    assert Kv().generate(narrow, [[3, 4, 5]], params) == Kv().generate(wide, [[3, 4, 5]], params)
    assert any(p.dtype == BF16 for p in narrow.model.parameters())
    narrow.verify_head()


def test_the_engine_reads_a_narrow_base_in_place(make_model, tokenizer):
    policy = moved(Policy(rounded(make_model("llama")), tokenizer, dtype=BF16, lora=LORA))
    (completion,) = Kv().generate(policy, [[3, 4, 5]], SamplingParams(max_new_tokens=8, seed=1))
    batch = token_batch([[3, 4, 5]], [completion.token_ids])
    scored = policy.score(batch).logprobs
    assert_close(torch.tensor([completion.logprobs]), scored, atol=0.1, rtol=0)


@pytest.mark.parametrize("family", ["llama, tied", "phi3", "gpt2"])
def test_a_model_over_a_narrow_base_is_saved_in_fp32_with_all_that_was_learned(
    family, make_model, tokenizer, tmp_path
):
    from transformers import AutoModelForCausalLM

    model = rounded(make_model(family))
    wide = moved(Policy(copy.deepcopy(model), tokenizer, lora=LORA))
    narrow = moved(Policy(model, tokenizer, dtype=BF16, lora=LORA))
    narrow.save(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    merged = wide.model.merge_and_unload()
    assert saved.dtype == torch.float32 and saved.config.dtype == torch.float32
    for name, value in merged.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value), name


def test_files_in_bf16_are_read_as_they_are_for_weights_that_are_not_trained(
    make_model, tokenizer, tmp_path
):
    from reftune.model.weights import load_model

    for family in FAMILIES:
        folder = tmp_path / family
        rounded(make_model(family)).to(BF16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        table = ModelTable(path=str(folder))
        stored, trained = (load_model(table, as_stored=flag)[0] for flag in (True, False))
        assert (stored.dtype, trained.dtype) == (BF16, torch.float32)
        one, other = (
            Policy(model, tokenizer, dtype=BF16, trained=False).score(BATCH)
            for model in (stored, trained)
        )
        assert torch.equal(one.logprobs, other.logprobs)


# --- in 4 bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_4_bits_agree_with_transformers_and_peft_on_the_same_weights(
    family, dtype, make_model, tokenizer, tmp_path, monkeypatch
):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # on some CPUs, bitsandbytes packs the weights of inference, which fails for layers this narrow
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    model = rounded(make_model(family))
    model.save_pretrained(tmp_path)
    policy = moved(Policy(model, tokenizer, dtype=dtype, lora=LORA, quantize="nf4"))
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    adapters = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    theirs = get_peft_model(theirs, adapters).eval()
    own = {n: p for n, p in policy.model.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(own[name])
    found = scores_and_gradients(policy)
    with policy.arithmetic():
        logits = theirs(input_ids=BATCH.tokens).logits
    logprobs = logits.float().log_softmax(-1)[:, :-1].gather(2, BATCH.tokens[:, 1:, None])[..., 0]
    total = logprobs[0, 2:5].sum() + logprobs[1, :4].sum()
    total.backward()
    tolerance = {torch.float32: 1e-4, BF16: 0.1}[dtype]
    expected = torch.zeros_like(found["logprobs"])
    expected[0, :3], expected[1, :4] = logprobs[0, 2:5], logprobs[1, :4]
    assert_close(found["logprobs"], expected.detach(), atol=tolerance, rtol=0)
    policy.zero_grad()
    policy(BATCH).logprobs.sum().backward()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            scale = float(parameter.grad.abs().max())
            assert_close(own[name].grad, parameter.grad, atol=tolerance * scale, rtol=tolerance)


def test_4_bits_take_a_third_of_bf16_and_are_decoded_in_place(make_model, tokenizer):
    wide, narrow = (
        moved(Policy(make_model("llama"), tokenizer, dtype=BF16, lora=LORA, quantize=kind))
        for kind in (None, "nf4")
    )
    held = [
        sum(p.nbytes for name, p in policy.named_parameters() if "base_layer" in name)
        for policy in (wide, narrow)
    ]
    # 4 bits per weight instead of 16, and 4 bytes of scale per 64 weights, which are not a
    # parameter
    assert held[1] == held[0] / 4
    before = {n: p.detach().clone() for n, p in narrow.named_parameters()}
    (completion,) = Kv().generate(narrow, [[3, 4, 5]], SamplingParams(max_new_tokens=8, seed=1))
    batch = token_batch([[3, 4, 5]], [completion.token_ids])
    scored = narrow.score(batch).logprobs
    assert_close(torch.tensor([completion.logprobs]), scored, atol=0.1, rtol=0)
    assert all(torch.equal(p, before[n]) for n, p in narrow.named_parameters())


def test_what_was_learned_over_4_bits_is_saved_whole_and_trained_further(make_recipe, tmp_path):
    changes: dict[str, Any] = {"model": {"lora": {"rank": 4}, "quantize": "nf4"}}
    recipe = make_recipe(stages={"reft": {"steps": 2}}, **changes)
    with open_run(recipe, Progress()) as run:
        run.train("sft")
        answering, going_on = run.models.load("warmup"), run.models.load("warmup", trained=True)
        batch = token_batch([[3, 4, 5]], [[7, 8, 1]])
        before, after = (p.score(batch).logprobs for p in (answering, going_on))
        assert_close(after, before, atol=1e-4, rtol=0)
        base = run.models.load("base", trained=True).score(batch).logprobs
        assert float((after - base).abs().max()) > 0.01, "something was learned"
        reference = going_on.make_reference()
        with torch.no_grad():
            for parameter in going_on._adapters().values():
                parameter.zero_()
        assert torch.equal(reference.score(batch).logprobs, after)
        assert_close(going_on.score(batch).logprobs, base, atol=1e-5, rtol=0)
        run.train("reft")
    rows = JsonLines(recipe.folder / "metrics.jsonl").rows()
    kl = [row["kl/reference"] for row in rows if "kl/reference" in row]
    assert abs(kl[0]) < 1e-4 < abs(kl[1])


def test_4_bits_want_adapters_and_linear_layers(make_model, tokenizer, make_recipe):
    with pytest.raises(RecipeError, match=r"quantize: .* expected model\.lora"):
        make_recipe(model={"quantize": "nf4"})
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no linear layers"):
        Policy(make_model("gpt2"), tokenizer, lora=LORA, quantize="nf4")
    assert ModelTable(path="x", lora=LORA, quantize="nf4").quantize == "nf4"


# --- computed again -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_computed_again_give_the_same_gradient_to_the_bit(family, lora, dtype, make_policy):
    plain, saving = (moved(make_policy(family, lora=lora, dtype=dtype)) for _ in range(2))
    saving.recompute_blocks()
    assert_same(scores_and_gradients(saving), scores_and_gradients(plain))


def test_a_value_model_of_its_own_computes_its_own_blocks_again(make_policy):
    plain, saving = (make_policy("llama") for _ in range(2))
    saving.recompute_blocks()
    for policy in (plain, saving):
        policy.separate_value_model()
        with torch.no_grad():
            policy.value_backbone.get_input_embeddings().weight.mul_(1.5)
    assert_same(scores_and_gradients(saving), scores_and_gradients(plain))
    reference = saving.make_reference()
    with torch.no_grad():
        plain_reference = plain.make_reference().score(BATCH)
    assert torch.equal(reference.score(BATCH).logprobs, plain_reference.logprobs)


def test_dropout_is_drawn_alike_when_blocks_are_computed_again(make_policy):
    plain, saving = (make_policy("phi3", resid_pdrop=0.3).train() for _ in range(2))
    saving.recompute_blocks()
    found = []
    for policy in (plain, saving):
        torch.manual_seed(7)
        found.append(scores_and_gradients(policy))
    assert_same(found[1], found[0])


def test_a_model_whose_blocks_are_computed_again_is_freed(make_recipe):
    with open_run(make_recipe(model={"gradient_checkpointing": True}), Progress()) as run:
        policy = run.models.take("base")
        weight = weakref.ref(next(policy.base.model.layers[0].parameters()))
        del policy
        run.models.release()
    assert weight() is None


def test_activations_of_blocks_computed_again_are_not_kept(make_policy):
    def kept(policy: Policy) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            scores = policy(token_batch([[3] * 30], [[7] * 30]))
        del scores
        weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
        return sum(size for place, size in sizes.items() if place not in weights)

    plain, saving = (make_policy("llama", num_hidden_layers=8) for _ in range(2))
    saving.recompute_blocks()
    assert kept(saving) < kept(plain) / 4


# --- 8 bits of state ------------------------------------------------------------------------------


def table(**changes: Any) -> OptimizerTable:
    return OptimizerTable(learning_rate=0.01, **changes)


def test_moments_in_8_bits_take_a_quarter_and_step_nearly_alike(make_policy):
    weights = {}
    for bits in (32, 8):
        policy = make_policy("llama", hidden_size=64, intermediate_size=128)
        start = {n: p.detach().clone() for n, p in policy.named_parameters()}
        optimizer = make_optimizer(policy, table(state_bits=bits))
        for _ in range(5):
            scores_and_gradients(policy)
            optimizer.step()
        steps = {n: (p - start[n]).detach() for n, p in policy.named_parameters()}
        held = sum(
            value.nbytes
            for parameter, state in optimizer.state.items()
            for name, value in state.items()
            if parameter.numel() >= 4096 and name not in ("step", "qmap1", "qmap2")
        )
        weights[bits] = steps, held
    (wide, wide_bytes), (narrow, narrow_bytes) = weights[32], weights[8]
    assert narrow_bytes == wide_bytes * (1 + 4 / 256) / 4, "a scale for every 256"
    for name in wide:
        if wide[name].numel() >= 4096:
            likeness = torch.cosine_similarity(wide[name].flatten(), narrow[name].flatten(), dim=0)
            assert float(likeness) > 0.97, name


# --- all of them, in a run ------------------------------------------------------------------------

SAVERS: dict[str, dict[str, Any]] = {
    "bf16 base": {"model": {"dtype": "bfloat16", "lora": {"rank": 64}}},
    "nf4": {"model": {"lora": {"rank": 64}, "quantize": "nf4"}},
    "checkpointing": {"model": {"gradient_checkpointing": True}},
    "8-bit state": {"bits": 8},
}


def metrics_of(make_trainer: Any, *savers: str) -> list[dict[str, float]]:
    """The metrics of two PPO steps."""
    model: dict[str, Any] = {"scratch": {"hidden_size": 64}}
    optimizer: dict[str, Any] = {"learning_rate": 1e-3}
    for saver in savers:
        model |= SAVERS[saver].get("model", {})
        if "bits" in SAVERS[saver]:
            optimizer["state_bits"] = SAVERS[saver]["bits"]
    stage = {"steps": 2, "value_prefit": 0, "optimizer": optimizer}
    run_dir = "-".join(savers) or "plain"
    trainer = make_trainer(stage, model=model, run_dir=f"{make_trainer.folder}/{run_dir}")
    torch.manual_seed(0)
    found = [trainer.step(n) for n in (1, 2)]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in found]


@pytest.fixture
def trainers(make_trainer, tmp_path):
    make_trainer.folder = tmp_path
    return make_trainer


@pytest.mark.parametrize("other", ["", "bf16 base", "nf4", "8-bit state"])
def test_a_run_with_checkpointing_has_the_metrics_of_one_without(trainers, other):
    others = [other] if other else []
    plain, saving = metrics_of(trainers, *others), metrics_of(trainers, *others, "checkpointing")
    assert saving == plain


@pytest.mark.parametrize("other", ["", "bf16 base", "nf4", "checkpointing"])
def test_a_run_with_8_bit_state_begins_alike_and_stays_near(trainers, other):
    others = [other] if other else []
    plain, saving = metrics_of(trainers, *others), metrics_of(trainers, *others, "8-bit state")
    first = [{k: v for k, v in run[0].items() if "/sampled" not in k} for run in (plain, saving)]
    # the first pass is before any step; later ones are after one whose moments were rounded
    for name in ("reward/mean", "policy/entropy", "kl/reference", "response/length"):
        assert first[0][name] == first[1][name]
    assert saving[0]["grad/norm"] == pytest.approx(plain[0]["grad/norm"], rel=0.1)
    assert saving[1]["policy/entropy"] == pytest.approx(plain[1]["policy/entropy"], abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("savers", list(combinations(SAVERS, 2)), ids=" + ".join)
def test_any_two_run_together_and_stop_and_go_on_to_the_same_bits(make_recipe, tmp_path, savers):
    model: dict[str, Any] = {"scratch": {"hidden_size": 64}}
    optimizer: dict[str, Any] = {"learning_rate": 1e-3}
    for saver in savers:
        model |= SAVERS[saver].get("model", {})
        if "bits" in SAVERS[saver]:
            optimizer["state_bits"] = SAVERS[saver]["bits"]
    found = []
    for name in ("straight", "stopped"):
        recipe = make_recipe(
            run_dir=str(tmp_path / name),
            model=model,
            stages={"sft": None, "reft": {"init": "base", "value_prefit": 0, "steps": 3}},
        )
        recipe = parse_recipe(
            {
                **recipe.model_dump(mode="json"),
                "stages": {"reft": {**recipe.stages["reft"].model_dump(), "optimizer": optimizer}},
            }
        )
        if name == "stopped":
            with pytest.raises(KeyboardInterrupt), open_run(recipe, Stopping()) as run:
                run.train("reft")
        with open_run(recipe, Progress()) as run:
            run.train("reft")
        rows = JsonLines(recipe.folder / "metrics.jsonl").rows()
        numbers = [{k: v for k, v in row.items() if not k.startswith("time")} for row in rows]
        weights = (recipe.folder / "stages" / "reft" / "model.safetensors").read_bytes()
        found.append((numbers, weights))
    assert found[0] == found[1]


class Stopping(Progress):
    def step(self, step: int, metrics: Any) -> None:
        if step == 2 and "reward/mean" in metrics:
            raise KeyboardInterrupt
