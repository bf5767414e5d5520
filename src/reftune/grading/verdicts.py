"""Grades completions and the values of programs. Every text gets a verdict. An error is raised
only if math-verify is needed but not installed.

All functions are pure, except that expressions are compared in a worker process.
"""

from __future__ import annotations

import datetime
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from math import isfinite
from string import ascii_lowercase
from typing import Any

import regex

from reftune.grading.decimals import with_points
from reftune.grading.golds import number_gold, split_items, worded_gold
from reftune.grading.markers import (
    DEFAULT,
    Reading,
    Statement,
    alternative_behind,
    answer_text,
    is_alternative,
    statements,
)
from reftune.grading.mathematics import same_expression
from reftune.grading.numbers import FLOAT_DIGITS, MAX_DIGITS, number_of, same_number
from reftune.grading.options import names_option, option_values, read_choice
from reftune.grading.plain_text import MAX_SEGMENT_CHARS, first_line, same_text
from reftune.grading.sentences import parse_number
from reftune.grading.words import GROUPS, ONE_TO_TWELVE, TAKEN_BACK, bare_words, states_words
from reftune.text import printable
from reftune.types import Answer, AnswerKind, Graded, Problem, Verdict, spell

MAX_VALUE_CHARS = 200
"""Maximum number of characters in `Graded.value`, and in each quotation in a reason."""
PATTERN_S = 0.5
"""Seconds allowed for matching an answer against a pattern."""

NO_MARKER = 'no marker: expected "the answer is", "answer:", "####" or \\boxed{…}'


def grade_completion(completion: str, problem: Problem, reading: Reading = DEFAULT) -> Graded:
    """Grade a worked solution by the last answer that follows a marker such as "the answer is". A
    marker with no answer after it is skipped. If the solution offers two answers, as in "3 or 4",
    it is right only if both are."""
    found = statements(completion, reading)
    if not found:
        return no_answer(NO_MARKER)
    last = next((each for each in reversed(found) if _says_something(each, problem)), found[-1])
    if last.text is None:
        return no_answer("the last box is never closed")
    position = found.index(last)
    if problem.answer.kind in ("list", "set"):
        items = _in_boxes(completion, found[: position + 1])
        if items is not None:
            return grade_answer(items, problem, reading)
    graded = grade_answer(last.text, problem, reading)
    before = found[position - 1] if position else last
    others = [before.text if is_alternative(completion, before, last) else None]
    for other in [*others, alternative_behind(completion, last)]:
        if graded.verdict is not Verdict.CORRECT or other is None:
            continue
        if grade_answer(other, problem, reading).verdict is not Verdict.CORRECT:
            return no_answer("more than one answer")
    return graded


def _in_boxes(completion: str, found: Sequence[Statement]) -> str | None:
    """The boxes or tags at the end of `found`, joined into one list: "1 and 2" for "\\boxed{1} and
    \\boxed{2}". Boxes and tags are joined only if they are complete, contain one item each and
    stand side by side in `completion`. Returns None if fewer than two can be joined."""
    text, after = found[-1].text or "", found[-1]
    for before in reversed(found[:-1]):
        is_item = before.is_closed and len(split_items(before.text or "")) == 1
        if not (is_item and after.is_closed and is_alternative(completion, before, after)):
            break
        between = completion[before.end : after.start].replace("$", "")
        text, after = f"{before.text}{between}{text}", before
    return None if after is found[-1] or len(split_items(found[-1].text or "")) > 1 else text


_NO_VALUE = re.compile(
    r"\b(?:not?|none|nothing|neither|never|cannot|unknown|unclear|undefined|undetermined|ambiguous"
    rf"|indeterminate|impossible|infinit\w*|inf|nan|zero|{ONE_TO_TWELVE}|hundred|thousand)\b"
    r"|n't\b|∞",
    re.IGNORECASE,
)
"""Matches words that state an answer without digits, such as number words and denials."""


def _says_something(statement: Statement, problem: Problem) -> bool:
    """Whether a statement seems to contain an answer, even one that cannot be read."""
    if statement.text is None:
        return True
    if problem.answer.kind not in ("number", "choice") or problem.scorer is not None:
        return bool(statement.text.strip())
    line = first_line(statement.text)
    if any(map(str.isdigit, line)) or _NO_VALUE.search(line):
        return True
    return problem.answer.kind == "choice" and names_option(line, problem.choices)


# --- values of programs ---------------------------------------------------------------------------


def grade_value(value: Any, problem: Problem) -> Graded:
    """Grade the value that a program returned. A float that is not whole is rounded to 12
    significant digits. None, nan and inf do not count as answers. A boolean counts only if the gold
    answer is yes, no, true or false. A list or date counts only if the gold answer is neither a
    number nor a choice."""
    text = value_text(value)
    if isinstance(value, float | Decimal) and text is not None:
        # Decimal's // fails above 28 digits
        whole = value // 1 if isinstance(value, float) else value.to_integral_value()
        text = text if value == whole else f"{value:.{FLOAT_DIGITS}g}"
    if text is None:
        text = _other_value_text(value, problem.answer)
    if text is None:
        return no_answer(f"solution() returned {describe(value)}, not an answer")
    return grade_answer(text, problem)


def grade_sentence(text: str, problem: Problem) -> Graded:
    """Grade one line of a program's output. The line contains only the answer, or is a sentence
    such as "Total: 5"."""
    stated = answer_text(text)
    return grade_answer(text if stated is None else stated, problem)


def value_text(value: Any) -> str | None:
    """A program's value as text. Returns None unless the value is a string, a finite float or
    `Decimal`, or an integer (but not a boolean) of at most about 900 digits."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return str(value) if value.bit_length() < 3 * MAX_DIGITS else None
    if isinstance(value, float):
        return str(value) if isfinite(value) else None
    if isinstance(value, Decimal):  # isfinite raises for sNaN and is False for 1E+400
        return str(value) if value.is_finite() and abs(value.adjusted()) < MAX_DIGITS else None
    return value if isinstance(value, str) else None


def _other_value_text(value: Any, gold: Answer) -> str | None:
    """The text of a boolean, list or date that counts as an answer (see `grade_value`); None for
    any other value."""
    if gold.kind in ("number", "choice"):
        return None
    if isinstance(value, bool):
        # patterns are case-sensitive: the text `true` would not match the pattern `True`
        names = (("no", "yes"), ("false", "true"))[: 1 if gold.kind == "regex" else 2]
        return next((pair[value] for pair in names if bare_words(str(gold)) in pair), None)
    if isinstance(value, datetime.date):
        return value.isoformat().removesuffix("T00:00:00")
    if isinstance(value, list | tuple | set | frozenset):
        parts = [value_text(each) for each in value]
        if parts and all(part is not None for part in parts):
            edges = str(gold)[:1] + str(gold)[-1:]
            edges = edges if edges in ("()", "[)", "(]", "{}") else "[]"
            return f"{edges[0]}{', '.join(map(str, parts))}{edges[1]}"
    return None


def describe(value: Any) -> str:
    """A description of a value that does not count as an answer, for use in a grade's reason."""
    if isinstance(value, bool | float | None):
        return str(value)
    if isinstance(value, int):
        return "an integer that is too long"
    return f"a value of type {type(value).__name__}"


# --- answers by kind ------------------------------------------------------------------------------


def grade_answer(text: str, problem: Problem, reading: Reading = DEFAULT) -> Graded:
    """Grade an answer. The text may contain units and prose around the answer."""
    if not text.strip():
        return no_answer("the answer is empty")
    kind, written = problem.answer.kind, text
    text = with_points(text, reading.decimal, kind)
    if kind in ("latex", "list", "set"):
        text = _without_bold(text)
    if problem.scorer is not None:
        return _grade_by_scorer(text, problem, problem.scorer)
    if kind == "choice" and problem.decimal == ",":
        return _grade_choice(_as_letter(written, problem) or text, problem)
    return _GRADERS[kind](text, problem)


def _as_letter(text: str, problem: Problem) -> str:
    """The letter of the option that equals the first line of `text`; empty unless exactly one
    option does."""
    found = [n for n, each in enumerate(problem.choices) if same_text(first_line(text), each)]
    return ascii_lowercase[found[0]] if len(found) == 1 else ""


def _without_bold(text: str) -> str:
    """`text` without the `**` around bold words in its first line. An unpaired `**` is removed too,
    because `text` may begin inside bold text: in "**The answer is x + 1.**", the answer's text is
    only "x + 1.**"."""
    line, newline, rest = text.lstrip().partition("\n")
    line = _BOLD.sub(r"\1", line)
    if line.count("**") % 2:
        line = _END_OF_BOLD.sub("", line, count=1)
    return line + newline + rest


_BOLD = re.compile(r"(?<![\w)])\*\*(?=\S)([^*]+)(?<=\S)\*\*(?![\w(])")  # not 2**3
_END_OF_BOLD = re.compile(r"^\*\*|\*\*(?=[^\w*]*$)")


def _grade_number(text: str, problem: Problem) -> Graded:
    gold = problem.answer
    assert isinstance(gold.value, Fraction)
    number = parse_number(text)
    if number is None:
        return no_answer(f"no single number in {quote(text)}")
    right = same_number(number, number_of(gold))
    if not right and _IN_GROUPS.search(first_line(text)):
        return no_answer(f"{quote(text)} counts in groups")
    return judge(right, str(number), str(gold))


_IN_GROUPS = re.compile(rf"\d ?(?:{GROUPS})\b", re.IGNORECASE)


def _grade_choice(text: str, problem: Problem) -> Graded:
    letter = read_choice(text, option_values(problem))
    if letter is None:
        return no_answer(f"no single option in {quote(text)}")
    return judge(letter == problem.answer.value, letter, str(problem.answer.value))


def _grade_words(text: str, problem: Problem) -> Graded:
    gold, words = str(problem.answer.value), text.strip()
    lettered = _LETTERED.fullmatch(first_line(words))
    if lettered and lettered["letter"].lower() == read_choice(words, ()) == gold.lower():
        return judge(True, gold, gold)  # the question may list lettered options
    states = states_words(words, gold)
    if states == "unclear":
        return no_answer(f"more than one answer in {quote(text)}")
    return judge(states == "yes", gold if states == "yes" else words, gold)


_LETTERED = re.compile(
    r"\W*(?:(?i:option|choice)\s)?\W*(?P<letter>[A-Ha-h])"
    r"(?:\W*|[).:]\s.*|\s(?:because|since)\b.*)"
)


def _grade_expression(text: str, problem: Problem) -> Graded:
    gold = str(problem.answer.value)
    comparison = same_expression(gold, text)
    if _TAKEN_BACK_LATER.search(text[:MAX_SEGMENT_CHARS]):
        return no_answer(f"more than one answer in {quote(text)}")
    if comparison.outcome == "unread":
        return no_answer(comparison.reason or f"no expression in {quote(text)}")
    if comparison.outcome in ("timeout", "error"):
        return Graded.without_answer(Verdict(comparison.outcome), clip(comparison.reason))
    right = comparison.outcome == "equal"
    return judge(right, gold if right else comparison.read, gold)


_TAKEN_BACK_LATER = re.compile(rf"[.,;?!]\s(?={TAKEN_BACK.pattern})", re.IGNORECASE)


def _grade_pattern(text: str, problem: Problem) -> Graded:
    line, pattern = text.strip().partition("\n")[0].strip(), str(problem.answer.value)
    line = line[:MAX_SEGMENT_CHARS]
    bare = _without_bold(line).strip()
    spellings = dict.fromkeys((line, line.rstrip(".,;:!"), bare, bare.rstrip(".,;:!")))
    try:
        found = (s for s in spellings if regex.fullmatch(pattern, s, timeout=PATTERN_S))
        right = next(found, None)
    except TimeoutError:
        reason = f"matching {quote(pattern)} took more than {PATTERN_S:g} s"
        return Graded.without_answer(Verdict.TIMEOUT, reason)
    return judge(right is not None, line if right is None else right, pattern)


_PLAIN_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:/\d+)?")


def _grade_by_scorer(text: str, problem: Problem, scorer: Callable[[str], float]) -> Graded:
    """Grade with the task's scorer. The scorer expects the bare answer, so it gets several versions
    of the text, such as its first line. The answer is right if any version gets a score of 1."""
    words = text.strip()
    first = words.splitlines()[0].strip()
    candidates = [words, words.rstrip(".!"), first, first_line(words).rstrip(".!")]
    value, number = words, parse_number(words)
    if number is not None and _PLAIN_NUMBER.fullmatch(str(problem.answer)):
        value = str(number)
        candidates.append(spell(number.value))
    scores, error = [], ""
    for candidate in dict.fromkeys(candidates):
        try:
            scores.append(float(scorer(candidate)))
        except Exception as failure:  # noqa: BLE001  scorers parse model output, and few handle every text
            error = f"the task's scorer failed: {type(failure).__name__}: {clip(str(failure))}"
    if not scores:
        return Graded.without_answer(Verdict.ERROR, error)
    return judge(any(score >= 1 for score in scores), value, str(problem.answer))


# --- answers of several parts ---------------------------------------------------------------------


def _grade_spellings(text: str, problem: Problem) -> Graded:
    """The best of the grades that `text` gets against the accepted spellings."""
    best, gold = _best(grade_answer(text, each) for each in _parts(problem)), str(problem.answer)
    # all spellings stand for one answer
    return judge(True, gold, gold) if best.verdict is Verdict.CORRECT else best


def _grade_list(text: str, problem: Problem) -> Graded:
    """Grade an answer part by part. Only the parts of a set may be in any order."""
    parts, gold = _parts(problem), str(problem.answer.value)
    listed = _listed_in(text, len(parts))
    said = split_items(listed)
    if len(said) < len(parts):  # "1,2, 3"
        said = split_items(re.sub(r",(?!\s)", ", ", listed))
    if problem.answer.kind == "set" and len(said) < len(parts):
        said = split_items(listed, "and|or")
    if not said:
        return no_answer(f"no items in {quote(text)}")
    if problem.answer.kind == "set":
        return _grade_set(said, parts, gold)
    graded = [grade_answer(item, part) for item, part in zip(said, parts, strict=False)]
    return _whole_list(graded, said, gold, complete=len(said) == len(parts))


def _grade_set(said: Sequence[str], parts: Sequence[Problem], gold: str) -> Graded:
    graded: list[Graded] = []
    equal: dict[str, list[int]] = {}  # for each item, the parts that it equals
    for item in said:
        tries = [grade_answer(item, part) for part in parts]
        graded.append(_best(tries))
        equal[item] = [n for n, each in enumerate(tries) if each.verdict is Verdict.CORRECT]
    found: set[int] = set()
    for places in sorted(equal.values(), key=len):  # 3.14 may equal both 3.14 and 3.141
        found.update([n for n in places if n not in found][:1])
    in_order = sorted(graded, key=lambda each: each.value or "")
    return _whole_list(in_order, said, gold, complete=len(found) == len(parts))


def _whole_list(
    graded: Sequence[Graded], said: Sequence[str], gold: str, *, complete: bool
) -> Graded:
    failed = [each for each in graded if each.verdict not in (Verdict.CORRECT, Verdict.WRONG)]
    if failed:
        return failed[0]
    right = complete and all(each.verdict is Verdict.CORRECT for each in graded)
    values = [each.value or "" for each in graded] + list(said[len(graded) :])
    return judge(right, gold if right else ", ".join(values), gold)


def _listed_in(text: str, num_parts: int) -> str:
    """The list in an answer: the first line of `text`, without any words after the list. If the
    gold answer has several parts but the first line has only one, the result is the whole text."""
    text = text.strip()[:MAX_SEGMENT_CHARS]
    lines = text.splitlines()
    first = _AFTER_LIST.split(lines[0], maxsplit=1)[0] if lines else ""
    formula = _FORMULA.fullmatch(first)
    if formula is not None and num_parts > 1:
        first = formula[1].strip()
    if num_parts > 1 and len(lines) > 1 and len(split_items(first)) <= 1:
        return text
    return first


_FORMULA = re.compile(r"(?:\$\$?|\\[(\[])((?:[^$\\]|\\[^()\[\]])+)(?:\$\$?|\\[)\]])[ .!]*")
"""Matches a line that consists of one formula."""
_AFTER_LIST = re.compile(r",?\s+(?:because|since|as|so)\b|(?<=[^\d\s])\.\s|\.\s+(?=[A-Z])")


def _parts(problem: Problem) -> list[Problem]:
    """One copy of the problem for each part of its gold answer, with that part as the copy's gold
    answer."""
    return [
        replace(problem, answer=part_answer(item), choices=(), scorer=None)
        for item in problem.answer.items
    ]


@lru_cache(maxsize=10_000)
def part_answer(item: str) -> Answer:
    """A gold answer made from one part of a list or set, or from one accepted spelling."""
    return number_gold(item) or worded_gold(item)


def needs_worker(gold: Answer) -> bool:
    """Whether comparing answers with this gold answer may need a worker process."""
    return "latex" in {gold.kind, *(part_answer(item).kind for item in gold.items)}


_PRECEDENCE = "correct timeout error wrong no_answer memory forbidden".split()
"""Verdicts, from best to worst. A timeout or an error ranks above a wrong answer, because after
either, the answer may still be right."""


def _best(graded: Iterable[Graded]) -> Graded:
    return min(graded, key=lambda each: _PRECEDENCE.index(each.verdict.value))


_GRADERS: dict[AnswerKind, Callable[[str, Problem], Graded]] = {
    "number": _grade_number,
    "choice": _grade_choice,
    "text": _grade_words,
    "latex": _grade_expression,
    "any_of": _grade_spellings,
    "list": _grade_list,
    "set": _grade_list,
    "regex": _grade_pattern,
}


# --- grades ---------------------------------------------------------------------------------------


def judge(right: bool, value: str, gold: str) -> Graded:
    """A grade of CORRECT or WRONG, with a reason that quotes the answer and the gold answer."""
    gold = clip(gold)
    if len(value) > MAX_VALUE_CHARS:  # a checksum distinguishes long values that begin alike
        value = f"{clip(value[:180])}… {zlib.crc32(value.encode('utf-8', 'replace')):08x}"
    value = clip(value)
    verdict, is_gold = (Verdict.CORRECT, "is") if right else (Verdict.WRONG, "is not")
    return Graded(verdict=verdict, value=value, reason=f"{value} {is_gold} the gold answer {gold}")


def no_answer(reason: str) -> Graded:
    """The grade of a completion without a readable answer."""
    return Graded.without_answer(Verdict.NO_ANSWER, reason)


def quote(text: str) -> str:
    """The start of `text` in quotation marks, for use in a reason."""
    words = clip(text.lstrip()[:80])
    return f'"{words}"' if words else "an empty string"


def clip(text: str) -> str:
    """`text` as one line of limited length, with `�` for unprintable characters, because some
    cannot be encoded."""
    return printable(" ".join(text[: 2 * MAX_VALUE_CHARS].split())[:MAX_VALUE_CHARS])
