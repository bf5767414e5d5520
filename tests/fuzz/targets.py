"""The fuzzed functions, which accept bytes and raise if a promise is broken.

There are two promises: no exception but the project's own, and no CORRECT for a wrong answer. Run
as a script, with the name of a target and libFuzzer's options, this file searches for bytes that
break a promise, guided by coverage (it needs the extra `fuzz`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["reftune"]):
        pass

import torch

from reftune.datasets.jsonl import Jsonl
from reftune.datasets.reading.rows import read_rows
from reftune.errors import ReftuneError
from reftune.grading.formats.program import body_of, programs_in
from reftune.grading.paper_rules import grade_completion_paper, grade_value_paper
from reftune.grading.verdicts import grade_answer, grade_completion, grade_value
from reftune.recipe import load_recipe
from reftune.storage.checkpoint import load_latest, save_checkpoint
from reftune.types import Answer, Graded, Problem, Verdict

CHOICES = ("7", "13 apples", "none of these", "1/3")
GOLDS = (
    [
        Answer(kind="number", value=Fraction(value))
        for value in ("7", "-4", "918273645", "1/3", "1300000")
    ],
    [Answer(kind="choice", value=letter) for letter in "abcd"],
    [Answer(kind="text", value=text) for text in ("red", "blue", "green apples")],
)
"""Lists of golds of which at most one can be the answer: no two are equal within the tolerance, as
percentages or as letter and option."""
PAPER = (grade_completion_paper, grade_value_paper)
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def grader(data: bytes) -> None:
    """A completion, or a program's value, against golds of which at most one can be right."""
    text = _text(data)
    for grade in (grade_completion, grade_answer, grade_value, *PAPER):
        for golds in GOLDS:
            choices = CHOICES if golds[0].kind == "choice" else ()
            grades = [
                grade(text, Problem(id="1", question="", answer=gold, choices=choices))
                for gold in golds
            ]
            for graded in grades:
                _check_grade(graded)
            assert sum(graded.verdict is Verdict.CORRECT for graded in grades) <= 1, (
                grade.__name__,
                text,
                grades,
            )
    programs = programs_in(text)
    assert len(programs) <= 2 and all("solution" in program for program in programs)
    body_of(text)


def _text(data: bytes) -> str:
    """Bytes as text: UTF-8, with lone surrogates; other bytes stand for themselves."""
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("utf-8", "surrogateescape")


def _check_grade(graded: Graded) -> None:
    assert graded.reason and graded.reason.isprintable() and len(graded.reason) < 1000, graded
    assert (graded.value is not None) == (graded.verdict in (Verdict.CORRECT, Verdict.WRONG)), (
        graded
    )


def recipe(data: bytes) -> None:
    """A recipe file, and overrides after a line of three dashes."""
    text, *overrides = data.decode("utf-8", "surrogateescape").split("\n===\n")
    with _folder() as folder:
        path = folder / "recipe.yaml"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with contextlib.suppress(ReftuneError):
            load_recipe(path, overrides[:3])


def dataset(data: bytes) -> None:
    """A data file: the first byte chooses the ending."""
    with _folder() as folder:
        path = folder / f"train{SUFFIXES[data[0] % len(SUFFIXES) if data else 0]}"
        path.write_bytes(data[1:])
        with contextlib.suppress(ReftuneError):
            for row in read_rows(str(path), "train"):
                str(row)
        with contextlib.suppress(ReftuneError):
            Jsonl(kind="jsonl", train=str(path)).load(seed=0)


def checkpoint(data: bytes) -> None:
    """A checkpoint with one of its files replaced: the first byte chooses the file, and whether the
    checksums are adapted."""
    choice = data[0] if data else 0
    with _folder() as folder:
        newest = save_checkpoint(
            folder, step=2, tensors={"weight": torch.ones(3)}, state={"loss": 1.0}
        )
        name = ("tensors.safetensors", "state.json", "manifest.json")[choice % 3]
        (newest / name).write_bytes(data[1:])
        if choice & 128 and name != "manifest.json":
            manifest = json.loads((newest / "manifest.json").read_text())
            manifest[name] = hashlib.sha256(data[1:]).hexdigest()
            (newest / "manifest.json").write_text(json.dumps(manifest))
        with contextlib.suppress(ReftuneError):
            load_latest(folder)


@contextlib.contextmanager
def _folder():
    folder = Path(tempfile.mkdtemp(prefix="reftune-fuzz-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "grader": grader,
    "recipe": recipe,
    "dataset": dataset,
    "checkpoint": checkpoint,
}


if __name__ == "__main__":
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
