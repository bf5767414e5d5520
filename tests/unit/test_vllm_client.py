"""The vLLM engine against a fake server: its requests, and its errors.

The real engine is tested by `make test-vllm`.
"""

import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from crash import assert_same_outcome, outcome
from reftune.engines import traffic
from reftune.engines.vllm import (
    SHARED_MEMORY,
    Colocated,
    Vllm,
    longest_sequence,
    own_servers,
    request,
    stop_engines,
)
from reftune.errors import EngineError, RecipeError
from reftune.processes.world import World, inhabited
from reftune.recipe import LoraTable
from reftune.runs.run import open_run
from reftune.stages.loop import Interrupted
from reftune.stages.stage import Progress
from reftune.types import SamplingParams
from stub_vllm import StubVllm, choices, stub_vllm

STAGES = {"sft": None, "reft": {"init": "base", "steps": 4, "save_every_s": 1000.0}}
PROMPTS = [[3, 4, 5], [6], [7, 8]]


@pytest.fixture
def server():
    with stub_vllm() as (stub,):
        yield stub


def engine(*servers: StubVllm, **settings) -> Vllm:
    addresses = [f"{server.address}/" for server in servers]
    return Vllm(server=addresses if len(servers) > 1 else addresses[0], **settings)


def sampled(completions):
    return [(c.token_ids, c.logprobs) for c in completions]


def expected(policy, prompts, params, first=0):
    """The stub's answers to separate requests for each prompt."""
    found = []
    for position, prompt in enumerate(prompts, first):
        (choice,) = choices({"prompt": prompt, **request(policy, params, position)})
        found.append((tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"])))
    return found


def perturb(policy):
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.normal_()


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 5, "seed": 3, **changes})


def test_answers_become_completions_in_the_order_of_the_prompts(server, make_policy):
    policy = make_policy()
    completions = engine(server).generate(policy, PROMPTS, params(first_position=4))
    assert sampled(completions) == expected(policy, PROMPTS, params(), first=4)
    assert {c.finish_reason for c in completions} == {"eos"}
    assert [c.text for c in completions] == [policy.decode(c.token_ids) for c in completions]


def test_the_samples_of_a_problem_are_one_request_and_as_if_each_were_alone(server, make_policy):
    policy, prompts = make_policy(), [[3, 4]] * 3 + [[5]] + [[3, 4]] * 2
    traffic.clear()
    completions = engine(server).generate(policy, prompts, params())
    asked = server.requests("/v1/completions")
    assert sorted((body["prompt"], body["n"]) for body in asked) == [
        ([3, 4], 2),
        ([3, 4], 3),
        ([5], 1),
    ]
    assert traffic["requests"] == 3
    assert sampled(completions) == expected(policy, prompts, params())
    assert len(set(sampled(completions))) == 6  # each with a seed of its own


def test_a_problem_whose_samples_are_split_over_two_calls_draws_the_same(server, make_policy):
    policy, prompts = make_policy(), [[3, 4]] * 4
    whole = engine(server).generate(policy, prompts, params())
    parts = [
        engine(server).generate(policy, prompts[part], params(first_position=part.start))
        for part in (slice(0, 1), slice(1, 4))
    ]
    assert [*parts[0], *parts[1]] == whole


def test_greedy_prompts_share_a_request(server, make_policy):
    policy, greedy = make_policy(), params(temperature=0.0)
    completions = engine(server, batch_size=2).generate(policy, PROMPTS, greedy)
    asked = [body["prompt"] for body in server.requests("/v1/completions")]
    assert sorted(asked, key=len) == [[[7, 8]], [[3, 4, 5], [6]]]
    assert len(completions) == 3


def test_several_servers_are_given_the_weights_and_share_the_prompts(make_policy):
    policy = make_policy()
    with stub_vllm(2) as stubs:
        completions = engine(*stubs).generate(policy, PROMPTS, params())
        assert sampled(completions) == expected(policy, PROMPTS, params())
        assert [len(stub.requests("/v1/completions")) for stub in stubs] == [2, 1]
        assert stubs[0].folders == stubs[1].folders and len(stubs[0].folders) == 1


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/", "//v1//"])
def test_the_address_of_a_server_may_be_that_of_its_openai_api(server, make_policy, ending):
    policy = make_policy()
    completions = Vllm(server=f"{server.address}{ending}").generate(policy, PROMPTS, params())
    assert sampled(completions) == expected(policy, PROMPTS, params())
    assert server.requests("/v1/completions")


@pytest.mark.parametrize(
    ("servers", "size", "expected"),
    [
        ("ab", 1, ["ab"]),
        ("ab", 2, ["a", "b"]),
        ("ab", 4, ["a", "b", "a", "b"]),
        ("abcde", 2, ["ace", "bd"]),
        ("a", 3, ["a", "a", "a"]),
    ],
)
def test_every_server_has_a_process_and_every_process_a_server(servers, size, expected):
    found = []
    for rank in range(size):
        with inhabited(World(rank=rank, size=size)):
            found.append("".join(own_servers(servers)))
    assert found == expected


def test_each_call_hands_over_the_weights_as_they_are_before_it_samples(server, make_policy):
    policy = make_policy()
    for shift in (0.0, 1.0):
        with torch.no_grad():
            policy.model.lm_head.weight.add_(shift)
        traffic.clear()
        engine(server).generate(policy, PROMPTS[:1], params())
        given = server.weights[-1]
        assert torch.equal(given["lm_head.weight"], policy.model.lm_head.weight)
        size = sum(tensor.nbytes for tensor in given.values())
        assert size < traffic["sync_bytes"] < size + 20_000  # plus the config
    assert [path for path, _ in server.asked] == [
        "/collective_rpc",
        "/reset_prefix_cache",
        "/v1/completions",
    ] * 2
    assert not any(folder.exists() for folder in server.folders)


@pytest.mark.parametrize("family", ["llama", "llama, tied", "gpt2"])
def test_with_lora_the_base_goes_once_and_then_the_adapter_alone(
    server, make_policy, family, monkeypatch, tmp_path
):
    policy = make_policy(family, lora=LoraTable(rank=2))
    read = {}

    def take(folder):  # as vLLM would, while the folder is there
        if (folder / "adapter_config.json").is_file():
            read["model"] = PeftModel.from_pretrained(read["base"], folder)
        else:
            read["base"] = AutoModelForCausalLM.from_pretrained(folder)
        read.setdefault("took", []).append(sorted(path.suffix for path in folder.iterdir()))

    monkeypatch.setattr(server, "take", take)
    tokens, own = torch.tensor([PROMPTS[0]]), engine(server)
    for _ in range(2):
        perturb(policy)
        own.generate(policy, PROMPTS[:1], params())
        with torch.no_grad():
            found = read["model"](tokens).logits
            read["base"] = read["model"].unload()
            torch.testing.assert_close(found, policy.model(tokens).logits, atol=1e-4, rtol=1e-4)
    assert [path for path, _ in server.asked] == [
        "/collective_rpc",
        "/reset_prefix_cache",
        "/v1/load_lora_adapter",
        "/v1/completions",
        "/v1/unload_lora_adapter",
        "/v1/load_lora_adapter",
        "/v1/completions",
    ]
    names = [body["lora_name"] for body in server.requests("/v1/load_lora_adapter")]
    assert len(set(names)) == 2  # vLLM caches by name
    assert [body["model"] for body in server.requests("/v1/completions")] == names


def test_another_policy_or_a_server_that_was_started_again_is_given_the_base(server, make_policy):
    first, second, own = (*(make_policy(lora=LoraTable(rank=2)) for _ in range(2)), engine(server))
    for policy, forget, bases in ((first, 0, 1), (second, 0, 2), (second, 1, 3), (second, 0, 3)):
        if forget:
            server.adapters.clear()  # as on a server that was killed and restarted
        traffic.clear()
        own.generate(policy, PROMPTS[:1], params())
        assert len(server.requests("/collective_rpc")) == bases
        size = sum(tensor.nbytes for tensor in server.weights[-1].values())
        assert size < traffic["sync_bytes"] < size + 10_000  # the base is not counted


def test_an_adapter_travels_in_the_compute_dtype(server, make_policy):
    policy = make_policy(lora=LoraTable(rank=2), dtype=torch.bfloat16)
    engine(server).generate(policy, PROMPTS[:1], params())
    assert {t.dtype for given in server.weights for t in given.values()} == {torch.bfloat16}
    assert all("lora_" in name for name in server.weights[1])


def test_weights_travel_in_the_compute_dtype(server, make_policy):
    policy = make_policy(dtype=torch.bfloat16)
    engine(server).generate(policy, PROMPTS[:1], params())
    assert {tensor.dtype for tensor in server.weights[0].values()} == {torch.bfloat16}
    assert policy.model.dtype == torch.float32


def test_weights_travel_through_the_folder_of_the_recipe(server, make_policy, tmp_path):
    engine(server, weights_dir=str(tmp_path)).generate(make_policy(), PROMPTS[:1], params())
    assert server.folders[0].parent == tmp_path and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lora", [None, LoraTable(rank=2)], ids=["whole", "lora"])
def test_a_server_of_another_user_may_read_the_weights(server, make_policy, monkeypatch, lora):
    modes = []

    def take(folder):
        modes.extend(path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*")))

    monkeypatch.setattr(server, "take", take)
    engine(server).generate(make_policy(lora=lora), PROMPTS[:1], params())
    assert len(modes) > 2 and all(mode & 0o044 == 0o044 for mode in modes)


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
    told = "engine vllm: no answer from http://127.0.0.1:9/collective_rpc: "
    with pytest.raises(EngineError, match=rf"^{told}[^\n]*; the same command continues[^\n]*$"):
        Vllm(server="http://127.0.0.1:9").generate(make_policy(), PROMPTS, params())


def test_a_server_that_takes_no_weights_is_told_how_to_start(server, make_policy):
    server.status = 404
    with pytest.raises(
        EngineError,
        match=r"answered 404: \{\}; expected VLLM_SERVER_DEV_MODE=1 in the server's environment",
    ):
        engine(server).generate(make_policy(), PROMPTS, params())


def test_a_colocated_engine_that_dies_is_one_line():
    def die(*args, **kwargs):
        raise RuntimeError("EngineCore encountered\nan issue")

    colocated = object.__new__(Colocated)
    colocated.engine = SimpleNamespace(collective_rpc=die, generate=die)
    told = "EngineCore encountered an issue; VLLM_LOGGING_LEVEL=INFO shows more"
    with pytest.raises(EngineError, match=f"^engine vllm: weights were not loaded: {told}$"):
        colocated.load(Path())
    with pytest.raises(EngineError, match=f"^engine vllm: sampling failed: {told}$"):
        colocated.sample([], [])


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_a_colocated_engine_without_vllm_says_what_to_install(make_policy):
    with pytest.raises(
        RecipeError,
        match=r"vllm is not installed; run pip install 'reftune\[vllm\]', or set engine.server",
    ):
        Vllm().generate(make_policy(), PROMPTS, params())


def test_a_server_that_takes_no_adapters_is_told_how_to_start(server, make_policy, monkeypatch):
    def without(path, body):
        return (404, {}) if "lora" in path else (200, {})

    monkeypatch.setattr(server, "answer", without)
    expected = "expected VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in the server's environment, and --enab"
    with pytest.raises(EngineError, match=expected):
        engine(server).generate(make_policy(lora=LoraTable(rank=2)), PROMPTS, params())


def test_a_server_that_answers_too_little_is_one_line(server, make_policy, monkeypatch):
    monkeypatch.setattr(server, "answer", lambda path, body: (200, {"choices": []}))
    with pytest.raises(EngineError, match="returned 0 completions for 1 prompt"):
        engine(server).generate(make_policy(), PROMPTS, params())


@pytest.mark.parametrize(
    "answer",
    [
        "<html>a page of a proxy</html>",
        [],
        {"choices": [{"index": 0, "text": "as other servers answer", "logprobs": None}]},
        {"choices": [{"index": 0, "token_ids": [3, 1], "logprobs": None}]},
        {"choices": [{"index": 0, "token_ids": [3], "logprobs": {"token_logprobs": [-1.0]}}]},
    ],
    ids=str,
)
def test_an_answer_that_is_not_vllm_s_is_one_line(server, make_policy, monkeypatch, answer):
    monkeypatch.setattr(server, "answer", lambda path, body: (200, answer))
    with pytest.raises(EngineError, match=r"^engine vllm: http\S+ answered '.*; expected choices"):
        engine(server).generate(make_policy(), PROMPTS, params())


ENDED_EARLY = ["abort", "error", None]


@pytest.mark.parametrize("reason", ENDED_EARLY)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_completion_that_a_server_ended_early_is_no_completion(
    server, make_policy, monkeypatch, reason, temperature
):
    def stopped(path, body):
        found = choices(body) if path == "/v1/completions" else []
        return 200, {"choices": [{**choice, "finish_reason": reason} for choice in found]}

    monkeypatch.setattr(server, "answer", stopped)
    told = rf"^engine vllm: {server.address} ended a completion early \(finish_reason {reason}\), "
    with pytest.raises(EngineError, match=told):
        engine(server).generate(make_policy(), PROMPTS, params(temperature=temperature))


@pytest.mark.parametrize("reason", ENDED_EARLY)
def test_a_completion_that_a_colocated_engine_ended_early_is_no_completion(monkeypatch, reason):
    def colocated(*reasons):
        outputs = [
            SimpleNamespace(
                token_ids=[3, 1], logprobs=[{3: step, 1: step}] * 2, finish_reason=reason
            )
            for reason in reasons
        ]
        found = object.__new__(Colocated)
        answers = [SimpleNamespace(outputs=[output]) for output in outputs]
        found.engine = SimpleNamespace(generate=lambda *args, **keys: answers)
        return found

    step = SimpleNamespace(logprob=-1.0)
    samples = [([3, 1], [-1.0, -1.0])] * 2
    assert colocated("stop", "length").sample([], []) == samples
    with pytest.raises(EngineError, match=r"^engine vllm: vLLM ended a completion early"):
        colocated("stop", reason).sample([], [])


def test_an_address_without_http_is_one_line(make_policy):
    with pytest.raises(EngineError, match=r"no answer from 127.0.0.1:8000/\S+: .*unknown url type"):
        Vllm(server="127.0.0.1:8000").generate(make_policy(), PROMPTS, params())


def test_a_folder_that_cannot_be_written_is_one_line(server, make_policy, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    told = r"cannot be written: .*No space left on device; engine.weights_dir sets another place"
    with pytest.raises(EngineError, match=told):
        engine(server).generate(make_policy(), PROMPTS, params())


def refuse_chmod(*args, **kwargs):
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize(
    ("name", "lora", "reason"),
    [
        ("missing", None, "No such file or directory"),
        ("missing", LoraTable(rank=2), "No such file or directory"),
        ("file", None, "Not a directory"),
        (".", None, "Operation not permitted"),
    ],
)
def test_a_folder_that_cannot_be_created_is_one_line(
    server, make_policy, tmp_path, monkeypatch, name, lora, reason
):
    (tmp_path / "file").touch()
    if name == ".":
        monkeypatch.setattr(Path, "chmod", refuse_chmod)
    place = tmp_path / name
    told = rf"^engine vllm: {place}: cannot be written: .*{reason}.*; engine.weights_dir sets"
    with pytest.raises(EngineError, match=told):
        engine(server, weights_dir=str(place)).generate(make_policy(lora=lora), PROMPTS, params())
    assert server.asked == [] and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_every_process_is_told_that_the_folder_cannot_be_created(
    server, make_policy, tmp_path, monkeypatch
):
    told = []
    monkeypatch.setattr("reftune.processes.world.raise_together", told.append)
    engine(server, weights_dir=str(tmp_path / "missing"))._hand_over(make_policy())
    assert [type(error) for error in told] == [EngineError]


def test_a_colocated_engine_is_refused_in_several_processes(make_policy, monkeypatch):
    monkeypatch.setattr("reftune.processes.world.world_size", lambda: 2)
    with pytest.raises(RecipeError, match="serves only one training process; expected"):
        Vllm()._colocated(make_policy(), PROMPTS, params())


def test_a_colocated_engine_that_cannot_start_is_refused_before_anything_is_written(
    make_recipe, tmp_path, monkeypatch
):
    recipe = make_recipe(engine={"kind": "vllm"}, run_dir=str(tmp_path / "run"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="vllm is not installed"), open_run(recipe, Progress()):
        pass
    assert not recipe.folder.exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with open_run(recipe, Progress()) as run:
        # the run is continued by several processes
        monkeypatch.setattr("reftune.engines.vllm.world.world_size", lambda: 2)
        with pytest.raises(RecipeError, match="serves only one training process"):
            run.train("sft")
        assert not run.folder.stage("sft").path.exists()


@pytest.mark.parametrize(
    ("context", "max_prompt", "expected"),
    [(131072, 512, 517), (131072, None, 131072), (64, 60, 64), (64, 59, 64), (None, 512, 517)],
)
def test_colocated_vllm_starts_for_sequences_as_long_as_the_recipe_s(
    monkeypatch, tmp_path, context, max_prompt, expected
):
    started = []
    fake = SimpleNamespace(
        LLM=lambda **settings: started.append(settings), SamplingParams=SimpleNamespace
    )
    monkeypatch.setitem(sys.modules, "vllm", fake)
    policy = SimpleNamespace(context=context, compute_dtype=torch.bfloat16)
    (tmp_path / "config.json").write_text("{}")
    longest = longest_sequence(policy, params(max_prompt_tokens=max_prompt))  # 5 new tokens
    Colocated(Vllm(), policy, tmp_path, longest)
    assert [settings["max_model_len"] for settings in started] == [expected]


def test_a_colocated_engine_is_started_again_only_for_longer_sequences(monkeypatch, tmp_path):
    started = []

    class Fake(Colocated):
        def __init__(self, settings, policy, folder, longest):
            self.longest = longest
            started.append(longest)

        def stop(self):
            pass

    monkeypatch.setattr("reftune.engines.vllm.Colocated", Fake)
    (tmp_path / "config.json").write_text("{}")
    policy, own = SimpleNamespace(compute_dtype=torch.bfloat16), Vllm()
    try:
        for longest in (20, 20, 12, 30, 20, None, 20, None):
            own._started(policy, tmp_path, longest)
        Vllm(memory=0.5)._started(policy, tmp_path, 20)
    finally:
        stop_engines()
    assert started == [20, 30, None, 20]


def test_a_list_of_no_servers_is_refused(make_recipe):
    with pytest.raises(RecipeError, match="server"):
        make_recipe(engine={"kind": "vllm", "server": []})


@pytest.mark.parametrize(("dies_in", "saved"), [("the last step", 3), ("its dev evaluation", 4)])
def test_a_server_that_dies_costs_nothing_but_a_line(server, make_recipe, tmp_path, dies_in, saved):
    def run(folder):
        changes = {"engine": {"kind": "vllm", "server": server.address}, "run_dir": str(folder)}
        with open_run(make_recipe(stages=STAGES, **changes), Progress()) as run:
            run.train("reft")
        return folder

    straight = outcome(run(tmp_path / "straight"))
    path = "/v1/completions"
    greedy = [body["temperature"] == 0 for body in server.requests(path)]
    last = max(i for i, is_dev in enumerate(greedy) if is_dev == (saved == 4))
    server.dies_at = path, last
    server.asked.clear()
    with pytest.raises(
        EngineError, match=r"^engine vllm: no answer from .*the same command continues"
    ):
        run(tmp_path / "killed")
    checkpoint = max((tmp_path / "killed/stages/reft/checkpoints").glob("step-*"))
    assert checkpoint.name == f"step-00000{saved}", dies_in
    server.dies_at = None
    assert_same_outcome(run(tmp_path / "killed"), straight)


@pytest.mark.parametrize(
    ("prefit", "nth", "saved"),
    [
        (0, -1, "step-000003"),  # in the last step
        (2, 0, None),  # while the value head is fitted
    ],
)
def test_a_signal_that_stops_the_server_too_costs_no_step(
    server, make_recipe, tmp_path, monkeypatch, prefit, nth, saved
):
    stages = {**STAGES, "reft": {**STAGES["reft"], "value_prefit": prefit}}

    def run(folder):
        changes = {"engine": {"kind": "vllm", "server": server.address}, "run_dir": str(folder)}
        with open_run(make_recipe(stages=stages, **changes), Progress()) as run:
            run.train("reft")
        return folder

    straight, path = outcome(run(tmp_path / "straight")), "/v1/completions"
    sampled = [body["seed"] for body in server.requests(path) if body["temperature"] > 0]
    answer = server.answer

    def stop(path, body):
        if body.get("seed") != sampled[nth]:
            return answer(path, body)
        os.kill(os.getpid(), signal.SIGTERM)
        return 200, {"choices": [{**each, "finish_reason": "abort"} for each in choices(body)]}

    monkeypatch.setattr(server, "answer", stop)
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped")
    checkpoints = sorted((tmp_path / "stopped/stages/reft/checkpoints").glob("step-*"))
    assert [each.name for each in checkpoints][-1:] == ([saved] if saved else [])
    monkeypatch.setattr(server, "answer", answer)
    assert_same_outcome(run(tmp_path / "stopped"), straight)
