"""Shows the kinds of gold answer in the data, so that the user can notice answers that were read
wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reftune.datasets import Splits
from reftune.text import printable
from reftune.types import ANY_ANSWER, Problem

NUM_EXAMPLES = 3
MOST_CHARS = 40
"""Maximum length of a shown example, in characters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldExample:
    """A gold answer, as spelled in the data (`raw`) and as reftune reads it (`read`)."""

    raw: str
    read: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldKind:
    kind: str
    count: int
    examples: tuple[GoldExample, ...]
    """At most three examples. Answers whose reading differs from their spelling come first."""


def gold_kinds(splits: Splits) -> tuple[GoldKind, ...]:
    """The kinds of gold answer in all splits, the most frequent first."""
    by_kind: dict[str, list[Problem]] = {}
    for problem in (*splits.train, *splits.dev, *splits.test):
        if problem.answer != ANY_ANSWER:
            by_kind.setdefault(problem.answer.kind, []).append(problem)
    kinds = [
        GoldKind(kind=kind, count=len(problems), examples=_examples(problems))
        for kind, problems in by_kind.items()
    ]
    return tuple(sorted(kinds, key=lambda kind: -kind.count))


def golds_text(kinds: Sequence[GoldKind]) -> str:
    """One line per kind, with the number of answers of this kind and some examples, such as
    `golds  number 36: 1,234 → 1234, …`."""
    return printable("\n".join(f"golds  {_line(kind)}" for kind in kinds))


def _examples(problems: Sequence[Problem]) -> tuple[GoldExample, ...]:
    seen = dict.fromkeys(
        GoldExample(raw=problem.written_answer, read=str(problem.answer)) for problem in problems
    )
    return tuple(sorted(seen, key=lambda gold: gold.raw == gold.read)[:NUM_EXAMPLES])


def _line(kind: GoldKind) -> str:
    examples = [f"{_short(gold.raw)} → {_short(gold.read)}" for gold in kind.examples]
    return f"{kind.kind} {kind.count}: {', '.join(examples)}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MOST_CHARS else line[: MOST_CHARS - 1] + "…"
