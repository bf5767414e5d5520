"""Algorithms choose the rollouts to train on, give them credit, and define the loss. Each has its
own file."""
