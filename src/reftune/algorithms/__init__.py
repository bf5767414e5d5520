"""Algorithms choose the solutions to train on, assign credit, and define the loss. Each algorithm
has its own file."""
