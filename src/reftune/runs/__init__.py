"""Whole runs: stages in order, evaluation, summary and export."""
