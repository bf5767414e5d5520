"""Keys set to `auto` are chosen when a run begins, written into its recipe, and kept when it
resumes."""

from __future__ import annotations

import pytest
import torch
import yaml

from reftune.engines.kv import Kv
from reftune.errors import RecipeError
from reftune.recipe import ModelTable
from reftune.runs import auto
from reftune.runs.auto import fastest_dtype, product_rates
from reftune.runs.run import open_run
from reftune.stages.stage import Progress

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """A machine with given matmul rates by dtype, in any unit, and the matmuls that were timed."""
    timed: list[int] = []

    def make(float32: float, bfloat16: float) -> list[int]:
        def rates(device, shape, *, seconds):
            timed.append(shape[0])
            return {"float32": float32, "bfloat16": bfloat16}

        monkeypatch.setattr(auto, "product_rates", rates)
        fastest_dtype.cache_clear()
        return timed

    yield make
    fastest_dtype.cache_clear()


@pytest.mark.parametrize(
    ("float32", "bfloat16", "chosen"),
    [(100, 800, "bfloat16"), (100, 100, "bfloat16"), (100, 90, "float32"), (150, 1.2, "float32")],
)
def test_the_faster_dtype_of_a_cpu_is_chosen(machine, float32, bfloat16, chosen):
    machine(float32, bfloat16)
    assert fastest_dtype(CPU) == chosen


def test_a_cpu_that_emulates_bf16_is_not_asked_for_large_products(machine):
    assert fastest_dtype(CPU) and machine(150, 1.2) == []
    fastest_dtype(CPU)
    assert machine(150, 1.2) == [256]


@pytest.mark.parametrize(("native", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_that_only_emulates_bf16_computes_in_fp32(monkeypatch, native, chosen):
    asked = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    fastest_dtype.cache_clear()
    assert (fastest_dtype(torch.device("cuda", 0)), asked) == (chosen, [False])
    fastest_dtype.cache_clear()


def test_products_are_measured_in_both_dtypes():
    rates = product_rates(CPU, (32, 64, 16), seconds=0.01)
    assert set(rates) == {"float32", "bfloat16"}
    assert all(1e6 < rate < 1e14 for rate in rates.values())


def stored(recipe) -> dict:
    return yaml.safe_load((recipe.folder / "recipe.yaml").read_text())


def test_a_run_writes_the_dtype_it_chose_and_keeps_it_on_another_machine(make_recipe, machine):
    assert ModelTable(path="x").dtype == "auto", "the default"
    recipe = make_recipe(model={"dtype": "auto"}, stages={"reft": None})
    machine(100, 800)
    with open_run(recipe, Progress()) as run:
        assert run.models.load("base").compute_dtype == torch.bfloat16
    assert stored(recipe)["model"]["dtype"] == "bfloat16"
    machine(800, 100)
    with open_run(recipe, Progress()) as run:
        assert run.models.load("base").compute_dtype == torch.bfloat16
    assert stored(recipe)["model"]["dtype"] == "bfloat16"
    fresh = make_recipe(
        model={"dtype": "auto"}, stages={"reft": None}, run_dir=f"{recipe.folder}-other"
    )
    with open_run(fresh, Progress()) as run:
        assert run.models.load("base").compute_dtype == torch.float32


def test_a_dtype_in_the_recipe_must_be_that_of_the_run(make_recipe, machine):
    machine(100, 800)
    with open_run(make_recipe(model={"dtype": "auto"}), Progress()):
        pass
    with open_run(make_recipe(model={"dtype": "bfloat16"}), Progress()):
        pass
    with (
        pytest.raises(RecipeError, match=r"model\.dtype was 'bfloat16', now 'float32'"),
        open_run(make_recipe(model={"dtype": "float32"}), Progress()),
    ):
        pass


def test_a_run_writes_the_sizes_it_chose_and_keeps_them_when_the_memory_is_another(
    make_recipe, monkeypatch
):
    monkeypatch.setattr(auto, "_is_tiny", lambda *args: False)
    auto_sizes = {
        "model": {"micro_batch_tokens": "auto"},
        "engine": {"kind": "kv", "batch_size": "auto"},
        "stages": {"sft": None, "reft": {"init": "base"}},
        "evaluate": {"stages": None},
    }
    assert ModelTable(path="x").micro_batch_tokens == Kv().batch_size == "auto", "the defaults"
    recipe = make_recipe(**auto_sizes)
    monkeypatch.setattr(auto, "total_bytes", lambda device: 1e12)
    with open_run(recipe, Progress()) as run:
        assert run.recipe.model.max_tokens == 16384 and run.recipe.engine.rows == 256
    found = stored(recipe)
    assert found["model"]["micro_batch_tokens"] == 16384 and found["engine"]["batch_size"] == 256
    monkeypatch.setattr(auto, "total_bytes", lambda device: 1e3)
    with open_run(recipe, Progress()) as run:
        assert run.recipe.model.max_tokens == 16384
    assert stored(recipe) == found
    other = make_recipe(**auto_sizes, run_dir=f"{recipe.folder}-other")
    with open_run(other, Progress()) as run:
        assert (run.recipe.model.max_tokens, run.recipe.engine.rows) == (512, 1)


def test_tiny_models_are_not_traced(make_recipe, monkeypatch):
    monkeypatch.setattr(auto, "outline_of", lambda *args, **kwargs: pytest.fail("traced"))
    recipe = make_recipe(model={"micro_batch_tokens": "auto"})
    assert auto.settled(recipe).model.micro_batch_tokens == 16384
