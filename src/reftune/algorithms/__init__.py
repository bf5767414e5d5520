"""Algorithms choose the rollouts to train on, assign credit, and define the loss. Each algorithm
has its own file."""
