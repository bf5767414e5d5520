"""Recognises columns by their names and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product, takewhile
from string import ascii_lowercase
from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from reftune.datasets.reading.conversations import is_answered, turns_in
from reftune.datasets.reading.golds import is_missing, worked_solution
from reftune.datasets.reading.rows import Row
from reftune.errors import DataError
from reftune.grading.golds import read_gold
from reftune.recipe import Table
from reftune.text import shown

NUM_LOOKED_AT = 20
"""Number of rows whose values are examined to recognise the columns."""
NAMES: Mapping[str, tuple[str, ...]] = {
    "question": (
        *("question", "prompt", "problem", "query", "context_messages", "messages"),
        *("conversations", "conversation", "instruction", "input", "question.stem"),
    ),
    "answer": (
        *("answer", "gold", "final_answer", "answer_value", "expected_answer", "correct_answer"),
        *("ground_truth_answer", "reward_model.ground_truth", "ground_truth", "answerkey"),
        *("correct", "label", "target", "output", "response", "completion", "result", "solution"),
    ),
    "rationale": (
        *("rationale", "solution", "reasoning", "explanation", "worked", "cot", "answer_cot"),
        *("generated_solution", "program"),
    ),
    "choices": ("choices", "options", "question.choices"),
    "id": ("id", "item_id", "key", "uuid", "unique_id", "problem_id", "question_id"),
}
"""Field → common names of the field's column, tried in this order. Case is ignored."""
JUDGING = ("correct", "label")
"""Names of columns that may contain the gold answer or a judgement on a completion."""
JUDGED = ("completion", "response", "output")
"""Names of columns that contain what a model wrote."""
LABELLED = ("{}", "option_{}", "option {}", "option{}", "op{}", "choice_{}")
"""Names of columns that contain one option each. `{}` stands for the option's letter or number."""


class Columns(Table):
    """The names of the data's columns. The name of a nested column is a dotted path, such as
    `reward_model.ground_truth`."""

    question: str | Annotated[list[str], Field(min_length=1)] = "question"
    """The question or conversation. Several columns are joined by line breaks. If one of them is a
    conversation, the others are added to its first turn that is not a system message."""
    answer: str = "answer"
    """The gold answer, or a worked solution that contains it."""
    rationale: str | None = "rationale"
    """A worked solution or program. It may be the same column as `answer`."""
    id: str | None = "id"
    """The problem's id. Without such a column, the id is the file's name and the row's number."""
    choices: str | list[str] | None = "choices"
    """One column with all options of a multiple-choice question, or one column per option."""

    @property
    def asked(self) -> list[str]:
        """The names of the question's columns."""
        return [self.question] if isinstance(self.question, str) else self.question

    @property
    def names(self) -> list[str]:
        """The names of all columns in use, each once."""
        values = [getattr(self, field) for field in type(self).model_fields]
        lists = [[value] if isinstance(value, str) else value or [] for value in values]
        return list(dict.fromkeys(name for names in lists for name in names))

    @property
    def named(self) -> dict[str, Any]:
        """Field → column, for the fields that have one."""
        return {field: column for field, column in self.model_dump().items() if column}

    @model_serializer(mode="wrap")
    def _as_named(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Only the columns that were named, because the data need not have the others."""
        return {name: value for name, value in dump(self).items() if name in self.model_fields_set}


def recognise(
    rows: Sequence[Row], named: Mapping[str, Any], *, has_options: bool = False
) -> Columns:
    """The columns of the question, the answer and so on. `named` maps fields to columns that the
    user chose; the others are recognised by their names. `has_options` says whether the user asks
    for multiple choice. Raises: DataError if no column is found for the question or the answer."""
    first, found = rows[0], _Found(rows)
    columns: dict[str, Any] = dict(named)
    asked = columns.setdefault("question", found.question())
    if asked is None:
        raise _nowhere(first, "question", found)
    parts = [asked] if isinstance(asked, str) else asked
    used = set(parts)
    chat = next((part for part in parts if any(found.chats(part))), None)
    if "answer" not in columns:
        columns["answer"] = found.answer(used, chat)
    answer = columns["answer"]
    if answer is None:
        raise _nowhere(first, "answer", found)
    if "rationale" not in columns:
        whole = (part for part in parts if not is_prompt(part))
        replied = (part for part in whole if any(map(is_answered, found.chats(part))))
        columns["rationale"] = (
            found.filled("rationale", {*used, answer})
            or (answer if answer in used or found.any_worked(answer) else next(replied, None))
            or found.late("rationale")
        )
    choices = found.choices(parts, answer, has_options) or found.late("choices")
    columns.setdefault("choices", choices)
    columns.setdefault("id", found.filled("id", {*used, answer}))
    return Columns.model_validate(columns)


class _Found:
    """Finds columns by name. `by_lower` maps lower-case names to the actual names in the first
    `NUM_LOOKED_AT` rows. `later` does the same for columns that only later rows have."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.all_rows, self.rows = rows, rows[:NUM_LOOKED_AT]
        self.by_lower = {str(name).lower(): str(name) for row in self.rows for name in row.columns}
        if any(row.get("input") is not None for row in rows):  # rows without an input often omit it
            self.by_lower.setdefault("input", "input")
        later = {str(name).lower(): str(name) for row in rows for name in row.columns}
        self.later = {name: column for name, column in later.items() if name not in self.by_lower}

    def answer(self, used: set[str], chat: str | None) -> str | None:
        """The column of the gold answer; None if no column is found. If a column such as `label`
        marks every completion in another column as right, the completions are the gold answers, and
        their column is returned. Raises: DataError if a completion is marked as wrong."""
        first = self.first("answer", used) or chat
        free = {name for name in self.by_lower.values() if name not in used}
        judged = [self.by_lower.get(name, "") for name in JUDGED]
        filled = (n for n in judged if n in free and not all(row.is_blank(n) for row in self.rows))
        answer = next(filled, None)
        if first is None or answer is None or not self._judges(first):
            return first
        for row in self.all_rows:
            if _truth(row.get(first)) is False:
                raise DataError(
                    f"{row.where}: {first} is {shown(row.get(first))}, which may mean that"
                    f" {answer} is wrong; expected only rows where {first} is true, or"
                    " --answer COLUMN (in a recipe, dataset.columns.answer)"
                )
        return answer

    def _judges(self, column: str) -> bool:
        """Whether a column has a name in `JUDGING` and contains only truth values."""
        cells = [row.get(column) for row in self.rows if not row.is_blank(column)]
        return column.lower() in JUDGING and None not in map(_truth, cells) and bool(cells)

    def filled(self, field: str, used: set[str]) -> str | None:
        """Like `first`, but at least one of the column's cells must be neither missing nor a
        mapping."""
        found = (
            self.by_lower.get(name, name)
            for name in NAMES[field]
            if name in self.by_lower or "." in name  # a dot leads into a mapping
        )
        for name in (name for name in found if name not in used and name not in self.later):
            cells = (row.get(name) for row in self.all_rows)
            if any(not isinstance(cell, Mapping) and not is_missing(cell) for cell in cells):
                return name
        return None

    def first(self, field: str, used: set[str]) -> str | None:
        """The first of the field's usual columns (see `NAMES`) that is not in `used`. Columns with
        values are preferred to empty columns. Returns None if there is no such column."""
        names = [self.by_lower.get(name, name) for name in NAMES[field]]
        free = [name for name in names if name not in used]
        unfit = (type(None),) if field == "choices" else (type(None), Mapping)
        filled = [
            name for name in free if any(not isinstance(row.get(name), unfit) for row in self.rows)
        ]
        empty = [name for name in free if name in self.by_lower.values()]
        return next(iter((*filled, *empty)), None)

    def late(self, field: str) -> str | None:
        """A column that `NAMES` lists for a field and that only later rows have."""
        return next((self.later[name] for name in NAMES[field] if name in self.later), None)

    def question(self) -> str | list[str] | None:
        """The column of the question; None if no column is found. In Alpaca's format, the result is
        the instruction column and, if there is one, the input column."""
        instruction, context = self.by_lower.get("instruction"), self.by_lower.get("input")
        if instruction is not None and not {"question", "prompt"} & set(self.by_lower):
            return [instruction, context] if context is not None else instruction
        return self.first("question", set())

    def choices(
        self, question: Sequence[str], answer: str, has_options: bool
    ) -> str | list[str] | None:
        """One column with all options, or one column per option; None if no column is found. Two
        columns `a` and `b` do not count as options if they contain the numbers of an arithmetic
        question (see `are_operands`), unless `has_options` is true."""
        for pattern, labels in product(LABELLED, (ascii_lowercase, tuple(map(str, range(1, 27))))):
            names = map(pattern.format, labels)
            columns = [self.by_lower[name] for name in takewhile(self.by_lower.__contains__, names)]
            may_be_operands = not has_options and [name.lower() for name in columns] == ["a", "b"]
            are_operands = may_be_operands and self.are_operands(columns, question, answer)
            if len(columns) >= 2 and not are_operands:
                return columns
        return self.first("choices", {*question, answer})

    def are_operands(self, columns: Sequence[str], question: Sequence[str], answer: str) -> bool:
        """True if the columns contain only numbers that occur in the question, and if the gold
        answers are numbers too. Rows in which one of the columns is empty are ignored."""
        rows = [row for row in self.rows if all(row.get(name) is not None for name in columns)]
        for row in rows:
            cells, asked = map(row.get, columns), [str(row.get(part)) for part in question]
            if not _is_number(row.get(answer)):
                return False
            if not all(_is_number(x) and any(str(x) in text for text in asked) for x in cells):
                return False
        return len(rows) > 0

    def any_worked(self, column: str) -> bool:
        """Whether any cell of the column is a conversation, or a solution that marks its answer."""
        return any(
            turns_in(row, column) is not None
            or (isinstance(cell := row.get(column), str) and worked_solution(cell) is not None)
            for row in self.all_rows
        )

    def chats(self, column: str) -> Iterator[Sequence[Mapping[str, Any]]]:
        """The conversations in the column's cells."""
        return filter(None, (turns_in(row, column) for row in self.rows))


def is_prompt(column: str) -> bool:
    """Whether conversations in this column are only prompts. If they are, an assistant turn at the
    end is the beginning of a reply."""
    return column.rpartition(".")[2].lower() in ("prompt", "context_messages")


def _truth(cell: object) -> bool | None:
    """The truth value in a cell, possibly written as text; None for any other cell."""
    return {"true": True, "false": False}.get(str(cell).strip().lower())


def _is_number(cell: object) -> bool:
    try:
        return read_gold(cell).kind == "number"
    except DataError:
        return False


def _nowhere(row: Row, field: str, found: _Found) -> DataError:
    return DataError(
        f"{row.where}: no column for the {field} among {', '.join(found.by_lower.values())}; set"
        f" --{field} COLUMN, or dataset.columns.{field} in a recipe"
    )
