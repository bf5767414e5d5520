"""Your own questions and answers, from local files or the Hub, in the most common layouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from string import ascii_lowercase
from typing import Any, ClassVar, Literal

from reftune.datasets import FileDataset, Splits
from reftune.datasets.reading.conversations import read_conversation
from reftune.datasets.reading.file_dataset import Split
from reftune.datasets.reading.golds import GoldReader, is_missing, marked_text, worked_solution
from reftune.datasets.reading.options import Options, bare
from reftune.datasets.reading.rationales import drop_contradictions
from reftune.datasets.reading.rows import Row, refuse_type_changes
from reftune.datasets.reading.shapes import Columns, is_prompt, recognise
from reftune.datasets.reading.splits import question_key, same_gold
from reftune.datasets.reading.unused import unused_columns
from reftune.errors import DataError
from reftune.grading.golds import same_option
from reftune.grading.options import option_values
from reftune.grading.rewards.function import ARGUMENTS
from reftune.text import shown
from reftune.types import Answer, AnswerKind, Message, Problem


class Jsonl(FileDataset):
    """Reads [your own data](datasets.md#jsonl-your-own-data)."""

    columns: Columns | None = None
    """Names of your columns, if they are neither the default names below nor [other common
    names](datasets.md#row-shapes)."""
    answer_kind: Literal["auto", AnswerKind] = "auto"
    """How answers are compared; see [answer kinds](datasets.md#answer-kinds)."""
    positions_from: Literal[0, 1] | None = None
    """Position of the first option, if gold answers are positions in the list of options."""

    decimal: Literal[".", ","] = "."
    """Decimal separator of the options and gold answers."""

    several_rationales: ClassVar[bool] = True

    def all_problems(
        self, rows: Mapping[Split, Sequence[Row]], counts: Mapping[Split, Counter[str]]
    ) -> tuple[dict[Split, list[Problem]], tuple[str, ...]]:
        """The problems of each split, and notes on unused columns. A gold answer that is both one
        option's label and another option's text is ambiguous. It is read as the text if
        `positions_from` is not set and most of the dataset's unambiguous gold answers are option
        texts. Otherwise, it is read as the label. If `positions_from` is set, however, a whole
        number is always read as a position. Raises: DataError if a column is missing or a row is
        invalid."""
        columns = {split: self._columns(rows[split], is_train=split == "train") for split in rows}
        read = {split: self._read(rows[split], columns[split]) for split in rows}
        votes = sum(each.votes for of_split in read.values() for each in of_split)
        are_texts = votes > 0 and self.positions_from is None
        problems = {
            split: [each.as_text() if are_texts else each.problem for each in of_split]
            for split, of_split in read.items()
        }
        problems = _with_contexts(problems)
        return problems, unused_columns(problems, columns["train"])

    def trainable(self, splits: Splits) -> Splits:
        """`splits` without the training rows whose rationale contradicts the gold answer. Numbers
        in rationales are read with the gold answers' decimal separator."""
        return drop_contradictions(splits, self.golds.reading)

    def problem(self, row: Row) -> Problem:
        return self._read_row(row, self._columns([row], is_train=False)).problem

    @classmethod
    def sample_row(cls, n: int) -> dict[str, Any]:
        return {"question": f"What is {n}?", "answer": n}

    @property
    def golds(self) -> GoldReader:
        """Reads the options and gold answers."""
        return GoldReader(
            kind=self.answer_kind, positions_from=self.positions_from, decimal=self.decimal
        )

    def _read(self, rows: Sequence[Row], columns: Columns) -> list[_Read]:
        refuse_type_changes(rows, [name for name in columns.names if name != columns.id])
        read = [self._read_row(row, columns) for row in rows]
        if self.positions_from is not None and not any(each.problem.choices for each in read):
            raise DataError(
                f"{rows[0].where}: no options; positions_from expects a column of options"
                " (dataset.columns.choices), and answer_kind: auto or choice"
            )
        return read

    @property
    def _says_options(self) -> bool:
        """Whether the user's settings say that the rows have options."""
        return self.answer_kind == "choice" or self.positions_from is not None

    def _columns(self, rows: Sequence[Row], *, is_train: bool) -> Columns:
        """The column of each field, such as `question`: the one that the user named, or else one
        with a common name for that field. Raises: DataError if no question or answer is found, or
        if a column that the user named is missing. In dev and test, this method checks only some of
        the named columns: those of the options, and the first column of the question."""
        named = {} if self.columns is None else self.columns.model_dump()
        for field, value in named.items():
            names = [value] if isinstance(value, str) else value or []
            if not is_train:  # the other parts of a question are optional, such as Alpaca's input
                names = {"question": names[:1], "choices": names}.get(field, [])
            for name in names:
                if all(row.get(name) is None for row in rows):
                    rows[0].value(name)
        return recognise(rows, named, has_options=self._says_options)

    def _options(self, row: Row, columns: Columns) -> Options | None:
        """The options that `GoldReader.options` reads. Raises: DataError if they cannot be read, or
        if `answer_kind` is `choice` and there are none."""
        try:
            options = self.golds.options(row, columns.choices)
        except DataError as error:
            raise DataError(f"{error}{self._hint(row, columns)}") from None
        if options is None and self.answer_kind == "choice":
            raise DataError(
                f"{row.where}: no options; answer_kind: choice expects a column of options"
                " (dataset.columns.choices)"
            )
        return options

    def _hint(self, row: Row, columns: Columns) -> str:
        """The end of an error message: what to set if columns such as `a` and `b` were mistaken for
        answer options. Empty if the user's settings say that the problems have answer options."""
        if self._names("choices") or self._says_options:
            return ""
        which, shows = f"column {columns.choices}", ""
        if isinstance(columns.choices, list):
            which = f"columns {columns.choices[0]} to {columns.choices[-1]}"
        elif isinstance(row.get(str(columns.choices)), str):  # such as "A) 1, B) 2"
            asked = ",".join([*columns.asked, str(columns.choices)])
            shows = f"; to show this text, set dataset.columns.question=[{asked}]"
        wrong = f"if that is wrong, set dataset.columns.choices=null{shows}"
        return f"; {which}: read as options ({wrong})"

    def _names(self, field: str) -> bool:
        """Whether the user named the column of a field."""
        return self.columns is not None and field in self.columns.model_fields_set

    def _id(self, row: Row, column: str | None) -> str:
        """The id in `column`, or `row.id` if there is no such column or the cell is null. A cell is
        valid if it is null, a number or text that is not blank. Raises: DataError if the user named
        the column and its cell is not valid. If the user did not name the column, the result for
        such a cell is `row.id` too."""
        if column is None or (value := row.get(column)) is None:
            return row.id
        if isinstance(value, int | float):
            return str(value)
        is_text = isinstance(value, str) and value.strip() != ""
        return row.text(column) if is_text or self._names("id") else row.id

    def _read_row(self, row: Row, columns: Columns) -> _Read:
        options = self._options(row, columns)
        row.refuse_half_pairs(*columns.names)
        question, messages = _question(row, columns)
        cell = marked_text(row, columns.answer)
        try:
            answer, stated = self.golds.gold(cell, options)
        except DataError as error:
            hint = "" if options is None else self._hint(row, columns)
            raise DataError(f"{row.where}: {columns.answer} is {error}{hint}") from None
        if columns.rationale == columns.answer:
            rationale = worked_solution(cell) if isinstance(cell, str) else None
        else:
            rationale = _rationale(row, columns.rationale)
        problem = Problem(
            id=self._id(row, columns.id),
            question=question,
            messages=messages,
            answer=answer,
            gold_text=str(stated),
            rationale=rationale,
            choices=() if options is None else options.texts,
            decimal=self.decimal,
            columns=row.others(*ARGUMENTS.intersection(columns.names)),
        )
        labels = () if options is None else options.labels
        gold = self.golds.spelled(stated)
        return _Read(problem=problem, gold=gold, labels=labels, where=row.where)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    """A row that has been read. If the gold answer is both one option's label and another option's
    text, it is taken as the label in `problem`, and as the text in `as_text`."""

    problem: Problem
    gold: str
    """The gold answer as `GoldReader.spelled` writes it."""
    labels: tuple[str, ...]
    """The labels of the options; see `Options`."""
    where: str

    @property
    def votes(self) -> int:
        """This row's vote on whether the dataset's gold answers are option texts or option labels.
        The vote is 1 if the row's gold answer is the text of an option but not a label, −1 if it is
        a label but not a text, and 0 if it is both or neither. If the options have no labels, the
        vote is 0."""
        is_label = bare(self.gold) in self.labels
        return bool(self._letters_of_text) - is_label if self.labels else 0

    @property
    def _letters_of_text(self) -> list[str]:
        """The letters of the options that equal the gold answer, either as text or as a number."""
        options = zip(ascii_lowercase, option_values(self.problem), strict=False)
        return [letter for letter, value in options if same_option(self.gold, value)]

    def as_text(self) -> Problem:
        """The row's problem. If the gold answer is both the text of one option and the label of
        another, it is read as the text. Raises: DataError if the gold answer is the text of several
        options."""
        letters = self._letters_of_text
        if not letters:
            return self.problem
        if len(letters) > 1:
            raise DataError(f"{self.where}: several options are {shown(self.gold)}; expected one")
        return replace(self.problem, answer=Answer(kind="choice", value=letters[0]))


def _with_contexts(splits: dict[Split, list[Problem]]) -> dict[Split, list[Problem]]:
    """The problems of each split. A question may occur with several system messages. If most such
    questions also have several gold answers, the answers are assumed to depend on the system
    message, which is then added to the beginning of every question. Otherwise, the problems are
    returned unchanged."""
    first: dict[str, Problem] = {}
    agree: dict[str, bool] = {}
    for problem in chain.from_iterable(splits.values()):
        if problem.messages:
            key = question_key(problem)
            other = first.setdefault(key, problem)
            if _system(problem) != _system(other):
                agree[key] = agree.get(key, True) and same_gold(problem.answer, other.answer)
    if 2 * sum(agree.values()) >= len(agree):
        return splits
    return {
        split: [replace(p, question=f"{_system(p)}\n\n{p.question}".strip()) for p in problems]
        for split, problems in splits.items()
    }


def _system(problem: Problem) -> str:
    return "\n\n".join(turn.content for turn in problem.messages if turn.role == "system")


def _question(row: Row, columns: Columns) -> tuple[str, tuple[Message, ...]]:
    """The question as one string, and the turns of its conversation before the reply. If none of
    the question's columns contains a conversation, there are no turns. If one does, the text of the
    question's other columns is added to the first turn that is not a system message.

    Raises: DataError if there is no question, or if the conversation in a column such as `prompt`
    ends with a reply that is used neither as the answer nor as the rationale.
    """
    names = columns.asked
    for place, name in enumerate(names):
        if (conversation := read_conversation(row, name)) is not None:
            if not conversation.question:
                raise DataError(f"{row.where}: {name} has no question; expected a user's turn")
            is_read = name in (columns.answer, columns.rationale)
            if is_prompt(name) and conversation.reply is not None and not is_read:
                raise DataError(
                    f"{row.where}: {name} ends with the assistant's turn"
                    f" {shown(conversation.reply)}; expected the user's turn last, or"
                    f" dataset.columns.rationale={name} if this turn is a worked solution"
                )
            above, below = _texts(row, names[:place]), _texts(row, names[place + 1 :])
            conversation = conversation.joined(above, below)
            return conversation.question, conversation.before
    return "\n".join([row.text(names[0]), *_texts(row, names[1:])]), ()


def _texts(row: Row, columns: Sequence[str]) -> list[str]:
    return [text for name in columns if (text := row.optional_text(name)) is not None]


def _rationale(row: Row, column: str | None) -> str | None:
    if column is None or is_missing(row.get(column)):
        return None
    conversation = read_conversation(row, column)
    return row.text(column) if conversation is None else conversation.reply
