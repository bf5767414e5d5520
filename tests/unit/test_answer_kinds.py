"""Answers other than single numbers: for each kind, right answers, wrong ones, and misleading
ones."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from reftune.errors import DataError, RecipeError
from reftune.grading import mathematics
from reftune.grading.formats.nl import Nl
from reftune.grading.formats.program import Program
from reftune.grading.golds import read_gold, worded_gold
from reftune.grading.options import read_choice, unlettered
from reftune.grading.rewards.outcome import Outcome
from reftune.grading.verdicts import grade_answer, grade_completion, grade_value
from reftune.recipe import load_component
from reftune.types import Answer, AnswerKind, Completion, Graded, Problem, Verdict

CORRECT, WRONG, NO_ANSWER, ERROR, TIMEOUT, _, _ = Verdict


def problem(gold: object, kind: AnswerKind | None = None, **others: Any) -> Problem:
    answer = worded_gold(str(gold)) if kind is None else read_gold(gold, kind)
    return Problem(id="p", question="?", answer=answer, **others)


def verdict(text: str, gold: object, kind: AnswerKind | None = None) -> Verdict:
    return grade_answer(text, problem(gold, kind)).verdict


needs_math = pytest.mark.skipif(
    not mathematics.is_installed(), reason="math-verify is not installed"
)


# --- which kind -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "kind"),
    [
        ("Paris", "text"),
        ("yes", "text"),
        ("10 Downing Street", "text"),
        ("5 March 2021", "text"),
        ("7 PM", "text"),
        ("12-15", "text"),
        ("11 a.m.", "text"),
        ("> 5", "text"),
        (r"\text{Monday}", "text"),
        ("6 apples\n2 pears", "text"),
        ("C++", "text"),
        ("C₂v", "text"),
        ("3d⁵", "text"),
        ("x⁴y", "latex"),
        ("2a", "latex"),
        ("1 + i", "latex"),
        ("5r^5", "latex"),
        (r"(2,\infty)", "latex"),
        ("[2; 5]", "latex"),
        ("(2, 4)", "latex"),
        ("2x - y + 5 = 0", "latex"),
        (r"\frac{\sqrt{3}}{2}", "latex"),
        (r"$\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}$", "latex"),
        ("[1, 2, 3]", "list"),
        ("[red, blue]", "list"),
    ],
)
def test_the_kind_is_recognised_from_the_gold(gold: str, kind: str) -> None:
    assert worded_gold(gold).kind == kind


def test_a_list_needs_to_be_told_how_it_is_meant() -> None:
    for kind in ("text", "latex", "number"):
        with pytest.raises(DataError, match=r"any_of \(accepted spellings\), list"):
            read_gold(["Accra", "ACCRA"], kind)  # type: ignore[arg-type]
    assert read_gold(["Accra", "ACCRA"], "any_of") == Answer(
        kind="any_of", value="Accra", items=("Accra", "ACCRA")
    )
    assert read_gold("[2, 3]", "list") == Answer(kind="list", value="2, 3", items=("2", "3"))
    assert read_gold("3; 4", "set") == Answer(kind="set", value="3, 4", items=("3", "4"))
    for empty in ([], [""], [None]):
        with pytest.raises(DataError):
            read_gold(empty, "list")


@pytest.mark.parametrize(
    ("gold", "items"),
    [
        (r"$\sqrt{2}$, $-\sqrt{2}$", (r"$\sqrt{2}$", r"$-\sqrt{2}$")),
        ("$x+1$ and $2x$", ("$x+1$", "$2x$")),
        ("$x+1, 2x$", ("x+1", "2x")),
        ("[1,000, 2]", ("1,000", "2")),
        ("[2, 10,000]", ("2", "10,000")),
        ("[10,000]", ("10,000",)),
        ("[100,200,300]", ("100", "200", "300")),
        ("[1, 200, 300]", ("1", "200", "300")),
        ('["1,000", "2"]', ("1,000", "2")),
        ("[100,200,\n300]", ("100", "200", "300")),
        ("[000,001,010]", ("000", "001", "010")),
        (r"$\$5, \$6$", (r"\$5", r"\$6")),
        ("1,2-dibromoethane, benzene", ("1,2-dibromoethane", "benzene")),
        ("1,000,000, 2", ("1,000,000", "2")),
        ("(1,2), 3", ("(1,2)", "3")),
    ],
)
def test_commas_and_signs_in_a_list(gold: str, items: tuple[str, ...]) -> None:
    assert read_gold(gold, "list").items == items


@needs_math
@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"$\sqrt{2}$, $-\sqrt{2}$", r"-\sqrt2, \sqrt2"),
        (r"$\sqrt{2}$, $-\sqrt{2}$", r"$-\sqrt2$ and $\sqrt2$"),
        ("[1,000, 2]", "2, 1,000"),
        ("1, 2, 3", "1,2, 3"),
        ("1, 2, 3", "1, 2,3"),
        (["1", "10", "100"], "1, 10,100"),
        (["(-1,2]", "(3,4)"], "(-1,2], (3,4)"),
        (["x=1,y=2", "x=3,y=4"], "x=1,y=2, x=3,y=4"),
        (["1,2-dibromoethane", "benzene"], "1,2-dibromoethane, benzene"),
        (["100000", "250000"], "1,00,000, 2,50,000"),
        (["000", "001", "010"], "000,001,010"),
        (["101", "010", "111"], "101,010,111"),
        (r"$\$5, \$6$", "5, 6"),
    ],
)
def test_a_set_is_right_however_it_is_punctuated(gold: object, answer: str) -> None:
    assert verdict(answer, gold, "set") is CORRECT


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("Yes, they do.", "yes"),
        ("yes, because 7 has no divisors.", "yes"),
        ("yes. Owls hunt at night.", "Yes"),
        ("Yes - owls are predators.", "yes"),
        ("No – never", "no"),
        ("Marie Curie. She won twice.", "Marie Curie"),
        ("Mu\u0308ller", "Müller"),
        ("the Nile", "Nile"),
        ("**PARIS**.", "Paris"),
        ("5 March 2021", "March 5, 2021"),
        ("2021-03-05", "5th March 2021"),
        ("Washington, D.C.", "Washington, D.C."),
        ("the 5th of March 2021", "5 March 2021"),
        ("Paris (France)", "Paris"),
        ("6 apples\n2 pears", "6 apples\n2 pears"),
        ("5PM", "5 PM"),
        ("10, 20, 30", "10,20,30"),
        ("1000 Apples", "1 000 Apples"),
        ("3½ Cups", "3 1/2 Cups"),
        ("3 * 4", "3*4"),
        ("3 to 2", "3:2"),
        ("H_{2}O", "H₂O"),
    ],
)
def test_a_text_is_right_whatever_its_case_form_or_reason(text: str, gold: str) -> None:
    assert verdict(text, gold) is CORRECT


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("Yes and no", "yes", NO_ANSWER),
        ("Yes, and no", "yes", NO_ANSWER),
        ("Yes, no", "yes", NO_ANSWER),
        ("Yes. No, wait", "yes", NO_ANSWER),
        ("Paris. Hmm, Rome.", "Paris", NO_ANSWER),
        ("Paris. Actually it is Rome.", "Paris", NO_ANSWER),
        ("Paris, I mean Rome", "Paris", NO_ANSWER),
        ("Paris. Or Rome.", "Paris", NO_ANSWER),
        ("Paris. That is wrong.", "Paris", NO_ANSWER),
        ("Yes, but only at night", "yes", NO_ANSWER),
        ("Paris or London", "Paris", NO_ANSWER),
        ("Paris, London or Rome", "Paris", NO_ANSWER),
        ("Yesterday", "yes", WRONG),
        ("No, they do not.", "yes", WRONG),
        ("not Paris", "Paris", WRONG),
        ("Paris is wrong", "Paris", WRONG),
        ("vitamin A", "vitamin", WRONG),
        ("Vitamin", "vitamin A", WRONG),
        ("5 March 2020", "March 5, 2021", WRONG),
        ("March 2021", "March 5, 2021", WRONG),
        ("6", "6 apples\n2 pears", WRONG),
        ("30° 45'", "30° 15'", WRONG),
        ("", "yes", NO_ANSWER),
        ("3 und 7", "3 und 4", WRONG),
        ("7, 8", "7", WRONG),
        ("102030", "10 20 30", WRONG),
        ("12", "1 2", WRONG),
        ("34", "3*4", WRONG),
        ("23", "2**3", WRONG),
        ("2*3", "2**3", WRONG),
        ("58", "5_8", WRONG),
        ("23", "2³", WRONG),
        ("31/2 Cups", "3 1/2 Cups", WRONG),
    ],
)
def test_a_text_that_only_looks_right_is_not(text: str, gold: str, expected: Verdict) -> None:
    assert verdict(text, gold, "text") is expected


def test_a_long_gold_is_no_mere_beginning() -> None:
    gold = "the first seven words of a sentence"
    assert verdict(f"{gold}, more or less", gold) is not CORRECT
    assert verdict(gold.upper() + ".", gold) is CORRECT


# --- expressions ----------------------------------------------------------------------------------


@needs_math
@pytest.mark.parametrize(
    ("text", "gold"),
    [
        (r"\dfrac{\sqrt{3}}{2}", r"\frac{\sqrt{3}}{2}"),
        (r"$\frac{1}{2}\sqrt{3}$.", r"\frac{\sqrt{3}}{2}"),
        ("(x+1)^2", "x^2+2x+1"),
        ("y = 2x+5", "2x - y + 5 = 0"),
        (r"(2, \infty)", r"(2,\infty)"),
        (r"x \in (2, 5)", "(2,5)"),
        ("(2;4)", "(2, 4)"),
        ("i + 1", "1 + i"),
        ("2π", r"2\pi"),
        ("x² ≥ 3", r"x^2 \geq 3"),
        (r"\{2, 1\}", r"\{1,2\}"),
        (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}"),
        ("(x+1)^2, because it is a square", "x^2+2x+1"),
        (r"\frac{x}{2}", "x/2"),
        ("√13", r"\sqrt{13}"),
        (r"5\sqrt{20}", "5√20"),
        ("√2.5x", r"\sqrt{2.5}x"),
        ("√(x+1)", r"\sqrt{x+1}"),
        ("√x", r"\sqrt{x}"),
        ("4pi", r"4\pi"),
        ("2*pi*r", r"2\pi r"),
        ("sin(x)/2", r"\frac{\sin x}{2}"),
        ("ln(2) + arctan(x)", r"\arctan x + \ln 2"),
        ("exp(2x)", "e^{2x}"),
        ("log_2(5)", r"\log_2 5"),
        ("x⁴ + x¹⁰", "x^{10} + x^4"),
        ("2⁻¹x", r"\frac{x}{2}"),
        ("x₁ + y", "y + x_1"),
        (r"\sqrt{18} sec", r"3\sqrt{2} sec"),
        ("sec(x) + 1", r"1 + \sec x"),
    ],
)
def test_an_expression_is_right_in_any_form(text: str, gold: str) -> None:
    assert verdict(text, gold) is CORRECT


@needs_math
@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("1", "1 + i", WRONG),
        ("2j", "2i", WRONG),
        ("2b", "2a", WRONG),
        ("2", "2a", WRONG),
        ("4", "4m", WRONG),
        ("-9.8", "-9.8 t", WRONG),
        ("(3;9)", "(3; 4)", WRONG),
        ("[2;7]", "[2; 5]", WRONG),
        ("[2, 5]", "(2, 5)", WRONG),
        ("(2, 1)", "(1, 2)", WRONG),
        (r"\{1, 2\}", "(1, 2)", WRONG),
        ("0", "2x - y + 5 = 0", WRONG),
        ("x = 5 or x = 7", "x = 5", NO_ANSWER),
        ("x^2. No, x^3", "x^2", NO_ANSWER),
        ("$x^2$. Wait, it is $x^3$.", "x^2", NO_ANSWER),
        ("x^2. That is wrong.", "x^2", NO_ANSWER),
        ("Use the table.", r"\frac{\sqrt{3}}{2}", NO_ANSWER),
        ("x^2 +", "x^2 + 1", NO_ANSWER),
        (r"\frac{", r"\frac{x}{2}", NO_ANSWER),
        ("", "x^2", NO_ANSWER),
        ("3", "√13", WRONG),
        ("0", "5√20", WRONG),
        ("10", "2√15", WRONG),
        (r"\text{ sin }x", r"\sin x", WRONG),
    ],
)
def test_an_expression_that_only_looks_right_is_not(
    text: str, gold: str, expected: Verdict
) -> None:
    assert verdict(text, gold) is expected


@needs_math
def test_right_expressions_have_the_golds_spelling() -> None:
    # so that they are one answer in a vote, whether math-verify had to compare them or not
    for text in (r"\dfrac{\sqrt{3}}{2}", r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2"):
        assert grade_answer(text, problem(r"\frac{\sqrt{3}}{2}")).value == r"\frac{\sqrt{3}}{2}"


@needs_math
def test_an_expression_without_end_is_a_timeout_and_the_next_is_compared() -> None:
    started = time.monotonic()
    assert verdict(r"9^{9^{9^{9}}}", r"\sqrt{2}") is TIMEOUT
    assert time.monotonic() - started < 3 * mathematics.TIMEOUT_S + 30
    assert verdict("2 + x", "x + 2") is CORRECT


@pytest.fixture
def own_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(mathematics, "_IDLE", mathematics._IDLE.__class__())
    worker = mathematics._Worker()
    mathematics._IDLE.put(worker)
    yield
    worker.close()


@needs_math
def test_a_comparison_that_only_waits_for_a_busy_machine_is_no_timeout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_worker: None
) -> None:
    child = tmp_path / "child.py"
    slow = "    import time\n    time.sleep(1.5)\n    from math_verify import verify"
    source = mathematics.CHILD.read_text()
    child.write_text(source.replace("    from math_verify import verify", slow))
    monkeypatch.setattr(mathematics, "CHILD", child)
    monkeypatch.setattr(mathematics, "TIMEOUT_S", 1.0)
    assert verdict("4 + x + y", "x + 4 + y") is CORRECT
    monkeypatch.setattr(mathematics, "_IDLE", mathematics._IDLE.__class__())
    mathematics._IDLE.put(worker := mathematics._Worker())
    monkeypatch.setattr(mathematics, "WALL_S", 1.0)
    assert verdict("5 + x + y", "x + 5 + y") is TIMEOUT
    worker.close()


@needs_math
def test_a_worker_that_is_ready_too_late_answers_nothing(
    monkeypatch: pytest.MonkeyPatch, own_worker: None
) -> None:
    monkeypatch.setattr(mathematics, "START_S", 0.0)
    assert verdict("6 + x + y", "x + 6 + y") is ERROR
    monkeypatch.setattr(mathematics, "START_S", 120.0)
    assert verdict("6 + x + y", "x + 6 + y") is CORRECT


@needs_math
def test_a_worker_that_is_ready_has_imported_all_that_it_needs() -> None:
    code = (
        "import runpy, sys\n"
        f"child = runpy.run_path({str(mathematics.CHILD)!r})\n"
        "child['warm_up']()\n"
        "known = set(sys.modules)\n"
        "for gold, answer in zip(sys.argv[1::2], sys.argv[2::2]):\n"
        "    assert 'error' not in child['compared'](gold, answer)\n"
        "assert set(sys.modules) == known, set(sys.modules) - known"
    )
    pairs = [
        *(r"2x+3=5", "x=1", r"(2,3]\cup(5,7)", r"(5,7)\cup(2,3]", r"\{1,2\}", r"\{2,1\}"),
        *(r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
        *(r"\sin^2 x+\cos^2 x", "1", r"\int_0^1 x^2 dx", r"\frac13", r"\log_2 8", "3"),
        *(r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}", r"\lim_{x\to 0}\frac{\sin x}{x}", "1"),
    ]
    subprocess.run([sys.executable, "-P", "-c", code, *pairs], check=True)


@needs_math
def test_a_worker_that_dies_is_an_error_and_not_a_wrong_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    child = tmp_path / "child.py"
    child.write_text("import sys\nsys.exit(1)")
    monkeypatch.setattr(mathematics, "CHILD", child)
    monkeypatch.setattr(mathematics, "_IDLE", mathematics._IDLE.__class__())
    mathematics._IDLE.put(mathematics._Worker())
    graded = grade_answer("3 + x + y", problem("x + 3 + y"))
    assert graded.verdict is ERROR
    assert "died" in graded.reason


@needs_math
def test_many_expressions_are_graded_in_order() -> None:
    rows = [problem(f"x + {i}") for i in range(12)]
    texts = [f"The answer is {i} + {'x' if i % 3 else 'y'}" for i in range(12)]
    verdicts = [graded.verdict for graded in Nl().grade(rows, texts)]
    assert verdicts == [CORRECT if i % 3 else WRONG for i in range(12)]


@needs_math
def test_threads_and_processes_compare_side_by_side() -> None:
    texts = [f"{i} + x" for i in range(8)]
    with ThreadPoolExecutor(4) as threads:
        assert all(
            graded is CORRECT
            for graded in threads.map(lambda i: verdict(texts[i], f"x + {i}"), range(8))
        )
    child = multiprocessing.get_context("fork").Process(target=_compare_in_child)
    child.start()
    child.join(100)
    assert child.exitcode == 0
    assert verdict("9 + x", "x + 9") is CORRECT


def _compare_in_child() -> None:
    os._exit(0 if verdict("z + 7", "7 + z") is CORRECT else 1)


# --- several, and patterns ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gold", "kind", "expected"),
    [
        ("ACCRA", ["Accra", "Akkra"], "any_of", CORRECT),
        ("Akkra, on the coast", ["Accra", "Akkra"], "any_of", CORRECT),
        ("0.5", ["1/2", "half"], "any_of", CORRECT),
        ("Kumasi", ["Accra", "Akkra"], "any_of", WRONG),
        ("Accra or Kumasi", ["Accra"], "any_of", NO_ANSWER),
        ("1, 2, 3", "[1, 2, 3]", None, CORRECT),
        ("[1; 2; 3].", "[1, 2, 3]", None, CORRECT),
        ("1, 2 and 3", "[1, 2, 3]", None, CORRECT),
        ("\n- red\n- blue", ["red", "blue"], "list", CORRECT),
        ("1,000, 2,000", ["1000", "2000"], "list", CORRECT),
        ("1,000 and 2,000", ["1000", "2000"], "list", CORRECT),
        ("(1,2), (3,4)", ["(1,2)", "(3,4)"], "list", CORRECT),
        ("(1, 2) and (3, 5)", ["(1,2)", "(3,4)"], "list", WRONG),
        ("{(3, 4), (1, 2)}", ["(1,2)", "(3,4)"], "set", CORRECT),
        ("3, 2, 1", "[1, 2, 3]", None, WRONG),
        ("1, 2", "[1, 2, 3]", None, WRONG),
        ("1, 2, 3, 4", "[1, 2, 3]", None, WRONG),
        ("I think so", "[1, 2, 3]", None, NO_ANSWER),
        ("blue, red", ["red", "blue"], "list", WRONG),
        ("blue and red", ["red", "blue"], "set", CORRECT),
        ("{4, 3}", ["3", "4"], "set", CORRECT),
        ("3, 3", ["3", "4"], "set", WRONG),
        ("3, 4, 5", ["3", "4"], "set", WRONG),
        ("3", ["3", "4"], "set", WRONG),
        ("x = 3 or x = 4", ["3", "4"], "set", CORRECT),
        ("3 or 4", ["3", "4"], "list", NO_ANSWER),
        ("yes or no, maybe", ["yes or no", "maybe"], "set", CORRECT),
        ("3.14, 3.141", ["3.14", "3.141"], "set", CORRECT),
        ("3.141, 3.14", ["3.14", "3.141"], "set", CORRECT),
        ("1.018, 1.009, 1.00", ["1.00", "1.009", "1.018"], "set", CORRECT),
        ("3.14, 3.16", ["3.14", "3.141"], "set", WRONG),
    ],
)
def test_lists_sets_and_spellings(
    text: str, gold: object, kind: AnswerKind | None, expected: Verdict
) -> None:
    assert verdict(text, gold, kind) is expected


@pytest.mark.parametrize(
    ("completion", "kind", "expected"),
    [
        (r"$\boxed{1}$, $\boxed{2}$", "set", CORRECT),
        (r"\boxed{2} and \boxed{1}", "set", CORRECT),
        (r"\boxed{2} or \boxed{1}", "set", CORRECT),
        (r"\boxed{1}, \boxed{2}", "list", CORRECT),
        (r"\boxed{2}, \boxed{1}", "list", WRONG),
        (r"\boxed{1} or \boxed{2}", "list", NO_ANSWER),
        (r"\boxed{3}, \boxed{2}", "set", WRONG),
        (r"We get \boxed{3} apples. So \boxed{1, 2}", "set", CORRECT),
        ("The answer is 3. The answer is 1, 2.", "list", CORRECT),
        (r"\boxed{1, 2}. \boxed{1, 2}", "list", CORRECT),
        (r"\boxed{3, 4} and \boxed{1, 2}", "set", NO_ANSWER),
        (r"\boxed{1, 2} or 3", "set", NO_ANSWER),
        (r"\boxed{2, 1} or \boxed{1, 2}", "list", NO_ANSWER),
    ],
)
def test_the_parts_of_a_list_may_stand_in_boxes_of_their_own(
    completion: str, kind: AnswerKind, expected: Verdict
) -> None:
    problem = Problem(id="p", question="q", answer=read_gold(["1", "2"], kind))
    assert grade_completion(completion, problem).verdict is expected


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [
        ("AB-12", r"[A-Z]{2}-\d+", CORRECT),
        ("AB-12.", r"[A-Z]{2}-\d+", CORRECT),
        ("ab-12", r"[A-Z]{2}-\d+", WRONG),
        ("AB-12 or CD-34", r"[A-Z]{2}-\d+", WRONG),
        ("", r".*", NO_ANSWER),
        ("pH", "pH", CORRECT),
        ("Ph", "pH", WRONG),
        ("** AB-12", r"[A-Z]{2}-\d+", CORRECT),
        ("**kwargs", r"\*\*\w+", CORRECT),
    ],
)
def test_a_pattern_must_match_all_of_the_answer(text: str, pattern: str, expected: Verdict) -> None:
    assert verdict(text, pattern, "regex") is expected


def test_a_pattern_without_end_is_a_timeout_within_a_second() -> None:
    started = time.monotonic()
    assert verdict("a" * 2000, r"(([a-z])+.)+[A-Z]([a-z])+", "regex") is TIMEOUT
    assert verdict("1,2,3,4,5,6,7,8,9," * 40, r"(.*?,){11}P", "regex") is TIMEOUT
    assert time.monotonic() - started < 10
    assert verdict("a" * 2000, r"(a+)+b", "regex") is WRONG
    assert verdict("aab", r"(a+)+b", "regex") is CORRECT


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(DataError, match="not a regular expression"):
        read_gold("(", "regex")
    for raw in (None, ["a", "b"], " "):
        with pytest.raises(DataError, match="expected a regular expression"):
            read_gold(raw, "regex")


def test_a_letter_whose_options_stand_in_the_question_is_read_like_an_option() -> None:
    for text in ("(B)", "B) 12", "option B", "\\textbf{(B)}", "B because it fits", "B"):
        assert grade_answer(text, problem("B")).verdict is CORRECT, text
    for text in (
        *("C", "(A)", "A or B", "B or C", "b = 5", "Bob", "B flat", "B negative", "B to D"),
        *("B -> D", "B D", "B as well as C", "B does not hold"),
    ):
        assert grade_answer(text, problem("B")).verdict is not CORRECT, text
    assert grade_answer("I think 5", problem("I")).verdict is not CORRECT


@pytest.mark.parametrize("gold", ["b", "B"])
def test_the_case_of_such_a_letter_does_not_matter(gold: str) -> None:
    for text in ("b", "(b)", "(B).", "b) 12", "option b"):
        assert grade_answer(text, problem(gold)).verdict is CORRECT, text
    for text in ("c", "(a)", "b = 5", "b or c", "be", "b c"):
        assert grade_answer(text, problem(gold)).verdict is not CORRECT, text
    assert grade_answer("a dog", problem("A")).verdict is not CORRECT


def test_a_gold_may_be_the_letter_of_an_option_with_the_options_text() -> None:
    for gold in ("(B)", "B)"):
        assert read_gold(gold) == Answer(kind="text", value="B")
    for gold in ("(B) 12", "B) 12", "\\textbf{(B)}\\ 12", "\\textbf{B)}\\ 12"):
        assert read_gold(gold) == Answer(kind="any_of", value="B", items=("B", "12"))
    for said in ("P(A)", "copper(I) oxide", "none, see (A)"):
        assert read_gold(f"(B) {said}").items == ("B", said)


@pytest.mark.parametrize(
    "gold",
    [
        *(
            "I) Newton",
            "A. Smith",
            "B) – 12",
            "B: 12",
            "a)",
            "(A) or (B)",
            "B) or C)",
            "(A) 5, (B) 3",
        ),
        *("A) 5, B) 3", "A) 5,B) 3", "A) 5/B) 3", "A) 5 (B) 3", "A) yes;B) no", "A) 5, I) 3"),
    ],
)
def test_other_letters_initials_and_several_options_are_text(gold: str) -> None:
    answer = read_gold(gold)
    assert answer.value == gold and not answer.items


def test_parts_of_a_list_may_be_letters_of_options_only_in_brackets() -> None:
    parts = Problem(id="p", question="q", answer=read_gold(["A) 5", "B) 7"], "list"))
    assert grade_answer("A) 5, B) 7", parts).verdict is CORRECT
    assert grade_answer("A, B", parts).verdict is not CORRECT
    letters = Problem(id="p", question="q", answer=read_gold(["(A)", "(B)"], "list"))
    assert grade_answer("A, B", letters).verdict is CORRECT


# --- values of programs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "gold", "expected"),
    [
        (True, "yes", CORRECT),
        (False, "No", CORRECT),
        (True, "no", WRONG),
        (True, "Paris", NO_ANSWER),
        (True, "True", CORRECT),
        (False, "true", WRONG),
        ([1, 2, 3], "[1, 2, 3]", CORRECT),
        ((3, 2, 1), "[1, 2, 3]", WRONG),
        ((2, 4), "(2, 4)", CORRECT),
        ([[1], 2, 3], "[1, 2, 3]", NO_ANSWER),
        ({"a": 1}, "yes", NO_ANSWER),
        (None, "yes", NO_ANSWER),
    ],
)
def test_values_of_programs(value: object, gold: str, expected: Verdict) -> None:
    assert grade_value(value, problem(gold)).verdict is expected


@pytest.mark.parametrize("sandbox", ["auto", "subprocess"])
def test_a_date_from_a_program(sandbox: str) -> None:
    code = "from datetime import date\ndef solution():\n    return date(2024, 1, 5)"
    format = Program(sandbox=sandbox, allow_unisolated=True)  # type: ignore[arg-type]
    for gold in ("2024-01-05", "5 January 2024"):
        assert format.grade([problem(gold)], [code])[0].verdict is CORRECT
    assert format.grade([problem("2024-05-01")], [code])[0].verdict is WRONG


@pytest.mark.parametrize("sandbox", ["auto", "subprocess"])
@pytest.mark.parametrize(
    ("gold", "value"),
    [
        ("[1/2, 3/4]", "[Fraction(1, 2), Fraction(3, 4)]"),
        ("(1/2, 3/4)", "(Fraction(1, 2), Fraction(3, 4))"),
        ("{1/2, 3/4}", "{Fraction(3, 4), Fraction(1, 2)}"),
        ("[0.5, 3]", "[Fraction(1, 2), 3]"),
    ],
)
def test_a_list_of_fractions_from_a_program(sandbox: str, gold: str, value: str) -> None:
    code = f"from fractions import Fraction\ndef solution():\n    return {value}"
    format = Program(sandbox=sandbox, allow_unisolated=True)  # type: ignore[arg-type]
    problems = [problem(gold), problem("[1/2, 5/4]")]
    assert [each.verdict for each in format.grade(problems, [code] * 2)] == [CORRECT, WRONG]


def test_numbers_still_take_no_truth_values_lists_or_dates() -> None:
    number = Problem(id="p", question="?", answer=Answer(kind="number", value=Fraction(1)))
    for value in (True, [1], (1,), {1}):
        assert grade_value(value, number).verdict is NO_ANSWER


# --- rewards --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gold", "kind", "reward"),
    [
        ("I do not know", "Paris", None, 0.0),
        ("London", "Paris", None, 0.0),
        ("I do not know", "[1, 2, 3]", None, 0.0),
        ("1, 2, 4", "[1, 2, 3]", None, 0.1),
        ("green", ["red", "blue"], "list", 0.0),
        ("Kumasi", ["Accra"], "any_of", 0.0),
        ("xy", "[a-z]", "regex", 0.0),
        ("so it is", "x + 1", None, 0.0),
        ("it is x", "x + 1", None, 0.0),
        pytest.param("x + 2", "x + 1", None, 0.1, marks=needs_math),
        ("Paris", "Paris", None, 1.0),
    ],
)
def test_a_wrong_answer_earns_its_part_only_if_it_is_of_the_golds_kind(
    text: str, gold: object, kind: AnswerKind | None, reward: float
) -> None:
    row = problem(gold, kind)
    completion = Completion(token_ids=(), text=text, logprobs=(), finish_reason="eos")
    assert Outcome()([row], [completion], [grade_answer(text, row)]) == [reward]


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choices",
    [
        ("a ) 38", "b ) 12", "c ) 30"),
        ("(A) 38", "(B) 12", "(C) 30"),
        ("A. 38", "B. 12", "C. 30"),
        ("a)38", "b)12", "c)30"),
    ],
)
def test_options_given_with_their_letters_are_options_without_them(
    choices: tuple[str, ...],
) -> None:
    assert unlettered(choices) == ("38", "12", "30")
    for text in ("30", "c", "(C) 30", "c ) 30"):
        assert read_choice(text, choices) == "c", text
    row = Problem(
        id="p", question="Which?", answer=Answer(kind="choice", value="c"), choices=choices
    )
    assert Nl().prompt(row) == "Which?\na ) 38 , b ) 12 , c ) 30\n"


def test_options_that_only_look_lettered_keep_what_they_say() -> None:
    for choices in (("a) 5", "6"), ("b) 5", "a) 6"), ("a.m.", "b.c."), ("a", "b"), ("a)", "b)")):
        assert unlettered(choices) == choices


# --- a grader of one's own ------------------------------------------------------------------------


def own(tmp_path: Path, source: str, name: str = "right") -> str:
    (tmp_path / "mine.py").write_text(source)
    return f"{tmp_path / 'mine.py'}:{name}"


def test_a_persons_grader_decides_and_may_fail(tmp_path: Path) -> None:
    source = (
        "def right(completion, problem):\n"
        "    if 'crash' in completion:\n        raise ValueError('no')\n"
        "    if 'odd' in completion:\n        return 3\n"
        "    return completion.endswith('!')\n"
    )
    grading = own(tmp_path, source)
    format: Any = load_component({"kind": "nl", "grading": grading}, group="formats")
    graded: list[Graded] = format.grade([problem("x")] * 4, ["wow!", "oh", "crash", "odd"])
    assert [each.verdict for each in graded] == [CORRECT, WRONG, ERROR, ERROR]
    assert "ValueError: no" in graded[2].reason


def test_a_persons_grader_sees_what_a_program_returns(tmp_path: Path) -> None:
    grading = own(
        tmp_path,
        "class Right:\n    def __call__(self, text, problem):\n        return text == '5'\n",
        "Right",
    )
    format = Program(grading=grading)
    codes = ["def solution():\n    return 5", "def solution():\n    return 6", "return oops"]
    verdicts = [each.verdict for each in format.grade([problem("x")] * 3, codes)]
    assert verdicts == [CORRECT, WRONG, ERROR]


@pytest.mark.parametrize(
    "code",
    [
        "return 10**5000",
        "return [10**5000]",
        "x = []\nfor i in range(10000):\n    x = [x]\nreturn x",
    ],
)
def test_a_value_without_text_is_no_answer_for_a_persons_grader(tmp_path: Path, code: str) -> None:
    grading = own(tmp_path, "def right(text, problem):\n    return True\n")
    assert Program(grading=grading).grade([problem("x")], [code])[0].verdict is NO_ANSWER


def test_unknown_rules_and_missing_graders_are_named(tmp_path: Path) -> None:
    for grading, message in [
        ("robist", "expected robust, paper or your own grader"),
        ("nowhere.py:right", "nowhere.py"),
        (own(tmp_path, "right = 5\n"), "cannot be called"),
    ]:
        with pytest.raises((RecipeError, ValueError), match=message):
            Nl(grading=grading)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "def __init__(self, model): ...",
            "TypeError: G.__init__() missing 1 required positional argument: 'model'",
        ),
        ("def __init__(self): raise RuntimeError", "RuntimeError"),
        ("def __init__(self): raise OSError('a\\nb')", "OSError: a b"),
        ("def __init__(self): raise ValueError('no')", "ValueError: no"),
        ("def __init__(self): raise SystemExit(1)", "SystemExit: 1"),
    ],
)
def test_a_graders_class_that_cannot_be_created_is_refused_in_one_line(
    tmp_path: Path, body: str, reason: str
) -> None:
    grading = own(tmp_path, f"class G:\n    {body}\n", "G")
    for kind in ("nl", "program"):
        with pytest.raises(ValidationError) as refused:
            load_component({"kind": kind, "grading": grading}, group="formats")
        assert refused.value.errors()[0]["msg"] == f"{grading}: cannot be created: {reason}"


# --- any text -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "piece", [" ", "(", "$", "\\(", "a, ", "\n", "because ", "1, ", "{", "- ", " or ", "\ud800"]
)
def test_long_texts_of_one_piece_get_a_verdict_at_once(piece: str) -> None:
    text, started = piece * (100_000 // len(piece)), time.monotonic()
    golds: list[tuple[object, AnswerKind | None]] = [
        ("yes", None),
        ("[1, 2, 3]", None),
        (["a", "b"], "set"),
        (["a", "1/2"], "any_of"),
        ("x + 1", None),
    ]
    for gold, kind in golds:
        graded = grade_answer(text, problem(gold, kind))
        assert graded.verdict is not CORRECT or piece == "a, "
        assert graded.reason.isprintable()
    assert time.monotonic() - started < 10  # 0.1 s on a free core
