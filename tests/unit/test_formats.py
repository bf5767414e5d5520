"""Prompts, targets and grades of the two formats. Numbers E… refer to the parity checks in
docs/deviations.md."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from reftune.errors import DataError
from reftune.grading.formats.nl import Nl
from reftune.grading.formats.program import HEADER, Program, body_of, programs_in
from reftune.grading.sandbox import Sandbox, SandboxKind
from reftune.grading.sandbox.result import ExecutionResult
from reftune.types import Answer, Problem, Verdict

BODY = "    a = 2\n    return a + 3"


def number(value: str, *, question: str = "How many?", rationale: str | None = None) -> Problem:
    return Problem(
        id="p",
        question=question,
        answer=Answer(kind="number", value=Fraction(value)),
        rationale=rationale,
    )


def choice(
    letter: str, *choices: str, question: str = "Which?", rationale: str | None = None
) -> Problem:
    return Problem(
        id="p",
        question=question,
        answer=Answer(kind="choice", value=letter),
        choices=choices,
        rationale=rationale,
    )


@pytest.fixture(scope="module")
def robust() -> Program:
    return Program()


@pytest.fixture(scope="module")
def paper() -> Program:
    return Program(style="paper", grading="paper")


# --- prompts --------------------------------------------------------------------------------------


def test_e1_paper_prompt_is_the_authors() -> None:
    problem = number("5", question=" q ")
    assert Nl(style="paper").prompt(problem) == "Question:\nq\nAnswer reasoning:\n"
    expected = 'Question:\nq\nAnswer reasoning:\ndef solution():\n    """q"""\n'
    assert Program(style="paper").prompt(problem) == expected


def test_a_compact_prompt_holds_the_question_once() -> None:
    problem = number("5", question=" q ")
    assert Nl().prompt(problem) == "q\n"
    assert Program().prompt(problem) == "q\ndef solution():"


def test_options_are_added_to_a_question_that_lacks_them() -> None:
    assert Nl().prompt(choice("b", "10", "20", question="Which?")) == "Which?\na ) 10 , b ) 20\n"


def test_options_are_not_repeated_in_whatever_spacing_the_question_has_them() -> None:
    problem = choice("b", "10", "20", question="Which?\nA) 10, B) 20")
    assert Nl().prompt(problem) == "Which?\nA) 10, B) 20\n"


# --- targets --------------------------------------------------------------------------------------


def test_a_target_ends_in_the_answer() -> None:
    problem = number("5.5", rationale="2 + 3.5 is 5.5.\n")
    assert Nl(style="paper").target(problem) == "2 + 3.5 is 5.5.\nTherefore, the answer is: 5.5"
    assert Nl().target(problem) == "2 + 3.5 is 5.5.\nThe answer is 5.5"


def test_a_paper_target_writes_a_fraction_as_float_reads_it() -> None:
    problem = number("1/3", rationale="One of three.")
    assert (
        Nl(style="paper").target(problem)
        == "One of three.\nTherefore, the answer is: 0.3333333333333333"
    )
    assert Nl().target(problem) == "One of three.\nThe answer is 1/3"


def test_a_compact_target_does_not_repeat_an_answer_that_the_rationale_ends_in() -> None:
    for last in ("#### 5", "Therefore, the answer is <5>.", "answer : 5"):
        assert Nl().target(number("5", rationale=f"2 + 3\n{last}")) == f"2 + 3\n{last}"
    assert Nl().target(number("5", rationale="2 + 3\n#### 6")) == "2 + 3\n#### 6\nThe answer is 5"


@pytest.mark.parametrize("pattern", ["[Yy]es", "yes"])
@pytest.mark.parametrize("last", ["Both agree.", "The answer is yes"])
def test_a_paper_target_never_states_a_pattern(pattern: str, last: str) -> None:
    answer = Answer(kind="regex", value=pattern)
    problem = Problem(id="p", question="Really?", answer=answer, rationale=f"Look.\n{last}")
    for format in (Nl(style="paper"), Nl(grading="paper"), Nl(style="paper", grading="paper")):
        with pytest.raises(DataError, match="problem p: paper targets cannot state the answer"):
            format.target(problem)
    if last == "The answer is yes":
        assert Nl().target(problem) == f"Look.\n{last}"
    else:
        with pytest.raises(DataError, match="ends without an answer"):
            Nl().target(problem)


def test_a_target_of_a_choice_is_its_letter() -> None:
    assert (
        Nl().target(choice("b", "10", "20", rationale="Twice ten."))
        == "Twice ten.\nThe answer is b"
    )


@pytest.mark.parametrize(
    "program",
    [
        f'def solution():\n    """How many?"""\n{BODY}',
        f'def solution():\n    """Another question, "quoted" \\""""\n{BODY}',
        f"def solution():\n    '''One\n\n    of several lines.'''\n{BODY}",
        f"def solution():\n    'one'\n{BODY}\n",
        f"\n\ndef solution( ) -> int:\n{BODY}\n\n",
        "def solution():\n  a = 2\n  return a + 3",
        "def solution():\n\ta = 2\n\treturn a + 3",
    ],
)
def test_a_program_target_is_the_body_without_header_and_docstring(program: str) -> None:
    problem = number("5", rationale=program)
    assert Program(style="paper").target(problem) == BODY
    assert Program(style="compact").target(problem) == f"\n{BODY}"


def test_prompt_and_target_make_a_whole_program() -> None:
    problem = number(
        "5", question="How many?", rationale=f'def solution():\n    """How many?"""\n{BODY}'
    )
    program = Program(style="paper")
    text = program.prompt(problem) + program.target(problem)
    assert text.endswith(f'Answer reasoning:\ndef solution():\n    """How many?"""\n{BODY}')
    ast.parse(text.partition("Answer reasoning:\n")[2])


def test_code_before_the_definition_moves_into_it() -> None:
    program = "import math\n\ndef solution():\n    return math.sqrt(25)"
    assert body_of(program) == "    import math\n    return math.sqrt(25)"


def test_a_string_that_is_used_is_no_docstring() -> None:
    assert (
        body_of("def solution():\n    'abc'.upper()\n    return 5")
        == "    'abc'.upper()\n    return 5"
    )


def test_a_body_on_the_headers_line_is_a_body() -> None:
    assert body_of("def solution(): return 5") == "    return 5"


@pytest.mark.parametrize(
    "program",
    [
        f"{HEADER}{BODY}\n\nprint(solution())",
        f"{HEADER}{BODY}\n\nif __name__ == '__main__':\n    print(solution())",
        f"{HEADER}{BODY}\n\na = solution()\nprint(a)",
        f"{HEADER}{BODY}\n# It returns 5.",
        f"```python\n{HEADER}{BODY}\n```",
        f"Sure!\n```python\n{HEADER}{BODY}\nprint(solution())\n```\nThis returns 5.",
        f"First:\n```\n{HEADER}    return 4\n```\nCorrected:\n```\n{HEADER}{BODY}\n```\n",
        f"{HEADER}    return 4\n\n{HEADER}{BODY}",
        f'{HEADER}    """\n{HEADER}    return 3\n    """\n{BODY}',
        f'{HEADER}    """\n```\n{HEADER}    pass\n```\n    """\n{BODY}',
        f"{HEADER}{BODY}\n\nresult = solution()\nanswer = result\nprint(answer)",
        f"{HEADER}{BODY}\n\nexpected = 5\nassert solution() == expected",
        f"{HEADER}{BODY}\n\ndef main():\n    print(solution())\n\nmain()",
        f"{HEADER}{BODY}\n\nimport sys\nprint(solution(), file=sys.stdout)",
    ],
)
def test_what_surrounds_a_gold_program_is_no_part_of_its_body(program: str) -> None:
    assert body_of(program) == BODY


@pytest.mark.parametrize(
    "program",
    [
        f"{HEADER}    print 5\n    return 5",
        f"{HEADER}    return 5\n  return 5",
        f"{HEADER}    return (5",
        f"{HEADER}    return {'-' * 30_000}5",
        f"{HEADER}    return 5\0",
        f"from math import *\n{HEADER}    return sqrt(25)",
        f"Here is the program:\n{HEADER}{BODY}",
        f"{HEADER}    return f()\n\ndef f():\n    return 5",
        f"{HEADER}    return A\n\nA = 5",
        f"{HEADER}    return math.ceil(5)\n\nimport math",
        f"{HEADER}    return A\n\nA, B = 5, 6",
        f"{HEADER}    return A\n\nif True:\n    A: int = 5",
    ],
)
def test_a_gold_program_without_a_valid_body_is_refused(program: str) -> None:
    with pytest.raises(DataError, match="problem p: its rationale is not a program"):
        Program().target(number("5", rationale=program))


@pytest.mark.parametrize("rationale", [None, " \n"])
def test_a_problem_without_rationale_has_no_target(rationale: str | None) -> None:
    for format in (Nl(), Program()):
        with pytest.raises(DataError, match="problem p: no rationale"):
            format.target(number("5", rationale=rationale))


@pytest.mark.parametrize(
    "rationale",
    [
        "2 + 3 = 5",
        "def answer():\n    return 5",
        "def solution(n):\n    return n",
        "def solution():\n",
    ],
)
def test_a_rationale_that_is_no_program_has_no_program_target(rationale: str) -> None:
    with pytest.raises(DataError, match="problem p: its rationale is not a program"):
        Program().target(number("5", rationale=rationale))


# --- programs in completions ----------------------------------------------------------------------


def test_a_body_gets_the_header() -> None:
    assert programs_in(BODY) == (HEADER + BODY,)


def test_the_body_without_prose_is_tried_second() -> None:
    assert programs_in(f"{BODY}\n\nSo 5.") == (f"{HEADER}{BODY}\n\nSo 5.", HEADER + BODY)


def test_a_body_that_lost_indents_gets_them_back() -> None:
    assert programs_in("a = 2\n    return a + 3") == (HEADER + BODY,)
    assert programs_in("a = 2\nreturn a + 3") == (HEADER + BODY,)


def test_a_program_of_its_own_gets_no_header() -> None:
    assert programs_in(f"{HEADER}{BODY}") == (HEADER + BODY,)


def test_prose_around_a_program_is_dropped_on_the_second_try() -> None:
    text = f"We define\n\nRATE = 2\n\n{HEADER}{BODY}\n\nand so on."
    assert programs_in(text) == (text, f"RATE = 2\n\n{HEADER}{BODY}")


def test_the_last_fenced_block_with_a_solution_is_the_program() -> None:
    text = f"```python\n{HEADER}    return 4\n```\nno:\n```python\n{HEADER}{BODY}\n```\n```\n5\n```"
    assert programs_in(text) == (HEADER + BODY,)


@pytest.mark.parametrize(
    "completion",
    [
        f"{HEADER}{BODY}\n\nQuestion: What is 3+4?\n{HEADER}    return 7",
        f"import math\n{HEADER}{BODY}\nQ: And now?\nimport math\n{HEADER}    return 7",
        f"```python\n{HEADER}{BODY}\n```\n\nProblem: 3+4\n```python\n{HEADER}    return 7\n```",
        f"\n{BODY}\n\nTom has 3 apples. How many?\n{HEADER}    return 7",
        f"{BODY}\n\n# Tom has 3 apples. How many?\n{HEADER}    return 7",
    ],
)
def test_the_program_of_a_question_that_the_model_asks_itself_is_ignored(
    robust: Program, completion: str
) -> None:
    assert robust.grade([number("5")], [completion])[0].verdict is Verdict.CORRECT


@pytest.mark.parametrize(
    "completion",
    [
        f"I restate it.\nQuestion: What is 2+3?\n{HEADER}{BODY}",
        f"Question: What is 2+3?\nQ: the same\n```python\n{HEADER}{BODY}\n```",
        f'{HEADER}    """Read this.\nQuestion: What is 2+3?\n"""\n{BODY}',
        f"<think>\nreturn 7\nQuestion: why?\n</think>\n{HEADER}{BODY}",
        f"    return 7\n\nNo, wait:\n```python\n{HEADER}{BODY}\n```",
        f"    {HEADER}        return 5",
    ],
)
def test_a_question_before_the_program_and_a_revised_program_are_not_ignored(
    robust: Program, completion: str
) -> None:
    assert robust.grade([number("5")], [completion])[0].verdict is Verdict.CORRECT


def test_without_solution_and_return_there_is_no_program() -> None:
    assert programs_in("The answer is 5") == ()
    assert programs_in("") == ()


PIECES = st.sampled_from(
    [
        "def solution():\n",
        "    return 5\n",
        "return 5\n",
        "```",
        "```python\n",
        "\n",
        " ",
        "\t",
        "x = 5\n",
        "import math\n",
        "(",
        '"""',
        "So.\n",
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(PIECES, st.text(max_size=5)), max_size=10).map("".join))
def test_any_text_gives_at_most_two_programs_that_define_solution(text: str) -> None:
    programs = programs_in(text)
    assert len(programs) <= 2
    assert all("solution" in program for program in programs)


# --- grades ---------------------------------------------------------------------------------------


def test_programs_are_graded_in_order(robust: Program) -> None:
    problems = [number("5"), number("6"), number("5"), number("5")]
    graded = robust.grade(problems, [BODY, BODY, "no idea", "    return 1 / 0"])
    assert [g.verdict for g in graded] == [
        Verdict.CORRECT,
        Verdict.WRONG,
        Verdict.NO_ANSWER,
        Verdict.ERROR,
    ]
    assert graded[3].reason == "ZeroDivisionError: division by zero"


def test_equal_programs_run_once(robust: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def run(
        self: Sandbox, programs: Sequence[str], call: str = "solution()"
    ) -> list[ExecutionResult]:
        seen.extend(programs)
        return original(self, programs, call)

    original = Sandbox.run
    monkeypatch.setattr(Sandbox, "run", run)
    robust.grade([number("5")] * 3, [BODY, BODY, f"{HEADER}{BODY}"])
    assert seen == [HEADER + BODY]


def test_a_program_reports_how_long_it_ran(robust: Program, paper: Program) -> None:
    slow, text = "    return sum(range(3_000_000))", "no program at all"
    for format in (robust, paper):
        fast, slower = format.grade([number("3")] * 2, ["    return 3", slow])
        assert fast.program_s is not None and slower.program_s is not None
        assert 0 < fast.program_s < slower.program_s
    assert robust.grade([number("3")], [text])[0].program_s is None
    assert replace(slower, program_s=None) == slower, "times make no difference between grades"


def test_a_batch_of_nothing_is_nothing(robust: Program, paper: Program) -> None:
    assert robust.grade([], []) == paper.grade([], []) == Nl().grade([], []) == []


def test_a_user_sees_what_limits_they_may_set() -> None:
    program = Program.model_validate({"kind": "program", "timeout_s": 0.2, "memory_mib": 32})
    graded = program.grade([number("5")], ["    while True:\n        pass\n    return 5"])
    assert graded[0].verdict is Verdict.TIMEOUT


def test_formats_are_equal_if_their_keys_are() -> None:
    assert Program() == Program.model_validate({"kind": "program"})
    assert Program() != Program(timeout_s=2)


@pytest.mark.parametrize("sandbox", ["auto", "monty", "subprocess"])
@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("def solution():\n    return 5\nreturn 9", Verdict.CORRECT),
        ("def solution():\n    return max([5], key=abs)\nreturn 9", Verdict.CORRECT),
        ("x = 2\nreturn 5\nreturn 9", Verdict.CORRECT),  # a body ends at its first return
        ("def solution():\n    y = 9\n    return y\nx = 5\nreturn x", Verdict.WRONG),
        ("def solution():\n    x = 3\nreturn 5", Verdict.NO_ANSWER),
        ("def solution():\n    return 9\nif True:\n    return 5", Verdict.WRONG),
    ],
)
def test_a_return_outside_solution_does_not_count(
    sandbox: SandboxKind, completion: str, verdict: Verdict
) -> None:
    graded = Program(sandbox=sandbox).grade([number("5")], [completion])[0]
    assert graded.verdict is verdict


# --- the paper's program rules --------------------------------------------------------------------


def paper_value(
    paper: Program, completion: str, problem: Problem | None = None
) -> tuple[Verdict, str | None]:
    graded = paper.grade([problem or number("5")], [completion])[0]
    return graded.verdict, graded.value


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("True", (Verdict.WRONG, "1.0")),
        ("'7'", (Verdict.WRONG, "7.0")),
        ("float('nan')", (Verdict.WRONG, "nan")),
        ("5.01", (Verdict.CORRECT, "5.01")),
        ("[1]", (Verdict.NO_ANSWER, None)),
        ("(3,)", (Verdict.NO_ANSWER, None)),
        ("None", (Verdict.NO_ANSWER, None)),
    ],
)
def test_e7_paper_reads_a_value_as_float_does(
    paper: Program, expression: str, expected: tuple[Verdict, str | None]
) -> None:
    assert paper_value(paper, f"    return {expression}") == expected


def test_e7_paper_rewards_nothing_without_return_or_code(paper: Program) -> None:
    assert paper_value(paper, "    x = 5") == (Verdict.NO_ANSWER, None)
    assert paper_value(paper, "") == (Verdict.NO_ANSWER, None)
    assert paper_value(paper, "Five apples are left.") == (Verdict.ERROR, None)


def test_e8_paper_stops_at_the_first_blank_line(paper: Program) -> None:
    assert paper_value(paper, "    a = 5\n\n    return a") == (Verdict.NO_ANSWER, None)
    assert paper_value(paper, "    return 5\n\nraise ValueError") == (Verdict.CORRECT, "5.0")


def test_e9_paper_hides_the_module_from_solution(paper: Program) -> None:
    helper = "def five():\n    return 5\ndef solution():\n    return five()"
    assert paper_value(paper, f"def solution():\n    pass\n{helper}") == (Verdict.ERROR, None)
    outside = (
        "def solution():\n    pass\nimport datetime\ndef solution():\n    return"
        " datetime.date(2024, 1, 5).day"
    )
    assert paper_value(paper, outside) == (Verdict.ERROR, None)
    assert paper_value(paper, "    import datetime\n    return datetime.date(2024, 1, 5).day") == (
        Verdict.CORRECT,
        "5.0",
    )


def test_e9_paper_offers_math_and_no_recursion(paper: Program) -> None:
    assert paper_value(paper, "    return math.sqrt(25)") == (Verdict.CORRECT, "5.0")
    assert paper_value(paper, "    return solution()") == (Verdict.ERROR, None)


def test_e9_paper_takes_the_second_of_two_definitions(paper: Program) -> None:
    assert paper_value(paper, "def solution():\n    return 4\ndef solution():\n    return 5") == (
        Verdict.CORRECT,
        "5.0",
    )


@pytest.mark.parametrize(
    "end", ["return 9", "return", "if True:\n    return 5", "x = \\", "@len", "x = (", "try:"]
)
def test_e9_paper_runs_no_code_that_python_refuses(paper: Program, end: str) -> None:
    assert paper_value(paper, f"    return 5\n{end}") == (Verdict.ERROR, None)


def test_e9_paper_prints_instead_of_exiting(paper: Program) -> None:
    assert paper_value(paper, "    sys.exit(3)\n    return 4", number("4")) == (
        Verdict.CORRECT,
        "4.0",
    )


def test_e9_paper_gives_nothing_for_an_endless_loop() -> None:
    paper = Program(style="paper", grading="paper", timeout_s=0.2)
    assert paper_value(paper, "    while True:\n        pass") == (Verdict.TIMEOUT, None)


def test_e6_paper_takes_a_crash_on_a_choice_for_the_wrong_answer_none(paper: Program) -> None:
    problem = choice("c", "1", "2", "3")
    assert paper_value(paper, "    return 1 / 0", problem) == (Verdict.WRONG, "none")
    assert paper_value(paper, "    return 'C'", problem) == (Verdict.CORRECT, "c")
    assert paper_value(paper, "    return 'c )'", problem) == (Verdict.WRONG, "c )")


# --- scripts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scripts() -> Program:
    return Program(scripts="read")


@pytest.mark.parametrize(
    "completion",
    [
        "def solution():\n    total = 2 + 3\n    print(total)",
        "    total = 2 + 3\n    print(total)",
        "apples = 2\npears = 3\nprint(apples + pears)",
        "apples = 2\npears = 3\nanswer = apples + pears",
        "def calculate_total():\n    return 2 + 3\n\nanswer = calculate_total()\nprint(answer)",
        "```python\napples = 2\n```\nThen\n```python\nprint('Total:', apples + 3)\n```",
        "result = 4\nprint(f'The answer is {result + 1} apples.')",
        "def main():\n    print(2 + 3)\nmain()",
        "if __name__ == '__main__':\n    print(5)",
        "for i in range(6):\n    print(i)",
        "result = 2 + 3",
        "blueprints = 2  # do not print them\nresult = blueprints + 3",
        "result = 5\n# print(result)",
        '"""Does not\nprint(anything)."""\nresult = 5',
        '"""\nanswer = 4\n"""\nprint(5)',
        "text = '''\nfinal_answer = 4\n'''\nresult = 5",
        "hint = 'print(result)'\nresult = 5",
        "result = 4\nprint('#', 5)  # print(4)",
        "result = 4\nhint = '#'; print(5)",
        "result = 4\nprint(5)  # don't",
        "from pprint import pprint\nresult = [2, 3]\npprint(sum(result))",
        "show = print\nresult = [2, 3]\nshow(sum(result))",
        "answer: int = 5\nprint('done in 3 steps')",
    ],
)
def test_a_script_is_read_if_the_format_allows_it(scripts: Program, completion: str) -> None:
    assert scripts.grade([number("5")], [completion])[0].verdict is Verdict.CORRECT
    assert Program().grade([number("5")], [completion])[0].verdict is Verdict.NO_ANSWER


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("print(4)\nprint(5, 6)", Verdict.NO_ANSWER),
        ("print('between 4 and 5')", Verdict.NO_ANSWER),
        ("print(5)\nprint(4)", Verdict.WRONG),
        ("answer = 4\nprint(5)", Verdict.WRONG),
        ("# answer = 5", Verdict.NO_ANSWER),
        ("The answer = 5", Verdict.NO_ANSWER),
        ("answer = undefined", Verdict.ERROR),
        ("def solution():\n    print(5)\n    return 4", Verdict.WRONG),
        ("print('x' * 100000)", Verdict.NO_ANSWER),
        ("print('not 5')", Verdict.NO_ANSWER),
        ("print('at least 5')", Verdict.NO_ANSWER),
        ("print(4)\nQuestion: What is 2+3?\nprint(5)", Verdict.WRONG),
        (" \n ", Verdict.NO_ANSWER),
    ],
)
def test_a_script_answers_once_and_nothing_else_in_it_counts(
    scripts: Program, completion: str, verdict: Verdict
) -> None:
    assert scripts.grade([number("5")], [completion])[0].verdict is verdict


def test_the_papers_rules_read_no_scripts() -> None:
    with pytest.raises(ValidationError, match="scripts: read"):
        Program(grading="paper", scripts="read")
