"""The contract of every engine, for every engine that can run here, and further promises of the
engines in our own process.

A new file in src/reftune/engines joins automatically. `scripted` draws nothing, so only order,
length and the shape of a completion are tested for it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from reftune.engines import kv
from reftune.engines.kv import Drawn, Kv, Reader, reader
from reftune.model.batch import token_batch
from reftune.model.encoder import StopRule
from reftune.model.policy import Policy
from reftune.recipe import LoraTable, known_kinds, load_component
from reftune.types import Completion, SamplingParams

KINDS = known_kinds("engines")
SAMPLING = [kind for kind in KINDS if kind != "scripted"]
SETTINGS: dict[str, dict[str, Any]] = {
    "scripted": {"texts": ["wa wb", "wa"]},
    "vllm": {"eager": True},
}
SMALL: dict[str, list[dict[str, Any]]] = {
    "kv": [{"batch_size": 1}, {"batch_size": 3, "refill": 1.0}, {"batch_size": 4, "refill": 0.01}]
}
"""Settings under which requests share batches in different ways."""

PROMPTS = [
    [3, 4, 5, 6, 7, 8, 9, 10, 11],
    [12, 13],
    [5, 6, 7],
    [3, 4, 5, 6, 7, 8, 9, 10, 11],
    [20, 9, 8, 7, 6, 5],
    [4],
    [13, 14],
]
FAMILIES = [
    "llama",
    "phi3",
    "mistral, window of 5",
    "qwen3, tied",
    "gpt2",
    "opt",
    "codegen",
    "gptneox",
]
NOT_ON = {"vllm": set(FAMILIES) - {"llama", "qwen3, tied", "gpt2"}}
"""Families that an engine rejects, or that test nothing new and would each need their own start of
vLLM.
"""
ONE_HEAD = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}


def make(kind: str, **settings: Any) -> Any:
    """The engine, or a skip if its package is not installed."""
    if kind == "vllm":
        pytest.importorskip("vllm")
    importlib.import_module(f"reftune.engines.{kind}")
    engine = load_component({"kind": kind, **SETTINGS.get(kind, {}), **settings}, group="engines")
    if getattr(engine, "needs_gpu", False) and not torch.cuda.is_available():
        pytest.skip(f"engine {kind} needs an accelerator")
    return engine


@pytest.fixture(params=KINDS)
def engine(request) -> Any:
    return make(request.param)


@pytest.fixture(params=SAMPLING)
def sampler(request) -> Any:
    return make(request.param)


@pytest.fixture
def make_policy(make_policy) -> Callable[..., Policy]:
    """As in all tests, except that with vLLM heads have size 32, the smallest that its kernels
    accept."""
    if importlib.util.find_spec("vllm") is None:
        return make_policy

    def make_wide(family: str, **changes: Any) -> Policy:
        return make_policy(family, **({"n_head": 1} if family == "gpt2" else ONE_HEAD), **changes)

    return make_wide


@pytest.fixture
def policy(make_policy) -> Policy:
    return make_policy("llama")


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 12, "seed": 3, **changes})


def ids(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


def with_eos(policy: Policy, logit: float) -> Policy:
    """The policy with its eos logit set to a number: a large one ends answers soon."""
    with torch.no_grad():
        weight = policy.model.lm_head.weight
        weight[1] = 0
    policy.model.lm_head.bias = torch.nn.Parameter(
        torch.zeros(len(weight)).index_fill(0, torch.tensor([1]), logit)
    )
    return policy


def without_eos(policy: Policy) -> Policy:
    """The policy without an end token."""
    policy.stop = StopRule(ids=frozenset())
    return policy


def skip_missing(engine: Any, family: str) -> None:
    if family in NOT_ON.get(engine.kind, ()):
        pytest.skip(f"{engine.kind}: no {family}")


# --- every engine ---------------------------------------------------------------------------------


def test_every_prompt_gets_one_completion_of_its_own_kind(engine, policy):
    completions = engine.generate(policy, PROMPTS, params())
    assert len(completions) == len(PROMPTS)
    for completion in completions:
        assert 1 <= len(completion.token_ids) == len(completion.logprobs) <= 12
        assert completion.text == policy.decode(completion.token_ids)
        assert all(logprob <= 0 for logprob in completion.logprobs)


def test_no_prompt_gets_no_completion(engine, policy):
    assert engine.generate(policy, [], params()) == []


def test_the_eos_ends_a_completion_and_is_its_last_token(engine, policy):
    completions = [
        c for seed in range(4) for c in engine.generate(policy, PROMPTS, params(seed=seed))
    ]
    ended = [c for c in completions if c.finish_reason == "eos"]
    assert ended
    assert all(c.token_ids[-1] == 1 and 1 not in c.token_ids[:-1] for c in ended)
    assert all(
        1 not in c.token_ids and len(c.token_ids) == 12
        for c in completions
        if c.finish_reason == "length"
    )


def test_a_completion_ends_at_every_end_token_and_stop_text(sampler, policy):
    without_eos(policy)
    greedy = params(temperature=0)
    whole = [c.token_ids for c in sampler.generate(policy, PROMPTS, greedy)]
    rule = StopRule(
        ids=frozenset({whole[0][4], whole[1][7]}), texts=(policy.decode(whole[2][5:7]).strip(),)
    )
    policy.stop = rule
    ended = sampler.generate(policy, PROMPTS, greedy)
    lengths = [rule.length(tokens, policy.decode) for tokens in whole]
    assert [c.token_ids for c in ended] == [
        t[:length] for t, length in zip(whole, lengths, strict=True)
    ]
    assert all(len(c.logprobs) == len(c.token_ids) for c in ended)
    assert ended[2].finish_reason == "stop" and rule.texts[0] not in ended[2].text
    assert all(c.finish_reason == "eos" for c in ended if c.token_ids[-1] in rule.ids)
    assert ended[0].finish_reason == "eos"


def test_the_limit_on_new_tokens_is_the_finish_reason_length(engine, policy):
    completions = engine.generate(without_eos(policy), PROMPTS, params(max_new_tokens=1))
    assert {(len(c.token_ids), c.finish_reason) for c in completions} == {(1, "length")}


def test_a_call_is_repeated_exactly(engine, policy):
    assert engine.generate(policy, PROMPTS, params()) == engine.generate(policy, PROMPTS, params())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_policy_is_as_before(engine, make_policy, training):
    policy = make_policy("phi3", resid_pdrop=0.5, embd_pdrop=0.5)
    quiet = engine.generate(policy, PROMPTS, params())
    policy.train(training)
    assert engine.generate(policy, PROMPTS, params()) == quiet
    assert policy.training is training and policy.model.training is training
    assert all(p.requires_grad and p.grad is None for p in policy.parameters())


def test_the_global_generator_is_left_alone(engine, policy):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    engine.generate(policy, PROMPTS, params())
    assert torch.equal(torch.rand(1), expected)


# --- engines that sample --------------------------------------------------------------------------


def test_another_seed_gives_other_tokens(sampler, policy):
    drawn = {tuple(ids(sampler.generate(policy, PROMPTS, params(seed=seed)))) for seed in range(4)}
    assert len(drawn) == 4


def test_equal_prompts_are_drawn_apart(sampler, policy):
    drawn = ids(sampler.generate(without_eos(policy), [PROMPTS[0]] * 6, params()))
    assert len(set(drawn)) == 6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_does_not_depend_on_its_neighbours(sampler, policy, temperature):
    together = ids(sampler.generate(policy, PROMPTS, params(temperature=temperature)))
    others = [[21], [22] * 15, PROMPTS[2], [3, 9], [9] * 3, [8], [7, 7]]
    among_others = ids(sampler.generate(policy, others, params(temperature=temperature)))
    assert among_others[2] == together[2]
    assert (
        ids(sampler.generate(policy, PROMPTS[:1], params(temperature=temperature))) == together[:1]
    )
    assert (
        ids(sampler.generate(policy, PROMPTS[:4], params(temperature=temperature))) == together[:4]
    )


def test_completions_are_in_the_order_of_the_prompts(sampler, policy):
    greedy = params(temperature=0)
    order = [4, 2, 0, 6, 1, 5, 3]
    straight = ids(sampler.generate(policy, PROMPTS, greedy))
    assert len(set(straight)) == 6  # two of the seven prompts are equal
    assert ids(sampler.generate(policy, [PROMPTS[i] for i in order], greedy)) == [
        straight[i] for i in order
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_log_probabilities_are_those_the_policy_computes(
    sampler, make_policy, family, temperature
):
    # also for absolute positions (gpt2, opt), which padding would shift
    skip_missing(sampler, family)
    policy = make_policy(family)
    completions = sampler.generate(policy, PROMPTS, params(temperature=temperature))
    assert max(len(c.token_ids) for c in completions) > 6
    batch = token_batch(PROMPTS, ids(completions))
    recomputed = policy.score(batch, temperature=temperature).logprobs
    reported = batch.unflatten(
        torch.tensor([logprob for c in completions for logprob in c.logprobs])
    )
    assert_close(reported, recomputed, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_is_that_of_transformers(sampler, make_policy, family):
    skip_missing(sampler, family)
    policy = make_policy(family)
    ours = ids(sampler.generate(policy, PROMPTS, params(temperature=0)))
    for prompt, found in zip(PROMPTS, ours, strict=True):
        tokens = torch.tensor([prompt])
        theirs = policy.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=1,
            pad_token_id=0,
        )
        assert tuple(theirs[0, len(prompt) :].tolist()) == found


def next_distribution(policy: Policy, prompt: list[int], temperature: float) -> torch.Tensor:
    with torch.no_grad():
        return (policy.model(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature).softmax(
            -1
        )


def test_greedy_log_probabilities_are_of_the_untempered_distribution(sampler, policy):
    (completion,) = sampler.generate(policy, PROMPTS[:1], params(temperature=0, max_new_tokens=1))
    distribution = next_distribution(policy, PROMPTS[0], 1.0)
    assert completion.logprobs[0] == pytest.approx(float(distribution.max().log()), abs=1e-5)


CHI_SQUARE_999 = {32: 62.49, 31: 61.10, 4: 18.47}
"""Degrees of freedom → the value that a chi-square variable exceeds once in 1000."""


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_tokens_follow_the_distribution(sampler, make_policy, temperature):
    policy = make_policy("llama", sharpness=1.5)
    count = 2500
    drawn = Counter(
        t
        for (t,) in ids(
            sampler.generate(
                policy, [PROMPTS[0]] * count, params(temperature=temperature, max_new_tokens=1)
            )
        )
    )
    expected = count * next_distribution(policy, PROMPTS[0], temperature)
    assert len(expected) == 33 and float(expected.min()) > 5
    statistic = sum((drawn[token] - float(e)) ** 2 / float(e) for token, e in enumerate(expected))
    assert statistic < CHI_SQUARE_999[32]


def test_later_tokens_follow_the_distribution_given_the_earlier_ones(sampler, make_policy):
    # draws of successive tokens must be independent: among sequences that begin alike, the next
    # token has its own distribution
    policy = without_eos(make_policy("llama", sharpness=1.5))
    drawn = ids(sampler.generate(policy, [PROMPTS[0]] * 2000, params(max_new_tokens=2)))
    first, count = Counter(a for a, _ in drawn).most_common(1)[0]
    expected = count * next_distribution(policy, [*PROMPTS[0], first], 1.0)
    seconds = Counter(b for a, b in drawn if a == first)
    # the likeliest 4 tokens and the rest
    top = expected.topk(4).indices.tolist()
    cells = [(seconds[t], float(expected[t])) for t in top]
    cells.append((count - sum(n for n, _ in cells), count - sum(e for _, e in cells)))
    assert sum((n - e) ** 2 / e for n, e in cells) < CHI_SQUARE_999[4]


def test_top_k_keeps_the_k_likeliest_and_renormalises(sampler, make_policy):
    policy = make_policy("llama", sharpness=1.5)
    completions = sampler.generate(
        policy, [PROMPTS[0]] * 300, params(top_k=3, max_new_tokens=1, temperature=1.3)
    )
    distribution = next_distribution(policy, PROMPTS[0], 1.3)
    top = distribution.topk(3)
    assert {t for (t,) in ids(completions)} == set(top.indices.tolist())
    for completion in completions:
        expected = distribution[completion.token_ids[0]] / top.values.sum()
        assert completion.logprobs[0] == pytest.approx(float(expected.log()), abs=1e-5)


def test_top_k_of_one_is_greedy(sampler, policy):
    assert ids(sampler.generate(policy, PROMPTS, params(top_k=1))) == ids(
        sampler.generate(policy, PROMPTS, params(temperature=0))
    )


@pytest.mark.parametrize("top_p", [0.3, 0.6])
def test_top_p_keeps_the_smallest_set_that_holds_p_and_renormalises(sampler, make_policy, top_p):
    policy = make_policy("llama", sharpness=1.5)
    completions = sampler.generate(
        policy, [PROMPTS[0]] * 600, params(top_p=top_p, max_new_tokens=1)
    )
    ordered, order = next_distribution(policy, PROMPTS[0], 1.0).sort(descending=True)
    size = int((ordered.cumsum(0) < top_p).sum()) + 1  # the token that crosses p stays
    assert 1 < size < 33
    assert {t for (t,) in ids(completions)} == set(order[:size].tolist())
    total = float(ordered[:size].sum())
    for completion in completions:
        rank = order.tolist().index(completion.token_ids[0])
        assert completion.logprobs[0] == pytest.approx(
            float((ordered[rank] / total).log()), abs=1e-5
        )


# --- engines in our own process -------------------------------------------------------------------


class Forwards:
    """Records rows and columns of every forward pass of the default engine, the rows' length so far
    and the last position that is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.lengths: list[int] = []
        self.positions: list[int] = []

        @contextmanager
        def counting(policy: Policy) -> Iterator[Reader]:
            with reader(policy) as reads:

                def counted(tokens: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
                    self.shapes.append(tuple(tokens.shape))
                    self.lengths.append(mask.shape[1])
                    self.positions.append(int(mask.sum(1).max()) - 1)
                    return reads.forward(tokens, mask, cache)

                yield reads._replace(forward=counted)

        monkeypatch.setattr(kv, "reader", counting)

    @property
    def prefills(self) -> list[tuple[int, ...]]:
        return [shape for shape in self.shapes if shape[1] > 1]

    @property
    def decoded_rows(self) -> int:
        return sum(shape[0] for shape in self.shapes if shape[1] == 1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral, window of 5"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [(kind, settings) for kind, several in SMALL.items() for settings in several],
)
def test_how_requests_share_batches_changes_no_token(make_policy, kind, settings, family):
    policy = make_policy(family)
    together = make(kind).generate(policy, PROMPTS * 2, params())
    apart = make(kind, **settings).generate(policy, PROMPTS * 2, params())
    assert ids(apart) == ids(together)
    for one, other in zip(apart, together, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)


def test_equal_prompts_are_read_once(policy, monkeypatch):
    forwards = Forwards(monkeypatch)
    Kv().generate(
        without_eos(policy), [PROMPTS[0]] * 5 + [PROMPTS[1]] * 3, params(max_new_tokens=4)
    )
    assert forwards.prefills == [(2, 9)]
    assert forwards.decoded_rows == 3 * 8  # 4 tokens a row, the first from the prefill


def test_finished_rows_leave_the_batch(make_policy, monkeypatch):
    policy = with_eos(make_policy("llama", sharpness=1.5), 1.9)
    forwards = Forwards(monkeypatch)
    completions = Kv().generate(policy, [[i, i] for i in range(3, 30)], params(max_new_tokens=40))
    lengths = sorted(len(c.token_ids) for c in completions)
    assert lengths[-1] > 2 * lengths[len(lengths) // 2]  # one row is much longer
    # every token but a row's first costs one row of one pass, and the last one is not read; an
    # eighth may be done rows
    live = sum(lengths) - len(lengths)
    assert live <= forwards.decoded_rows <= live * 8 / 7


def test_waiting_prompts_take_the_place_of_finished_rows(make_policy, monkeypatch):
    policy = with_eos(make_policy("llama", sharpness=1.5), 1.9)
    prompts = [[i, i] for i in range(3, 30)]
    forwards = Forwards(monkeypatch)
    completions = Kv(batch_size=9, refill=0.25).generate(policy, prompts, params(max_new_tokens=40))
    lengths = [len(c.token_ids) for c in completions]
    assert max(shape[0] for shape in forwards.shapes) == 9
    live = sum(lengths) - len(lengths)
    assert live <= forwards.decoded_rows <= live * 8 / 7
    # 27 prompts in rows of 9, three batches one after the other, would take the longest row of each
    in_turn = sum(max(lengths[i : i + 9]) - 1 for i in (0, 9, 18))
    assert len(forwards.shapes) - len(forwards.prefills) < 0.9 * in_turn


@pytest.mark.parametrize("family", ["gpt2", "opt", "codegen", "llama"])
def test_a_finished_row_stays_within_the_context(make_policy, monkeypatch, family):
    # Of 9 rows, the longest prompt reaches the context's end at its 8th token. The others end at
    # their 6th, and 8 new rows take their places. One finished row of 9 is less than an eighth,
    # so the first row stays for six steps after its end.
    policy = make_policy(family)
    prompts = [[7] * (policy.context - 8), *([i, i] for i in range(3, 19))]

    def ending(seed: int, position: int) -> Any:  # of equal prompts, the last are read first
        draws = [float(position > 8 and step == 6) for step in range(1, 9)]
        return SimpleNamespace(random=lambda length: np.array(draws))

    def draw(logits: Any, uniforms: Any, *_: Any, **__: Any) -> Drawn:
        tokens = torch.where(uniforms > 0.5, 1, 5)  # 1 is the end token
        return Drawn(tokens, torch.zeros(len(tokens)), torch.zeros(len(tokens)))

    forwards = Forwards(monkeypatch)
    monkeypatch.setattr(kv, "generator", ending)
    monkeypatch.setattr(kv, "draw_tokens", draw)
    completions = Kv(batch_size=9).generate(policy, prompts, params(max_new_tokens=8))
    assert [len(c.token_ids) for c in completions] == [8] * 9 + [6] * 8
    assert forwards.shapes[-1] == (9, 1), "the finished row left early; the test shows nothing"
    assert max(forwards.positions) < policy.context


def test_columns_that_no_row_needs_any_more_are_dropped(policy, monkeypatch):
    # a long prompt that ends at once must not leave its length to the others
    forwards = Forwards(monkeypatch)
    seed = next(
        s
        for s in range(50)
        if len(Kv().generate(policy, [[3] * 30], params(seed=s, max_new_tokens=2))[0].token_ids)
        == 1
    )
    forwards.lengths.clear()
    completions = Kv().generate(policy, [[3] * 30, [4, 5]], params(seed=seed, max_new_tokens=4))
    assert len(completions[0].token_ids) == 1 < len(completions[1].token_ids)
    assert forwards.lengths[:2] == [30, 3]


LORA = LoraTable(rank=4)


def own_scores(policy: Policy, completions: list[Completion], prompts: list[list[int]]) -> Any:
    """The engine's log-probabilities, values and entropies as `Policy.score` lays them out."""
    batch = token_batch(prompts, ids(completions))
    columns = zip(*((c.logprobs, c.values, c.entropies) for c in completions), strict=True)
    return [batch.unflatten(torch.tensor([x for row in column for x in row])) for column in columns]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *[(family, {}) for family in FAMILIES if "window" not in family],
        ("gpt2", {"lora": LORA}),
        ("llama", {"lora": LORA}),
        ("phi3", {"resid_pdrop": 0.5, "embd_pdrop": 0.5}),
    ],
)
def test_the_default_engine_scores_what_it_samples_as_the_policy_does(
    make_policy, family, changes, temperature
):
    # eleven rows a batch: some end early, others are cut off, others join later
    policy = make_policy(family, **changes)
    if policy.is_lora:  # fresh adapters change nothing
        draw = torch.Generator().manual_seed(0)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=draw)
    prompts = PROMPTS * 4
    found = Kv(batch_size=11).generate(policy.train(), prompts, params(temperature=temperature))
    assert {c.finish_reason for c in found} == {"eos", "length"}
    assert len({len(c.token_ids) for c in found}) > 3
    scores = policy.score(token_batch(prompts, ids(found)), temperature=temperature)
    for ours, expected in zip(own_scores(policy, found, prompts), scores, strict=True):
        assert_close(ours, expected, atol=2e-5, rtol=0)


def test_a_completion_ends_with_all_its_scores(policy):
    columns = [3, 4, 1, 5], [-0.1, -0.2, -0.3, -0.4], [1.0, 2.0, 3.0, 4.0], [0.5, 0.6, 0.7, 0.8]
    found = policy.completion(*columns)
    assert [found.token_ids, found.logprobs, found.values, found.entropies] == [
        tuple(column[:3]) for column in columns
    ]


@pytest.mark.parametrize(
    ("family", "changes", "drawn"),
    [
        ("llama", {"dtype": torch.bfloat16}, {}),
        ("mistral, window of 5", {}, {}),
        ("llama", {}, {"temperature": 0.0}),
        ("llama", {}, {"top_k": 5}),
        ("llama", {}, {"top_p": 0.9}),
    ],
)
def test_the_default_engine_gives_no_values_where_the_policy_might_find_others(
    make_policy, family, changes, drawn
):
    completions = Kv().generate(make_policy(family, **changes), PROMPTS, params(**drawn))
    assert all(c.values == c.entropies == () and c.logprobs for c in completions)


def test_a_value_model_of_its_own_is_not_read_by_the_engine(policy):
    policy.separate_value_model()
    assert not any(c.values for c in Kv().generate(policy, PROMPTS, params()))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_bfloat16_generates_under_the_arithmetic_of_training(make_policy, family):
    policy = make_policy(family, dtype=torch.bfloat16)
    completions = Kv().generate(policy, PROMPTS, params())
    batch = token_batch(PROMPTS, ids(completions))
    recomputed = policy.score(batch).logprobs
    reported = batch.unflatten(
        torch.tensor([logprob for c in completions for logprob in c.logprobs])
    )
    assert float((reported - recomputed).abs().mean()) < 0.05
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_scripted_gives_its_completions_in_turn(policy):
    completions = make("scripted").generate(policy, PROMPTS[:3], params())
    assert [c.text for c in completions] == ["wa wb", "wa", "wa wb"]
    assert [c.finish_reason for c in completions] == ["eos"] * 3
    (cut,) = make("scripted").generate(policy, PROMPTS[:1], params(max_new_tokens=1))
    assert (cut.text, cut.finish_reason, len(cut.token_ids)) == ("wa", "length", 1)
