"""Rationales that are programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, PrivateAttr
from pydantic_core import PydanticCustomError

from reftune.errors import DataError
from reftune.grading.formats._grading import RULES, Grading, graded_by, own_grader
from reftune.grading.formats._imports import without_unused_imports
from reftune.grading.formats._prompts import Prompted, gold_rationale, paper_prompt, question_text
from reftune.grading.formats._source import HEADER, Script, body_of, programs_in, scripts_in
from reftune.grading.paper_rules import grade_value_paper, paper_response
from reftune.grading.sandbox import Sandbox, SandboxKind
from reftune.grading.sandbox.result import ExecutionResult, ExecutionStatus, SandboxLimits
from reftune.grading.verdicts import grade_sentence, grade_value, no_answer
from reftune.types import Conversation, Graded, Problem, Verdict


class Program(Prompted):
    """A Python function `solution()` that returns the answer. With `paper` and `compact` the prompt
    ends in its header and the model writes the body; with other styles it writes everything."""

    kind: str = "program"
    grading: Grading = "robust"
    """`robust` finds the program in the text, `paper` by the authors' rules; or your own
    `file.py:Name` for what the program returned."""
    timeout_s: float = Field(default=1.0, gt=0, le=60)
    """Seconds a program may run."""
    memory_mib: int = Field(default=64, ge=16)
    """Memory a program may use, in MiB."""
    sandbox: SandboxKind = "auto"
    """What [runs programs](sandbox.md)."""
    scripts: Literal["refuse", "read"] = "refuse"
    """`read`: without a `solution()`, take what the program assigns to `answer` or prints last."""
    allow_unisolated: bool = False
    """Run programs even if the system cannot isolate them."""

    _sandbox: Sandbox = PrivateAttr()

    def model_post_init(self, _: Any) -> None:
        if self.grading == "paper" and self.scripts == "read":
            raise PydanticCustomError(
                "scripts", "scripts: read: expected grading: robust; the paper's rules read none"
            )
        limits = SandboxLimits(timeout_s=self.timeout_s, memory_mib=self.memory_mib)
        self._sandbox = Sandbox(
            limits, backend=self.sandbox, allow_unisolated=self.allow_unisolated
        )

    def prompt(self, problem: Problem) -> str | Conversation:
        """The question in the style's frame; then, unless the model writes it, the function's
        header, under which the authors repeat the question as a docstring."""
        if self.writes_all:
            return self.framed(problem)
        if self.style == "paper":
            return paper_prompt(problem, _paper_header(problem))
        return f"{question_text(problem)}\n{HEADER}".removesuffix("\n")

    def target(self, problem: Problem) -> str:
        """The gold program without docstring; only its body if the prompt ends in its header.

        In the compact style the line break before it belongs to the target: tokenizers keep it
        together with the indent, so that prompt and target, tokenised apart, are the tokens of the
        whole text.
        Raises: DataError if there is no program.
        """
        body = body_of(gold_rationale(problem))
        if not body:
            raise DataError(
                f"problem {problem.id}: its rationale is not a program with a solution(); expected"
                " one, or format.kind=nl"
            )
        if self.writes_all:
            return HEADER + body
        return body if self.style == "paper" else f"\n{body}"

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Graded]:
        """One grade per completion, in order. Equal programs run once."""
        if self.style == "compact":
            completions = [completion.removeprefix("\n") for completion in completions]
        pairs = list(zip(problems, completions, strict=True))
        if self.grading == "paper":
            return self._grade_paper(pairs)
        candidates = [self._scripts(completion) for _, completion in pairs]
        results: dict[Script, ExecutionResult] = {}
        for turn in range(max(map(len, candidates), default=0)):
            results |= self._run_each(
                programs[turn]
                for programs in candidates
                if len(programs) > turn
                and all(results[p].status is ExecutionStatus.ERROR for p in programs[:turn])
            )
        return [
            self._graded(problem, [results[each] for each in programs if each in results])
            for (problem, _), programs in zip(pairs, candidates, strict=True)
        ]

    def _scripts(self, completion: str) -> tuple[Script, ...]:
        functions = tuple(Script(source, "solution()") for source in programs_in(completion))
        return (*scripts_in(completion), *functions) if self.scripts == "read" else functions

    def _graded(self, problem: Problem, results: Sequence[ExecutionResult]) -> Graded:
        """The grade of the first program that ends without an error; of the first error if none
        does."""
        if not results:
            expected = " and neither assigns nor prints an answer" * (self.scripts == "read")
            return no_answer(f"the text defines no solution() and returns nothing{expected}")
        result = next(
            (result for result in results if result.status is not ExecutionStatus.ERROR), results[0]
        )
        return replace(
            self._grade_result(problem, result), program_s=sum(each.seconds for each in results)
        )

    def _grade_result(self, problem: Problem, result: ExecutionResult) -> Graded:
        if result.status is not ExecutionStatus.OK:
            return _failed(result)
        if self.grading not in RULES:
            value = result.printed if result.value is None else str(result.value)
            return graded_by(own_grader(self.grading), value, problem)
        if self.scripts == "read" and (result.value is None or isinstance(result.value, str)):
            lines = str(result.value or result.printed).strip().splitlines()
            return grade_sentence(lines[-1] if lines else "", problem)
        return grade_value(result.value, problem)

    def _grade_paper(self, pairs: Sequence[tuple[Problem, str]]) -> list[Graded]:
        sources = [_paper_source(problem, completion) for problem, completion in pairs]
        scripts = [Script(source, "_scope['solution']()") for source in sources]
        results = self._run_each(scripts)
        return [
            _grade_paper(problem, results[script])
            for (problem, _), script in zip(pairs, scripts, strict=True)
        ]

    def _run_each(self, scripts: Iterable[Script]) -> dict[Script, ExecutionResult]:
        each = dict.fromkeys(scripts)
        results: dict[Script, ExecutionResult] = {}
        for call in dict.fromkeys(script.call for script in each):
            group = [script for script in each if script.call == call]
            sources = [script.source for script in group]
            results |= zip(group, self._sandbox.run(sources, call), strict=True)
        return results


def _failed(result: ExecutionResult) -> Graded:
    return Graded(verdict=Verdict(result.status.value), value=None, reason=result.reason)


# --- the paper's rules ----------------------------------------------------------------------------


def _paper_header(problem: Problem) -> str:
    return f'{HEADER}    """{question_text(problem)}"""\n'


def _paper_source(problem: Problem, completion: str) -> str:
    """The authors' program: the header and the completion up to the first blank line, `sys.exit`
    turned into `print`, run with `math` as its only global, so that what it defines beside
    `solution` is not visible inside.

    Differs: a completion with its own `def solution` gets no header; sympy is not offered.
    """
    response = paper_response(
        completion if completion.startswith("def solution") else _paper_header(problem) + completion
    )
    lines = response.replace("sys.exit", "print").split("\n")
    end = next((index for index, line in enumerate(lines) if not line.strip()), len(lines))
    code = without_unused_imports("\n".join(lines[:end]))
    return f"import math\n_scope = {{}}\nexec({code!a}, {{'math': math}}, _scope)"


def _grade_paper(problem: Problem, result: ExecutionResult) -> Graded:
    """A crash is the value "none" if answers are strings, and no value if they are numbers."""
    has_value = result.status is ExecutionStatus.OK or problem.answer.kind != "number"
    graded = grade_value_paper(result.value, problem) if has_value else _failed(result)
    return replace(graded, program_s=result.seconds)
