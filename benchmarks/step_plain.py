"""A ReFT step in plain transformers, rewritten from the code of Luong et al. (ACL 2024).
docs/performance.md compares its speed with reftune's.

The step pads prompts on the left, and generates until the longest answer ends. The policy and
the reference then each make one forward pass over prompt and answer. Two updates follow. Logits are
computed for every position.

    python -m benchmarks.step_plain WORKLOAD float32|bfloat16 REPEATS
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import resource
import sys
import time
from typing import Any

import torch
from benchmarks.forced import ForcedLengths
from benchmarks.workload import Workload, first, read_workload
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

WARM_UP_SAMPLES = 4


class PlainStep:
    def __init__(self, workload: Workload, dtype: torch.dtype) -> None:
        self.workload, self.dtype = workload, dtype
        self.tokenizer: Any = AutoTokenizer.from_pretrained(workload.model, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.eos_token
        model: Any = AutoModelForCausalLM.from_pretrained(workload.model, dtype=torch.float32)
        self.model = model.to(workload.device).eval()
        self.reference: Any = copy.deepcopy(self.model).requires_grad_(False)
        self.head = nn.Linear(self.model.config.hidden_size, 1).to(workload.device)
        self.parameters = [*self.model.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=3e-7)

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(
            self.workload.device, dtype=self.dtype, enabled=self.dtype != torch.float32
        )

    def run(self) -> dict[str, float]:
        """Take one step, and return the seconds of its phases."""
        marks = [time.perf_counter()]
        inputs = self.tokenizer(
            self.workload.prompts, return_tensors="pt", padding=True, add_special_tokens=False
        )
        inputs = inputs.to(self.workload.device)
        prompt_length = inputs["input_ids"].shape[1]
        sequences, mask = self.generate(inputs)
        self.tokenizer.batch_decode(sequences[:, prompt_length:], skip_special_tokens=True)
        marks.append(time.perf_counter())
        response = torch.zeros_like(mask)
        for row, length in enumerate(self.workload.lengths):
            response[row, prompt_length : prompt_length + length] = 1
        response = response[:, 1:]
        with torch.no_grad(), self.arithmetic():
            old, values = self.score(self.model, sequences, mask)
            reference, _ = self.score(self.reference, sequences, mask)
        advantages, returns = self.credit(old, reference, values, response)
        self.wait()
        marks.append(time.perf_counter())
        for _ in range(2):
            self.update(sequences, mask, response, old, values, advantages, returns)
        self.wait()
        marks.append(time.perf_counter())
        generate, score, update = (end - start for start, end in itertools.pairwise(marks))
        return {
            "generate_s": generate,
            "score_s": score,
            "update_s": update,
            "step_s": marks[-1] - marks[0],
        }

    def wait(self) -> None:
        """Wait until the GPU is done, because Python runs ahead of it."""
        if self.workload.device == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def generate(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Sequences (B, L), and whether each position holds a token (B, L)."""
        prompt_length = inputs["input_ids"].shape[1]
        forced = ForcedLengths(self.workload.lengths, prompt_length, self.tokenizer.eos_token_id)
        with self.arithmetic():
            sequences = self.model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=self.workload.max_new,
                logits_processor=LogitsProcessorList([forced]),
                pad_token_id=self.tokenizer.pad_token_id,
            )
        mask = torch.zeros_like(sequences)
        mask[:, :prompt_length] = inputs["attention_mask"]
        for row, length in enumerate(self.workload.lengths):
            mask[row, prompt_length : prompt_length + length] = 1
        return sequences, mask

    def score(self, model: Any, sequences: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and values of every position but the first, (B, L - 1)."""
        output = model(input_ids=sequences, attention_mask=mask, output_hidden_states=True)
        logprobs = (
            output.logits[:, :-1]
            .float()
            .log_softmax(-1)
            .gather(2, sequences[:, 1:, None])
            .squeeze(2)
        )
        return logprobs, self.head(output.hidden_states[-1][:, :-1].float()).squeeze(2)

    def credit(
        self, old: Tensor, reference: Tensor, values: Tensor, response: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Whitened advantages and returns, (B, L - 1), with γ = 1, λ = 0.95 and β = 0.01."""
        rewards = -0.01 * (old - reference) * response
        for row, reward in enumerate(self.workload.rewards):
            rewards[row, int(response[row].nonzero()[-1])] += reward
        values, advantages = values * response, torch.zeros_like(rewards)
        running = nothing = rewards.new_zeros(len(rewards))
        for t in reversed(range(rewards.shape[1])):
            after = values[:, t + 1] if t + 1 < rewards.shape[1] else nothing
            running = (rewards[:, t] + after - values[:, t] + 0.95 * running) * response[:, t]
            advantages[:, t] = running
        returns = advantages + values
        taken = advantages[response.bool()]
        return (advantages - taken.mean()) / (taken.var() + 1e-8).sqrt(), returns

    def update(
        self,
        sequences: Tensor,
        mask: Tensor,
        response: Tensor,
        old: Tensor,
        values: Tensor,
        advantages: Tensor,
        returns: Tensor,
    ) -> None:
        with self.arithmetic():
            logprobs, new_values = self.score(self.model, sequences, mask)
        ratio = (logprobs - old).exp()
        policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
        clipped = values + (new_values - values).clamp(-0.2, 0.2)
        value = 0.5 * torch.maximum((new_values - returns) ** 2, (clipped - returns) ** 2)
        per_sample = ((policy + 5 * value) * response).sum(1) / response.sum(1)
        per_sample.mean().backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    workload, dtype, repeats = (
        read_workload(sys.argv[1]),
        getattr(torch, sys.argv[2]),
        int(sys.argv[3]),
    )
    torch.manual_seed(0)
    plain = PlainStep(first(workload, WARM_UP_SAMPLES), dtype)
    plain.run()
    plain.workload = workload
    steps = [plain.run() for _ in range(repeats)]
    print(
        json.dumps({"steps": steps, "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss})
    )


if __name__ == "__main__":
    main()
