"""Predicts whether a run will work, how long it will take and how much memory it will need, before
it starts."""
