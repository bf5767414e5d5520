"""Algorithms choose the rollouts to train on, give credit, and define the loss. Each has a file."""
