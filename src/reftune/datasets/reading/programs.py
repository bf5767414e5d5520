"""Generates programs from a dataset's annotations, for use as rationales."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence

OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.USub, ast.UAdd)
NODES = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Constant, *OPERATORS)
LARGEST_WHOLE = 10**15
"""Whole floats below this are written without `.0`."""


def program(steps: Sequence[tuple[str, str]], *, result: str | None = None) -> str:
    """The source of a function `solution()` with a line `name = expression` for each pair in
    `steps`. The function returns the expression `result` or, by default, the name in the last
    pair."""
    lines = ["import math"] * any("math." in expression for _, expression in steps)
    lines += [f"{name} = {expression}" for name, expression in steps]
    lines += [f"return {result or steps[-1][0]}"]
    return "\n    ".join(["def solution():", *lines])


def arithmetic(text: str, names: Mapping[float, str]) -> str | None:
    """`text` as a Python expression, in which each constant that is a key of `names` is replaced by
    its name. Returns None if `text` is not plain arithmetic.

    For example, `48/2` becomes `48 / 2`, and `( 4.0 - 3.0 )` becomes `4 - 3`. If `names` is
    `{24: "clips"}`, `48+24` becomes `48 + clips`.
    """
    if "_" in text:
        return None
    try:
        tree = ast.parse(re.sub(r"(?<![\d.])0+(?=\d)", "", text.strip()), mode="eval")
        for node in ast.walk(tree):
            is_other = isinstance(node, ast.Constant) and type(node.value) not in (int, float)
            if is_other or not isinstance(node, NODES):
                return None
        return ast.unparse(_Renamed(names).visit(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


class _Renamed(ast.NodeTransformer):
    def __init__(self, names: Mapping[float, str]) -> None:
        self.names = names

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        value = node.value
        assert isinstance(value, (int, float))
        if isinstance(value, float) and value.is_integer() and value < LARGEST_WHOLE:
            value = int(value)
        return ast.Name(self.names[value]) if value in self.names else ast.Constant(value)
