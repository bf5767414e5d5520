"""Training stages, one file a kind, and what they share."""
