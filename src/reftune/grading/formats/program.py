"""Rationales that are programs.

A completion either continues `def solution():` or contains a whole program. The program is found by
text search, because only the sandbox parses or runs a model's code. Only text after the last
`</think>` counts. If the completion ends inside `<think>`, there is no program. If a line after the
program, such as "Question: …", asks another question, everything from this line on is ignored. A
completion that continues `def solution():` begins with an indented body. If this body contains a
`return`, and if the unfenced text after the body defines `solution` again, that text is ignored
too. In the remaining text, the program is the first of the following that exists:

- the last fenced block that defines `solution`
- the whole text, if it defines `solution`
- the last fenced block that contains a `return`; it becomes the body of `solution`
- the whole text, if it contains a `return`; it becomes the body of `solution`

Unused imports are removed. Then the following versions are tried in order, until one ends with a
status other than ERROR:

1. the program or body as it stands
2. the program or body without prose. A statement at the left margin of a program is kept only if it
   is an import, a definition, or an assignment before `solution`. An indented body ends before
   the first line that is not indented. A body that is not indented ends after its first `return` at
   the left margin.
3. the program, preceded by the fenced blocks above it that do not define `solution`, as if the
   blocks were the cells of a notebook
"""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from types import CodeType
from typing import Any, Literal

from pydantic import Field, PrivateAttr

from reftune.errors import DataError
from reftune.grading.formats._grading import RULES, Grading, graded_by, own_grader
from reftune.grading.formats._imports import without_unused_imports
from reftune.grading.formats._prompts import Prompted, gold_rationale, paper_prompt, question_text
from reftune.grading.markers import DEFAULT, UP_TO_LAST_TAG
from reftune.grading.paper_rules import grade_value_paper, paper_response
from reftune.grading.sandbox import Sandbox, SandboxKind
from reftune.grading.sandbox.result import ExecutionResult, ExecutionStatus, SandboxLimits
from reftune.grading.verdicts import describe, grade_sentence, grade_value, no_answer
from reftune.recipe import refusal
from reftune.types import Conversation, Graded, Problem, Verdict

HEADER = "def solution():\n"
MAX_CHARS = 50_000
"""At most this many characters of a completion are read."""

_FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_SOLUTION = re.compile(
    r"^(?:(?:async[ \t]+)?def[ \t]+solution[ \t]*\(|solution[ \t]*=[ \t]*lambda\b)", re.MULTILINE
)
_QUESTION = re.compile("|".join(map(re.escape, DEFAULT.stop_at)))
_RETURN = re.compile(r"(?:^|[:;])[ \t]*return\b", re.MULTILINE)
_DEFINITION = re.compile(
    r"(?:async +)?def +\w+ *\(|class +\w+ *[(:]|@\w|from +[\w.]+ +import\b"
    r"|import +[\w.]+(?: +as +\w+)?(?: *, *[\w.]+(?: +as +\w+)?)* *(?:#.*)?$"
)
ANSWER_NAMES = ("answer", "final_answer", "ans")
_SCRIPT = re.compile(
    rf"^(?:(?P<name>{'|'.join(ANSWER_NAMES)}|result)[ \t]*(?::[^=\n]*)?=(?!=)|[ \t]*print[ \t]*\()",
    re.MULTILINE,
)
_PRINT = re.compile(r"\bp?print\b")
_NO_CODE = re.compile(
    r"""#[^\n]*|("{3}|'{3}).*?\1|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'""", re.DOTALL
)
"""Matches a comment or a string."""
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*(?: *: *[\w.]+)? *[-+*/]?=(?!=)")


@dataclass(frozen=True, slots=True)
class Script:
    """A program."""

    source: str
    call: str
    """The expression whose value is the answer, such as `solution()` or the name of a variable;
    `None` if the program prints its answer."""


class Program(Prompted):
    """A Python function `solution()` that returns the answer."""

    grading: Grading = "robust"
    """`robust` ([our rules](grading.md)), `paper` (the authors' rules), or [your own
    grader](grading.md#your-own-grader), named as `file.py:Name`."""
    timeout_s: float = Field(default=1.0, gt=0, le=60)
    """Seconds that a program may run."""
    memory_mib: int = Field(default=64, ge=16)
    """Memory that a program may use, in MiB."""
    sandbox: SandboxKind = "auto"
    """Which [sandbox](sandbox.md) runs programs."""
    scripts: Literal["refuse", "read"] = "refuse"
    """`read` also accepts [programs without `solution()`](sandbox.md)."""
    allow_unisolated: bool = False
    """Let the subprocess sandbox run programs even if the system cannot isolate them."""

    _sandbox: Sandbox = PrivateAttr()

    def model_post_init(self, _: Any) -> None:
        if self.grading == "paper" and self.scripts == "read":
            message = "scripts: read: expected grading: robust; the paper's rules read no scripts"
            raise refusal("scripts", message)
        limits = SandboxLimits(timeout_s=self.timeout_s, memory_mib=self.memory_mib)
        self._sandbox = Sandbox(
            limits, backend=self.sandbox, allow_unisolated=self.allow_unisolated
        )

    def prompt(self, problem: Problem) -> str | Conversation:
        """The prompt in the chosen `style`. In the `compact` style, it ends with the function's
        header; in the `paper` style, with the header and a docstring that contains the question."""
        if self.writes_all:
            return self.framed(problem)
        if self.style == "paper":
            return paper_prompt(problem, _paper_header(problem))
        return f"{question_text(problem)}\n{HEADER}".removesuffix("\n")

    def target(self, problem: Problem) -> str:
        """The gold program without the docstring of `solution`, and without the header if the
        prompt contains it. In the `compact` style, the target begins with the line break before the
        body, because many tokenizers merge a line break and the indent after it into one token.

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
        """One grade per completion, in the same order. Identical programs run only once."""
        if self.style == "compact":
            completions = [completion.removeprefix("\n") for completion in completions]
        pairs = zip(problems, completions, strict=True)
        candidates = [self._scripts(problem, completion) for problem, completion in pairs]
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
            for problem, programs in zip(problems, candidates, strict=True)
        ]

    def _scripts(self, problem: Problem, completion: str) -> tuple[Script, ...]:
        if self.grading == "paper":
            return (Script(_paper_source(problem, completion), "_scope['solution']()"),)
        completion = _without_thoughts(completion)
        functions = tuple(Script(source, "solution()") for source in programs_in(completion))
        return (*scripts_in(completion), *functions) if self.scripts == "read" else functions

    def _graded(self, problem: Problem, results: Sequence[ExecutionResult]) -> Graded:
        """The grade of the first program that does not end in an error. If every program ends in an
        error, the first program is graded."""
        if not results:
            expected = ", nor does it assign or print an answer" * (self.scripts == "read")
            reason = f"the text defines no solution() and returns nothing{expected}"
            return Graded.without_answer(Verdict.NO_ANSWER, reason)
        ended = (each for each in results if each.status is not ExecutionStatus.ERROR)
        graded = self._grade_result(problem, next(ended, results[0]))
        return replace(graded, program_s=sum(each.seconds for each in results))

    def _grade_result(self, problem: Problem, result: ExecutionResult) -> Graded:
        is_ok = result.status is ExecutionStatus.OK
        if self.grading == "paper" and (is_ok or problem.answer.kind != "number"):
            return grade_value_paper(result.value, problem)  # the value of a failure is "none"
        if not is_ok:
            return Graded.without_answer(Verdict(result.status.value), result.reason)
        if self.grading not in RULES:
            try:
                value = result.printed if result.value is None else str(result.value)
            except (ValueError, RecursionError):  # very long integers, very deep lists
                return no_answer(f"solution() returned {describe(result.value)}, not an answer")
            return graded_by(own_grader(self.grading), value, problem)
        if self.scripts == "read" and (result.value is None or isinstance(result.value, str)):
            lines = str(result.value or result.printed).strip().splitlines()
            return grade_sentence(lines[-1] if lines else "", problem)
        return grade_value(result.value, problem)

    def _run_each(self, scripts: Iterable[Script]) -> dict[Script, ExecutionResult]:
        each = dict.fromkeys(scripts)
        results: dict[Script, ExecutionResult] = {}
        for call in dict.fromkeys(script.call for script in each):
            group = [script for script in each if script.call == call]
            sources = [script.source for script in group]
            results |= zip(group, self._sandbox.run(sources, call), strict=True)
        return results


# --- completions → programs -----------------------------------------------------------------------


def _without_thoughts(completion: str) -> str:
    last = UP_TO_LAST_TAG.match(completion)
    if last is None:
        return completion
    return completion[last.end() :].lstrip("\r\n") if last["closes"] else ""


def programs_in(completion: str) -> tuple[str, ...]:
    """The programs to try, one after the other; none if the completion contains neither a
    `solution` nor a `return`."""
    text, blocks = _text_and_blocks(completion)
    body = _up_to_margin(text)
    if _RETURN.search(body) and _SOLUTION.search(text):
        text = body
    for program in (*reversed(blocks), textwrap.dedent(text) if text[:1].isspace() else text):
        if _SOLUTION.search(program):
            return _unique(program, _without_prose(program), _after_helpers(program, blocks))
    for body in (*reversed(blocks), text):
        if _RETURN.search(body):
            body = _indented(body)
            return _unique(HEADER + body, HEADER + _up_to_margin(body))
    return ()


def scripts_in(completion: str) -> tuple[Script, ...]:
    """The programs to try, in order. There are none if the completion defines `solution`, because
    `programs_in` handles this case. If the completion is indented text without fenced blocks, it is
    run as the body of a function `solution`. Any other completion must state an answer. A line that
    begins with `print(…)` states one, even if the line is indented. So does an unindented line that
    assigns to `result` or to one of `ANSWER_NAMES`. If the completion does state an answer, the
    program is the last fenced block that states one, or the whole text if no block does. The
    program is first tried alone, then preceded by the blocks above it."""
    text, blocks = _text_and_blocks(completion)
    if any(map(_SOLUTION.search, (*blocks, text))):
        return ()
    if not blocks and text[:1].isspace() and text.strip():
        return tuple(Script(body, "solution()") for body in _unique(HEADER + _indented(text)))
    found = next((block for block in (*reversed(blocks), text) if _SCRIPT.search(block)), None)
    if found is None:
        return ()
    sources = _unique(found, _after_helpers(found, blocks))
    return tuple(Script(source, _answer_of(source)) for source in sources)


def _after_helpers(program: str, blocks: list[str]) -> str:
    """A fenced program, preceded by the blocks above it that do not define `solution`."""
    above = blocks[: blocks.index(program)] if program in blocks else []
    return "\n".join([*(block for block in above if not _SOLUTION.search(block)), program])


def _answer_of(script: str) -> str:
    """The expression whose value is the answer. It is the first of `ANSWER_NAMES` that the script
    assigns. If there is none, it is `result`, provided that the script assigns it and never
    mentions `print`. Otherwise, it is the string "None", which stands for the printed text. The
    text of comments and strings is ignored."""
    code = _NO_CODE.sub("", script)
    names = {match["name"] for match in _SCRIPT.finditer(code) if match["name"] is not None}
    first = next((name for name in ANSWER_NAMES if name in names), None)
    prints = _PRINT.search(code)
    return first or ("result" if "result" in names and not prints else "None")


def _text_and_blocks(completion: str) -> tuple[str, list[str]]:
    text = completion[:MAX_CHARS].removeprefix("\ufeff")
    text = _before_next_question(text.replace("\r\n", "\n").replace("\r", "\n"))
    return text, [textwrap.dedent(block) for block in _FENCED.findall(text)]


def _before_next_question(text: str) -> str:
    """`text` up to the first line that asks another question after a program. A question above the
    program or inside triple quotes is the program's own question and does not count."""
    is_whole = not text[:1].isspace() and _SOLUTION.search(text) is not None
    marks = (_SOLUTION,) if is_whole else (_SOLUTION, _RETURN, _SCRIPT)
    begun = [found.end() for each in marks if (found := each.search(text))]
    for line in _QUESTION.finditer(text, min(begun, default=len(text))):
        before = text[: line.start()]
        if before.count('"""') % 2 == before.count("'''") % 2 == 0:
            return before
    return text


def _unique(*programs: str) -> tuple[str, ...]:
    cleaned = [without_unused_imports(program.strip("\n")) for program in programs]
    return tuple(dict.fromkeys(cleaned))


def _without_prose(program: str) -> str:
    """The program's definitions, its imports, and its assignments before `solution`. If `solution`
    is defined only inside quotes, the result is the whole program."""
    chunks = _chunks(program)
    defining = [index for index, chunk in enumerate(chunks) if _SOLUTION.match(chunk)]
    if not defining:
        return program
    return "\n".join(
        chunk
        for index, chunk in enumerate(chunks)
        if _DEFINITION.match(chunk.partition("\n")[0])
        or (index < defining[-1] and _ASSIGNMENT.match(chunk))
    )


def _chunks(program: str) -> list[str]:
    """The program in parts. Each part begins with a line at the left margin. The lines right after
    it belong to the same part if they are blank or indented, begin with a closing bracket, or are
    inside triple quotes."""
    chunks: list[list[str]] = []
    in_quotes = False
    for line in program.split("\n"):
        if chunks and (in_quotes or not line or line[0] in " \t)]}"):
            chunks[-1].append(line)
        else:
            chunks.append([line])
        in_quotes ^= (line.count('"""') + line.count("'''")) % 2 == 1
    return ["\n".join(chunk) for chunk in chunks]


# --- bodies ---------------------------------------------------------------------------------------


def _indented(body: str) -> str:
    """The body, indented as in a function. The indent may be missing in its first line or in all
    lines."""
    lines = re.sub(r"\A\s*\n", "", body).rstrip().split("\n")
    lines[0] = " " * _first_indent(lines) + lines[0].lstrip()
    if _indent(lines[0]) > 0:
        return "\n".join(lines)
    if returns := [index for index, line in enumerate(lines) if re.match(r"return\b", line)]:
        inside, after = lines[: returns[0] + 1], lines[returns[0] + 1 :]
        return "\n".join([textwrap.indent("\n".join(inside), "    "), *after])
    return textwrap.indent("\n".join(lines), "    ")


def _first_indent(lines: list[str]) -> int:
    """The indent that the first line should have, inferred from the indented lines right after
    it."""
    below = list(takewhile(bool, (_indent(line) for line in lines[1:] if line.strip())))
    if not below:
        return _indent(lines[0])
    if not lines[0].rstrip().endswith((":", "(", "[", "{", ",", "\\")):
        return below[0]
    return min(below) if min(below) < below[0] else _indent(lines[0])


def _indent(line: str) -> int:
    return len(line.expandtabs(4)) - len(line.expandtabs(4).lstrip())


def _up_to_margin(body: str) -> str:
    lines = body.split("\n")
    return "\n".join(takewhile(lambda line: not line.strip() or line[0].isspace(), lines))


# --- gold programs --------------------------------------------------------------------------------


_GOLD_HEADER = re.compile(
    r"^def[ \t]+solution[ \t]*\([ \t]*\)[ \t]*(?:->[^:\n]+)?:[ \t]*", re.MULTILINE
)
_DOCSTRING = re.compile(
    r'''\A\s*[rRuU]?(?:"""(?:[^\\]|\\.)*?"""|\'{3}(?:[^\\]|\\.)*?\'{3}'''
    r"""|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')[ \t]*(?:\n|$)""",
    re.DOTALL,
)


def body_of(program: str) -> str | None:
    """The body of `solution` in a gold program, indented by four spaces, without the docstring. The
    program may be inside a Markdown code fence. Code before the definition of `solution` moves into
    the body. Code after it, such as `print(solution())`, is left out. Returns None if the program
    does not define `solution()`, if the program or the body is not valid Python, or if the body
    needs code that comes after the definition."""
    program = program.replace("\r\n", "\n").expandtabs(4)
    for source in (program, *reversed(_FENCED.findall(program))):
        parsed = _parsed(source)
        functions = [s for s in parsed[0].body if isinstance(s, ast.FunctionDef)] if parsed else []
        found = [each for each in functions if each.name == "solution"]
        if found:
            break
    else:
        return None
    *earlier, solution = found
    lines = source.split("\n")
    above = lines[: solution.lineno - 1]
    for each in reversed(earlier):
        del above[each.lineno - 1 : each.end_lineno]
    inside = "\n".join(lines[solution.lineno - 1 : solution.end_lineno])
    header = _GOLD_HEADER.match(inside)
    if header is None:
        return None
    body = textwrap.dedent(_DOCSTRING.sub("", inside[header.end() :]).strip("\n"))
    parts = [part for part in ("\n".join(above).strip("\n"), body) if part.strip()]
    body = textwrap.indent("\n".join(parts), "    ").rstrip()
    whole, below = _parsed(HEADER + body), _parsed("\n".join(lines[solution.end_lineno :]))
    if whole is None or below is None:
        return None
    needed = _names(whole[1]) & _names(below[1]) - {"solution", *vars(builtins)}
    return None if needed else body


def _parsed(program: str) -> tuple[ast.Module, CodeType] | None:
    """A program's syntax tree and its code; None if it is not valid Python."""
    with (
        warnings.catch_warnings(action="ignore"),
        suppress(SyntaxError, ValueError, RecursionError, MemoryError),
    ):
        tree = ast.parse(program)
        return tree, compile(tree, "<gold program>", "exec", dont_inherit=True)
    return None


def _names(code: CodeType) -> set[str]:
    """The global names and attributes that code uses or defines."""
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return {*code.co_names}.union(*map(_names, inner))


# --- the paper's rules ----------------------------------------------------------------------------


def _paper_header(problem: Problem) -> str:
    return f'{HEADER}    """{question_text(problem)}"""\n'


def _paper_source(problem: Problem, completion: str) -> str:
    """The program to run, built as in the authors' code. The header and the completion are joined,
    and the result is cut off at its first blank line. `sys.exit` is replaced by `print`. The only
    global name is `math`: names that the program defines or imports outside `solution` are unknown
    inside `solution`.

    Source: the code of ReFT's authors. Differences: a completion that begins with `def solution`
    gets no header, unused imports are removed, and the default sandbox lacks sympy.
    """
    response = paper_response(
        completion if completion.startswith("def solution") else _paper_header(problem) + completion
    )
    lines = takewhile(str.strip, response.replace("sys.exit", "print").split("\n"))
    # monty ends the code at a `return` outside a function; Python refuses the code
    code = without_unused_imports("\n".join(lines)) + "\nif True: _ended = True"
    return (
        f"import math\n_scope = {{}}\nexec({code!a}, {{'math': math}}, _scope)\n"
        "if '_ended' not in _scope: raise SyntaxError(\"'return' outside function\")"
    )
