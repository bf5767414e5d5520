"""The reranker: a classifier that estimates how likely a solution is to be correct.

The classifier reads the prompt and the solution, without the end token, and maps the last token's
hidden state to two logits (wrong, correct). Unless `lm_coef` is 0, the classifier also remains a
language model: the solution's log-likelihood contributes to the logit of `correct`, and a
language-modelling loss on correct solutions keeps this likelihood meaningful.

    logit of correct = w · h_last + a log π(solution | prompt) + b

Here, h_last is the hidden state, and π(solution | prompt) is the solution's likelihood. The
weights w, a and b are trained. Without the likelihood, the sample with the highest score is
often a wrong solution that the classifier overrates; most such solutions have a low likelihood.
Source: the language-modelling loss comes from Cobbe et al. (arXiv:2110.14168); the log-likelihood
as a score comes from implicit reward models (arXiv:2412.01981). Differences: implicit reward
models compare the likelihood with a reference model's; this classifier has no reference model.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reftune.algorithms.base import LossTerms
from reftune.errors import ModelError
from reftune.grading import voting
from reftune.model.batch import TokenBatch, own_micro_batches, token_batch
from reftune.model.encoder import Encoder
from reftune.model.logprobs import token_logprobs
from reftune.model.policy import Policy
from reftune.processes import sharding, world
from reftune.stages.loop import Look, Progression
from reftune.stages.optimizer import accumulate_gradient
from reftune.stages.plateau import Z95
from reftune.stages.self_train import Sampled, Samples, describe
from reftune.stages.sft import Schedule, Task, schedule_line, train_in_epochs
from reftune.stages.stage import Cost, StageContext
from reftune.storage.files import JsonLines, write_atomically
from reftune.text import brief, counted
from reftune.types import Problem

WEIGHTS = "classifier.safetensors"
INITIAL_STD = 0.02
"""Standard deviation of the initial weights of the classifier's head, the usual value for
transformers."""
SOLUTIONS_AT_ONCE = 8192
"""Maximum number of solutions held as tokens at the same time."""
STANDARDIZED = 256
"""Approximate number of solutions over which log-likelihoods are standardised."""
CORRECT = 1
"""Label of a correct solution; a wrong solution has label 0."""


class RewardModel(Schedule, Sampled):
    lm_coef: float = Field(0.3, ge=0)
    """Weight of the language-modelling loss. With 0, the loss is the same as in the ReFT paper."""
    init: str = "sft"
    samples: int = Field(100, gt=0)
    dev_samples: int = Field(100, gt=0)
    """Samples per dev problem, ideally as many as `evaluate.samples`."""

    is_method: ClassVar[bool] = False

    def line(self) -> str:
        sampled = f"{counted(self.samples, 'sample')} per problem from {self.sampler}"
        return f"{schedule_line(self, self.init)}, on {sampled}"

    def cost(self, *, num_train: int, num_dev: int) -> Cost:
        """An upper bound on the cost, because repeated samples are used only once."""
        num_solutions = self.samples * num_train
        return self.cost_of_rows(
            num_solutions, sampled_before=num_solutions + self.dev_samples * num_dev
        )

    def run(self, context: StageContext) -> None:
        """Sample solutions, train a classifier on them, and save the version that was best at
        reranking dev samples."""
        started, folder, splits = time.perf_counter(), context.folder, context.splits
        train = self.draw(context, splits.train, folder.drawn, num=self.samples)
        dev = self.draw(context, splits.dev, folder.drawn_dev, num=self.dev_samples)
        solutions = [solution for samples in train for solution in labelled(samples)]
        context.progress.note(
            f"{context.name}: {counted(len(solutions), 'different solution')} to train on;"
            f" {describe(train)}"
        )
        num_tokens = sum(samples.num_tokens for samples in (*train, *dev))
        start = Progression(
            totals={"compute/sampled_tokens": float(num_tokens)},
            seconds=time.perf_counter() - started,
        )
        classifier = Classifier(
            context.policy, context.collector.encoder, seed=context.seed("classifier")
        )
        if self.lm_coef > 0:
            classifier.add_likelihood(solutions)
        task = Task(
            model=classifier,
            examples=solutions,
            gradient=partial(accumulate_loss, classifier, lm_coef=self.lm_coef),
            show=lambda rows: [
                {"id": s.problem.id, "text": s.text, "label": s.label} for s in rows
            ],
            look=lambda: Look(metrics=dev_metrics(classifier, dev)),
        )
        train_in_epochs(self, context, task, start=start)


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """A solution to a problem, as text, and whether it is correct."""

    problem: Problem
    text: str
    label: int


def labelled(samples: Samples) -> list[Solution]:
    """The distinct solutions among a problem's samples, each labelled as correct or wrong.
    Solutions without an answer are labelled as wrong."""
    labels = {attempt.completion: int(attempt.correct) for attempt in samples.attempts}
    return [
        Solution(problem=samples.problem, text=text, label=label) for text, label in labels.items()
    ]


# --- the classifier -------------------------------------------------------------------------------


class Judged(NamedTuple):
    """The classifier's output for a batch. It is a tuple, because older versions of FSDP2 do not
    find tensors in dataclasses."""

    logits: Tensor
    """(B, 2) logits of wrong and correct, in fp32."""
    logprobs: Tensor | None = None
    """(B, R) log-probabilities of the response tokens; None if the score does not use them."""


class Classifier(nn.Module):
    """A policy's transformer with a linear layer on top. This layer has two outputs and no bias."""

    likelihood: nn.Linear | None
    """Maps a solution's log-likelihood to the term that is added to the logit of `correct`. None if
    unused."""

    def __init__(self, policy: Policy, encoder: Encoder, *, seed: int = 0) -> None:
        super().__init__()
        self.policy, self.encoder = policy, encoder
        policy.value_head.requires_grad_(False)
        self.head = nn.Linear(policy.value_head.in_features, 2, bias=False, device="cpu")
        draw = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.head.weight, std=INITIAL_STD, generator=draw)
        self.head.to(policy.device)
        self.likelihood = None

    @torch.no_grad()
    def add_likelihood(self, solutions: Sequence[Solution]) -> None:
        """Add a layer that lets the score depend on the log-likelihood. Its initial weights
        standardise the log-likelihood over about `STANDARDIZED` of the `solutions`."""
        some = solutions[:: max(1, len(solutions) // STANDARDIZED)]
        batch = self.solution_batch([(s.problem, s.text) for s in some])
        found = self.policy.score(batch).logprobs.sum(1)
        self.likelihood = nn.Linear(1, 1).to(self.policy.device)
        scale = 1 / found.std(correction=0).clamp(min=1)
        self.likelihood.weight.fill_(scale)
        self.likelihood.bias.fill_(-scale * found.mean())

    @property
    def packs(self) -> bool:
        return self.policy.packs

    @property
    def max_tokens(self) -> int:
        return self.policy.max_tokens

    def forward(self, batch: TokenBatch) -> Judged:
        """Judge the solutions of a `solution_batch`."""
        with self.policy.arithmetic():
            hidden = self.policy.hidden_states(batch)
            if self.likelihood is not None:
                output = self.policy.base.get_output_embeddings()
                logprobs = batch.unflatten(token_logprobs(output, hidden, batch.response_tokens()))
        last = batch.response_lengths.cumsum(0) - 1
        with torch.autocast(hidden.device.type, enabled=False):
            logits: Tensor = self.head(hidden[last].float())
            if self.likelihood is None:
                return Judged(logits)
            evidence = self.likelihood(logprobs.sum(1, keepdim=True))
        return Judged(logits + nn.functional.pad(evidence, (CORRECT, 0)), logprobs)

    def solution_batch(self, solutions: Sequence[tuple[Problem, str]]) -> TokenBatch:
        """A batch of prompts and solutions. If a prompt or a solution does not fit in the model's
        context, its end is cut off. A solution ends with the end token even if it was cut off. The
        classifier reads the hidden state of the token before the end token."""
        longest = None if self.policy.context is None else self.policy.context - 1
        problems = [problem for problem, _ in solutions]
        texts = self.encoder.with_thoughts(problems, [text for _, text in solutions])
        prompts = [self.encoder.prompt(problem)[:longest] for problem in problems]
        responses = []
        for problem, text, prompt in zip(problems, texts, prompts, strict=True):
            *ids, end = self.encoder.continuation(problem, text)
            room = None if longest is None else longest - len(prompt)
            responses.append([*ids[:room], end])
        return token_batch(prompts, responses, device=self.policy.device)

    @torch.no_grad()
    def scores(self, solutions: Sequence[tuple[Problem, str]]) -> list[float]:
        """For each solution, the probability that it is correct, computed without dropout. Repeated
        solutions to a problem are scored only once."""
        once = {(problem.id, text): (problem, text) for problem, text in solutions}
        distinct, scores = [*once.values()], []
        for start in range(0, len(distinct), SOLUTIONS_AT_ONCE):
            batch = self.solution_batch(distinct[start : start + SOLUTIONS_AT_ONCE])
            scores += self._probabilities(batch).tolist()
        score_of = dict(zip(once, scores, strict=True))
        return [score_of[problem.id, text] for problem, text in solutions]

    def _probabilities(self, batch: TokenBatch) -> Tensor:
        """For each solution of the batch, the probability that it is correct. Shape (B,)."""
        scores = torch.zeros(len(batch), device=self.policy.device)
        whole = sharding.current.whole(self, self.policy.compute_dtype)
        with whole, self.policy.inference():
            for index, counts in own_micro_batches(
                batch, max_tokens=self.max_tokens, packed=self.packs
            ):
                if counts:  # inside `whole`, the model itself must not be called
                    scores[index] = self.forward(batch.rows(index)).logits.softmax(1)[:, CORRECT]
        world.add_up(scores)
        return scores

    def save(self, folder: Path) -> None:
        """Write the transformer (in Hugging Face format, with LoRA merged), the tokenizer and the
        classifier's own layers."""
        with sharding.current.whole(self):
            self.policy.save(folder)
            if world.is_main():
                layers = self.layers().items()
                save_file({n: w.detach().contiguous() for n, w in layers}, folder / WEIGHTS)

    def layers(self) -> dict[str, Tensor]:
        """The weights of all layers outside the transformer, keyed by their names in the file
        `WEIGHTS`."""
        if self.likelihood is None:
            return {"weight": self.head.weight}
        return {"weight": self.head.weight, **dict(self.likelihood.named_parameters("likelihood"))}


def load_classifier(policy: Policy, encoder: Encoder, folder: Path) -> Classifier:
    """The classifier that `Classifier.save` wrote to `folder`. `policy` must have been loaded from
    the same folder. Raises: ModelError if the folder contains no classifier."""
    classifier = Classifier(policy, encoder)
    try:
        found = load_file(folder / WEIGHTS)
        if len(found) > 1:
            classifier.likelihood = nn.Linear(1, 1).to(policy.device)
        with torch.no_grad():
            for name, weight in classifier.layers().items():
                weight.copy_(found[name])
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise ModelError(f"{folder}: not a reward model: {WEIGHTS}: {brief(error)}") from None
    return classifier


def accumulate_loss(
    classifier: Classifier, solutions: Sequence[Solution], *, lm_coef: float = 0.0
) -> dict[str, float]:
    """Accumulate the gradient of the loss: the mean cross-entropy of the labels, plus `lm_coef`
    times the correct solutions' negative log-likelihood per token. Returns: metrics. Raises: the
    errors of `accumulate_gradient`."""
    batch = classifier.solution_batch([(s.problem, s.text) for s in solutions])
    labels = torch.tensor([s.label for s in solutions], device=classifier.policy.device)
    has_correct = bool(labels.any())
    num_tokens = (labels * batch.response_lengths).sum().clamp(min=1)

    def loss(rows: Tensor) -> LossTerms:
        judged, own = classifier(batch.rows(rows)), labels[rows]
        total = nn.functional.cross_entropy(judged.logits, own, reduction="sum") / len(solutions)
        metrics = {"right": (judged.logits.argmax(1) == own).sum()}
        if judged.logprobs is not None:
            nll = -(judged.logprobs * own[:, None]).sum() / num_tokens
            total = total + lm_coef * nll
            if has_correct:
                metrics["reward_model/nll"] = nll.detach()
        return LossTerms(total=total, metrics=metrics)

    found = accumulate_gradient(classifier, batch, loss)
    return {
        "reward_model/accuracy": found.pop("right") / len(solutions),
        **found,
        "compute/train_tokens": int(batch.lengths.sum()) - len(solutions),
    }


# --- choosing with the classifier -----------------------------------------------------------------


def dev_metrics(classifier: Classifier, drawn: Sequence[Samples]) -> dict[str, float]:
    """Metrics of how well the classifier chooses a solution to each problem. Solutions without an
    answer cannot be chosen. If no solution to a problem has an answer, the problem counts as wrong.
    `dev/accuracy` is the share of problems whose highest-scoring solution is correct. `dev/chance`
    is the expected share if the solution is chosen at random. `dev/chance_margin` is half the width
    of the 95% interval for the difference between these shares. The interval is computed from one
    difference per problem."""
    solutions = [(s.problem, attempt.completion) for s in drawn for attempt in s.attempts]
    scores = iter(classifier.scores(solutions))
    grading = getattr(classifier.encoder.format, "grading", None)
    chosen, chance = [], []
    for s in drawn:
        may_win = voting.voters(grading, is_choice=s.problem.answer.kind == "choice")
        graded, texts = [a.graded for a in s.attempts], [a.completion for a in s.attempts]
        own_scores = [next(scores) for _ in texts]
        winner = voting.rerank_curve(graded, texts, own_scores, valid=may_win)[-1]
        chosen.append(voting.is_correct(winner))
        allowed = [voting.is_correct(each) for each in graded if may_win(each)]
        chance.append(sum(allowed) / max(1, len(allowed)))
    gains = torch.tensor(chosen, dtype=torch.double) - torch.tensor(chance, dtype=torch.double)
    margin = Z95 * float(gains.std()) / math.sqrt(len(drawn)) if len(drawn) > 1 else 1.0
    return {
        "dev/accuracy": sum(chosen) / len(chosen),
        "dev/chance": sum(chance) / len(chance),
        "dev/chance_margin": margin,
    }


def add_scores(path: Path, problems: Sequence[Problem], classifier: Classifier) -> None:
    """Add the classifier's score to every sample in an evaluation file. The file's rows must be in
    the order of `problems`. Raises: CheckpointError if the file cannot be written."""
    rows = world.from_main(JsonLines(path).rows)
    solutions = [
        (problem, sample["completion"])
        for problem, row in zip(problems, rows, strict=True)
        for sample in row["samples"]
    ]
    scores = iter(classifier.scores(solutions))
    for row in rows:
        row["samples"] = [{**sample, "score": next(scores)} for sample in row["samples"]]
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def is_scored(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every sample of an evaluation has a score."""
    return all("score" in sample for row in rows for sample in row.get("samples", ()))


def require_same_tokenizer(classifier: Classifier, policy: Policy, *, where: str) -> None:
    """Check that the tokenizers of classifier and policy have the same vocabulary. Raises:
    ModelError if not."""
    own, other = (set(model.tokenizer.get_vocab().items()) for model in (classifier.policy, policy))
    if own != other:
        raise ModelError(
            f"{where}: was trained with another tokenizer, of {len(own):,} tokens; this run's has"
            f" {len(other):,}, and {len(own & other):,} are in both; expected a reward model that"
            " started from the same base model"
        )
