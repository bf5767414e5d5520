"""Loads plug-ins. A plug-in is a class that derives from `Component`. Its fields are its recipe
keys. A reward may also be a function. A recipe refers to a plug-in by a string called its kind.
This is either the name of a module that comes with reftune (`gsm8k` for
`reftune/datasets/gsm8k.py`) or `file.py:Name`. The file is searched for in the working directory,
then in the folder of reftune's own recipes."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, LiteralString

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from reftune.text import did_you_mean


def refusal(kind: LiteralString, message: str) -> PydanticCustomError:
    """A pydantic error for a validator to raise. `kind` is the error's type. `parse_recipe` turns
    the error into a one-line RecipeError that names the recipe key at fault."""
    return PydanticCustomError(kind, "{message}", {"message": message})


class Table(BaseModel):
    """A group of recipe keys. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise refusal("unknown_key", unknown_key(key, cls.model_fields))
        return data


class Component(Table):
    """The base class of every plug-in: dataset, format, reward, engine, algorithm or stage."""

    kind: str = Field("", validate_default=True)
    """The kind that names this class in a recipe: its module's name, or `file.py:Name`."""

    @field_validator("kind")
    @classmethod
    def _default_to_class(cls, kind: str) -> str:
        module = cls.__module__
        if module.startswith("reftune."):
            return kind or module.rpartition(".")[2]
        file = getattr(sys.modules.get(module), "__file__", None) or module
        return kind or f"{file}:{cls.__name__}"


def unknown_key(key: object, known: Mapping[str, Any] | Sequence[str]) -> str:
    """The message for an unknown key, such as `partal: unknown key; did you mean partial?`."""
    hint = did_you_mean(key, known) or f"known keys: {', '.join(known)}"
    return f"{key}: unknown key; {hint}"


# --- plug-ins -------------------------------------------------------------------------------------


GROUPS = {
    "datasets": ("reftune.datasets", ("load",)),
    "formats": ("reftune.grading.formats", ("prompt", "target", "grade")),
    "rewards": ("reftune.grading.rewards", ("__call__",)),
    "engines": ("reftune.engines", ("generate",)),
    "algorithms": ("reftune.algorithms", ("credit", "loss")),
    "stages": ("reftune.stages", ("run", "cost", "needs", "produces")),
}
"""Group of plug-ins → the package that contains them, one plug-in per file, and the names of the
methods and properties that each class of the group must define or inherit."""


def _built_in(kind: str, group: str) -> list[type[Component]]:
    """The public, concrete component classes that the module `kind` defines rather than imports."""
    module = importlib.import_module(f"{GROUPS[group][0]}.{kind}")
    return [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Component)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
        and not inspect.isabstract(value)
    ]


def known_kinds(group: str) -> list[str]:
    """The built-in kinds of a group: the modules in its package that define a public component."""
    folder = Path(importlib.import_module(GROUPS[group][0]).__path__[0])
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    return [name for name in names if _built_in(name, group)]


def load_component(spec: Any, *, group: str, default: str | None = None) -> Any:
    """An instance of the plug-in that `spec` describes. `spec` is either a kind, or a mapping from
    recipe keys to values, or an instance, which is returned unchanged. If `spec` is None or a
    mapping without the key `kind`, the kind is `default`. Raises: PydanticCustomError if `spec`
    names no plug-in; ValidationError if a key or value is wrong."""
    if isinstance(spec, Component):
        return spec
    if isinstance(spec, str):
        spec = {"kind": spec}
    if default is not None and (spec is None or isinstance(spec, Mapping)):
        spec = {"kind": default, **(spec or {})}
    if not isinstance(spec, Mapping) or "kind" not in spec:
        kinds = ", ".join(known_kinds(group))
        raise refusal("component", f"expected a kind ({kinds}) or a mapping with the key kind")
    cls = component_class(str(spec["kind"]), group=group)
    if inspect.isfunction(cls) and group == "rewards":
        cls = component_class("function", group=group)
    if inspect.isfunction(cls):
        raise refusal(
            "not_a_class",
            f"{spec['kind']} is a function; {group} are classes derived from Component",
        )
    if not (inspect.isclass(cls) and issubclass(cls, Component)):
        raise refusal(
            "not_a_component",
            f"{spec['kind']} is not a class derived from reftune.recipe.kinds.Component",
        )
    # not `hasattr`, which finds `__call__` in every class
    found = {name for base in cls.__mro__ for name in vars(base)}
    missing = cls.__abstractmethods__ | {*GROUPS[group][1]} - found
    if missing:
        lacking = ", ".join(sorted(missing))
        raise refusal("not_a_component", f"{spec['kind']} lacks {lacking}, which {group} need")
    return cls.model_validate(dict(spec))


def component_class(kind: str, *, group: str) -> Any:
    """The class that a kind names. For `file.py:Name`, the result is the object `Name` in that
    file, usually a class or a function. Raises: PydanticCustomError if there is no such class or
    object, or if the file cannot be loaded."""
    if ":" in kind:
        return _user_object(kind)
    kinds = known_kinds(group)
    if kind not in kinds:
        listed = f"known: {', '.join(kinds)}, or your own file.py:Name"
        hint = did_you_mean(kind, kinds) or listed
        raise refusal("unknown_kind", f"{kind}: unknown kind; {hint}")
    classes = _built_in(kind, group)
    assert len(classes) == 1, f"{group}/{kind} must define one public Component, found {classes}"
    return classes[0]


def shipped_recipes() -> Path:
    """The folder of the recipes that come with reftune. It is inside the package if reftune was
    installed from a wheel, and at the root of the repository in an editable install."""
    packaged = Path(__file__).parents[1] / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "recipes"


def _user_object(kind: str) -> Any:
    file, _, name = kind.rpartition(":")
    main = sys.modules["__main__"]  # a script is not run again to find its own class
    if _is_file(main, file) and hasattr(main, name):
        return getattr(main, name)
    try:
        path = Path(file).expanduser().resolve()
    except RuntimeError:  # the path begins with `~name`, but no user has that name
        path = Path(file)
    if not path.is_file():
        path = shipped_recipes() / file
    if not path.is_file():
        relative = "" if Path(file).is_absolute() else f" in the working directory {Path.cwd()}"
        raise refusal("no_file", f"{file}: no such file{relative}")
    try:
        module = _user_module(path.resolve(), path.stat().st_mtime_ns, path.stat().st_size)
    # loading a user's file may raise anything, and a script may call sys.exit
    except (Exception, SystemExit) as error:  # noqa: BLE001
        reason = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        raise refusal("bad_file", f"{file}: cannot be loaded: {reason}") from None
    if module is None:
        raise refusal("bad_file", f"{file}: not a Python file; expected file.py:name")
    if not hasattr(module, name):
        public = ", ".join(key for key in vars(module) if not key.startswith("_"))
        raise refusal("no_name", f"{file} has no {name}; it defines {public}")
    return getattr(module, name)


def _is_file(module: ModuleType, file: str) -> bool:
    """Whether `file` is the module's file or, for a module without a file, the module's name."""
    return (
        Path(getattr(module, "__file__", None) or module.__name__).absolute()
        == Path(file).absolute()
    )


@functools.cache
def _user_module(path: Path, changed_ns: int, size: int) -> ModuleType | None:
    """The module in the file `path`; None if it is not a Python file. All plug-ins in a file share
    one module. The file is loaded again only if its modification time (`changed_ns`) or its `size`
    has changed."""
    name = f"reftune_user_{path.stem}_{zlib.crc32(bytes(path)):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        return None
    if name in _LOADING:
        raise refusal(
            "runs",
            f"{path} uses itself while it is loaded; call reftune.run or"
            " reftune.evaluate only under `if __name__ == '__main__':`",
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic looks up postponed annotations there
    _LOADING.add(name)
    try:
        spec.loader.exec_module(module)
    finally:
        _LOADING.discard(name)
    return module


_LOADING: set[str] = set()
"""Names of the modules that `_user_module` is loading."""


def component_field(group: str, *, default: str | None = None) -> Any:
    """The type of a recipe key that contains a plug-in of `group`, by default of kind `default`."""
    load = functools.partial(load_component, group=group, default=default)
    return SerializeAsAny[Annotated[Component, BeforeValidator(load)]]
