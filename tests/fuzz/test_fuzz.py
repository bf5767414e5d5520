"""Mutates real inputs, with Hypothesis here and guided by coverage in `make trust`; cases found
stay as files in found/."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import save
from torch import ones

from fuzz.targets import SUFFIXES, TARGETS
from reftune.recipe import known_kinds

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOUND = sorted((HERE / "found").glob("*/*"))
HANG_S = 10
"""Most seconds for an input on a busy machine."""
FUZZING_S = 60
"""Seconds for each target, guided by coverage."""

MOST = {"grader": 300, "dataset": 200, "recipe": 60, "checkpoint": 100}
QUICK = settings(deadline=HANG_S * 1000, derandomize=True, suppress_health_check=list(HealthCheck))
TOKENS = [
    b"\n",
    b'"',
    b"[" * 2000,
    b"9" * 5000,
    b"1e999",
    b"NaN",
    b"\xff",
    b"\x00",
    b"null",
    b"&a *a",
    b"-",
    b": ",
]

ROWS = [
    '{"question": "2 + 2?", "answer": "4", "rationale": "2 + 2 = 4", "id": "a"}',
    '{"question": "Which?", "answer": "b", "choices": ["1", "2"], "id": 7, "subject": null}',
    '{"question": "2 + 2?", "answer": 4.0, "rationale": null, "extra": [1, {"x": true}]}',
]
CSV = 'question,answer,choices\n"How many, all in all?",4,\nWhich?,b,"[""1"", ""2""]"\n'


def seeds(target: str) -> list[bytes]:
    """Inputs that the target accepts, to start from."""
    if target == "grader":
        lines = (
            (HERE.parent / "unit" / "grader_table.jsonl").read_text(encoding="utf-8").splitlines()
        )
        return [json.loads(line)["completion"].encode("utf-8", "surrogatepass") for line in lines]
    if target == "recipe":
        files = sorted((ROOT / "recipes").rglob("*.yaml"))
        small = (
            b"name: x\nmodel: {path: m}\ndataset: word_problems\nformat: nl\nstages: {sft: {kind:"
            b" sft}}\n"
        )
        return [
            small,
            small + b"\n===\nseed=3\n===\nstages.sft.epochs=2",
            *(path.read_bytes() for path in files),
        ]
    if target == "dataset":
        jsonl, listed = "\n".join(ROWS), f"[{','.join(ROWS)}]"
        texts = {".jsonl": jsonl, ".json": listed, ".csv": CSV, ".tsv": CSV.replace(",", "\t")}
        files = {suffix: text.encode() for suffix, text in texts.items()} | {".parquet": _parquet()}
        return [bytes([SUFFIXES.index(suffix)]) + content for suffix, content in files.items()]
    tensors, state = save({"weight": ones(3)}), b'{"step": 2, "loss": 1.0}'
    return [
        bytes([0]) + tensors,
        bytes([129]) + tensors,
        bytes([1]) + state,
        bytes([130]) + state,
        bytes([2]) + b"{}",
    ]


def _parquet() -> bytes:
    buffer = io.BytesIO()
    columns = {
        "question": ["2 + 2?", "3 + 3?"],
        "answer": ["4", "6"],
        "choices": [["4", "5"], None],
    }
    parquet.write_table(pyarrow.table(columns), buffer, compression="none")
    return buffer.getvalue()


@st.composite
def mutated(draw: st.DrawFn, start: list[bytes]) -> bytes:
    """A seed with a few stretches that are cut, doubled, overwritten, or taken from another
    seed."""
    data = draw(st.sampled_from(start))
    for _ in range(draw(st.integers(0, 4))):
        first, second = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        second = min(second, first + 40)
        other = draw(st.sampled_from(start))
        at = draw(st.integers(0, len(other)))
        new = draw(
            st.one_of(
                st.just(b""),
                st.just(data[first:second] * 3),
                st.just(other[at : at + 40]),
                st.binary(max_size=6),
                st.text(max_size=4).map(str.encode),
                st.sampled_from(TOKENS),
            )
        )
        data = data[:first] + new + data[second:]
    return data


@pytest.mark.parametrize("target", TARGETS)
def test_mutated_inputs_break_no_promise(target: str, record_property) -> None:
    tried = 0

    @settings(QUICK, max_examples=MOST[target])
    @given(mutated(seeds(target)))
    def check(data: bytes) -> None:
        nonlocal tried
        tried += 1
        TARGETS[target](data)

    check()
    record_property("tried", tried)


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_once_breaks_no_promise(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_inputs_guided_by_coverage_break_no_promise(
    target: str, tmp_path: Path, record_property
) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("needs the extra fuzz: pip install 'reftune[fuzz]'")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds(target)):
        (corpus / str(number)).write_bytes(data)
    command = [
        sys.executable,
        str(HERE / "targets.py"),
        target,
        f"-max_total_time={FUZZING_S}",
        f"-timeout={HANG_S}",
        "-max_len=20000",
        "-rss_limit_mb=4096",
        f"-artifact_prefix={tmp_path}/found-",
        str(corpus),
    ]
    ended = subprocess.run(
        command, capture_output=True, text=True, errors="replace", cwd=ROOT, check=False
    )
    runs = re.search(r"Done (\d+) runs", ended.stderr)
    record_property("tried", int(runs[1]) if runs is not None else 1)
    found = [path.read_bytes() for path in tmp_path.glob("found-*")]
    assert ended.returncode == 0, f"{found}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"


def test_the_seeds_are_accepted_before_they_are_mutated() -> None:
    assert len(seeds("grader")) >= 300
    assert set(known_kinds("datasets")) > {"jsonl"}
    for target, run in TARGETS.items():
        for data in seeds(target)[:20]:
            run(data)
