"""Predicts, before a run, whether it will work, how long it will take and how much memory it
needs."""
