"""`reftune init` writes a commented recipe for a user's data. Before that, it applies the checks of
`reftune check` that need no model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from reftune.advice.check import check_texts
from reftune.datasets import Splits
from reftune.datasets.jsonl import Jsonl
from reftune.datasets.reading.rows import read_rows
from reftune.datasets.reading.shapes import Columns, recognise
from reftune.datasets.reading.splits import dropped_text
from reftune.errors import DataError, ModelError, RecipeError
from reftune.grading.formats import Format
from reftune.model.encoder import Encoder
from reftune.model.weights import load_config, load_tokenizer, scratch_texts, word_tokenizer
from reftune.recipe import ModelTable, known_kinds, load_component, parse_recipe
from reftune.seeds import derive_seed
from reftune.storage.files import write_atomically
from reftune.text import counted

INSTRUCTIONS: Mapping[str, str] = {
    "nl": 'Think step by step. End with "The answer is" and the answer.',
    "program": "Write a Python function solution() that returns the answer.",
}
"""Kind of format → the instruction that precedes each question for an instruct model."""
_SAYS_HOW: Mapping[str, re.Pattern[str]] = {
    "nl": re.compile(
        r"\\boxed|[^\s#][ \"'`(]*####|<answer>"
        r"|\b(?:form|format|line|end|finish|conclude)\b.*\banswer(?: is|:)",
        re.IGNORECASE,
    ),
    "program": re.compile(r"\bsolution\("),
}
"""Kind of format → matches an instruction on how to state the answer."""
TEMPLATE = Path(__file__).with_name("init.yaml.j2")
SCRATCH = "scratch"
"""The name that stands for a model trained from scratch, whose vocabulary comes from the data."""
DEFAULT_MAX_NEW = 256
"""Token limit of a solution if the data has no rationales to measure and the model's context is
long enough."""
LEAST_MAX_NEW = 16
LONGEST_SCRATCH_PROMPT = 1024
"""For a model trained from scratch, the maximum length of a prompt in tokens. It is raised if more
than the share `MAX_TOO_LONG` of the prompts would exceed it. The same holds for solutions."""
MAX_TOO_LONG = 0.1
"""Largest share of prompts that may be too long. The same limit applies to solutions."""
SMALL_HIDDEN_SIZE = 256
"""The largest hidden size for which a second thread brings no gain in speed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """The user's choices."""

    data: str
    """Training questions: a file, a folder with one file per split, or a Hub id."""
    model: str
    """A Hub id, a folder, `smollm2-135m` or `scratch`."""
    format: str
    """A kind of format: `nl`, `program` or a user's own `file.py:Name`."""
    test: str | None = None
    columns: Mapping[str, Any]
    """Field of `Columns` → a column of the data, or a list of columns."""


def write_recipe(wishes: Wishes, out: Path) -> Splits:
    """Read the data and the tokenizer, and write the recipe to `out`. Returns: the data as a run of
    the recipe would read it.

    Raises: RecipeError if `out` exists; DataError or ModelError if the data, the tokenizer or the
    model's configuration shows that a run would fail.
    """
    if out.exists():
        raise RecipeError(f"{out}: exists already; choose another --out")
    splits = _load(wishes)
    text = _recipe_text(wishes, splits, slug(out.stem))
    recipe = parse_recipe(yaml.safe_load(text), where=str(out))
    for finding in check_texts(recipe, splits):
        if finding.level == "fail":
            raise DataError(
                f"{wishes.data}: `reftune check` would reject the recipe: {finding.name}:"
                f" {finding.message}; {finding.remedy}"
            )
    write_atomically(out, text)
    return splits


def slug(text: str) -> str:
    """`text` turned into a valid recipe name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "mine"


def default_out(data: str) -> Path:
    """The recipe's default path: `mine.yaml` for `data/mine.csv`, `data/mine` or
    `owner/mine:config`."""
    return Path(f"{slug(Path(data.partition(':')[0]).stem)}.yaml")


def guess_columns(data: str, named: Mapping[str, Any] | None = None) -> Columns:
    """Recognise which columns of `data` contain the question, the answer and the other fields.
    `named` maps fields to columns that the user has chosen. Raises: DataError if the data is
    unreadable, or has no column for the question or the answer."""
    return recognise(read_rows(data, "train"), named or {})


def guess_format(data: str, columns: Mapping[str, Any]) -> str:
    """`program` if the first row's rationale defines `solution()`, and `nl` if not. Raises:
    DataError if the data cannot be read."""
    rationale = read_rows(data, "train")[0].get(columns.get("rationale", ""))
    return "program" if "def solution(" in str(rationale) else "nl"


def _load(wishes: Wishes) -> Splits:
    """Load the data. Raises: DataError if it cannot be read, or if no question is left for train or
    for dev."""
    dataset = Jsonl.model_validate(
        {"kind": "jsonl", "train": wishes.data, "test": wishes.test, "columns": wishes.columns}
    )
    splits = dataset.load(seed=derive_seed(0, "data"))
    if not (splits.train and splits.dev):
        left = counted(len(splits.train) + len(splits.dev), "question")
        message = (
            f"{wishes.data}: {left} cannot be split (dropped: {dropped_text(splits.counts)});"
            " expected at least two, so that one can be used for dev"
        )
        raise DataError("; ".join([message, *splits.notes]))
    return splits


def _recipe_text(wishes: Wishes, splits: Splits, name: str) -> str:
    """The recipe's text. Raises: DataError if the data lacks the rationales that the model needs;
    ModelError if the model cannot be loaded or its context is too short."""
    kind, is_scratch = wishes.format, wishes.model == SCRATCH
    format_: Format = load_component(kind, group="formats")
    has_rationales = any(problem.rationale is not None for problem in splits.train)
    config = None
    if not is_scratch:
        table = ModelTable(path=wishes.model)
        tokenizer, config = load_tokenizer(table), load_config(table)
    elif has_rationales:
        tokenizer = word_tokenizer(list(scratch_texts(format_, splits)))
    else:
        raise DataError(
            "a model trained from scratch learns from rationales, but the data has none; choose"
            " another --model"
        )
    is_chat = kind in INSTRUCTIONS and bool(tokenizer.chat_template)
    instruction = INSTRUCTIONS[kind] if is_chat and not _has_instruction(splits, kind) else None
    if is_chat:
        chat = {"kind": kind, "style": "chat", "instruction": instruction}
        format_ = load_component(chat, group="formats")
    context = getattr(config, "max_position_embeddings", None)
    max_new, context, drops = _lengths(
        splits, Encoder(tokenizer, format_), context, is_scratch=is_scratch
    )
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["yaml"] = _inline
    renamed = {field: column for field, column in wishes.columns.items() if field != column}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        wishes=wishes,
        name=name,
        scratch=is_scratch,
        one_thread=is_scratch or getattr(config, "hidden_size", math.inf) <= SMALL_HIDDEN_SIZE,
        columns=renamed,
        splits=splits,
        is_chat=is_chat,
        instruction=instruction,
        has_rationales=has_rationales,
        max_new=max_new,
        context=context,
        drops=drops,
        others=[kind for kind in known_kinds("algorithms") if kind != "ppo"],
    )


def _has_instruction(splits: Splits, kind: str) -> bool:
    """Whether every training prompt already contains an instruction on how to answer."""
    prompts = ("\n".join(turn.content for turn in p.messages) or p.question for p in splits.train)
    return all(_SAYS_HOW[kind].search(prompt) for prompt in prompts)


def _lengths(
    splits: Splits, encoder: Encoder, context: int | None, *, is_scratch: bool
) -> tuple[int, int | None, bool]:
    """Length limits that fit nearly all prompts and solutions. Returns: the maximum number of
    tokens in a solution, the maximum in a prompt and its solution together (the context; None if
    unlimited), and whether some prompts are too long. Raises: ModelError if too many prompts are
    too long."""
    prompts = sorted(
        len(encoder.prompt(problem)) for problem in (*splits.train, *splits.dev, *splits.test)
    )
    targets = sorted(
        len(encoder.target(problem)) for problem in splits.train if problem.rationale is not None
    )
    longest = prompts[-1]
    if is_scratch:
        longest = min(longest, max(LONGEST_SCRATCH_PROMPT, _most(prompts)))
        max_new = _rounded(min(targets[-1], max(LONGEST_SCRATCH_PROMPT, _most(targets))))
        context = longest + max_new
    else:
        max_new = _rounded(targets[-1]) if targets else DEFAULT_MAX_NEW
        if context is not None and longest + max_new > context:
            wanted = _rounded(_most(targets)) if targets else LEAST_MAX_NEW
            max_new = max(wanted, min(max_new, context - longest))
    room = math.inf if context is None else context - max_new
    if _most(prompts) > room:
        raise ModelError(
            f"the model's context of {context} tokens is too short for this data: a solution takes"
            f" {max_new}, and at least a tenth of the prompts take more than {max(0, room)}"
        )
    return max_new, context, prompts[-1] > room


def _most(sizes: Sequence[int]) -> int:
    """The 1 - `MAX_TOO_LONG` quantile of the sorted `sizes`, rounded down to one of them."""
    return sizes[int((len(sizes) - 1) * (1 - MAX_TOO_LONG))]


def _rounded(size: int) -> int:
    return -(-size // 8) * 8


def _inline(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
        .removesuffix("\n")
        .removesuffix("\n...")
    )
