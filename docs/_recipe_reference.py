"""Writes docs/recipe.md, the reference of all recipe keys, from the pydantic models that define
them. `make docs` runs this file."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
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

A *recipe* is the YAML file that describes a run. This page lists all recipe keys. The command line
can set any of them (`stages.reft.steps=100`). A nested mapping is a *table*. Some tables have a
*kind*, which names a built-in component or your own class (`my_file.py:Name`). Write the kind alone
(`engine: kv`) or with other keys (`engine: {kind: kv, refill: 0.5}`). If the kind is the default,
you may leave it out (`engine: {refill: 0.5}`). With `extends: other.yaml`, a recipe inherits that
file's keys: tables are merged unless their kinds differ, and `null` removes an inherited key. On
the command line, `null` removes a table or stage (`stages.sft=null`) and restores the default of a
component (`reward=null`), and `#` does not start a comment.

If a key allows only certain values, its default is followed by the others in parentheses. A dash
means that the key is unset by default. [Notation](algorithms.md#notation) explains terms such
as *method* and *rollout*. "The paper" is the ReFT paper, and "the authors" are its authors.
"""
Rows = dict[str, tuple[str, str]]
"""Key → its default and meaning."""
Shared = dict[tuple[str, str], dict[str, str]]
"""(Key, meaning) → the default in each kind that has the key with this meaning."""


def page() -> str:
    """The text of docs/recipe.md."""
    parts = [HEAD, *_section("A recipe", Recipe, _rows(Recipe, ()))]
    for group, title in GROUPS.items():
        classes = {kind: component_class(kind, group=group) for kind in known_kinds(group)}
        tables = {kind: _rows(model, classes.values()) for kind, model in classes.items()}
        shared = _shared(tables)
        parts.append(f"## {title}\n")
        for kinds in dict.fromkeys(map(tuple, shared.values())):
            parts.append(f"**Keys of {_and(kinds)}**\n")
            parts.append(
                _table(
                    {
                        key: (_defaults(of), meaning)
                        for (key, meaning), of in shared.items()
                        if tuple(of) == kinds
                    }
                )
            )
        for kind, model in classes.items():
            own = {key: row for key, row in tables[kind].items() if (key, row[1]) not in shared}
            parts += _section(f"`kind: {kind}`", model, own, level=3)
    return "\n".join(parts).rstrip() + "\n"


def _shared(tables: Mapping[str, Rows]) -> Shared:
    """The keys with the same meaning in several kinds, and their default in each."""
    found: Shared = {}
    for kind, rows in tables.items():
        for key, (default, meaning) in rows.items():
            found.setdefault((key, meaning), {})[kind] = default
    return {item: defaults for item, defaults in found.items() if len(defaults) > 1}


def _defaults(of: Mapping[str, str]) -> str:
    """The default or, if it depends on the kind, every default with its kinds."""
    kinds = {value: [kind for kind in of if of[kind] == value] for value in of.values()}
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{_and(names)}: {value}" for value, names in kinds.items())


def _section(title: str, model: type[BaseModel], rows: Rows, level: int = 2) -> Iterator[str]:
    """A heading, the first paragraph of the model's docstring, and a table of `rows`."""
    yield f"{'#' * level} {title}\n"
    # without a docstring, a class is described by its module's docstring
    yield f"{_about(model.__dict__.get('__doc__') or inspect.getmodule(model).__doc__)}\n"
    if rows:
        yield _table(rows)


def _table(rows: Rows) -> str:
    lines = "\n".join(
        f"`{key}` | {default} | {meaning}".rstrip() for key, (default, meaning) in rows.items()
    )
    return f"key | default | meaning\n---|---|---\n{lines}\n"


def _rows(model: type[BaseModel], components: Sequence[type[BaseModel]]) -> Rows:
    """The rows of a model's keys, nested tables included. Tables from which `components` derive are
    left out, because the components have rows of their own."""
    notes, rows = _notes(model), {}
    for name, field in model.model_fields.items():
        if name == "kind":
            continue
        inner = [
            table
            for table in _tables(field.annotation)
            if not any(issubclass(component, table) for component in components)
        ]
        note = notes.get(name) or " ".join(_about(table.__doc__) for table in inner)
        if note or not inner:
            rows[name] = _default(field), _cell(note)
        for table in inner:
            prefix = {list: f"{name}[].", dict: f"{name}.NAME."}.get(_holder(field), f"{name}.")
            rows |= {f"{prefix}{key}": row for key, row in _rows(table, components).items()}
    return rows


def _and(kinds: Sequence[str]) -> str:
    *others, last = [f"`{kind}`" for kind in kinds]
    return f"{', '.join(others)} and {last}" if others else last


def _about(text: str | None) -> str:
    return _cell(inspect.cleandoc(str(text)).split(PARAGRAPH)[0])


def _holder(field: Any) -> Any:
    return get_origin(field.annotation)


def _tables(annotation: Any) -> list[type[BaseModel]]:
    """The models of a key's nested tables, except plug-ins, which have sections of their own."""
    found = [annotation, *get_args(annotation)]
    return [
        kind
        for kind in found
        if inspect.isclass(kind) and issubclass(kind, BaseModel) and not issubclass(kind, Component)
    ]


def _notes(model: type[BaseModel]) -> dict[str, str]:
    """Field → its docstring, including inherited fields."""
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


def _default(field: Any) -> str:
    """The default, followed in parentheses by the other values if only certain values are
    allowed."""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    if inspect.isclass(field.annotation) and issubclass(field.annotation, Component):
        for rule in field.metadata:
            if isinstance(rule, BeforeValidator) and value is not PydanticUndefined:
                value = rule.func(value).kind
    others = [f"`{choice}`" for choice in _choices(field.annotation) if choice != value]
    if value is PydanticUndefined:
        return "**required**"
    if isinstance(value, bool):
        value = str(value).lower()
    default = "–" if value is None else f"`{value}`"
    return f"{default} (or {', '.join(others)})" if others else default


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The allowed values; empty if the annotation does not list them."""
    if get_origin(annotation) is Annotated:
        return _choices(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
        return _choices(kinds[0]) if len(kinds) == 1 else ()
    return ()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
