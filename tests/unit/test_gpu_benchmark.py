"""benchmarks/gpu.py runs a little of every section on the CPU, and a call continues where the last
one stopped."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(benchmark_module) -> ModuleType:
    return benchmark_module("gpu")


@pytest.fixture
def setting(gpu, tmp_path):
    model = gpu.scratch_model(tmp_path / "model", tiny=True)
    return gpu.Setting(folder=str(tmp_path), model=str(model), device="cpu", **gpu.TINY)


def test_sections_in_this_process_give_their_figures(gpu, setting):
    assert gpu.machine(setting)["matmul_flops"] > 0
    exact = gpu.correctness(setting, "float32")
    assert exact["ok"] and exact["gradient"] < 1e-6, "the CPU against itself"
    rounded = gpu.correctness(setting, "bfloat16")
    assert rounded["ok"] and rounded["gradient"] > 1e-4
    for way in ("kv", "fixed"):
        assert gpu.decoding(setting, way)["tokens_s"] > 0
    assert "missing" in gpu.decoding(setting, "graph")


def test_a_fixed_cache_decodes_the_same_tokens_as_the_engine(gpu, setting):
    import torch

    policy = gpu.load_policy(setting, "cpu", "float32")
    policy.stop = gpu.StopRule(ids=frozenset())
    with torch.no_grad():
        for matrix in (parameter for parameter in policy.parameters() if parameter.dim() > 1):
            matrix.mul_(20)  # so that positions matter
    asked = gpu.rows_of_one_length(policy, 3)
    params = gpu.SamplingParams(max_new_tokens=8, temperature=0)
    expected = [list(c.token_ids) for c in gpu.Kv(kind="kv").generate(policy, asked, params)]
    decoder = gpu.FixedDecoder(policy, torch.tensor(asked), 8, "fixed")
    decoder.model = policy.model  # in fp32, as the engine here
    assert decoder.decode().tolist() == expected
    assert decoder.decode().tolist() == expected, "a second time in the same cache"


def test_figures_are_ratios_of_the_sections(gpu, setting):
    ours = {"step_s": 2.0, "update_flops": 40.0, "score_flops": 30.0, "peak_bytes": 7}
    results = {
        "machine": {"matmul_flops": 100.0},
        "step_reftune": ours,
        "step_trl": {"step_s": 9.0},
        "correctness_float32": {"ok": True},
        "correctness_bfloat16": {"ok": False},
        "decode_fixed": {"tokens_s": 10.0},
        "decode_graph": {"tokens_s": 35.0},
    }
    document = gpu.document(results, setting)
    assert (document["ratio_to_trl"], document["update_mfu"], document["decode_graph_speedup"]) == (
        4.5,
        0.4,
        3.5,
    )
    assert document["correct"] is False, "one of the two is not"
    assert document["unfinished"] == ["step_compiled", "decode_kv", "step_plain", "decode_compile"]


@pytest.mark.slow
def test_a_call_leaves_out_what_is_there_and_an_error_is_the_sections_own(gpu, tmp_path, capsys):
    (tmp_path / "step_reftune.json").write_text('{"step_s": 1.5}')
    sections = ["machine", "step_reftune", "correctness_float32"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(
        "{}"
    )  # no model: the section that needs one fails
    gpu.main(["--folder", str(tmp_path), "--device", "cpu", "--tiny", "--only", *sections])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["step_reftune"] == {"step_s": 1.5}
    assert document["machine"]["bytes_s"] > 0
    assert "ModelError" in document["correctness_float32"]["error"] and document["correct"] is False
    assert json.loads((tmp_path / "machine.json").read_text()) == document["machine"]


def test_no_time_leaves_all_unfinished(gpu, tmp_path, capsys):
    gpu.main(["--folder", str(tmp_path), "--device", "cpu", "--tiny", "--minutes", "0"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["unfinished"] == list(gpu.SECTIONS)


@pytest.mark.slow
def test_a_whole_step_of_reftune_is_told_by_phase(gpu, setting):
    found = gpu.step_reftune(setting)
    assert found["sampled_tokens_s"] > 0 and found["update_flops"] > 0 and found["peak_bytes"] > 0
    assert found["step_s"] >= found["generate_s"] + found["score_s"] + found["update_s"]
