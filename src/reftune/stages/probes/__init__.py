"""Diagnostic tests of a model. None of them changes the model."""
