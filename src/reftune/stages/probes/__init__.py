"""Diagnoses of a model in training, none of which changes the model."""
