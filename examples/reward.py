"""A reward function of your own, in the form of TRL's `reward_funcs`: a function that takes strings
there works here unchanged.

In a recipe: `reward: examples/reward.py:right_and_shown`.
"""

from __future__ import annotations

from typing import Any


def right_and_shown(
    completions: list[str], verdicts: list[str], num_steps: list[int], **everything_else: Any
) -> list[float | None]:
    """1 for a right answer with all its steps, 0.5 if some steps are left out, 0 for a wrong
    answer.

    It is called once per batch, with keyword arguments: `prompts`, `completions`, `completion_ids`,
    the grader's `verdicts`, `values` and `reasons`, and the columns of the data that reftune does
    not read itself. For a solution to which the reward does not apply, it may return None; training
    then leaves this solution out.
    """
    return [
        0.0 if verdict != "correct" else 1.0 if text.count("=") >= steps else 0.5
        for text, verdict, steps in zip(completions, verdicts, num_steps, strict=True)
    ]
