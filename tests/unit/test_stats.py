"""Intervals and tests against published values and hand computation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

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


def test_compare_counts_what_only_one_method_solved() -> None:
    # of 8 problems: both 3, only a 4, only b 0, neither 1: difference 4/8
    a = [True] * 7 + [False]
    b = [True] * 3 + [False] * 5
    result = stats.compare("a", a, "b", b)
    assert (result.difference, result.n) == (0.5, 8)
    assert result.ci95[0] < 0.5 < result.ci95[1]
    assert not result.significant


def test_the_paired_interval_is_that_of_bonett_and_price() -> None:
    # of 8 problems 4 won, none lost: n + 2 = 10, d = .4, q = (4 + 2)/10; 1.96 √(.44/10) = .4111
    assert stats.paired_interval([1, 1, 1, 1, 0, 0, 0, 0]) == pytest.approx(
        (-0.0111, 0.8111), abs=1e-4
    )
    # 400 problems, 80 won, 40 lost: nearly the normal interval, with se = √(.29/400) = .02693
    wins = np.repeat([1, -1, 0], [80, 40, 280])
    assert stats.paired_interval(wins) == pytest.approx(
        (0.1 - 1.96 * 0.02693, 0.1 + 1.96 * 0.02693), abs=0.001
    )


def test_the_p_value_belongs_to_the_paired_interval() -> None:
    # as above: d / s = .4 / √(.44/10) = 1.907, and 2 Φ(−1.907) = .0565
    assert stats.paired_p_value([1, 1, 1, 1, 0, 0, 0, 0]) == pytest.approx(0.0565, abs=1e-4)
    assert stats.paired_p_value([1, -1, 0]) == 1.0
    for wins in range(12):
        for losses in range(12):
            outcomes = np.repeat([1, -1, 0], [wins, losses, 76])
            low, high = stats.paired_interval(outcomes)
            assert (stats.paired_p_value(outcomes) < 0.05) == (low > 0 or high < 0)


@pytest.mark.parametrize("n", [10, 50, 300])
@pytest.mark.parametrize("apart", [0.05, 0.4])
def test_equal_methods_differ_significantly_in_at_most_5_percent(n: int, apart: float) -> None:
    # each problem is solved by only one method with probability `apart`, and then by either alike
    found = 0.0
    for only_one in range(n + 1):
        wins = np.arange(only_one + 1)
        p_values = [
            stats.paired_p_value(np.repeat([1, -1, 0], [won, only_one - won, n - only_one]))
            for won in wins
        ]
        chance = binom.pmf(only_one, n, apart) * binom.pmf(wins, only_one, 0.5)
        found += chance[np.array(p_values) < 0.05].sum()
    assert found < 0.05
    assert n < 300 or found > 0.03  # exact McNemar: 0.027 for apart = 0.05


@pytest.mark.parametrize("difference", [-1, 0, 1])
@pytest.mark.parametrize("n", [1, 3, 1000])
def test_a_paired_interval_has_a_width_and_contains_the_difference(difference: int, n: int) -> None:
    low, high = stats.paired_interval(np.full(n, difference))
    assert -1 <= low <= difference <= high <= 1 and low < high
    turned = stats.paired_interval(np.full(n, -difference))
    assert turned == pytest.approx((-high, -low))


def test_seeds_with_problems_of_their_own_have_students_interval() -> None:
    # means .1, .2 and .3: mean .2, sd .1, t(2) = 4.3027, margin 4.3027 · .1/√3 = .2484
    seeds = [np.repeat([1.0, 0.0], [100 * k, 1000 - 100 * k]) for k in (1, 2, 3)]
    low, high = stats.seeds_interval(seeds, stats.accuracy_interval, same_problems=False)
    assert (low, high) == pytest.approx((0.2 - 0.2484, 0.2 + 0.2484), abs=1e-4)
    assert stats.accuracy_over_seeds(seeds, same_problems=False) == pytest.approx((0.0, high))


def test_an_interval_over_seeds_is_not_narrower_than_that_of_all_problems() -> None:
    row = np.repeat([1.0, 0.0], [50, 50])
    assert stats.accuracy_over_seeds([row] * 4, same_problems=False) == stats.wilson(200, 400)
    # four equal seeds with the same problems tell no more than one
    assert stats.accuracy_over_seeds([row] * 4, same_problems=True) == pytest.approx(
        stats.wilson(50, 100)
    )
    everything = [np.ones(3)] * 2
    assert stats.accuracy_over_seeds(everything, same_problems=False) == stats.wilson(6, 6)
    assert stats.accuracy_over_seeds(everything, same_problems=True) == stats.wilson(3, 3)


def test_if_problems_are_shared_their_margin_and_that_of_the_seeds_are_added_as_squares() -> None:
    # the seeds' margin is .2484 as above, and the problems' averages are 0, 1/3, 2/3 and 1
    seeds = [np.arange(1000) % 10 < k for k in (1, 2, 3)]
    low, high = stats.seeds_interval(seeds, stats.accuracy_interval, same_problems=True)
    wide = [abs(bound - 0.2) for bound in stats.wilson(200, 1000)]
    assert low == pytest.approx(0.2 - (0.2484**2 + wide[0] ** 2) ** 0.5, abs=1e-4)
    assert high == pytest.approx(0.2 + (0.2484**2 + wide[1] ** 2) ** 0.5, abs=1e-4)


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("same_problems", [True, False])
def test_equally_good_methods_rarely_differ_significantly(
    num_seeds: int, same_problems: bool
) -> None:
    # true gains of the seeds vary by 3 points around 0; 500 problems, of which a third differ
    random, found = generator(), 0
    for _ in range(400):
        gains = random.normal(0, 0.03, num_seeds)
        draws = (
            [random.random(500)] * num_seeds if same_problems else random.random((num_seeds, 500))
        )
        a = [draw < 0.16 + gain / 2 for draw, gain in zip(draws, gains, strict=True)]
        b = [draw > 0.84 + gain / 2 for draw, gain in zip(draws, gains, strict=True)]
        found += stats.compare_over_seeds("a", a, "b", b, same_problems=same_problems).significant
    assert found / 400 < 0.08  # 5% plus three standard errors of 400 draws


def test_a_turned_comparison_is_that_of_the_other_method() -> None:
    a, b = [[1, 1, 1, 0], [1, 1, 0, 0]], [[1, 0, 0, 0], [0, 1, 0, 0]]
    one = stats.compare("a", a[0], "b", b[0])
    turned = one.turned()
    assert (turned.a, turned.b, turned.difference) == ("b", "a", -0.5)
    assert turned.ci95 == (-one.ci95[1], -one.ci95[0]) and turned.p_value == one.p_value
    seeds = stats.compare_over_seeds("a", a, "b", b, same_problems=True)
    assert seeds.turned().by_seed == (-0.5, -0.25)


def test_no_difference_is_no_difference_turned_round() -> None:
    same = stats.compare("a", [1, 0], "b", [1, 0])
    assert str(same.turned().difference) == "0.0"  # not −0.0
    assert same.turned().ci95 == same.ci95


def test_seed_comparison_averages_paired_differences() -> None:
    # seed 0: 3/4 − 1/4 = .5; seed 1: 2/4 − 2/4 = 0; mean .25
    a = [[1, 1, 1, 0], [1, 1, 0, 0]]
    b = [[1, 0, 0, 0], [0, 0, 1, 1]]
    result = stats.compare_over_seeds("a", a, "b", b, same_problems=True)
    assert (result.difference, result.by_seed, result.n) == (0.25, (0.5, 0.0), 4)
    assert not result.significant


def test_seed_comparison_knows_whether_problems_are_shared() -> None:
    # four seeds with one pattern of wins and losses: shared problems carry as much information as
    # one seed, separate ones four times as much
    a, b = [np.repeat([1, 0, 1], [30, 20, 50])] * 4, [np.repeat([0, 1, 1], [30, 20, 50])] * 4
    widths = []
    for same_problems in (True, False):
        result = stats.compare_over_seeds("a", a, "b", b, same_problems=same_problems)
        widths.append(result.ci95[1] - result.ci95[0])
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.02)


def test_two_seeds_of_few_problems_prove_nothing() -> None:
    a, b = [np.ones(3)] * 2, [np.zeros(3)] * 2
    assert not stats.compare("a", a[0], "b", b[0]).significant
    assert not stats.compare_over_seeds("a", a, "b", b, same_problems=True).significant


def test_seed_comparison_is_significant_when_every_seed_gains() -> None:
    a, b = [np.ones(50)] * 3, [np.repeat([1, 0], [20, 30])] * 3
    for same_problems in (True, False):
        assert stats.compare_over_seeds("a", a, "b", b, same_problems=same_problems).significant
