"""Code shared by the datasets, for example to read rows and to make splits."""
