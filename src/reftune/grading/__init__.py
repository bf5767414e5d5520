"""Text → verdict → reward. Nothing here imports torch."""
