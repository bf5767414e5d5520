"""The output of the three progress views, read back from a string."""

import subprocess
import sys
from io import StringIO

import pytest
from rich.console import Console

from reftune.stages.stage import Progress
from reftune.terminal.live import LineProgress, RichProgress, StageView, make_progress
from reftune.text import brief, clock, counted, printable
from reftune.types import Answer, Completion, Graded, Problem, Solution, Verdict


class Clock:
    """A clock that only a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def solution(text: str) -> Solution:
    return Solution(
        problem=Problem(id="p", question="How many?", answer=Answer(kind="number", value="3")),
        prompt_ids=(1,),
        completion=Completion(token_ids=(1,), text=text, logprobs=(0.0,), finish_reason="eos"),
        graded=Graded(verdict=Verdict.WRONG, value="4", reason="4 is not 3"),
        reward=0.1,
    )


def test_lines_come_every_few_seconds_and_at_the_end_of_a_stage():
    stream, clock = StringIO(), Clock()
    progress = LineProgress(stream, time_s=clock)
    progress.stage("sft", total_steps=100)
    for step in range(
        1, 9
    ):  # seconds 1 … 8: a line at 1, one at 6 (5 s later), one for step 8 at the end
        clock.now += 1
        progress.step(step, {"loss/sft": 1 / step})
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", "6/100", "8/100"]
    assert "loss 0.125" in lines[-1]


def test_a_line_tells_the_time_left_from_the_steps_of_this_session():
    # resumed at 50 of 100, 10 steps took 20 s: 40 left at 2 s each are 80 s
    view = StageView("reft", total_steps=100, first_step=50, started_s=0, step=50)
    view.update(60, {})
    assert view.position(20) == "60/100  0:20, 1:20 left"


def test_no_time_left_is_shown_before_the_first_step_or_after_the_last():
    view = StageView("reft", total_steps=10, first_step=0, started_s=0, step=0)
    assert view.position(3) == "0/10  0:03"
    view.update(10, {})
    assert view.position(30) == "10/10  0:30"


def test_token_rate_and_time_split_come_from_cumulative_counts_and_phase_seconds():
    # between the two steps 300 train and 100 sampled tokens in 1 + 3 seconds: 100 tok/s; update
    # took three quarters
    view = StageView("reft", total_steps=10, first_step=0, started_s=0, step=0)
    view.update(
        1,
        {
            "compute/train_tokens": 700,
            "compute/sampled_tokens": 900,
            "time/generate_s": 9,
            "time/update_s": 9,
        },
    )
    assert view.facts() == []
    view.update(
        2,
        {
            "compute/train_tokens": 1000,
            "compute/sampled_tokens": 1000,
            "time/generate_s": 1,
            "time/update_s": 3,
        },
    )
    assert view.facts() == ["100 tok/s"]
    assert view.split() == ["update 75%", "generate 25%"]


def test_an_evaluation_of_the_same_step_adds_its_numbers_and_no_time():
    view = StageView("sft", total_steps=10, first_step=0, started_s=0, step=0)
    view.update(1, {"loss/sft": 2.0, "compute/train_tokens": 10, "time/update_s": 1})
    view.update(1, {"dev/accuracy": 0.5, "compute/train_tokens": 10})
    assert view.facts() == ["loss 2.000", "dev 50.0%"]
    assert view.phase_seconds == {}


def test_a_dev_accuracy_of_an_earlier_step_is_shown_with_its_step():
    view = StageView("reft", total_steps=4, first_step=0, started_s=0, step=0)
    view.update(0, {"dev/accuracy": 0.35})
    assert view.facts() == ["dev 35.0%"]
    view.update(1, {"loss/sft": 2.0})
    assert view.facts() == ["loss 2.000", "dev 35.0% at step 0"]
    view.update(1, {"dev/accuracy": 0.4})
    assert view.facts() == ["loss 2.000", "dev 40.0%"]


def test_the_live_view_shows_numbers_and_the_last_sample_with_its_verdict():
    console = Console(file=StringIO(), force_terminal=True, width=100, color_system=None)
    progress = RichProgress(console, time_s=Clock())
    progress.stage("reft", total_steps=10)
    progress.step(4, {"reward/mean": 0.625, "reward/correct": 0.6, "kl/reference": 1.5})
    progress.solutions(1, [solution("def solution():\n    return [bold]4[/bold]")])
    with console.capture() as capture:
        console.print(progress.render())
    progress.close()
    shown = capture.get()
    for expected in (
        "reft",
        "4/10",
        "reward 0.62",
        "correct 60%",
        "KL 1.50",
        "wrong, reward 0.1",
        "4 is not 3",
    ):
        assert expected in shown
    assert "return [bold]4[/bold]" in shown, "a completion is text, not markup"


def test_a_finished_stage_leaves_one_line():
    stream = StringIO()
    progress = RichProgress(Console(file=stream, width=100), time_s=Clock())
    progress.stage("sft", total_steps=2)
    progress.step(2, {"loss/sft": 0.5})
    progress.stage("reft", total_steps=2)
    progress.close()
    lines = [line for line in stream.getvalue().splitlines() if line.startswith(("sft", "reft"))]
    assert lines == ["sft  2/2  0:00  loss 0.500", "reft  0/2  0:00"]


def test_a_completion_cannot_steer_the_terminal():
    assert printable("a\x1b[2J\x07b\n\tc\x9b") == "a�[2J�b\n\tc�"


def test_a_note_is_kept_in_every_view_but_the_silent_one(capsys: pytest.CaptureFixture[str]):
    LineProgress().note("resumed at step 3")
    assert capsys.readouterr().err == "resumed at step 3\n"
    Progress().note("resumed at step 3")
    assert capsys.readouterr() == ("", "")


def test_a_note_comes_after_the_steps_before_it():
    stream, clock = StringIO(), Clock()
    progress = LineProgress(stream, time_s=clock)
    progress.stage("sft", total_steps=2)
    progress.step(1, {})
    progress.step(2, {})
    progress.note("sft: 76.7% of 1000 test problems right")
    progress.stage("reft", total_steps=1)
    starts = [" ".join(line.split()[:2]) for line in stream.getvalue().splitlines()]
    assert starts == ["sft 1/2", "sft 2/2", "sft: 76.7%"]


def test_an_error_is_cut_at_a_blank():
    url = "https://" + "x" * 50
    assert brief("word " * 32 + url) == "word " * 31 + "word…"
    assert brief("KeyError: " + "x" * 300) == "KeyError: " + "x" * 189 + "…"
    assert brief("x" * 150 + "\n" + "y" * 49) == "x" * 150 + " " + "y" * 49


def test_without_a_terminal_there_are_lines_and_nothing_when_quiet():
    assert isinstance(make_progress(), LineProgress)
    assert isinstance(make_progress(quiet=True), Progress)


def test_clock_reads_as_minutes_or_hours():
    assert [clock(s) for s in (0, 31.4, 62, 3723)] == ["0:00", "0:31", "1:02", "1:02:03"]


def test_one_is_counted_in_the_singular():
    assert [counted(n, "dev row") for n in (0, 1, 2, 1200)] == [
        "0 dev rows",
        "1 dev row",
        "2 dev rows",
        "1,200 dev rows",
    ]


def test_the_views_load_without_torch():
    code = (
        "import sys, reftune.terminal.live, reftune.terminal.watch;"
        " assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
