"""Seeds: a function of their purpose, the same in every process and version."""

from __future__ import annotations

import numpy as np

from reftune.seeds import derive_seed, endless_indices, generator


def test_a_seed_is_a_function_of_its_parts():
    assert derive_seed(0, "reft", "rollout", 1) == derive_seed(0, "reft", "rollout", 1)
    parts = [
        (0, "reft", 1),
        (0, "reft", 2),
        (1, "reft", 1),
        (0, "sft", 1),
        (0, 1, "reft"),
        (0, "reft1"),
        (0, "reft", "1"),
        ("0reft1",),
    ]
    assert len({derive_seed(*p) for p in parts}) == len(parts)


def test_seeds_stay_what_they_were():
    # another value would make every published run unrepeatable
    assert derive_seed(0, "reft", "rollout", 1) == 1965966637374111712
    assert int(generator(0, "x").integers(1000)) == 920


def test_a_seed_fits_a_signed_64_bit_integer():
    seeds = [derive_seed("seed", i) for i in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # and uses the whole range


def test_a_generator_repeats_itself_and_leaves_the_global_one_alone():
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    assert generator(1, "a").random() == generator(1, "a").random() != generator(1, "b").random()
    assert np.random.random() == expected


def test_every_epoch_visits_every_item_once_in_another_order():
    first, second, third = epochs(5, 3)
    assert sorted(first) == sorted(second) == sorted(third) == [0, 1, 2, 3, 4]
    assert len({tuple(first), tuple(second), tuple(third)}) > 1


def test_any_piece_of_the_endless_pass_can_be_had_alone():
    whole = endless_indices(7, start=0, count=40, seed=3)
    for start, count in ((0, 3), (3, 4), (5, 9), (13, 20), (7, 7), (39, 1), (11, 0)):
        assert endless_indices(7, start=start, count=count, seed=3) == whole[start : start + count]


def test_another_seed_is_another_order():
    assert endless_indices(20, start=0, count=20, seed=0) != endless_indices(
        20, start=0, count=20, seed=1
    )


def epochs(num_items: int, count: int) -> list[list[int]]:
    return [
        endless_indices(num_items, start=i * num_items, count=num_items, seed=0)
        for i in range(count)
    ]
