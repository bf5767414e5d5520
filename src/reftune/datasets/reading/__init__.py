"""What the datasets share: rows of files, splits, and programs derived from annotations."""
