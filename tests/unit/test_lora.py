"""Adapters: the reference is the model without them, and the saved model is a plain one."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.testing import assert_close

from reftune.engines.kv import Kv
from reftune.errors import ModelError
from reftune.model.batch import token_batch
from reftune.model.policy import Policy
from reftune.recipe import LoraTable, ModelTable
from reftune.runs.run import open_run
from reftune.stages.optimizer import trainable
from reftune.stages.stage import Progress
from reftune.storage.files import JsonLines
from reftune.types import SamplingParams

LORA = LoraTable(rank=4, alpha=8)
BATCH = token_batch([[3, 4, 5], [6]], [[7, 8, 1], [9, 10, 11, 1]])
FAMILIES = ["llama", "phi3", "qwen2, tied", "gpt2", "opt"]


def logprobs(policy: Policy) -> torch.Tensor:
    return policy.score(BATCH).logprobs


def with_trained_adapters(policy: Policy) -> Policy:
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return policy


def test_no_warning_of_an_unused_kernel_is_shown(make_policy, caplog):
    # on processors with avx512_bf16, importing PEFT makes bitsandbytes warn
    make_policy(lora=LORA)
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load gemm_4bit_forward")
    assert not caplog.records


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapters_change_nothing(make_policy, family):
    assert_close(
        logprobs(make_policy(family, lora=LORA)), logprobs(make_policy(family)), atol=1e-6, rtol=0
    )


def test_only_adapters_and_the_value_head_are_trained(make_policy):
    names = trainable(make_policy(lora=LORA))
    assert all("lora_" in name or "value_head" in name for name in names)
    assert (
        sum("lora_" in name for name in names) == 2 * 2 * 7
    )  # A and B of 7 linear layers in each of 2 blocks


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_the_model_without_adapters(make_policy, family):
    policy, base = make_policy(family, lora=LORA), make_policy(family)
    reference = policy.make_reference()
    assert torch.equal(
        reference.score(BATCH).logprobs, logprobs(policy)
    )  # KL 0 before the first step
    with_trained_adapters(policy)
    assert_close(reference.score(BATCH).logprobs, logprobs(base), atol=1e-6, rtol=0)
    moved = logprobs(policy)
    assert float((moved - logprobs(base)).abs().max()) > 0.1
    assert torch.equal(logprobs(policy), moved)  # the adapters are on again


def test_the_first_step_has_no_kl_and_a_later_one_does(make_trainer):
    trainer = make_trainer(
        {"steps": 3, "value_prefit": 0, "optimizer": {"learning_rate": 0.02}},
        model={"lora": {"rank": 4}},
    )
    assert abs(trainer.step(1)["kl/reference"]) < 1e-4  # rounding: the engine scored the policy
    assert abs(trainer.step(2)["kl/reference"]) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_model_is_merged_and_plain(make_policy, tmp_path, family):
    from transformers import AutoModelForCausalLM

    policy = with_trained_adapters(make_policy(family, lora=LORA))
    before = logprobs(policy)
    policy.save(tmp_path)
    assert torch.equal(logprobs(policy), before) and policy.is_lora  # saving changes nothing
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.tensor([[3, 4, 5, 7, 8, 9]])
    with torch.no_grad():
        assert_close(
            model(tokens).logits, policy.model(input_ids=tokens).logits, atol=2e-5, rtol=1e-4
        )
    assert not any("lora" in name for name in model.state_dict())
    assert not list(tmp_path.glob("adapter_*"))


@pytest.mark.parametrize(
    ("family", "module", "other"),
    [
        ("llama, tied", "embed_tokens", "lm_head"),
        ("llama, tied", "lm_head", "model.embed_tokens"),
        ("gpt2", "wte", "lm_head"),
    ],
)
def test_an_adapter_on_a_tied_embedding_is_refused(make_policy, family, module, other):
    # merged into the shared weight, it would change the layer without an adapter too
    with pytest.raises(ModelError, match=rf"{module} shares its weight with {other}, so"):
        make_policy(family, lora=LoraTable(rank=4, target_modules=[module]))


def test_an_adapter_on_an_embedding_that_is_not_tied_is_merged(make_policy, tmp_path):
    from reftune.model.weights import load_model

    table = LoraTable(rank=4, target_modules=["embed_tokens", "lm_head"])
    policy = with_trained_adapters(make_policy("qwen2, untied", lora=table))
    policy.save(tmp_path)
    loaded = Policy(*load_model(ModelTable(path=str(tmp_path)))).eval()
    assert_close(logprobs(loaded), logprobs(policy), atol=2e-5, rtol=0)


def test_an_engine_samples_with_the_adapters_on(make_policy):
    policy = with_trained_adapters(make_policy(lora=LORA))
    (completion,) = Kv().generate(policy, [[3, 4, 5]], SamplingParams(max_new_tokens=8, seed=1))
    batch = token_batch([[3, 4, 5]], [completion.token_ids])
    assert_close(
        torch.tensor([completion.logprobs]), policy.score(batch).logprobs, atol=2e-5, rtol=0
    )


class Stopping(Progress):
    def step(self, step, metrics):
        if step == 3 and "reward/mean" in metrics:
            raise KeyboardInterrupt


def test_training_with_adapters_is_repeatable_and_goes_on_to_the_same_bits(make_recipe, tmp_path):
    found = []
    for name, stop in (("straight", False), ("again", False), ("stopped", True)):
        recipe = make_recipe(
            run_dir=str(tmp_path / name),
            model={"lora": {"rank": 4, "dropout": 0.1}},
            stages={"sft": None, "reft": {"init": "base"}},
        )
        if stop:
            with pytest.raises(KeyboardInterrupt), open_run(recipe, Stopping()) as run:
                run.train("reft")
        torch.manual_seed(len(found))  # initial adapters must not depend on earlier random numbers
        with open_run(recipe, Progress()) as run:
            run.train("reft")
        rows = JsonLines(recipe.folder / "metrics.jsonl").rows()
        numbers = [
            {key: value for key, value in row.items() if not key.startswith("time")} for row in rows
        ]
        found.append(
            (numbers, (recipe.folder / "stages" / "reft" / "model.safetensors").read_bytes())
        )
    assert found[0] == found[1]
    assert found[0] == found[2]
