"""Measures how often the grader accepts the solutions in the data: published rationales, programs
derived from annotations, and the targets made for training.

    python benchmarks/gold_grading.py --data DIR

DIR holds gsm8k/{train,test}.jsonl, svamp/{svamp_nl,svamp_python_sdp,SVAMP}.json and
mathqa/{dev,test}.json. The command prints a Markdown report, and writes it and its numbers to
gold_grading.{md,json} in the folder --out; the published files are in docs/results.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reftune.datasets import Splits
from reftune.datasets.gsm8k import Gsm8k, program_of
from reftune.datasets.mathqa import Mathqa, read_options, repaired
from reftune.datasets.svamp import Svamp
from reftune.grading.formats import Format
from reftune.grading.formats.nl import Nl
from reftune.grading.formats.program import Program
from reftune.grading.golds import number_gold, read_gold
from reftune.types import Answer, Graded, Problem, Verdict

SHOWN = 5
NL, PROGRAM = Nl(), Program()

NOTES = """\
Where the grader and the data disagree:

- **GSM8K, derived programs.** Some annotations skip steps that the prose makes, or do not end in
  the answer. Either the program made from them returns a wrong number (`program_disagrees`), or no
  program can be made (`no_program`). The loader uses neither kind of problem for training.
- **SVAMP, rationales.** Three do not state the gold answer: "<9>" trucks instead of 8.9333333333,
  "<0.17>" instead of 0.165, and "<69.32%>" instead of 69.4. The loader leaves them out
  (`rationale_disagrees`).
- **SVAMP, programs.** Two give the unrounded value of a rounded gold answer: 8.99955 instead of 9,
  and 0.16665 instead of 0.165. The loader leaves them out (`program_disagrees`).
- **SVAMP, equations.** One equation does not give its row's answer. The loader leaves it out.
- **MathQA, numbers, program.** The loader leaves out 196 programs whose results differ from the
  gold answer by at most 1%, for example 54.545 instead of 55. For 18 of them, the difference is at
  most 0.01, for example 487.998 instead of 488; the paper's rules would accept these.
- **MathQA, rationales.** Two in five end in "answer c", "ans - b" or a bare letter. None of
  these counts as a marker, because a stray letter must earn nothing. Training appends "The answer
  is c" if the rationale does not end in a marker. A few rationales are forum posts ("should be d
  not c"). The rationales that are graded wrong contradict the gold letter.
- **MathQA, options.** An option's letter always counts, and so does its text, unless another option
  has the same text or the text begins with another letter ("c . 14" as the text of e).
- **GSM8K, program, paper.** A question that ends in a quotation mark breaks the docstring that the
  authors' prompt puts it in. The robust grading does not run the docstring."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Gold solutions of one kind, to be graded by one format."""

    name: str
    format: Format
    problems: Sequence[Problem]
    texts: Sequence[str | None]
    """One solution per problem; None if the data has no solution."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with gsm8k/, svamp/ and mathqa/"
    )
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for the two files")
    arguments = parser.parse_args()
    published = [measured(group) for group in published_groups(arguments.data)]
    trained = [measured(group) for group in trained_groups(arguments.data)]
    report = markdown(published, trained)
    print(report)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "gold_grading.md").write_text(report, encoding="utf-8")
    numbers = json.dumps({"published": published, "trained": trained}, indent=1, ensure_ascii=False)
    (arguments.out / "gold_grading.json").write_text(numbers + "\n", encoding="utf-8")


# --- what is graded -------------------------------------------------------------------------------


def published_groups(data: Path) -> Iterator[Group]:
    """The solutions in every row of the files, including rows that the loaders leave out."""
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (data / f"gsm8k/{split}.jsonl").open(encoding="utf-8")]
        problems = [
            number(f"{split}-{n}", row["answer"].rpartition("####")[2])
            for n, row in enumerate(rows)
        ]
        yield Group(
            name=f"GSM8K {split}, rationales",
            format=NL,
            problems=problems,
            texts=[row["answer"] for row in rows],
        )
        programs = [program_of(row["answer"].rpartition("####")[0]) for row in rows]
        yield Group(
            name=f"GSM8K {split}, derived programs",
            format=PROGRAM,
            problems=problems,
            texts=programs,
        )
    for file, format, name in (
        ("svamp_nl", NL, "rationales"),
        ("svamp_python_sdp", PROGRAM, "programs"),
    ):
        rows = read(data / f"svamp/{file}.json")
        problems = [number(row["item_id"], row["answer_value"]) for row in rows]
        yield Group(
            name=f"SVAMP train, {name}",
            format=format,
            problems=problems,
            texts=[row["answer_cot"] for row in rows],
        )
    rows = read(data / "svamp/SVAMP.json")
    problems = [number(row["ID"], row["Answer"]) for row in rows]
    equations = [f"def solution():\n    return {row['Equation']}" for row in rows]
    yield Group(name="SVAMP, equations", format=PROGRAM, problems=problems, texts=equations)
    for split in ("dev", "test"):
        rows = read(data / f"mathqa/{split}.json")
        problems = [choice(f"{split}-{n}", row) for n, row in enumerate(rows)]
        texts = [repaired(row["Rationale"]) for row in rows]
        yield Group(name=f"MathQA {split}, rationales", format=NL, problems=problems, texts=texts)
        options = [
            (letter, text, problem)
            for problem in problems
            for letter, text in zip("abcde", problem.choices, strict=False)
        ]
        golds = [
            replace(problem, answer=Answer(kind="choice", value=letter))
            for letter, _, problem in options
        ]
        lettered = [f"The answer is {letter} ) {text}" for letter, text, _ in options]
        yield Group(
            name=f"MathQA {split}, every option with its letter",
            format=NL,
            problems=golds,
            texts=lettered,
        )
        alone = [f"The answer is {text}" for _, text, _ in options]
        yield Group(
            name=f"MathQA {split}, every option without", format=NL, problems=golds, texts=alone
        )


def trained_groups(data: Path) -> Iterator[Group]:
    """The targets of the problems that the loaders keep for train and dev. Problems without a
    rationale are left out."""
    mathqa = {"train": str(data / "mathqa/dev.json"), "test": str(data / "mathqa/test.json")}
    loaders: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
        ("GSM8K", Gsm8k, {"train": str(data / "gsm8k")}),
        ("SVAMP", Svamp, {"train": str(data / "svamp")}),
        ("MathQA, choices", Mathqa, {**mathqa, "answer": "choice"}),
        ("MathQA, numbers", Mathqa, {**mathqa, "answer": "numeric"}),
    ]
    for name, loader, settings in loaders:
        for rationale, kind in (("nl", Nl), ("program", Program)):
            splits: Splits = loader(kind=name, rationale=rationale, **settings).load(seed=0)
            problems = [each for each in (*splits.train, *splits.dev) if each.rationale is not None]
            for style, grading in (("compact", "robust"), ("paper", "paper")):
                format = kind.model_validate(
                    {"kind": rationale, "style": style, "grading": grading}
                )
                texts = [format.target(problem) for problem in problems]
                yield Group(
                    name=f"{name}, {rationale}, {style}",
                    format=format,
                    problems=problems,
                    texts=texts,
                )


def read(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def number(id: str, gold: object) -> Problem:
    answer = number_gold(gold)
    assert answer is not None, f"{id}: the grader cannot read its gold {gold!r}"
    return Problem(id=id, question="", answer=answer)


def choice(id: str, row: dict[str, Any]) -> Problem:
    options = read_options(repaired(row["options"]))
    assert options is not None, f"{id}: {row['options']!r}"
    answer = read_gold(row["correct"], "choice", choices=options)
    return Problem(id=id, question=row["Problem"], answer=answer, choices=options)


# --- what came out --------------------------------------------------------------------------------


def measured(group: Group) -> dict[str, Any]:
    pairs = [
        (problem, text)
        for problem, text in zip(group.problems, group.texts, strict=True)
        if text is not None
    ]
    graded = group.format.grade([problem for problem, _ in pairs], [text for _, text in pairs])
    failures = [
        failure(problem, text, grade)
        for (problem, text), grade in zip(pairs, graded, strict=True)
        if grade.verdict is not Verdict.CORRECT
    ]
    return {
        "name": group.name,
        "rows": len(group.problems),
        "without_text": len(group.problems) - len(pairs),
        "verdicts": dict(Counter(grade.verdict.value for grade in graded)),
        "failures": failures[:SHOWN],
    }


def failure(problem: Problem, text: str, grade: Graded) -> dict[str, str]:
    return {
        "id": problem.id,
        "gold": str(problem.answer),
        "end": text[-70:],
        "verdict": grade.verdict.value,
        "reason": grade.reason,
    }


def markdown(published: Sequence[dict[str, Any]], trained: Sequence[dict[str, Any]]) -> str:
    parts = [
        "# The grader on gold answers",
        (
            "`python benchmarks/gold_grading.py --data DIR` makes this page. Rows are graded by"
            " the robust rules unless their name says `paper`."
        ),
        "## As published",
        table(published),
        NOTES,
        "## As trained on",
        (
            "These are the formats' targets for the problems that the loaders keep. The robust"
            " rules grade rows whose names end in `compact`; the paper's rules grade the others."
        ),
        table(trained),
        "## First failures of each row",
        *(failures(row) for row in (*published, *trained) if row["failures"]),
    ]
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[dict[str, Any]]) -> str:
    others = [verdict.value for verdict in Verdict if verdict is not Verdict.CORRECT]
    shown = [verdict for verdict in others if any(verdict in row["verdicts"] for row in rows)]
    head = [
        "gold",
        "rows",
        "no text",
        "correct",
        "%",
        *(verdict.replace("_", " ") for verdict in shown),
    ]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        counts, texts = row["verdicts"], row["rows"] - row["without_text"]
        correct = counts.get("correct", 0)
        share = f"{100 * correct / texts:.2f}" if texts else ""
        others_counted = [counts.get(verdict, 0) for verdict in shown]
        lines.append(
            [row["name"], row["rows"], row["without_text"], correct, share, *others_counted]
        )
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def failures(row: dict[str, Any]) -> str:
    lines = [
        f"- {f['id']}, gold {f['gold']}: …`{one_line(f['end'])}`: {f['verdict']},"
        f" {one_line(f['reason'])}"
        for f in row["failures"]
    ]
    return "\n".join([f"**{row['name']}**", "", *lines])


def one_line(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


if __name__ == "__main__":
    main()
