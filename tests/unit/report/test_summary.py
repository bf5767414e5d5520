"""Scores and comparisons from files whose counts a reader can recompute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from reftune.errors import DataError
from reftune.results import report_command, table_command, write_figures
from reftune.results.records import read_run
from reftune.results.stats import paired_interval, paired_p_value, wilson
from reftune.results.summary import (
    group_runs,
    leader,
    outcomes,
    read_groups,
    score_table,
    summarize,
    voting_curves,
)
from reftune.results.tables import caption, display, headline, points, render_table

WriteRun = Callable[..., Path]


def summary_of(folder: Path) -> dict[str, Any]:
    return summarize(*read_groups([folder]))


def answer(
    folder: Path,
    method: str,
    right: Sequence[int],
    samples: Sequence[Sequence[object]] = (),
    asked: str = "q",
) -> None:
    """Write an evaluation: problem i is solved if right[i]; samples are values, of which 1 is
    right. Questions begin with `asked`."""
    rows = []
    for index, solved in enumerate(right):
        drawn = [_attempt(value, value == 1) for value in samples[index]] if samples else []
        rows.append(
            {
                "id": f"p{index}",
                "question": f"{asked}{index}",
                "gold": "1",
                "greedy": _attempt(1 if solved else 2, bool(solved)),
                "samples": drawn,
            }
        )
    path = folder / "eval" / f"{method}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _attempt(value: object, correct: bool) -> dict[str, object]:
    verdict = "no_answer" if value is None else "correct" if correct else "wrong"
    return {
        "completion": f"text {value}",
        "verdict": verdict,
        "value": None if value is None else str(value),
        "reward": 0.0,
        "reason": "",
        "finish_reason": "eos",
    }


def test_summary_counts_the_answers_in_the_files(write_run: WriteRun) -> None:
    folder = write_run()
    answer(folder, "warmup", [1, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    answer(folder, "sft", [1, 1, 0, 0, 1, 0, 0, 0, 0, 0])
    answer(folder, "reft", [1, 1, 1, 1, 0, 1, 1, 1, 1, 0])
    summary = summary_of(folder)
    assert summary["methods"]["reft"] == {
        "accuracy": 0.8,
        "ci95": list(wilson(8, 10)),
        "n": 10,
        "dev_accuracy": summary["methods"]["reft"]["dev_accuracy"],
        "looks": 5,
    }
    # only reft solves problems 2, 3, 5, 6, 7, 8, only sft problem 4: .8 − .3, p from 6 against 1
    against = next(
        found for found in summary["comparisons"] if (found["a"], found["b"]) == ("reft", "sft")
    )
    assert against["difference"] == pytest.approx(0.5)
    assert (against["p_value"], against["n"], against["significant"]) == (
        paired_p_value([1] * 6 + [-1] + [0] * 3),
        10,
        False,
    )
    assert [(found["a"], found["b"]) for found in summary["comparisons"]] == [
        ("sft", "warmup"),
        ("reft", "warmup"),
        ("reft", "sft"),
    ]
    assert summary["wall_seconds"] == 3 * 61.5


def test_summary_is_a_function_of_the_files(write_run: WriteRun) -> None:
    folder = write_run(num_samples=3)
    assert summary_of(folder) == summary_of(folder)
    json.dumps(summary_of(folder), allow_nan=False)


def test_votes_and_pass_at_k_come_from_the_samples(write_run: WriteRun) -> None:
    folder = write_run()
    # majorities over 4: 1 (right); 2 (wrong); tie of 1 and 2, 1 first (right); nothing valid
    # (wrong)
    samples = [[1, 1, 2, None], [2, 2, 1, None], [1, 2, 2, 1], [None] * 4]
    answer(folder, "reft", [0, 0, 0, 0], samples)
    rows = read_run(folder).evals["reft"]
    assert outcomes(rows)["maj@4"].tolist() == [1, 0, 1, 0]
    # k = 2: prefixes 1 1, 2 2, 1 2 (tie, first), none
    assert voting_curves(rows, 4)["maj"][:, 1].tolist() == [1, 0, 1, 0]
    # pass@1 is the share right: 2/4, 1/4, 2/4, 0; pass@2 of 2 in 4: 1 − 1/6
    assert voting_curves(rows, 4)["pass"][:, 0].tolist() == [0.5, 0.25, 0.5, 0]
    assert voting_curves(rows, 4)["pass"][0, 1] == pytest.approx(5 / 6)
    with pytest.raises(DataError, match="k = 5: only 4 samples"):
        voting_curves(rows, 5)


def test_summary_names_votes_by_their_k(write_run: WriteRun) -> None:
    summary = summary_of(write_run(num_samples=3, num_problems=20))
    assert {"maj@3", "maj@3_ci95", "pass@3"} <= set(summary["methods"]["reft"])
    assert ("reft maj@3", "sft maj@3") in [
        (found["a"], found["b"]) for found in summary["comparisons"]
    ]


def test_votes_of_methods_that_are_one_model_are_not_compared(write_run: WriteRun) -> None:
    folder = write_run(num_samples=3, num_problems=20)
    info = folder / "stages" / "reft" / "stage.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "chosen_step": 0}))
    compared = {(found["a"], found["b"]) for found in summary_of(folder)["comparisons"]}
    assert ("reft", "warmup") in compared
    assert ("reft maj@3", "warmup maj@3") not in compared
    assert ("reft maj@3", "sft maj@3") in compared


def test_scored_samples_are_reranked(write_run: WriteRun) -> None:
    folder = write_run()
    answer(folder, "reft", [0, 0], [[2, 1], [1, 2]])
    path = folder / "eval" / "reft.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["samples"][0]["score"], row["samples"][1]["score"] = (
            0.2,
            0.7,
        )  # the second sample wins: 1, then 2
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert outcomes(read_run(folder).evals["reft"])["rerank@2"].tolist() == [1, 0]


def test_scored_samples_vote_by_their_scores(write_run: WriteRun) -> None:
    folder = write_run()
    answer(folder, "reft", [0, 0], [[2, 1, 2], [1, 2, 2]])
    path = folder / "eval" / "reft.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:  # the majority is wrong twice; the scores outvote it once
        for sample, score in zip(row["samples"], (0.3, 0.7, 0.2), strict=True):
            sample["score"] = score
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = outcomes(read_run(folder).evals["reft"])
    assert [found[f"{rule}@3"].tolist() for rule in ("maj", "weighted")] == [[0, 0], [1, 0]]


@pytest.mark.parametrize(("grading", "votes"), [("paper", [1, 1]), ("robust", [0, 0])])
def test_in_the_papers_grading_only_single_letters_vote_on_choices(
    write_run: WriteRun, grading: str, votes: list[int]
) -> None:
    folder = write_run()
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({**recipe, "format": {"kind": "program", "grading": grading}})
    )
    # two crashes, which the authors' rules call the answer "none", against one right letter;
    # reranking prefers a crash
    samples = [
        {**_attempt(value, value == "c"), "score": score}
        for value, score in [("none", 0.9), ("none", 0.5), ("c", 0.1)]
    ]
    row = {
        "id": "p",
        "question": "q",
        "gold": "c",
        "greedy": _attempt("c", True),
        "samples": samples,
    }
    (folder / "eval" / "reft.jsonl").write_text(json.dumps(row) + "\n")
    found = outcomes(read_run(folder).evals["reft"])
    assert [found["maj@3"].item(), found["rerank@3"].item()] == votes


def test_an_unfinished_run_has_no_summary(write_run: WriteRun) -> None:
    with pytest.raises(DataError, match="has not finished"):
        summary_of(write_run(evaluated=["warmup"]))


def test_methods_of_a_run_must_share_their_problems(write_run: WriteRun) -> None:
    folder = write_run()
    answer(folder, "reft", [1, 0])
    with pytest.raises(DataError, match="different problems"):
        summary_of(folder)


# --- several runs ---------------------------------------------------------------------------------


def test_runs_that_differ_in_the_seed_are_one_group(write_run: WriteRun) -> None:
    folders = [write_run(f"demo-s{seed}", seed=seed) for seed in range(3)]
    (group,) = read_groups(folders)
    assert group.label == "demo"
    table = score_table([group])
    assert table.num_seeds == 3
    score = table.method("reft").greedy
    assert len(score.by_seed) == 3
    assert score.accuracy == pytest.approx(np.mean(score.by_seed))
    assert score.ci95[0] < score.accuracy < score.ci95[1]


def test_sizes_that_auto_chose_do_not_part_the_seeds(write_run: WriteRun) -> None:
    folders = [write_run("a"), write_run("b", seed=1)]
    for folder, tokens in zip(folders, (16384, 8192), strict=True):
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        recipe["model"] = {**recipe.get("model", {}), "micro_batch_tokens": tokens}
        recipe["engine"] = {"kind": "kv", "batch_size": tokens // 64}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (group,) = read_groups(folders)
    assert len(group.runs) == 2


def test_keys_that_change_no_result_do_not_part_the_seeds(write_run: WriteRun) -> None:
    folders = [write_run("a"), write_run("b", seed=1)]
    recipe = yaml.safe_load((folders[1] / "recipe.yaml").read_text())
    recipe |= {"check": {"waive": ["golds"]}, "trackers": [], "run_dir": "b"}
    (folders[1] / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for number, folder in enumerate(folders):
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        recipe["engine"] = {"kind": "vllm", "server": f"http://node-{number}:8000"}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (group,) = read_groups(folders)
    assert len(group.runs) == 2


def test_dev_evaluations_are_averaged_over_seeds(write_run: WriteRun) -> None:
    folders = [write_run("a"), write_run("b", seed=1)]
    path = folders[1] / "stages" / "reft" / "stage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "looks": 8}))
    assert score_table(read_groups(folders)).method("reft").looks == 6.5


def test_seeds_may_have_problems_of_their_own(write_run: WriteRun) -> None:
    folders = [write_run(f"demo-s{seed}", seed=seed, problem_seed=seed) for seed in range(2)]
    assert score_table(read_groups(folders)).between("reft", "sft") is not None


def test_a_repeated_seed_is_another_run_not_another_seed(write_run: WriteRun) -> None:
    folders = [write_run("a", seed=0), write_run("b", seed=1), write_run("c", seed=1)]
    groups = group_runs([read_run(folder) for folder in folders])
    assert [[run.name for run in group.runs] for group in groups] == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (("exp-seed0", "exp-seed1"), "exp"),
        (("run_s0", "run_s1"), "run"),
        (("run-s00", "run-s01"), "run"),
        (("run10", "run11"), "run10"),
        (("smollm2-135", "smollm2-135"), "smollm2-135"),  # the number is no seed
        (("tests1", "tests1"), "tests1"),
        (("a", "b"), "a"),
        (("0", "1"), "0"),
    ],
)
def test_a_group_is_called_like_its_runs_without_their_seeds(
    names: tuple[str, str], label: str, write_run: WriteRun
) -> None:
    folders = [write_run(f"folder-{seed}", seed=seed) for seed in range(2)]
    for folder, name in zip(folders, names, strict=True):
        changed = (
            (folder / "recipe.yaml").read_text().replace(f"name: {folder.name}", f"name: {name!r}")
        )
        (folder / "recipe.yaml").write_text(changed)
    (group,) = read_groups(folders)
    assert group.label == label


def test_a_summary_names_the_split(write_run: WriteRun) -> None:
    assert summary_of(write_run())["split"] == "test"


def test_a_caption_names_the_numbers_of_problems_of_all_seeds(write_run: WriteRun) -> None:
    folders = [
        write_run(f"r{seed}", seed=seed, num_problems=n, problem_seed=seed)
        for seed, n in enumerate((24, 9))
    ]
    recipe = folders[1] / "recipe.yaml"  # as if some questions of the second seed had been dropped
    recipe.write_text(recipe.read_text().replace("test: 9", "test: 24"))
    assert "on 9–24 test problems" in caption(score_table(read_groups(folders)))


def test_groups_of_one_name_are_told_apart_by_folder(write_run: WriteRun, tmp_path: Path) -> None:
    first = write_run("demo")
    second = first.rename(tmp_path / "elsewhere")
    labels = [group.label for group in read_groups([write_run("demo"), second])]
    assert labels == [str(first), str(second)]


def test_other_recipes_are_other_groups(write_run: WriteRun) -> None:
    groups = read_groups([write_run("a"), write_run("b", seed=1, methods=("warmup", "reft"))])
    table = score_table(groups)
    assert [method.label for method in table.methods] == [
        "a/warmup",
        "a/sft",
        "a/reft",
        "b/warmup",
        "b/reft",
    ]
    assert table.baseline == "a/sft"
    assert table.between("b/reft", "a/reft") is not None


def test_runs_over_different_problems_are_not_compared(write_run: WriteRun) -> None:
    folders = [write_run("a"), write_run("b", seed=1, methods=("warmup", "reft"), problem_seed=9)]
    with pytest.raises(
        DataError, match=r"^.*a and .*b: evaluated on different problems; expected [^\n]*$"
    ):
        read_groups(folders)
    begun = write_run("begun", seed=2)
    shutil.rmtree(begun / "eval")
    with pytest.raises(DataError, match=r"^.*a and .*b: evaluated on different problems"):
        read_groups([begun, *folders], finished=False)


def test_groups_of_different_sizes_are_not_compared(write_run: WriteRun) -> None:
    folders = [
        write_run("a-s0"),
        write_run("a-s1", seed=1),
        write_run("b", seed=1, methods=("warmup", "reft")),
    ]
    with pytest.raises(DataError, match=r"different numbers of seeds \(a 2, b 1\)"):
        read_groups(folders)


# --- words ----------------------------------------------------------------------------------------


def headline_of(folder: Path) -> str:
    return headline(score_table(read_groups([folder]))).title


def test_the_headline_names_the_winner(write_run: WriteRun) -> None:
    folder = write_run()
    answer(folder, "warmup", [0] * 20)
    answer(folder, "sft", [1] * 5 + [0] * 15)
    answer(folder, "reft", [1] * 15 + [0] * 5)
    assert headline_of(folder) == "ReFT beats SFT by 50.0 points"
    answer(folder, "reft", [1] * 6 + [0] * 14)
    assert headline_of(folder) == "ReFT and SFT are too close to call"
    answer(folder, "sft", [1] * 20)
    assert headline_of(folder) == "SFT stays ahead of ReFT by 70.0 points"


def test_a_starting_point_is_no_rival(write_run: WriteRun) -> None:
    folder = write_run()
    answer(folder, "warmup", [1] * 20)
    answer(folder, "sft", [1] * 5 + [0] * 15)
    answer(folder, "reft", [1] * 15 + [0] * 5)
    best = leader(score_table(read_groups([folder])))
    assert best is not None
    assert best.method == "reft"


def test_a_run_of_one_method_still_has_a_headline(write_run: WriteRun) -> None:
    folder = write_run(methods=("warmup",))
    answer(folder, "warmup", [1, 0, 0, 0])
    assert headline_of(folder) == "Warm-up solves 25.0%"


def test_labels_read_as_a_person_writes_them() -> None:
    assert display("reft") == "ReFT"
    assert display("my_method") == "my method"
    assert display("demo/reft maj@8") == "demo: ReFT maj@8"
    assert points(-0.0316) == "−3.2"


def test_groups_with_different_seeds_are_not_compared_and_a_line_says_so(
    write_run: WriteRun,
) -> None:
    folders = []
    for name, seed in (("short-0", 0), ("short-1", 1), ("long-1", 1), ("long-2", 2)):
        folder = write_run(name, seed=seed)
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        recipe["stages"]["sft"]["epochs"] = len(name)  # the recipes differ
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        folders.append(folder)
    table = score_table(read_groups(folders))
    pairs = [(found.a.partition("/")[0], found.b.partition("/")[0]) for found in table.comparisons]
    assert pairs and set(pairs) == {("short", "short"), ("long", "long")}
    line = "Groups with different seeds are not compared (seeds: short 0, 1; long 1, 2)."
    assert line in render_table(table, "text")
    assert line in report_command(folders, folders[0] / "page.html").read_text(encoding="utf-8")
    # single runs are two models that answered the same problems
    table = score_table(read_groups([folders[0], folders[3]]))
    assert table.between("long-2/sft", "short-0/sft") is not None
    assert "not compared" not in render_table(table, "text")


def test_groups_are_paired_by_seed_in_whatever_order_the_runs_are_given(
    write_run: WriteRun,
) -> None:
    # long gains 3 of 4 problems with seed 0, and loses 1 with seed 1
    right = {
        "short-0": [1, 0, 0, 0],
        "short-1": [1, 1, 1, 0],
        "long-0": [1, 1, 1, 1],
        "long-1": [1, 1, 0, 0],
    }
    folders = {}
    for name, solved in right.items():
        folder = write_run(name, methods=["sft"], num_problems=4, seed=int(name[-1]))
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        recipe["stages"]["sft"]["epochs"] = len(name)  # the recipes differ
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        answer(folder, "sft", solved)
        folders[name] = folder
    for order in (
        ["short-0", "short-1", "long-0", "long-1"],
        ["short-0", "short-1", "long-1", "long-0"],
    ):
        (found,) = score_table(read_groups([folders[name] for name in order])).comparisons
        assert (found.a, found.b) == ("long/sft", "short/sft")
        assert found.by_seed == (0.75, -0.25), order


def write_variants(
    write_run: WriteRun, right: dict[str, list[int]], asked: Callable[[str], str]
) -> list[Path]:
    """Two recipes, `short` and `long`, whose run `NAME-SEED` answers problems called `asked(…)`."""
    folders = []
    for name, solved in right.items():
        methods = ["warmup", "sft"] if name.startswith("short") else ["sft"]
        folder = write_run(name, methods=methods, num_problems=4, seed=int(name[-1]))
        for method in methods:
            answer(folder, method, solved, [[1, 2, 1]] * 4, asked=asked(name))
        folders.append(folder)
    return folders


def test_recipes_whose_seeds_have_problems_of_their_own_are_paired_by_seed(
    write_run: WriteRun, tmp_path: Path
) -> None:
    # long gains 2 of 4 problems with each seed, and the seeds' problems are 8 in all
    right = {
        "short-0": [1, 0, 0, 0],
        "short-1": [0, 0, 0, 1],
        "long-1": [0, 1, 1, 1],
        "long-0": [1, 1, 1, 0],
    }
    folders = write_variants(write_run, right, asked=lambda name: f"seed {name[-1]} ")
    table = score_table(read_groups(folders))
    found = table.between("long/sft", "short/sft")
    assert found is not None and found.by_seed == (0.5, 0.5)
    assert found.ci95 == pytest.approx(paired_interval([1, 1, 0, 0] * 2))
    score = table.method("long/sft").greedy
    assert (score.accuracy, score.ci95) == (0.75, pytest.approx(wilson(6, 8)))
    assert table.between("long/sft maj@3", "short/sft maj@3") is not None
    for layout in ("auto", "methods"):
        assert "+50.0 [" in table_command(folders, layout=layout)
    document = json.loads(table_command(folders, "json"))
    assert (document["seeds"], document["seeds_apart"]) == (2, {})
    page = report_command(folders, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "seed 0 0" in page and "seed 1 0" not in page, "answers of the first seed"
    assert write_figures(folders, tmp_path / "figures")
    with pytest.raises(DataError, match=r"^.*two recipes for [^\n]*$"):
        table_command(folders, layout="paper")


@pytest.mark.parametrize(
    ("seeds", "asked", "message"),
    [
        ((0, 1), lambda name: name, r"short-0 and \S*long-0: .* in the same order$"),
        ((2, 3), lambda name: name[-1], r"same seeds .*\(short: 0, 1; long: 2, 3\)$"),
        ((1, 2), lambda name: name[-1], r"same seeds .*\(short: 0, 1; long: 1, 2\)$"),
        ((1,), lambda name: name[-1], r"same seeds .*\(short: 0, 1; long-1: 1\)$"),
    ],
)
def test_recipes_whose_problems_cannot_be_paired_by_seed_are_refused(
    write_run: WriteRun, seeds: tuple[int, ...], asked: Callable[[str], str], message: str
) -> None:
    right = {name: [1, 0, 1, 0] for name in ("short-0", "short-1", *(f"long-{s}" for s in seeds))}
    folders = write_variants(write_run, right, asked)
    with pytest.raises(DataError, match=rf"^[^\n]*{message}"):
        read_groups(folders)


def test_an_unfinished_run_leaves_the_other_seeds_paired(write_run: WriteRun) -> None:
    right = {name: [1, 0, 1, 0] for name in ("short-0", "short-1", "long-0", "long-1")}
    folders = write_variants(write_run, right, asked=lambda name: f"seed {name[-1]} ")
    shutil.rmtree(folders[3] / "eval")
    table = score_table(read_groups(folders, finished=False))
    assert [method.label for method in table.methods] == ["short/warmup", "short/sft"]
