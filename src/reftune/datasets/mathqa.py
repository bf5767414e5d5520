"""MathQA: GMAT-like questions, each with five options and a program of operations (Amini et al.
2019, arXiv:1905.13319)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar, Literal

from reftune.datasets import Splits
from reftune.datasets.reading.authors import COLUMNS as AUTHORS_COLUMNS
from reftune.datasets.reading.authors import PaperDataset, authors_rationale, is_authors
from reftune.datasets.reading.file_dataset import Split, Unusable
from reftune.datasets.reading.golds import GoldReader
from reftune.datasets.reading.mathqa_formula import formula_steps
from reftune.datasets.reading.programs import program
from reftune.datasets.reading.rationales import run_programs
from reftune.datasets.reading.rows import Row
from reftune.datasets.reading.splits import Key, drop_untrainable, normalised
from reftune.errors import DataError
from reftune.grading.golds import literal, number_gold, number_in_gold
from reftune.text import shown
from reftune.types import Answer, Problem, spell

LETTERS = "abcde"
FORMULA_TOLERANCE = Fraction(1, 100)
"""Largest allowed relative difference between a formula's value and the gold option. The two may
differ because options may be rounded."""

OPTION_BREAK = re.compile(r"\s*,\s*(?=[b-e]\s*\)\s)")
OPTION = re.compile(r"\s*(?P<letter>[a-e])\s*\)(?P<text>.*)", re.DOTALL)
SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"^[a-e]\s*[).]\s+(?=\S)", ""),  # letters repeated: `a ) a ) 350`, `d ) d . 3.6`
        (r"^s\s*\.?\s*(?=[-0-9.])", "rs "),  # `s . 600` is a damaged `rs . 600`
        (r"^[a-z] = ", ""),
        (r"^–\s*(?=\d)", "-"),
        (r"(?<=\d)\s*/\s*-$", ""),  # rupees, `rs . 495 / -`
        (r"\s+(?:sq|cu)\b\s*\.?\s*[a-z]+\s*\.?$", " units"),
        (r"\s+[mshlg](?:\s*\^?\s*[23])?\s*\.?$", ""),  # metres, seconds, hours
        (r"\b([ckm]?m|ft|in|feet|inch(?:es)?|met(?:er|re)s?)\s*(?:\^?\s*[23]|cube)$", r"\1"),
        (r"\s*(?:°|degrees?)\s*[cf]$", " degrees"),
    ]
]
"""Replacements that make options readable for `number_gold`: `500 cm 2` becomes `500 cm`."""
TIME_OF_DAY = re.compile(r"\s*\b[ap]\s*\.?\s*m\s*\.?$")
FINAL_LETTER = re.compile(
    r"\W*\b(?:answer|ans|option|choice)(?:\s*(?:is|option|choice|:|=|[-–.]))*\s*\(?\s*([a-e])[\s.)]*$"
)
MOJIBAKE = re.compile(r"ã ?(\S)|â ?(\S)(?: ?(\S))?")


def stem_key(problem: Problem) -> str:
    """The normalised question without its options. Thus two problems that differ only in their
    options count as the same question."""
    return normalised(problem.question.rpartition("\n")[0] if problem.choices else problem.question)


class Mathqa(PaperDataset):
    """Reads [MathQA](datasets.md#the-papers-benchmarks)."""

    train: str = "regisss/math_qa"
    answer: Literal["choice", "numeric"] = "choice"
    """With `choice`, the gold answer is a letter. With `numeric`, it is the number in the correct
    option, and the options are omitted."""

    key: ClassVar[Key] = staticmethod(stem_key)

    @property
    def authors_name(self) -> str:  # type: ignore[override]
        """The prefix of the authors' file names. It depends on the kind of answers."""
        return "mathqa" if self.answer == "choice" else "mathqa-numeric"

    @property
    def golds(self) -> GoldReader:
        """Reads the gold answers of rows that are not from MathQA, as in `reftune score`."""
        return GoldReader(kind="choice" if self.answer == "choice" else "auto")

    def trainable(self, splits: Splits) -> Splits:
        """`splits` without the training problems whose rationale does not match the gold answer.
        The rules are those of `PaperDataset`, with two differences for `nl` rationales. First,
        problems without a rationale are removed too. Second, in multiple choice, a rationale is
        accepted unless it ends by naming a letter other than the gold answer."""
        if self.rationale == "program":
            return super().trainable(splits)
        splits = drop_untrainable(splits, "no_rationale", lambda problem: not problem.rationale)
        if self.answer == "numeric":
            return super().trainable(splits)
        return drop_untrainable(splits, "rationale_disagrees", _ends_in_another_letter)

    def problems(self, rows: Sequence[Row], split: Split, counts: Counter[str]) -> list[Problem]:
        """The problems in the rows of a split. In the train and dev splits of the published files,
        the value of a row's formula is compared with the gold option. If they differ by more than
        1%, a numeric problem is dropped, and a multiple-choice problem is kept without the program
        that is made from its formula. Multiple-choice problems with `nl` rationales are not
        checked."""
        if split == "test":
            unread = Counter[str]()
            problems = super().problems(rows, split, unread)
            counts["without_number"] += unread.total()
            return problems
        if (self.answer, self.rationale) == ("choice", "nl"):
            return super().problems(rows, split, counts)
        problems = []
        for row, agrees in zip(rows, _formulas_agree(rows), strict=True):
            for problem in super().problems([row], split, counts):
                if agrees:
                    problems.append(problem)
                elif self.answer == "numeric":
                    counts["formula_disagrees"] += 1
                else:
                    problems.append(replace(problem, rationale=None))
        return problems

    def authors_problem(self, row: Row) -> Problem:
        """The problem in a row of the ReFT authors' files. If `answer` is `choice`, the last line
        of the question lists the options, and the gold answer is a letter."""
        question = repaired(row.text("question"))
        if self.answer == "numeric":
            return replace(super().authors_problem(row), question=question)
        question, _, spelled = question.rpartition("\n")
        options = _options(row, spelled)
        return Problem(
            id=row.text("item_id"),
            question=_with_options(question, options),
            answer=_letter(row, "answer_value", options),
            gold_text=row.text("answer_value"),
            rationale=authors_rationale(row, self.rationale),
            choices=options,
            columns=row.others(*AUTHORS_COLUMNS),
        )

    def published_problem(self, row: Row) -> Problem:
        """The problem in a row of MathQA's published files. Raises: DataError if the row cannot be
        read; Unusable if `answer` is `numeric` and the gold option is not a number."""
        stem, (options, letter) = repaired(row.text("Problem")), _gold_of(row)
        problem = Problem(
            id=row.id,
            question=_with_options(stem, options),
            answer=letter,
            gold_text=row.text("correct"),
            choices=options,
            columns=row.others("Problem", "Rationale", "options", "correct"),
        )
        is_nl = self.rationale == "nl"
        prose = _prose(row) if is_nl else None
        if self.answer == "choice":
            return replace(problem, rationale=prose if is_nl else choice_program(row, options))
        gold_text = options[LETTERS.index(str(letter))]
        gold = option_answer(gold_text)
        if gold is None:
            raise Unusable("no_number")
        worked = FINAL_LETTER.sub("", prose or "") or None if is_nl else _formula_program(row)
        return replace(
            problem, question=stem, answer=gold, gold_text=gold_text, rationale=worked, choices=()
        )

    @classmethod
    def sample_row(cls, n: int) -> dict[str, Any]:
        return {
            "Problem": f"{n} and 1 ?",
            "options": f"a ) {n} , b ) {n + 1} , c ) none",
            "correct": "b",
            "linear_formula": "add(n0,n1)|",
            "Rationale": "b",
        }


def choice_program(row: Row, options: Sequence[str]) -> str | None:
    """A program that computes the value of the row's formula and returns the letter of the nearest
    option. There is no program (None) if the row has no readable formula or if none of its options
    states a number."""
    steps, values = _steps(row), zip(LETTERS, map(option_value, options), strict=False)
    spelled = ", ".join(
        f'"{letter}": {spell(value).replace("/", " / ")}'
        for letter, value in values
        if value is not None
    )
    if steps is None or not spelled:
        return None
    nearest = f"min(options, key=lambda letter: abs(options[letter] - {steps[-1][0]}))"
    return program([*steps, ("options", f"{{{spelled}}}")], result=nearest)


def _formula_program(row: Row) -> str | None:
    steps = _steps(row)
    return None if steps is None else program(steps)


def _steps(row: Row) -> list[tuple[str, str]] | None:
    formula = row.optional_text("linear_formula")
    return None if formula is None else formula_steps(formula, row.text("Problem"))


def _formulas_agree(rows: Sequence[Row]) -> list[bool]:
    """For each row, whether its formula's value is within 1% of the gold option. The result is
    False if the row has no readable formula. It is True for rows from the files of ReFT's authors,
    which are not checked."""
    results = run_programs(["" if is_authors(row) else _formula_program(row) or "" for row in rows])
    return [
        is_authors(row) or _is_near_gold(row, result.value)
        for row, result in zip(rows, results, strict=True)
    ]


def _is_near_gold(row: Row, value: object) -> bool:
    options, letter = _gold_of(row)
    gold, number = option_value(options[LETTERS.index(str(letter))]), number_in_gold(value)
    if gold is None or number is None:
        return False
    return abs(number.value - gold) <= FORMULA_TOLERANCE * abs(gold)


def _prose(row: Row) -> str | None:
    """The row's `Rationale` without enclosing quotation marks; None if nothing is left."""
    text = row.optional_text("Rationale")
    return None if text is None else repaired(text.strip('" \n')) or None


def _ends_in_another_letter(problem: Problem) -> bool:
    match = FINAL_LETTER.search(problem.rationale or "")
    return match is not None and match[1] != problem.answer.value


# --- options --------------------------------------------------------------------------------------


def read_options(text: str) -> tuple[str, ...] | None:
    """The texts of the options, beginning with option a. `text` looks like `a ) 38 , b ) 27 , …` or
    like the Python list `["a ) 38", …]`. Returns None for any other text."""
    pieces = literal(text) if text.startswith("[") else OPTION_BREAK.split(text)
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        return None
    if not 2 <= len(pieces) <= len(LETTERS):
        return None
    matches = [OPTION.fullmatch(piece) for piece in pieces]
    letters = "".join(match["letter"] for match in matches if match)
    options = tuple(match["text"].strip() for match in matches if match)
    return options if letters == LETTERS[: len(pieces)] and all(options) else None


def option_value(text: str) -> Fraction | None:
    """The number that an option states, for comparison with the value of a formula. For example,
    `3 : 4` is 3/4, and `11 a . m .` is 11. Returns None if the option does not state a single
    number."""
    ratio = re.fullmatch(r"([0-9]+)\s*:\s*([0-9]+)", text)
    if ratio is not None:
        return Fraction(int(ratio[1]), int(ratio[2])) if int(ratio[2]) else None
    answer = option_answer(TIME_OF_DAY.sub("", text))
    return None if answer is None else Fraction(answer.value)


def option_answer(text: str) -> Answer | None:
    """The number in an option that consists of one number and perhaps a unit: 500 in `500 cm 2`,
    where 2 belongs to the unit. A letter before the number, as in `x = 5` and `a ) 350`, is
    ignored. Returns None for any other option, such as `3 : 4`."""
    for pattern, replacement in SPELLINGS:
        text = pattern.sub(replacement, text)
    return None if set(text) & set("([∏") else number_gold(text)


def _gold_of(row: Row) -> tuple[tuple[str, ...], Answer]:
    options = _options(row, repaired(row.text("options")))
    return options, _letter(row, "correct", options)


def _options(row: Row, text: str) -> tuple[str, ...]:
    options = read_options(text)
    if options is None:
        raise DataError(
            f"{row.where}: options {shown(text)} cannot be read; expected a form like 'a ) 38 , b )"
            " 27 , c ) 30'"
        )
    return options


def _letter(row: Row, column: str, options: Sequence[str]) -> Answer:
    letter, letters = row.text(column).lower(), LETTERS[: len(options)]
    if len(letter) != 1 or letter not in letters:
        raise DataError(
            f"{row.where}: {column} is {shown(row.columns[column])}; expected a letter from a to"
            f" {letters[-1]}"
        )
    return Answer(kind="choice", value=letter)


def _with_options(stem: str, options: Sequence[str]) -> str:
    """The question and a line with its options, as ReFT's authors write it: `a ) 38 , b ) …`."""
    lettered = zip(LETTERS, options, strict=False)
    return f"{stem}\n" + " , ".join(f"{letter} ) {option}" for letter, option in lettered)


# --- text -----------------------------------------------------------------------------------------


def repaired(text: str) -> str:
    """`text` without mojibake. The mojibake arose when UTF-8 was decoded as cp1252 and lower-cased,
    and spaces were inserted between the characters. Sometimes all this happened more than once. For
    example, `ã —` stands for `×`."""
    for _ in range(3):
        text = MOJIBAKE.sub(_decoded, text)
    return text


def _decoded(match: re.Match[str]) -> str:
    two, first, second = match.groups()
    if two:
        return _utf8("Ã" + two) or match[0]
    long, short = _utf8("â" + first + second) if second else None, _utf8("Â" + first)
    return long or (match[0] if short is None else short + match[0][match.end(2) - match.start() :])


def _utf8(characters: str) -> str | None:
    try:
        return b"".join(_byte(character) for character in characters).decode("utf-8")
    except UnicodeError:
        return None


def _byte(character: str) -> bytes:
    """The character's byte in cp1252, or in latin-1 if cp1252 lacks the character."""
    try:
        return character.encode("cp1252")
    except UnicodeEncodeError:
        return character.encode("latin-1")
