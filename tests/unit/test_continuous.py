"""What transformers' continuous batching adds to the contract suite: adapters, lower precision, and
what it refuses."""

import pytest
import torch

from reftune.engines.continuous import Continuous
from reftune.errors import EngineError
from reftune.model.batch import token_batch
from reftune.recipe import LoraTable
from reftune.types import SamplingParams

PROMPTS = [[3, 4, 5, 6, 7, 8, 9, 10, 11], [12, 13], [5, 6, 7]]


def mismatch(policy):
    """Largest difference between the engine's log-probabilities and the policy's, nats."""
    completions = Continuous().generate(policy, PROMPTS, SamplingParams(max_new_tokens=12, seed=3))
    batch = token_batch(PROMPTS, [completion.token_ids for completion in completions])
    recomputed = policy.score(batch).logprobs
    reported = batch.unflatten(
        torch.tensor([logprob for c in completions for logprob in c.logprobs])
    )
    return float((reported - recomputed).abs().max())


def test_an_adapter_is_sampled_with(make_policy):
    policy = make_policy("llama", lora=LoraTable(rank=4))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert mismatch(policy) < 2e-5


def test_a_lower_precision_is_sampled_in_and_the_weights_are_not_cast(make_policy):
    policy = make_policy("llama", dtype=torch.bfloat16, sharpness=2.0)
    assert mismatch(policy) < 0.1
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    policy.score = make_policy("llama", sharpness=2.0).score  # the same weights in fp32
    assert mismatch(policy) > 1e-3  # bf16 has 8 bits of mantissa


def test_the_attention_of_the_model_is_put_back(make_policy):
    policy = make_policy("llama")
    policy.model.set_attn_implementation("eager")
    mismatch(policy)
    assert policy.model.config._attn_implementation == "eager"


def test_a_model_with_an_attention_of_its_own_is_refused_in_one_line(make_policy):
    with pytest.raises(
        EngineError,
        match=r"^engine continuous: CodeGenForCausalLM has an attention of its own; use engine=kv$",
    ):
        mismatch(make_policy("codegen"))


def test_an_error_while_generating_ends_the_call_with_its_reason(make_policy, monkeypatch):
    policy = make_policy("llama")

    def broken(**kwargs):
        raise RuntimeError("the device\nis on fire")

    monkeypatch.setattr(policy.model, "forward", broken)
    with pytest.raises(EngineError, match=r"^engine continuous: .*the device is on fire$"):
        mismatch(policy)
