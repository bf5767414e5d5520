"""Training stages, one file per kind, and their shared code."""
