"""The settings that a launcher may request, and the division of rows among processes."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from reftune.errors import RecipeError
from reftune.model.batch import TokenBatch, micro_batches, own_micro_batches, token_batch
from reftune.processes import heartbeat, world
from reftune.processes.launch import processes, wanted_sharding
from reftune.processes.sharding import Fsdp2, Sharding
from reftune.recipe import shipped_recipes
from reftune.runs.auto import choose_device

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
"""The environment that `accelerate launch` sets for ZeRO."""
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def grid(replicas, shards):
    """The environment that `accelerate launch` sets for groups of processes."""
    sizes = {"DP_REPLICATE": replicas, "DP_SHARD": shards, "TP": 1, "CP": 1, "SP": 1}
    told = {f"PARALLELISM_CONFIG_{axis}_SIZE": str(size) for axis, size in sizes.items()}
    return {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", **told}


@pytest.mark.parametrize(
    ("environment", "how"),
    [
        ({}, Sharding()),
        ({"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}, Sharding()),
        ({"ACCELERATE_USE_DEEPSPEED": "false"}, Sharding()),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, Sharding()),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "false"}, Fsdp2()),
        ({**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "false"}, Fsdp2(reshard_after_forward=False)),
        ({**FSDP2, **grid(2, 4), "WORLD_SIZE": "8"}, Fsdp2(replicas=2)),
        ({**FSDP2, **grid(1, 8), "WORLD_SIZE": "8"}, Fsdp2()),
    ],
)
def test_the_launcher_says_whether_weights_are_sharded(environment, how):
    found = wanted_sharding(environment)
    assert found == how and type(found) is type(how)


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version is 1; expected 2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version is 1; expected 2"),
        (DEEPSPEED, "ACCELERATE_USE_DEEPSPEED is true: expected FSDP2"),
        ({**FSDP2, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "set model.micro_batch_tokens"),
        ({**FSDP2, "ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "set optimizer.max_grad_norm"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "expected DDP or FSDP2"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: false"),
        ({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "set model.gradient_checkpointing"),
        ({**FSDP2, **grid(2, 4), "WORLD_SIZE": "6"}, "dp_replicate_size 2, dp_shard_size 4"),
        ({**FSDP2, **grid(2, 1), "WORLD_SIZE": "2"}, "expected dp_shard_size above 1"),
        ({**FSDP2, **grid(1, 2), "PARALLELISM_CONFIG_TP_SIZE": "2"}, "tp_size 2, cp_size 1"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "MIXED_PRECISION is bf16: expected no"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, "expected torchrun"),
    ],
)
def test_what_would_not_run_as_asked_is_refused(environment, told):
    with pytest.raises(RecipeError, match=told), processes(environment):
        pass


def test_one_process_without_a_gpu_says_so_for_all(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    told = "more processes than GPUs on this machine, which has 1; expected at most one per GPU"
    raises = {"1": pytest.raises(RecipeError, match=told), "2": pytest.raises(SystemExit)}
    for rank, raised in raises.items():  # rank 0 has a GPU, so it has nothing to report
        monkeypatch.setenv("RANK", rank)
        with raised, processes({"WORLD_SIZE": "3", "RANK": rank, "LOCAL_RANK": rank}):
            pass


def test_a_setting_that_all_processes_refuse_is_reported_by_one(monkeypatch):
    launched = {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}
    told = pytest.raises(RecipeError, match="fsdp_version is 1; expected 2")
    for rank, raised in (("0", told), ("1", pytest.raises(SystemExit))):
        monkeypatch.setenv("RANK", rank)
        with raised, processes({**launched, "RANK": rank}):
            pass


def test_one_process_stays_alone():
    with processes({"WORLD_SIZE": "1"}):
        assert not torch.distributed.is_initialized()
        assert (world.rank(), world.world_size(), world.is_main()) == (0, 1, True)


def test_a_missing_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(RecipeError, match="device: cuda, but torch finds no GPU"):
        choose_device("cuda")
    with pytest.raises(
        RecipeError, match=r"^model\.device: mps, but torch has no such device here"
    ):
        choose_device("mps")
    with pytest.raises(
        RecipeError, match=r"^model\.device: gpu, but torch has no such device here"
    ):
        choose_device("gpu")


def share_of(
    rank: int, size: int, lengths: list[int], **settings: Any
) -> list[tuple[torch.Tensor, bool]]:
    """The micro-batches of one of `size` processes."""
    with world.inhabited(world.World(rank=rank, size=size)):
        return list(own_micro_batches(sequences(lengths), **settings))


def sequences(lengths: list[int]) -> TokenBatch:
    return token_batch([[1]] * len(lengths), [[2] * (length - 1) for length in lengths])


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_processes_share_every_row_once(world_size, even):
    lengths = [5, 3, 8, 2, 9, 4, 7]
    shares = [
        share_of(rank, world_size, lengths, max_tokens=9, even=even) for rank in range(world_size)
    ]
    counted = [
        row for share in shares for index, counts in share if counts for row in index.tolist()
    ]
    assert sorted(counted) == list(range(7))
    sizes = [len(share) for share in shares]
    assert min(sizes) >= 1 and (not even or len(set(sizes)) == 1)
    assert all(index.numel() > 0 for share in shares for index, _ in share)


def test_a_process_alone_has_the_micro_batches_in_their_order():
    lengths = [5, 3, 8, 2, 9, 3, 7]
    found = [index.tolist() for index, _ in own_micro_batches(sequences(lengths), max_tokens=10)]
    assert found == [
        index.tolist() for index in micro_batches(torch.tensor(lengths), max_tokens=10)
    ]


def test_shares_are_alike_in_length():
    # sorted: 2 3 4 5 | 6 7 8 9 dealt in turns gives 2 4 6 8 and 3 5 7 9, not the short ones to one
    # process
    lengths = [9, 8, 7, 6, 5, 4, 3, 2]
    shares = [share_of(rank, 2, lengths, max_tokens=99) for rank in (0, 1)]
    assert [sorted(lengths[row] for row in share[0][0].tolist()) for share in shares] == [
        [2, 4, 6, 8],
        [3, 5, 7, 9],
    ]


CONFIGS = shipped_recipes() / "accelerate"


@pytest.mark.parametrize(
    ("name", "how", "machines", "processes_each"),
    [
        ("8-gpus-ddp", Sharding(), 1, 8),
        ("8-gpus-fsdp2", Fsdp2(), 1, 8),
        ("2x8-gpus-ddp", Sharding(), 2, 8),
        ("2x8-gpus-fsdp2", Fsdp2(), 2, 8),
        ("2x8-gpus-hsdp", Fsdp2(replicas=2), 2, 8),
    ],
)
def test_shipped_launch_configurations_ask_for_what_they_are_named(
    name, how, machines, processes_each
):
    # our processes read the environment that accelerate makes from the file
    file = str(CONFIGS / f"{name}.yaml")
    command = ["--config_file", file, "--main_process_ip", "node0", "-m", "reftune"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert arguments.multi_gpu or arguments.use_fsdp
    found = wanted_sharding(prepare_multi_gpu_env(arguments))
    assert found == how and type(found) is type(how)
    assert int(getattr(arguments, "nnodes", 1)) == machines
    assert int(arguments.nproc_per_node) == processes_each


def test_the_shipped_configuration_of_one_gpu_starts_one_process():
    command = ["--config_file", str(CONFIGS / "1-gpu.yaml"), "-m", "reftune"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert not (arguments.multi_gpu or arguments.use_fsdp) and arguments.num_processes == 1


class FakeStore(dict):
    """A store like torch's, for one process."""

    def set(self, key, value):
        if self.get("gone"):
            raise RuntimeError("no host")
        self[key] = value

    def multi_get(self, keys):
        return [self[key] for key in keys]


@pytest.fixture
def hearts(monkeypatch):
    """Three fast heartbeats, their store, and the processes that each has lost."""
    for name, seconds in {"INTERVAL_S": 0.02, "SOON_S": 0.5, "SILENCE_S": 1.0}.items():
        monkeypatch.setattr(heartbeat, name, seconds)
    store, lost = FakeStore(), [[], [], []]
    made = [heartbeat.Heartbeat(store, rank, 3, lost[rank].append) for rank in range(3)]
    for heart in made:
        heart.start()
    yield made, store, lost
    for heart in made:
        heart.stop()


def eventually(is_so):
    """Whether `is_so` becomes true within ten seconds."""
    deadline = time.monotonic() + 10
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.02)
    return is_so()


def test_a_silent_process_is_named_by_the_others(hearts):
    made, _, lost = hearts
    assert made[0].missing() is None and lost == [[], [], []]
    made[1].stop()  # as if killed: it does not announce its end
    assert eventually(lambda: made[0].missing() == 1) and made[2].missing() == 1
    assert eventually(lambda: lost[0] and lost[2]) and {*lost[0], *lost[2]} == {1}


def test_a_process_that_is_done_is_not_missed(hearts):
    made, _, lost = hearts
    time.sleep(0.1)
    made[2].leave()
    time.sleep(1.5)
    assert made[0].missing() is None and lost == [[], [], []]


def test_without_a_store_its_host_is_missed(hearts):
    made, store, lost = hearts
    time.sleep(0.1)
    store["gone"] = True
    assert eventually(lambda: made[1].missing() == 0) and made[2].missing() == 0
    assert eventually(lambda: lost[2]) and set(lost[2]) == {0}
