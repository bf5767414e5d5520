"""The processes of a run: their ranks, their shares of the work, and their communication."""
