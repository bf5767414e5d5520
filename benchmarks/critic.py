"""Measures what a critic could know, by estimating the values of prefixes from further samples.

    python benchmarks/critic.py runs/long-seed0 runs/long-seed1 --stage ppo

A prefix consists of a sampled solution's first tokens. Its value is estimated by completing it
`SAMPLES` times: the estimate is the share of correct completions (VinePPO, arXiv:2410.01679,
section 4). The variance of the estimates over questions, minus that of their sampling noise, shows
what share of the reward's variance a perfect critic would explain at the end of the prefixes. The
command compares this share with two others: the share that the stage's value head explains after
its last step, and the share that a linear fit explains. The fit predicts the estimates from the
head's inputs. The numbers go to runs/critic.json, or with --publish to docs/results/critic.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reftune.datasets import load_splits
from reftune.model.batch import token_batch
from reftune.model.policy import Policy
from reftune.recipe import load_recipe
from reftune.runs.models import Models
from reftune.stages.optimizer import load_trainable
from reftune.stages.rollouts import Collector, Solved, collector_of
from reftune.storage.checkpoint import load_latest
from reftune.storage.files import write_atomically
from reftune.storage.run_folder import RunFolder
from reftune.types import Graded, SamplingParams, Verdict

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "critic.json"
OWN = Path("runs") / "critic.json"
"""Results that are not published."""
QUESTIONS = 300
SAMPLES = 16
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)
"""Lengths of the prefixes, as shares of a solution's tokens without eos."""
FOLDS = 5
PENALTIES = (1e1, 1e2, 1e3, 1e4, 1e5)
"""Candidates for the linear fit's penalty on the squared weights, with standardised inputs."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


# --- one run --------------------------------------------------------------------------------------


def measure(run_folder: Path, stage: str) -> dict[str, list[float]]:
    """The result of `explained` for one run."""
    recipe = load_recipe(RunFolder(run_folder).recipe, [f"run_dir={run_folder}"])
    splits = load_splits(recipe)
    policy = Models(recipe, splits).take(stage)
    checkpoint = load_latest(RunFolder(run_folder).stage(stage).checkpoints)
    assert checkpoint is not None, f"{run_folder}: no checkpoint of {stage}"
    load_trainable(policy, checkpoint.tensors)
    collector = collector_of(recipe, policy)
    solved = collector.solve(policy, splits.train[:QUESTIONS], temperature=1.0, seed=1)
    lengths = np.array([len(completion.token_ids) for completion in solved.completions])
    cuts = (np.array(SHARES)[:, None] * (lengths - 1)).astype(np.int64)
    inputs, values = seen_by_the_head(policy, solved, cuts)
    estimates = np.stack(
        [estimated(policy, collector, solved, row, seed=seed) for seed, row in enumerate(cuts, 2)]
    )
    return explained(estimates, values, fitted(inputs, estimates), right(solved.graded))


def right(graded: Sequence[Graded]) -> Floats:
    """1 for each correct solution and 0 for any other, in order."""
    return np.array([each.verdict is Verdict.CORRECT for each in graded], dtype=float)


def seen_by_the_head(policy: Policy, solved: Solved, cuts: Ints) -> tuple[Floats, Floats]:
    """The value head's inputs (S, Q, H) and values (S, Q) at the end of each prefix, for S shares
    and Q questions."""
    responses = [completion.token_ids for completion in solved.completions]
    batch = token_batch(solved.prompts, responses, device=policy.device)
    lengths = [len(response) for response in responses]
    rows = cuts + np.cumsum([0, *lengths[:-1]])
    features = policy.features(batch)
    values = policy.values(features).detach()
    return features.double().cpu().numpy()[rows], values.double().cpu().numpy()[rows]


def estimated(
    policy: Policy, collector: Collector, solved: Solved, cuts: Ints, *, seed: int
) -> Floats:
    """(Q,) For each solution, the share of correct completions of its prefix. `cuts` (Q,) contains
    the lengths of the prefixes."""
    prefixes = [
        completion.token_ids[:cut]
        for completion, cut in zip(solved.completions, cuts, strict=True)
        for _ in range(SAMPLES)
    ]
    prompts = [prompt for prompt in solved.prompts for _ in range(SAMPLES)]
    problems = [problem for problem in solved.problems for _ in range(SAMPLES)]
    longest = collector.lengths.max_new - int(cuts.min())
    found = collector.engine.generate(
        policy,
        [[*prompt, *prefix] for prompt, prefix in zip(prompts, prefixes, strict=True)],
        SamplingParams(max_new_tokens=longest, temperature=1.0, seed=seed),
    )
    texts = [
        policy.completion([*prefix, *completion.token_ids], ()).text
        for prefix, completion in zip(prefixes, found, strict=True)
    ]
    graded = collector.encoder.grade(problems, texts)
    shares: Floats = right(graded).reshape(-1, SAMPLES).mean(axis=1)
    return shares


# --- statistics -----------------------------------------------------------------------------------


def fitted(inputs: Floats, estimates: Floats) -> Floats:
    """Values (S, Q) by ridge regression of the estimates on the inputs (S, Q, H). A question's
    values are predicted from the questions of the other folds. The penalty, too, is chosen on those
    questions."""
    return cross_predicted(inputs, estimates, best_penalty)


def best_penalty(inputs: Floats, estimates: Floats) -> float:
    """The penalty with the smallest squared error on questions that the fit has not seen."""

    def error(penalty: float) -> float:
        values = cross_predicted(inputs, estimates, lambda *_: penalty)
        return float(((values - estimates) ** 2).sum())

    return min(PENALTIES, key=error)


def cross_predicted(
    inputs: Floats, estimates: Floats, penalty_for: Callable[[Floats, Floats], float]
) -> Floats:
    """Values (S, Q), each predicted from the questions of the other folds. `penalty_for` gets the
    inputs and estimates of those questions."""
    values = np.zeros_like(estimates)
    for fold in range(FOLDS):
        held_out = np.arange(estimates.shape[1]) % FOLDS == fold
        known, targets = inputs[:, ~held_out], estimates[:, ~held_out]
        penalty = penalty_for(known, targets)
        values[:, held_out] = ridge(known, targets, inputs[:, held_out], penalty)
    return values


def ridge(known: Floats, targets: Floats, new: Floats, penalty: float) -> Floats:
    """Predicts the values of `new` inputs by a linear fit of the targets (S, Q) on the `known`
    inputs (S, Q, H). All prefix lengths share the weights, but each has its own intercept."""
    centre, scale = known.mean(axis=1, keepdims=True), known.std(axis=(0, 1)) + 1e-9
    mean = targets.mean(axis=1, keepdims=True)
    rows = ((known - centre) / scale).reshape(-1, known.shape[-1])
    gram = rows.T @ rows + penalty * np.eye(rows.shape[1])
    weights = np.linalg.solve(gram, rows.T @ (targets - mean).reshape(-1))
    values: Floats = mean + (new - centre) / scale @ weights
    return values


def explained(
    estimates: Floats, head: Floats, linear: Floats, rewards: Floats
) -> dict[str, list[float]]:
    """For each of `SHARES`: the accuracy of the completions, and the parts of the rewards' variance
    that a perfect critic, the value head and the linear fit explain. A perfect critic knows the
    true values. Their variance is that of the estimates minus the noise of `SAMPLES` samples."""
    noise = (estimates * (1 - estimates)).mean(axis=1) / (SAMPLES - 1)
    perfect = (estimates.var(axis=1) - noise) / rewards.var()

    def part(values: Floats) -> list[float]:
        return list(1 - ((rewards - values) ** 2).mean(axis=1) / rewards.var())

    return {
        "accuracy": list(estimates.mean(axis=1)),
        "perfect": list(perfect),
        "head": part(head),
        "linear": part(linear),
    }


def means(rows: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """The mean of each number over `rows`. Each row is the result of `explained` for one run."""
    return {key: list(np.mean([row[key] for row in rows], axis=0)) for key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--stage", default="ppo")
    parser.add_argument("--publish", action="store_true", help="write to docs/, not runs/")
    asked = parser.parse_args()
    rows = [measure(run_folder, asked.stage) for run_folder in asked.runs]
    mean = means(rows)
    document = {"shares": SHARES, "samples": SAMPLES, "questions": QUESTIONS, "runs": rows}
    write_atomically(
        RESULTS if asked.publish else OWN, json.dumps({**document, "mean": mean}, indent=1) + "\n"
    )
    for key, numbers in mean.items():
        print(f"{key:10}", *(f"{100 * number:6.1f}" for number in numbers))


if __name__ == "__main__":
    main()
