"""Shows the kinds of gold answer in the data, so that the user can notice answers that were read
wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reftune.datasets import Splits
from reftune.text import printable
from reftune.types import ANY_ANSWER

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
    by_kind: dict[str, list[GoldExample]] = {}
    for problem in (*splits.train, *splits.dev, *splits.test):
        if problem.answer != ANY_ANSWER:
            gold = GoldExample(raw=problem.written_answer, read=str(problem.answer))
            by_kind.setdefault(problem.answer.kind, []).append(gold)
    kinds = []
    for kind, golds in by_kind.items():
        changed_first = sorted(dict.fromkeys(golds), key=lambda gold: gold.raw == gold.read)
        examples = tuple(changed_first[:NUM_EXAMPLES])
        kinds.append(GoldKind(kind=kind, count=len(golds), examples=examples))
    return tuple(sorted(kinds, key=lambda kind: -kind.count))


def golds_text(kinds: Sequence[GoldKind]) -> str:
    """One line per kind, with the number of answers of this kind and some examples, such as
    `golds  number 36: 1,234 → 1234, …`."""
    lines = []
    for kind in kinds:
        examples = [f"{_short(gold.raw)} → {_short(gold.read)}" for gold in kind.examples]
        lines.append(f"golds  {kind.kind} {kind.count}: {', '.join(examples)}")
    return printable("\n".join(lines))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MOST_CHARS else line[: MOST_CHARS - 1] + "…"
