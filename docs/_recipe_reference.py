"""Writes docs/recipe.md, the reference of every recipe key, from the models that read them. `make
docs` runs it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from reftune.recipe import Component, Recipe, component_class, known_kinds

PARAGRAPH = "\n\n"
PAGE = Path(__file__).with_name("recipe.md")
GROUPS = {
    "stages": "Stages",
    "algorithms": "Algorithms",
    "datasets": "Datasets",
    "formats": "Formats",
    "rewards": "Rewards",
    "engines": "Engines",
}
HEAD = """\
# Recipe reference

One YAML file is a run. Keys can be changed on the command line (`stages.reft.steps=100`); an
unknown key is refused, and the nearest known one named. `extends: other.yaml` starts from another
recipe: mappings merge, and an explicit `null` removes a key. A *kind* is a name (`engine: kv`), a
table (`engine: {kind: kv, refill: 0.5}`) or a class of your own (`kind: my_file.py:Name`).

This page is generated from the code that reads recipes.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, *_section("A recipe", Recipe, _rows(Recipe), 2, set())]
    for group, title in GROUPS.items():
        parts.append(f"## {title}\n")
        classes = {kind: component_class(kind, group=group) for kind in known_kinds(group)}
        tables = {kind: _rows(model) for kind, model in classes.items()}
        printed: set[str] = set()
        for kinds, shared in _shared(tables).items():
            parts.append(f"### Keys of {_and(kinds)}\n")
            parts += _table(classes[kinds[0]], shared, 3, printed)
        shared_rows = frozenset(printed)
        for kind, model in classes.items():
            own = {key: row for key, row in tables[kind].items() if row not in shared_rows}
            parts += _section(f"`kind: {kind}`", model, own, 3, set(shared_rows))
    return "\n".join(parts).rstrip() + "\n"


def _shared(tables: Mapping[str, Mapping[str, str]]) -> dict[tuple[str, ...], dict[str, str]]:
    """Kinds → the rows that exactly these have in common, if that spares at least two rows."""
    holders: dict[str, list[str]] = {}
    for kind, rows in tables.items():
        for row in rows.values():
            holders.setdefault(row, []).append(kind)
    shared: dict[tuple[str, ...], dict[str, str]] = {}
    for kinds in holders.values():
        if len(kinds) > 1:
            rows = tables[kinds[0]]
            shared[tuple(kinds)] = {key: row for key, row in rows.items() if holders[row] == kinds}
    return {kinds: rows for kinds, rows in shared.items() if len(rows) * (len(kinds) - 1) > 1}


def _section(
    title: str, model: type[BaseModel], rows: dict[str, str], level: int, printed: set[str]
) -> Iterator[str]:
    """A heading, the first paragraph about the model, and `rows` of its keys."""
    yield f"{'#' * level} {title}\n"
    about = (
        model.__dict__.get("__doc__") or inspect.getmodule(model).__doc__
    )  # a plug-in's file may speak for its class
    yield f"{_cell(inspect.cleandoc(str(about)).split(PARAGRAPH)[0])}\n"
    yield from _table(model, rows, level, printed)


def _table(
    model: type[BaseModel], rows: dict[str, str], level: int, printed: set[str]
) -> Iterator[str]:
    """`rows` of a model's keys, then the tables in them. What was `printed` before is only named.

    Adds what it prints to `printed`.
    """
    new = {key: row for key, row in rows.items() if row not in printed}
    if old := [key for key in rows if key not in new]:
        yield f"As above: {_and(old)}.\n"
    if new:
        lines = "\n".join(new.values())
        yield f"| key | type | default | meaning |\n|---|---|---|---|\n{lines}\n"
    printed.update(new.values())
    for key in new:
        for table in _tables(model.model_fields[key].annotation):
            yield from _section(f"`{key}`", table, _rows(table), level + 1, printed)


def _rows(model: type[BaseModel]) -> dict[str, str]:
    """Key → its line of a table."""
    notes = _notes(model)
    return {
        name: f"| `{name}` | {_type(field.annotation)} | {_default(field)} |"
        f" {_cell(notes.get(name, ''))} |"
        for name, field in model.model_fields.items()
        if name != "kind"
    }


def _and(kinds: Sequence[str]) -> str:
    *others, last = [f"`{kind}`" for kind in kinds]
    return f"{', '.join(others)} and {last}" if others else last


def _tables(annotation: Any) -> list[type[BaseModel]]:
    found = [
        annotation,
        *(inner for argument in get_args(annotation) for inner in (argument, *get_args(argument))),
    ]
    return [
        kind
        for kind in found
        if inspect.isclass(kind) and issubclass(kind, BaseModel) and not issubclass(kind, Component)
    ]


def _notes(model: type[BaseModel]) -> dict[str, str]:
    """Field → the text under it, of the model and of those it is made from."""
    notes: dict[str, str] = {}
    for base in reversed(
        [base for base in model.__mro__ if issubclass(base, BaseModel) and base is not BaseModel]
    ):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                notes[ast.unparse(field.target)] = inspect.cleandoc(str(below.value.value))
    return notes


def _type(annotation: Any) -> str:
    """What a key takes besides `null`, in words: `float`, list of `str`, `base`, `float32`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type(kind) for kind in arguments if kind is not NoneType)
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"{_type(arguments[1])} by name"
    if annotation is Any:
        return "any value"
    if inspect.isclass(annotation) and issubclass(annotation, Component):
        return "a kind"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "table"
    return f"`{inspect.formatannotation(annotation)}`"


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "**required**"
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, dict) and "kind" in value:
        value = value["kind"]
    return (
        f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
