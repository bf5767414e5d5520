"""Runs as a whole: stages in order, evaluation, summary and export."""
