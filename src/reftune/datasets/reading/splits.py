"""Builds splits from problems: removes duplicates and contradictions, draws the dev split, and
leaves each question in only one split."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import NamedTuple

from reftune.errors import DataError
from reftune.grading.numbers import number_of, same_number
from reftune.grading.words import same_words
from reftune.seeds import derive_seed
from reftune.text import counted
from reftune.types import Answer, Problem

Key = Callable[[Problem], str]
"""Computes the key of a problem. Problems with equal keys ask the same question."""

LARGEST_DEFAULT_DEV = 500
FACTORIAL = r"!+(?=\s*[-+*/^=<>×÷·−)\]}\\]|[?.;:$])"
"""Matches the exclamation marks of a factorial. They come directly before other punctuation, or
before an operator or a closing bracket, with or without spaces in between."""
TOKEN = re.compile(
    rf"(?:(?<![\w.])\.)?\d+(?:[.,]\d+)*(?:{FACTORIAL}|!+(?=\s*\d))?|(?<![\w'])[^\W\d_]{FACTORIAL}"
    r"|\)!+|[^\W\d_]'+(?=\()|[^\W\d_]+|[^\w\s]|_"
)
"""Matches words, symbols and numbers. The point in .5, the exclamation mark of a factorial and the
prime in f'(x) are not tokens of their own."""
SILENT = frozenset(".,;:!?'\"`’‘“”…")
"""Sentence punctuation, which is ignored when questions are compared. Brackets and operators are
not included, because a question may be about them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """The problems of each split. No question is in more than one split."""

    train: tuple[Problem, ...]
    dev: tuple[Problem, ...]
    test: tuple[Problem, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    """How many rows were dropped, by reason: `duplicate`, `program_disagrees`, …"""
    notes: tuple[str, ...] = ()
    """What the user should know about the data. Each note is one line, with the remedy after a
    semicolon."""


class Asked(NamedTuple):
    """A problem, and the key by which its question is compared."""

    key: str
    problem: Problem

    @property
    def keys(self) -> set[str]:
        """`key`, and the key that the problem would have if its gold answer were text."""
        return {self.key, _text_key(self.problem)}


def question_key(problem: Problem) -> str:
    """A key that is equal for problems that ask the same question. It ignores case, spacing and
    sentence punctuation, but not numbers, operators or options. If the gold answer is text, the
    question may be about case or punctuation, so only spacing is ignored."""
    text = _text_key(problem)
    return text if problem.answer.kind == "text" else normalised(text, problem.decimal)


def draw_splits(
    *,
    train: Iterable[Problem],
    dev: Iterable[Problem] | None,
    test: Iterable[Problem],
    dev_size: int | None,
    seed: int,
    key: Key = question_key,
    several_rationales: bool = False,
) -> Splits:
    """The cleaned splits. Rows of train and dev are dropped, and counted, for the following
    reasons:

    - `duplicate`: an earlier row of the split has the same text (apart from spacing), the same
      options and the same gold answer. If `several_rationales` is true, such a row of train is
      dropped only if the rationales are the same too.
    - `contradiction`: rows of the split give different gold answers to the same question with the
      same options. None of these rows is kept.
    - `leak`: test contains a problem with the same `key`, or with the same text apart from spacing.
      A row of train is also dropped if dev contains such a problem.

    If `dev` is None, the questions of train are sorted by a hash of the question and `seed`, and
    the first `dev_size` of them become dev. Thus row order and rationales do not affect the choice.
    If `dev_size` is None, a tenth of the questions, but at most 500, become dev. Raises: DataError
    if `dev_size` leaves nothing to train on.
    """
    counts: Counter[str] = Counter()

    def asked(problems: Iterable[Problem]) -> list[Asked]:
        return [Asked(key(problem), problem) for problem in problems]

    tested = asked(test)
    learned = _without(_clean(asked(train), several_rationales, counts), tested, counts)
    if dev is None:
        chosen = _draw(learned, dev_size, seed, counts)
        counts["leak"] -= len(chosen)
    else:
        chosen = _without(_clean(asked(dev), False, counts), tested, counts)
    learned = _without(learned, chosen, counts)
    test_set, dev_set, train_set = with_unique_ids(
        *([each.problem for each in split] for split in (tested, chosen, learned))
    )
    return Splits(train=train_set, dev=dev_set, test=test_set, counts=dict(+counts))


def without_leaks(splits: Splits) -> Splits:
    """`splits` without leaks. The number of removed leaks is added to `counts` under `leak`. A
    training problem is a leak if dev or test contains the same problem. A dev problem is a leak if
    test contains the same problem. Two problems are the same if their questions, options and
    conversations are identical, character for character."""

    def without(problems: Sequence[Problem], *others: Sequence[Problem]) -> tuple[Problem, ...]:
        taken = {_spelling(each) for split in others for each in split}
        return tuple(each for each in problems if _spelling(each) not in taken)

    dev = without(splits.dev, splits.test)
    train = without(splits.train, splits.test, dev)
    leaks = len(splits.train) + len(splits.dev) - len(train) - len(dev)
    counts = Counter(splits.counts) + Counter(leak=leaks)
    return replace(splits, train=train, dev=dev, counts=dict(counts))


def _spelling(problem: Problem) -> tuple[object, ...]:
    return (problem.question, *problem.choices, *problem.messages)


def drop_untrainable(splits: Splits, reason: str, unusable: Callable[[Problem], bool]) -> Splits:
    """Remove the training problems for which `unusable` is true, and count them under `reason`. Dev
    keeps such problems, but not their rationales."""
    train = tuple(problem for problem in splits.train if not unusable(problem))
    dev = tuple(replace(p, rationale=None) if unusable(p) else p for p in splits.dev)
    dropped = len(splits.train) - len(train)
    total = splits.counts.get(reason, 0) + dropped
    counts = {**splits.counts, **({reason: total} if dropped else {})}
    return replace(splits, train=train, dev=dev, counts=counts)


def dropped_text(counts: Mapping[str, int]) -> str:
    """The dropped rows by reason, such as `2 duplicate, 40 contradiction`."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count) or "nothing"


def same_gold(a: Answer, b: Answer) -> bool:
    """Whether two gold answers agree. Numbers and texts are compared as in grading. Other answers
    must be equal."""
    if isinstance(a.value, Fraction) and isinstance(b.value, Fraction):
        first, second = number_of(a), number_of(b)
        return same_number(first, second) or same_number(second, first)
    are_texts = a.kind == b.kind == "text"
    return a == b or (are_texts and same_words(str(a), str(b)))


def normalised(text: str, decimal: str = ".") -> str:
    """The words, numbers and symbols of `text`, in lower case and separated by single spaces.
    Sentence punctuation and hyphens between words are left out. Commas that separate thousands are
    left out unless `decimal` is a comma. Between two single letters, "-" is a minus sign and
    stays."""
    found = TOKEN.findall(re.sub("[’′]", "'", text.casefold()))
    tokens = [
        token.replace(",", "") if decimal == "." and _GROUPED.fullmatch(token) else token
        for token in found
        if token not in SILENT
    ]
    between = zip(["", *tokens], tokens, [*tokens[1:], ""], strict=False)
    return " ".join(t for a, t, b in between if t != "-" or not _is_hyphen(a, b))


def _is_hyphen(before: str, after: str) -> bool:
    return before.isalpha() and after.isalpha() and len(before + after) > 2


_GROUPED = re.compile(r"(?!0)(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d\d)+,\d{3})(?:\.\d+)?!*")
"""Matches a number with thousands commas, such as 1,000.50, or 1,00,000 as in India."""


def _text_key(problem: Problem) -> str:
    """The key of a problem whose gold answer is text."""
    return " ".join(" ".join([problem.question, *problem.choices]).split())


def _clean(asked: Sequence[Asked], several_rationales: bool, counts: Counter[str]) -> list[Asked]:
    """The problems without contradictions and duplicates, which are counted in `counts`."""
    first: dict[str, Problem] = {}
    # by both keys, so that a number and a text are compared if they answer the same question
    questions = [{question_key(each.problem), _text_key(each.problem)} for each in asked]
    contradicted = {
        question
        for keys, each in zip(questions, asked, strict=True)
        for question in keys
        if not same_gold(first.setdefault(question, each.problem).answer, each.problem.answer)
    }
    kept: dict[tuple[str | None, ...], Asked] = {}
    for keys, each in zip(questions, asked, strict=True):
        identity = (
            " ".join(each.problem.question.split()),
            *each.problem.choices,
            each.problem.rationale if several_rationales else None,
        )
        if keys & contradicted:
            counts["contradiction"] += 1
        elif identity in kept:
            counts["duplicate"] += 1
        else:
            kept[identity] = each
    return list(kept.values())


def _without(
    asked: Sequence[Asked], elsewhere: Iterable[Asked], counts: Counter[str]
) -> list[Asked]:
    """The problems whose keys do not occur in `elsewhere`. The others are counted as leaks."""
    taken = {key for each in elsewhere for key in each.keys}
    kept = [each for each in asked if not each.keys & taken]
    counts["leak"] += len(asked) - len(kept)
    return kept


def _draw(asked: Sequence[Asked], size: int | None, seed: int, counts: Counter[str]) -> list[Asked]:
    """One problem for each of `size` questions, drawn with `seed`."""
    by_question: dict[str, Asked] = {}
    for each in asked:
        by_question.setdefault(each.key, each)
    if size is None:
        size = min(LARGEST_DEFAULT_DEV, max(len(by_question) // 10, len(by_question) > 1))
    if size and size >= len(by_question):
        raise DataError(
            f"dev_size {size}: only {counted(len(by_question), 'training question')} left (dropped:"
            f" {dropped_text(counts)}); expected a smaller dev_size"
        )
    in_order = sorted(by_question, key=lambda question: derive_seed(seed, "dev", question))
    chosen = set(in_order[:size])
    return [each for question, each in by_question.items() if question in chosen]


def with_unique_ids(*splits: Sequence[Problem]) -> list[tuple[Problem, ...]]:
    """The splits with unique ids. When an id occurs again, it gets a suffix: `-2`, `-3`, …"""
    taken = {problem.id for split in splits for problem in split}
    seen: Counter[str] = Counter()

    def renamed(problem: Problem) -> Problem:
        seen[problem.id] += 1
        name, number = problem.id, seen[problem.id]
        while number > 1 and (name := f"{problem.id}-{number}") in taken:
            number += 1
        taken.add(name)
        return replace(problem, id=name)

    return [tuple(renamed(problem) for problem in split) for split in splits]
