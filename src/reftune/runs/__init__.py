"""Whole runs: a recipe's stages in order, the final evaluation, the summary, and the exports."""
