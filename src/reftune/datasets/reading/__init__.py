"""Reads rows and builds splits. Several datasets use this code."""
