"""Predicts, before a run starts, whether it will work, how long it will take and how much memory it
will need."""
