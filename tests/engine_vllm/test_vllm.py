"""The real vLLM engine, beyond the contract suite of all engines. `make test-vllm` runs this
file."""

import itertools
import json

import pytest
import torch
from torch.testing import assert_close

from crash import assert_same_outcome, outcome
from reftune.engines.kv import Kv
from reftune.engines.vllm import Server, Vllm, request
from reftune.errors import EngineError
from reftune.model.batch import token_batch
from reftune.recipe import LoraTable
from reftune.runs.export import export_model
from reftune.runs.run import open_run
from reftune.stages.stage import Progress
from reftune.types import SamplingParams
from vllm_servers import TRAINING, start

pytest.importorskip("vllm")

PROMPTS = [[3, 4, 5, 6, 7, 8, 9, 10, 11], [12, 13], [5, 6, 7], [12, 13]]
ONE_HEAD = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}


def move(policy, seed):
    """Change every weight that is trained, as an update would."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)


def mismatch(engine, policy, seed=3):
    """Largest difference between the engine's log-probabilities and the policy's in nats, and the
    tokens."""
    completions = engine.generate(policy, PROMPTS, SamplingParams(max_new_tokens=12, seed=seed))
    batch = token_batch(PROMPTS, [completion.token_ids for completion in completions])
    recomputed = policy.score(batch).logprobs
    reported = batch.unflatten(
        torch.tensor([logprob for c in completions for logprob in c.logprobs])
    )
    return float((reported - recomputed).abs().max()), [
        completion.token_ids for completion in completions
    ]


@pytest.mark.parametrize("lora", [None, LoraTable(rank=4)], ids=["whole", "lora"])
def test_every_update_reaches_the_engine(make_policy, lora):
    policy, engine = make_policy("llama", lora=lora, **ONE_HEAD), Vllm(eager=True)
    drawn = []
    for update in range(3):
        difference, tokens = mismatch(engine, policy)
        assert difference < 2e-5
        drawn.append(tuple(tokens))
        move(policy, update)
    assert len(set(drawn)) == 3  # the weights did change


def test_a_prefix_that_older_weights_read_is_forgotten(make_policy):
    policy, engine = make_policy("llama", max_position_embeddings=512, **ONE_HEAD), Vllm(eager=True)
    long = [list(range(3, 30)) * 12]  # several blocks of the prefix cache
    sampling = SamplingParams(max_new_tokens=4, temperature=0)
    engine.generate(policy, long, sampling)
    move(policy, 1)
    (completion,) = engine.generate(policy, long, sampling)
    batch = token_batch(long, [completion.token_ids])
    assert_close(
        torch.tensor(completion.logprobs), policy.score(batch).logprobs[0], atol=2e-5, rtol=0
    )


def test_reinforcement_learning_samples_from_the_policy_of_each_step(make_trainer):
    trainer = make_trainer(
        {"mismatch_cap": 2.0, "prompts": 8},
        model={
            "scratch": {"hidden_size": 64, "heads": 2, "layers": 1, "context": 80, "dropout": 0.1}
        },
        engine={"kind": "vllm", "eager": True},
    )
    before = trainer.policy.model.get_output_embeddings().weight.clone()
    for n in (1, 2, 3):
        metrics = trainer.step(n)
        assert metrics["kl/mismatch"] < 1e-5
        assert metrics["mismatch/weight"] == pytest.approx(1, abs=1e-4)
    assert not torch.equal(before, trainer.policy.model.get_output_embeddings().weight)


@pytest.fixture(scope="module")
def exported(make_policy, tmp_path_factory):
    """A policy, and the folder to which `reftune export` writes it."""
    run, policy = (
        tmp_path_factory.mktemp("served") / "run",
        make_policy("llama", seed=9, **ONE_HEAD),
    )
    policy.save(run / "stages" / "reft")
    stage = {
        "kind": "rl",
        "init": "warmup",
        "chosen_step": 4,
        "dev_accuracy": 0.5,
        "dev_n": 8,
        "looks": 2,
    }
    (run / "stages" / "reft" / "stage.json").write_text(json.dumps(stage))
    (run / "recipe.yaml").write_text(
        "name: served\ndataset: {kind: jsonl, train: mine.csv}\nstages: {reft: {kind: rl}}\n"
    )
    return policy, export_model(run, "reft", run.with_name("model"))


@pytest.fixture(scope="module")
def servers(exported, tmp_path_factory):
    """Addresses of two `vllm serve` processes with an exported model."""
    folder = tmp_path_factory.mktemp("log")
    command = f"vllm serve {exported[1]} {TRAINING}"
    started = [start(command, folder / f"server{number}.txt") for number in (0, 1)]
    try:
        for server in started:
            server.wait_until_healthy()
        yield [server.address for server in started]
    finally:
        for server in started:
            server.stop()


@pytest.fixture
def server(servers):
    return servers[0]


def test_an_exported_model_is_served_as_it_is(exported, server):
    policy, folder = exported
    assert (folder / "value_head" / "model.safetensors").is_file()
    greedy = SamplingParams(max_new_tokens=12, temperature=0)
    found = Server(server).complete(PROMPTS, request(policy, greedy, 0))
    expected = Kv().generate(policy, PROMPTS, greedy)
    assert [tuple(tokens) for tokens, _ in found] == [
        completion.token_ids for completion in expected
    ]


@pytest.mark.parametrize("lora", [None, LoraTable(rank=4)], ids=["whole", "lora"])
def test_servers_sample_from_the_weights_they_are_given(make_policy, servers, lora):
    policy, engine = make_policy("llama", lora=lora, **ONE_HEAD), Vllm(server=servers)
    drawn = []
    for update in range(3):
        difference, tokens = mismatch(engine, policy)
        assert difference < 2e-5
        assert mismatch(engine, policy)[1] == tokens  # the same call, the same tokens
        assert mismatch(Vllm(server=servers[1]), policy)[1] == tokens  # and on either server
        drawn.append(tuple(tokens))
        move(policy, update)
    assert len(set(drawn)) == 3
    assert drawn[0][1] != drawn[0][3]  # equal prompts are drawn apart


def test_the_samples_of_a_problem_are_what_each_would_be_alone(make_policy, server):
    policy, engine = make_policy("llama", **ONE_HEAD), Vllm(server=server)
    four = engine.generate(policy, PROMPTS[:1] * 4, SamplingParams(max_new_tokens=12, seed=1))
    alone = [
        engine.generate(
            policy, PROMPTS[:1], SamplingParams(max_new_tokens=12, seed=1, first_position=position)
        )[0]
        for position in range(4)
    ]
    assert [one.token_ids for one in four] == [one.token_ids for one in alone]
    assert len({one.token_ids for one in four}) > 1


def test_another_base_reaches_a_server_with_adapters(make_policy, server):
    for seed in (1, 2):
        policy = make_policy("llama", seed=seed, lora=LoraTable(rank=4), **ONE_HEAD)
        move(policy, seed)
        assert mismatch(Vllm(server=server), policy)[0] < 2e-5


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["whole", "lora"])
def test_a_server_killed_in_a_step_costs_nothing_but_a_line(
    make_recipe, tmp_path, lora, monkeypatch
):
    shape = {"hidden_size": 64, "heads": 2, "layers": 1, "context": 80, "dropout": 0.0}

    def train(folder, addresses):
        stages = {"sft": None, "reft": {"init": "base", "steps": 4, "save_every_s": 1000.0}}
        recipe = make_recipe(
            run_dir=str(folder),
            model={"scratch": shape, "lora": lora},
            engine={"kind": "vllm", "server": addresses},
            stages=stages,
        )
        with open_run(recipe, Progress()) as run:
            run.train("reft")
        return folder

    with open_run(
        make_recipe(run_dir=str(tmp_path / "base"), model={"scratch": shape}), Progress()
    ) as run:
        run.models.load("base").save(tmp_path / "model")
    command = f"vllm serve {tmp_path / 'model'} {TRAINING}"
    started = [start(command, tmp_path / f"server{number}.txt") for number in (0, 1)]
    try:
        for server in started:
            server.wait_until_healthy()
        addresses = [server.address for server in started]
        victim, requests, deadly = started[1], itertools.count(1), -1
        complete = Server.complete

        def counted(server, prompts, body):
            if next(requests) == deadly:
                victim.kill()
            return complete(server, prompts, body)

        monkeypatch.setattr(Server, "complete", counted)
        straight = outcome(train(tmp_path / "straight", addresses))
        requests, deadly = itertools.count(1), next(requests) * 2 // 3
        with pytest.raises(
            EngineError,
            match=rf"^engine vllm: no answer from {victim.address}[^\n]*the same command continues",
        ):
            train(tmp_path / "killed", addresses)
        kept = [path.name for path in (tmp_path / "killed/stages/reft/checkpoints").glob("step-*")]
        assert any(name != "step-000000" for name in kept)  # the steps before its death are kept
        started[1] = start(command, tmp_path / "again.txt", port=victim.port)
        started[1].wait_until_healthy()
        assert_same_outcome(train(tmp_path / "killed", addresses), straight)
    finally:
        for server in started:
            server.stop()
