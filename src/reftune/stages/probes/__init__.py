"""Diagnoses of a model in training; none of them changes it."""
