"""vLLM serves the evaluated model, by the commands on an export's card and its request for each
test problem.

Run by `make test-vllm`.
"""

import json
import subprocess
import urllib.request

import pytest
import torch
import yaml

from chat_families import run_of, save_model
from reftune import api
from reftune.datasets import load_splits
from reftune.model.encoder import Encoder
from reftune.recipe import parse_recipe
from reftune.runs.export import export_model
from reftune.types import Conversation
from vllm_servers import start

pytest.importorskip("vllm")

TIE = 1e-3
"""Difference between the two best logits at which rounding may choose either."""
NO_THOUGHT = {"style": "chat", "template_args": {"enable_thinking": False}}
ADAPTERS = {"lora": {"rank": 4}}
CASES = [
    pytest.param("llama3", {"style": "chat", "system": "Add up."}, {}, id="chat"),
    pytest.param("qwen3, not thinking", NO_THOUGHT, {}, id="template arguments"),
    pytest.param("qwen3, not thinking", NO_THOUGHT, ADAPTERS, id="adapters"),
    pytest.param("gemma", {"style": "compact", "stop": ["ti", " = "]}, {}, id="text, stop"),
    pytest.param("gemma", {"style": "paper"}, {}, id="no BOS"),
    pytest.param("gemma", {"style": "paper"}, ADAPTERS, id="adapters, no BOS"),
]


def answer(address, path, body):
    """The first choice of an answer."""
    query = urllib.request.Request(
        f"{address}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(query, timeout=600) as answered:
        return json.loads(answered.read())["choices"][0]


def text_of(choice) -> str:
    return choice["message"]["content"] if "message" in choice else choice["text"]


def spelled(text: str) -> str:
    """`text` without the partial characters that a random model writes, which servers show
    differently."""
    return "".join(character for character in text if character.isascii())


@pytest.mark.parametrize(("name", "format_keys", "model_keys"), CASES)
def test_a_server_writes_what_was_evaluated(
    tmp_path, name, format_keys, model_keys, record_property
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_model(name, tmp_path / "base", heads=1)  # of size 32, the smallest that its kernels accept
    run = run_of(tmp_path, name, format_keys=format_keys, **model_keys)
    stage = run / "stages" / "reft"
    out = export_model(run, "reft", tmp_path / "model", adapter=bool(model_keys))
    serve, curl = (out / "README.md").read_text().split("```bash\n")[1].split(" &\n", 1)
    curl = curl.split("\n```")[0]
    body = json.loads(curl.split("<<'JSON'\n")[1].removesuffix("\nJSON"))
    recipe = parse_recipe(yaml.safe_load((run / "recipe.yaml").read_text()))
    splits = load_splits(recipe)
    expected = api.evaluate(stage, splits.test).completions
    model = AutoModelForCausalLM.from_pretrained(stage, dtype=torch.float32)
    encoder = Encoder(AutoTokenizer.from_pretrained(stage), recipe.format)
    ties = 0
    server = start(serve, tmp_path / "server.txt", folder=out)
    try:
        server.wait_until_healthy()
        command = curl.replace("http://localhost:8000", server.address)
        shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        printed = text_of(json.loads(shown.stdout)["choices"][0])
        shown_text = api.evaluate(stage, splits.dev[:1]).completions[0].text
        assert spelled(printed) == spelled(shown_text)
        for problem, completion in zip(splits.test, expected, strict=True):
            prompt = recipe.format.prompt(problem)
            if isinstance(prompt, Conversation):
                turns = [{"role": t.role, "content": t.content} for t in prompt.turns]
                path, own = "chat/completions", {"messages": turns}
            else:
                path, own = "completions", {"prompt": str(prompt)}
            found = answer(server.address, path, {**body, "return_token_ids": True, **own})
            tokens = tuple(found["token_ids"])
            if tokens != completion.token_ids:
                asked = encoder.prompt(problem)
                gap = gap_at_first_difference(model, asked, tokens, completion.token_ids)
                assert gap < TIE, (found, completion)
                ties += 1
    finally:
        server.stop()
    record_property("first differences at a tie", ties)


def gap_at_first_difference(model, prompt, found, expected) -> float:
    """Difference between the two best logits at the token where two answers diverge."""
    pairs = enumerate(zip(found, expected, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), None)
    if same is None:  # one answer ends where the other continues
        return float("inf")
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *expected[:same]]])).logits[0, -1]
    best, second = logits.topk(2).values.tolist()
    return best - second
