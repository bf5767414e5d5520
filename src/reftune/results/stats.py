"""Intervals and paired tests, as pure functions: random numbers come from a generator argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z_95 = 1.959963984540054
"""The 97.5% quantile of the standard normal distribution."""

NUM_RESAMPLES = 10_000

Interval = tuple[float, float]


# --- one method -----------------------------------------------------------------------------------


def wilson(num_correct: int, n: int) -> Interval:
    """95% Wilson interval of the share of correct answers.

        (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n),   p = num_correct / n

    If n is 0, the interval is (0, 1). Source: Wilson (1927); Newcombe (1998), method 3.
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = num_correct / n, Z_95**2
    centre = p + z2 / (2 * n)
    margin = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2))
    return max(0.0, (centre - margin) / (1 + z2 / n)), min(1.0, (centre + margin) / (1 + z2 / n))


# --- two methods on the same problems -------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A comparison of two methods on the same problems, in one run or over several seeds."""

    a: str
    b: str
    difference: float
    """Accuracy of `a` minus accuracy of `b`, averaged over seeds if there are several."""
    ci95: Interval
    """95% interval of the difference, from a bootstrap over problems. If there are several seeds,
    the bootstrap is also over seeds."""
    n: int
    """Number of problems per seed. If seeds have different numbers of problems, this is the
    smallest number."""
    p_mcnemar: float | None = None
    """Two-sided p-value of McNemar's exact test, not corrected for the number of comparisons; None
    if there are several seeds."""
    by_seed: tuple[float, ...] = ()
    """The difference for each seed; empty if there is only one seed."""

    @property
    def significant(self) -> bool:
        """For one seed, whether McNemar's p-value is below 0.05. For several seeds, whether `ci95`
        excludes 0."""
        if self.p_mcnemar is not None:
            return self.p_mcnemar < 0.05
        return not self.ci95[0] <= 0 <= self.ci95[1]

    def to_row(self) -> dict[str, Any]:
        """The comparison in the form of `summary.json` and `reftune table --json`."""
        single = self.p_mcnemar is not None
        return {
            "a": self.a,
            "b": self.b,
            "difference": self.difference,
            "ci95": list(self.ci95),
            "n": self.n,
            "significant": self.significant,
            **({"p_mcnemar": self.p_mcnemar} if single else {"by_seed": list(self.by_seed)}),
        }

    def turned(self) -> Comparison:
        """The comparison with `a` and `b` exchanged."""
        low, high = self.ci95
        return replace(
            self,
            a=self.b,
            b=self.a,
            difference=0.0 - self.difference,  # never −0.0
            ci95=(0.0 - high, 0.0 - low),
            by_seed=tuple(0.0 - difference for difference in self.by_seed),
        )


def compare(
    a: str, correct_a: ArrayLike, b: str, correct_b: ArrayLike, *, generator: np.random.Generator
) -> Comparison:
    """Compare methods `a` and `b`. `correct_a` states for each problem whether `a` solved it.
    `correct_b` states the same for `b`, with the problems in the same order."""
    right_a, right_b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    assert right_a.shape == right_b.shape and right_a.size, (
        "paired outcomes must have the same length, which must not be zero"
    )
    return Comparison(
        a=a,
        b=b,
        difference=float(right_a.mean() - right_b.mean()),
        ci95=paired_bootstrap(right_a, right_b, generator=generator),
        p_mcnemar=mcnemar_exact(int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())),
        n=right_a.size,
    )


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p-value of the hypothesis that, if only one of two methods solves a problem, each
    method is equally likely to be the one that solves it.

        p = min(1, 2 Σ_{i ≤ min(only_a, only_b)} C(m, i) / 2^m),   m = only_a + only_b

    `only_a` counts the problems that only the first method solves, and `only_b` those that only the
    second solves. The sum is computed in integers.
    Source: McNemar (1947), in the exact binomial form.
    """
    m = only_a + only_b
    term = tail = 1
    for i in range(1, min(only_a, only_b) + 1):
        term = term * (m - i + 1) // i
        tail += term
    return float(min(Fraction(1), Fraction(2 * tail, 2**m)))


def paired_bootstrap(a: ArrayLike, b: ArrayLike, *, generator: np.random.Generator) -> Interval:
    """95% percentile interval of mean(a) − mean(b) from a bootstrap over problems. The two outcomes
    of a problem are always drawn together."""
    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    return crossed_bootstrap(differences[None, :], generator=generator)


# --- across seeds ---------------------------------------------------------------------------------


def crossed_bootstrap(values: ArrayLike, *, generator: np.random.Generator) -> Interval:
    """95% percentile interval of the mean of `values`, whose shape is (seeds, problems). All seeds
    must have answered the same problems.

    Each replicate resamples the seeds once and the problems once, so that all seeds in a replicate
    have the same problems. The interval tends to be too wide.
    Source: Owen (2007), "The pigeonhole bootstrap".
    """
    matrix = np.asarray(values, dtype=float)
    num_seeds, num_problems = matrix.shape
    # problems with equal columns are interchangeable, so it is enough to draw how many times each
    # distinct column occurs
    sorts, counts = np.unique(matrix, axis=1, return_counts=True)
    problems = (
        generator.multinomial(num_problems, counts / num_problems, size=NUM_RESAMPLES)
        / num_problems
    )
    seeds = (
        generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=NUM_RESAMPLES)
        / num_seeds
    )
    return _percentiles(np.einsum("rs,su,ru->r", seeds, sorts, problems, optimize=True))


def hierarchical_bootstrap(
    values: Sequence[ArrayLike], *, generator: np.random.Generator
) -> Interval:
    """95% percentile interval of the average of the seeds' means. `values` has one array per seed,
    and the seeds may have answered different problems.

    Each replicate resamples the seeds, and then the problems within each drawn seed. If there are
    fewer than about five seeds, the interval is too narrow, because resampling so few values
    understates their spread.
    """
    num_seeds = len(values)
    drawn = generator.integers(num_seeds, size=(NUM_RESAMPLES, num_seeds))
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


def compare_over_seeds(
    a: str,
    correct_a: Sequence[ArrayLike],
    b: str,
    correct_b: Sequence[ArrayLike],
    *,
    same_problems: bool,
    generator: np.random.Generator,
) -> Comparison:
    """Compare methods `a` and `b`, paired by seed and problem. `correct_a` and `correct_b` have one
    array of booleans per seed. `same_problems` states whether all seeds answered the same problems
    in the same order. This determines which bootstrap is used."""
    pairs = zip(correct_a, correct_b, strict=True)
    differences = [
        np.asarray(left, dtype=float) - np.asarray(right, dtype=float) for left, right in pairs
    ]
    by_seed = tuple(float(difference.mean()) for difference in differences)
    bootstrap = crossed_bootstrap if same_problems else hierarchical_bootstrap
    return Comparison(
        a=a,
        b=b,
        difference=float(np.mean(by_seed)),
        ci95=bootstrap(differences, generator=generator),
        by_seed=by_seed,
        n=min(difference.size for difference in differences),
    )
