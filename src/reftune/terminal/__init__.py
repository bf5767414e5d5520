"""Everything that a user types and sees."""
