"""Compares rationales with the gold answers, before any training."""

from __future__ import annotations

from collections.abc import Sequence

from reftune.datasets.reading.splits import Splits, drop_untrainable
from reftune.grading.markers import DEFAULT, Reading
from reftune.grading.sandbox import ExecutionResult, ExecutionStatus, Sandbox, SandboxLimits
from reftune.grading.verdicts import grade_completion, grade_value
from reftune.types import Graded, Problem, Verdict

TIMEOUT_S = 20.0


def drop_wrong_programs(splits: Splits) -> Splits:
    """Remove training problems that have no program (counted as `no_program`) or whose program does
    not return the gold answer (`program_disagrees`). The dev split keeps such problems, but
    not their rationales, so that dev is no easier than test."""
    graded = _graded_programs([*splits.train, *splits.dev])
    splits = drop_untrainable(splits, "no_program", lambda problem: problem.rationale is None)
    return drop_untrainable(
        splits,
        "program_disagrees",
        lambda problem: graded[problem.id].verdict is not Verdict.CORRECT,
    )


def drop_contradictions(splits: Splits, reading: Reading = DEFAULT) -> Splits:
    """Remove training problems whose rationale contradicts the gold answer: a program that returns
    another answer (counted as `program_disagrees`), or prose that states another answer
    (`rationale_disagrees`). A program that fails is not a contradiction, nor is prose that states
    no answer. Dev keeps all problems, but loses the rationales that contradict the gold answer."""
    problems = [*splits.train, *splits.dev]
    graded = _graded_programs([p for p in problems if "def solution(" in (p.rationale or "")])

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
    """The result of running each program in the sandbox, in the order of `programs`. The time limit
    is generous, so that no program drops out of the training set just because the machine is
    busy."""
    with Sandbox(SandboxLimits(timeout_s=TIMEOUT_S)) as sandbox:
        return sandbox.run(programs)


def _graded_programs(problems: Sequence[Problem]) -> dict[str, Graded]:
    """Problem id → the grade of the value that the problem's program returns. A program that fails
    is graded as an error."""
    if not problems:
        return {}
    results = run_programs([problem.rationale or "" for problem in problems])
    return {
        problem.id: grade_value(result.value, problem)
        if result.status is ExecutionStatus.OK
        else Graded(verdict=Verdict.ERROR, value=None, reason=result.reason)
        for problem, result in zip(problems, results, strict=True)
    }
