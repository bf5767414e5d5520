"""The vLLM engine against a server of our own making: what it asks for, and what it says when
something is wrong.

The real engine is tested by `make test-vllm`.
"""

import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from reftune.engines.vllm import SHARED_MEMORY, Vllm, request
from reftune.errors import EngineError, RecipeError
from reftune.recipe import LoraTable
from reftune.types import SamplingParams

PROMPTS = [[3, 4, 5], [6], [7, 8]]


class FakeServer(ThreadingHTTPServer):
    """Answers every prompt with its first token and the eos; reads the weights that it is given."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict]] = []
        self.models: list[torch.nn.Module] = []
        self.dtypes: list[set[torch.dtype]] = []
        self.folders: list[Path] = []
        self.status = 200


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        if self.path == "/collective_rpc" and self.server.status == 200:
            folder = Path(body["kwargs"]["weights_path"])
            self.server.folders.append(folder)
            self.server.dtypes.append(
                {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}
            )
            self.server.models.append(AutoModelForCausalLM.from_pretrained(folder))
        answer = {}
        if self.path == "/v1/completions":
            answer = {
                "choices": [
                    {
                        "token_ids": [body["prompt"][0], 1],
                        "logprobs": {"token_logprobs": [-0.5, -0.25]},
                    }
                ]
            }
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server():
    fake = FakeServer()
    thread = threading.Thread(target=fake.serve_forever)
    thread.start()
    yield fake
    fake.shutdown()
    thread.join()
    fake.server_close()


def engine(server: FakeServer, **settings) -> Vllm:
    return Vllm(server=f"http://127.0.0.1:{server.server_port}/", **settings)


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 5, "seed": 3, **changes})


def test_answers_become_completions_in_the_order_of_the_prompts(server, make_policy):
    policy = make_policy()
    completions = engine(server).generate(policy, PROMPTS, params())
    assert [c.token_ids for c in completions] == [(3, 1), (6, 1), (7, 1)]
    assert {(c.logprobs, c.finish_reason) for c in completions} == {((-0.5, -0.25), "eos")}
    assert [c.text for c in completions] == [policy.decode([t]) for t in (3, 6, 7)]


def test_each_call_hands_over_the_weights_as_they_are_before_it_samples(server, make_policy):
    policy = make_policy()
    for shift in (0.0, 1.0):
        with torch.no_grad():
            policy.model.lm_head.weight.add_(shift)
        engine(server).generate(policy, PROMPTS[:1], params())
        assert torch.equal(server.models[-1].lm_head.weight, policy.model.lm_head.weight)
    assert [path for path, _ in server.asked] == [
        "/collective_rpc",
        "/reset_prefix_cache",
        "/v1/completions",
    ] * 2
    assert not any(folder.exists() for folder in server.folders)


@pytest.mark.parametrize("family", ["llama", "llama, tied", "gpt2"])
def test_adapters_are_merged_and_the_policy_keeps_its_own(server, make_policy, family):
    policy = make_policy(family, lora=LoraTable(rank=2))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    engine(server).generate(policy, PROMPTS[:1], params())
    tokens = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        torch.testing.assert_close(
            server.models[0](tokens).logits, policy.model(tokens).logits, atol=1e-4, rtol=0
        )
    assert all(
        torch.equal(before[name], tensor) for name, tensor in policy.model.state_dict().items()
    )


def test_weights_travel_in_the_compute_dtype(server, make_policy):
    policy = make_policy(dtype=torch.bfloat16)
    engine(server).generate(policy, PROMPTS[:1], params())
    assert server.dtypes == [{torch.bfloat16}]
    assert policy.model.dtype == torch.float32


def test_weights_travel_through_the_folder_of_the_recipe(server, make_policy, tmp_path):
    engine(server, weights_dir=str(tmp_path)).generate(make_policy(), PROMPTS[:1], params())
    assert server.folders[0].parent == tmp_path and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no shared memory as a folder")
def test_weights_travel_in_memory_by_default(server, make_policy):
    engine(server).generate(make_policy(), PROMPTS[:1], params())
    assert server.folders[0].parent == SHARED_MEMORY


def test_a_seed_is_a_function_of_the_call_and_the_position(make_policy):
    policy = make_policy()
    seeds = [
        request(policy, params(seed=seed), position)["seed"]
        for seed in (3, 4)
        for position in (0, 1)
    ]
    assert len(set(seeds)) == 4 and all(0 <= seed < 2**63 for seed in seeds)
    assert request(policy, params(), 1)["seed"] == seeds[1]


def test_no_prompt_asks_for_nothing(server, make_policy):
    assert engine(server).generate(make_policy(), [], params()) == []
    assert server.asked == []


def test_a_server_that_does_not_answer_is_one_line(make_policy):
    with pytest.raises(
        EngineError,
        match=r"^engine vllm: no answer from http://127.0.0.1:9/collective_rpc: [^\n]*$",
    ):
        Vllm(server="http://127.0.0.1:9").generate(make_policy(), PROMPTS, params())


def test_a_server_that_takes_no_weights_is_told_how_to_start(server, make_policy):
    server.status = 404
    with pytest.raises(
        EngineError,
        match=r"answered 404: \{\}; expected VLLM_SERVER_DEV_MODE=1 in the server's environment",
    ):
        engine(server).generate(make_policy(), PROMPTS, params())


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_a_colocated_engine_without_vllm_says_what_to_install(make_policy):
    with pytest.raises(
        RecipeError,
        match=r"vllm is not installed; expected pip install 'reftune\[vllm\]', or engine.server",
    ):
        Vllm().generate(make_policy(), PROMPTS, params())


def test_several_training_processes_are_refused(server, make_policy, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="engine vllm: expected one training process"):
        engine(server).generate(make_policy(), PROMPTS, params())
    assert server.asked == []
