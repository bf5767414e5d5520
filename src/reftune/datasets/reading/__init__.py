"""Code that the datasets share, for reading rows and building splits."""
