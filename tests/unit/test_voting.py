"""Votes, reranking and pass@k against the paper's rules and hand computation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from reftune.errors import DataError
from reftune.grading.voting import (
    equality,
    has_letter,
    is_correct,
    majority_curve,
    pass_at_k,
    rerank_curve,
    same_answer,
)
from reftune.types import Graded, Verdict


def graded(value: object, gold: object = 4) -> Graded:
    verdict = (
        Verdict.NO_ANSWER if value is None else Verdict.CORRECT if value == gold else Verdict.WRONG
    )
    return Graded(verdict=verdict, value=None if value is None else str(value), reason="")


def votes(*values: object) -> list[Graded]:
    return [graded(value) for value in values]


def winner_value(winner: Graded | None) -> str | None:
    return None if winner is None else winner.value


def majority_vote(samples: list[Graded], **rules: Any) -> Graded | None:
    return majority_curve(samples, **rules)[-1]


def rerank(samples: list[Graded], texts: list[str], scores: list[float]) -> Graded | None:
    return rerank_curve(samples, texts, scores)[-1]


def test_a_tie_goes_to_the_value_seen_first() -> None:
    # reference check E25: 4 and 5 have two votes each, 4 came first
    assert winner_value(majority_vote(votes(4, None, 5, 5, 4))) == "4"
    assert winner_value(majority_vote(votes(5, 4, 4, 5))) == "5"


def test_votes_count_by_their_weight() -> None:
    # 4: 0.5 + 0.25; 5: 0.5, then 0.5 + 0.25 as well: 4 was first; a sample without a value counts
    # for nothing
    samples, weights = votes(4, 5, None, 4, 5), [0.5, 0.5, 9.0, 0.25, 0.5]
    found = majority_curve(samples, weights=weights)
    assert [winner_value(winner) for winner in found] == ["4", "4", "4", "4", "5"]
    assert majority_curve(samples, weights=[1.0] * 5) == majority_curve(samples)
    assert majority_curve([], weights=[]) == []


def test_no_valid_vote_is_wrong() -> None:
    # reference check E25
    assert majority_vote(votes(None, None)) is None
    assert not is_correct(majority_vote(votes(None, None)))
    assert majority_curve([]) == []


def test_samples_without_a_value_do_not_vote() -> None:
    assert winner_value(majority_vote(votes(None, None, None, 7))) == "7"


def test_a_winner_brings_its_verdict() -> None:
    assert is_correct(majority_vote(votes(4, 4, 5)))
    assert not is_correct(majority_vote(votes(4, 5, 5)))


def test_a_longer_choice_text_may_not_vote_under_the_letter_rule() -> None:
    assert winner_value(majority_vote(votes("c )", "c )", "a"), valid=has_letter)) == "a"
    assert majority_vote(votes("3"), valid=has_letter) is None


def test_the_curve_is_the_vote_over_each_prefix() -> None:
    # 5 | 5 (tie, first) | 4 | 4 (tie of 4 and 5 at two: 5 was first, so 5)
    assert [winner_value(winner) for winner in majority_curve(votes(5, 4, 4, 5))] == [
        "5",
        "5",
        "4",
        "5",
    ]


def test_the_curve_agrees_with_counting_every_prefix_anew() -> None:
    for values in itertools.product([1, 2, None], repeat=5):
        samples = votes(*values)
        for k, winner in enumerate(majority_curve(samples), start=1):
            present = [value for value in values[:k] if value is not None]
            expected = max(
                present,
                key=lambda value: (present.count(value), -present.index(value)),
                default=None,
            )
            assert winner_value(winner) == (None if expected is None else str(expected))


def test_rerank_takes_the_best_valid_score() -> None:
    # reference check E25: .9 belongs to a sample without a value
    assert winner_value(rerank(votes(None, 4, 5), ["x", "y", "z"], [0.9, 0.4, 0.6])) == "5"
    assert rerank(votes(None), ["x"], [0.9]) is None


def test_rerank_takes_the_first_of_equal_scores() -> None:
    assert winner_value(rerank(votes(4, 5), ["x", "y"], [0.6, 0.6])) == "4"


def test_rerank_scores_a_repeated_text_once() -> None:
    # the second "x" must not raise it above "y"
    assert winner_value(rerank(votes(4, 5, 4), ["x", "y", "x"], [0.1, 0.5, 0.9])) == "5"


def test_pass_at_k_matches_enumeration() -> None:
    # n = 4, c = 1, k = 2: of the 6 pairs 3 hold the correct one
    assert pass_at_k(4, 1, 2) == 0.5
    assert pass_at_k(4, 0, 4) == 0.0
    assert pass_at_k(4, 1, 4) == 1.0
    # k = 1 is the share of correct samples
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)


def test_more_samples_than_drawn_are_refused_in_one_line() -> None:
    with pytest.raises(
        DataError, match=r"^k = 5: only 4 samples drawn per problem; expected 1 to 4[^\n]*$"
    ):
        pass_at_k(4, 2, 5)


@pytest.mark.parametrize(
    ("same", "other"),
    [
        (("0.5", "1/2", "50%"), "0.6"),
        (("25%", "25", "0.25"), "2500"),
        (("Paris", "paris.", "**Paris**"), "London"),
        (("the Nile", "Nile"), "Niles"),
        (("5 March", "5 march"), "5 April"),
        (("a", "a"), "b"),
        (("x/2",), "2*x"),
        (("2*x", "2 * x"), "2**x"),
        (("x**2",), "x2"),
        (("1/3", "0.33"), "0.34"),
        (("10 20",), "1020"),
    ],
)
def test_equal_answers_are_one_candidate_however_they_are_spelled(
    same: tuple[str, ...], other: str
) -> None:
    assert all(same_answer(first, second) for first in same[:1] for second in same)
    assert not same_answer(same[0], other)
    samples = votes(other, *same, other) if len(same) > 2 else votes(*same)
    assert winner_value(majority_vote(samples, same=same_answer)) == same[0]


def test_a_whole_number_and_a_number_near_it_are_two_answers() -> None:
    assert winner_value(majority_vote(votes("99.999", *["100"] * 9))) == "100"
    assert winner_value(majority_vote(votes("99.999", "100", "99.999"))) == "99.999"
    assert not same_answer("3", "2.999")
    assert not same_answer("2.999", "3")


def test_equal_answers_are_represented_by_the_most_frequent_of_them() -> None:
    # 3.14 is seen first, 3.141 has two votes; then they are tied
    curve = majority_curve(votes("3.14", "3.141", "3.141", "3.14"))
    assert [winner_value(winner) for winner in curve] == ["3.14", "3.14", "3.141", "3.14"]
    weighted = majority_curve(votes("7", "0.5", "1/2"), weights=[1.0, 0.25, 1.0])
    assert winner_value(weighted[-1]) == "1/2"


def test_the_papers_votes_count_spellings() -> None:
    samples = votes("0.5", "1/2", "7", "7")
    assert winner_value(majority_vote(samples, same=equality("robust"))) == "0.5"
    assert winner_value(majority_vote(samples[:2] + samples[2:], same=equality("paper"))) == "7"
    curve = majority_curve(samples, same=equality("robust"))
    assert [winner_value(winner) for winner in curve] == ["0.5", "0.5", "0.5", "0.5"]
