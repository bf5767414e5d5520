"""Code that exists only for speed. If dropout is 0, removing this folder changes results only by
rounding errors. To remove it, change its callers:

- `model/policy.py`: drop the calls to `attention.attend_our_way`, `attention.takes_packing`,
  `llama.is_written_out`, `attention.read_packed` and `llama.read_packed`. In `hidden_states`, keep
  only the branch that pads.
- `engines/kv.py`: drop the type `llama.Copies` and the calls to `llama.is_written_out`,
  `llama.Decoder` and `llama.packed_linears`, and keep `forward`, which calls transformers. With
  packing, the trainer can reuse the log-probabilities that the engine computed for its samples.
  Without this folder, there is no packing, so the trainer computes them itself.
- `stages/outline.py`: drop `ATTENTION`, and keep `sdpa`.
- `terminal/cli.py`: drop the call to `allocator.keep_freed_memory`.

Dropout masks depend on the layout of the sequences, which this folder changes. Without the folder,
a run with dropout draws masks that are different but equally likely. `tests/unit/test_speed.py`
compares runs with and without the folder.
"""
