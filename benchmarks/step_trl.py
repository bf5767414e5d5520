"""Times a step of TRL's GRPO, the algorithm closest to PPO that TRL still has. This needs TRL.

python -m benchmarks.step_trl WORKLOAD REPEATS [float32|bfloat16] [recompute|keep]

TRL samples answers of the workload's lengths. It uses only the first half of the prompts, and
samples two answers to each.
`recompute`, TRL's default, is gradient checkpointing; `keep` keeps all activations.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from typing import Any

from benchmarks.forced import ForcedLengths
from benchmarks.workload import read_workload
from datasets import Dataset
from transformers import AutoTokenizer, LogitsProcessorList, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

SAMPLES_OF_A_PROMPT = 2  # GRPO compares samples of the same prompt, so it needs at least two


class Clock(TrainerCallback):
    """Records when training begins and when each optimizer step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def main() -> None:
    workload, repeats = read_workload(sys.argv[1]), int(sys.argv[2])
    dtype, activations = (sys.argv[3:] + ["bfloat16", "recompute"][len(sys.argv) - 3 :])[:2]
    tokenizer = AutoTokenizer.from_pretrained(workload.model)
    count = len(workload.prompts)
    prompts = workload.prompts[: count // SAMPLES_OF_A_PROMPT]
    rewards = iter(workload.rewards * 10_000)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=workload.model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            reward_funcs=lambda completions, **kwargs: [next(rewards) for _ in completions],
            callbacks=[clock],
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=count,
                num_generations=SAMPLES_OF_A_PROMPT,
                num_iterations=2,
                max_completion_length=workload.max_new,
                max_steps=2 * (repeats + 1),
                beta=0.01,
                bf16=dtype == "bfloat16",
                gradient_checkpointing=activations == "recompute",
                use_cpu=workload.device == "cpu",
                learning_rate=3e-7,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
        )
        model: Any = trainer.model
        generate = model.generate
        warm_up = iter([[length // 4 for length in workload.lengths]])

        def generate_forced(*args: Any, **kwargs: Any) -> Any:
            prompt_length = kwargs["input_ids"].shape[1]
            forced = ForcedLengths(
                next(warm_up, workload.lengths), prompt_length, tokenizer.eos_token_id
            )
            return generate(*args, **kwargs, logits_processor=LogitsProcessorList([forced]))

        model.generate = generate_forced
        trainer.train()
    steps = [
        {"step_s": clock.ends[i + 2] - clock.ends[i]} for i in range(2, len(clock.ends) - 2, 2)
    ]
    print(
        json.dumps({"steps": steps, "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss})
    )


if __name__ == "__main__":
    main()
