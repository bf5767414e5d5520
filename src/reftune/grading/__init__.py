"""Turns completions into verdicts and rewards. Nothing here imports torch."""
