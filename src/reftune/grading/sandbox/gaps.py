"""Reads the error that ended a program, to determine which part of Python the program needs but
monty lacks."""

from __future__ import annotations

import builtins
import collections
import datetime
import importlib
import re
import sys
from collections.abc import Callable

from reftune.grading.sandbox.result import (
    FORBIDDEN_MODULES,
    HARMLESS_IN_SYS,
    ExecutionResult,
    ExecutionStatus,
)


def gap(result: ExecutionResult) -> str | None:
    """The part of Python that a program needed but monty lacks, such as `yield`, `dict.get as a
    value` or `the module heapq`; None if no such gap ended the program.

    A missing third-party package is not such a gap, because verdicts must not depend on which
    packages are installed.
    """
    if result.status is not ExecutionStatus.ERROR:
        return None
    for pattern, name in _GAPS.items():
        match = re.match(pattern, result.reason)
        if match is not None:
            return name if isinstance(name, str) else name(match)
    return None


def missing_package(result: ExecutionResult) -> str | None:
    """The name of the third-party package that a program could not import; None if the program did
    not fail for this reason."""
    match = re.match(r"ModuleNotFoundError: No module named '([\w.]+)'", result.reason)
    if match is None or _comes_with_python(match[1]):
        return None
    return match[1].partition(".")[0]


def _module(match: re.Match[str]) -> str | None:
    return f"the module {match[1]}" if _comes_with_python(match[1]) else None


def _name_of_module(match: re.Match[str]) -> str | None:
    module, name = match["module"], match["name"]
    # only these modules are imported here, because a program can raise an error that names others
    is_allowed = module in _IN_MONTY or (module == "sys" and name in HARMLESS_IN_SYS)
    known = is_allowed and hasattr(importlib.import_module(module), name)
    return f"{module}.{name}" if known else None


def _builtin(match: re.Match[str]) -> str | None:
    return match[1] if hasattr(builtins, match[1]) else None


def _attribute(match: re.Match[str]) -> str | None:
    kind = _TYPES.get(match[1])
    return f"{match[1]}.{match[2]} as a value" if hasattr(kind, match[2]) else None


def _comes_with_python(module: str) -> bool:
    root = module.partition(".")[0]
    return root in sys.stdlib_module_names - FORBIDDEN_MODULES and root not in ("os", "sys")


_IN_MONTY = frozenset(
    "asyncio base64 binascii bisect collections copy csv dataclasses datetime decimal functools"
    " hashlib itertools json math pathlib posixpath random re time tomllib typing"
    " unicodedata".split()
)
"""Monty's modules, except `os` and `sys`. Importing them in CPython has no side effects."""
_TYPES = {
    name: kind
    for module in (builtins, collections, datetime)
    for name, kind in vars(module).items()
    if isinstance(kind, type)
}
_GAPS: dict[str, str | Callable[[re.Match[str]], str | None]] = {
    r"NotImplementedError: .*does not yet support (.+)": lambda match: match[1].strip("'"),
    r"NotImplementedError: Wildcard imports ": "import *",
    r"ModuleNotFoundError: No module named '([\w.]+)'": _module,
    r"AttributeError: module '(?P<module>\w+)' has no attribute '(?P<name>\w+)'": _name_of_module,
    r"ImportError: cannot import name '(?P<name>\w+)' from '(?P<module>\w+)'": _name_of_module,
    r"AttributeError: (?:type object )?'(?:\w+\.)?(\w+)' (?:object )?has no attribute '(\w+)'": (
        _attribute
    ),
    r"NameError: name '(\w+)' is not defined": _builtin,
    r"TypeError: 'list' object is not an iterator": "a generator's next",
    r"TypeError: '[<>]=?' not supported between instances": "ordering of objects",
    r"TypeError: 'typing\.\w+' object is not subscriptable": "generic types from typing",
    r"TypeError: cannot create 'object' instances": "object()",
    r"TypeError: cannot convert '\w+' object to bytes": "bytes from a list",
    r"ValueError: pow\(\) 2nd argument cannot be negative": "modular inverses with pow",
    r"ValueError: time data .* does not match format": "strptime formats",
    r"TypeError: object of type '\w+' has no len\(\)": "__len__",
}
"""Pattern of the error that ends a program → the part of Python that the program needed, or a
function that reads this part from the match."""
