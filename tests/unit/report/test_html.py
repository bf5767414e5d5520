"""The page is complete, and no text of a model can act in it."""

from __future__ import annotations

import functools
import json
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import resvg_py

from reftune.errors import CheckpointError, DataError
from reftune.results import read_groups, report_command, table_command, write_figures
from reftune.results.page import gallery
from reftune.results.page.gallery import MAX_TEXT, PROBLEMS_BYTES, SAMPLES_BYTES
from reftune.results.page.html import duration, script_json

WriteRun = Callable[..., Path]

HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\u2028\ud800"


def page_of(*folders: Path) -> str:
    return report_command(list(folders), folders[0] / "page.html").read_text(encoding="utf-8")


def data_of(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    found: dict[str, Any] = json.loads(match[1])
    return found


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_answer_is_in_the_page_without_any_script(write_run: WriteRun) -> None:
    page = page_of(write_run(num_samples=3))
    body = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    for text in (
        "ReFT",
        "95% interval",
        "maj@3",
        "were chosen by dev accuracy",
        "reftune demo",
        "word_problems",
        "2.13.0",
    ):
        assert text in body


def test_the_curves_are_in_the_page_without_any_script(write_run: WriteRun) -> None:
    page = page_of(write_run(num_samples=3))
    drawn = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawn) == 1 + len(data_of(page)["charts"])  # the first is drawn at two sizes
    assert all('class="line"' in svg or 'class="layer"' in svg for svg in drawn)
    assert "Accuracy on dev problems, by training effort. Warm-up from" in drawn[0]


def test_the_page_needs_no_network(write_run: WriteRun) -> None:
    page = page_of(write_run())
    assert "default-src 'none'" in page
    links = re.findall(r"""(?:src|href)=["']([^"']*)""", page)
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "url(http" not in page
    assert "@import" not in page


def test_script_json_leaves_no_way_out_of_its_element() -> None:
    text = str(script_json({"a": HOSTILE}))
    assert not set("<>&") & set(text)
    assert text.isascii()
    assert json.loads(text) == {"a": HOSTILE}


def test_hostile_text_is_escaped_everywhere(write_run: WriteRun) -> None:
    folder = write_run()
    for method in ("warmup", "sft", "reft"):
        rewrite(
            folder / "eval" / f"{method}.jsonl",
            lambda row: row.update(question=HOSTILE, gold=HOSTILE, id=row["id"] + HOSTILE),
        )
    rewrite(
        folder / "eval" / "reft.jsonl",
        lambda row: row["greedy"].update(completion=HOSTILE, reason=HOSTILE, value=HOSTILE),
    )
    rewrite(
        folder / "stages" / "reft" / "samples.jsonl",
        lambda row: row.update(completion=HOSTILE, tokens=[HOSTILE], logprobs=[0]),
    )
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(
        recipe.replace("name: demo", "name: '<script>alert(3)</script>'")
    )
    (folder / "env.json").write_text(
        json.dumps({"command": "<script>alert(4)</script>", "torch": "<b>"})
    )
    page = page_of(folder)
    assert "alert(1)</script>" not in page
    assert "<img" not in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(4)&lt;/script&gt;" in page
    assert page.count("<script") == 2
    rows = data_of(page)["problems"]["rows"]
    assert rows[0]["answers"][2]["text"] == HOSTILE


def test_the_page_is_a_function_of_the_files(write_run: WriteRun) -> None:
    folder = write_run(num_samples=2)
    assert page_of(folder) == page_of(folder)


def test_a_long_run_makes_a_small_page(write_run: WriteRun) -> None:
    folder = write_run(num_problems=300)
    long = "x = 1  # and so on\n" * 2_000
    rewrite(
        folder / "stages" / "reft" / "samples.jsonl",
        lambda row: row.update(completion=long, tokens=["a"] * 4000, logprobs=[0.5] * 4000),
    )
    rewrite(folder / "eval" / "reft.jsonl", lambda row: row["greedy"].update(completion=long))
    page = page_of(folder)
    assert len(page) < 5_000_000
    assert PROBLEMS_BYTES + SAMPLES_BYTES < 4_000_000
    problems = data_of(page)["problems"]
    assert 50 < len(problems["rows"]) < problems["total"] == 300
    assert problems["rows"][0]["answers"][2]["text"].startswith(long[:MAX_TEXT] + "… (")


def test_an_unfinished_run_shows_what_it_has(write_run: WriteRun) -> None:
    page = page_of(write_run(evaluated=["warmup"]))
    assert "Still to come: SFT, ReFT" in page
    assert "This run has not finished" in page
    assert "No answer yet" in page_of(write_run("other", evaluated=[]))
    both = page_of(write_run("first"), write_run("second", seed=1, evaluated=["warmup"]))
    assert "Not all runs have finished" in both


def test_a_finished_run_does_not_reload(write_run: WriteRun) -> None:
    assert 'id="pause"' not in page_of(write_run())


def test_seeds_and_recipes_share_a_page(write_run: WriteRun) -> None:
    seeds = [write_run(f"demo-s{seed}", seed=seed) for seed in range(2)]
    assert "on average over 2 seeds" in page_of(*seeds)
    page = page_of(write_run("a"), write_run("b", methods=("warmup", "reft"), seed=3))
    assert "b: ReFT" in page
    assert len(data_of(page)["problems"]["methods"]) == 5


def test_samples_keep_the_tokens_they_shade(write_run: WriteRun) -> None:
    row = data_of(page_of(write_run()))["samples"]["rows"][0]
    assert len(row["pieces"]) == len(row["logprobs"]) > 3


def test_the_longest_and_the_slowest_samples_are_in_the_page_however_many_there_are(
    write_run: WriteRun,
) -> None:
    folder = write_run(rl_steps=800)  # about 2,400 samples
    counted = iter(range(10_000))

    def change(row: dict[str, Any]) -> None:
        place = next(counted)
        row.update(program_s=5.0 if place == 1_001 else 0.001)
        if place == 1_503:
            row.update(tokens=["long"] * 900, logprobs=[-0.1] * 900)

    rewrite(folder / "stages" / "reft" / "samples.jsonl", change)
    shown = data_of(page_of(folder))["samples"]
    assert len(shown["rows"]) < 1_300 < shown["total"]
    assert max(row["tokens"] for row in shown["rows"]) == 900
    assert max(row["program_s"] for row in shown["rows"]) == 5.0


def test_samples_that_are_not_in_the_page_are_not_kept_in_memory(
    write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(rl_steps=600, num_problems=30)
    path = folder / "stages" / "reft" / "samples.jsonl"
    rewrite(path, lambda row: row.update(tokens=["word"] * 500, logprobs=[-0.5] * 500))
    monkeypatch.setattr(gallery, "MAX_SAMPLES", 40)
    tracemalloc.start()
    try:
        groups = read_groups([folder])
        read = tracemalloc.get_traced_memory()[0]
        shown = gallery.samples(groups)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(shown["rows"]) == 40 < 1_600 < shown["total"]
    assert read < 5_000_000 and peak < 8_000_000 < path.stat().st_size


def test_the_samples_in_the_page_do_not_depend_on_how_they_are_read(write_run: WriteRun) -> None:
    folders = [write_run(f"demo-s{seed}", seed=seed, rl_steps=300) for seed in range(2)]
    groups = read_groups(folders)
    held = [
        replace(
            group,
            runs=tuple(
                replace(
                    run,
                    stages={
                        name: replace(stage, samples=tuple(stage.samples))
                        for name, stage in run.stages.items()
                    },
                )
                for run in group.runs
            ),
        )
        for group in groups
    ]
    assert gallery.samples(held) == gallery.samples(groups)
    assert len(gallery.samples(groups)["rows"]) > 1_000


@pytest.mark.parametrize("line", ["{oops}", "[1]", '{"step": 1}'])
def test_a_damaged_sample_is_named_with_its_line(write_run: WriteRun, line: str) -> None:
    folder = write_run(rl_steps=4)
    path = folder / "stages" / "reft" / "samples.jsonl"
    number = len(path.read_text().splitlines()) + 1
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=rf"samples.jsonl:{number}: "):
        page_of(folder)
    path.write_text(path.read_text().removesuffix("\n"))  # an incomplete line
    assert data_of(page_of(folder))["samples"]["total"] == number - 1


def test_a_foreign_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run folder"):
        report_command([tmp_path])
    assert list(tmp_path.iterdir()) == []


def test_durations_show_two_units() -> None:
    assert [duration(seconds) for seconds in (None, 0.42, 42, 252, 7_500, 200_000)] == [
        "–",
        "0.4 s",
        "42 s",
        "4 min 12 s",
        "2 h 5 min",
        "2 d 7 h",
    ]


def test_figures_that_cannot_be_written_are_named(write_run: WriteRun, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "figures"):
        with pytest.raises(CheckpointError, match=f"^{folder}: cannot be written: "):
            write_figures([write_run(num_samples=2)], folder)


def test_the_main_curves_are_written_as_figures(write_run: WriteRun, tmp_path: Path) -> None:
    written = write_figures([write_run(num_samples=2)], tmp_path / "figures")
    assert {path.stem for path in written} == {
        "accuracy",
        "dev_accuracy",
        "reward_mean",
        "reward_correct",
        "kl_reference",
        "policy_entropy",
        "response_length",
        "response_truncated",
        "maj@k",
        "pass@k",
    }
    for path in written:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") if path.suffix == ".png" else b"ReFT" in content, path


def test_figures_have_text(
    write_run: WriteRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def drawn(svg: str) -> bytes:
        return resvg_py.svg_to_bytes(svg_string=svg, zoom=2, background="white")

    written = write_figures([write_run()], tmp_path / "figures")
    if caplog.messages:
        pytest.skip("no known font")
    for path in (path for path in written if path.suffix == ".svg"):
        svg = path.read_text()
        assert path.with_suffix(".png").read_bytes() == drawn(svg)
        assert drawn(svg) != drawn(re.sub("<text.*?</text>", "", svg)), path


def test_figures_without_any_font_are_reported_once(
    write_run: WriteRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bare = functools.partial(resvg_py.svg_to_bytes, skip_system_fonts=True)
    monkeypatch.setattr("resvg_py.svg_to_bytes", bare)
    assert write_figures([write_run()], tmp_path / "figures")
    assert caplog.messages == [
        "the PNG figures have no text: no known font; install one such as DejaVu Sans"
    ]


def test_one_problem_is_singular(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run(num_problems=1)
    page = page_of(folder)
    assert "Share of the 1 problem that" in page and "1 problems" not in page
    assert not re.search(r"\b1 (dev|test) problems", page)
    assert "percent on 1 test problem, 95%" in table_command([folder])
    svg = tmp_path / "figures" / "accuracy.svg"
    write_figures([folder], svg.parent)
    assert "Greedy accuracy on 1 test problem, with" in svg.read_text()
    assert "percent on 24 test problems, 95%" in table_command([write_run("many")])


def test_there_are_figures_even_if_nothing_is_solved(write_run: WriteRun, tmp_path: Path) -> None:
    folders = [write_run(f"run-{seed}", seed=seed) for seed in (0, 1)]
    for path in (path for folder in folders for path in (folder / "eval").iterdir()):
        path.write_text(path.read_text().replace('"correct"', '"wrong"'))
    assert {path.stem for path in write_figures(folders, tmp_path / "two")} >= {"accuracy"}
    recipe = folders[0] / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("evaluate:\n", "evaluate:\n  stages: []\n"))
    assert "accuracy" not in {path.stem for path in write_figures(folders[:1], tmp_path / "none")}


def test_the_same_runs_give_the_same_figures(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reftune.results.page.figures.training_charts", lambda *_: [])
    folder = write_run()
    first, second = (
        write_figures([folder], tmp_path / "one"),
        write_figures([folder], tmp_path / "two"),
    )
    assert len(first) == 4
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_runs_of_different_recipes_show_what_differs_and_seeds_do_not(write_run: WriteRun) -> None:
    one, other = write_run("one"), write_run("other", num_samples=3)
    again = write_run("again", seed=7)
    (again / "recipe.yaml").write_text(
        (again / "recipe.yaml").read_text().replace("name: again", "name: one")
    )
    rows = re.findall(
        r'<th scope="row"><code>(.*?)</code></th><td>(.*?)</td><td>(.*?)</td>', page_of(one, other)
    )
    assert rows == [("evaluate.samples", "0", "3")]
    assert "Where the recipes differ" not in page_of(one, again)


def test_votes_are_explained_where_any_method_has_them(write_run: WriteRun) -> None:
    folder = write_run(num_samples=3)
    rewrite(
        folder / "eval" / "warmup.jsonl", lambda row: row.update(samples=[])
    )  # the first method was not sampled
    assert (
        "Other marks show the accuracy of answers chosen from several samples: the majority’s"
        " answer (diamond)." in page_of(folder)
    )
    assert "several samples:" not in page_of(write_run("other"))
