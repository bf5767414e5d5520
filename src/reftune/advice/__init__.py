"""What can be said before a run starts: whether it would work, how long it takes, what memory it
needs."""
