"""The metrics that the report plots, each with an explanation for newcomers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Unit = Literal["percent", "number", "seconds"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A metric, and how the report plots it."""

    key: str
    """The metric's name in `metrics.jsonl`."""
    title: str
    explain: str
    unit: Unit = "number"
    over_passes: bool = False
    """Whether the horizontal axis counts training sequences instead of steps, so that stages whose
    steps differ in size can be compared."""
    floor: float | None = None
    """Lower limit of the vertical axis, so that early outliers do not flatten the curve."""
    of_groups: bool = False
    """Whether the metric applies only to stages with several samples per problem."""
    exact: bool = False
    """Whether the metric has no noise and is therefore plotted without a running mean."""


LEARNING = (
    Metric(
        key="reward/mean",
        title="Reward",
        explain="Mean reward of the solutions sampled in training.",
    ),
    Metric(
        key="reward/correct",
        title="Right answers in training",
        explain=(
            "Share of right answers among the solutions sampled in training. Reinforcement learning"
            " should raise this share."
        ),
        unit="percent",
    ),
)

CHARACTER = (
    Metric(
        key="kl/reference",
        title="Distance from the start (KL)",
        explain=(
            "How much more probable a sampled solution is under the current model than under the"
            " model that the stage started from, in nats."
        ),
    ),
    Metric(
        key="policy/entropy",
        title="Entropy",
        explain=(
            "How undecided the model is about the next token, in nats. If the entropy is near 0,"
            " all samples of a problem are alike."
        ),
    ),
    Metric(
        key="response/length",
        title="Response length",
        explain="Mean number of tokens in a sampled solution; sudden jumps are a bad sign.",
    ),
    Metric(
        key="response/truncated",
        title="Cut off",
        explain="Share of solutions cut off at the length limit.",
        unit="percent",
    ),
)

HACKING = (
    Metric(
        key="choices/other_option",
        title="Right letter, other value",
        explain=(
            "Share of right answers whose reasoning arrives at the value of another option. Such an"
            " answer was rewarded for luck or a shortcut."
        ),
        unit="percent",
    ),
    Metric(
        key="choices/no_option",
        title="Right letter, no option's value",
        explain="Share of right answers whose reasoning does not arrive at any option's value.",
        unit="percent",
    ),
    Metric(
        key="choices/agreement",
        title="Same option when moved",
        explain=(
            "Share of answers that choose the same option after all options have changed places. A"
            " model that looks only at positions would choose the same letter instead."
        ),
        unit="percent",
    ),
    Metric(
        key="choices/numeric_accuracy",
        title="Solved without options",
        explain="Accuracy on questions with a numeric answer if they are asked without options.",
        unit="percent",
    ),
)

MACHINERY = (
    Metric(
        key="value/explained_variance",
        title="Explained variance",
        explain=(
            "How well the value head predicts the reward: 1 is perfect, 0 is no better than a"
            " constant, and less than 0 is worse than a constant. The axis is cut off at −1."
        ),
        floor=-1.0,
    ),
    Metric(
        key="policy/clip_fraction",
        title="Clipped tokens",
        explain="Share of tokens whose probability has moved beyond the clip range.",
        unit="percent",
    ),
    Metric(
        key="groups/constant_reward",
        title="Problems without contrast",
        explain=(
            "Share of problems whose samples all earned the same reward. Comparing such samples"
            " teaches nothing."
        ),
        unit="percent",
        of_groups=True,
    ),
    Metric(
        key="kl/mismatch",
        title="Sampling mismatch",
        explain=(
            "How much the log-probabilities recorded during sampling differ from those recomputed"
            " for the same tokens in training, in nats. The difference should be close to 0."
        ),
    ),
    Metric(
        key="grad/norm",
        title="Gradient norm",
        explain="Size of the gradient before clipping; spikes signal instability.",
        over_passes=True,
    ),
    Metric(
        key="optim/lr",
        title="Learning rate",
        explain="The factor that scales the optimizer's steps.",
        over_passes=True,
        exact=True,
    ),
    Metric(
        key="loss/sft",
        title="Supervised loss",
        explain="How surprised the model is by the solutions it is shown, in nats per token.",
        over_passes=True,
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
        "Chance that at least one of k samples is right. A perfect judge would be this accurate.",
    ),
}
"""Decision rule → title and explanation of its chart."""
