"""vLLM serves what was evaluated: the request that an export's card prints, for each test problem.
Run by `make test-vllm`."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
import yaml

from chat_families import run_of, save_model
from reftune import api
from reftune.model.encoder import Encoder
from reftune.recipe import parse_recipe
from reftune.runs.export import export_model
from reftune.runs.run import load_splits
from reftune.types import Conversation

pytest.importorskip("vllm")

START_S = 600
TIE = 1e-3
"""Between the two best logits, where rounding may choose the other."""


def serve(model, log):
    """The server's process and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = f"--model {model} --served-model-name tiny --port {port} --dtype float32"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options.split()]
    process = subprocess.Popen([*command, "--enforce-eager"], stdout=log, stderr=log)
    return process, f"http://127.0.0.1:{port}"


def wait_until_healthy(process, address):
    for _ in range(START_S):
        assert process.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail("the server did not start")


def asked(address, path, body):
    query = urllib.request.Request(
        f"{address}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(query, timeout=600) as answer:
        return json.loads(answer.read())["choices"][0]


@pytest.mark.parametrize(
    ("name", "format_keys"),
    [
        ("llama3", {"style": "chat", "system": "Add up."}),
        ("qwen3, not thinking", {"style": "chat", "template_args": {"enable_thinking": False}}),
        ("gemma", {"style": "compact"}),
        ("gemma", {"style": "paper"}),
    ],
)
def test_a_server_writes_what_was_evaluated(tmp_path, name, format_keys, record_property):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_model(name, tmp_path / "base", heads=1)  # of 32, the smallest that its kernels take
    run = run_of(tmp_path, name, format_keys=format_keys)
    out = export_model(run, "reft", tmp_path / "model")
    card = (out / "README.md").read_text()
    body = json.loads(card.split("<<'JSON'\n")[1].split("\nJSON")[0])
    recipe = parse_recipe(yaml.safe_load((run / "recipe.yaml").read_text()))
    problems = load_splits(recipe).test
    expected = api.evaluate(run / "stages" / "reft", problems).completions
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    encoder = Encoder(AutoTokenizer.from_pretrained(out), recipe.format)
    ties = 0
    with (tmp_path / "server.txt").open("w") as log:
        process, address = serve(out, log)
        try:
            wait_until_healthy(process, address)
            for problem, completion in zip(problems, expected, strict=True):
                prompt = recipe.format.prompt(problem)
                is_chat = isinstance(prompt, Conversation)
                turns = (
                    [{"role": t.role, "content": t.content} for t in prompt.turns]
                    if is_chat
                    else []
                )
                own = {"messages": turns} if is_chat else {"prompt": str(prompt)}
                path = "chat/completions" if is_chat else "completions"
                told = {**body, "model": "tiny", "return_token_ids": True, **own}
                found = tuple(asked(address, path, told)["token_ids"])
                if found != completion.token_ids:
                    ties += first_difference_is_a_tie(
                        model, encoder.prompt(problem), found, completion.token_ids
                    )
        finally:
            process.terminate()
            process.wait(60)
    record_property("first differences at a tie", ties)


def first_difference_is_a_tie(model, prompt, found, expected) -> bool:
    same = next(i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *expected[:same]]])).logits[0, -1]
    best, second = logits.topk(2).values.tolist()
    assert best - second < TIE, f"token {same}: {found[same]}, evaluated {expected[same]}"
    return True
