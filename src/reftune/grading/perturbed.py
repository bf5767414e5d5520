"""Changes gold solutions to test a reward. Some changes certainly make the answer wrong, and others
certainly leave it right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from reftune.grading.decimals import with_separator
from reftune.grading.markers import answer_text, reasoning_text
from reftune.types import Problem, spell_decimal

MAX_SIZE = 10**6
"""Gold answers with at least this absolute value are not changed, because a change of 1 may be
within the grader's tolerance."""
PRINTED = "printed and not returned"
"""The change that makes a program print its answer instead of returning it. A format with
`scripts: read` may accept such a program."""
_RETURN = re.compile(r"^(?P<indent>[ \t]*)return[ \t]+(?P<value>\S.*?)[;\s]*\Z", re.MULTILINE)
_STATED = re.compile(r"[\s:]*(?P<answer>\S(?:.*\S)?)\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Perturbed:
    """A changed gold solution."""

    kind: str
    """A description of the change."""
    text: str


def wrong_solutions(problem: Problem, target: str, decimal: str = ".") -> Iterator[Perturbed]:
    """Solutions that look like the gold solution `target` but state another answer, two answers or
    none. `target` is a program or plain text. Yields nothing for a program whose last line is not a
    `return`, or for plain text whose answer cannot be found. In plain text, numbers are written
    with the decimal separator `decimal`."""
    end = _RETURN.search(target)
    return _wrong_programs(problem, end) if end else _wrong_words(problem, target, decimal)


def right_solutions(problem: Problem, target: str, decimal: str = ".") -> Iterator[Perturbed]:
    """Slightly rewritten versions of the gold solution `target` that keep its answer. `target` is a
    program or plain text. Yields nothing for a program whose last line is not a `return`, or for
    plain text whose answer cannot be found or is neither a number nor a choice. In plain text,
    numbers are written with the decimal separator `decimal`."""
    end = _RETURN.search(target)
    return _right_programs(problem, end) if end else _right_words(problem, target, decimal)


def other_answers(problem: Problem) -> dict[str, str]:
    """Kind of change → the changed gold answer, if the change is certain to make it wrong."""
    gold = problem.answer.value
    if problem.answer.kind == "choice" and len(problem.choices) > 1:
        position = (ord(str(gold)) - ord("a") + 1) % len(problem.choices)
        return {"another option": chr(ord("a") + position)}
    if not isinstance(gold, Fraction) or abs(gold) >= MAX_SIZE:
        return {}
    values = {"off by one": gold + 1, "opposite sign": -gold, "ten times": 10 * gold}
    return {
        kind: spell_decimal(value)
        for kind, value in values.items()
        if abs(value - gold) > Fraction(1, 2)
    }


# --- programs -------------------------------------------------------------------------------------


def _wrong_programs(problem: Problem, end: re.Match[str]) -> Iterator[Perturbed]:
    head, indent, value = end.string[: end.start()] + end["indent"], end["indent"], end["value"]
    for kind, answer in other_answers(problem).items():
        literal = repr(answer) if problem.answer.kind == "choice" else answer
        yield Perturbed(kind, f"{head}return {literal}")
    yield Perturbed("computed and not returned", f"{head}result = {value}")
    # the bracket is on a line of its own, because the value may end in a comment
    yield Perturbed(PRINTED, f"{head}print({value}\n{indent})")
    yield Perturbed("an error before the answer", f"{head}undefined_name\n{indent}return {value}")


def _right_programs(problem: Problem, end: re.Match[str]) -> Iterator[Perturbed]:
    above, indent, value = end.string[: end.start()], end["indent"], end["value"]
    head = above + indent
    yield Perturbed("a comment", f"{head}# so the answer is\n{indent}return {value}")
    yield Perturbed("a blank line", f"{above}\n{indent}return {value}" if above else end.string)
    yield Perturbed("an import", f"{head}import math\n{indent}return {value}")
    yield Perturbed("a variable", f"{head}final_answer = {value}\n{indent}return final_answer")
    if problem.answer.kind == "number":
        yield Perturbed("a float", f"{head}return float({value}\n{indent})")
        yield Perturbed("a string", f"{head}return str({value}\n{indent})")


# --- words ----------------------------------------------------------------------------------------


def _parts(target: str) -> tuple[str, str] | None:
    """The two parts of a solution in words: the text before the answer, and the answer. None if no
    answer can be found."""
    tail = answer_text(target) or ""
    found = _STATED.fullmatch(tail)
    if found is None or not target.endswith(tail):
        return None
    return target[: len(target) - len(tail) + found.start("answer")], found["answer"]


def _wrong_words(problem: Problem, target: str, decimal: str) -> Iterator[Perturbed]:
    parts = _parts(target)
    if parts is None:
        return
    before, stated = parts
    for kind, answer in other_answers(problem).items():
        other = with_separator(answer, decimal)
        yield Perturbed(kind, f"{before}{other}")
        again = before.rpartition("\n")[2]  # the line that announces the answer
        yield Perturbed(f"right, then {kind}", f"{before}{stated}\n{again}{other}")
        yield Perturbed(f"right or {kind}", f"{before}{stated} or {other}")
    yield Perturbed("no answer", reasoning_text(target).rpartition("\n")[0])


def _right_words(problem: Problem, target: str, decimal: str) -> Iterator[Perturbed]:
    parts = _parts(target)
    if parts is None or problem.answer.kind not in ("number", "choice"):
        return
    before, _ = parts
    gold = problem.answer.value
    plain = spell_decimal(gold) if isinstance(gold, Fraction) else str(gold)
    spellings = {"a full stop": f"{plain}.", "bold": f"**{plain}**"}
    if isinstance(gold, Fraction):
        spellings |= {"a currency": f"${plain}", "a unit": f"{plain} pieces"}
        if gold.denominator == 1:
            spellings["a decimal"] = f"{plain}.0"
        if gold.denominator == 1 and abs(gold) >= 1000:
            spellings["a thousands separator"] = f"{int(gold):,}"
    else:
        spellings |= {"brackets": f"({plain})", "a capital": plain.upper()}
    for kind, answer in spellings.items():
        yield Perturbed(kind, f"{before}{with_separator(answer, decimal)}")
