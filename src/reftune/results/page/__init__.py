"""The HTML page about one or more runs. Its main charts can also be written as separate files."""
