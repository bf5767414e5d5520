"""Training stages, one file per kind, and their shared code."""

NEEDED_ACCURACY = 0.2
"""Share of dev problems that a model should solve before RL starts. Below this share, RL gained
little or nothing in our measurements (docs/handover.md)."""
