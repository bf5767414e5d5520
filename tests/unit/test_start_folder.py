"""A new run may start from an earlier run's stage folder or from adapters, and a stage may get more
steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checking import UNMEASURED, check_only
from crash import MORE_SFT, outcome, run_all
from reftune.errors import CheckpointError, ModelError, RecipeError
from reftune.model.adapters import export_adapters, read_adapters
from reftune.runs.export import export_model
from reftune.runs.models import check_stage_graph, require_trained
from reftune.runs.run import open_run
from reftune.stages.stage import Progress
from reftune.storage.files import JsonLines
from reftune.storage.run_folder import RunFolder


def test_a_stage_starts_from_the_folder_of_an_earlier_run_value_head_and_all(make_recipe, tmp_path):
    first = make_recipe(run_dir=str(tmp_path / "first"))
    with open_run(first, Progress()) as run:
        run.train("sft")
        run.train("reft")
        left = run.models.load("reft")
    source = tmp_path / "first" / "stages" / "reft"
    second = make_recipe(
        run_dir=str(tmp_path / "second"),
        stages={"sft": None, "reft": {"init": str(source), "value_prefit": 0}},
        evaluate={"stages": ["reft"]},
    )
    with open_run(second, Progress()) as run:
        start = run.models.load(str(source))
        for (name, value), (_, other) in zip(
            start.named_parameters(), left.named_parameters(), strict=True
        ):
            assert torch.equal(value, other), name
        assert float(start.value_head.weight.abs().sum()) > 0
        run.train("reft")
        assert run.is_trained("reft")


def test_a_folder_with_the_name_of_the_packaged_model_is_that_folder(
    make_recipe, tmp_path, monkeypatch
):
    with open_run(make_recipe(run_dir=str(tmp_path / "first")), Progress()) as run:
        run.train("sft")
        left = run.models.load("sft")
    monkeypatch.chdir(tmp_path)
    shutil.copytree("first/stages/sft", "smollm2-135m")
    stages = {"sft": None, "reft": {"init": "./smollm2-135m", "value_prefit": 0}}
    second = make_recipe(run_dir="second", stages=stages, evaluate={"stages": ["reft"]})
    with open_run(second, Progress()) as run:
        start = run.models.load("./smollm2-135m")
    assert torch.equal(start.base.lm_head.weight, left.base.lm_head.weight)


def test_a_folder_without_a_model_is_not_a_start(make_recipe, tmp_path):
    recipe = make_recipe(stages={"reft": {"init": str(tmp_path)}})
    with pytest.raises(RecipeError, match=r"stages.reft.init: .* is not an earlier method"):
        check_stage_graph(recipe)


def test_the_old_model_of_a_stage_that_is_being_lengthened_is_not_a_start(make_recipe, tmp_path):
    first = make_recipe(run_dir=str(tmp_path / "first"))
    with open_run(first, Progress()) as run:
        run.train("sft")
    source = run.folder.stage("sft")
    facts = source.info.read_text()
    recipe = make_recipe(
        run_dir=str(tmp_path / "second"), stages={"sft": None, "reft": {"init": str(source.path)}}
    )
    source.info.unlink()
    told = f"{source.path}: this stage is not finished; "
    with open_run(recipe, Progress()) as run, pytest.raises(RecipeError, match=told):
        run.train("reft")
    source.info.write_text(facts)
    require_trained(recipe, [str(source.path)])
    shutil.rmtree(source.checkpoints)
    source.info.unlink()  # a model folder that only looks like a stage's
    require_trained(recipe, [str(source.path)])


# --- adapters -------------------------------------------------------------------------------------


LORA = {"model": {"lora": {"rank": 4, "alpha": 12}}}


@pytest.fixture(scope="module")
def adapted(make_recipe_in, tmp_path_factory):
    """The recipe of a finished run of two stages, the second's adapters on top of the first's."""
    recipe = make_recipe_in(tmp_path_factory.mktemp("adapted"), **LORA)
    with open_run(recipe, Progress()) as run:
        run.train("sft")
        run.train("reft")
    return recipe


@pytest.fixture
def adapters(adapted, tmp_path):
    """Its adapters in PEFT's format."""
    return export_model(adapted.folder, "reft", tmp_path / "adapters", adapter=True)


def start(make_recipe, init, **changes):
    return make_recipe(stages={"sft": None, "reft": {"init": str(init)}}, **changes)


@pytest.mark.parametrize("changes", [{}, LORA], ids=["all weights", "LoRA"])
def test_a_stage_starts_from_a_folder_of_adapters(
    make_recipe, adapted, adapters, tmp_path, changes
):
    with open_run(adapted, Progress()) as run:
        expected = run.models.load("reft").model.state_dict()
        base = run.models.load("base").model.state_dict()
    recipe = start(make_recipe, adapters, run_dir=str(tmp_path / "second"), **changes)
    with open_run(recipe, Progress()) as run:
        found = run.models.load(str(adapters)).model.state_dict()
        assert any(not torch.equal(found[name], base[name]) for name in base)
        for name, value in expected.items():
            assert torch.allclose(found[name], value, atol=1e-6), name
        run.train("reft")
        assert run.is_trained("reft")


def test_adapters_of_a_run_that_began_with_adapters_hold_both(make_recipe, adapters, tmp_path):
    recipe = start(make_recipe, adapters, run_dir=str(tmp_path / "second"), **LORA)
    with open_run(recipe, Progress()) as run:
        run.train("reft")
        expected = run.models.load("reft").model.state_dict()
    both = export_model(tmp_path / "second", "reft", tmp_path / "both", adapter=True)
    assert json.loads((both / "adapter_config.json").read_text())["r"] == 3 * 4
    third = start(make_recipe, both, run_dir=str(tmp_path / "third"))
    with open_run(third, Progress()) as run:
        for name, value in run.models.load(str(both)).model.state_dict().items():
            assert torch.allclose(expected[name], value, atol=1e-6), name


def adapters_of(recipe, folder, **config):
    """A folder of random adapters of the recipe's base, in PEFT's format."""
    from peft import LoraConfig, get_peft_model

    with open_run(recipe, Progress()) as run:
        base = run.models.take("base").base
    table = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config)
    torch.manual_seed(3)
    get_peft_model(base, table).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        # o_proj has rank 2 + 4 and down_proj 5 + 4; all layers get the highest rank
        (
            {
                "r": 5,
                "lora_alpha": 8,
                "target_modules": ["o_proj", "down_proj"],
                "rank_pattern": {"o_proj": 2},
                "alpha_pattern": {"down_proj": 3},
            },
            9,
        ),
        ({"r": 1, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear"}, 5),
    ],
    ids=["own ranks and alphas", "rsLoRA"],
)
def test_adapters_are_added_up_layer_by_layer(make_recipe, tmp_path, config, rank):
    first = adapters_of(make_recipe(run_dir=str(tmp_path / "first")), tmp_path / "given", **config)
    recipe = start(make_recipe, first, run_dir=str(tmp_path / "second"), **LORA)
    with open_run(recipe, Progress()) as run:
        run.train("reft")
        expected = run.models.load("reft").model.state_dict()
    both = export_model(recipe.folder, "reft", tmp_path / "both", adapter=True)
    assert json.loads((both / "adapter_config.json").read_text())["r"] == rank
    third = start(make_recipe, both, run_dir=str(tmp_path / "third"))
    with open_run(third, Progress()) as run:
        for name, value in run.models.load(str(both)).model.state_dict().items():
            assert torch.allclose(expected[name], value, atol=1e-6), name


def test_adapters_with_other_tensors_than_lora_s_are_not_added_up(adapters):
    path = adapters / "adapter_model.safetensors"
    tensors = load_file(path)
    assert len(read_adapters(adapters)) == len(tensors) / 2
    save_file({**tensors, "o_proj.lora_magnitude_vector": torch.ones(2)}, path)  # DoRA's
    with pytest.raises(ModelError, match=r"o_proj\.lora_magnitude_vector is not a LoRA matrix"):
        read_adapters(adapters)


def test_exported_adapters_find_their_base_from_any_folder(adapted, tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path, recorded in (
        ("models/mine", str(tmp_path / "models" / "mine")),
        ("owner/model", "owner/model"),
        (None, None),
    ):
        export_adapters(RunFolder(adapted.folder), "reft", {**LORA["model"], "path": path}, Path())
        config = json.loads(Path("adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == recorded


def test_adapters_on_top_of_another_run_s_model_are_not_exported(make_recipe, adapted, tmp_path):
    # the other run's warm-up must not be taken for this one's
    recipe = start(make_recipe, adapted.folder / "stages" / "reft", **LORA)
    with open_run(recipe, Progress()) as run:
        run.train("reft")
    with pytest.raises(CheckpointError, match=r"stages/reft: not a stage of .*; with --adapter"):
        export_model(recipe.folder, "reft", tmp_path / "model", adapter=True)


def in_4_bits(**lora):
    return {"model": {"lora": {"rank": 8, "alpha": 8, **lora}, "quantize": "nf4"}}


def test_over_a_base_in_4_bits_the_adapters_of_a_folder_are_trained_on(
    make_recipe, adapters, tmp_path
):
    # both stages' adapters of rank 4 side by side: rank 8, alpha / rank = 1
    given = load_file(adapters / "adapter_model.safetensors")
    recipe = start(make_recipe, adapters, run_dir=str(tmp_path / "second"), **in_4_bits())
    with open_run(recipe, Progress()) as run:
        policy = run.models.load(str(adapters), trained=True)
        own = {name.replace(".default", ""): p for name, p in policy._adapters().items()}
        assert own.keys() == given.keys()
        assert all(torch.equal(given[name], own[name]) for name in given)
        run.train("reft")
        assert not all(torch.equal(given[name], own[name]) for name in given)
        run.evaluation.answer("reft")
    steps = JsonLines(recipe.folder / "metrics.jsonl").rows()
    first = next(row for row in steps if row["step"] == 1)
    assert abs(first["kl/reference"]) < 1e-4  # the reference also has the folder's adapters
    trained = export_model(tmp_path / "second", "reft", tmp_path / "trained", adapter=True)
    found = load_file(trained / "adapter_model.safetensors")
    assert {name: t.shape for name, t in found.items()} == {n: t.shape for n, t in given.items()}
    assert {adapter.scaling for adapter in read_adapters(trained).values()} == {1}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"alpha": 16}, r"alpha / rank = 1\.0; expected 2\.0, as in model\.lora"),
        ({"rank": 4, "alpha": 4}, r"not the adapters of this recipe: .*size \(8, .*expected \(4,"),
        (
            {"target_modules": ["o_proj"]},
            "not the adapters of this recipe: .* in the file or in the model, but not in both",
        ),
    ],
)
def test_over_a_base_in_4_bits_other_adapters_are_refused(
    make_recipe, adapters, tmp_path, lora, message
):
    recipe = start(make_recipe, adapters, run_dir=str(tmp_path / "second"), **in_4_bits(**lora))
    with open_run(recipe, Progress()) as run, pytest.raises(ModelError, match=message):
        run.models.load(str(adapters), trained=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"o_proj": 8}}, r"= 1\.0, 2\.0; expected 1"),
        ({"r": 1, "lora_alpha": 1}, r"size \(1, .*expected \(8, "),
    ],
    ids=["another scaling in one layer", "rank 1, which could be broadcast"],
)
def test_over_a_base_in_4_bits_adapters_that_differ_in_part_are_refused(
    make_recipe, tmp_path, config, message
):
    given = adapters_of(
        make_recipe(run_dir=str(tmp_path / "first")),
        tmp_path / "given",
        target_modules="all-linear",
        **config,
    )
    recipe = start(make_recipe, given, run_dir=str(tmp_path / "second"), **in_4_bits())
    with open_run(recipe, Progress()) as run, pytest.raises(ModelError, match=message):
        run.models.load(str(given), trained=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3; expected LORA"),
        (
            {"target_modules": ["o_proj"]},
            "not the adapters of this model: .* in the file or in the model, but not in both",
        ),
        ({"r": 3}, "not the adapters of this model"),
        ({"r": "8"}, "not the adapters of this model"),
        ({"alpha_pattern": ["o_proj"]}, "not the adapters of this model"),
    ],
)
def test_adapters_of_another_model_are_refused(make_recipe, adapters, tmp_path, change, message):
    path = adapters / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    recipe = start(make_recipe, adapters, run_dir=str(tmp_path / "second"))
    with (
        open_run(recipe, Progress()) as run,
        pytest.raises(ModelError, match=f"adapters: .*{message}"),
    ):
        run.models.load(str(adapters))


def test_the_adapters_of_another_base_are_refused_by_its_name(make_recipe, adapters, tmp_path):
    from reftune.model.adapters import with_adapters

    path = adapters / "adapter_config.json"
    told = {"base_model_name_or_path": "owner/model-b"}
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    with pytest.raises(
        ModelError, match=r"adapters of owner/model-b; expected those of model.path"
    ):
        with_adapters(None, adapters, base="models/model-a")


@pytest.mark.parametrize("config", [[], ["LORA"], "LORA", 5, None])
def test_an_adapter_config_that_is_not_an_object_is_refused(adapters, config):
    (adapters / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"cannot be read: adapter_config\.json holds no JSON obj"):
        read_adapters(adapters)


def test_a_config_with_a_value_of_a_wrong_type_is_refused(adapters):
    path = adapters / "adapter_config.json"
    good = json.loads(path.read_text())
    for change, message in [
        ({"alpha_pattern": ["o_proj"]}, "adapters cannot be read"),
        ({"base_model_name_or_path": 5}, "adapters of 5; expected those of model.path models/a"),
    ]:
        path.write_text(json.dumps(good | change))
        with pytest.raises(ModelError, match=message):
            read_adapters(adapters, base="models/a")


# --- what check says of the start -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("rise", "line"),
    [
        (0.2, "still rising by 5.0 points per evaluation (+20.0 ± 6.0 points over 4 evaluations)"),
        (0.04, "no longer rising (+4.0 ± 6.0 points over 4 evaluations): RL can take over"),
    ],
)
@pytest.mark.parametrize("is_own", [True, False], ids=["own stage", "stage folder"])
def test_check_reports_whether_the_stage_that_rl_starts_from_was_finished(
    make_recipe, tmp_path, monkeypatch, rise, line, is_own
):
    first = make_recipe(run_dir=str(tmp_path / "first"), stages={"reft": {"init": "sft"}})
    with open_run(first, Progress()) as run:
        run.train("sft")
        step = json.loads(run.folder.stage("sft").info.read_text())["chosen_step"]
        look = {"dev/accuracy": 0.5, "dev/rise": rise, "dev/rise_margin": 0.06}
        JsonLines(run.folder.metrics).append({"stage": "sft", "step": step, "time": 0, **look})
    monkeypatch.chdir(tmp_path)  # a relative path names the stage too
    second = first if is_own else start(make_recipe, "first/stages/sft", run_dir="second")
    report = check_only(second, UNMEASURED)
    (found,) = (each for each in report.findings if each.name == "accuracy")
    assert "RL needs about 20%" in found.message
    assert line in found.message


# --- more steps -----------------------------------------------------------------------------------


def test_a_finished_stage_with_more_steps_goes_on_to_the_bits_of_a_longer_one(
    make_recipe, tmp_path
):
    # both have a constant rate and dev evaluations after steps 2, 4, 6
    short = {"run_dir": str(tmp_path / "run"), "stages": {"reft": {"save_every_s": 1000}}}
    run_all(make_recipe(**short))
    longer = make_recipe(**{**short, "stages": {"reft": {"save_every_s": 1000, "steps": 6}}})
    (tmp_path / "run/summary.json").write_text("{}")
    with open_run(longer, Progress()) as run:
        assert not run.folder.summary.exists(), "it would state the accuracy of the shorter run"
    run_all(longer)
    run_all(longer)  # nothing is left to do
    straight = make_recipe(
        run_dir=str(tmp_path / "straight"), stages={"reft": {"save_every_s": 1000, "steps": 6}}
    )
    run_all(straight)
    shutil.rmtree(tmp_path / "run/eval.1")  # the evaluation of the shorter run
    assert outcome(tmp_path / "run") == outcome(tmp_path / "straight")
    assert json.loads((tmp_path / "run/stages/reft/stage.json").read_text())["steps"] == 6


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        ({}, 0),
        ({"schedule": "linear"}, 1),
        ({"schedule": "cosine", "warmup": 0.25}, 1),
        ({"warmup": 0.25}, 1),
    ],
)
def test_more_steps_under_a_rate_that_depends_on_the_length_are_noted(
    make_recipe, tmp_path, optimizer, told
):
    reft = {"optimizer": optimizer}
    with open_run(make_recipe(stages={"reft": reft}), Progress()) as run:
        (run.folder.stage("reft").checkpoints / "step-000002").mkdir(parents=True)
    progress, notes = Progress(), []
    progress.note = notes.append
    with open_run(make_recipe(stages={"reft": {**reft, "steps": 6}}), progress):
        pass
    assert [note.partition(":")[0] for note in notes] == ["stages.reft"] * told


def test_a_self_training_stage_with_more_epochs_goes_on_to_the_bits_of_a_longer_one(
    make_recipe, tmp_path
):
    def make(folder, epochs):
        optimizer = {"learning_rate": 0.05}
        sft = {"epochs": epochs, "batch_size": 16, "save_every_s": 0, "optimizer": optimizer}
        offline = {"kind": "self_train", "sampler": "base", "samples": 3, "sft": sft}
        return make_recipe(
            run_dir=str(tmp_path / folder),
            stages={"sft": None, "reft": None, "offline": offline},
            evaluate={"stages": None},
        )

    for epochs in (1, 2):
        run_all(make("run", epochs))
    run_all(make("straight", 2))
    shutil.rmtree(tmp_path / "run/eval.1")  # the evaluation of the shorter run
    assert outcome(tmp_path / "run") == outcome(tmp_path / "straight")
    with pytest.raises(RecipeError, match=r"stages.offline.sft.epochs was 2.0, now 1.0"):
        run_all(make("run", 1))


def test_a_supervised_stage_is_given_more_epochs_before_the_next_one_began(make_recipe, tmp_path):
    with open_run(make_recipe(), Progress()) as run:
        run.train("sft")
    with open_run(make_recipe(stages={"sft": {"epochs": 3}}), Progress()) as run:
        assert not run.is_trained("sft")
        run.train("sft")
        assert json.loads(run.folder.stage("sft").info.read_text())["steps"] == 12
        run.train("reft")
    with pytest.raises(
        RecipeError, match=r"stages.sft: cannot continue, because the later stage reft has begun"
    ):
        run_all(make_recipe(stages={"sft": {"epochs": 4}}))


def test_a_finished_run_takes_another_stage_with_the_bits_of_a_run_that_had_it_from_the_start(
    make_recipe, tmp_path
):
    def make(folder, **stages):
        return make_recipe(run_dir=str(tmp_path / folder), stages=stages)

    run_all(make("run"))
    (tmp_path / "run/summary.json").write_text("{}")
    finished = {path: path.read_bytes() for path in (tmp_path / "run/eval").glob("*.jsonl")}
    run_all(make("run", more_sft=MORE_SFT))
    assert not (tmp_path / "run/summary.json").exists(), "it would lack the new method"
    run_all(make("straight", more_sft=MORE_SFT))
    assert len(outcome(tmp_path / "run")) > len(finished) > 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "straight")
    assert {path: path.read_bytes() for path in finished} == finished
    assert "more_sft" in (tmp_path / "run/recipe.yaml").read_text()
    with pytest.raises(RecipeError, match=r"belongs to another recipe: stages.more_sft was"):
        run_all(make("run"))


def test_a_finished_run_is_evaluated_on_stages_that_it_left_out(make_recipe):
    run_all(make_recipe(evaluate={"stages": ["reft"]}))
    recipe = make_recipe(evaluate={"stages": ["sft", "reft"]})
    assert not (recipe.folder / "eval/sft.jsonl").exists()
    run_all(recipe)
    assert (recipe.folder / "eval/sft.jsonl").exists()


def test_fewer_steps_or_another_change_is_another_recipe(make_recipe):
    run_all(make_recipe())
    for change in {"steps": 2}, {"steps": 6, "prompts": 2}, {"steps": 6, "samples": 4}:
        with pytest.raises(RecipeError, match=r"belongs to another recipe: stages.reft"):
            run_all(make_recipe(stages={"reft": change}))


def test_a_stage_without_a_checkpoint_of_its_end_cannot_continue(make_recipe, tmp_path):
    recipe = make_recipe()
    run_all(recipe)
    shutil.rmtree(recipe.folder / "stages/reft/checkpoints/step-000004")
    with pytest.raises(RecipeError, match=r"without its final checkpoint, step 4; .* init: "):
        run_all(make_recipe(stages={"reft": {"steps": 6}}))
