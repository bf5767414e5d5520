"""Writes docs/recipe.md, the reference of every recipe key, from the models that read them. `make
docs` runs it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from reftune.recipe import Component, Recipe, component_class, known_kinds

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
unknown key is refused with the nearest known one. `extends: other.yaml` starts from another recipe:
mappings merge, an explicit `null` removes a key.
This page is generated from the code that reads recipes.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, *_section("A recipe", Recipe, 2)]
    for group, title in GROUPS.items():
        parts.append(f"## {title}\n")
        for kind in known_kinds(group):
            parts += _section(f"`kind: {kind}`", component_class(kind, group=group), 3)
    return "\n".join(parts).rstrip() + "\n"


def _section(title: str, model: type[BaseModel], level: int) -> Iterator[str]:
    """A table of a model's keys, then those of the tables in it."""
    yield f"{'#' * level} {title}\n"
    about = (
        model.__dict__.get("__doc__") or inspect.getmodule(model).__doc__
    )  # a plug-in's file may speak for its class
    yield f"{_cell(str(about))}\n"
    notes = _notes(model)
    rows = [
        f"| `{name}` | {_type(field.annotation)} | {_default(field)} |"
        f" {_cell(notes.get(name, ''))} |"
        for name, field in model.model_fields.items()
        if name != "kind"
    ]
    if rows:
        yield "| key | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    for name, field in model.model_fields.items():
        for table in _tables(field.annotation):
            yield from _section(f"`{name}`", table, level + 1)


def _tables(annotation: Any) -> list[type[BaseModel]]:
    found = [
        annotation,
        *(inner for argument in get_args(annotation) for inner in (argument, *get_args(argument))),
    ]
    return [
        kind
        for kind in found
        if inspect.isclass(kind) and issubclass(kind, BaseModel) and kind is not Component
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
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    text = inspect.formatannotation(annotation)
    for long, short in (
        ("typing.", ""),
        ("Literal", "one of "),
        ("Annotated", ""),
        ("| None", "| null"),
        ("NoneType", "null"),
    ):
        text = text.replace(long, short)
    if inspect.isclass(annotation) and issubclass(annotation, Component):
        return "a kind"
    if any(issubclass(kind, Component) for kind in _classes(annotation)):
        return "kinds by name"
    for kind in _classes(annotation):
        if issubclass(kind, BaseModel):
            text = text.replace(f"{kind.__module__}.{kind.__qualname__}", "table").replace(
                kind.__name__, "table"
            )
    return f"`{text.replace('|', chr(92) + '|')}`"


def _classes(annotation: Any) -> list[type]:
    found = [
        annotation,
        *(inner for argument in get_args(annotation) for inner in (argument, *get_args(argument))),
    ]
    return [kind for kind in found if inspect.isclass(kind)]


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
