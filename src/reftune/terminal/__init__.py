"""The commands that a user types and the output that a user sees."""
