"""Diagnoses of a model that is trained; none of them changes it."""
