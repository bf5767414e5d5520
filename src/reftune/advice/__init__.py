"""Advice before a run starts: whether it would work, how long it would take, how much memory it
would need."""
