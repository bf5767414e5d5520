"""`reftune init`: a data file → a commented recipe that passes `reftune check`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, StrictUndefined

from reftune.datasets import Splits
from reftune.datasets.jsonl import Jsonl
from reftune.datasets.reading.rows import read_rows
from reftune.errors import DataError, ModelError, RecipeError
from reftune.grading.formats import Format
from reftune.model.encoder import Encoder
from reftune.model.scratch import word_tokenizer
from reftune.model.weights import SMOLLM2, smollm2_folder
from reftune.recipe import load_component, parse_recipe
from reftune.seeds import derive_seed
from reftune.storage.atomic import write_atomically
from reftune.types import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = Path(__file__).with_name("init.yaml.j2")
SCRATCH = "scratch"
"""As a model: made from scratch, with the vocabulary of the data."""
OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "question": ("question", "prompt", "problem", "query", "input", "instruction"),
    "answer": ("answer", "gold", "final_answer", "label", "target", "output", "result"),
    "rationale": (
        "rationale",
        "solution",
        "reasoning",
        "explanation",
        "worked",
        "cot",
        "answer_cot",
        "program",
    ),
    "choices": ("choices", "options"),
    "id": ("id", "item_id", "key"),
}
"""What a column may be called, most likely name first; compared in lower case."""
DEFAULT_MAX_NEW = 256
"""Tokens of a solution where no rationale tells how long one is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What a person was asked."""

    data: str
    """Training questions: a file, a folder with one file a split, or a Hub id."""
    model: str
    """A Hub id, a folder, `smollm2-135m` or `scratch`."""
    format: str
    """A kind of format: `nl`, `program` or a user's own `file.py:Name`."""
    test: str | None = None
    columns: Mapping[str, str]
    """Field → column."""


def write_recipe(wishes: Wishes, out: Path) -> Path:
    """Read the data and the tokenizer, write `out`.

    Raises: RecipeError where `out` exists; DataError, ModelError where the recipe could not run.
    """
    if out.exists():
        raise RecipeError(f"{out}: exists already; choose another --out")
    text = recipe_text(wishes, slug(out.stem))
    parse_recipe(yaml.safe_load(text), where=str(out))
    write_atomically(out, text)
    return out


def slug(text: str) -> str:
    """`text` as the name of a recipe."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "mine"


def default_out(data: str) -> Path:
    """`data/mine.csv`, `data/mine` or `owner/mine:config` → `mine.yaml`."""
    return Path(f"{slug(Path(data.partition(':')[0]).stem)}.yaml")


def guess_columns(data: str, told: Mapping[str, str] | None = None) -> dict[str, str]:
    """Field → column of the training rows: as `told`, else by name. Raises: DataError where
    question or answer has none."""
    row = read_rows(data, "train")[0]
    by_lower = {str(column).lower(): str(column) for column in row.columns}
    found = {
        field: next((by_lower[name] for name in names if name in by_lower), None)
        for field, names in OTHER_NAMES.items()
    } | dict(told or {})
    for field in ("question", "answer"):
        if found[field] is None:
            raise DataError(
                f"{row.where}: no column for the {field} among {', '.join(by_lower.values())}; say"
                f" --{field} COLUMN"
            )
    return {field: column for field, column in found.items() if column is not None}


def guess_format(data: str, columns: Mapping[str, str]) -> str:
    """`program` where the first rationale defines `solution()`, else `nl`. Raises: DataError."""
    rationale = read_rows(data, "train")[0].columns.get(columns.get("rationale", ""))
    return "program" if "def solution(" in str(rationale) else "nl"


def recipe_text(wishes: Wishes, name: str) -> str:
    """The recipe. Raises: DataError, ModelError."""
    columns, kind = wishes.columns, wishes.format
    dataset = Jsonl.model_validate(
        {"kind": "jsonl", "train": wishes.data, "test": wishes.test, "columns": columns}
    )
    splits = dataset.load(seed=derive_seed(0, "data"))
    if not splits.dev:
        raise DataError(
            f"{wishes.data}: {len(splits.train)} questions are too few: none is left for dev"
        )
    sizes = _sizes(splits, load_component(kind, group="formats"), wishes.model)
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["yaml"] = _inline
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=name,
        file=f"{name}.yaml",
        model=wishes.model,
        scratch=wishes.model == SCRATCH,
        train=wishes.data,
        test=wishes.test,
        columns={field: column for field, column in columns.items() if field != column},
        splits=splits,
        format=kind,
        has_rationales=sizes.has_rationales,
        max_new=sizes.max_new,
        context=sizes.max_prompt + sizes.max_new,
        prompts=min(16, len(splits.train)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    """In tokens."""

    has_rationales: bool
    max_new: int
    max_prompt: int


def _sizes(splits: Splits, format: Format, model: str) -> _Sizes:
    """How long prompts and targets are, so that everything fits. Raises: ModelError, DataError."""
    problems = [*splits.train, *splits.dev, *splits.test]
    learned = [problem for problem in splits.train if problem.rationale is not None]
    encoder = Encoder(_tokenizer(model, _texts(learned, format)), format)
    longest = max((len(encoder.target(problem)) for problem in learned), default=DEFAULT_MAX_NEW)
    return _Sizes(
        has_rationales=bool(learned),
        max_new=-(-longest // 8) * 8,
        max_prompt=max(len(encoder.prompt(problem)) for problem in problems),
    )


def _texts(problems: Sequence[Problem], format: Format) -> list[str]:
    return [
        text
        for problem in problems
        for text in (format.prompt(problem), format.target(problem))
        if isinstance(text, str)
    ]


def _tokenizer(model: str, texts: Sequence[str]) -> PreTrainedTokenizerBase:
    if model == SCRATCH:
        if not texts:
            raise DataError(
                "a model made from scratch learns from rationales, and the data have none; say"
                " --model"
            )
        return word_tokenizer(texts)
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            smollm2_folder() if model == SMOLLM2 else model
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model}: no tokenizer can be loaded: {' '.join(str(error).split())[:200]}"
        ) from None
    return tokenizer


def _inline(value: Any) -> str:
    """A value on one line of YAML."""
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
        .removesuffix("\n")
        .removesuffix("\n...")
    )
