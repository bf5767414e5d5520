"""Token batches: which position predicts which token, padding, and parts of a batch."""

from __future__ import annotations

import pytest
import torch

from reftune.model.batch import (
    RolloutBatch,
    TokenBatch,
    micro_batches,
    own_micro_batches,
    token_batch,
)

PROMPTS = [[5, 6, 7], [8]]
RESPONSES = [[9, 1], [2, 3, 4, 1]]


def rollouts() -> RolloutBatch:
    tokens = token_batch(PROMPTS, RESPONSES)
    per_token = tokens.unflatten(torch.arange(1.0, 7.0))
    return RolloutBatch(
        tokens=tokens,
        rewards=torch.tensor([1.0, 0.1]),
        groups=torch.tensor([0, 1]),
        gold=torch.zeros(len(tokens), dtype=torch.bool),
        sampling_logprobs=per_token,
        logprobs=per_token * 10,
    )


def test_prompt_and_response_lie_side_by_side_padded_on_the_right():
    batch = token_batch(PROMPTS, RESPONSES)
    assert batch.tokens.tolist() == [[5, 6, 7, 9, 1], [8, 2, 3, 4, 1]]
    assert token_batch([[5], [5, 6]], [[1], [7, 1]]).tokens.tolist() == [[5, 1, 0, 0], [5, 6, 7, 1]]
    assert batch.lengths.tolist() == [5, 5]
    assert len(batch) == 2


def test_the_mask_is_true_on_response_tokens_and_counts_the_eos():
    assert token_batch(PROMPTS, RESPONSES).response_mask.tolist() == [
        [True, True, False, False],
        [True] * 4,
    ]


def test_each_response_token_is_predicted_by_the_position_to_its_left():
    batch = token_batch(PROMPTS, RESPONSES)
    # row 0: prompt at 0–2, response at 3 and 4, predicted from 2 (the last prompt token) and 3
    # row 1: prompt at 0, response at 1–4, predicted from 0–3
    assert [index.tolist() for index in batch.response_index()] == [
        [0, 0, 1, 1, 1, 1],
        [3, 4, 1, 2, 3, 4],
    ]
    assert [index.tolist() for index in batch.predictor_index()] == [
        [0, 0, 1, 1, 1, 1],
        [2, 3, 0, 1, 2, 3],
    ]
    assert batch.response_tokens().tolist() == [9, 1, 2, 3, 4, 1]


def test_flat_values_go_back_to_their_rows():
    batch = token_batch(PROMPTS, RESPONSES)
    assert batch.unflatten(torch.arange(1.0, 7.0)).tolist() == [[1, 2, 0, 0], [3, 4, 5, 6]]


def test_unflattened_values_carry_gradients():
    values = torch.arange(1.0, 7.0, requires_grad=True)
    (
        token_batch(PROMPTS, RESPONSES).unflatten(values) * torch.tensor([[2.0] * 4, [3.0] * 4])
    ).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [2, 2, 3, 3, 3, 3]


def test_a_prompt_without_tokens_is_our_own_mistake():
    with pytest.raises(AssertionError, match="at least one token"):
        token_batch([[]], [[1]])


def test_chosen_rows_are_trimmed_to_their_own_longest():
    whole = token_batch([[5, 6], [7, 8, 9], [4]], [[1], [2, 3, 4, 1], [2, 1]])
    part = whole.rows(torch.tensor([2, 0]))
    assert part.tokens.tolist() == [[4, 2, 1], [5, 6, 1]]
    assert part.response_mask.tolist() == [[True, True], [True, False]]
    assert isinstance(part, TokenBatch)


def test_chosen_rollouts_keep_all_they_have_and_nothing_else():
    part = rollouts().rows(torch.tensor([0]))
    assert part.logprobs.tolist() == [[10, 20]]
    assert part.sampling_logprobs.tolist() == [[1, 2]]
    assert part.rewards.tolist() == [1.0]
    assert part.groups.tolist() == [0]
    assert part.values is None and part.advantages is None
    assert part.response_mask.shape == (1, 2)


def test_packed_tokens_lie_one_sequence_after_the_other():
    batch = token_batch([[3, 4, 5], [6], [7, 8]], [[10, 1], [11, 12, 13, 1], [1]])
    packed = batch.packed()
    assert packed.tokens.tolist() == [3, 4, 5, 10, 1, 6, 11, 12, 13, 1, 7, 8, 1]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2]
    assert packed.predictors.tolist() == [2, 3, 5, 6, 7, 8, 11]
    rows, columns = batch.predictor_index()
    assert packed.tokens[packed.predictors].tolist() == batch.tokens[rows, columns].tolist()


@pytest.mark.parametrize("count", [1, 3, 8, 11])
def test_every_packed_token_has_a_slot_beside_its_own_sequence(count):
    lengths = [3 + (5 * i) % 7 for i in range(count)]
    sequences = [[100 * i + j for j in range(length)] for i, length in enumerate(lengths)]
    packed = token_batch(
        [tokens[:1] for tokens in sequences], [tokens[1:] for tokens in sequences]
    ).packed()
    slots, is_token, order, sizes, repeats = packed.packing
    assert slots[order].tolist() == list(range(sum(lengths)))
    assert is_token.sum() == sum(lengths) and is_token[order].all() and not repeats
    assert sum(rows for rows, _ in sizes) == count and sum(
        rows * length for rows, length in sizes
    ) == len(slots)
    assert len(sizes) == (4 if count >= 8 else 1)
    start, found = 0, []
    for rows, length in sizes:
        group = slice(start, start := start + rows * length)
        for row, real in zip(
            slots[group].view(rows, length), is_token[group].view(rows, length), strict=True
        ):
            found.append(packed.tokens[row[real]].tolist())
            assert real.tolist() == sorted(real.tolist(), reverse=True), "padding is on the right"
            assert packed.positions[row[real]].tolist() == list(range(int(real.sum())))
    assert sorted(found) == sequences


def test_a_prompt_that_several_sequences_have_is_packed_once():
    batch = token_batch([[3, 4], [6], [3, 4], [3], [3, 4]], [[7, 1], [8, 1], [9], [7, 1], [5, 1]])
    packed = batch.packed()
    assert packed.tokens.tolist() == [3, 4, 7, 1, 6, 8, 1, 9, 3, 7, 1, 5, 1]
    assert packed.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 2, 0, 1, 2, 2, 3]
    assert packed.predictors.tolist() == [1, 2, 4, 5, 1, 8, 9, 1, 11]
    slots, is_read, order, ((rows, length),), repeats = packed.packing
    seen = packed.tokens[slots].view(rows, length).tolist()
    # by rising length: rows 1, 2, 3, 0, 4
    assert [row[:3] for row in seen[3:]] == [[3, 4, 7], [3, 4, 5]]
    assert is_read.sum() == 13 and slots[order].tolist() == list(range(13))
    # the second and the third sequence with the prompt 3 4, tokens 0 and 1
    assert [tokens.tolist() for tokens in repeats[::2]] == [[0, 1], [0, 1]]
    for tokens, further in zip(repeats[::2], repeats[1::2], strict=True):
        assert slots[further].equal(tokens) and not is_read[further].any()


def test_packed_micro_batches_keep_samples_of_a_prompt_together():
    prompts = [[2], [3, 3], [2], [3, 3], [4]]
    batch = token_batch(prompts, [[5], [5] * 6, [5] * 4, [5], [5, 5]])
    lengths = batch.lengths.tolist()
    assert lengths == [2, 8, 5, 3, 3]
    batches = own_micro_batches(batch, max_tokens=10, packed=True)
    assert [index.tolist() for index, _ in batches] == [[4, 0, 2], [1], [3]]
    padded = own_micro_batches(batch, max_tokens=10)
    assert [index.tolist() for index, _ in padded] == [[0, 3, 4], [2], [1]]


@pytest.mark.parametrize("longest", [5, 80])
def test_tokens_are_filled_up_by_a_sequence_that_nobody_reads(longest):
    batch = token_batch([[3, 4], [6]], [[10] * (longest - 2), [11, 1]])
    filled = batch.filled_up()
    assert filled.lengths.tolist() == [longest, 3, 56 if longest == 5 else 45]
    assert filled.tokens[:2, :longest].equal(batch.tokens) and not filled.tokens[:, longest:].any()
    assert filled.response_tokens().equal(batch.response_tokens())
    assert filled.packed().predictors.equal(batch.packed().predictors)
    assert filled.filled_up() is filled


def test_packed_micro_batches_count_tokens_and_no_padding():
    lengths = torch.tensor([9, 1, 5, 5, 2])
    assert [batch.tolist() for batch in micro_batches(lengths, max_tokens=13, packed=True)] == [
        [1, 4, 2, 3],
        [0],
    ]
    assert [batch.tolist() for batch in micro_batches(lengths, max_tokens=13)] == [
        [1, 4],
        [2, 3],
        [0],
    ]


def test_micro_batches_hold_every_sequence_once_within_the_limit():
    lengths = torch.tensor([7, 3, 9, 1, 4, 4, 20, 2])
    groups = [group.tolist() for group in micro_batches(lengths, max_tokens=16)]
    assert sorted(i for group in groups for i in group) == list(range(8))
    for group in groups:
        assert len(group) * max(int(lengths[i]) for i in group) <= 16 or len(group) == 1


def test_micro_batches_are_as_full_as_the_limit_allows():
    # sorted lengths 1 2 3 4 | 4 7 | 9 | 20: a fifth row of length 4 would make 5 · 4 = 20 > 16, a
    # third of 9 27 > 16
    lengths = torch.tensor([7, 3, 9, 1, 4, 4, 20, 2])
    assert [group.tolist() for group in micro_batches(lengths, max_tokens=16)] == [
        [3, 7, 1, 4],
        [5, 0],
        [2],
        [6],
    ]
    assert [group.tolist() for group in micro_batches(lengths, max_tokens=160)] == [
        [3, 7, 1, 4, 5, 0, 2, 6]
    ]


def test_a_sequence_over_the_limit_goes_alone():
    assert [group.tolist() for group in micro_batches(torch.tensor([30, 30]), max_tokens=1)] == [
        [0],
        [1],
    ]
