"""The language model being trained: its weights, tokens, log-probabilities and value head."""
