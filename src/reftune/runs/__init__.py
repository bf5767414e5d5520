"""Whole runs: a recipe's stages in order, evaluation, summary and export."""
