"""The HTML page about one or more runs, and its main charts as files."""
