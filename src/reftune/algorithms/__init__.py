"""Algorithms: which rollouts to train on, how they earn credit, and the loss. One file per
algorithm."""
