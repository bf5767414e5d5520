"""The served model is the trained one: after SFT, ReFT and export of a tiny model of each family,
plain transformers writes the evaluated answers token for token."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import GenerationConfig

from chat_families import FAMILIES, MAX_NEW, run_of, save_model
from reftune import api
from reftune.datasets import load_splits
from reftune.errors import CheckpointError
from reftune.model.encoder import Encoder
from reftune.recipe import parse_recipe
from reftune.runs.export import export_model
from reftune.types import Conversation


@pytest.fixture(scope="module")
def trained(build_once):
    """Trains a family's model, or returns the run folder if it has done so before; the model's base
    is beside the folder."""

    def train(name: str, **keys: Any) -> Path:
        described = hashlib.sha256(json.dumps([name, keys]).encode()).hexdigest()[:12]
        return build_once(f"trained-{described}", lambda to: run_of(to, name, **keys)) / "run"

    return train


def evaluated(run: Path, method: str = "reft") -> list[str]:
    lines = (run / "eval" / f"{method}.jsonl").read_text().splitlines()
    return [json.loads(line)["greedy"]["completion"] for line in lines]


def ids_of(run: Path, method: str = "reft") -> list[tuple[int, ...]]:
    """The greedy tokens of a stage's chosen model, as reftune decodes them."""
    recipe = parse_recipe(yaml.safe_load((run / "recipe.yaml").read_text()))
    found = api.evaluate(run / "stages" / method, load_splits(recipe).test)
    assert [c.text for c in found.completions] == evaluated(run, method)
    return [c.token_ids for c in found.completions]


def asked(run: Path, tokenizer) -> list[tuple[list[int], str | list[dict[str, str]]]]:
    """Prompt ids as in training, and the prompt that a client sends."""
    recipe = parse_recipe(yaml.safe_load((run / "recipe.yaml").read_text()))
    encoder, prompts = Encoder(tokenizer, recipe.format), []
    for problem in load_splits(recipe).test:
        prompt = recipe.format.prompt(problem)
        sent: Any = prompt
        if isinstance(prompt, Conversation):
            sent = [{"role": t.role, "content": t.content} for t in prompt.turns]
        prompts.append((encoder.prompt(problem), sent))
    return prompts


def load(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )


def encoded(tokenizer, sent) -> list[int]:
    """The ids that a client encodes without knowing reftune."""
    if isinstance(sent, str):
        return tokenizer(str(sent))["input_ids"]
    return tokenizer.apply_chat_template(sent, add_generation_prompt=True)["input_ids"]


def generated(model, tokenizer, ids: list[int], stop: list[str] | None = None) -> tuple[int, ...]:
    """Tokens generated with the export's generation config, and with stop strings, which a client
    must pass."""
    out = model.generate(torch.tensor([ids]), tokenizer=tokenizer, stop_strings=stop or None)
    return tuple(out[0, len(ids) :].tolist())


STYLES = [
    *(
        pytest.param(n, {"style": "chat", "template_args": f.template_args}, id=n)
        for n, f in FAMILIES.items()
    ),
    pytest.param(
        "llama3",
        {"style": "chat", "system": "Add up.", "stop": ["ti", " = "]},
        id="llama3, system, stop",
    ),
    pytest.param("gemma", {"style": "compact"}, id="gemma, text after BOS"),
    pytest.param("gemma", {"style": "paper"}, id="gemma, the paper's prompt"),
    pytest.param(
        "qwen2.5",
        {"style": "plain", "template": "Q: {question}\nA:", "stop": ["Q:", "."]},
        id="qwen2.5, plain",
    ),
]


@pytest.mark.parametrize(("name", "format_keys"), STYLES)
def test_plain_transformers_writes_what_was_evaluated(tmp_path, trained, name, format_keys):
    run = trained(name, format_keys=format_keys)
    out = export_model(run, "reft", tmp_path / "model")
    model, tokenizer = load(out)
    sent = asked(run, tokenizer)
    assert [encoded(tokenizer, text) for _, text in sent] == [ids for ids, _ in sent]
    stop = format_keys.get("stop", [])
    assert [generated(model, tokenizer, ids, stop) for ids, _ in sent] == ids_of(run)
    from transformers import pipeline

    generate = pipeline("text-generation", str(out))
    for (_, text), expected in zip(sent, evaluated(run), strict=True) if not stop else ():
        (answer,) = generate(text if isinstance(text, list) else str(text), return_full_text=False)
        assert answer["generated_text"] == expected


@pytest.mark.parametrize(("name", "format_keys"), STYLES[3:5] + STYLES[-4:])
def test_the_card_s_python_call_works_and_its_request_is_the_prompt(
    tmp_path, trained, name, format_keys, monkeypatch, capsys
):
    run = trained(name, format_keys=format_keys)
    out = export_model(run, "reft", tmp_path / "model")
    card = (out / "README.md").read_text()
    printed = printed_by_the_card(out, monkeypatch, capsys)
    recipe = parse_recipe(yaml.safe_load((run / "recipe.yaml").read_text()))
    problem = load_splits(recipe).dev[0]
    greedy = api.evaluate(run / "stages" / "reft", [problem]).completions[0]
    assert printed.startswith(greedy.text)
    body = json.loads(card.split("<<'JSON'\n")[1].split("\nJSON")[0])
    tokenizer = load(out)[1]
    if "messages" in body:
        ids = tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, **body.get("chat_template_kwargs", {})
        )["input_ids"]
    else:
        special = body.get("add_special_tokens", True)
        ids = tokenizer.encode(body["prompt"], add_special_tokens=special)
    assert ids == Encoder(tokenizer, recipe.format).prompt(problem)
    assert (body["temperature"], body["max_tokens"]) == (0, MAX_NEW)
    assert body.get("stop", []) == recipe.format.stop
    for token in FAMILIES[name].ends:
        assert f"`{token}`" in card
    encoder = Encoder(tokenizer, recipe.format)
    end = ast.literal_eval(card.split("the end of this prompt is `` ")[1].split(" ``.")[0])
    assert end == encoder.text_of(recipe.format.prompt(problem))[-24:]


def test_an_export_stops_where_training_did_whatever_the_base_s_config_says(tmp_path):
    # the config's eos is <|endoftext|>, the tokenizer's <|im_end|>, and the generation config has
    # neither: it samples with a repetition penalty
    base = save_model("qwen2.5", tmp_path / "base", config_eos=0)
    path = base / "generation_config.json"
    path.write_text(json.dumps({"repetition_penalty": 2.0, "do_sample": True, "eos_token_id": [1]}))
    run = run_of(tmp_path, "qwen2.5", format_keys={"style": "chat"})
    out = export_model(run, "reft", tmp_path / "model")
    model, tokenizer = load(out)
    generation = json.loads((out / "generation_config.json").read_text())
    end = tokenizer.eos_token_id
    assert (
        generation["eos_token_id"]
        == [end, 0, 1]
        == json.loads((out / "config.json").read_text())["eos_token_id"]
    )
    assert generation["do_sample"] is False and "repetition_penalty" not in generation
    assert generation["max_new_tokens"] == MAX_NEW
    assert [generated(model, tokenizer, ids) for ids, _ in asked(run, tokenizer)] == ids_of(run)


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["whole", "lora"])
def test_a_model_is_rounded_before_it_is_evaluated(tmp_path, lora):
    from safetensors.torch import load_file

    save_model("llama3", tmp_path / "base", dtype="bfloat16")
    saved = {} if lora else {"save_dtype": "base"}
    run = run_of(tmp_path, "llama3", format_keys={"style": "chat"}, lora=lora, **saved)
    out = export_model(run, "reft", tmp_path / "model")
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert says(out, "stored in bfloat16 and were evaluated in float32")
    model, tokenizer = load(out)
    assert [generated(model, tokenizer, ids) for ids, _ in asked(run, tokenizer)] == ids_of(run)


def test_full_training_of_a_bf16_base_is_kept_in_fp32(tmp_path):
    save_model("llama3", tmp_path / "base", dtype="bfloat16")
    run = run_of(tmp_path, "llama3", format_keys={"style": "chat"})
    out = export_model(run, "reft", tmp_path / "model")
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def says(out: Path, *texts: str) -> bool:
    """Whether an export's card contains all `texts`."""
    card = " ".join((out / "README.md").read_text().split())
    return all(text in card for text in texts)


def changed(run: Path, to: Path, **tables: dict[str, Any]) -> Path:
    """A copy of a run whose recipe has other keys in some tables."""
    copied = Path(shutil.copytree(run, to))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    for name, keys in tables.items():
        recipe[name] = keys if "kind" in keys else recipe[name] | keys
    (copied / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return copied


def test_the_card_serves_a_model_in_the_dtype_of_its_evaluation(tmp_path, trained):
    run = trained("qwen2.5", format_keys={"style": "chat"})
    wide = export_model(run, "reft", tmp_path / "wide")
    assert says(wide, "stored in float32 and were evaluated in float32", "--dtype float32 &")
    narrow = changed(run, tmp_path / "narrow", model={"dtype": "bfloat16"})
    out = export_model(narrow, "reft", tmp_path / "model")
    assert says(out, "stored in float32 and were evaluated in bfloat16")
    assert says(out, "--dtype bfloat16 &", 'pipeline("text-generation", ".", dtype="bfloat16")')
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("data", [{"kind": "jsonl", "train": "moved.jsonl"}, {"kind": "no.py:Own"}])
@pytest.mark.parametrize(("name", "format_keys"), [STYLES[3], STYLES[-2]])
def test_an_export_whose_data_cannot_be_read_still_prompts_as_in_training(
    tmp_path, trained, name, format_keys, data, caplog, monkeypatch
):
    run = trained(name, format_keys=format_keys)
    gone = changed(run, tmp_path / "gone", dataset=data)
    monkeypatch.chdir(tmp_path)
    out = export_model(gone, "reft", tmp_path / "model")
    assert "the model card shows no prompt, because the data cannot be read: " in caplog.text
    model, tokenizer = load(out)
    assert model.generation_config.max_new_tokens == MAX_NEW
    sent = asked(run, tokenizer)
    assert [encoded(tokenizer, text) for _, text in sent] == [ids for ids, _ in sent]
    assert says(out, f"had at most {MAX_NEW} tokens. The weights are stored in float32")
    card = (out / "README.md").read_text()
    assert "exact prompt" not in card and "```bash" not in card and "1 + 1" not in card


def test_an_export_whose_format_is_gone_says_what_it_lacks(tmp_path, trained, caplog):
    run = trained("qwen2.5", format_keys={"style": "chat"})
    gone = changed(run, tmp_path / "gone", format={"kind": "no.py:Own"})
    out = export_model(gone, "reft", tmp_path / "model")
    assert "exported without the recipe's length limit and prompt settings: no.py" in caplog.text
    assert not says(out, "## Use")


@pytest.mark.parametrize("style", ["compact", "paper"])
@pytest.mark.parametrize(("name", "adds_bos"), [("gemma", True), ("gemma", False), ("phi3", False)])
def test_a_client_appends_no_eos_to_a_prompt_even_if_the_base_s_tokenizer_does(
    tmp_path, trained, name, adds_bos, style
):
    run = changed(trained(name, format_keys={"style": style}), tmp_path / "run")
    stage = run / "stages" / "reft"
    tokenizer = load(stage)[1]
    tokenizer.add_bos_token, tokenizer.add_eos_token = adds_bos, True
    tokenizer.save_pretrained(stage)
    expected = [ids for ids, _ in asked(run, load(stage)[1])]
    out = export_model(run, "reft", tmp_path / "model")
    sent = asked(run, load(out)[1])
    assert [encoded(load(out)[1], text) for _, text in sent] == expected
    assert (expected[0][0] == tokenizer.bos_token_id) == (adds_bos and style == "compact")
    assert not says(out, "no special token before it")


def test_adapters_are_loaded_on_the_base_s_revision(tmp_path, trained, monkeypatch, capsys):
    run = trained("gemma", format_keys={"style": "chat"}, lora={"rank": 4})
    for revision in ("v1.2", None):
        base = {"revision": revision}
        pinned = changed(run, tmp_path / f"run {revision}", model=base)
        out = export_model(pinned, "reft", tmp_path / f"model {revision}", adapter=True)
        for text in ("at revision `v1.2`.", " --revision v1.2 --tokenizer .", 'revision="v1.2"'):
            assert says(out, text) == (revision is not None)
    asked_for = []

    def pipeline(*args, **keys):
        asked_for.append((args, keys["revision"]))
        raise InterruptedError

    monkeypatch.setattr("transformers.pipeline", pipeline)
    with pytest.raises(InterruptedError):
        printed_by_the_card(tmp_path / "model v1.2", monkeypatch, capsys)
    assert asked_for == [(("text-generation", "."), "v1.2")]


def printed_by_the_card(out: Path, monkeypatch, capsys) -> str:
    """The output of the card's Python code, run in the folder."""
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(out)
    capsys.readouterr()
    exec(code, {})
    return capsys.readouterr().out


ADAPTED = [
    pytest.param("gemma", {"style": "chat"}, {}, "reft", id="chat"),
    pytest.param("gemma", {"style": "chat"}, {}, "sft", id="one stage"),
    pytest.param("gemma", {"style": "chat"}, {"quantize": "nf4"}, "reft", id="on 4 bits"),
    pytest.param(
        "gemma",
        {"style": "chat"},
        {"lora": {"rank": 4, "target_modules": ["embed_tokens", "q_proj", "lm_head"]}},
        "reft",
        id="on embeddings",
    ),
    pytest.param("gemma", {"style": "paper"}, {}, "reft", id="no BOS"),
    pytest.param(
        "qwen3, not thinking",
        {"style": "chat", "template_args": {"enable_thinking": False}},
        {},
        "reft",
        id="template arguments",
    ),
]


@pytest.mark.parametrize(("name", "format_keys", "model_keys", "method"), ADAPTED)
def test_adapters_alone_write_on_their_base_what_was_evaluated(
    tmp_path, trained, name, format_keys, model_keys, method, monkeypatch, capsys
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    # on some CPUs, bitsandbytes packs the weights of inference, which fails for layers this narrow
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    # the base's own generation config samples, with a repetition penalty
    run = trained(name, format_keys=format_keys, **{"lora": {"rank": 4}, **model_keys})
    out = export_model(run, method, tmp_path / "adapter", adapter=True)
    assert not (out / "model.safetensors").exists()
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized = {"quantization_config": bits} if "quantize" in model_keys else {}
    base = AutoModelForCausalLM.from_pretrained(
        run.parent / "base", dtype=torch.float32, **quantized
    )
    model, tokenizer = PeftModel.from_pretrained(base, out), AutoTokenizer.from_pretrained(out)
    model.generation_config = GenerationConfig.from_pretrained(out)
    sent = asked(run, tokenizer)
    assert [encoded(tokenizer, text) for _, text in sent] == [ids for ids, _ in sent]
    assert [generated(model, tokenizer, ids) for ids, _ in sent] == ids_of(run, method)
    with torch.no_grad():  # so that the adapters have an effect
        ids = torch.tensor([sent[0][0]])
        adapted = model(ids).logits
        with model.disable_adapter():
            assert not torch.allclose(model(ids).logits, adapted, atol=1e-3)
    recipe = parse_recipe(yaml.safe_load((run / "recipe.yaml").read_text()))
    shown = load_splits(recipe).dev[0]
    greedy = api.evaluate(run / "stages" / method, [shown]).completions[0]
    assert printed_by_the_card(out, monkeypatch, capsys).removesuffix("\n") == greedy.text
    assert ("vllm serve" in (out / "README.md").read_text()) == ("quantize" not in model_keys)


def test_adapters_of_a_run_without_lora_are_refused(tmp_path, trained):
    run = trained("qwen2.5", format_keys={"style": "chat"})
    with pytest.raises(CheckpointError, match="--adapter expects a run with"):
        export_model(run, "reft", tmp_path / "adapter", adapter=True)
    assert not (tmp_path / "adapter").exists()
