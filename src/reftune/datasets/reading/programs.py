"""Programs as rationales: made from a dataset's own annotations, and run before any training."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence

from reftune.datasets.reading.splits import Splits, drop_untrainable
from reftune.grading.markers import DEFAULT, Reading
from reftune.grading.sandbox import ExecutionResult, ExecutionStatus, Sandbox, SandboxLimits
from reftune.grading.verdicts import grade_completion, grade_value
from reftune.types import Graded, Problem, Verdict

OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.USub, ast.UAdd)
NODES = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Constant, ast.operator, ast.unaryop)
TIMEOUT_S = 20.0
LARGEST_WHOLE = 10**15
"""Whole floats up to this size are written without `.0`."""


def program(steps: Sequence[tuple[str, str]], *, result: str | None = None) -> str:
    """A `solution()` that assigns every (name, expression) in turn and returns `result`, by default
    the last name."""
    result = result or steps[-1][0]
    needs_math = any("math." in expression for _, expression in steps)
    lines = (
        ["import math"] * needs_math
        + [f"{name} = {expression}" for name, expression in steps]
        + [f"return {result}"]
    )
    return "\n".join(["def solution():", *(f"    {line}" for line in lines)])


def arithmetic(text: str, names: Mapping[float, str]) -> str | None:
    """`text` as a Python expression, a name in place of every constant in `names`; None if it is
    not plain arithmetic.

    `48/2` → `48 / 2`; `( 4.0 - 3.0 )` → `4 - 3`; with {24: "clips"}: `48+24` → `48 + clips`.
    """
    try:
        tree = ast.parse(re.sub(r"(?<![\d.])0+(?=\d)", "", text.strip()), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    for node in ast.walk(tree):
        if not isinstance(node, NODES) or (
            isinstance(node, (ast.operator, ast.unaryop)) and not isinstance(node, OPERATORS)
        ):
            return None
        if isinstance(node, ast.Constant) and (
            isinstance(node.value, bool) or not isinstance(node.value, (int, float))
        ):
            return None
    return ast.unparse(_Renamed(names).visit(tree))


class _Renamed(ast.NodeTransformer):
    def __init__(self, names: Mapping[float, str]) -> None:
        self.names = names

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        value = node.value
        assert isinstance(value, (int, float))
        if isinstance(value, float) and value.is_integer() and value < LARGEST_WHOLE:
            value = int(value)
        return ast.Name(self.names[value]) if value in self.names else ast.Constant(value)


def drop_wrong_programs(splits: Splits) -> Splits:
    """Train without the problems that have no program (`no_program`) or one that does not return
    the gold answer (`program_disagrees`). Dev keeps such problems without a rationale, so that it
    is no easier than test."""
    graded = _graded_programs([*splits.train, *splits.dev])
    splits = drop_untrainable(splits, "no_program", lambda problem: problem.rationale is None)
    return drop_untrainable(
        splits,
        "program_disagrees",
        lambda problem: graded[problem.id].verdict is not Verdict.CORRECT,
    )


def drop_contradictions(splits: Splits, reading: Reading = DEFAULT) -> Splits:
    """Train without the rationales that contradict their gold answer: programs that return another
    one (`program_disagrees`) and texts that state another one (`rationale_disagrees`). A program
    that fails, or a text that states no answer, is no contradiction and stays."""
    programs = [
        problem
        for problem in (*splits.train, *splits.dev)
        if "def solution(" in (problem.rationale or "")
    ]
    graded = _graded_programs(programs)

    def states_another(problem: Problem) -> bool:
        if problem.rationale is None or problem.id in graded:
            return False
        return grade_completion(problem.rationale, problem, reading).verdict is Verdict.WRONG

    splits = drop_untrainable(
        splits,
        "program_disagrees",
        lambda problem: problem.id in graded and graded[problem.id].verdict is Verdict.WRONG,
    )
    return drop_untrainable(splits, "rationale_disagrees", states_another)


def run_programs(programs: Sequence[str]) -> list[ExecutionResult]:
    """Run in the sandbox, with enough time that a busy machine does not change the training set."""
    with Sandbox(SandboxLimits(timeout_s=TIMEOUT_S)) as sandbox:
        return sandbox.run(programs)


def _graded_programs(problems: Sequence[Problem]) -> dict[str, Graded]:
    """Problem id → the grade of its program's value; a program that fails has no answer."""
    if not problems:
        return {}
    results = run_programs([problem.rationale or "" for problem in problems])
    return {
        problem.id: grade_value(result.value, problem)
        if result.status is ExecutionStatus.OK
        else Graded(verdict=Verdict.ERROR, value=None, reason=result.reason)
        for problem, result in zip(problems, results, strict=True)
    }
