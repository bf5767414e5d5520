"""Intervals and paired tests. Pure; every random number comes from a generator argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z_95 = 1.959963984540054
"""The standard normal's 97.5 % quantile."""

NUM_RESAMPLES = 10_000

Interval = tuple[float, float]


# --- one method -----------------------------------------------------------------------------------


def wilson(num_correct: int, n: int) -> Interval:
    """95 % interval of a share.

        (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n),   p = num_correct / n

    Source: Wilson (1927); Newcombe (1998), method 3. (0, 1) where n is 0: nothing was seen.
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = num_correct / n, Z_95**2
    centre = p + z2 / (2 * n)
    margin = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2))
    return max(0.0, (centre - margin) / (1 + z2 / n)), min(1.0, (centre + margin) / (1 + z2 / n))


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedMean:
    """A number measured once a seed."""

    mean: float
    ci95: Interval
    """Student's t over the seeds; infinitely wide for one seed."""
    num_seeds: int


def mean_over_seeds(values: Sequence[float]) -> SeedMean:
    """Mean and t interval, mean ± t(0.975, S−1) · s / √S: what a further seed's expectation is
    known to."""
    assert values, "no seeds"
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return SeedMean(mean=mean, ci95=(-math.inf, math.inf), num_seeds=1)
    margin = t_quantile(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return SeedMean(mean=mean, ci95=(mean - margin, mean + margin), num_seeds=count)


_T_975 = (
    12.706205,
    4.302653,
    3.182446,
    2.776445,
    2.570582,
    2.446912,
    2.364624,
    2.306004,
    2.262157,
    2.228139,
)


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t: tabled up to 10 degrees of freedom, beyond by its expansion
    around the normal's (Abramowitz and Stegun 26.7.5), which is right to three decimals there."""
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z = Z_95
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


# --- two methods on the same problems -------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two methods on the same problems."""

    a: str
    b: str
    difference: float
    """Accuracy of `a` less accuracy of `b`."""
    ci95: Interval
    """Of the difference, by paired bootstrap."""
    p_mcnemar: float
    """Two-sided and exact; not corrected for the number of comparisons."""
    n: int
    """Problems."""

    @property
    def significant(self) -> bool:
        return self.p_mcnemar < 0.05


def compare(
    a: str,
    correct_a: ArrayLike,
    b: str,
    correct_b: ArrayLike,
    *,
    generator: np.random.Generator,
    num_resamples: int = NUM_RESAMPLES,
) -> Comparison:
    """`a` against `b`: what each answered right (booleans in the same order of problems)."""
    right_a, right_b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    assert right_a.shape == right_b.shape and right_a.size, (
        "paired outcomes have one length, not zero"
    )
    return Comparison(
        a=a,
        b=b,
        difference=float(right_a.mean() - right_b.mean()),
        ci95=paired_bootstrap(right_a, right_b, generator=generator, num_resamples=num_resamples),
        p_mcnemar=mcnemar_exact(int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())),
        n=right_a.size,
    )


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p of the problems that exactly one method solved being split like coin tosses.

        p = min(1, 2 Σ_{i ≤ min(only_a, only_b)} C(m, i) / 2^m),   m = only_a + only_b

    Computed in integers. Source: McNemar (1947), in the exact binomial form.
    """
    m = only_a + only_b
    term = tail = 1
    for i in range(1, min(only_a, only_b) + 1):
        term = term * (m - i + 1) // i
        tail += term
    return float(min(Fraction(1), Fraction(2 * tail, 2**m)))


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    *,
    generator: np.random.Generator,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """95 % percentile interval of mean(a) − mean(b) over resampled problems; a problem keeps its
    pair."""
    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    return crossed_bootstrap(differences[None, :], generator=generator, num_resamples=num_resamples)


# --- across seeds ---------------------------------------------------------------------------------


def crossed_bootstrap(
    values: ArrayLike, *, generator: np.random.Generator, num_resamples: int = NUM_RESAMPLES
) -> Interval:
    """95 % percentile interval of the mean of `values` (seeds, problems), where every seed met the
    same problems.

    Seeds and problems are each resampled once a replicate, so a hard problem is hard for all seeds
    of it. Errs towards wide.
    Source: Owen (2007), "The pigeonhole bootstrap".
    """
    matrix = np.asarray(values, dtype=float)
    num_seeds, num_problems = matrix.shape
    # problems with the same outcomes under every seed are exchangeable: draw how many of each sort,
    # not which
    sorts, counts = np.unique(matrix, axis=1, return_counts=True)
    problems = (
        generator.multinomial(num_problems, counts / num_problems, size=num_resamples)
        / num_problems
    )
    seeds = (
        generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=num_resamples)
        / num_seeds
    )
    return _percentiles(np.einsum("rs,su,ru->r", seeds, sorts, problems, optimize=True))


def hierarchical_bootstrap(
    values: Sequence[ArrayLike],
    *,
    generator: np.random.Generator,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """95 % percentile interval of the mean over seeds, where each seed (one array of `values`) has
    problems of its own.

    A replicate resamples the seeds, then the problems within each drawn seed. With fewer than about
    five seeds the interval is too narrow, as any bootstrap of so few is: read it beside
    `mean_over_seeds`.
    """
    num_seeds = len(values)
    drawn = generator.integers(num_seeds, size=(num_resamples, num_seeds))
    means = np.empty(drawn.shape)
    for index, outcomes in enumerate(values):
        chosen = drawn == index
        means[chosen] = _resampled_means(
            np.asarray(outcomes, dtype=float), int(chosen.sum()), generator
        )
    return _percentiles(means.mean(axis=1))


def _resampled_means(
    outcomes: NDArray[np.float64], count: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    sorts, counts = np.unique(outcomes, return_counts=True)
    draws = generator.multinomial(outcomes.size, counts / outcomes.size, size=count)
    return np.asarray(draws @ sorts / outcomes.size)


def _percentiles(replicates: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(replicates, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedComparison:
    """Two methods over several seeds."""

    a: str
    b: str
    difference: float
    """Mean over seeds of accuracy of `a` less accuracy of `b`."""
    ci95: Interval
    """By bootstrap over seeds and problems."""
    by_seed: tuple[float, ...]
    n: int
    """Problems a seed."""

    @property
    def significant(self) -> bool:
        return not self.ci95[0] <= 0 <= self.ci95[1]


def turned(comparison: Comparison | SeedComparison) -> Comparison | SeedComparison:
    """The same comparison with `a` and `b` exchanged."""
    low, high = comparison.ci95
    exchanged = replace(
        comparison,
        a=comparison.b,
        b=comparison.a,
        difference=-comparison.difference,
        ci95=(-high, -low),
    )
    if isinstance(exchanged, SeedComparison):
        return replace(exchanged, by_seed=tuple(-difference for difference in exchanged.by_seed))
    return exchanged


def compare_over_seeds(
    a: str,
    correct_a: Sequence[ArrayLike],
    b: str,
    correct_b: Sequence[ArrayLike],
    *,
    same_problems: bool,
    generator: np.random.Generator,
) -> SeedComparison:
    """`a` against `b`, one array of booleans a seed each, paired by seed and by problem.

    `same_problems` says whether all seeds met the same problems, in one order; it chooses the
    bootstrap.
    """
    pairs = zip(correct_a, correct_b, strict=True)
    differences = [
        np.asarray(left, dtype=float) - np.asarray(right, dtype=float) for left, right in pairs
    ]
    by_seed = tuple(float(difference.mean()) for difference in differences)
    bootstrap = crossed_bootstrap if same_problems else hierarchical_bootstrap
    return SeedComparison(
        a=a,
        b=b,
        difference=float(np.mean(by_seed)),
        ci95=bootstrap(differences, generator=generator),
        by_seed=by_seed,
        n=min(difference.size for difference in differences),
    )
