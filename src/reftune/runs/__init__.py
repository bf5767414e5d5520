"""A whole run: stages in order, evaluation, summary, export."""
