"""The policy: scores, modes, reference, files. tests/parity shows that the scores are right."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch.testing import assert_close

from reftune.errors import ModelError
from reftune.model.batch import TokenBatch, token_batch
from reftune.model.encoder import Encoder
from reftune.model.policy import Policy
from reftune.model.weights import load_model
from reftune.recipe import ModelTable

PROMPTS, RESPONSES = [[3, 4, 5, 6], [7, 8], [9]], [[10, 1], [11, 12, 13, 1], [14]]


@pytest.fixture
def policy(make_policy) -> Policy:
    return make_policy("phi3", resid_pdrop=0.5, embd_pdrop=0.5)


@pytest.fixture
def batch() -> TokenBatch:
    return token_batch(PROMPTS, RESPONSES)


def test_scores_are_zero_outside_the_response(policy, batch):
    scores = policy.score(batch)
    outside = ~batch.response_mask
    for values in (scores.logprobs, scores.values, scores.entropy):
        assert values.shape == (3, 4) and values.dtype == torch.float32
        assert not values[outside].any()
        assert values[batch.response_mask].all()


def test_scoring_ignores_dropout_and_puts_the_mode_back(policy, batch):
    quiet = policy.score(batch)
    policy.train()
    assert torch.equal(policy.score(batch).logprobs, quiet.logprobs)
    assert policy.training and policy.model.training
    policy.eval()
    policy.score(batch)
    assert not policy.training


def test_a_forward_pass_in_training_mode_has_dropout_and_gradients(policy, batch):
    policy.train()
    first, second = policy(batch), policy(batch)
    assert not torch.equal(first.logprobs, second.logprobs)
    (first.logprobs.sum() + first.values.sum()).backward()
    assert all(p.grad is not None for p in policy.parameters())


def test_compiling_without_a_compiler_is_reported_in_one_line(policy, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ModelError, match="no-such-compiler was not found; install one or set CXX"):
        policy.compile_blocks()


def test_forward_and_score_agree(policy, batch):
    scored, forward = (policy.score(batch, temperature=0.7), policy(batch, temperature=0.7))
    assert_close(forward.logprobs, scored.logprobs, atol=1e-6, rtol=0)
    assert_close(forward.values, scored.values, atol=1e-6, rtol=0)
    assert forward.entropy is None


def test_scores_do_not_depend_on_how_many_rows_are_read_at_once(policy, batch, monkeypatch):
    whole = policy.score(batch)
    monkeypatch.setattr(policy, "max_tokens", 1)
    single = policy.score(batch)
    for name in ("logprobs", "values", "entropy"):
        assert_close(getattr(single, name), getattr(whole, name), atol=1e-5, rtol=0)


def test_features_are_what_the_value_head_reads(policy, batch, monkeypatch):
    for max_tokens in (1, 1000):
        monkeypatch.setattr(policy, "max_tokens", max_tokens)
        features = policy.features(batch)
        assert features.shape == (7, 32)
        values = batch.unflatten(policy.value_head(features).squeeze(-1).detach())
        assert_close(values, policy.score(batch).values, atol=1e-5, rtol=0)


def test_a_flat_distribution_has_the_entropy_and_log_probability_of_a_fair_die(
    make_policy, batch, tokenizer
):
    policy = make_policy()
    torch.nn.init.zeros_(policy.model.lm_head.weight)
    scores = policy.score(batch)
    fair = torch.where(batch.response_mask, math.log(len(tokenizer)), 0.0)
    assert_close(scores.entropy, fair)
    assert_close(scores.logprobs, -fair)


def test_temperature_flattens(policy, batch):
    cold, warm = (policy.score(batch, temperature=t).entropy for t in (0.5, 2.0))
    assert (cold < warm)[batch.response_mask].all()


# --- value head -----------------------------------------------------------------------------------


def test_a_new_value_head_predicts_zero(make_model, tokenizer, batch):
    policy = Policy(make_model("llama"), tokenizer)
    assert not policy.score(batch).values.any()


def test_a_drawn_value_head_is_a_function_of_its_seed_within_its_bounds(make_policy):
    policy = make_policy()
    heads = []
    for seed in (0, 0, 1):
        policy.reset_value_head(seed)
        heads.append(
            torch.cat([policy.value_head.weight.flatten(), policy.value_head.bias]).detach().clone()
        )
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    bound = 32**-0.5
    assert 0.8 * bound < float(heads[0].abs().max()) <= bound


def test_the_value_head_is_as_wide_as_what_the_output_embedding_reads(make_policy, batch):
    assert make_policy("opt, narrow embeddings").score(batch).values.shape == (3, 4)


# --- arithmetic -----------------------------------------------------------------------------------


def test_bfloat16_arithmetic_leaves_weights_scores_and_values_in_fp32(make_policy, batch):
    exact, policy = make_policy(), make_policy(dtype=torch.bfloat16)
    scored, forward = policy.score(batch), policy(batch)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    for scores in (scored, forward):
        assert scores.logprobs.dtype == scores.values.dtype == torch.float32
    reference = exact.score(batch).logprobs
    assert 0 < float((scored.logprobs - reference).abs().max()) < 0.3
    forward.logprobs.sum().backward()
    assert {p.grad.dtype for p in policy.model.parameters() if p.grad is not None} == {
        torch.float32
    }


def test_values_are_the_same_numbers_when_scored_and_when_trained(make_policy, batch):
    # the value head under bfloat16 would make old and new values differ before the first update
    policy = make_policy(dtype=torch.bfloat16)
    assert_close(policy.score(batch).values, policy(batch).values.detach(), atol=1e-6, rtol=0)


# --- reference ------------------------------------------------------------------------------------


def test_the_reference_stays_where_the_policy_was(make_policy, batch):
    policy = make_policy()
    reference = policy.make_reference()
    before = policy.score(batch).logprobs
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)
    assert torch.equal(reference.score(batch).logprobs, before)
    assert not torch.equal(policy.score(batch).logprobs, before)


def test_the_reference_is_read_at_the_temperature_asked_for(make_policy, batch):
    policy = make_policy()
    asked = policy.make_reference().score(batch, temperature=0.5).logprobs
    assert torch.equal(asked, policy.score(batch, temperature=0.5).logprobs)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["phi3", "gpt2", "opt", "qwen2, tied", "qwen2, untied"])
def test_a_saved_policy_comes_back_with_its_value_head(make_policy, batch, tmp_path, family):
    policy = make_policy(family)
    policy.save(tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").glob("*.safetensors")] == [
        "model.safetensors"
    ]  # vLLM loads all of them
    loaded = Policy(*load_model(ModelTable(path=str(tmp_path / "model"))))
    loaded.load_value_head(tmp_path / "model")
    expected, found = policy.score(batch), loaded.score(batch)
    assert torch.equal(found.logprobs, expected.logprobs)
    assert torch.equal(found.values, expected.values)


def test_a_model_without_adapters_is_saved_without_peft(make_policy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # an import of it fails
    make_policy().save(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_a_folder_without_a_value_head_leaves_the_head_alone(make_policy, tmp_path):
    policy = make_policy()
    before = policy.value_head.weight.detach().clone()
    policy.load_value_head(tmp_path)
    assert torch.equal(policy.value_head.weight, before)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "phi3",
        "mistral, window of 5",
        "qwen2, tied",
        "qwen3, tied",
        "gpt2",
        "opt",
        "codegen",
        "gptneox",
    ],
)
def test_models_whose_logits_are_the_head_of_the_last_state_are_accepted(make_policy, family):
    policy = make_policy(family).train()
    policy.verify_head()
    assert policy.training


def test_a_model_that_scales_its_logits_is_refused(make_policy):
    with pytest.raises(
        ModelError,
        match="GraniteForCausalLM: its logits are not its output embedding × last hidden state",
    ):
        make_policy("granite").verify_head()


def test_a_tokenizer_without_an_eos_token_is_refused(make_model, tokenizer):
    import copy

    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ModelError, match="the tokenizer has no eos token"):
        Policy(make_model("llama"), endless)
    with pytest.raises(ModelError, match="the tokenizer has no eos token"):
        Encoder(endless, format=None)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "codegen", "gptneox"])
def test_the_context_is_known_whatever_the_config_calls_it(make_policy, family):
    assert make_policy(family).context == 64


def test_long_rotary_factors_limit_the_context(make_policy):
    # beyond this length, transformers takes the factors from the longest sequence of the batch
    policy = make_policy("phi3")
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    policy.model.config.rope_parameters = {
        "rope_type": "longrope",
        "original_max_position_embeddings": 32,
        **factors,
    }
    assert policy.context == 32


def test_the_head_of_a_separate_value_model_is_not_saved(make_policy, tmp_path):
    # on the policy's own hidden states, it would predict something else
    shared, separate = make_policy("llama"), make_policy("llama")
    separate.separate_value_model()
    for policy, name in ((shared, "shared"), (separate, "separate")):
        torch.nn.init.ones_(policy.value_head.weight)
        policy.save(tmp_path / name)
    fresh = make_policy("llama")
    before = fresh.value_head.weight.clone()
    fresh.load_value_head(tmp_path / "separate")
    assert torch.equal(fresh.value_head.weight, before)
    fresh.load_value_head(tmp_path / "shared")
    assert torch.equal(fresh.value_head.weight, torch.ones_like(before))


def test_a_separate_value_model_starts_equal_and_shares_no_gradient(make_policy):
    policy = make_policy("llama")
    batch = token_batch([[3, 4, 5]], [[6, 7, 1]], device=policy.device)
    shared = policy(batch)
    policy.separate_value_model()
    separate = policy(batch)
    assert torch.equal(separate.values, shared.values) and torch.equal(
        separate.logprobs, shared.logprobs
    )
    separate.values.sum().backward()
    assert all(parameter.grad is None for parameter in policy.model.parameters())
    assert all(
        parameter.grad is not None for parameter in policy.value_backbone.layers.parameters()
    )
    assert policy.make_reference().value_backbone is None
