"""A reward function of your own. It has the form of TRL's `reward_funcs`: a reward function for TRL
works here unchanged if it takes strings.

To use it, set `reward: examples/reward.py:right_and_shown` in the recipe.
"""

from __future__ import annotations

from typing import Any


def right_and_shown(
    completions: list[str], verdicts: list[str], num_steps: list[int], **everything_else: Any
) -> list[float | None]:
    """The reward is 1 if the answer is right and the solution shows all steps, 0.5 if the answer is
    right but steps are left out, and 0 otherwise.

    The function is called once per batch, with these keyword arguments: `prompts`, `completions`,
    `completion_ids`, the grader's `verdicts`, `values` and `reasons`, and the columns of the data
    that reftune does not read itself. If the reward does not apply to a solution, the function may
    return None for this solution. Training then leaves the solution out.
    """
    return [
        0.0 if verdict != "correct" else 1.0 if text.count("=") >= steps else 0.5
        for text, verdict, steps in zip(completions, verdicts, num_steps, strict=True)
    ]
