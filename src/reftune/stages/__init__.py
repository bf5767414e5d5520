"""Training stages, one file per kind, and their shared code."""

NEEDED_ACCURACY = 0.2
"""Share of questions that RL's initial model should solve. Below it, RL gained little or nothing in
our measurements (docs/handover.md)."""
