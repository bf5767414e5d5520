"""Intervals and tests against published values and hand computation."""

from __future__ import annotations

import numpy as np
import pytest

from reftune.results import stats


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("num_correct", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_matches_newcombe_1998_table_1(
    num_correct: int, n: int, low: float, high: float
) -> None:
    assert stats.wilson(num_correct, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_of_all_correct_mirrors_none_correct() -> None:
    low, high = stats.wilson(0, 20)
    assert stats.wilson(20, 20) == pytest.approx((1 - high, 1 - low))


def test_wilson_of_nothing_knows_nothing() -> None:
    assert stats.wilson(0, 0) == (0.0, 1.0)


def test_mcnemar_counts_coin_tosses() -> None:
    # five tosses, none for b: 2 · C(5,0) / 2⁵ = 2/32
    assert stats.mcnemar_exact(5, 0) == 2 / 32
    # 2 · (C(10,0) + C(10,1) + C(10,2)) / 2¹⁰ = 2 · 56 / 1024
    assert stats.mcnemar_exact(8, 2) == 112 / 1024
    assert stats.mcnemar_exact(2, 8) == 112 / 1024


def test_mcnemar_of_an_even_split_is_one() -> None:
    # 2 · (1 + 4 + 6) / 16 > 1 is capped
    assert stats.mcnemar_exact(2, 2) == 1.0
    assert stats.mcnemar_exact(0, 0) == 1.0


def test_mcnemar_stays_exact_where_floats_underflow() -> None:
    # 2 / 2¹⁰⁷⁰ = 2⁻¹⁰⁶⁹ is below the smallest normal float and still representable
    assert stats.mcnemar_exact(1070, 0) == 2.0**-1069
    assert stats.mcnemar_exact(3000, 3000) == 1.0


def test_compare_counts_what_only_one_method_solved() -> None:
    # of 8 problems: both 3, only a 4, only b 0, neither 1: difference 4/8; p = 2/2⁴
    a = [True] * 7 + [False]
    b = [True] * 3 + [False] * 5
    result = stats.compare("a", a, "b", b, generator=generator())
    assert (result.difference, result.p_mcnemar, result.n) == (0.5, 0.125, 8)
    assert result.ci95[0] < 0.5 < result.ci95[1]
    assert not result.significant


def test_paired_bootstrap_approaches_the_normal_interval() -> None:
    # 400 problems: +1 on 80, −1 on 40, 0 on 280: mean .1, variance (120/400) − .01 = .29, se =
    # √(.29/400) = .02693
    a = np.repeat([1, 0, 0], [80, 40, 280])
    b = np.repeat([0, 1, 0], [80, 40, 280])
    interval = stats.paired_bootstrap(a, b, generator=generator())
    assert interval == pytest.approx((0.1 - 1.96 * 0.02693, 0.1 + 1.96 * 0.02693), abs=0.003)


def test_paired_bootstrap_uses_the_pairing() -> None:
    # equal outcomes differ nowhere, however noisy each is
    outcomes = generator().integers(2, size=100)
    assert stats.paired_bootstrap(outcomes, outcomes, generator=generator()) == (0.0, 0.0)


def test_a_bootstrap_is_a_function_of_its_generator() -> None:
    a, b = np.repeat([1, 0], [30, 70]), np.repeat([1, 0], [20, 80])
    assert stats.paired_bootstrap(a, b, generator=generator()) == stats.paired_bootstrap(
        a, b, generator=generator()
    )


def test_crossed_bootstrap_is_wider_where_problems_are_shared() -> None:
    # four seeds with the same outcomes carry no more information than one: the interval must not
    # shrink by √4
    row = np.repeat([1.0, 0.0], [50, 50])
    one = stats.crossed_bootstrap(row[None], generator=generator())
    four = stats.crossed_bootstrap(np.tile(row, (4, 1)), generator=generator())
    assert four == pytest.approx(one, abs=0.01)
    # problems of their own: se = √(.25/400) = .025 instead of √(.25/100) = .05
    nested = stats.hierarchical_bootstrap([row] * 4, generator=generator())
    assert nested == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.006)


def test_hierarchical_bootstrap_sees_the_spread_between_seeds() -> None:
    # seeds without noise of their own, two at 0 and two at 1: the mean of 4 draws, sd = √(.25/4) =
    # .25
    low, high = stats.hierarchical_bootstrap(
        [np.zeros(9), np.zeros(9), np.ones(9), np.ones(9)], generator=generator()
    )
    assert (low, high) == (0.0, 1.0)  # 4 equal draws have chance 2/16 > 5%
    assert stats.hierarchical_bootstrap(
        [np.full(9, 0.3)] * 4, generator=generator()
    ) == pytest.approx((0.3, 0.3))


def test_a_turned_comparison_is_that_of_the_other_method() -> None:
    a, b = [[1, 1, 1, 0], [1, 1, 0, 0]], [[1, 0, 0, 0], [0, 1, 0, 0]]
    one = stats.compare("a", a[0], "b", b[0], generator=generator())
    turned = one.turned()
    assert (turned.a, turned.b, turned.difference) == ("b", "a", -0.5)
    assert turned.ci95 == (-one.ci95[1], -one.ci95[0]) and turned.p_mcnemar == one.p_mcnemar
    seeds = stats.compare_over_seeds("a", a, "b", b, same_problems=True, generator=generator())
    assert seeds.turned().by_seed == (-0.5, -0.25)


def test_no_difference_is_no_difference_turned_round() -> None:
    same = stats.compare("a", [1, 0], "b", [1, 0], generator=generator()).turned()
    assert str((same.difference, *same.ci95)) == "(0.0, 0.0, 0.0)"


def test_seed_comparison_averages_paired_differences() -> None:
    # seed 0: 3/4 − 1/4 = .5; seed 1: 2/4 − 2/4 = 0; mean .25
    a = [[1, 1, 1, 0], [1, 1, 0, 0]]
    b = [[1, 0, 0, 0], [0, 0, 1, 1]]
    result = stats.compare_over_seeds("a", a, "b", b, same_problems=True, generator=generator())
    assert (result.difference, result.by_seed, result.n) == (0.25, (0.5, 0.0), 4)
    assert not result.significant


def test_seed_comparison_knows_whether_problems_are_shared() -> None:
    # four seeds with one pattern of wins and losses: shared problems carry as much information as
    # one seed, separate ones four times as much
    a, b = [np.repeat([1, 0, 1], [30, 20, 50])] * 4, [np.repeat([0, 1, 1], [30, 20, 50])] * 4
    widths = []
    for same_problems in (True, False):
        result = stats.compare_over_seeds(
            "a", a, "b", b, same_problems=same_problems, generator=generator()
        )
        widths.append(result.ci95[1] - result.ci95[0])
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.1)


def test_seed_comparison_is_significant_when_every_seed_gains() -> None:
    a, b = [np.ones(50)] * 3, [np.repeat([1, 0], [20, 30])] * 3
    for same_problems in (True, False):
        assert stats.compare_over_seeds(
            "a", a, "b", b, same_problems=same_problems, generator=generator()
        ).significant
