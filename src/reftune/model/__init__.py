"""The language model under training: its weights, tokens, log-probabilities and value head."""
