"""Chooses one answer from several graded samples of a problem, by voting or reranking, and
estimates pass@k.

A sample votes for the answer that was read from it, if any. Equal answers, such as 0.5, 1/2 and
50%, pool their votes and are represented by the spelling with the most votes. But if the format
has `grading: paper`, only answers with the same spelling pool their votes, as in the ReFT paper. In
a tie, the answer seen first wins. If there are no votes, the result counts as wrong.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from reftune.errors import DataError
from reftune.grading.mathematics import looks_like_math, same_spelling
from reftune.grading.numbers import same_number
from reftune.grading.sentences import parse_number
from reftune.grading.words import same_words
from reftune.text import counted
from reftune.types import Graded, Verdict

Same = Callable[[str, str], bool]
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?:/\d+)?%?")


def has_value(graded: Graded) -> bool:
    """Whether an answer was read from a sample, so that the sample may vote."""
    return graded.value is not None


def has_letter(graded: Graded) -> bool:
    """Whether a sample's value is a single letter. Under the paper's rules, only such samples vote
    on multiple-choice questions."""
    return graded.value is not None and len(graded.value) == 1 and graded.value.isalpha()


def voters(grading: str | None, *, is_choice: bool) -> Callable[[Graded], bool]:
    """The function that decides whether a sample may vote. Under the rules of the ReFT paper, it is
    `has_letter` for multiple-choice questions. In all other cases, it is `has_value`. `grading` is
    the recipe's `format.grading`."""
    return has_letter if grading == "paper" and is_choice else has_value


def same_answer(first: str, second: str) -> bool:
    """Whether two values that the grader read are the same answer: equal numbers, the same words,
    or expressions with the same spelling. The grader usually gives equal expressions the same
    spelling.

    Two numbers are equal if each of them would be right with the other as the gold answer. If
    neither is whole, as in 1/3 and 0.33, it is enough for one of them to be right with the other as
    the gold answer.
    """
    if first == second:
        return True
    if _NUMBER.fullmatch(first) and _NUMBER.fullmatch(second):
        a, b = parse_number(first), parse_number(second)
        if a is None or b is None:
            return False
        needed = all if 1 in (a.value.denominator, b.value.denominator) else any
        return needed((same_number(a, b), same_number(b, a)))
    if looks_like_math(first) or looks_like_math(second):
        return same_spelling(first, second)
    return same_words(first, second)


def equality(grading: str | None) -> Same:
    """The function that decides whether two values are the same answer, under the rules that the
    format's key `grading` names."""
    return operator.eq if grading == "paper" else same_answer


def majority_curve(
    samples: Sequence[Graded],
    *,
    weights: Sequence[float] | None = None,
    valid: Callable[[Graded], bool] = has_value,
    same: Same = same_answer,
) -> list[Graded | None]:
    """For each k up to the number of samples, the winner of the vote among the first k samples.
    Equal values, such as 0.5 and 1/2, pool their votes, and the largest pool wins. From this pool,
    the spelling with the most votes is chosen. The winner is the first sample with this spelling.
    If none of the k samples is `valid`, the winner is None. Votes may have `weights`, such as a
    reward model's scores (DiVeRSe, arXiv:2206.02336).

    The first k samples are k independent draws from the model. Therefore, the share of problems for
    which the winner among the first k samples is correct is an unbiased estimate of maj@k.
    """
    first: dict[str, Graded] = {}
    pool_of: dict[str, str] = {}  # each value → the first of the values that equal it
    pools: dict[str, dict[str, float]] = {}  # the first of equal values → the votes for each
    curve: list[Graded | None] = []
    for graded, weight in zip(samples, weights or itertools.repeat(1, len(samples)), strict=True):
        if valid(graded) and graded.value is not None:
            value = graded.value
            if value not in first:
                first[value] = graded
                pool_of[value] = next((known for known in pools if same(value, known)), value)
            votes = pools.setdefault(pool_of[value], {})
            votes[value] = votes.get(value, 0) + weight
        pool = max(pools.values(), key=lambda votes: sum(votes.values()), default=None)
        curve.append(None if pool is None else first[max(pool, key=pool.__getitem__)])
    return curve


def rerank_curve(
    samples: Sequence[Graded],
    completions: Sequence[str],
    scores: Sequence[float],
    *,
    valid: Callable[[Graded], bool] = has_value,
) -> list[Graded | None]:
    """For each k up to the number of samples, the winner among the first k samples. This is the
    `valid` sample with the highest score; in a tie, the earlier sample wins. If none of the k
    samples is `valid`, the winner is None. Repeats of an earlier completion are ignored, but they
    still count towards k."""
    best: tuple[float, Graded] | None = None
    seen: set[str] = set()
    curve: list[Graded | None] = []
    for graded, completion, score in zip(samples, completions, scores, strict=True):
        fresh = completion not in seen
        seen.add(completion)
        if fresh and valid(graded) and (best is None or score > best[0]):
            best = score, graded
        curve.append(None if best is None else best[1])
    return curve


def is_correct(winner: Graded | None) -> bool:
    """Whether the chosen sample is correct; False if none was chosen."""
    return winner is not None and winner.verdict is Verdict.CORRECT


def pass_at_k(n: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k samples is correct, given n
    samples of which c = `num_correct` are correct.

        1 − C(n − c, k) / C(n, k)

    Raises: DataError unless 1 ≤ k ≤ n. Source: Chen et al. (arXiv:2107.03374), eq. 1.
    """
    check_k(k, n)
    return float(1 - Fraction(math.comb(n - num_correct, k), math.comb(n, k)))


def check_k(k: int, n: int) -> None:
    """Raises: DataError unless 1 ≤ k ≤ n."""
    if not 1 <= k <= n:
        raise DataError(
            f"k = {k}: only {counted(n, 'sample')} drawn per problem; expected 1 to {n} (for"
            " more, set evaluate.samples)"
        )
