"""The metrics that the report plots, each with an explanation for newcomers."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

Unit = Literal["percent", "number", "seconds"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric, and how the report plots it. The tables below give key, title and explanation by
    position."""

    key: str
    """A name that no other chart has. For a logged metric, its name in `metrics.jsonl`."""
    title: str
    explain: str
    """An explanation for newcomers."""
    _: KW_ONLY
    unit: Unit = "number"
    axis: Literal["steps", "sequences", "samples k"] = "steps"
    """The horizontal axis. `sequences` counts the sequences trained on, so that stages whose steps
    differ in size can be compared. `samples k` is logarithmic; with it, the vertical axis need not
    include 0."""
    floor: float | None = None
    """Lower limit of the vertical axis, so that early outliers do not flatten the curve."""
    of_groups: bool = False
    """Whether the metric applies only to stages with several samples per problem."""
    exact: bool = False
    """Whether the metric has no noise and is therefore plotted without a running mean."""


LEARNING = (
    Metric("reward/mean", "Reward", "Mean reward of the solutions sampled in training."),
    Metric(
        "reward/correct",
        "Right answers in training",
        "Share of right answers among the solutions sampled in training. Reinforcement learning"
        " should raise this share.",
        unit="percent",
    ),
)

CHARACTER = (
    Metric(
        "kl/reference",
        "Distance from the start (KL)",
        "How much more probable a sampled solution is under the current model than under the"
        " model that the stage started from, in nats.",
    ),
    Metric(
        "policy/entropy",
        "Entropy",
        "How undecided the model is about the next token, in nats. If the entropy is near 0,"
        " all samples of a problem are alike.",
    ),
    Metric(
        "response/length",
        "Response length",
        "Mean number of tokens in a sampled solution; sudden jumps are a bad sign.",
    ),
    Metric(
        "response/truncated",
        "Cut off",
        "Share of solutions cut off at the length limit.",
        unit="percent",
    ),
)

HACKING = (
    Metric(
        "choices/other_option",
        "Right letter, other value",
        "Share of right answers whose reasoning arrives at the value of another option. Such an"
        " answer was rewarded for luck or a shortcut.",
        unit="percent",
    ),
    Metric(
        "choices/no_option",
        "Right letter, no option's value",
        "Share of right answers whose reasoning does not arrive at any option's value.",
        unit="percent",
    ),
    Metric(
        "choices/agreement",
        "Same option when moved",
        "Share of answers that choose the same option after all options have changed places. A"
        " model that looks only at positions would choose the same letter instead.",
        unit="percent",
    ),
    Metric(
        "choices/numeric_accuracy",
        "Solved without options",
        "Accuracy on questions with a numeric answer if they are asked without options.",
        unit="percent",
    ),
)

MACHINERY = (
    Metric(
        "value/explained_variance",
        "Explained variance",
        "How well the value head predicts the reward: 1 is perfect, 0 is no better than a"
        " constant, and less than 0 is worse than a constant. The axis is cut off at −1.",
        floor=-1.0,
    ),
    Metric(
        "policy/clip_fraction",
        "Clipped tokens",
        "Share of tokens whose probability has moved beyond the clip range.",
        unit="percent",
    ),
    Metric(
        "groups/constant_reward",
        "Problems without contrast",
        "Share of problems whose samples all earned the same reward. Comparing such samples"
        " teaches nothing.",
        unit="percent",
        of_groups=True,
    ),
    Metric(
        "kl/mismatch",
        "Sampling mismatch",
        "How much the log-probabilities recorded during sampling differ from those recomputed"
        " for the same tokens in training, in nats. The difference should be close to 0.",
    ),
    Metric(
        "grad/norm",
        "Gradient norm",
        "Size of the gradient before clipping; spikes signal instability.",
        axis="sequences",
    ),
    Metric(
        "optim/lr",
        "Learning rate",
        "The factor that scales the optimizer's steps.",
        axis="sequences",
        exact=True,
    ),
    Metric(
        "loss/sft",
        "Supervised loss",
        "How surprised the model is by the solutions it is shown, in nats per token.",
        axis="sequences",
    ),
)

VERDICTS = {
    "correct": "right",
    "wrong": "wrong answer",
    "no_answer": "no answer",
    "error": "program error",
    "timeout": "time-out",
    "memory": "out of memory",
    "forbidden": "forbidden access",
}
"""Verdict → the verdict's name in the report."""

PHASES = {
    "time/generate_s": "sampling",
    "time/grade_s": "grading",
    "time/score_s": "scoring",
    "time/update_s": "updating",
}
"""Metric → the phase of a step that it times."""

VOTING = {
    "maj": (
        "Majority vote",
        "The most frequent answer of k samples; a tie goes to the answer seen first.",
    ),
    "weighted": (
        "Weighted vote",
        "Each of k samples votes for its answer. The reward model's score is the vote's weight.",
    ),
    "rerank": (
        "Reranking",
        "The reward model scores k samples. The answer of the highest-scoring sample counts.",
    ),
    "pass": (
        "Any right (pass@k)",
        "Chance that at least one of k samples is right. A judge that finds a right sample whenever"
        " there is one would be this accurate.",
    ),
}
"""Decision rule → title and explanation of its chart."""
