"""Code that exists only for speed. Without dropout, removing this folder changes results only by
rounding. To remove it, change its callers:

- `model/policy.py` calls `attention.attend_our_way`, `attention.takes_packing`,
  `llama.is_written_out`, `attention.read_packed` and `llama.read_packed`: keep the branch of
  `_predictors` that pads.
- `engines/kv.py` calls `llama.is_written_out` and `llama.packed_linears`: keep `forward`, which
  calls transformers. Without packing, the trainer scores the engine's samples itself.
- `stages/outline.py` treats `ATTENTION` like `sdpa`: keep `sdpa`.
- `terminal/cli.py` calls `allocator.keep_freed_memory`: drop the call.

Dropout's masks depend on the layout of the sequences, so a run with dropout draws other, equally
likely masks without this folder. `tests/unit/test_speed.py` trains with and without the folder and
compares the results.
"""
