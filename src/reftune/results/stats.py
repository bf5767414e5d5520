"""Intervals and paired tests, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from reftune.stages.plateau import Z95

Interval = tuple[float, float]


# --- one method -----------------------------------------------------------------------------------


def wilson(num_correct: float, n: int) -> Interval:
    """95% Wilson interval for the share of correct answers.

        (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n),   p = num_correct / n

    If n is 0, the interval is (0, 1). Source: Wilson (1927); Newcombe (1998), method 3.
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = num_correct / n, Z95**2
    centre = p + z2 / (2 * n)
    margin = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2))
    return max(0.0, (centre - margin) / (1 + z2 / n)), min(1.0, (centre + margin) / (1 + z2 / n))


def accuracy_interval(outcomes: ArrayLike) -> Interval:
    """95% Wilson interval for the mean of `outcomes`, which are numbers from 0 to 1. If some are
    neither 0 nor 1, as with pass@k, the interval tends to be too wide, because it assumes the
    larger variance of outcomes that are all either 0 or 1."""
    values = np.asarray(outcomes, dtype=float)
    return wilson(float(values.sum()), values.size)


# --- two methods on the same problems -------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A comparison of two methods on the same problems, in one run or over several seeds."""

    a: str
    b: str
    difference: float
    """Accuracy of `a` minus accuracy of `b`, averaged over seeds if there are several."""
    ci95: Interval
    """95% interval of the difference: `paired_interval` or, if there are several seeds,
    `seeds_interval`."""
    n: int
    """Number of problems per seed. If seeds have different numbers of problems, this is the
    smallest number."""
    p_value: float | None = None
    """`paired_p_value`, not corrected for the number of comparisons; None if there are several
    seeds."""
    by_seed: tuple[float, ...] = ()
    """The difference for each seed; empty if there is only one seed."""

    @property
    def significant(self) -> bool:
        """Whether `ci95` excludes 0."""
        return not self.ci95[0] <= 0 <= self.ci95[1]

    def to_row(self) -> dict[str, Any]:
        """The comparison in the form of `summary.json` and `reftune table --json`."""
        single = self.p_value is not None
        return {
            "a": self.a,
            "b": self.b,
            "difference": self.difference,
            "ci95": list(self.ci95),
            "n": self.n,
            "significant": self.significant,
            **({"p_value": self.p_value} if single else {"by_seed": list(self.by_seed)}),
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


def compare(a: str, correct_a: ArrayLike, b: str, correct_b: ArrayLike) -> Comparison:
    """Compare methods `a` and `b`. `correct_a` states for each problem whether `a` solved it.
    `correct_b` states the same for `b`, with the problems in the same order."""
    right_a, right_b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    assert right_a.shape == right_b.shape and right_a.size, (
        "paired outcomes must have the same length, which must not be zero"
    )
    differences = right_a.astype(float) - right_b.astype(float)
    return Comparison(
        a=a,
        b=b,
        difference=float(differences.mean()),
        ci95=paired_interval(differences),
        p_value=paired_p_value(differences),
        n=right_a.size,
    )


def paired_interval(differences: ArrayLike) -> Interval:
    """95% interval for the mean of `differences`. Each difference belongs to one of n problems. It
    is the outcome of one method minus that of another, a number between −1 and 1.

        d ± z s,   s = √((q − d²) / m),   d = Σ differences / m,   q = (Σ differences² + 2) / m,
        m = n + 2

    This is the normal interval after two problems are added: one that only the first method solves,
    and one that only the second solves. Its width is positive even if all differences are equal.
    Source: Bonett and Price (2012), for outcomes that are 0 or 1.
    """
    d, s = _mean_and_error(differences)
    return max(-1.0, d - Z95 * s), min(1.0, d + Z95 * s)


def paired_p_value(differences: ArrayLike) -> float:
    """Two-sided p-value of the hypothesis that two methods are equally accurate. It is below 0.05
    if and only if `paired_interval` excludes 0.

        p = 2 Φ(−|d| / s), with d and s as in `paired_interval`

    Source: Bonett and Price (2012), for outcomes that are 0 or 1.
    """
    d, s = _mean_and_error(differences)
    return math.erfc(abs(d) / s / math.sqrt(2))


def _mean_and_error(differences: ArrayLike) -> tuple[float, float]:
    """d and s in `paired_interval`."""
    own = np.asarray(differences, dtype=float)
    m = own.size + 2
    d, q = own.sum() / m, ((own**2).sum() + 2) / m
    return float(d), math.sqrt((q - d**2) / m)


# --- across seeds ---------------------------------------------------------------------------------


def seeds_interval(
    values: Sequence[ArrayLike],
    over_problems: Callable[[NDArray[np.float64]], Interval],
    *,
    same_problems: bool,
) -> Interval:
    """95% interval for a score averaged over seeds. It accounts for the random choice of seeds and
    of problems. `values` has one array per seed, with a number for each problem. Given an array,
    `over_problems` returns an interval for its mean that accounts only for the choice of problems.
    With a single seed, the result is that interval.

    If each seed has its own problems, the seeds' means vary with both choices. The result is
    Student's t interval for the mean of these means. If necessary, it is widened to contain the
    interval that `over_problems` returns for all values together. If all seeds have the same
    problems, the choice of problems shifts all means alike, and Student's interval does not account
    for it. A second interval does: each problem's values are averaged over the seeds, and
    `over_problems` returns an interval for the mean of these averages. The margins of the two
    intervals are then added in quadrature. Source: Student (1908); Zou and Donner (2008).
    """
    seeds = [np.asarray(each, dtype=float) for each in values]
    if len(seeds) == 1:
        return over_problems(seeds[0])
    means = [float(each.mean()) for each in seeds]
    mean, num_seeds = float(np.mean(means)), len(means)
    quantile = float(stdtrit(num_seeds - 1, 0.975))
    margin = quantile * float(np.std(means, ddof=1)) / math.sqrt(num_seeds)
    if same_problems:
        low, high = over_problems(np.mean(seeds, axis=0))
        return mean - math.hypot(margin, mean - low), mean + math.hypot(margin, high - mean)
    low, high = over_problems(np.concatenate(seeds))
    return min(mean - margin, low), max(mean + margin, high)


def accuracy_over_seeds(outcomes: Sequence[ArrayLike], *, same_problems: bool) -> Interval:
    """95% interval for the mean accuracy over seeds. `outcomes` has one array per seed."""
    low, high = seeds_interval(outcomes, accuracy_interval, same_problems=same_problems)
    return max(0.0, low), min(1.0, high)


def compare_over_seeds(
    a: str,
    correct_a: Sequence[ArrayLike],
    b: str,
    correct_b: Sequence[ArrayLike],
    *,
    same_problems: bool,
) -> Comparison:
    """Compare methods `a` and `b`, paired by seed and problem. `correct_a` and `correct_b` have one
    array of booleans per seed. `same_problems` states whether all seeds answered the same problems
    in the same order."""
    pairs = zip(correct_a, correct_b, strict=True)
    differences = [
        np.asarray(left, dtype=float) - np.asarray(right, dtype=float) for left, right in pairs
    ]
    by_seed = tuple(float(difference.mean()) for difference in differences)
    low, high = seeds_interval(differences, paired_interval, same_problems=same_problems)
    return Comparison(
        a=a,
        b=b,
        difference=float(np.mean(by_seed)),
        ci95=(max(-1.0, low), min(1.0, high)),
        by_seed=by_seed,
        n=min(difference.size for difference in differences),
    )
