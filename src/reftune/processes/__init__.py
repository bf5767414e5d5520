"""The processes of a run: their ranks, what they share, and what they send each other."""
