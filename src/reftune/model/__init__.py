"""The language model under training: weights, tokens, log-probabilities, value head."""
