"""Generates arithmetic word problems with rationales, simple enough for a small transformer trained
from scratch.

    Mia has 12 kites. Leo has 3 times as many kites as Mia. Leo loses 4 kites. How many kites does
    Leo have?

A story is a list of sentences together with a graph of quantities. Every amount, update and
relation is a node that points to the nodes it was computed from. Irrelevant sentences have no
nodes. The rationale is written from the part of the graph that the answer needs. Sentences are
short, and every word and number is meant to be one token.
"""

from __future__ import annotations

import operator
import random
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Literal, Self

from pydantic import Field, model_validator

from reftune.datasets import Splits
from reftune.errors import DataError
from reftune.recipe import Component, refusal
from reftune.text import counted
from reftune.types import Answer, Problem

NAMES = ("Ann", "Ben", "Eva", "Ivy", "Leo", "Mia", "Noa", "Sam", "Tom", "Zoe")
OBJECTS = ("drums", "geese", "hats", "kites", "pies", "snails")
FACTORS = range(2, 10)
"""Possible prices and factors in "times as many". Larger ones would not make sensible stories."""
NUM_OPTIONS = 4
MAX_DRAWS = 10_000
"""Number of stories tried before the search for a new question gives up."""
ARITHMETIC: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
}


class WordProblems(Component):
    """Generates word problems. The dev and test questions depend neither on the number of training
    questions nor on `styles`."""

    train: int = Field(1000, ge=1)
    dev: int = Field(300, ge=1)
    test: int = Field(1000, ge=1)
    operations: tuple[int, int] = (0, 2)
    """Smallest and largest number of operations per question."""
    numbers: tuple[int, int] = (2, 30)
    """Smallest and largest amount in a question, apart from factors and prices."""
    people: int = Field(3, ge=1, le=5)
    """Maximum number of people in a question."""
    distractors: float = Field(0.4, ge=0, le=1)
    """Probability that a question contains an irrelevant sentence."""
    max_value: int = Field(999, ge=10)
    """Upper limit for answers and intermediate results."""
    rationale: Literal["program", "nl"] = "program"
    styles: int = Field(4, ge=1, le=24)
    """Number of ways in which rationales are written: at most 24 for programs or 8 for `nl`."""
    answer: Literal["number", "choice"] = "number"
    """`choice` gives each question four options."""

    @model_validator(mode="after")
    def _sensible_ranges(self) -> Self:
        if not 0 <= self.operations[0] <= self.operations[1] <= 6:
            raise refusal("operations", "operations: expected [minimum, maximum] from 0 to 6")
        if not 1 <= self.numbers[0] < self.numbers[1] <= self.max_value:
            raise refusal("numbers", "numbers: expected [smallest, largest] from 1 to max_value")
        if self.rationale == "nl" and self.styles > len(_PROSE_STYLES):
            raise refusal("styles", "styles: expected at most 8 for rationale: nl")
        return self

    def load(self, *, seed: int) -> Splits:
        """Problems drawn with `seed`. Raises: DataError if the settings do not allow as many
        different questions as the splits need."""
        stories = self._different_stories(random.Random(f"stories {seed}"))
        styles = random.Random(f"options and styles {seed}")
        options = random.Random(f"options {seed}")

        def draw(split: str, size: int) -> tuple[Problem, ...]:
            return tuple(
                self._problem(f"{split}-{i}", next(stories), styles, options) for i in range(size)
            )

        test, dev, train = draw("test", self.test), draw("dev", self.dev), draw("train", self.train)
        return Splits(train=train, dev=dev, test=test)

    def _different_stories(self, rng: random.Random) -> Iterator[_Story]:
        """Stories with different texts. Each number of operations that the settings allow is
        equally likely. Raises: DataError if no new story is found."""
        seen: set[str] = set()
        while True:
            num_operations = rng.randint(*self.operations)
            drawn = (self._story(num_operations, rng) for _ in range(MAX_DRAWS))
            story = next((each for each in drawn if each and each.text not in seen), None)
            if story is None:
                raise DataError(
                    f"word_problems: no new question with {counted(num_operations, 'operation')}"
                    f" after {counted(len(seen), 'question')}, but the splits need"
                    f" {self.train + self.dev + self.test}; widen `numbers`, raise `people` or"
                    " `max_value`, or make the splits smaller"
                )
            seen.add(story.text)
            yield story

    def _problem(
        self, id: str, story: _Story, styles: random.Random, options: random.Random
    ) -> Problem:
        style, rationale = self._solution(story, styles)
        value = story.answer.value
        answer, choices = Answer(kind="number", value=Fraction(value)), tuple[str, ...]()
        if self.answer == "choice":
            choices = _options(story.answer, self.max_value, options)
            answer = Answer(kind="choice", value="abcd"[choices.index(str(value))])
        num_operations = sum(bool(quantity.symbol) for quantity in _ancestors(story.answer))
        return Problem(
            id=id,
            question=story.text,
            answer=answer,
            rationale=rationale,
            choices=choices,
            columns={"operations": num_operations, "style": style},
        )

    def _solution(self, story: _Story, rng: random.Random) -> tuple[str, str]:
        """The index of a style drawn with `rng`, as text, and the worked solution in this style."""
        style = rng.randrange(self.styles)
        write = _write_program if self.rationale == "program" else _write_prose
        return str(style), write(story, style)

    def _story(self, num_operations: int, rng: random.Random) -> _Story | None:
        """A random story. None if a result is out of range, or if the answer does not depend on all
        quantities of the story."""
        asks = ["count"]
        if num_operations >= 1:
            asks += ["coins", "together", "more"] if self.people >= 2 else ["coins"]
        ask = rng.choice(asks)
        teller = _Teller(
            rng=rng,
            numbers=self.numbers,
            people=rng.sample(NAMES, self.people),
            thing=rng.choice(OBJECTS),
        )
        teller.introduce()
        if ask in ("together", "more") and rng.random() < 0.5:
            teller.introduce()
        for _ in range(num_operations - (ask != "count")):
            if len(teller.holdings) < self.people and rng.random() < 0.6:
                teller.relate()
            else:
                teller.update()
        if ask in ("together", "more") and len(teller.holdings) < 2:
            teller.introduce()
        if rng.random() < self.distractors:
            teller.distract()
        story = teller.finish(ask)
        fits = all(
            1 <= quantity.value <= self.max_value for quantity in (*story.quantities, story.answer)
        )
        return story if fits and len(story.quantities) == len(teller.told) else None


# --- stories --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Quantity:
    """A number in a story. Two quantities are never equal, even if both are "3 hats"."""

    value: int
    owner: str = ""
    """Who has the things; empty for a bare number and for answers about coins or two people."""
    symbol: str = ""
    """The operation that computes this quantity; empty for a number stated in the story."""
    operands: tuple[_Quantity, ...] = ()


def _combine(left: _Quantity, symbol: str, right: _Quantity, owner: str = "") -> _Quantity:
    return _Quantity(ARITHMETIC[symbol](left.value, right.value), owner, symbol, (left, right))


def _ancestors(quantity: _Quantity) -> set[_Quantity]:
    """The quantity, and all quantities that it was computed from."""
    return {quantity}.union(*(_ancestors(operand) for operand in quantity.operands))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Story:
    text: str
    """All sentences; the last is the question."""
    quantities: list[_Quantity]
    """The people's quantities from which the answer is computed, in the order of the story."""
    answer: _Quantity


@dataclass(kw_only=True, slots=True)
class _Teller:
    """Writes a story sentence by sentence and keeps track of quantities."""

    rng: random.Random
    numbers: tuple[int, int]
    people: list[str]
    """Everyone who may appear in the story. Those who already have things are in `holdings`."""
    thing: str
    holdings: dict[str, _Quantity] = field(default_factory=dict)
    """Each person's current amount."""
    told: list[_Quantity] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    latest: str = ""
    """The person mentioned last."""

    def introduce(self) -> None:
        person, number = self._someone_new(), self._number()
        self._tell(f"{person} has {number.value} {self.thing}.", _Quantity(number.value, person))

    def update(self) -> None:
        """Let a person gain or lose things. As in real stories, this is usually the person
        mentioned last."""
        person = self.latest if self.rng.random() < 0.7 else self.rng.choice(list(self.holdings))
        number = self._number()
        verb = self.rng.choice(("buys", "finds", "loses", "sells"))
        symbol = "+" if verb in ("buys", "finds") else "-"
        quantity = _combine(self.holdings[person], symbol, number, person)
        self._tell(f"{person} {verb} {number.value} {self.thing}.", quantity)

    def relate(self) -> None:
        """Introduce a person who has more or fewer things than the person mentioned last, or
        several times as many."""
        person, base = self._someone_new(), self.latest
        symbol = self.rng.choice("+-*")
        number = self._factor() if symbol == "*" else self._number()
        comparison = {
            "+": f"more {self.thing} than",
            "-": f"fewer {self.thing} than",
            "*": f"times as many {self.thing} as",
        }[symbol]
        quantity = _combine(self.holdings[base], symbol, number, person)
        self._tell(f"{person} has {number.value} {comparison} {base}.", quantity)

    def distract(self) -> None:
        person = self.rng.choice(self.people)
        things = [each for each in OBJECTS if each != self.thing or person not in self.holdings]
        sentence = f"{person} has {self._number().value} {self.rng.choice(things)}."
        self.sentences.insert(self.rng.randint(0, len(self.sentences)), sentence)

    def finish(self, ask: str) -> _Story:
        person = self.latest
        if ask == "count":
            answer = self.holdings[person]
            question = f"How many {self.thing} does {person} have?"
        elif ask == "coins":
            price = self._factor()
            answer = _combine(self.holdings[person], "*", price)
            self.sentences.append(f"{person} sells all {self.thing} for {price.value} coins each.")
            question = f"How many coins does {person} get?"
        else:
            other = self.rng.choice([other for other in self.holdings if other != person])
            if self.holdings[other].value > self.holdings[person].value:
                person, other = other, person
            symbol, question = {
                "together": ("+", f"How many {self.thing} do {person} and {other} have together?"),
                "more": ("-", f"How many more {self.thing} does {person} have than {other}?"),
            }[ask]
            answer = _combine(self.holdings[person], symbol, self.holdings[other])
        needed = _ancestors(answer)
        return _Story(
            text=" ".join([*self.sentences, question]),
            quantities=[quantity for quantity in self.told if quantity in needed],
            answer=answer,
        )

    def _tell(self, sentence: str, quantity: _Quantity) -> None:
        self.sentences.append(sentence)
        self.told.append(quantity)
        self.holdings[quantity.owner] = quantity
        self.latest = quantity.owner

    def _someone_new(self) -> str:
        return next(person for person in self.people if person not in self.holdings)

    def _number(self) -> _Quantity:
        return _Quantity(self.rng.randint(*self.numbers))

    def _factor(self) -> _Quantity:
        return _Quantity(self.rng.choice(FACTORS))


# --- options of a choice --------------------------------------------------------------------------


def _options(right: _Quantity, max_value: int, rng: random.Random) -> tuple[str, ...]:
    """The options in random order: the right answer and the results of likely mistakes, such as a
    step left out, a different last operation or a small slip."""
    steps = [step.value for step in _ancestors(right)]
    operations = [
        apply(*(operand.value for operand in right.operands))
        for apply in ARITHMETIC.values()
        if right.symbol
    ]
    mistakes = sorted({*steps, *operations})
    rng.shuffle(mistakes)
    slips = [right.value + slip for slip in (1, -1, 2, -2, 10, -10, 3, -3)]
    likely = dict.fromkeys([right.value, *mistakes, *slips])
    values = [value for value in likely if 1 <= value <= max_value][:NUM_OPTIONS]
    rng.shuffle(values)
    return tuple(map(str, values))


# --- rationales -----------------------------------------------------------------------------------


def _formula(quantity: _Quantity, names: Mapping[_Quantity, str], swap: bool) -> str:
    """The expression that computes a quantity, such as `(a - 4) * 3`. An operand is written as its
    name in `names` or, if it has no name there, as a number or expression. `swap` swaps the
    operands of `+` and `*`, as in `3 * 12` instead of `12 * 3`."""
    if not quantity.symbol:
        return str(quantity.value)
    terms = []
    for operand in quantity.operands:
        term = names.get(operand) or _formula(operand, names, swap)
        is_written_sum = operand not in names and operand.symbol in ("+", "-")
        is_subtracted = quantity.symbol == "-" and operand is quantity.operands[1]
        needs_brackets = is_written_sum and (quantity.symbol == "*" or is_subtracted)
        terms.append(f"({term})" if needs_brackets else term)
    if swap and quantity.symbol in ("+", "*"):
        terms.reverse()
    return f" {quantity.symbol} ".join(terms)


def _write_program(story: _Story, style: int) -> str:
    """A program that returns the answer. The style determines which quantities are assigned to
    variables, and what the variables are called."""
    naming, swap, ending = _PROGRAM_STYLES[style]
    names = naming(story)
    lines = [f"{name} = {_formula(quantity, names, swap)}" for quantity, name in names.items()]
    result = names.get(story.answer) or _formula(story.answer, names, swap)
    return "\n    ".join(["def solution():", *lines, ending.format(result)])


def _people(story: _Story) -> dict[_Quantity, str]:
    """Quantities are named after their owners: `ben = 12`, `ben = ben - 4`, `ann = ben * 3`,
    `return ann`."""
    return {quantity: quantity.owner.lower() for quantity in story.quantities}


def _nothing(story: _Story) -> dict[_Quantity, str]:
    """No quantity has a name: `return (12 - 4) * 3`."""
    return {}


def _steps(story: _Story, letters: str) -> dict[_Quantity, str]:
    """Each quantity is named by a letter: `a = 12`, `b = a - 4`, `c = b * 3`, `return c`."""
    return dict(zip(story.quantities, letters, strict=False))


def _told_numbers(story: _Story, letters: str) -> dict[_Quantity, str]:
    """Each stated number is named by a letter: `a = 12`, `b = 4`, `c = 3`, `return (a - b) * c`."""
    told = (x for each in (*story.quantities, story.answer) for x in (*each.operands, each))
    numbers = dict.fromkeys(quantity for quantity in told if not quantity.symbol)
    return dict(zip(numbers, letters, strict=False))


_FIRST_LETTERS, _LATER_LETTERS = string.ascii_lowercase[:15], string.ascii_lowercase[15:]
_NAMINGS: tuple[Callable[[_Story], dict[_Quantity, str]], ...] = (
    _people,
    partial(_steps, letters=_FIRST_LETTERS),
    _nothing,
    partial(_told_numbers, letters=_FIRST_LETTERS),
    partial(_steps, letters=_LATER_LETTERS),
    partial(_told_numbers, letters=_LATER_LETTERS),
)
_ENDINGS = ("return {0}", "answer = {0}\n    return answer")
_PROGRAM_STYLES = [
    (naming, swap, ending) for ending in _ENDINGS for swap in (False, True) for naming in _NAMINGS
]


def _write_prose(story: _Story, style: int) -> str:
    """A worked solution. In some styles, it is a single equation, such as `(12 - 4) * 3 = 24.` In
    the others, it has one sentence per computed quantity, and the style determines how these
    sentences begin. If nothing is computed, it is a sentence such as `Ben has 12.` in all
    styles."""
    begin, swap = _PROSE_STYLES[style]
    needed = dict.fromkeys((*story.quantities, story.answer))
    computed = [quantity for quantity in needed if quantity.symbol]
    if not computed:
        return f"{story.answer.owner} has {story.answer.value}."
    if begin is None:
        return f"{_formula(computed[-1], {}, swap)} = {computed[-1].value}."
    return " ".join(f"{begin(i, step)}{_equation(step, swap)}." for i, step in enumerate(computed))


def _equation(step: _Quantity, swap: bool) -> str:
    values = {operand: str(operand.value) for operand in step.operands}
    return f"{_formula(step, values, swap)} = {step.value}"


_BEGINNINGS: tuple[Callable[[int, _Quantity], str] | None, ...] = (
    # `Ben has 12 - 4 = 8. Ann has 8 * 3 = 24.`
    lambda i, step: f"{step.owner} has " if step.owner else "That is ",
    lambda i, step: "",  # `12 - 4 = 8. 8 * 3 = 24.`
    lambda i, step: "Then " if i else "First ",  # `First 12 - 4 = 8. Then 8 * 3 = 24.`
    None,
)
_PROSE_STYLES = [(begin, swap) for swap in (False, True) for begin in _BEGINNINGS]
