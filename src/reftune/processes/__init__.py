"""The processes of a run: who they are, what they share, and what they tell each other."""
