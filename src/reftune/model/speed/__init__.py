"""What makes the model fast and changes results by rounding only."""
