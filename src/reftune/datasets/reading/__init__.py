"""Code that the datasets share: it reads rows and their parts, and makes splits."""
