"""Code that exists only for speed. If dropout is 0, removing this folder changes results only by
rounding errors. To remove it, change its callers:

- `model/policy.py` calls `attention.attend_our_way`, `attention.takes_packing`,
  `llama.is_written_out`, `attention.read_packed` and `llama.read_packed`: keep the branch of
  `hidden_states` that pads.
- `engines/kv.py` calls `llama.is_written_out`, `llama.Decoder` and `llama.packed_linears`: keep
  `forward`, which calls transformers. Without packing, the trainer scores the samples instead of
  the engine.
- `stages/outline.py` treats `ATTENTION` like `sdpa`: keep `sdpa`.
- `terminal/cli.py` calls `allocator.keep_freed_memory`: drop the call.

Dropout masks depend on the layout of the sequences, which this folder changes. Without it, a run
with dropout draws masks that are different but equally likely. `tests/unit/test_speed.py` compares
runs with and without the folder.
"""
