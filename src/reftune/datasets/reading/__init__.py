"""Code shared by the datasets: rows of files, splits, and programs made from annotations."""
